"""torchvision's layer of a DenseNet (Huang et al. 2017, arXiv 1608.06993) with a fused forward: a pre-activation
bottleneck over the concatenation of what the layers before it gave, without a shortcut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils import parametrize
from torchvision.models import densenet

from ..backends import select
from ..backends.contract import BackendUnavailable
from . import fusable
from .blocks import fused_forward
from .fusable import Parts

MEMORY_EFFICIENT = "memory_efficient: torchvision's checkpoint makes the concatenation again in the backward"
MODULES = ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2")


def _relu(module: nn.Module) -> str | None:
    return None if type(module) is nn.ReLU else f"expected ReLU, got {type(module).__name__}"


FITS = {"norm": fusable.batch_norm, "relu": _relu, "conv": fusable.convolution}


def parts(layer: densenet._DenseLayer) -> Parts:
    return Parts([layer.conv1, layer.conv2], [layer.norm1, layer.norm2], "none", preactivation=True)


def structure(layer: densenet._DenseLayer) -> str | None:
    """Why the layer cannot be fused whatever its input, or None."""
    if "bn_function" in layer.__dict__:
        return "its bn_function was overridden on the instance"
    for name in MODULES:
        module = getattr(layer, name)
        hook = fusable.hook_on(module)
        if hook:
            return f"{name} carries {hook}"
        if module.training and parametrize.is_parametrized(module):
            return f"{name} has a parametrization in training mode, which may change each time it is read"
        reason = FITS[name[:-1]](module)
        if reason:
            return f"{name}: {reason}"
    return None


def note(layer: densenet._DenseLayer) -> str | None:
    """Why the layer cannot be fused, or not where a gradient is wanted, whatever its input; or None."""
    return structure(layer) or (MEMORY_EFFICIENT if layer.memory_efficient else None)


def features(x: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)


def concatenated(x: Tensor | Sequence[Tensor]) -> Tensor:
    """Of tensors of different layouts torch makes one in NCHW, which the op would lay out anew."""
    maps = features(x)
    return torch.cat([t.contiguous(memory_format=torch.channels_last) for t in maps], 1) if len(maps) > 1 else maps[0]


def _context(x: Tensor | Sequence[Tensor]) -> str | None:
    if isinstance(x, Proxy):
        return fusable.context(x)
    maps = features(x)
    return fusable.context(maps[0]) if maps else "x: expected a tensor or some, got none"


def _why_not_concatenated(layer: densenet._DenseLayer, x: Tensor | Sequence[Tensor]) -> str | None:
    """Why the layer cannot run fused, as far as that does not need the concatenation."""
    maps = features(x)
    if any(not isinstance(t, Tensor) or t.dim() != 4 for t in maps):
        return f"x: expected tensors (N, C, H, W), got {[tuple(getattr(t, 'shape', ())) for t in maps]}"
    if layer.memory_efficient and torch.is_grad_enabled() and any(t.requires_grad for t in maps):
        return MEMORY_EFFICIENT
    return structure(layer)


def _why_not_of(layer: densenet._DenseLayer, x: Tensor) -> str | None:
    return fusable.tensors(parts(layer), x) or fusable.training(parts(layer), x)


def why_plain(layer: densenet._DenseLayer, x: Tensor | Sequence[Tensor]) -> str | None:
    """Why the layer's forward runs as the plain chain of torch modules for this input, or None if it runs fused."""
    return _context(x) or _why_not_concatenated(layer, x) or _why_not_of(layer, concatenated(x))


class DenseLayer(densenet._DenseLayer):
    """y = dropout(conv2(relu(norm2(conv1(relu(norm1(x))))))), x the concatenation of the inputs: 1x1, then 3x3.

    The arguments, attributes and state dict of torchvision's `densenet._DenseLayer`.
    x: one or a list of (N, C_i, H, W) fp64|fp32|bf16|fp16, num_input_features the sum of C_i ->
        (N, growth_rate, H, W), channels_last if fused.
    With memory_efficient, where a gradient is wanted, it is torchvision's forward.
    Numerics: see `ops.preactivation_block`.
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
