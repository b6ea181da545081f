"""A batch norm as the ops take it, made from a module; its running statistics; statistics of a group of processes."""

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
    """A batch norm's tensors and numbers, as `torch.nn.functional.batch_norm` takes them.

    weight, bias: (K,) or None for ones and zeros. running_mean, running_var: (K,) or None. batch: normalise by the
    batch's statistics, and move the running ones, where there are any, towards them by `momentum` (None: their mean
    over num_batches_tracked batches, counted on the device); else by the running ones. group: name of the process
    group whose batch it is, "" for this process alone.
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
        """weight, bias, mean and variance; empty ones where the batch's are used."""
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
    """running = (1 - momentum) * running + momentum * batch's, of all norms at once."""
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
    """Whether the batch norm normalises by the statistics of what it is given."""
    return not isinstance(bn, FrozenBatchNorm2d) and (
        bn.training or (bn.running_mean is None and bn.running_var is None)
    )


def group_of(bn: nn.Module) -> str:
    """The name of the process group whose statistics a SyncBatchNorm in training uses, "" for this process's own."""
    if not (isinstance(bn, nn.SyncBatchNorm) and bn.training and dist.is_available() and dist.is_initialized()):
        return ""
    group = bn.process_group or dist.group.WORLD
    assert group is not None
    return group.group_name if dist.get_world_size(group) > 1 else ""


def norm_of(bn: nn.Module) -> BatchNorm:
    """bn: a BatchNorm2d, SyncBatchNorm or FrozenBatchNorm2d."""
    if isinstance(bn, FrozenBatchNorm2d):
        return BatchNorm(bn.weight, bn.bias, bn.running_mean, bn.running_var, batch=False, eps=bn.eps)
    assert isinstance(bn, (nn.BatchNorm2d, nn.SyncBatchNorm))
    batch = uses_batch_statistics(bn)
    # Statistics that training does not move are none that it should know.
    known = not batch or (bn.training and bn.track_running_stats)
    mean, var, count = (bn.running_mean, bn.running_var, bn.num_batches_tracked) if known else (None, None, None)
    return BatchNorm(bn.weight, bn.bias, mean, var, count, batch, bn.momentum, bn.eps, group_of(bn))


def affine_of(bn: nn.Module) -> tuple[Tensor, Tensor]:
    """a = weight / sqrt(running_var + eps), b = bias - running_mean * a, computed anew at each call.

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
    """What a process tells the others: the same whether its rows are many enough for moments or not."""
    return torch.cat([vectors[0].new_full((1,), float(rows), dtype=torch.float64), *(v.double() for v in vectors)])


def _group(name: str) -> dist.ProcessGroup:
    # GroupName, a str to the checker alone, is not in every torch.
    return dist.distributed_c10d._resolve_process_group(cast(Any, name))


def merged(stats: Stats, name: str) -> Stats:
    """The statistics of all processes' rows by Chan's formula."""
    mine = _exchanged(stats.rows, stats.mean, stats.M2)
    group = _group(name)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    table = torch.stack(everyone)
    K = stats.mean.numel()
    rows, means, M2s = table[:, :1], table[:, 1 : K + 1], table[:, K + 1 :]
    # A process without rows has no mean.
    means, M2s = (torch.where(rows > 0, t, 0) for t in (means, M2s))
    total = rows.sum()
    mean = (rows * means).sum(0) / total
    M2 = (M2s + rows * (means - mean).square()).sum(0)
    return Stats(total, mean, M2)


def summed(name: str, rows: int, dbeta: Tensor, dgamma: Tensor) -> Group:
    """The sums over all processes."""
    flat = _exchanged(rows, dbeta, dgamma)
    dist.all_reduce(flat, group=_group(name))
    return Group(*flat.split([1, dbeta.numel(), dgamma.numel()]))
