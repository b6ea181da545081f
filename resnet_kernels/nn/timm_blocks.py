"""timm's residual blocks with a fused forward: those of its ResNets (resnet, resnext, wide_resnet, seresnet, with their
options) and of its pre-activation ResNets with batch norms (resnetv2).

They subclass timm's classes: same constructor, attributes, parameters and state dict. timm is imported only here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

from timm.layers import BatchNormAct2d, DropBlock2d, DropPath, EcaModule, SEModule
from timm.layers.norm_act import SyncBatchNormAct
from timm.models import resnet, resnetv2
from torch import Tensor, nn

from . import fusable
from .fusable import Parts
from .gated import Anatomy, Gated, Layer, Pieces, Segment, is_absent, why_not_relu
from .shortcuts import Preactivation

ACTIVATED = (BatchNormAct2d, SyncBatchNormAct)


def _squeezed(module: Any, mean: Tensor) -> Tensor:
    return module.gate(module.fc2(module.act(module.bn(module.fc1(mean)))))


def _channel_attention(module: Any, mean: Tensor) -> Tensor:
    """Return the gate of efficient channel attention (Wang et al. 2020, arXiv 1910.03151): a convolution along
    channels."""
    logits = module.conv(mean.flatten(2).transpose(1, 2))
    if module.conv2 is not None:
        logits = module.conv2(module.act(logits))
    return module.gate(logits).transpose(1, 2).unsqueeze(3)


class TimmAnatomy(Anatomy):
    """What differs in timm's modules."""

    def is_inactive(self, module: Any) -> bool:
        dropped = type(module) is DropBlock2d and (not module.training or not module.drop_prob)
        return is_absent(module) or (dropped and not fusable.hook_on(module))

    def excitation(self, module: Any) -> Callable[[Tensor], Tensor] | None:
        if type(module) is EcaModule:
            return functools.partial(_channel_attention, module)
        return functools.partial(_squeezed, module) if type(module) is SEModule and not module.add_maxpool else None

    def drop(self, module: Any) -> tuple[float, bool] | None:
        if type(module) is not DropPath:
            return None
        return module.drop_prob if module.training else 0.0, module.scale_by_keep


class BasicBlock(Gated, resnet.BasicBlock):
    """`timm.models.resnet.BasicBlock`: y = relu(gate * bn2(conv2(aa(relu(drop_block(bn1(conv1(x))))))) + shortcut(x)).

    x: (N, inplanes, H, W) fp64|fp32|bf16|fp16 -> (N, planes, ceil(H/stride), ceil(W/stride)), channels_last if fused.
    Squeeze-and-excitation and ECA end the block as a gate. Other attention, drop_block, aa and a shortcut's pooling run
    as timm's modules between fused parts.
    """

    ANATOMY = TimmAnatomy((Layer("conv1", "bn1", "act1", "drop_block", "aa"), Layer("conv2", "bn2")), "act2")


class Bottleneck(Gated, resnet.Bottleneck):
    """`timm.models.resnet.Bottleneck`: 1x1, 3x3 with the stride, 1x1; drop_block and aa around the second activation.

    x: (N, inplanes, H, W) fp64|fp32|bf16|fp16 -> (N, 4*planes, ceil(H/stride), ceil(W/stride)), channels_last if fused.
    """

    ANATOMY = TimmAnatomy(
        (
            Layer("conv1", "bn1", "act1"),
            Layer("conv2", "bn2", "act2", "drop_block", "aa"),
            Layer("conv3", "bn3"),
        ),
        "act3",
    )


def _why_not_norm_act(norm: Any) -> str | None:
    """Return why a batch norm with its ReLU is not one that the fused ops compute, or None."""
    if type(norm) not in ACTIVATED:
        return f"expected one of {', '.join(c.__name__ for c in ACTIVATED)}, got {type(norm).__name__}"
    if not is_absent(norm.drop):
        return f"drop: expected Identity, got {type(norm.drop).__name__}"
    if (norm.running_mean is None) != (norm.running_var is None):
        return "the batch norm has one running statistic without the other"
    reason = why_not_relu(norm.act)
    return f"act: {reason}" if reason else None


class PreactivationAnatomy(TimmAnatomy):
    """A block of norm1, conv1, norm2, ..., where a norm holds its ReLU. count: the number of convolutions."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def decompose(self, block: Any) -> Pieces | str:
        bypassed: list[tuple[str, nn.Module]] = []
        convs: list[nn.Conv2d] = []
        norms: list[nn.Module] = []
        for i in range(1, self.count + 1):
            conv, norm = block.get_submodule(f"conv{i}"), block.get_submodule(f"norm{i}")
            for name, module, why in (
                (f"norm{i}", norm, _why_not_norm_act),
                (f"conv{i}", conv, fusable.why_not_convolution),
            ):
                reason = why(module)
                if reason:
                    return f"{name}: {reason}"
                bypassed.append((name, module))
            bypassed.append((f"norm{i}.act", norm.get_submodule("act")))
            convs.append(cast(nn.Conv2d, conv))
            norms.append(norm)
        path, drop = block.drop_path, None
        if not is_absent(path):
            drop = self.drop(path)
            if drop is None:
                return f"drop_path: expected Identity or DropPath, got {type(path).__name__}"
            bypassed.append(("drop_path", path))
            drop = drop if drop[0] else None
        chain = Parts(convs, norms, "none", preactivation=True, relu=False)
        if block.downsample is None:
            whole = chain._replace(shortcut="identity")
            reason = fusable.why_shortcut_misfits(block, whole)
            if reason:
                return reason
            segments = [Segment(chain, ())]
            return Pieces(None if drop else whole, segments, None, drop, "identity", None, False, chain, bypassed)
        projection = None if drop else _projection_alone(block)
        if projection is not None:
            whole = chain._replace(convs=[*convs, projection], shortcut="projection")
            bypassed += [("downsample", block.downsample), ("downsample.conv", projection)]
            return Pieces(whole, [], None, None, "projection", None, False, whole, bypassed)
        # The shortcut reads relu(norm1(x)), which the op does not return. So norm1 runs as a module, and so does the
        # last convolution, which no batch norm follows.
        inner = Parts(convs[:-1], norms[1:], "none")
        segments = [Segment(inner, (convs[-1],))]
        remaining = [row for row in bypassed if not row[0].startswith("norm1") and row[1] is not convs[-1]]
        return Pieces(None, segments, None, drop, block.downsample, None, False, inner, remaining, norms[0])


def _projection_alone(block: Any) -> nn.Conv2d | None:
    """Return the convolution that the shortcut consists of, if it can be part of the op, else None."""
    d = block.downsample
    if type(d) not in (resnetv2.DownsampleConv, resnetv2.DownsampleAvg):
        return None
    assert d is not None
    alone = is_absent(getattr(d, "pool", None)) and is_absent(getattr(d, "norm", None))
    conv = d.get_submodule("conv")
    if not alone or fusable.why_not_convolution(conv) or fusable.why_it_must_run("downsample", d):
        return None
    assert isinstance(conv, nn.Conv2d)
    return conv if conv.kernel_size == (1, 1) and conv.groups == 1 else None


class PreActBasic(Gated, Preactivation, resnetv2.PreActBasic):
    """`timm.models.resnetv2.PreActBasic`: y = conv2(norm2(conv1(h))) + shortcut, h = norm1(x), norms with their ReLU.

    x: (N, in_chs, H, W) fp64|fp32|bf16|fp16 -> (N, out_chs, ceil(H/stride), ceil(W/stride)), channels_last if fused.
    """

    ANATOMY = PreactivationAnatomy(2)


class PreActBottleneck(Gated, Preactivation, resnetv2.PreActBottleneck):
    """`timm.models.resnetv2.PreActBottleneck`: y = conv3(norm3(conv2(norm2(conv1(h))))) + shortcut, h = norm1(x).

    x: (N, in_chs, H, W) fp64|fp32|bf16|fp16 -> (N, out_chs, ceil(H/stride), ceil(W/stride)), channels_last if fused.
    """

    ANATOMY = PreactivationAnatomy(3)
