"""Weight gradients and moments: csrc/cuda/outer.cuh where they are sums of outer products over rows, else cuDNN.

Both read plain tensors, so operands are materialized first.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ...contract import Epilogue, Geometry, Moments, Operand
from ..glue import library_wgrad
from . import passes
from .calls import TYPES, Outer, library
from .passes import computed


def wgrad(
    g: Operand, x: Operand, kernel: tuple[int, int], geometry: Geometry, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return dL/dweight (K, C/groups, R, S) and, if `sums`, the sums of g per channel (K), in fp32.

    g: dL/dconv (N, K, P, Q). x: the convolution's operand (N, C, H, W). See `contract.Backend.wgrad`.
    """
    N, K, P, Q = g.sizes
    C = x.tensor.shape[1]
    if not N * P * Q:
        like = g.tensor.new_zeros(K, dtype=torch.float32)
        return like.new_zeros(K, C // geometry.groups, *kernel), like if sums else None
    if tuple(kernel) != (1, 1) or (geometry.padding, geometry.groups) != (0, 1):
        return _by_library(g, x, kernel, geometry, sums)
    rows = computed(dataclasses.replace(x, stride=x.stride * geometry.stride))
    dweight, total = _outer(computed(g), rows, sums, False)
    return dweight.view(K, C, 1, 1), total


def _outer(g: Tensor, x: Tensor, sums: bool, moments: bool) -> tuple[Tensor, Tensor | None]:
    """Return the sum of g^T x over the rows, (K, C), and the sums of g, (K); with `moments` M2 and the mean of g.

    g, x: contiguous in channels_last.
    """
    (N, K, P, Q), C = g.shape, x.shape[1]
    if (N, P, Q) != (x.shape[0], *x.shape[2:]) or (g.dtype, g.device) != (x.dtype, x.device):
        raise ValueError(
            f"wgrad: expected x of {N} images of {P}x{Q} in {g.dtype} on {g.device}, as g, got {tuple(x.shape)} in "
            f"{x.dtype} on {x.device}"
        )
    M, type_ = N * P * Q, TYPES[g.dtype]
    span = library().number("outer_span", M, K, C, moments, type_, library().multiprocessors(g.device))
    parts = -(-M // span)
    result = torch.empty(K, C, device=g.device)
    total = torch.empty(K, device=g.device) if sums else None
    # A single partial sum is the result, but moments must still be centred.
    scratch, sum_scratch = result, total
    if parts > 1 or moments:
        scratch = torch.empty(parts, K, C, device=g.device)
        sum_scratch = torch.empty(parts, K, device=g.device) if sums else None
    pointers = [None if t is None else t.data_ptr() for t in (g, x, scratch, sum_scratch, result, total)]
    aligned = K % 8 == 0 and C % 8 == 0 and all(t.data_ptr() % 16 == 0 for t in (g, x))
    library().run("outer", Outer(*pointers, M, span, K, C, moments, aligned, type_), g.device)
    return result, total


def _by_library(
    g: Operand, x: Operand, kernel: tuple[int, int], geometry: Geometry, sums: bool
) -> tuple[Tensor, Tensor | None]:
    gv, xv = computed(g), computed(x)
    dweight = library_wgrad(gv, xv, kernel, geometry)
    total = passes.run(Operand(gv), Epilogue(reduce="sum"), False)[1][0] if sums else None
    return dweight.float(), total


def moments(h: Operand) -> Moments:
    """Return the mean (J) and M2 (J, J) over the M rows of h (N, J, P, Q), in fp32. See `contract.Backend.moments`.

    For fp32 operands a separate pass computes the mean first, and the product is of the centred operand.
    """
    N, J, P, Q = h.sizes
    M = N * P * Q
    if not M:
        zeros = torch.zeros(J, J, device=h.tensor.device)
        return Moments(0, torch.full_like(zeros[0], float("nan")), zeros)
    if h.tensor.dtype == torch.float32:
        mean = passes.run(h, Epilogue(reduce="stats"), False)[1].mean
        centred = computed(dataclasses.replace(h, centre=mean))
        M2, _ = _outer(centred, centred, True, True)
        return Moments(M, mean, M2, Operand(centred))
    rows = computed(h)
    M2, total = _outer(rows, rows, True, True)
    assert total is not None
    return Moments(M, total, M2)
