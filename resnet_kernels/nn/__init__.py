"""Modules to put into a model: torchvision's residual blocks and ResNets, and DenseNet's layer, fused;
blocks with squeeze-and-excitation and stochastic depth."""

from .blocks import BasicBlock, Bottleneck
from .densenet import DenseLayer
from .gated import GatedBasicBlock, GatedBottleneck, SEBasicBlock, SEBottleneck, SqueezeExcite
from .preactivation import PreactivationBasicBlock, PreactivationBottleneck
from .shortcuts import ZeroPadShortcut, make_shortcut
from .stem import ResNet

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "DenseLayer",
    "GatedBasicBlock",
    "GatedBottleneck",
    "PreactivationBasicBlock",
    "PreactivationBottleneck",
    "ResNet",
    "SEBasicBlock",
    "SEBottleneck",
    "SqueezeExcite",
    "ZeroPadShortcut",
    "make_shortcut",
]
