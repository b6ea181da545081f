"""`resnet-kernels verify`: every block and the logits, by the rule of `testing.compare`."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from ..inference import freeze
from ..replace import replace_blocks
from ..testing import Errors, compare


def _reduction(module: nn.Module) -> int:
    """Return the number of terms of the longest sum in the module."""
    return max(m.weight[0].numel() for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


@torch.no_grad()
def verify(model: resnet.ResNet, images: Tensor) -> dict[str, Errors]:
    """Compare the replaced blocks, the replaced model and the frozen model with the model, in the images' dtype.

    The model is not changed. It runs in channels_last, as the replaced one does: an engine's error may differ twofold
    between layouts.

    Args:
        model: torchvision's ResNet in evaluation mode.
        images: (N, 3, H, W) of the model's dtype and device.
    Returns:
        The errors by name: of every block for the input it has in the model, then of the logits of the replaced model
        and of the frozen model.
    """
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, (resnet.BasicBlock, resnet.Bottleneck))}
    hooks = [
        block.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args[0].clone(), out)}))
        for name, block in blocks.items()
    ]
    want = model(images)
    for hook in hooks:
        hook.remove()
    replaced = copy.deepcopy(model)
    replace_blocks(replaced)
    results = {}
    for name, (x, out) in seen.items():
        exact = copy.deepcopy(blocks[name]).double()(x.double())
        results[name] = compare(replaced.get_submodule(name)(x), out, exact, _reduction(blocks[name]))
    exact = copy.deepcopy(model).double()(images.double())
    results["logits, replaced"] = compare(replaced(images), want, exact, _reduction(model))
    results["logits, frozen"] = compare(freeze(model)(images), want, exact, _reduction(model))
    return results
