"""Max pooling and its gradient: csrc/cuda/pool.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import Pool, Pooled, nhwc_strides
from ..glue import empty_nhwc
from .calls import TYPES, PoolCall, View, in_rows, library


def _run(name: str, x: Tensor, y: Tensor, winners: Tensor | None, pool: Pool, gradient: bool) -> None:
    (N, C, H, W), (P, Q) = (y.shape, x.shape[2:]) if gradient else (x.shape, y.shape[2:])
    if y.numel() == 0:
        return
    x = in_rows(x)
    strides = nhwc_strides(x)
    granules = [(x.data_ptr(), 16), (y.data_ptr(), 16), (0 if winners is None else winners.data_ptr(), 8)]
    granules += [(C, 8), *((s * x.element_size(), min(16, 8 * x.element_size())) for s in strides)]
    aligned = all(n % by == 0 for n, by in granules)
    call = PoolCall(
        View(x.data_ptr(), *strides), y.data_ptr(), None if winners is None else winners.data_ptr(),
        N, C, H, W, P, Q, *pool, aligned, TYPES[x.dtype],
    )  # fmt: skip
    library().run(name, call, x.device)


def max_pool(t: Tensor, pool: Pool, wants_winners: bool) -> tuple[Tensor, Tensor | None]:
    """Return the maxima and, if requested, `Pooled.winners`, in channels_last."""
    P, Q = ((n + 2 * pool.padding - pool.kernel) // pool.stride + 1 for n in t.shape[2:])
    y, winners = empty_nhwc(t, (*t.shape[:2], P, Q)), None
    if wants_winners:
        winners = torch.empty(y.shape, dtype=torch.uint8, device=y.device, memory_format=torch.channels_last)
    _run("max_pool", t, y, winners, pool, False)
    return y, winners


def unpooled(v: Tensor, pooled: Pooled) -> Tensor:
    """Return the gradient of the pooled map from the gradient v of the maxima, rounded to v's dtype."""
    if pooled.winners.shape != v.shape or pooled.winners.dtype != torch.uint8:
        raise ValueError(f"winners: expected bytes of {tuple(v.shape)}, got {tuple(pooled.winners.shape)}")
    y = empty_nhwc(v, (*v.shape[:2], *pooled.size))
    winners = pooled.winners.contiguous(memory_format=torch.channels_last)
    _run("max_pool_grad", v, y, winners, pooled.pool, True)
    return y
