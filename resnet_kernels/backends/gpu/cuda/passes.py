"""Passes over a map, with reductions: csrc/cuda/pass.cuh."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...contract import Epilogue, Normalized, Operand, Stats, nhwc_strides
from ..glue import bit_mask_size, empty_nhwc, reduction_of_no_rows
from .calls import TYPES, Mask, Pass, Source, View, in_rows, library, vector
from .pooling import unpooled

REDUCTIONS = {None: 0, "stats": 1, "sum": 2, "mask": 3}
BITS, BYTES, TENSOR = 1, 2, 3

# The kernels count positions (N*P*Q) in 31 bits.
MOST_ROWS = 2**31 - 1


class Filled:
    """Fills a `Pass` structure. held: the tensors whose memory it points to, alive until the launch."""

    def __init__(self, x: Tensor, sizes: Sequence[int]) -> None:
        self.N, self.C, self.P, self.Q = sizes
        self.dtype, self.device = x.dtype, x.device
        self.call = Pass(P=self.P, Q=self.Q, C=self.C, M=self.N * self.P * self.Q, spread=1, aligned=self.C % 8 == 0)
        self.call.type = TYPES[x.dtype]
        self.held: list[Tensor] = []

    def pointer(self, t: Tensor, by: int = 16) -> int:
        self.held.append(t)
        self.call.aligned &= t.data_ptr() % by == 0
        return t.data_ptr()

    def vector(self, t: Tensor | None, name: str, channels: int | None = None) -> int | None:
        if t is None:
            return None
        return self.pointer(vector(t, self.C if channels is None else channels, self.device, name))

    def view(self, t: Tensor, stride: int, name: str, sizes: Sequence[int], dtype: torch.dtype | None = None) -> View:
        """Return a view of every stride-th row and column of t, of `sizes` (N, C, H, W).

        Raises TypeError or ValueError if the sizes, the dtype or the device are others.
        """
        N, C, H, W = sizes
        got = (*t.shape[:2], *(-(-n // stride) for n in t.shape[2:]))
        if got != tuple(sizes):
            raise ValueError(f"{name}: expected {tuple(sizes)}, got {got}")
        if (t.dtype, t.device) != (dtype or self.dtype, self.device):
            raise TypeError(f"{name}: expected {dtype or self.dtype} on {self.device}, got {t.dtype} on {t.device}")
        t = in_rows(t)
        n, h, w = nhwc_strides(t)
        # A thread reads eight elements, at most 16 bytes at a time.
        by = min(16, 8 * t.element_size())
        self.call.aligned &= all(s * t.element_size() % by == 0 for s in (n, h, w))
        return self._map(View(self.pointer(t, by), n, h * stride, w * stride), H, W)

    def _map(self, view: View, H: int, W: int) -> View:
        self.call.mapped |= (view.n, view.h) != (H * W * view.w, W * view.w)
        return view

    def mask(self, mask: Tensor | Operand, stride: int, sizes: Sequence[int]) -> Mask:
        """Return the mask of a tensor of `sizes` (N, C, H, W) that is read with `stride`."""
        N, C, H, W = sizes
        seen = (N, C, -(-H // stride), -(-W // stride))
        if isinstance(mask, Tensor) and mask.dtype == torch.uint8 and mask.dim() == 2:
            rows, pitch = bit_mask_size(sizes)
            if tuple(mask.shape) != (rows, pitch) or mask.device != self.device:
                raise ValueError(f"mask: expected {(rows, pitch)} bytes of bits, got {tuple(mask.shape)}")
            view = View(self.pointer(mask.contiguous(), 1), H * W * pitch, stride * W * pitch, stride * pitch)
            return Mask(self._map(view, *seen[2:]), kind=BITS)
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            rows_of_bytes = in_rows(mask).view(torch.uint8)
            return Mask(self.view(rows_of_bytes, stride, "mask", seen, torch.uint8), kind=BYTES)
        operand = mask if isinstance(mask, Operand) else Operand(mask)
        if operand.sizes != tuple(sizes):
            raise ValueError(f"mask: expected {tuple(sizes)}, got {operand.sizes}")
        if any(v is not None for v in (operand.second, operand.mask, operand.centre, operand.pooled)):
            operand = Operand(computed(operand))
        a, b = operand.affine or (None, None)
        view = self.view(operand.tensor, stride * operand.stride, "mask", seen)
        vectors = self.vector(a, "mask: a", C), self.vector(b, "mask: b", C)
        # The operand's ReLU may be left out: it does not change which values are at most zero.
        return Mask(view, *vectors, TENSOR)

    def source(self, o: Operand, name: str, scale: Tensor | None = None) -> Source:
        """Return an operand. scale: replaces the affine; then nothing is rounded before the epilogue."""
        sizes = o.sizes
        s = Source(self.view(o.tensor, o.stride, name, sizes), relu=o.relu, rounds=scale is None, channels=sizes[1])
        if o.mask is not None:
            s.mask = self.mask(o.mask, o.stride, o.tensor.shape)
        a, b = (scale, None) if o.affine is None else o.affine
        s.a, s.b = self.vector(a, f"{name}: a", sizes[1]), self.vector(b, f"{name}: b", sizes[1])
        if o.second is not None:
            tensor, a2, mean = o.second
            s.second = self.view(tensor, o.stride, f"{name}: second", sizes)
            s.a2, s.mean = (self.vector(t, f"{name}: second", sizes[1]) for t in (a2, mean))
        if o.centre is not None:
            if o.tensor.dtype != torch.float32:
                raise TypeError(f"{name}: expected float32 where a centre is subtracted, got {o.tensor.dtype}")
            s.centre = self.vector(o.centre, f"{name}: centre", sizes[1])
        # A residual with fewer channels must be a multiple of eight by itself.
        self.call.aligned &= sizes[1] % 8 == 0
        return s


def run(x: Operand, epilogue: Epilogue, store: bool, scale: Tensor | None = None) -> tuple[Tensor | None, Any]:
    """Return (t, or None unless `store`; the reduction).

    Beside the contract's reductions there is "sum", the first of `Normalized`'s two. scale: replaces x's affine; then
    nothing is rounded before the epilogue.
    """
    if x.pooled is not None:
        x = dataclasses.replace(x, tensor=unpooled(x.tensor, x.pooled), pooled=None)
    sizes = N, C, P, Q = x.sizes
    filled, by = Filled(x.tensor, sizes), epilogue.reduce
    call, device = filled.call, x.tensor.device
    y = empty_nhwc(x.tensor, sizes) if store else None
    bits = torch.empty(bit_mask_size(sizes), dtype=torch.uint8, device=device) if by == "mask" else None
    reducing = by is not None and bits is None
    if 0 in sizes:
        return y, bits if bits is not None else reduction_of_no_rows(C, by, device)
    if call.M > MOST_ROWS:
        raise ValueError(f"x: expected at most {MOST_ROWS} positions, got {tuple(sizes)}")
    call.x = filled.source(x, "x", scale)
    if epilogue.residual is not None:
        r = epilogue.residual
        if r.second is not None or r.pooled is not None:
            r = Operand(computed(r))
        expected = (N, C, -(-P // epilogue.upsample), -(-Q // epilogue.upsample))
        if (r.sizes[0], *r.sizes[2:]) != (N, *expected[2:]) or r.sizes[1] > C:
            raise ValueError(f"residual: expected {expected}, got {r.sizes}")
        call.residual, call.spread = filled.source(r, "residual"), epilogue.upsample
        call.mapped |= epilogue.upsample > 1
    if epilogue.mask is not None:
        call.mask = filled.mask(epilogue.mask, 1, sizes)
    call.shift, call.relu = filled.vector(epilogue.shift, "shift"), epilogue.relu
    call.y, call.bits = None if y is None else filled.pointer(y), None if bits is None else bits.data_ptr()
    if isinstance(by, Normalized):
        call.reduce, call.normalized = 2, filled.view(by.tensor, 1, "normalized", sizes)
        call.mean, call.rstd = filled.vector(by.mean, "mean"), filled.vector(by.rstd, "rstd")
    else:
        call.reduce = REDUCTIONS[by]
    call.span = library().number("span", call.M, C, library().multiprocessors(device))
    if not reducing:
        library().run("pass", call, device)
        return y, bits
    one, two = torch.empty(2, C, device=device).unbind()
    parts = torch.empty(2, -(-call.M // call.span), C, device=device)
    call.parts, call.first, call.second = parts.data_ptr(), one.data_ptr(), two.data_ptr()
    library().run("pass", call, device)
    return y, Stats(call.M, one, two) if by == "stats" else (one, two)


def computed(x: Operand) -> Tensor:
    """Return the materialized operand, (N, C, P, Q) channels_last: its own tensor if it is plain and channels_last."""
    if x.plain:
        return x.tensor.contiguous(memory_format=torch.channels_last)
    t, _ = run(x, Epilogue(), store=True)
    assert t is not None
    return t
