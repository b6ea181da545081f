"""Passes over a tensor with everything that training applies in them, and what they reduce to (every GPU from sm_80).

    t = epilogue(x)     reduced: statistics of t  |  sum(t), sum(t * xhat)  |  bits that tell where not (t <= 0)

One program owns BLOCK_C channels of `span` rows, BLOCK_M at a time. It keeps what it reduces element by element
(statistics by Welford's update: each element's own mean, and squared deviations from it), merges its rows at its end,
and writes one part per channel; `products.merge` merges the parts in the order of their rows. Without statistics or
sums a program has one step.

Moves: the operand, its second tensor and mask, the residual and its mask, xhat's tensor and the epilogue's mask once,
these two together where they are the same; the result once if it is wanted; a bit per element; 8 bytes per channel and
part.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...contract import Epilogue, Normalized, Operand, Stats, nhwc_strides
from ..configs import power_of_two
from ..device import affine, relu
from ..inference.gather import row_of
from ..launch import Launch, Work, nbytes, processors_of, submit
from .products import Lazy, bytes_of, in_rows, kept, lazy_of, merge, packed_bits, row_in, value

# Programs for a multiprocessor where each has many steps.
PROGRAMS = 8


@triton.jit
def pack(bit, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Bytes [BLOCK_M, BLOCK_C / 8] of booleans: bit j of byte b is channel 8b + j."""
    split = bit.to(tl.int32).reshape(BLOCK_M, BLOCK_C // 8, 8)
    return tl.sum(split << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def _pass_kernel(
    x,
    residual,
    mask,
    xhat_ptr,
    mean_ptr,
    shift_ptr,
    y_ptr,
    bits_ptr,
    parts_ptr,
    M,
    P,
    Q,
    span,
    parts,
    xhat_pitch,
    SHIFT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    RELU: tl.constexpr,
    MASK: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """REDUCE: "", "stats", "xhat" or "mask"."""
    DTYPE: tl.constexpr = x.x.dtype.element_ty
    c_tiles = tl.cdiv(x.C, BLOCK_C)
    c0, part = tl.program_id(0) % c_tiles * BLOCK_C, tl.program_id(0) // c_tiles
    c = c0 + tl.arange(0, BLOCK_C)
    known = c < x.C
    first = part * span
    last = tl.minimum(first + span, M)
    # Means and squared deviations from them, or sums of t and of t * (c - mean).
    one = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    two = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if REDUCE == "xhat":
        mean = tl.load(mean_ptr + c, known, 0.0)
    for m0 in range(first, last, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        there = m < last
        inside = there[:, None] & known[None, :]
        row = m.to(tl.int64)
        t = value(x, row_in(x, m, P, Q), there, c0, BLOCK_C).to(tl.float32)
        t = affine(t, None, shift_ptr, c, known, False, SHIFT)
        if RESIDUAL:
            if UPSAMPLE == 1:
                t += value(residual, row_in(residual, m, P, Q), there, c0, BLOCK_C).to(tl.float32)
            else:
                n, p, q = row_of(m, P, Q)
                rows, columns = tl.cdiv(P, UPSAMPLE), tl.cdiv(Q, UPSAMPLE)
                at = row_in(residual, (n * rows + p // UPSAMPLE) * columns + q // UPSAMPLE, rows, columns)
                stands = there & (p % UPSAMPLE == 0) & (q % UPSAMPLE == 0)
                r = value(residual, at, stands, c0, BLOCK_C).to(tl.float32)
                t += tl.where(stands[:, None], r, 0.0)
        if RELU:
            t = relu(t)
        if MASK:
            if mask.x is None:
                keep = kept(mask, row, there, c0, BLOCK_C)
            else:
                # A NaN keeps.
                keep = ~(value(mask, row_in(mask, m, P, Q), there, c0, BLOCK_C) <= 0)
            t = tl.where(keep, t, 0.0)
        y = t.to(DTYPE)
        if y_ptr is not None:
            tl.store(y_ptr + row[:, None] * x.C + c[None, :], y, inside)
        t = y.to(tl.float32)
        if REDUCE == "stats":
            off = t - one
            moved = one + off / ((m0 - first) // BLOCK_M + 1)
            two = tl.where(inside, two + off * (t - moved), two)
            one = tl.where(inside, moved, one)
        if REDUCE == "xhat":
            h = tl.load(xhat_ptr + row[:, None] * xhat_pitch + c[None, :], inside, 0.0).to(tl.float32)
            one += tl.where(inside, t, 0.0)
            two += tl.where(inside, t * (h - mean[None, :]), 0.0)
        if REDUCE == "mask":
            byte, pitch = c0 // 8 + tl.arange(0, BLOCK_C // 8), tl.cdiv(x.C, 8)
            bits = pack(~(t <= 0) & known[None, :], BLOCK_M, BLOCK_C)
            tl.store(bits_ptr + row[:, None] * pitch + byte[None, :], bits, there[:, None] & (byte < pitch)[None, :])
    if REDUCE == "stats":
        counts = ((last - first - tl.arange(0, BLOCK_M) + BLOCK_M - 1) // BLOCK_M).to(tl.float32)[:, None]
        of_rows = tl.sum(one * counts, 0) / (last - first)
        off = one - of_rows[None, :]
        two += counts * off * off
        a = of_rows
    else:
        a = tl.sum(one, 0)
    if REDUCE == "stats" or REDUCE == "xhat":
        tl.store(parts_ptr + part.to(tl.int64) * x.C + c, a, known)
        tl.store(parts_ptr + (parts + part).to(tl.int64) * x.C + c, tl.sum(two, 0), known)


def _masking(mask: Tensor | Operand, C: int) -> Lazy:
    """Of a tensor its bits, without x."""
    if isinstance(mask, Operand):
        return lazy_of(mask, mask.stride)
    return Lazy(bits=packed_bits(mask), C=C)


def _run(x: Operand, epilogue: Epilogue, store: bool) -> tuple[Tensor | None, Any]:
    sizes = N, C, P, Q = x.sizes
    M, device, by = N * P * Q, x.tensor.device, epilogue.reduce
    y = torch.empty(sizes, dtype=x.tensor.dtype, device=device, memory_format=torch.channels_last) if store else None
    bits = torch.empty((M, -(-C // 8)), dtype=torch.uint8, device=device) if by == "mask" else None
    if not M:
        return y, _of_nothing(C, by, device) if bits is None else bits
    BLOCK_C = min(64, max(16, power_of_two(C)))
    # Of a pooled operand what all windows hold is loaded first.
    BLOCK_M = (2048 if x.pooled is None else 1024) // BLOCK_C
    c_tiles, parts = -(-C // BLOCK_C), -(-M // BLOCK_M)
    reducing = by is not None and bits is None
    if reducing:
        parts = min(parts, max(1, PROGRAMS * processors_of(device) // c_tiles))
    span = -(-M // (parts * BLOCK_M)) * BLOCK_M
    parts = -(-M // span)
    normalized = in_rows(by.tensor) if isinstance(by, Normalized) else None
    residual = None if epilogue.residual is None else lazy_of(epilogue.residual, epilogue.residual.stride)
    mask = None if epilogue.mask is None else _masking(epilogue.mask, C)
    partial = torch.empty((2, parts, C), dtype=torch.float32, device=device) if reducing else None
    operand = lazy_of(x, x.stride)
    arguments = dict(
        x=operand,
        residual=residual,
        mask=mask,
        xhat_ptr=normalized,
        mean_ptr=by.mean.float().contiguous() if isinstance(by, Normalized) else None,
        shift_ptr=None if epilogue.shift is None else epilogue.shift.float().contiguous(),
        y_ptr=y,
        bits_ptr=bits,
        parts_ptr=partial,
        M=M,
        P=P,
        Q=Q,
        span=span,
        parts=parts,
        xhat_pitch=0 if normalized is None else nhwc_strides(normalized)[2],
        SHIFT=epilogue.shift is not None,
        RESIDUAL=residual is not None,
        UPSAMPLE=epilogue.upsample,
        RELU=epilogue.relu,
        MASK=mask is not None,
        REDUCE="xhat" if isinstance(by, Normalized) else by or "",
        BLOCK_M=BLOCK_M,
        BLOCK_C=BLOCK_C,
    )
    copied = bytes_of(operand, M) + nbytes(normalized, y, bits, partial)
    copied += 0 if mask is None else bytes_of(mask, M)
    if residual is not None:
        copied += bytes_of(residual, N * -(-P // epilogue.upsample) * -(-Q // epilogue.upsample))
    # What masks may be what the sums are taken with: a program reads it twice, one after the other.
    shared = isinstance(by, Normalized) and isinstance(epilogue.mask, Operand) and epilogue.mask.tensor is by.tensor
    moved = copied - nbytes(normalized) * shared
    what = f"pass {C} {P}x{Q}" + f" {arguments['REDUCE']}" * (by is not None)
    submit(Launch(_pass_kernel, parts * c_tiles, arguments, {"num_warps": 4}, what, Work(moved, 0, copied, 0)))
    if partial is None:
        return y, bits
    rstd = by.rstd.float().contiguous() if isinstance(by, Normalized) else None
    a, b = merge(partial, M, span, by == "stats", rstd)
    return y, Stats(M, a, b) if by == "stats" else (a, b)


def _of_nothing(C: int, by: str | Normalized | None, device: torch.device) -> Any:
    zeros = torch.zeros(C, device=device)
    if by == "stats":
        return Stats(0, torch.full_like(zeros, float("nan")), zeros)
    return None if by is None else (zeros, zeros.clone())


def bn_pass(x: Operand, epilogue: Epilogue) -> tuple[Tensor, Any]:
    """(t (N, K, P, Q), reduced): epilogue(x); see `contract.Epilogue`. reduce="mask" gives uint8 (M, ceil(K/8)): bit j
    of byte b is channel 8b + j, set where not (t <= 0)."""
    t, reduced = _run(x, epilogue, store=True)
    assert t is not None
    return t, reduced


def reduce(x: Operand, by: str | Normalized) -> Any:
    """What `bn_pass` of x reduces to by "stats" or `Normalized`, without its result."""
    return _run(x, Epilogue(reduce=by), store=False)[1]


def reduce_masked(t: Tensor, epilogue: Epilogue) -> Any:
    """What `bn_pass` of t reduces to, without its result."""
    return _run(Operand(t), epilogue, store=False)[1]


def computed(x: Operand) -> Tensor:
    """What the operand stands for, (N, C, P, Q) channels_last: its own tensor if it is plain."""
    return in_rows(x.tensor) if x.plain else bn_pass(x, Epilogue())[0]
