"""Batch norms as the ops take them: from a module, their running statistics, and statistics over a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from ..backends.algebra import Group
from ..backends.contract import Stats, accumulator_dtype


class BatchNorm(NamedTuple):
    """The tensors and numbers of a batch norm over K channels, as `torch.nn.functional.batch_norm` takes them.

    weight, bias: (K,), or None for ones and zeros. running_mean, running_var: (K,) or None. batch: normalise by the
    statistics of the batch and update the running statistics, if there are any, by `momentum` (None: the cumulative
    mean over num_batches_tracked batches, counted on the device); if False normalise by the running statistics. group:
    the name of the process group over which the batch is distributed, "" for this process alone.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    batch: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    group: str = ""

    def vectors(self, like: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return weight, bias, mean and variance; mean and variance are empty if the batch's are used."""
        dtype = accumulator_dtype(like.dtype)
        weight = like.new_ones(channels, dtype=dtype) if self.weight is None else self.weight
        bias = like.new_zeros(channels, dtype=dtype) if self.bias is None else self.bias
        if self.batch:
            empty = like.new_empty(0, dtype=dtype)
            return weight, bias, empty, empty
        assert self.running_mean is not None and self.running_var is not None
        return weight, bias, self.running_mean, self.running_var


@torch.no_grad()
def update_running(norms: Sequence[BatchNorm], tables: Sequence[Tensor]) -> None:
    """running = (1 - momentum) * running + momentum * batch's, for all norms at once. tables: see `contract.Affine`."""
    groups: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    counters = [n.num_batches_tracked for n in norms if n.batch and n.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    for norm, table in zip(norms, tables, strict=True):
        if not norm.batch or norm.running_mean is None or norm.running_var is None:
            continue
        _, _, mean, _, var = table.unbind()
        if norm.momentum is None:
            if norm.num_batches_tracked is None:
                continue
            factor = norm.num_batches_tracked.to(table.dtype).reciprocal()
            for running, new in ((norm.running_mean, mean), (norm.running_var, var)):
                running.copy_((1 - factor) * running + factor * new)
            continue
        if norm.running_mean.dtype != table.dtype:
            for running, new in ((norm.running_mean, mean), (norm.running_var, var)):
                running.copy_((1 - norm.momentum) * running.to(new.dtype) + norm.momentum * new)
            continue
        old, new_ones = groups.setdefault(norm.momentum, ([], []))
        old += [norm.running_mean, norm.running_var]
        new_ones += [mean, var]
    for momentum, (old, new_ones) in groups.items():
        torch._foreach_mul_(old, 1 - momentum)
        torch._foreach_add_(old, new_ones, alpha=momentum)


def uses_batch_statistics(bn: nn.Module) -> bool:
    """Return whether the batch norm normalises by the statistics of its input."""
    return not isinstance(bn, FrozenBatchNorm2d) and (
        bn.training or (bn.running_mean is None and bn.running_var is None)
    )


def group_of(bn: nn.Module) -> str:
    """Return the name of the process group whose statistics a SyncBatchNorm in training uses, "" for this process."""
    if not (isinstance(bn, nn.SyncBatchNorm) and bn.training and dist.is_available() and dist.is_initialized()):
        return ""
    group = bn.process_group or dist.group.WORLD
    assert group is not None
    return group.group_name if dist.get_world_size(group) > 1 else ""


def norm_of(bn: nn.Module) -> BatchNorm:
    """Return the `BatchNorm` of a BatchNorm2d, SyncBatchNorm or FrozenBatchNorm2d module."""
    if isinstance(bn, FrozenBatchNorm2d):
        return BatchNorm(bn.weight, bn.bias, bn.running_mean, bn.running_var, batch=False, eps=bn.eps)
    assert isinstance(bn, (nn.BatchNorm2d, nn.SyncBatchNorm))
    batch = uses_batch_statistics(bn)
    # The op must not see running statistics that training does not update.
    known = not batch or (bn.training and bn.track_running_stats)
    mean, var, count = (bn.running_mean, bn.running_var, bn.num_batches_tracked) if known else (None, None, None)
    return BatchNorm(bn.weight, bn.bias, mean, var, count, batch, bn.momentum, bn.eps, group_of(bn))


def affine_of(bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Return a = weight / sqrt(running_var + eps) and b = bias - running_mean * a, computed at each call.

    bn: a BatchNorm2d, SyncBatchNorm or FrozenBatchNorm2d with running statistics. Differentiable in weight and bias.
    Returns: a, b: (C,) fp32 (fp64 for fp64 statistics).
    """
    mean, var, weight, bias = (getattr(bn, name) for name in ("running_mean", "running_var", "weight", "bias"))
    dtype = torch.float64 if var.dtype == torch.float64 else torch.float32
    a = torch.rsqrt(var.to(dtype) + bn.eps)
    if weight is not None:
        a = weight.to(dtype) * a
    b = -mean.to(dtype) * a
    if bias is not None:
        b = bias.to(dtype) + b
    return a, b


def _exchanged(rows: int | Tensor, *vectors: Tensor) -> Tensor:
    """Return what a process sends to the others: the same form whether it used moments or not."""
    return torch.cat([vectors[0].new_full((1,), float(rows), dtype=torch.float64), *(v.double() for v in vectors)])


def _group(name: str) -> dist.ProcessGroup:
    # The type GroupName, a str for type checkers only, is not in every torch.
    return dist.distributed_c10d._resolve_process_group(cast(Any, name))


def merged(stats: Stats, name: str) -> Stats:
    """Return the statistics of the rows of all processes, merged by Chan's formula."""
    mine = _exchanged(stats.rows, stats.mean, stats.M2)
    group = _group(name)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    table = torch.stack(everyone)
    K = stats.mean.numel()
    rows, means, M2s = table[:, :1], table[:, 1 : K + 1], table[:, K + 1 :]
    # The mean of a process without rows is NaN.
    means, M2s = (torch.where(rows > 0, t, 0) for t in (means, M2s))
    total = rows.sum()
    mean = (rows * means).sum(0) / total
    M2 = (M2s + rows * (means - mean).square()).sum(0)
    return Stats(total, mean, M2)


def summed(name: str, rows: int, dbeta: Tensor, dgamma: Tensor) -> Group:
    """Return the sums over all processes."""
    flat = _exchanged(rows, dbeta, dgamma)
    dist.all_reduce(flat, group=_group(name))
    return Group(*flat.split([1, dbeta.numel(), dgamma.numel()]))
