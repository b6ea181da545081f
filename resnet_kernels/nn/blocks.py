"""torchvision's BasicBlock and Bottleneck with a fused forward.

They are torchvision's classes: same constructor, attributes, parameters and state dict. They hold no state of their
own; a batch norm's scale and shift are computed at each call. The block is one op, differentiable: one for batch
statistics (training), one for running statistics alone (evaluation, or frozen batch norms in a training model).
Wherever `fusable` finds a reason, it is torchvision's own forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from ..backends import select
from ..backends.contract import BackendUnavailable
from ..ops import preactivation_block, residual_block, residual_block_training, stem
from ..ops.batch_norm import affine_of, norm_of
from .fusable import Parts, context, parts, trains, why_plain


def fused_forward(p: Parts, x: Tensor) -> Tensor:
    """A block or stem as one op. Only where nothing speaks for plain modules."""
    geometry = (
        [conv.stride[0] for conv in p.convs],
        [conv.dilation[0] for conv in p.convs],
        [conv.groups for conv in p.convs],
    )
    weights = [conv.weight for conv in p.convs]
    if p.pool is not None:
        strides, dilations, groups = geometry
        return stem(x, weights[0], norm_of(p.norms[0]), strides[0], dilations[0], groups[0], p.pool)
    if trains(p):
        norms = [norm_of(bn) for bn in p.norms]
        if p.preactivation:
            return preactivation_block(x, weights, norms, *geometry, p.shortcut)
        return residual_block_training(x, weights, norms, *geometry, p.shortcut, p.relu)
    affines = [affine_of(bn) for bn in p.norms]
    # Under autocast x is in its dtype already, the weights may not be.
    weights = [w.to(x.dtype) for w in weights]
    return residual_block(x, weights, [a for a, _ in affines], [b for _, b in affines], *geometry, p.shortcut, p.relu)


class Fused(nn.Module):
    """The forward that blocks share, before the plain one in the order of inheritance."""

    def _why_plain(self, x: Tensor) -> str | None:
        """Why the forward runs as the plain chain of torch modules for this input, or None if it runs fused."""
        return why_plain(self, x)

    def _fused(self, x: Tensor) -> Tensor:
        """The forward where there is no such reason."""
        p = parts(self)
        assert isinstance(p, Parts)
        return fused_forward(p, x)

    def forward(self, x: Tensor) -> Tensor:
        reason = self._why_plain(x)
        if not torch.compiler.is_compiling() and not context(x):
            name = select.named()
            if name == select.EAGER:
                reason = "the backend 'eager' was named"
            elif name and reason:
                raise BackendUnavailable(f"backend {name!r} was named and this block cannot run fused: {reason}")
        return super().forward(x) if reason else self._fused(x)


class BasicBlock(Fused, resnet.BasicBlock):
    """y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), both convolutions 3x3, stride on the first.

    The arguments, attributes and state dict of `torchvision.models.resnet.BasicBlock`.
    x: (N, inplanes, H, W) fp64|fp32|bf16|fp16 -> (N, planes, ceil(H/stride), ceil(W/stride)), channels_last if fused.
    downsample: None, Sequential(Conv2d 1x1, batch norm), `ZeroPadShortcut`, or any module (then not fused).
    """


class Bottleneck(Fused, resnet.Bottleneck):
    """y = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x)): 1x1, 3x3 with the stride, 1x1.

    The arguments, attributes and state dict of `torchvision.models.resnet.Bottleneck`.
    x: (N, inplanes, H, W) fp64|fp32|bf16|fp16 -> (N, 4*planes, ceil(H/stride), ceil(W/stride)), channels_last if fused.
    downsample: None, Sequential(Conv2d 1x1, batch norm), `ZeroPadShortcut`, or any module (then not fused).
    """
