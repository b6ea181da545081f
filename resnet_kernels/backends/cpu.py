"""The CPU backend: fp32 convolutions of our own for AVX2 and AVX-512, oneDNN for all others, and vectorised passes.

The C++ is in csrc/cpu. The primitives are documented in contract.py.

A batch runs a few images at a time, so that their activations stay in cache (`images_per_pass`). Activations also stay
below the size from which malloc maps fresh pages, zeroed by the kernel, on every call: on 2 Zen 3 cores oneDNN's
64 -> 256 1x1 convolution on 56x56 runs at 166 GFLOP/s for 4 images at a time and at 37 GFLOP/s for 16.

fp16 activations are always computed in fp32, and bf16 ones if the processor has no bf16 instructions. That is more
accurate and far faster than emulation.

In training, convolutions read plain operands: what an Operand holds is computed once, by a pass of
csrc/cpu/reductions.cpp. Passes, reductions and weight gradients run in fp32; 16-bit activations are widened before them
and rounded after them.
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

# Bytes of the activations that are alive during one pass. From 12 to 24 MB the speed is the same within 3 % (ResNet-18
# and ResNet-50, 2 AVX-512 cores). With 24 MB the peak memory of ResNet-18 exceeds half of eager's there.
PASS_BYTES = 16 * 2**20


def why_not(call: Call) -> str | None:
    reason = why_unsupported(call, SUPPORTS, "cpu", DTYPES)
    if reason is None and not torch.backends.mkldnn.is_available():
        reason = "expected a torch built with oneDNN, got one without"
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
    # A data gradient with a stride or groups is no convolution of stride 1, and exists in fp32 only.
    only_fp32 = any(p.data_grad_size and (p.geometry.stride > 1 or p.geometry.groups > 1) for p in products)
    compute = torch.float32 if only_fp32 else compute_dtype(dtype)
    # The epilogue of a convolution kernel has shift, residual and ReLU. A pass after the convolutions does the rest.
    separate_pass = _needs_pass(epilogue, sizes[1])
    residual = None if separate_pass else epilogue.residual
    overwrite = epilogue.overwrite and compute == dtype
    y = None if residual is None else _nhwc(residual.tensor, compute)
    for i, p in enumerate(products):
        shift = None if separate_pass or i else epilogue.shift
        relu = epilogue.relu and not separate_pass and i == len(products) - 1
        x = _nhwc(_plain(p.operand, compute), compute)
        y = _convolve(C, x, p, shift, y, overwrite or i > 0, relu)
    assert y is not None
    if separate_pass:
        return _pass(Operand(y), epilogue, dtype, store=True, in_place=True)
    result = y.to(dtype)
    return result, _reduction_of(result, epilogue.reduce)


def _convolve(
    C: Any, x: Tensor, p: Product, shift: Tensor | None, y: Tensor | None, overwrite: bool, relu: bool
) -> Tensor:
    """Return relu(scale * conv(x) + shift + y) for one product, or the same with its data gradient.

    C: the extension. x: the product's operand as a plain tensor in the compute dtype, channels_last. overwrite: the
    result may reuse y's memory.
    """
    packed, g = p.packed, p.geometry
    if p.data_grad_size is not None:
        assert isinstance(packed.weight, Tensor)
        weight = packed.weight.to(x.dtype)
        if packed.scale is not None:
            x = x * packed.scale[:, None, None]
        # The equivalent convolution would have a negative padding, which oneDNN does not support.
        negative_padding = g.dilation * (weight.shape[2] - 1) < g.padding
        if g.stride > 1 or g.groups > 1 or negative_padding:
            t = C.data_grad(x, weight, *p.data_grad_size, g)
            if y is None and shift is None and not relu:
                return t
            return _pass(Operand(t), Epilogue(shift, None if y is None else Operand(y), relu), x.dtype, True, True)[0]
        # A data gradient of stride 1 is a convolution with the transposed weight, its filters rotated by 180 degrees.
        g = Geometry(1, g.dilation * (weight.shape[2] - 1) - g.padding, g.dilation)
        conv = C.pack_conv(weight, torch.ones(weight.shape[1]), g, x.shape, "auto", True)
        return C.conv(x, conv, None if shift is None else shift.to(x.dtype), y, overwrite, relu)
    scale = None
    if isinstance(packed.weight, Tensor):
        # The scale of a plain weight (in training) multiplies the accumulator: rounding scale * weight would put the
        # same error in every row.
        scale = None if packed.scale is None else packed.scale.float().contiguous()
        packed = pack(packed.weight, torch.ones(packed.shape[0]), g, x.shape, keep=False)
    if scale is not None and x.dtype != torch.float32:
        # oneDNN rounds its sums to 16 bits. The pass does the rest of the epilogue in fp32 and rounds once more.
        c = C.conv(x, packed.weight, None, None, False, False, None)
        b = torch.zeros_like(scale) if shift is None else shift.float()
        rest = Epilogue(residual=None if y is None else Operand(y), relu=relu)
        return _pass(Operand(c, (scale, b)), rest, x.dtype, store=True, in_place=True)[0]
    return C.conv(x, packed.weight, None if shift is None else shift.to(x.dtype), y, overwrite, relu, scale)


def _needs_pass(e: Epilogue, channels: int) -> bool:
    """Return whether an epilogue has more than the shift, plain residual and ReLU of a convolution kernel."""
    r = e.residual
    residual_work = r is not None and (not r.plain or e.upsample > 1 or r.tensor.shape[1] < channels)
    return residual_work or e.mask is not None or isinstance(e.reduce, Normalized)


def _reduction_of(y: Tensor, by: str | Normalized | None) -> Any:
    """Return the reduction of a stored result y, as `Epilogue.reduce` says; here the mask is y itself."""
    return None if by is None else y if by == "mask" else reduce(Operand(y), by)


def residual_blocks(x: Tensor, blocks: Sequence[PackedBlock], overwrite: bool) -> Tensor:
    """Run consecutive blocks, one C++ call each. x: channels_last, in the compute dtype."""
    C, _ = extension.load()
    for i, block in enumerate(blocks):
        # Each packed weight holds its geometry.
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
            # Winners are decided between the rounded values, so those are computed first.
            x, affine = Operand(_pass(x, dataclasses.replace(epilogue, reduce=None), dtype, store=True)[0]), None
        a, b = (t.float().contiguous() for t in affine) if affine else (None, None)
        y, winners = C.max_pool_relu_winners(_nhwc(x.tensor, torch.float32), a, b, *pool)
        return y.to(dtype), winners
    if x.plain and epilogue == Epilogue(relu=True):
        v = _nhwc(x.tensor, torch.float32 if dtype == torch.float16 else dtype)
        return C.max_pool_relu(v, *pool).to(dtype), None
    return torch.max_pool2d(_pass(x, epilogue, dtype, store=True)[0], *pool), None


def mask_size(sizes: Sequence[int]) -> tuple[int, ...] | None:
    return None


def materialize(operand: Operand, kernel: int) -> Operand:
    return operand if operand.plain else Operand(_plain(operand, operand.tensor.dtype))


def _lazy(o: Operand) -> tuple:
    """Return an operand of stride 1 as the tuple of fp32 tensors that the extension takes; see csrc/bindings.cpp."""
    per_channel = [None if t is None else t.float().contiguous() for t in (*(o.affine or (None, None)), o.centre)]
    mask = _plain(o.mask, torch.float32) if isinstance(o.mask, Operand) else o.mask
    tensors = [None if t is None else _nhwc(t, torch.float32) for t in (o.tensor, mask, o.second and o.second[0])]
    a2, mean = (None, None) if o.second is None else (t.float().contiguous() for t in o.second[1:])
    winners, window = None, (0,) * 5
    if o.pooled is not None:
        winners, window = _nhwc(o.pooled.winners, torch.uint8), (*o.pooled.pool, *o.pooled.size)
    return tensors[0], tensors[1], *per_channel[:2], tensors[2], a2, mean, o.relu, per_channel[2], winners, window


def _unstrided(o: Operand) -> Operand:
    """Return the operand with its tensors subsampled, so that its stride is 1."""
    if o.stride == 1:
        return o

    C, _ = extension.load()

    def subsampled(t: Tensor) -> Tensor:
        return C.subsampled(t.contiguous(memory_format=torch.channels_last), o.stride)

    second = None if o.second is None else (subsampled(o.second[0]), *o.second[1:])
    mask = _plain(o.mask, torch.float32) if isinstance(o.mask, Operand) else o.mask
    mask = None if mask is None else subsampled(mask)
    return dataclasses.replace(o, tensor=subsampled(o.tensor), second=second, mask=mask, stride=1)


def _plain(operand: Operand, dtype: torch.dtype) -> Tensor:
    """Return the value that the operand stands for, rounded to its tensor's dtype and then converted to `dtype`. Of a
    plain operand, return its tensor unconverted."""
    o = _unstrided(operand)
    if o.plain:
        return o.tensor
    C, _ = extension.load()
    y, _ = C.bn_pass(_lazy(o), None, None, False, None, 0.0, True, None, "", None)
    return y.to(o.tensor.dtype).to(dtype)


def _rounds_to_zero(dtype: torch.dtype) -> float:
    """Return the largest fp32 number that rounds to zero in `dtype`; 0 if `dtype` has fp32's exponents. A mask computed
    in fp32 compares with this threshold, so that it keeps the same elements as a mask that was rounded to `dtype`."""
    return 2.0**-25 if dtype == torch.float16 else 0.0


def _pass(x: Operand, e: Epilogue, dtype: torch.dtype, store: bool, in_place: bool = False) -> tuple[Any, Any]:
    """Return (t, reduced) of `bn_pass` with t in `dtype`.

    store: False computes the reduction only; t is then None. in_place: t may reuse x's memory.
    """
    C, _ = extension.load()
    x = _unstrided(x)
    residual, mask = None, None
    if e.residual is not None:
        r = _unstrided(e.residual)
        if e.upsample > 1 or r.tensor.shape[1] < x.tensor.shape[1]:
            value = _plain(r, torch.float32)
            if in_place and x.plain:
                x.tensor[:, : value.shape[1], :: e.upsample, :: e.upsample] += value
                e = dataclasses.replace(e, residual=None, upsample=1)
                if store and e == Epilogue(overwrite=e.overwrite):
                    return x.tensor.to(dtype), None
            else:
                r = Operand(_upsample(value, x.sizes, e.upsample))
        residual = None if e.residual is None else _lazy(r)
    if e.mask is not None:
        mask = _lazy(e.mask if isinstance(e.mask, Operand) else Operand(e.mask.to(torch.float32)))
    # Reductions are of the rounded result. If the result will be rounded to 16 bits, they are taken after that.
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
    y, sums = C.bn_pass(lazy, shift, residual, e.relu, mask, _rounds_to_zero(dtype), store, out, kind, normalized)
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
    """Return zeros of `sizes` (N, C, H, W) with r in the first channels of every upsample-th row and column."""
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
