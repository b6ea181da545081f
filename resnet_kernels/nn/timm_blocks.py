"""timm's residual blocks with a fused forward: those of its ResNets (resnet, resnext, wide_resnet, seresnet and what
else its options make of them) and, with batch norms, of its pre-activation ResNets (resnetv2).

They are timm's classes: constructor, attributes, parameters and state dict. timm is imported here and nowhere else.
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
from .gated import Gated, Layer, Pieces, Segment, no_module, relu
from .shortcuts import Preactivation

ACTIVATED = (BatchNormAct2d, SyncBatchNormAct)


def _squeezed(module: Any, mean: Tensor) -> Tensor:
    return module.gate(module.fc2(module.act(module.bn(module.fc1(mean)))))


def _efficient(module: Any, mean: Tensor) -> Tensor:
    """Of efficient channel attention (Wang et al. 2020, arXiv 1910.03151), a convolution along the channels."""
    logits = module.conv(mean.flatten(2).transpose(1, 2))
    if module.conv2 is not None:
        logits = module.conv2(module.act(logits))
    return module.gate(logits).transpose(1, 2).unsqueeze(3)


class _Timm(Gated):
    """What our blocks know of timm's modules."""

    def _inactive(self, module: Any) -> bool:
        dropped = type(module) is DropBlock2d and (not module.training or not module.drop_prob)
        return no_module(module) or (dropped and not fusable.hook_on(module))

    @staticmethod
    def _excite(module: Any) -> Callable[[Tensor], Tensor] | None:
        if type(module) is EcaModule:
            return functools.partial(_efficient, module)
        return functools.partial(_squeezed, module) if type(module) is SEModule and not module.add_maxpool else None

    @staticmethod
    def _drop(module: Any) -> tuple[float, bool] | None:
        if type(module) is not DropPath:
            return None
        return module.drop_prob if module.training else 0.0, module.scale_by_keep


class BasicBlock(_Timm, resnet.BasicBlock):
    """`timm.models.resnet.BasicBlock`: y = relu(gate * bn2(conv2(aa(relu(drop_block(bn1(conv1(x))))))) + shortcut(x)).

    x: (N, inplanes, H, W) fp64|fp32|bf16|fp16 -> (N, planes, ceil(H/stride), ceil(W/stride)), channels_last if fused.
    Attention but squeeze-and-excitation and ECA's, drop_block, aa, and a shortcut's pooling run as timm's modules
    between fused parts.
    """

    LAYERS = (Layer("conv1", "bn1", "act1", "drop_block", "aa"), Layer("conv2", "bn2"))
    LAST = "act2"


class Bottleneck(_Timm, resnet.Bottleneck):
    """`timm.models.resnet.Bottleneck`: 1x1, 3x3 with the stride, 1x1; drop_block and aa around the second activation.

    x: (N, inplanes, H, W) fp64|fp32|bf16|fp16 -> (N, 4*planes, ceil(H/stride), ceil(W/stride)), channels_last if fused.
    """

    LAYERS = (
        Layer("conv1", "bn1", "act1"),
        Layer("conv2", "bn2", "act2", "drop_block", "aa"),
        Layer("conv3", "bn3"),
    )
    LAST = "act3"


def _activated(norm: Any) -> str | None:
    """Why the batch norm with its ReLU is not one that is computed here, or None."""
    if type(norm) not in ACTIVATED:
        return f"expected one of {', '.join(c.__name__ for c in ACTIVATED)}, got {type(norm).__name__}"
    if not no_module(norm.drop):
        return f"drop: expected Identity, got {type(norm.drop).__name__}"
    if (norm.running_mean is None) != (norm.running_var is None):
        return "the batch norm has one running statistic without the other"
    reason = relu(norm.act)
    return f"act: {reason}" if reason else None


class _Preactivation(_Timm, Preactivation):
    """A block of norm1, conv1, norm2, ..., where a norm holds its ReLU."""

    COUNT: int

    def _pieces(self) -> Pieces | str:
        inside: list[tuple[str, nn.Module]] = []
        convs: list[nn.Conv2d] = []
        norms: list[nn.Module] = []
        for i in range(1, self.COUNT + 1):
            conv, norm = self.get_submodule(f"conv{i}"), self.get_submodule(f"norm{i}")
            for name, module, why in ((f"norm{i}", norm, _activated), (f"conv{i}", conv, fusable.convolution)):
                reason = why(module)
                if reason:
                    return f"{name}: {reason}"
                inside.append((name, module))
            inside.append((f"norm{i}.act", norm.get_submodule("act")))
            convs.append(cast(nn.Conv2d, conv))
            norms.append(norm)
        path, drop = cast(nn.Module, self.drop_path), None
        if not no_module(path):
            drop = self._drop(path)
            if drop is None:
                return f"drop_path: expected Identity or DropPath, got {type(path).__name__}"
            inside.append(("drop_path", path))
            drop = drop if drop[0] else None
        chain = Parts(convs, norms, "none", preactivation=True, relu=False)
        if self.downsample is None:
            whole = chain._replace(shortcut="identity")
            reason = fusable.misfit(self, whole)
            if reason:
                return reason
            segments = [Segment(chain, ())]
            return Pieces(None if drop else whole, segments, None, drop, "identity", None, False, chain, inside)
        projection = None if drop else self._projection_alone()
        if projection is not None:
            whole = chain._replace(convs=[*convs, projection], shortcut="projection")
            inside += [("downsample", self.downsample), ("downsample.conv", projection)]
            return Pieces(whole, [], None, None, "projection", None, False, whole, inside)
        # relu(norm1(x)), which the shortcut reads, is none of the op's results: norm1 and the last convolution, which
        # no batch norm follows, run as modules.
        inner = Parts(convs[:-1], norms[1:], "none")
        segments = [Segment(inner, (convs[-1],))]
        bypassed = [row for row in inside if not row[0].startswith("norm1") and row[1] is not convs[-1]]
        return Pieces(None, segments, None, drop, self.downsample, None, False, inner, bypassed, norms[0])

    def _projection_alone(self) -> nn.Conv2d | None:
        """The convolution that the shortcut consists of, if it can be a part of the op."""
        d = self.downsample
        if type(d) not in (resnetv2.DownsampleConv, resnetv2.DownsampleAvg):
            return None
        assert d is not None
        alone = no_module(getattr(d, "pool", None)) and no_module(getattr(d, "norm", None))
        conv = d.get_submodule("conv")
        if not alone or fusable.convolution(conv) or fusable.seen_inside("downsample", d):
            return None
        assert isinstance(conv, nn.Conv2d)
        return conv if conv.kernel_size == (1, 1) and conv.groups == 1 else None


class PreActBasic(_Preactivation, resnetv2.PreActBasic):
    """`timm.models.resnetv2.PreActBasic`: y = conv2(norm2(conv1(h))) + shortcut, h = norm1(x), norms with their ReLU.

    x: (N, in_chs, H, W) fp64|fp32|bf16|fp16 -> (N, out_chs, ceil(H/stride), ceil(W/stride)), channels_last if fused.
    """

    COUNT = 2


class PreActBottleneck(_Preactivation, resnetv2.PreActBottleneck):
    """`timm.models.resnetv2.PreActBottleneck`: y = conv3(norm3(conv2(norm2(conv1(h))))) + shortcut, h = norm1(x).

    x: (N, in_chs, H, W) fp64|fp32|bf16|fp16 -> (N, out_chs, ceil(H/stride), ceil(W/stride)), channels_last if fused.
    """

    COUNT = 3
