"""Folds batch norms into the convolutions before them, as users of PyTorch do for inference."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def folded(module: nn.Module) -> nn.Module:
    """Return a copy in channels_last whose batch norms are folded, in fp32, and rounded to the module's dtype once.

    Folded are the pairs conv1 and bn1 to conv3 and bn3 of any submodule, and items 0 and 1 of a Sequential (the
    projection of a block).
    """
    dtype = next(module.parameters()).dtype
    copied = copy.deepcopy(module).float().eval()
    for parent in list(copied.modules()):
        pairs = [(f"conv{i}", f"bn{i}") for i in (1, 2, 3)]
        if isinstance(parent, nn.Sequential):
            pairs = [("0", "1")]
        for first, second in pairs:
            conv, norm = parent._modules.get(first), parent._modules.get(second)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, first, fuse_conv_bn_eval(conv, norm))
                setattr(parent, second, nn.Identity())
    return copied.to(dtype, memory_format=torch.channels_last)
