"""The family `gpu:sm90`: convolutions, data gradients, weight gradients and moments for Hopper GPUs in bf16 and fp16.

CUDA C++ with wgmma and TMA (csrc/cuda/sm90); docs/hopper.md has the design and the measurements.

    launchers.py  the argument structures of the kernels, and their launches

Passes between convolutions, and convolutions that these kernels do not support, come from the family `gpu:cuda`. The
whole family runs only if it is named. The backend `gpu` launches its inference kernels where they were measured to be
faster than Triton's. No GPU has run its training kernels and its whole-bottleneck kernel yet: tests run their sources
on a CPU and read their machine code.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...contract import (
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
    check_conv,
    fold,
    why_unsupported,
)
from .. import cuda, glue
from ..cuda.passes import computed
from ..glue import krsc
from . import launchers

NAME = "gpu:sm90"
SUPPORTS = cuda.SUPPORTS
PACKS_FOR_SIZE = False

# Primitives that are those of the family gpu:cuda.
finalize_stats, finalize_moments = cuda.finalize_stats, cuda.finalize_moments
finalize_bn_grad, finalize_tail_grad = cuda.finalize_bn_grad, cuda.finalize_tail_grad
reduce = cuda.reduce

# Features of a convolution that need no pass of gpu:cuda.
ALONE = frozenset({"conv", "residual", "two_products", "stats", "data_grad"})


def why_not(call: Call) -> str | None:
    reason = why_unsupported(call, SUPPORTS, None, launchers.DTYPES) or launchers.why_not_here(call.device, call.dtype)
    if reason is None and not call.needs <= ALONE:
        reason = cuda.why_not(call)
    # In training one backend runs a whole block, so unsupported convolutions go to cuDNN.
    if reason or "training" in call.needs:
        return reason
    turned = "data_grad" in call.needs
    reasons = (why_not_convolution(s, g, turned) for s, g in call.weights)
    return next(filter(None, reasons), None)


def why_not_convolution(shape: Sequence[int], geometry: Geometry, turned: bool) -> str | None:
    """Return why conv_act cannot run a convolution by a weight (K, C/groups, R, S), or with `turned` its data
    gradient."""
    reason = launchers.why_not_weight((shape[0], shape[1] * geometry.groups, *shape[2:]), geometry)
    return reason or (launchers.why_not_turned(shape, geometry) if turned else None)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype


def images_per_pass(image_bytes: int) -> int | None:
    return None


def pack(weight: Tensor, scale: Tensor | None, geometry: Geometry, size: Sequence[int], keep: bool = True) -> Packed:
    shape = tuple(weight.shape)
    if keep and scale is not None:
        weight, scale = fold(weight, scale, weight.dtype), None
    return Packed(krsc(weight), scale, shape)


def mask_size(sizes: Sequence[int]) -> None:
    """Return None: a result is its own mask. It is saved anyway, as the next block's operand."""


def materialize(operand: Operand, kernel: int) -> Operand:
    return operand if operand.plain else Operand(_computed(operand))


def _computed(operand: Operand) -> Tensor:
    mask = operand.mask
    if isinstance(mask, Tensor) and mask.is_floating_point():
        operand = dataclasses.replace(operand, mask=Operand(mask, relu=True))
    return computed(operand)


def _readable(operand: Operand, stride: int = 1) -> Tensor:
    """Return every stride-th row and column of the materialized operand, laid out as TMA can read it."""
    stride = stride * operand.stride
    operand = dataclasses.replace(operand, stride=1)
    t = (operand.tensor if operand.plain else _computed(operand))[:, :, ::stride, ::stride]
    return t if launchers.aligned(t) else t.contiguous(memory_format=torch.channels_last)


def _runs(products: Sequence[Product]) -> bool:
    """Return whether conv_act can run the sum: one product, or one and an ungrouped 1x1 product."""
    *_, last = products
    if len(products) > 2 or (len(products) == 2 and (last.packed.shape[2:], last.geometry.padding) != ((1, 1), 0)):
        return False
    turned = (p.data_grad_size is not None for p in products)
    return all(
        why_not_convolution(p.packed.shape, p.geometry, t) is None for p, t in zip(products, turned, strict=True)
    )


def _term(p: Product, alone: bool) -> tuple[Tensor, Tensor, Geometry, Tensor | None]:
    """Return operand, weight (K, R, S, C), geometry and scale of a product.

    alone: the sum has no other product. Else the scale is folded into the weight, and None is returned for it.
    """
    packed = p.packed if isinstance(p.weight, Packed) else pack(p.weight, p.scale, p.geometry, (), keep=not alone)
    weight, scale, geometry = packed.weight, packed.scale, p.geometry
    if scale is not None and not alone:
        weight, scale = fold(weight, scale, weight.dtype), None
    if p.data_grad_size is not None:
        weight, geometry = launchers.turned(weight, geometry)
    if alone or weight.shape[1:3] != (1, 1):
        return _readable(p.operand), weight, geometry, scale
    return _readable(p.operand, geometry.stride), weight, Geometry(), scale


def _prepared(products: Sequence[Product], y: Tensor, scaled: bool = True) -> tuple[functools.partial, Tensor | None]:
    """Return conv_act with its products and result y bound, and the scale; None unless `scaled`."""
    first, *others = (_term(p, scaled and len(products) == 1) for p in products)
    x, weight, geometry, scale = first
    second = others[0][:2] if others else None
    return functools.partial(launchers.conv_act, x, weight, y, geometry, second=second), scale


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def conv(products: Sequence[Product], epilogue: Epilogue) -> tuple[Tensor, Any]:
    N, K, *_ = sizes = check_conv(products, epilogue)
    by, first = epilogue.reduce, products[0].operand.tensor
    masked = epilogue.mask is not None or isinstance(by, Normalized)
    if masked or epilogue.upsample > 1 or not _runs(products) or 0 in sizes:
        return _by_passes(products, epilogue)
    y = torch.empty(sizes, dtype=first.dtype, device=first.device, memory_format=torch.channels_last)
    run, scale = _prepared(products, y)
    residual = None
    if epilogue.residual is not None:
        residual = _readable(epilogue.residual)
        residual = F.pad(residual, (0, 0, 0, 0, 0, K - residual.shape[1]))
        residual = residual.contiguous(memory_format=torch.channels_last)
    run = functools.partial(
        run, scale=_vector(scale), shift=_vector(epilogue.shift), residual=residual, relu=epilogue.relu
    )
    tile, rows = launchers.tile_for(K), y.numel() // K
    if by == "stats":
        parts = torch.empty((2, -(-rows // 128), K), dtype=torch.float32, device=y.device)
        run(tile.replace("turn", "stats"), parts=parts)
        return y, launchers.statistics_of(parts, rows)
    run(tile)
    return y, y if by == "mask" else None


def residual_block(x: Tensor, block: PackedBlock) -> Tensor | None:
    """Return the block's result by the whole-bottleneck kernel, or None if that does not support the block."""
    shapes = [w.shape for w in block.weights]
    if not x.numel() or launchers.why_not_bottleneck(shapes, block.geometries, block.shortcut, x.shape[3]):
        return None
    weights = tuple(w.weight if w.scale is None else fold(w.weight, w.scale, x.dtype) for w in block.weights)
    sizes = (x.shape[0], shapes[2][0], *x.shape[2:])
    y = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    shifts = tuple(b.float().contiguous() for b in block.shifts)
    launchers.bottleneck(_readable(Operand(x)).contiguous(memory_format=torch.channels_last), weights, shifts, y)
    return y


def _by_passes(products: Sequence[Product], epilogue: Epilogue) -> tuple[Tensor, Any]:
    """Run the sum by conv_act if possible, else by cuDNN, and operands and epilogue by passes of gpu:cuda."""
    if 0 in check_conv(products, epilogue) or not _runs(products):
        asked = epilogue.reduce == "mask"
        t, reduced = cuda.conv(
            [dataclasses.replace(p, operand=Operand(_readable(p.operand))) for p in products],
            dataclasses.replace(epilogue, reduce=None) if asked else epilogue,
        )
        return t, t if asked else reduced
    t, _ = conv(products, Epilogue())
    return bn_pass(Operand(t), epilogue)


def masked_conv(products: Sequence[Product], epilogue: Epilogue) -> tuple[Operand, tuple[Tensor, Tensor]]:
    """One kernel applies the mask and takes the sums if that is faster. Else the returned operand carries the mask, and
    its reader applies it."""
    sizes, by, mask = check_conv(products, epilogue), epilogue.reduce, epilogue.mask
    assert isinstance(by, Normalized) and isinstance(mask, Operand)
    if epilogue.residual is None and 0 not in sizes and _runs(products):
        if _sums_pay(products, sizes[1]) and _masks_by(mask, by):
            return _masked_by_kernel(products, epilogue, sizes)
        t, _ = conv(products, Epilogue(epilogue.shift))
        return Operand(t, mask=mask), reduce(Operand(t, mask=mask), by)
    t, sums = _by_passes(products, epilogue)
    return Operand(t), sums


def _sums_pay(products: Sequence[Product], K: int) -> bool:
    """Return whether the tile with sums is faster than a pass.

    The tile has 64 channels. A 3x3 convolution with more reads its operands again for each 64, which costs more than
    the pass.
    """
    return K <= 64 or products[0].packed.shape[2:] == (1, 1)


def _masks_by(mask: Operand, by: Normalized) -> bool:
    """Return whether the mask is an affine and a ReLU of the normalized tensor."""
    plain = dataclasses.replace(mask, affine=None, relu=False).plain
    return plain and mask.relu and mask.tensor.data_ptr() == by.tensor.data_ptr() and launchers.aligned(by.tensor)


def _masked_by_kernel(
    products: Sequence[Product], epilogue: Epilogue, sizes: Sequence[int]
) -> tuple[Operand, tuple[Tensor, Tensor]]:
    by, mask, K = epilogue.reduce, epilogue.mask, sizes[1]
    assert isinstance(by, Normalized) and isinstance(mask, Operand)
    z = by.tensor.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(z)
    run, _ = _prepared(products, y, scaled=False)
    nothing = torch.zeros(K, device=y.device)
    a, b = mask.affine or (torch.ones_like(nothing), nothing)
    shift = nothing if epilogue.shift is None else epilogue.shift
    masks = torch.stack((shift, a, b, by.mean), 1).float()
    parts = torch.empty((2, -(-y.numel() // K // 128), K), dtype=torch.float32, device=y.device)
    run("sums128x64", residual=z, parts=parts, masks=masks)
    sums = parts.sum(1, dtype=torch.float64)
    return Operand(y), (sums[0].float(), (sums[1] * by.rstd).float())


def wgrad(
    g: Operand, x: Operand, kernel: tuple[int, int], geometry: Geometry, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    K, C = g.tensor.shape[1], x.tensor.shape[1]
    if why_not_convolution((K, C // geometry.groups, *kernel), geometry, False) or 0 in g.sizes:
        return cuda.wgrad(Operand(_readable(g)), Operand(_readable(x)), kernel, geometry, sums)
    parts, totals = _summed(_readable(g), _readable(x), kernel, geometry, sums)
    return parts.sum(0).permute(0, 3, 1, 2), None if totals is None else totals.sum(0)


def _summed(
    g: Tensor, x: Tensor, kernel: tuple[int, int], geometry: Geometry, sums: bool, upper: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the partial sums of `launchers.wgrad_parts`."""
    (N, K, P, Q), C, taps = g.shape, x.shape[1], kernel[0] * kernel[1]
    columns = 2 if upper else launchers.wgrad_columns(C, taps)
    M, tiles = N * P * Q, launchers.wgrad_tiles(K, C, taps, columns, upper)
    span = launchers.wgrad_span(M, tiles, K * C * taps, glue.multiprocessors(x.device))
    new = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    parts = new((-(-M // span), K, *kernel, C))
    totals = new((len(parts), K)) if sums else None
    launchers.wgrad_parts(g, x, kernel, geometry, span, columns, parts, totals, upper)
    return parts, totals


def moments(h: Operand) -> Moments:
    N, J, P, Q = h.sizes
    if J % 8 or not N * P * Q:
        return cuda.moments(Operand(_readable(h)))
    t, rows = _readable(h), N * P * Q
    parts, totals = _summed(t, t, (1, 1), Geometry(), sums=True, upper=True)
    assert totals is not None
    # In fp64: the difference of two large sums loses m^2 units if the mean is m standard deviations.
    total = totals.sum(0, dtype=torch.float64)
    upper = torch.triu(parts.view(-1, J, J).sum(0, dtype=torch.float64) - total[:, None] * (total / rows))
    return Moments(rows, (total / rows).float(), (upper + torch.triu(upper, 1).T).float())


def bn_pass(x: Operand, epilogue: Epilogue, pool: Pool | None = None) -> tuple[Tensor, Any]:
    asked = epilogue.reduce == "mask"
    t, reduced = cuda.bn_pass(x, dataclasses.replace(epilogue, reduce=None) if asked else epilogue, pool)
    return t, t if asked else reduced
