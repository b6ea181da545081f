"""torchvision's ResNet with a stem that trains as one op."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models import resnet

from ..backends import select
from . import fusable
from .blocks import fused_forward


def why_plain(model: resnet.ResNet, x: Tensor) -> str | None:
    """Return why the model's stem runs as plain torch modules for this input, or None if it runs as one op."""
    p = fusable.stem(model)
    if isinstance(p, str):
        return p
    if not fusable.trains(p):
        return "its batch norm does not use the batch's statistics"
    if select.named() == select.EAGER:
        return "the backend 'eager' was named"
    reason = fusable.why_context_is_plain(x)
    if reason:
        return reason
    x = as_autocast(x)
    return fusable.why_not_tensors(p, x) or fusable.why_not_trained(p, x)


def as_autocast(x: Tensor) -> Tensor:
    """Return x in the dtype that autocast gives a convolution's input: images come in fp32."""
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


class ResNet(resnet.ResNet):
    """torchvision's ResNet whose stem, max_pool(relu(bn1(conv1(x)))), is one op if its batch norm uses the batch's
    statistics.

    Arguments, attributes and state dict are torchvision's. The forward is torchvision's too where `why_plain` finds a
    reason; one reason is a named backend that does not train the stem.
    """

    def _forward_impl(self, x: Tensor) -> Tensor:
        if why_plain(self, x):
            return super()._forward_impl(x)
        p = fusable.stem(self)
        assert isinstance(p, fusable.Parts)
        x = fused_forward(p, as_autocast(x))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))
