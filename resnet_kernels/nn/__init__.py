"""Modules to put into a model: torchvision's residual blocks and ResNets, and DenseNet's layer, fused."""

from .blocks import BasicBlock, Bottleneck
from .densenet import DenseLayer
from .preactivation import PreactivationBasicBlock, PreactivationBottleneck
from .shortcuts import ZeroPadShortcut, make_shortcut
from .stem import ResNet

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "DenseLayer",
    "PreactivationBasicBlock",
    "PreactivationBottleneck",
    "ResNet",
    "ZeroPadShortcut",
    "make_shortcut",
]
