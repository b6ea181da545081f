"""Batch norm as an affine map."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
