"""The primitives in plain torch, for any floating dtype: the definition of correct.

Products are computed in `wide` (fp32, or fp64) from operands rounded to the compute dtype, and a result is rounded
once, at its end. Nothing here is meant to be fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from .contract import (
    Affine,
    Call,
    Epilogue,
    Geometry,
    Moments,
    Operand,
    Packed,
    Pool,
    Product,
    Stats,
    beyond,
    check_conv,
    wide,
)

NAME = "reference"
SUPPORTS = frozenset(
    "conv wgrad moments bn_pass finalize residual two_products lazy two_tensors mask reduce data_grad pool".split()
)
PACKS_FOR_SIZE = False


def why_not(call: Call) -> str | None:
    return beyond(call, SUPPORTS, None, None)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype


def images_per_pass(image_bytes: int) -> int | None:
    return None


def pack(weight: Tensor, scale: Tensor, geometry: Geometry, size: Sequence[int], keep: bool = True) -> Packed:
    return Packed(weight, scale, tuple(weight.shape))


def _per_channel(t: Tensor) -> Tensor:
    return t[:, None, None]


def _value(operand: Operand) -> Tensor:
    """What the operand stands for, in its tensor's dtype."""
    s = operand.stride
    x = operand.tensor[:, :, ::s, ::s]
    v = x.to(wide(x.dtype))
    if operand.affine is not None:
        a, b = operand.affine
        v = _per_channel(a) * v + _per_channel(b)
    if operand.second is not None:
        tensor, a2 = operand.second
        v = v + _per_channel(a2) * tensor[:, :, ::s, ::s].to(v.dtype)
    if operand.relu:
        v = torch.relu(v)
    if operand.mask is not None:
        v = torch.where(operand.mask[:, :, ::s, ::s], v, 0)
    return v.to(x.dtype)


def _finish(t: Tensor, epilogue: Epilogue, dtype: torch.dtype, pool: Pool | None = None) -> tuple[Tensor, Any]:
    if epilogue.shift is not None:
        t = t + _per_channel(epilogue.shift)
    if epilogue.residual is not None:
        t = t + _value(epilogue.residual).to(t.dtype)
    if epilogue.relu:
        t = torch.relu(t)
    if epilogue.mask is not None:
        t = torch.where(epilogue.mask, t, 0)
    t = t.to(dtype)
    if pool is not None:
        t = F.max_pool2d(t, *pool)
    t = t.contiguous(memory_format=torch.channels_last)
    if epilogue.reduce is None:
        return t, None
    v = t.to(wide(dtype))
    if isinstance(epilogue.reduce, Operand):
        xhat = _value(epilogue.reduce).to(v.dtype)
        return t, (v.sum((0, 2, 3)), (v * xhat).sum((0, 2, 3)))
    mean = v.mean((0, 2, 3))
    M2 = (v - _per_channel(mean)).square().sum((0, 2, 3))
    return t, Stats(v.numel() // v.shape[1], mean, M2)


def conv(products: Sequence[Product], epilogue: Epilogue) -> tuple[Tensor, Any]:
    N, channels, H, W = check_conv(products, epilogue)
    dtype = products[0].operand.tensor.dtype
    total: Tensor | None = None
    for p in products:
        x = _value(p.operand).to(wide(dtype))
        weight, scale, _ = p.packed
        w, g = weight.to(x.dtype), p.geometry
        if p.data_grad_size is None:
            t = F.conv2d(x, w, None, *g)
        else:
            # conv_transpose2d leaves the size open by stride - 1 rows: the operand's.
            R, S = w.shape[2:]
            extra = [
                n + 2 * g.padding - g.dilation * (k - 1) - 1 - (m - 1) * g.stride
                for n, m, k in ((H, x.shape[2], R), (W, x.shape[3], S))
            ]
            t = F.conv_transpose2d(x, w, None, g.stride, g.padding, extra, g.groups, g.dilation)
        if scale is not None:
            t = t * _per_channel(scale)
        total = t if total is None else total + t
    assert total is not None
    return _finish(total, epilogue, dtype)


def wgrad(g: Operand, x: Operand, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    gv, xv = (_value(o).to(wide(o.tensor.dtype)) for o in (g, x))
    sizes = (gv.shape[1], xv.shape[1] // geometry.groups, *kernel)
    return conv2d_weight(xv, sizes, gv, *geometry)


def moments(h: Operand) -> Moments:
    rows = _value(h).permute(0, 2, 3, 1).flatten(0, 2)
    rows = rows.to(wide(rows.dtype))
    mean = rows.mean(0)
    return Moments(rows.shape[0], mean, (rows - mean).T @ (rows - mean))


def bn_pass(x: Operand, epilogue: Epilogue, pool: Pool | None = None) -> tuple[Tensor, Any]:
    dtype = x.tensor.dtype
    return _finish(_value(x).to(wide(dtype)), epilogue, dtype, pool)


def finalize_stats(stats: Stats, gamma: Tensor, beta: Tensor, eps: float) -> Affine:
    rstd = torch.rsqrt(stats.M2 / stats.rows + eps)
    a = gamma * rstd
    return Affine(a, beta - stats.mean * a, stats.mean, rstd)


def finalize_moments(m: Moments, weight: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Affine:
    w = weight.to(m.mean.dtype)
    # Rounding can leave a variance of zero slightly negative.
    M2 = ((w @ m.M2) * w).sum(1).clamp_min(0)
    return finalize_stats(Stats(m.rows, w @ m.mean, M2), gamma, beta, eps)


def finalize_bn_grad(sums: tuple[Tensor, Tensor], rows: int, affine: Affine) -> tuple[Tensor, ...]:
    dbeta, dgamma = sums
    be = -affine.a * affine.rstd * dgamma / rows
    return affine.a, be, -affine.a * dbeta / rows - be * affine.mean, dgamma, dbeta


def finalize_tail_grad(
    sg: Tensor, G: Tensor, centre: Tensor, m: Moments, weight: Tensor, affine: Affine
) -> tuple[Tensor, ...]:
    w, M = weight.to(sg.dtype), m.rows
    a = affine.a[:, None]
    dgamma = affine.rstd * ((G * w).sum(1) + sg * (w @ centre - affine.mean))
    m1, m2 = sg / M, dgamma / M
    q = (affine.a * affine.rstd * m2)[:, None]
    dweight = a * (G + torch.outer(sg, centre - m.mean)) - q * (w @ m.M2)
    # v from the rounded A and B: their rounding then cancels against the means.
    A = (a * w).to(weight.dtype).to(w.dtype)
    B = (-w.T @ (q * w)).to(weight.dtype).to(w.dtype)
    v = -(m1 @ A) - (m.mean - centre) @ B
    return dweight, dgamma, sg, A, B, v
