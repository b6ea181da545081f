"""torchvision's BasicBlock and Bottleneck with a fused forward.

They subclass torchvision's classes: same constructor, attributes, parameters and state dict. They hold no state of
their
own: the scale and shift of a batch norm are computed at each call. A block is one differentiable op: one for batch
statistics (training), another for running statistics alone (evaluation, or frozen batch norms in a training model).
Where `fusable` finds a reason, torchvision's own forward runs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from ..backends import select
from ..backends.contract import BackendUnavailable
from ..ops import residual_block, residual_block_training
from ..ops.batch_norm import affine_of, norm_of
from .fusable import Parts, parts, trains, why_context_is_plain, why_plain


def fused_forward(p: Parts, x: Tensor) -> Tensor:
    """Return the result of a block or stem as one op. Call only if `why_plain` returned None."""
    weights = [conv.weight for conv in p.convs]
    if trains(p):
        return residual_block_training(x, weights, [norm_of(bn) for bn in p.norms], p.spec)
    affines = [affine_of(bn) for bn in p.norms]
    # Under autocast x has its dtype already; the weights may not.
    weights = [w.to(x.dtype) for w in weights]
    return residual_block(x, weights, [a for a, _ in affines], [b for _, b in affines], p.spec)


class Fused(nn.Module):
    """The forward that all fused blocks share. It comes before the plain forward in the order of inheritance."""

    def why_plain(self, x: Tensor) -> str | None:
        """Return why the forward runs as plain torch modules for this input, or None if it runs fused."""
        return why_plain(self, x)

    def _fused(self, x: Tensor) -> Tensor:
        """Return the fused forward. Call only if `why_plain` returned None."""
        p = parts(self)
        assert isinstance(p, Parts)
        return fused_forward(p, x)

    def forward(self, x: Tensor) -> Tensor:
        reason = self.why_plain(x)
        if not torch.compiler.is_compiling() and not why_context_is_plain(x):
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
