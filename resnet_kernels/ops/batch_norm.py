"""Batch norm as an affine map."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def affine_of(bn: nn.Module) -> tuple[Tensor, Tensor]:
    """a = weight / sqrt(running_var + eps), b = bias - running_mean * a, computed anew at each call.

    bn: a BatchNorm2d, SyncBatchNorm or FrozenBatchNorm2d with running statistics. Differentiable in weight and bias.
    Returns: a, b: (C,) fp32 (fp64 for fp64 statistics).
    """
    mean, var = bn.running_mean, bn.running_var
    dtype = torch.float64 if var.dtype == torch.float64 else torch.float32
    a = torch.rsqrt(var.to(dtype) + bn.eps)
    if bn.weight is not None:
        a = bn.weight.to(dtype) * a
    b = -mean.to(dtype) * a
    if bn.bias is not None:
        b = bn.bias.to(dtype) + b
    return a, b
