"""Modules to put into a model: torchvision's residual blocks and ResNets, fused."""

from .blocks import BasicBlock, Bottleneck
from .preactivation import PreactivationBasicBlock, PreactivationBottleneck
from .shortcuts import ZeroPadShortcut, make_shortcut
from .stem import ResNet

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "PreactivationBasicBlock",
    "PreactivationBottleneck",
    "ResNet",
    "ZeroPadShortcut",
    "make_shortcut",
]
