"""Shapes of residual blocks: those of the ResNets, and odd ones on which kernels tend to fail."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from ..nn import make_shortcut
from .parameters import randomize_


@dataclasses.dataclass(frozen=True)
class BlockCase:
    """A residual block and its input.

    name: the case's name in test ids and results files.
    basic: True for torchvision's BasicBlock, False for its Bottleneck.
    inplanes, planes, stride, groups, base_width, dilation: the block's arguments, as torchvision names them.
    N, H, W: images, and height and width of the input.
    option: the kind of shortcut, as `nn.make_shortcut` takes it.
    """

    name: str
    basic: bool
    inplanes: int
    planes: int
    H: int
    W: int
    stride: int = 1
    N: int = 2
    groups: int = 1
    base_width: int = 64
    dilation: int = 1
    option: str = "B"

    def __str__(self) -> str:
        return self.name

    def make(self) -> nn.Module:
        """Return torchvision's block in evaluation mode, with random statistics and affine parameters."""
        kind: type[resnet.BasicBlock | resnet.Bottleneck] = resnet.BasicBlock if self.basic else resnet.Bottleneck
        shortcut = make_shortcut(self.option, self.inplanes, self.planes * kind.expansion, self.stride)
        block = kind(self.inplanes, self.planes, self.stride, shortcut, self.groups, self.base_width, self.dilation)
        return randomize_(block).eval()

    def input(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
        """Return a random input (N, inplanes, H, W), channels_last, non-negative like the result of a ReLU."""
        x = torch.relu(torch.randn(self.N, self.inplanes, self.H, self.W, device=device))
        return x.to(dtype, memory_format=torch.channels_last)

    def flops(self) -> int:
        """Return the multiplications and additions of the forward's convolutions."""
        P, Q = -(-self.H // self.stride), -(-self.W // self.stride)
        C, width = self.inplanes, self.planes
        # K: output channels. J: inner channels of a bottleneck. macs: multiply-adds of one image.
        if self.basic:
            K, macs = width, P * Q * 9 * (C * width + width * width)
        else:
            J = int(width * self.base_width / 64) * self.groups
            K = 4 * width
            macs = self.H * self.W * C * J + P * Q * (9 * J * J // self.groups + J * K)
        projected = self.option == "C" or (self.option == "B" and (C != K or self.stride > 1))
        return 2 * self.N * (macs + projected * P * Q * C * K)


def _basic(name: str, *shape: Any, **rest: Any) -> BlockCase:
    return BlockCase(name, True, *shape, **rest)


def _bottleneck(name: str, *shape: Any, **rest: Any) -> BlockCase:
    return BlockCase(name, False, *shape, **rest)


# Every distinct block of ResNet-18/34 and ResNet-50/101/152 at 224 x 224.
RESNET_CASES = (
    _basic("r18-layer1", 64, 64, 56, 56),
    _basic("r18-layer2-down", 64, 128, 56, 56, 2),
    _basic("r18-layer2", 128, 128, 28, 28),
    _basic("r18-layer3-down", 128, 256, 28, 28, 2),
    _basic("r18-layer3", 256, 256, 14, 14),
    _basic("r18-layer4-down", 256, 512, 14, 14, 2),
    _basic("r18-layer4", 512, 512, 7, 7),
    _bottleneck("r50-layer1-first", 64, 64, 56, 56),
    _bottleneck("r50-layer1", 256, 64, 56, 56),
    _bottleneck("r50-layer2-down", 256, 128, 56, 56, 2),
    _bottleneck("r50-layer2", 512, 128, 28, 28),
    _bottleneck("r50-layer3-down", 512, 256, 28, 28, 2),
    _bottleneck("r50-layer3", 1024, 256, 14, 14),
    _bottleneck("r50-layer4-down", 1024, 512, 14, 14, 2),
    _bottleneck("r50-layer4", 2048, 512, 7, 7),
)

# Every distinct block of ResNeXt-50 32x4d, and the blocks with the widest groups of the 32x8d and 64x4d models.
RESNEXT_CASES = (
    _bottleneck("x50-layer1-first", 64, 64, 56, 56, groups=32, base_width=4),
    _bottleneck("x50-layer1", 256, 64, 56, 56, groups=32, base_width=4),
    _bottleneck("x50-layer2-down", 256, 128, 56, 56, 2, groups=32, base_width=4),
    _bottleneck("x50-layer2", 512, 128, 28, 28, groups=32, base_width=4),
    _bottleneck("x50-layer3-down", 512, 256, 28, 28, 2, groups=32, base_width=4),
    _bottleneck("x50-layer3", 1024, 256, 14, 14, groups=32, base_width=4),
    _bottleneck("x50-layer4-down", 1024, 512, 14, 14, 2, groups=32, base_width=4),
    _bottleneck("x50-layer4", 2048, 512, 7, 7, groups=32, base_width=4),
    _bottleneck("x101-32x8d-layer2", 512, 128, 28, 28, groups=32, base_width=8),
    _bottleneck("x101-64x4d-layer1", 256, 64, 56, 56, groups=64, base_width=4),
)

# Shapes on which kernels tend to fail: channels that fill no vector, odd maps with stride, tiny maps and batches,
# groups.
ODD_CASES = (
    _bottleneck("odd-channels", 20, 5, 9, 7),
    _bottleneck("odd-channels-down", 13, 5, 9, 7, 2),
    _basic("basic-odd-down", 7, 11, 13, 9, 2),
    _bottleneck("map-1x1", 32, 8, 1, 1),
    _bottleneck("map-1x1-down", 24, 8, 1, 1, 2),
    _bottleneck("batch-1", 64, 16, 10, 10, N=1),
    _bottleneck("batch-0", 64, 16, 10, 10, N=0),
    _bottleneck("batch-7", 64, 16, 6, 6, N=7),
    _bottleneck("groups-32", 256, 64, 10, 11, groups=32, base_width=4),
    _bottleneck("groups-down", 64, 32, 11, 10, 2, groups=4, base_width=8),
    _bottleneck("wide", 64, 16, 7, 7, base_width=128),
    _bottleneck("dilation-2", 64, 16, 9, 9, dilation=2),
    _bottleneck("dilation-4-down", 32, 16, 9, 11, dilation=4, stride=2),
    _bottleneck("option-A-down", 16, 8, 9, 9, 2, option="A"),
    _basic("basic-option-A-down", 16, 32, 9, 8, 2, option="A"),
    _bottleneck("option-C", 64, 16, 8, 8, option="C"),
    _basic("basic-option-C", 24, 24, 8, 8, option="C"),
)
