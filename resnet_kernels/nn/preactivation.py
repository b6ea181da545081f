"""Pre-activation blocks (He et al. 2016, "Identity Mappings in Deep Residual Networks", arXiv 1603.05027)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .blocks import Fused
from .shortcuts import Preactivation


class _Chain(Preactivation):
    """The plain chain: batch norm and ReLU, then a convolution, two or three times; a shortcut other than the identity
    starts behind the first ReLU."""

    bn1: nn.Module
    conv1: nn.Conv2d
    bn2: nn.Module
    conv2: nn.Conv2d
    relu: nn.Module
    downsample: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(x))
        identity = x if self.downsample is None else self.downsample(h)
        h = self.relu(self.bn2(self.conv1(h)))
        h = self.conv2(h)
        if isinstance(self, PreactivationBottleneck):
            h = self.conv3(self.relu(self.bn3(h)))
        return h + identity


class PreactivationBasicBlock(Fused, _Chain):
    """y = conv2(relu(bn2(conv1(h)))) + shortcut, h = relu(bn1(x)), both convolutions 3x3, stride on the first.

    The arguments of `torchvision.models.resnet.BasicBlock`. Parameters: bn1, conv1, bn2, conv2, downsample.
    x: (N, inplanes, H, W) fp64|fp32|bf16|fp16 -> (N, planes, ceil(H/stride), ceil(W/stride)), channels_last if fused.
    downsample: None (x itself), Conv2d 1x1 or `ZeroPadShortcut`, of h; or any module (then not fused).
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(f"expected groups=1 and base_width=64, got {groups} and {base_width}")
        norm = norm_layer or nn.BatchNorm2d
        self.bn1 = norm(inplanes)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation, bias=False)
        self.bn2 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, dilation, dilation, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride


class PreactivationBottleneck(Fused, _Chain):
    """y = conv3(relu(bn3(conv2(relu(bn2(conv1(h))))))) + shortcut, h = relu(bn1(x)): 1x1, 3x3 with the stride, 1x1.

    The arguments of `torchvision.models.resnet.Bottleneck`. Parameters: bn1, conv1, bn2, conv2, bn3, conv3, downsample.
    x: (N, inplanes, H, W) fp64|fp32|bf16|fp16 -> (N, 4*planes, ceil(H/stride), ceil(W/stride)), channels_last if fused.
    downsample: None (x itself), Conv2d 1x1 or `ZeroPadShortcut`, of h; or any module (then not fused).
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        norm = norm_layer or nn.BatchNorm2d
        width, outputs = int(planes * base_width / 64) * groups, planes * self.expansion
        self.bn1 = norm(inplanes)
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn2 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, groups, bias=False)
        self.bn3 = norm(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride
