"""Modules to put into a model: torchvision's residual blocks, fused."""

from .blocks import BasicBlock, Bottleneck
from .shortcuts import ZeroPadShortcut, make_shortcut

__all__ = ["BasicBlock", "Bottleneck", "ZeroPadShortcut", "make_shortcut"]
