"""Weight gradients and moments."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..contract import Epilogue, Geometry, Moments, Operand
from . import passes
from .passes import computed


def wgrad(
    g: Operand, x: Operand, kernel: tuple[int, int], geometry: Geometry, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    N, K, P, Q = g.sizes
    C = x.tensor.shape[1]
    if not N * P * Q:
        like = g.tensor.new_zeros(K, dtype=torch.float32)
        return like.new_zeros(K, C // geometry.groups, *kernel), like if sums else None
    return _by_library(g, x, kernel, geometry, sums)


def _by_library(
    g: Operand, x: Operand, kernel: tuple[int, int], geometry: Geometry, sums: bool
) -> tuple[Tensor, Tensor | None]:
    gv, xv = computed(g), computed(x)
    # Of the weight nothing but its sizes and memory format is read.
    weight = gv.new_empty(gv.shape[1], xv.shape[1] // geometry.groups, *kernel)
    weight = weight.contiguous(memory_format=torch.channels_last)
    pairs = [[geometry.stride] * 2, [geometry.padding] * 2, [geometry.dilation] * 2]
    backward = torch.ops.aten.convolution_backward
    _, dweight, _ = backward(gv, xv, weight, None, *pairs, False, [0, 0], geometry.groups, [False, True, False])
    total = passes.run(Operand(gv), Epilogue(reduce="sum"), False)[1][0] if sums else None
    return dweight.float(), total


def moments(h: Operand) -> Moments:
    N, J, P, Q = h.sizes
    M, fp32 = N * P * Q, h.tensor.dtype == torch.float32
    stats = passes.run(h, Epilogue(reduce="stats"), False)[1]
    if not M:
        return Moments(0, stats.mean, stats.M2.new_zeros(J, J))
    value = computed(dataclasses.replace(h, centre=stats.mean) if fp32 else h)
    rows = value.permute(0, 2, 3, 1).flatten(0, 2).double()
    off = rows if fp32 else rows - rows.mean(0)
    return Moments(M, stats.mean, (off.T @ off).float(), Operand(value) if fp32 else None)
