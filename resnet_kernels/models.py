"""The networks of the residual papers, built from the fused blocks of `resnet_kernels.nn`.

For ImageNet. By default torchvision's networks; arguments choose the original stride or other shortcuts:

    resnet18, resnet34, resnet50, resnet101, resnet152
    resnext50_32x4d, resnext101_32x8d, resnext101_64x4d
    wide_resnet50_2, wide_resnet101_2
    seresnet18, seresnet34, seresnet50, seresnet101, seresnet152, seresnext50_32x4d
                              with squeeze-and-excitation; the parameters of timm's networks
    plain18, plain34          resnet18 and resnet34 without shortcuts
    preactivation_resnet200   with pre-activation

For small images such as CIFAR's:

    cifar_resnet, cifar_plain   6n + 2 layers, with and without shortcuts
    cifar_preactivation         with pre-activation, up to 1001 layers

In this module N is the number of images, C channels, H and W height and width.

Papers: He et al. 2015 (arXiv 1512.03385), He et al. 2016 (1603.05027), Xie et al. 2016 (1611.05431), Zagoruyko and
Komodakis 2016 (1605.07146), Hu et al. 2018 (1709.01507), Huang et al. 2016 (1603.09382).

No function here loads weights. The state dict of torchvision's network of the same name fits; with
squeeze-and-excitation timm's fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from .nn import (
    BasicBlock,
    Bottleneck,
    GatedBasicBlock,
    GatedBottleneck,
    PreactivationBasicBlock,
    PreactivationBottleneck,
    ResNet,
    SEBasicBlock,
    SEBottleneck,
    make_shortcut,
)

__all__ = [
    "CifarResNet",
    "ImageNetResNet",
    "PlainBlock",
    "PreactivationResNet",
    "cifar_plain",
    "cifar_preactivation",
    "cifar_resnet",
    "plain18",
    "plain34",
    "preactivation_resnet200",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "seresnet18",
    "seresnet34",
    "seresnet50",
    "seresnet101",
    "seresnet152",
    "seresnext50_32x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

# Blocks with stochastic depth, by the block that each replaces.
DROPPING: dict[type[nn.Module], type[nn.Module]] = {BasicBlock: GatedBasicBlock, Bottleneck: GatedBottleneck}


def _drop_rates(drop_path: float, blocks: int) -> list[float]:
    """Return the drop probability of each block: it rises linearly from 0 in the first to `drop_path` in the last.

    timm has the same rule; the paper's begins with drop_path / blocks.
    """
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path: expected a probability of at least 0 and below 1, got {drop_path}")
    return [drop_path * i / max(1, blocks - 1) for i in range(blocks)]


class PlainBlock(nn.Module):
    """A basic block without its shortcut, made of torch's modules: y = relu(bn2(conv2(relu(bn1(conv1(x)))))).

    Both convolutions are 3x3; the stride is on the first.
    x: (N, inplanes, H, W) -> (N, planes, ceil(H/stride), ceil(W/stride)).
    """

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(h)))


def _stage(
    block: Callable[..., nn.Module],
    inplanes: int,
    planes: int,
    blocks: int,
    stride: int,
    shortcut: str | None,
    norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
    drop_rates: Sequence[float] = (),
    **width: Any,
) -> nn.Sequential:
    """Return a stage: a run of consecutive blocks, of which the first has the stride.

    Args:
        block: the class of the blocks.
        inplanes, planes: input channels of the first block; `planes` argument of all.
        shortcut: as `make_shortcut` takes it; None for plain blocks.
        norm: makes the batch norm of a projection; None for a projection without one.
        drop_rates: the drop probability of each block, or empty without stochastic depth.
        width: further arguments of the blocks.
    """
    # Every block class has `expansion`, but the type Callable does not say so.
    outputs = planes * block.expansion  # type: ignore[attr-defined]
    stage = []
    for i in range(blocks):
        s = stride if i == 0 else 1
        if shortcut is None:
            stage.append(block(inplanes, planes, s))
        else:
            options = {**width, "drop_path": drop_rates[i]} if drop_rates else width
            stage.append(block(inplanes, planes, s, make_shortcut(shortcut, inplanes, outputs, s, norm), **options))
        inplanes = outputs
    return nn.Sequential(*stage)


class ImageNetResNet(ResNet):
    """torchvision's ResNet, with a choice of shortcuts and strides.

    y = fc(avgpool(layer4(layer3(layer2(layer1(maxpool(relu(bn1(conv1(x)))))))))); conv1 is 7x7 with stride 2, and the
    stages have 64, 128, 256 and 512 planes. Attributes and state dict are those of `torchvision.models.ResNet`, except
    that shortcut "A" has no projections and "C" has more of them.

    Args:
        block: `nn.BasicBlock`, `nn.Bottleneck`, `nn.SEBasicBlock`, `nn.SEBottleneck` or `PlainBlock`.
        layers: blocks per stage.
        num_classes: outputs of the classifier `fc`.
        shortcut: "A" zero padding; "B" a projection where the shape changes, as in torchvision; "C" a projection
        always.
        original_stride: put a bottleneck's stride on its first 1x1 convolution, as in the paper, and not on its 3x3, as
            in torchvision and most later code ("ResNet v1.5").
        drop_path: stochastic depth. In training the residual branch of an image is dropped with a probability that
            rises from 0 in the first block to `drop_path` in the last (`nn.GatedBasicBlock`), like timm's
            drop_path_rate. It changes neither parameters nor evaluation, and is not available with plain blocks.
        groups, width_per_group: as in torchvision, for ResNeXt and wide ResNets.
        options: further arguments of `torchvision.models.ResNet`.
    x: (N, 3, H, W) -> (N, num_classes).
    Raises:
        ValueError: an unknown shortcut, a drop_path outside [0, 1) or with plain blocks, or dilation.
    """

    def __init__(
        self,
        block: type[nn.Module],
        layers: Sequence[int],
        num_classes: int = 1000,
        shortcut: str = "B",
        original_stride: bool = False,
        drop_path: float = 0.0,
        **options: Any,
    ) -> None:
        self.shortcut, self.original_stride = shortcut, original_stride
        if drop_path and block is PlainBlock:
            raise ValueError("drop_path: expected blocks with shortcuts, got plain blocks")
        self._drop_rates = _drop_rates(drop_path, sum(layers)) if drop_path else []
        block = DROPPING.get(block, block) if drop_path else block
        if shortcut not in ("A", "B", "C"):
            raise ValueError(f"shortcut: expected 'A', 'B' or 'C', got {shortcut!r}")
        super().__init__(block, list(layers), num_classes, **options)

    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        if dilate:
            raise ValueError(
                "replace_stride_with_dilation: expected no dilation, got a dilated stage; "
                "torchvision.models.resnet.ResNet(rk.nn.Bottleneck, ...) supports it"
            )
        width = {} if block is PlainBlock else {"groups": self.groups, "base_width": self.base_width}
        shortcut = None if block is PlainBlock else self.shortcut
        # torchvision's constructor, which is not typed, sets `inplanes`.
        inplanes: int = self.inplanes  # type: ignore[has-type]
        rates, self._drop_rates = self._drop_rates[:blocks], self._drop_rates[blocks:]
        stage = _stage(block, inplanes, planes, blocks, stride, shortcut, self._norm_layer, rates, **width)
        self.inplanes = planes * block.expansion
        if self.original_stride:
            for b in stage:
                if isinstance(b, resnet.Bottleneck):
                    b.conv1.stride, b.conv2.stride = b.conv2.stride, (1, 1)
        return stage


def _imagenet(block: type[nn.Module], layers: Sequence[int], **defaults: Any) -> Callable[..., ImageNetResNet]:
    """Return a constructor of an `ImageNetResNet` of these blocks; `defaults` are defaults of its arguments."""

    def make(num_classes: int = 1000, **options: Any) -> ImageNetResNet:
        return ImageNetResNet(block, layers, num_classes, **{**defaults, **options})

    kinds: dict[type, str] = {PlainBlock: "plain", Bottleneck: "bottleneck"}
    kinds |= {SEBasicBlock: "SE basic", SEBottleneck: "SE bottleneck"}
    kind = kinds.get(block, "basic")
    settings = "".join(f", {name}={value}" for name, value in defaults.items())
    make.__doc__ = (
        f"Return an `ImageNetResNet` of {kind} blocks, {tuple(layers)} per stage{settings}. "
        "Options are the arguments of `ImageNetResNet`."
    )
    return make


resnet18 = _imagenet(BasicBlock, (2, 2, 2, 2))
resnet34 = _imagenet(BasicBlock, (3, 4, 6, 3))
resnet50 = _imagenet(Bottleneck, (3, 4, 6, 3))
resnet101 = _imagenet(Bottleneck, (3, 4, 23, 3))
resnet152 = _imagenet(Bottleneck, (3, 8, 36, 3))
resnext50_32x4d = _imagenet(Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4)
resnext101_32x8d = _imagenet(Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=8)
resnext101_64x4d = _imagenet(Bottleneck, (3, 4, 23, 3), groups=64, width_per_group=4)
wide_resnet50_2 = _imagenet(Bottleneck, (3, 4, 6, 3), width_per_group=128)
wide_resnet101_2 = _imagenet(Bottleneck, (3, 4, 23, 3), width_per_group=128)
seresnet18 = _imagenet(SEBasicBlock, (2, 2, 2, 2))
seresnet34 = _imagenet(SEBasicBlock, (3, 4, 6, 3))
seresnet50 = _imagenet(SEBottleneck, (3, 4, 6, 3))
seresnet101 = _imagenet(SEBottleneck, (3, 4, 23, 3))
seresnet152 = _imagenet(SEBottleneck, (3, 8, 36, 3))
seresnext50_32x4d = _imagenet(SEBottleneck, (3, 4, 6, 3), groups=32, width_per_group=4)
plain18 = _imagenet(PlainBlock, (2, 2, 2, 2))
plain34 = _imagenet(PlainBlock, (3, 4, 6, 3))


def _initialize(model: nn.Module) -> None:
    """Initialize the convolutions as He et al. 2015 (arXiv 1502.01852) do, in torchvision's variant (fan-out)."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")


def _head(x: Tensor, fc: nn.Linear) -> Tensor:
    """Return fc(avgpool(x))."""
    return fc(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


class CifarResNet(nn.Module):
    """The network for small images of He et al. 2015, section 4.2, with 6n + 2 layers.

    y = fc(avgpool(layer3(layer2(layer1(relu(bn1(conv1(x)))))))); conv1 is 3x3. Each of the three stages has n basic
    blocks; they have 16, 32 and 64 channels (for the default width), on maps of 1, 1/2 and 1/4 of the image's size.

    Args:
        depth: the number of layers, 6n + 2.
        num_classes: outputs of the classifier `fc`.
        shortcut: "A" (the paper's), "B" or "C", as for `ImageNetResNet`; None for the plain network.
        in_channels: channels of the images.
        width: channels of the first stage.
        drop_path: stochastic depth, as for `ImageNetResNet`. Huang et al. 2016 use 0.5 with 110 layers.
    x: (N, in_channels, H, W) -> (N, num_classes).
    Raises:
        ValueError: another depth, or a drop_path outside [0, 1) or without shortcuts.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        shortcut: str | None = "A",
        in_channels: int = 3,
        width: int = 16,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if drop_path and shortcut is None:
            raise ValueError("drop_path: expected blocks with shortcuts, got plain blocks")
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth: expected 6n + 2, at least 8, got {depth}")
        n, block = depth // 6, PlainBlock if shortcut is None else GatedBasicBlock if drop_path else BasicBlock
        rates = _drop_rates(drop_path, 3 * n) if drop_path else []
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(block, width, width, n, 1, shortcut, drop_rates=rates[:n])
        self.layer2 = _stage(block, width, 2 * width, n, 2, shortcut, drop_rates=rates[n : 2 * n])
        self.layer3 = _stage(block, 2 * width, 4 * width, n, 2, shortcut, drop_rates=rates[2 * n :])
        self.fc = nn.Linear(4 * width, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return _head(self.layer3(self.layer2(self.layer1(x))), self.fc)


class PreactivationResNet(nn.Module):
    """A network of pre-activation blocks: y = fc(avgpool(relu(bn(stages(stem(x)))))).

    Args:
        block: `nn.PreactivationBasicBlock` or `nn.PreactivationBottleneck`.
        layers, planes: blocks, and planes of the blocks, per stage. All stages but the first have stride 2.
        stem: a module that maps the image to `stem_channels` channels.
        num_classes: outputs of the classifier `fc`.
        shortcut: "A", "B" or "C", as for `nn.make_shortcut`. A projection has no batch norm.
    x: (N, C, H, W) -> (N, num_classes).
    Raises:
        ValueError: `layers` and `planes` differ in length.
    """

    def __init__(
        self,
        block: type[PreactivationBasicBlock] | type[PreactivationBottleneck],
        layers: Sequence[int],
        planes: Sequence[int],
        stem: nn.Module,
        stem_channels: int,
        num_classes: int,
        shortcut: str = "B",
    ) -> None:
        super().__init__()
        if len(layers) != len(planes):
            raise ValueError(f"planes: expected one number per stage, {len(layers)} in all, got {len(planes)}")
        self.stem = stem
        stages, channels = [], stem_channels
        for i, (n, p) in enumerate(zip(layers, planes, strict=True)):
            stages.append(_stage(block, channels, p, n, 2 if i else 1, shortcut, None))
            channels = p * block.expansion
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(channels, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return _head(self.relu(self.bn(self.stages(self.stem(x)))), self.fc)


def cifar_resnet(depth: int, num_classes: int = 10, **options: Any) -> CifarResNet:
    """Return a `CifarResNet` of 20, 32, 44, 56, 110, 1202, or any other 6n + 2 layers."""
    return CifarResNet(depth, num_classes, **options)


def cifar_plain(depth: int, num_classes: int = 10, **options: Any) -> CifarResNet:
    """Return a `CifarResNet` of 6n + 2 layers without shortcuts."""
    return CifarResNet(depth, num_classes, shortcut=None, **options)


def cifar_preactivation(
    depth: int,
    num_classes: int = 10,
    bottleneck: bool | None = None,
    shortcut: str | None = None,
    in_channels: int = 3,
    width: int = 16,
) -> PreactivationResNet:
    """Return a network for small images of He et al. 2016 ("Identity Mappings"), with pre-activation blocks.

    Args:
        depth: the number of layers: 6n + 2 with basic blocks, 9n + 2 with bottlenecks.
        num_classes: outputs of the classifier.
        bottleneck: whether the blocks are bottlenecks. None: the paper's choice, bottlenecks from 164 layers on if the
            depth is 9n + 2.
        shortcut: "A", "B" or "C", as for `nn.make_shortcut`. None: the paper's choice, "A" for basic blocks, "B" for
            bottlenecks.
        in_channels: channels of the images.
        width: planes of the first stage.
    Raises:
        ValueError: another depth.
    """
    if bottleneck is None:
        bottleneck = depth >= 164 and depth % 9 == 2
    layers = 9 if bottleneck else 6
    if depth < layers + 2 or depth % layers != 2:
        blocks = "bottlenecks" if bottleneck else "basic blocks"
        raise ValueError(f"depth: expected {layers}n + 2 for {blocks}, got {depth}")
    block = PreactivationBottleneck if bottleneck else PreactivationBasicBlock
    stem = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
    planes = (width, 2 * width, 4 * width)
    shortcut = shortcut or ("B" if bottleneck else "A")
    return PreactivationResNet(block, (depth // layers,) * 3, planes, stem, width, num_classes, shortcut)


def preactivation_resnet200(num_classes: int = 1000) -> PreactivationResNet:
    """Return ResNet-200 for ImageNet of He et al. 2016: pre-activation bottlenecks, (3, 24, 36, 3) per stage."""
    stem = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
    )
    return PreactivationResNet(PreactivationBottleneck, (3, 24, 36, 3), (64, 128, 256, 512), stem, 64, num_classes)
