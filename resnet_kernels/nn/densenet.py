"""torchvision's layer of a DenseNet (Huang et al. 2017, arXiv 1608.06993) with a fused forward: a pre-activation
bottleneck without a shortcut, over the concatenated results of the layers before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torchvision.models import densenet

from ..backends import select
from ..backends.contract import BackendUnavailable
from . import fusable
from .blocks import fused_forward
from .fusable import Parts

MEMORY_EFFICIENT = "memory_efficient: torchvision's checkpoint concatenates again in the backward"
MODULES = ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2")


def _relu(module: nn.Module) -> str | None:
    return None if type(module) is nn.ReLU else f"expected ReLU, got {type(module).__name__}"


WHY_NOT = {"norm": fusable.why_not_batch_norm, "relu": _relu, "conv": fusable.why_not_convolution}


def parts(layer: densenet._DenseLayer) -> Parts:
    return Parts([layer.conv1, layer.conv2], [layer.norm1, layer.norm2], "none", preactivation=True)


def why_unfused(layer: densenet._DenseLayer) -> str | None:
    """Return why the layer cannot be fused whatever its input, or None."""
    if "bn_function" in layer.__dict__:
        return "its bn_function was overridden on the instance"
    for name in MODULES:
        module = getattr(layer, name)
        reason = fusable.why_it_must_run(name, module)
        if reason:
            return reason
        reason = WHY_NOT[name[:-1]](module)
        if reason:
            return f"{name}: {reason}"
    return None


def why_unfused_in_training(layer: densenet._DenseLayer) -> str | None:
    """Return why the layer cannot be fused whatever its input, at least if a gradient is requested, or None."""
    return why_unfused(layer) or (MEMORY_EFFICIENT if layer.memory_efficient else None)


def features(x: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)


def concatenated(x: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the concatenation in channels_last.

    torch would return NCHW for tensors of different layouts, which the op would copy again.
    """
    maps = features(x)
    return torch.cat([t.contiguous(memory_format=torch.channels_last) for t in maps], 1) if len(maps) > 1 else maps[0]


def _context(x: Tensor | Sequence[Tensor]) -> str | None:
    if isinstance(x, Proxy):
        return fusable.why_context_is_plain(x)
    maps = features(x)
    return fusable.why_context_is_plain(maps[0]) if maps else "x: expected a tensor or some, got none"


def _why_not_concatenated(layer: densenet._DenseLayer, x: Tensor | Sequence[Tensor]) -> str | None:
    """Return why the layer cannot run fused, as far as that can be known before the concatenation, or None."""
    maps = features(x)
    if any(not isinstance(t, Tensor) or t.dim() != 4 for t in maps):
        return f"x: expected tensors (N, C, H, W), got {[tuple(getattr(t, 'shape', ())) for t in maps]}"
    if layer.memory_efficient and torch.is_grad_enabled() and any(t.requires_grad for t in maps):
        return MEMORY_EFFICIENT
    return why_unfused(layer)


def _why_not_of(layer: densenet._DenseLayer, x: Tensor) -> str | None:
    return fusable.why_not_tensors(parts(layer), x) or fusable.why_not_trained(parts(layer), x)


def why_plain(layer: densenet._DenseLayer, x: Tensor | Sequence[Tensor]) -> str | None:
    """Return why the layer's forward runs as plain torch modules for this input, or None if it runs fused."""
    return _context(x) or _why_not_concatenated(layer, x) or _why_not_of(layer, concatenated(x))


class DenseLayer(densenet._DenseLayer):
    """y = dropout(conv2(relu(norm2(conv1(relu(norm1(x))))))), x the concatenation of the inputs: 1x1, then 3x3.

    The arguments, attributes and state dict of torchvision's `densenet._DenseLayer`.
    x: one or a list of (N, C_i, H, W) fp64|fp32|bf16|fp16, num_input_features the sum of C_i ->
        (N, growth_rate, H, W), channels_last if fused.
    With memory_efficient it is torchvision's forward if a gradient is requested.
    Numerics: see `ops.residual_block_training`.
    """

    def forward(self, input: Tensor | Sequence[Tensor]) -> Tensor:
        reason = _context(input)
        named = None if reason or torch.compiler.is_compiling() else select.named()
        if reason or named == select.EAGER:
            return super().forward(input)
        reason = _why_not_concatenated(self, input)
        x = None if reason else concatenated(input)
        if x is not None:
            reason = _why_not_of(self, x)
        if x is None or reason:
            if named:
                raise BackendUnavailable(f"backend {named!r} was named and this layer cannot run fused: {reason}")
            return super().forward(input)
        y = fused_forward(parts(self), x)
        return F.dropout(y, self.drop_rate, self.training) if self.drop_rate > 0 else y
