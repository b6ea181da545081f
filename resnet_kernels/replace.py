"""Replacing the residual blocks, ResNets and DenseNet layers of torchvision and timm in a model by fused ones, and
back."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torchvision.models import densenet, resnet

from .nn import BasicBlock, Bottleneck, DenseLayer, ResNet
from .nn import densenet as dense
from .nn.blocks import Fused
from .nn.fusable import why_unfused
from .nn.gated import Anatomy, Gated


@dataclasses.dataclass(frozen=True)
class Kind:
    """A class of blocks, and the fused class that takes its place.

    why_unfused: returns why a block of the fused class runs as plain modules for now, or None. why_left: returns why a
    block could never run fused, so that its class stays, or None.
    """

    original: type[nn.Module]
    fused: type[nn.Module]
    why_unfused: Callable[..., str | None] = why_unfused
    why_left: Callable[..., str | None] = lambda block: None


KINDS = (
    Kind(resnet.BasicBlock, BasicBlock),
    Kind(resnet.Bottleneck, Bottleneck),
    Kind(densenet._DenseLayer, DenseLayer, dense.why_unfused_in_training),
)

# Marks a convolution whose weight was converted to channels_last, for `restore_blocks` to convert it back.
_CONVERTED = "_resnet_kernels_converted"


@dataclasses.dataclass(frozen=True)
class ReplacementReport:
    """What `replace_blocks` did. Printing it gives a summary, and every block that was left alone with its reason.

    replaced: the names of the blocks that were replaced.
    stems: the names of the ResNets whose stem can now train as one op.
    skipped: name -> why the block was left alone.
    notes: name -> why a replaced block runs as plain modules for now (this is decided again at every call).
    """

    replaced: tuple[str, ...]
    skipped: dict[str, str]
    notes: dict[str, str]
    stems: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} residual blocks replaced, {len(self.skipped)} left alone"]
        lines += [f"  {name or 'the model'}: its stem can train as one op" for name in self.stems]
        lines += [f"  {name}: left alone: {reason}" for name, reason in self.skipped.items()]
        lines += [f"  {name}: replaced, unfused for now: {reason}" for name, reason in self.notes.items()]
        return "\n".join(lines)


# Modules of timm with residual blocks that are not supported.
OTHERS = tuple(f"timm.models.{name}" for name in ("res2net", "resnest", "senet", "legacy_senet", "sknet", "resnetv2"))


@functools.cache
def _timm_kinds() -> tuple[Kind, ...]:
    ours = importlib.import_module(".nn.timm_blocks", __package__)
    fused = (ours.BasicBlock, ours.Bottleneck, ours.PreActBasic, ours.PreActBottleneck)
    return tuple(Kind(cls.__bases__[-1], cls, cls.ANATOMY.why_unfused, cls.ANATOMY.why_not_decomposed) for cls in fused)


def kinds_in(model: nn.Module) -> tuple[Kind, ...]:
    """Return the kinds that the model may hold. timm is imported only for a model with classes of timm."""
    timm = any(c.__module__.partition(".")[0] == "timm" for m in model.modules() for c in type(m).__mro__)
    return (*KINDS, *_timm_kinds()) if timm else KINDS


def _kind_of(block: nn.Module, kinds: tuple[Kind, ...]) -> Kind | str | None:
    """Return the block's kind, or why the block is left alone, or None if the module is no residual block."""
    kind = next((k for k in kinds if isinstance(block, k.original)), None)
    if kind is None:
        other = type(block).__module__ in OTHERS and hasattr(block, "downsample")
        return f"blocks of the class {type(block).__name__} are not supported" if other else None
    if type(block) is kind.fused or type(block).forward is Fused.forward:
        return "it is fused already"
    if type(block) is not kind.original:
        return f"{type(block).__module__}.{type(block).__qualname__} is a subclass and may compute something else"
    if "forward" in block.__dict__:
        return "its forward was overridden on the instance"
    return kind.why_left(block) or kind


def anatomy_of(block: nn.Module, kinds: tuple[Kind, ...]) -> Anatomy | None:
    """Return how to decompose a block that is, or can be replaced by, a gated block; None for another module."""
    if isinstance(block, Gated):
        return block.ANATOMY
    kind = next((k for k in kinds if type(block) is k.original), None)
    if kind is None or not issubclass(kind.fused, Gated) or "forward" in block.__dict__:
        return None
    return kind.fused.ANATOMY


def replace_blocks(model: nn.Module, channels_last: bool = False) -> ReplacementReport:
    """Replace the residual blocks of a model by fused ones, in place.

    Replaced are torchvision's BasicBlock and Bottleneck, timm's BasicBlock, Bottleneck, PreActBasic and
    PreActBottleneck, and torchvision's DenseNet layers; torchvision's ResNet becomes one whose stem trains as one op.
    Only the class of a
    module changes: names, parameters, buffers, hooks, the optimizer's references and the state dict stay. A block whose
    inner modules cannot be fused as they are now is replaced too and noted, since this is decided at every call.
    For training call it before DDP, FSDP or torch.compile take the model; examples/train_imagenet.py is a complete
    script.

    Args:
        model: any module; itself a block, or with blocks anywhere below.
        channels_last: also convert the model's convolution weights to channels_last in place. This is faster where
            modules run unfused (the stem in evaluation, for example), but code that takes views of the weights, as
            torch's pruning does, may fail.
    Returns:
        ReplacementReport
    Numerics: see `ops.residual_block` and `ops.residual_block_training`.
    """
    replaced, skipped, notes, stems = [], {}, {}, []
    kinds = kinds_in(model)
    for name, block in model.named_modules():
        if type(block) is resnet.ResNet and not {"forward", "_forward_impl"} & set(block.__dict__):
            block.__class__ = ResNet
            stems.append(name)
        kind = _kind_of(block, kinds)
        if isinstance(kind, str):
            skipped[name] = kind
        if not isinstance(kind, Kind):
            continue
        block.__class__ = kind.fused
        replaced.append(name)
        note = kind.why_unfused(block)
        if note:
            notes[name] = note
    if replaced and channels_last:
        for conv in _convolutions(model):
            if not conv.weight.is_contiguous(memory_format=torch.channels_last):
                conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
                conv.__dict__[_CONVERTED] = True
    return ReplacementReport(tuple(replaced), skipped, notes, tuple(stems))


def _convolutions(model: nn.Module) -> Iterator[nn.Conv2d]:
    """Yield the convolutions whose weight is a parameter. The weight of a parametrization has no layout to convert."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and type(module._parameters.get("weight")) is nn.Parameter:
            yield module


def restore_blocks(model: nn.Module) -> tuple[str, ...]:
    """Undo `replace_blocks`: restore classes and weight layouts. Returns the names of the restored blocks."""
    restored = []
    originals = {kind.fused: kind.original for kind in kinds_in(model)}
    for name, block in model.named_modules():
        if type(block) is ResNet:
            block.__class__ = resnet.ResNet
        if type(block) not in originals:
            continue
        block.__class__ = originals[type(block)]
        restored.append(name)
    for conv in _convolutions(model):
        if conv.__dict__.pop(_CONVERTED, False):
            conv.weight.data = conv.weight.data.contiguous()
    return tuple(restored)
