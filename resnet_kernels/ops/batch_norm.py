"""A batch norm module as the ops take it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from .training import BatchNorm


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
