"""CPUs: fp32 convolutions of our own where there is AVX2 or AVX-512, oneDNN's for the rest, and vectorised passes
(csrc/cpu).

A batch runs a few images at a time, so that their activations stay in cache (`images_per_pass`). That also keeps them
under the size from which malloc maps and zeroes fresh pages on every call: on 2 Zen 3 cores oneDNN's 64 -> 256 1x1
convolution on 56x56 runs at 166 GFLOP/s for 4 images at a time and at 37 for 16.

16-bit activations are computed in fp32 where the processor has no such instructions (and fp16 always): more accurate,
and far faster than emulation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import algebra, extension
from .contract import (
    Affine,
    Call,
    Epilogue,
    Geometry,
    Moments,
    Normalized,
    Operand,
    Packed,
    PackedBlock,
    Pool,
    Product,
    Stats,
    TailGrad,
    check_conv,
    why_unsupported,
)

NAME = "cpu"
SUPPORTS = frozenset(
    "conv wgrad moments bn_pass finalize residual two_products lazy two_tensors mask stats reduce data_grad pool gated"
    " training".split()
)
PACKS_FOR_SIZE = True
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Bytes of activations to keep in flight. Between 12 and 24 MB speed is level (ResNet-18 and 50, 2 AVX-512 cores: within
# 3 %); with 24 a ResNet-18's peak passes half of eager's there.
PASS_BYTES = 16 * 2**20


def why_not(call: Call) -> str | None:
    reason = why_unsupported(call, SUPPORTS, "cpu", DTYPES)
    if reason is None and not torch.backends.mkldnn.is_available():
        reason = "this torch was built without oneDNN"
    return reason or extension.load()[1]


@functools.cache
def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32


def images_per_pass(image_bytes: int) -> int | None:
    return max(1, PASS_BYTES // max(1, image_bytes))


def pack(weight: Tensor, scale: Tensor, geometry: Geometry, size: Sequence[int], keep: bool = True) -> Packed:
    C, _ = extension.load()
    weight = weight.to(compute_dtype(weight.dtype))
    conv = C.pack_conv(weight, scale.contiguous(), geometry, [max(1, size[0]), *size[1:]], "auto")
    return Packed(conv, None, tuple(weight.shape))


def _nhwc(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).contiguous(memory_format=torch.channels_last)


def conv(products: Sequence[Product], epilogue: Epilogue) -> tuple[Tensor, Any]:
    sizes = check_conv(products, epilogue)
    C, _ = extension.load()
    dtype = products[0].operand.tensor.dtype
    # Data gradients that no convolution of stride 1 computes exist in fp32.
    strided = any(p.data_grad_size and (p.geometry.stride > 1 or p.geometry.groups > 1) for p in products)
    compute = torch.float32 if strided else compute_dtype(dtype)
    # A pass behind the convolutions does what their own epilogue (shift, residual, ReLU) cannot.
    pass_behind = _needs_pass(epilogue, sizes[1])
    residual = None if pass_behind else epilogue.residual
    overwrite = epilogue.overwrite and compute == dtype
    y = None if residual is None else _nhwc(residual.tensor, compute)
    for i, p in enumerate(products):
        shift = None if pass_behind or i else epilogue.shift
        relu = epilogue.relu and not pass_behind and i == len(products) - 1
        x = _nhwc(_plain(p.operand, compute), compute)
        y = _convolve(C, x, p, shift, y, overwrite or i > 0, relu)
    assert y is not None
    if pass_behind:
        return _pass(Operand(y), epilogue, dtype, store=True, in_place=True)
    result = y.to(dtype)
    return result, _reduction_of(result, epilogue.reduce)


def _convolve(
    C: Any, x: Tensor, p: Product, shift: Tensor | None, y: Tensor | None, overwrite: bool, relu: bool
) -> Tensor:
    """relu(product of x + shift + y)."""
    packed, g = p.packed, p.geometry
    if p.data_grad_size is not None:
        assert isinstance(packed.weight, Tensor)
        weight = packed.weight.to(x.dtype)
        if packed.scale is not None:
            x = x * packed.scale[:, None, None]
        # oneDNN has no negative padding.
        cropped = g.dilation * (weight.shape[2] - 1) < g.padding
        if g.stride > 1 or g.groups > 1 or cropped:
            t = C.data_grad(x, weight, *p.data_grad_size, g)
            if y is None and shift is None and not relu:
                return t
            return _pass(Operand(t), Epilogue(shift, None if y is None else Operand(y), relu), x.dtype, True, True)[0]
        # A data gradient of stride 1 is the convolution by the filter turned round.
        g = Geometry(1, g.dilation * (weight.shape[2] - 1) - g.padding, g.dilation)
        conv = C.pack_conv(weight, torch.ones(weight.shape[1]), g, x.shape, "auto", True)
        return C.conv(x, conv, None if shift is None else shift.to(x.dtype), y, overwrite, relu)
    scale = None
    if isinstance(packed.weight, Tensor):
        # The weight stays exact: rounding of a scaled one would be the same error in every row.
        scale = None if packed.scale is None else packed.scale.float().contiguous()
        packed = pack(packed.weight, torch.ones(packed.shape[0]), g, x.shape, keep=False)
    if scale is not None and x.dtype != torch.float32:
        # oneDNN rounds its sums to 16 bits; all that follows is rounded once.
        c = C.conv(x, packed.weight, None, None, False, False, None)
        b = torch.zeros_like(scale) if shift is None else shift.float()
        added = Epilogue(residual=None if y is None else Operand(y), relu=relu)
        return _pass(Operand(c, (scale, b)), added, x.dtype, store=True, in_place=True)[0]
    return C.conv(x, packed.weight, None if shift is None else shift.to(x.dtype), y, overwrite, relu, scale)


def _needs_pass(e: Epilogue, channels: int) -> bool:
    r = e.residual
    residual = r is not None and (not r.plain or e.upsample > 1 or r.tensor.shape[1] < channels)
    return residual or e.mask is not None or isinstance(e.reduce, Normalized)


def _reduction_of(y: Tensor, by: str | Normalized | None) -> Any:
    """Of a result that is stored already."""
    return None if by is None else y if by == "mask" else reduce(Operand(y), by)


def residual_blocks(x: Tensor, blocks: Sequence[PackedBlock], overwrite: bool) -> Tensor:
    """Whole blocks, one call each; x in the compute dtype and channels_last."""
    C, _ = extension.load()
    for i, block in enumerate(blocks):
        # The packed weights know their geometries.
        weights, shifts = [w.weight for w in block.weights], [b.to(x.dtype) for b in block.shifts]
        x = C.residual_block(x, weights, shifts, block.shortcut, overwrite or i > 0)
    return x


def gated(z: Tensor, gate: Tensor | None, shortcut: Tensor | None, relu: bool) -> Tensor:
    C, _ = extension.load()
    return C.gated(z, gate, shortcut, relu)


def gated_grad(
    dy: Tensor, y: Tensor | None, z: Tensor | None, gate: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    C, _ = extension.load()
    return C.gated_grad(dy, y, z if wanted[1] else None, gate, list(wanted))


def bn_pass(x: Operand, epilogue: Epilogue, pool: Pool | None = None) -> tuple[Tensor, Any]:
    dtype = x.tensor.dtype
    if pool is None:
        return _pass(x, epilogue, dtype, store=True)
    C, _ = extension.load()
    if epilogue.reduce == "winners":
        affine: tuple[Tensor, Tensor] | None = x.affine
        if (
            dtype != torch.float32
            or x != Operand(x.tensor, affine)
            or epilogue != Epilogue(relu=True, reduce="winners")
        ):
            # Which of them is the greatest is decided between rounded values.
            x, affine = Operand(_pass(x, dataclasses.replace(epilogue, reduce=None), dtype, store=True)[0]), None
        a, b = (t.float().contiguous() for t in affine) if affine else (None, None)
        y, winners = C.max_pool_relu_winners(_nhwc(x.tensor, torch.float32), a, b, *pool)
        return y.to(dtype), winners
    if x.plain and epilogue == Epilogue(relu=True):
        v = _nhwc(x.tensor, torch.float32 if dtype == torch.float16 else dtype)
        return C.max_pool_relu(v, *pool).to(dtype), None
    return torch.max_pool2d(_pass(x, epilogue, dtype, store=True)[0], *pool), None


# Training. Products read plain operands: what an Operand holds is computed once, by a pass.


def mask_size(sizes: Sequence[int]) -> tuple[int, ...] | None:
    return None


def materialize(operand: Operand, kernel: int) -> Operand:
    return operand if operand.plain else Operand(_plain(operand, operand.tensor.dtype))


def _lazy(o: Operand) -> tuple:
    """As the extension takes it, in fp32; its stride must be 1."""
    per_channel = [None if t is None else t.float().contiguous() for t in (*(o.affine or (None, None)), o.centre)]
    mask = _plain(o.mask, torch.float32) if isinstance(o.mask, Operand) else o.mask
    tensors = [None if t is None else _nhwc(t, torch.float32) for t in (o.tensor, mask, o.second and o.second[0])]
    a2, mean = (None, None) if o.second is None else (t.float().contiguous() for t in o.second[1:])
    winners, window = None, (0,) * 5
    if o.pooled is not None:
        winners, window = _nhwc(o.pooled.winners, torch.uint8), (*o.pooled.pool, *o.pooled.size)
    return tensors[0], tensors[1], *per_channel[:2], tensors[2], a2, mean, o.relu, per_channel[2], winners, window


def _unstrided(o: Operand) -> Operand:
    """With every stride-th row and column taken."""
    if o.stride == 1:
        return o

    C, _ = extension.load()

    def part(t: Tensor) -> Tensor:
        return C.subsampled(t.contiguous(memory_format=torch.channels_last), o.stride)

    second = None if o.second is None else (part(o.second[0]), *o.second[1:])
    mask = None if o.mask is None else part(_plain(o.mask, torch.float32) if isinstance(o.mask, Operand) else o.mask)
    return dataclasses.replace(o, tensor=part(o.tensor), second=second, mask=mask, stride=1)


def _plain(operand: Operand, dtype: torch.dtype) -> Tensor:
    """What the operand stands for, rounded to its tensor's dtype, in `dtype`."""
    o = _unstrided(operand)
    if o.plain:
        return o.tensor
    C, _ = extension.load()
    y, _ = C.bn_pass(_lazy(o), None, None, False, None, 0.0, True, None, "", None)
    return y.to(o.tensor.dtype).to(dtype)


def _rounds_to_zero(dtype: torch.dtype) -> float:
    """The largest number that fp32 still has and `dtype` does not."""
    return 2.0**-25 if dtype == torch.float16 else 0.0


def _pass(x: Operand, e: Epilogue, dtype: torch.dtype, store: bool, in_place: bool = False) -> tuple[Any, Any]:
    """bn_pass, with its result in `dtype`; in_place: it may take x's memory."""
    C, _ = extension.load()
    x = _unstrided(x)
    residual, kept = None, None
    if e.residual is not None:
        r = _unstrided(e.residual)
        if e.upsample > 1 or r.tensor.shape[1] < x.tensor.shape[1]:
            part = _plain(r, torch.float32)
            if in_place and x.plain:
                x.tensor[:, : part.shape[1], :: e.upsample, :: e.upsample] += part
                e = dataclasses.replace(e, residual=None, upsample=1)
                if store and e == Epilogue(overwrite=e.overwrite):
                    return x.tensor.to(dtype), None
            else:
                r = Operand(_upsample(part, x.sizes, e.upsample))
        residual = None if e.residual is None else _lazy(r)
    if e.mask is not None:
        kept = _lazy(e.mask if isinstance(e.mask, Operand) else Operand(e.mask.to(torch.float32)))
    # Sums are of the rounded result: where rounding follows, they are taken behind it.
    rounds = dtype != torch.float32
    normalized, kind = None, ""
    if isinstance(e.reduce, Normalized) and not rounds:
        n = e.reduce
        normalized = [_nhwc(n.tensor, torch.float32), n.mean.float().contiguous(), n.rstd.float().contiguous()]
    elif e.reduce == "stats" and not rounds:
        kind = "stats"
    lazy, (N, _, H, W) = _lazy(x), x.sizes
    rows = N * H * W
    shift = None if e.shift is None else e.shift.float().contiguous()
    out = lazy[0] if in_place and lazy[0].is_contiguous(memory_format=torch.channels_last) else None
    y, sums = C.bn_pass(lazy, shift, residual, e.relu, kept, _rounds_to_zero(dtype), store, out, kind, normalized)
    if not store:
        return None, Stats(rows, *sums) if kind else sums
    t: Tensor = y.to(dtype)
    if e.reduce == "mask":
        return t, t
    if rounds and e.reduce is not None:
        return t, reduce(Operand(t), e.reduce)
    if kind:
        return t, Stats(rows, *sums)
    return t, sums


def _upsample(r: Tensor, sizes: Sequence[int], upsample: int) -> Tensor:
    """r at every upsample-th row and column, and in the first channels, of zeros."""
    full = torch.zeros(sizes, dtype=r.dtype).contiguous(memory_format=torch.channels_last)
    full[:, : r.shape[1], ::upsample, ::upsample] = r
    return full


def reduce(x: Operand, by: str | Normalized) -> Any:
    if x.plain:
        x = Operand(x.tensor.float())
    elif x.tensor.dtype != torch.float32:
        x = Operand(_plain(x, torch.float32))
    return _pass(x, Epilogue(reduce=by), torch.float32, store=False)[1]


def masked_conv(products: Sequence[Product], epilogue: Epilogue) -> tuple[Operand, tuple[Tensor, Tensor]]:
    t, sums = conv(products, epilogue)
    return Operand(t), sums


def wgrad(
    g: Operand, x: Operand, kernel: tuple[int, int], geometry: Geometry, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    C, _ = extension.load()
    gt, xt = (_nhwc(_plain(o, torch.float32), torch.float32) for o in (g, x))
    return C.wgrad(gt, xt, *kernel, geometry, sums)


def moments(h: Operand) -> Moments:
    C, _ = extension.load()
    h = _unstrided(h)
    rows, mean, _ = reduce(h, "stats")
    value = h if h.tensor.dtype == torch.float32 else Operand(_plain(h, torch.float32))
    centred = _nhwc(_plain(dataclasses.replace(value, centre=mean), torch.float32), torch.float32)
    M2 = C.second_moments(centred)
    return Moments(rows, mean, M2, Operand(centred) if h.tensor.dtype == torch.float32 else None)


def finalize_stats(stats: Stats, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    return algebra.table(stats, gamma, beta, eps)


def finalize_moments(m: Moments, weight: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    return algebra.table(algebra.product_stats(m, weight), gamma, beta, eps)


def finalize_bn_grad(sums: tuple[Tensor, Tensor], rows: int | Tensor, affine: Affine) -> tuple[Tensor, ...]:
    return algebra.bn_grad(sums, rows, affine)


def finalize_tail_grad(
    sg: Tensor, G: Tensor, centre: Tensor | None, m: Moments, weight: Tensor, affine: Affine
) -> TailGrad:
    return algebra.tail_grad(sg, G, centre, m, weight, affine)
