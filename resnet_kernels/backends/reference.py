"""The reference backend: every primitive in plain torch, for any floating dtype. It defines the correct result.

Products are computed in `accumulator_dtype` (fp32, or fp64 for fp64) from operands rounded to the compute dtype, and a
result is rounded once, at its end. The code is written to be read, not to be fast. The primitives are documented in
contract.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from . import algebra
from .contract import (
    NO_WINNER,
    Affine,
    Call,
    Epilogue,
    Geometry,
    Moments,
    Normalized,
    Operand,
    Packed,
    Pool,
    Pooled,
    Product,
    Stats,
    TailGrad,
    accumulator_dtype,
    check_conv,
    why_unsupported,
)

NAME = "reference"
SUPPORTS = frozenset(
    "conv wgrad moments bn_pass finalize residual two_products lazy two_tensors mask stats reduce data_grad pool gated"
    " training".split()
)
PACKS_FOR_SIZE = False


def why_not(call: Call) -> str | None:
    return why_unsupported(call, SUPPORTS, None, None)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype


def images_per_pass(image_bytes: int) -> int | None:
    return None


def pack(weight: Tensor, scale: Tensor, geometry: Geometry, size: Sequence[int], keep: bool = True) -> Packed:
    return Packed(weight, scale, tuple(weight.shape))


def _per_channel(t: Tensor) -> Tensor:
    """Return a vector (C) as (C, 1, 1), to broadcast over an NCHW tensor."""
    return t[:, None, None]


def mask_size(sizes: Sequence[int]) -> tuple[int, ...] | None:
    return None


def materialize(operand: Operand, kernel: int) -> Operand:
    return operand


def _value(operand: Operand) -> Tensor:
    """Return the value that the operand stands for, in its tensor's dtype; see `contract.Operand` for the order."""
    s = operand.stride
    x = operand.tensor[:, :, ::s, ::s]
    v = x.to(accumulator_dtype(x.dtype))
    if operand.pooled is not None:
        v = _unpooled(v, operand.pooled)
    if operand.mask is not None:
        v = torch.where(_keeps(operand.mask)[:, :, ::s, ::s], v, 0)
    if operand.affine is not None:
        a, b = operand.affine
        v = _per_channel(a) * v + _per_channel(b)
    if operand.second is not None:
        tensor, a2, mean = operand.second
        v = v + _per_channel(a2) * (tensor[:, :, ::s, ::s].to(v.dtype) - _per_channel(mean))
    if operand.relu:
        v = torch.relu(v)
    v = v.to(x.dtype)
    return v if operand.centre is None else v - _per_channel(operand.centre)


def _corners(pool: Pool, P: int, Q: int) -> tuple[Tensor, Tensor]:
    """Return the row (P, 1) and the column (1, Q) of the top left element of each of P x Q windows."""
    rows, columns = (torch.arange(n) * pool.stride - pool.padding for n in (P, Q))
    return rows[:, None], columns[None, :]


def _winners(flat: Tensor, t: Tensor, pool: Pool, W: int) -> Tensor:
    """Return `Pooled.winners` for the maxima t. flat: the index of each maximum in its map of width W, row by row."""
    row, column = (o.to(flat.device) for o in _corners(pool, *t.shape[2:]))
    within = (flat // W - row) * pool.kernel + flat % W - column
    return torch.where(t <= 0, NO_WINNER, within).to(torch.uint8).contiguous(memory_format=torch.channels_last)


def _unpooled(v: Tensor, pooled: Pooled) -> Tensor:
    """Return the gradient before max pooling: each value of v added to the element that won its window."""
    winners, pool, (H, W) = pooled
    row, column = (o.to(v.device) for o in _corners(pool, *v.shape[2:]))
    within, no_winner = winners.long(), winners == NO_WINNER
    flat = (row + within // pool.kernel) * W + column + within % pool.kernel
    full = v.new_zeros(*v.shape[:2], H * W)
    full.scatter_add_(2, torch.where(no_winner, 0, flat).flatten(2), torch.where(no_winner, 0, v).flatten(2))
    return full.view(*v.shape[:2], H, W)


def _keeps(mask: Tensor | Operand) -> Tensor:
    """Return a bool tensor that is True where the mask keeps a value. A NaN in the mask keeps."""
    t = _value(mask) if isinstance(mask, Operand) else mask
    return t if t.dtype == torch.bool else ~(t <= 0)


def _finish(t: Tensor, epilogue: Epilogue, dtype: torch.dtype, pool: Pool | None = None) -> tuple[Tensor, Any]:
    """Return (epilogue(t) rounded to dtype and pooled, its reduction). A residual is added to t in place."""
    if epilogue.shift is not None:
        t = t + _per_channel(epilogue.shift)
    if epilogue.residual is not None:
        r = _value(epilogue.residual).to(t.dtype)
        t[:, : r.shape[1], :: epilogue.upsample, :: epilogue.upsample] += r
    if epilogue.relu:
        t = torch.relu(t)
    if epilogue.mask is not None:
        t = torch.where(_keeps(epilogue.mask), t, 0)
    t = t.to(dtype)
    if pool is not None:
        W = t.shape[3]
        t, flat = F.max_pool2d(t, *pool, return_indices=True)
        if epilogue.reduce == "winners":
            t = t.contiguous(memory_format=torch.channels_last)
            return t, _winners(flat, t, pool, W)
    t = t.contiguous(memory_format=torch.channels_last)
    if epilogue.reduce is None or epilogue.reduce == "mask":
        return t, None if epilogue.reduce is None else t
    return t, _reduced(t, epilogue.reduce)


def _reduced(t: Tensor, by: str | Normalized) -> Any:
    """Return the `Stats` of t, or (sum(t), sum(t * xhat)) for a `Normalized`."""
    # Sums are in fp64: the error of a mean is the same in every row, so later sums over rows add it up.
    v, w = t.double(), accumulator_dtype(t.dtype)
    if isinstance(by, Normalized):
        centred = by.tensor.to(v.dtype) - _per_channel(by.mean)
        return v.sum((0, 2, 3)).to(w), ((v * centred).sum((0, 2, 3)) * by.rstd).to(w)
    mean = v.mean((0, 2, 3))
    M2 = (v - _per_channel(mean)).square().sum((0, 2, 3))
    return Stats(v.numel() // v.shape[1], mean.to(w), M2.to(w))


def conv(products: Sequence[Product], epilogue: Epilogue) -> tuple[Tensor, Any]:
    N, channels, H, W = check_conv(products, epilogue)
    dtype = products[0].operand.tensor.dtype
    total: Tensor | None = None
    for p in products:
        x = _value(p.operand).to(accumulator_dtype(dtype))
        weight, scale, _ = p.packed
        w, g = weight.to(x.dtype), p.geometry
        if p.data_grad_size is None:
            t = F.conv2d(x, w, None, *g)
        else:
            # Up to `stride` input sizes have the same output size; output_padding picks the right one.
            R, S = w.shape[2:]
            output_padding = [
                n + 2 * g.padding - g.dilation * (k - 1) - 1 - (m - 1) * g.stride
                for n, m, k in ((H, x.shape[2], R), (W, x.shape[3], S))
            ]
            t = F.conv_transpose2d(x, w, None, g.stride, g.padding, output_padding, g.groups, g.dilation)
        if scale is not None:
            t = t * _per_channel(scale)
        total = t if total is None else total + t
    assert total is not None
    return _finish(total, epilogue, dtype)


def masked_conv(products: Sequence[Product], epilogue: Epilogue) -> tuple[Operand, tuple[Tensor, Tensor]]:
    t, sums = conv(products, epilogue)
    return Operand(t), sums


def wgrad(
    g: Operand, x: Operand, kernel: tuple[int, int], geometry: Geometry, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    gv, xv = (_value(o).to(accumulator_dtype(o.tensor.dtype)) for o in (g, x))
    sizes = (gv.shape[1], xv.shape[1] // geometry.groups, *kernel)
    return conv2d_weight(xv, sizes, gv, *geometry), gv.double().sum((0, 2, 3)).to(gv.dtype) if sums else None


def moments(h: Operand) -> Moments:
    rows = _value(h).permute(0, 2, 3, 1).flatten(0, 2).double()
    mean = rows.mean(0)
    w = accumulator_dtype(h.tensor.dtype)
    return Moments(rows.shape[0], mean.to(w), ((rows - mean).T @ (rows - mean)).to(w))


def bn_pass(x: Operand, epilogue: Epilogue, pool: Pool | None = None) -> tuple[Tensor, Any]:
    dtype = x.tensor.dtype
    value = _value(x).to(accumulator_dtype(dtype))
    # `_finish` adds a residual in place, so the caller's tensor is copied first.
    return _finish(value.clone() if x.plain else value, epilogue, dtype, pool)


def reduce(x: Operand, by: str | Normalized) -> Any:
    return _reduced(_value(x), by)


def gated(z: Tensor, gate: Tensor | None, shortcut: Tensor | None, relu: bool) -> Tensor:
    t = z.to(accumulator_dtype(z.dtype))
    if gate is not None:
        t = t * gate[:, :, None, None]
    if shortcut is not None:
        t = t + shortcut
    return (torch.relu(t) if relu else t).to(z.dtype).contiguous(memory_format=torch.channels_last)


def gated_grad(
    dy: Tensor, y: Tensor | None, z: Tensor | None, gate: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    g = (dy if y is None else torch.where(y <= 0, 0, dy)).contiguous(memory_format=torch.channels_last)
    dz, dgate = None, None
    if wanted[0]:
        assert gate is not None
        dz = (g * gate[:, :, None, None]).to(dy.dtype)
    if wanted[1]:
        assert z is not None
        dgate = (g.to(accumulator_dtype(dy.dtype)) * z).sum((2, 3))
    return dz, dgate, g if wanted[2] else None


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
