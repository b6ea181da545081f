"""Modules to put into a model: torchvision's residual blocks, fused."""

from .blocks import BasicBlock, Bottleneck
from .preactivation import PreactivationBasicBlock, PreactivationBottleneck
from .shortcuts import ZeroPadShortcut, make_shortcut

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "PreactivationBasicBlock",
    "PreactivationBottleneck",
    "ZeroPadShortcut",
    "make_shortcut",
]
