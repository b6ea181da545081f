"""Swapping torchvision's and timm's residual blocks, ResNets and DenseNets' layers in a model for ours, and back."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torchvision.models import densenet, resnet

from .nn import BasicBlock, Bottleneck, DenseLayer, ResNet, gated
from .nn import densenet as dense
from .nn.blocks import Fused
from .nn.fusable import structure
from .nn.gated import Gated


@dataclasses.dataclass(frozen=True)
class Kind:
    """A class of blocks and ours in its place.

    note: why a block of ours runs as the plain chain for now, or None. refused: why it never could run fused, so that
    it stays what it was, or None.
    """

    original: type[nn.Module]
    fused: type[nn.Module]
    note: Callable[..., str | None] = structure
    refused: Callable[..., str | None] = lambda block: None


KINDS = (
    Kind(resnet.BasicBlock, BasicBlock),
    Kind(resnet.Bottleneck, Bottleneck),
    Kind(densenet._DenseLayer, DenseLayer, dense.note),
)

# On a convolution whose weight was laid out anew, for restore_blocks to lay it out as it was.
_RELAID = "_resnet_kernels_relaid"


@dataclasses.dataclass(frozen=True)
class ReplacementReport:
    """What `replace_blocks` did. Printing it gives a summary and every block left alone with its reason.

    replaced: names of the blocks now ours.
    stems: names of the ResNets whose stem is one op in training now.
    skipped: name -> why the block was left as it was.
    notes: name -> why a replaced block runs as the plain chain for now (it is checked at every call).
    """

    replaced: tuple[str, ...]
    skipped: dict[str, str]
    notes: dict[str, str]
    stems: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} residual blocks replaced, {len(self.skipped)} left alone"]
        lines += [f"  {name or 'the model'}: its stem trains as one op" for name in self.stems]
        lines += [f"  {name}: left alone: {reason}" for name, reason in self.skipped.items()]
        lines += [f"  {name}: replaced, unfused for now: {reason}" for name, reason in self.notes.items()]
        return "\n".join(lines)


# timm's blocks with a shortcut that are none of these.
OTHERS = tuple(f"timm.models.{name}" for name in ("res2net", "resnest", "senet", "legacy_senet", "sknet", "resnetv2"))


@functools.cache
def _of_timm() -> tuple[Kind, ...]:
    ours = importlib.import_module(".nn.timm_blocks", __package__)
    kinds = (ours.BasicBlock, ours.Bottleneck, ours.PreActBasic, ours.PreActBottleneck)
    return tuple(Kind(fused.__bases__[-1], fused, gated.structure, gated.refused) for fused in kinds)


def kinds_in(model: nn.Module) -> tuple[Kind, ...]:
    """Those that the model may hold. timm is imported for a model with classes of its."""
    timm = any(c.__module__.partition(".")[0] == "timm" for m in model.modules() for c in type(m).__mro__)
    return (*KINDS, *_of_timm()) if timm else KINDS


def _kind_of(block: nn.Module, kinds: tuple[Kind, ...]) -> Kind | str | None:
    """The kind whose class takes the block's place, why the block is left as it is, or None: it is no block."""
    kind = next((k for k in kinds if isinstance(block, k.original)), None)
    if kind is None:
        other = type(block).__module__ in OTHERS and hasattr(block, "downsample")
        return f"{type(block).__name__} is of a kind that is not known here" if other else None
    if type(block) is kind.fused or type(block).forward is Fused.forward:
        return "it is fused already"
    if type(block) is not kind.original:
        return f"{type(block).__module__}.{type(block).__qualname__} is a subclass and may compute something else"
    if "forward" in block.__dict__:
        return "its forward was overridden on the instance"
    return kind


def as_gated(block: nn.Module, kinds: tuple[Kind, ...]) -> Gated | None:
    """The block, or a shallow copy of it, seen as one of ours that is taken apart; None for another."""
    if isinstance(block, Gated):
        return block
    kind = next((k for k in kinds if type(block) is k.original), None)
    if kind is None or not issubclass(kind.fused, Gated) or "forward" in block.__dict__:
        return None
    view = copy.copy(block)
    view.__class__ = kind.fused
    assert isinstance(view, Gated)
    return view


def replace_blocks(model: nn.Module, channels_last: bool = False) -> ReplacementReport:
    """Make torchvision's and timm's BasicBlocks and Bottlenecks, timm's PreActBasics and PreActBottlenecks, and
    torchvision's DenseNet layers in the model those of `resnet_kernels.nn`, and torchvision's ResNets ones whose stem
    trains as one op, in place.

    Only their class changes: names, parameters, buffers, hooks, optimizers' references and the state dict stay.
    A block whose inner modules cannot be fused as they stand is replaced too, since that is decided again at every
    call, and noted.
    Training: before DDP, FSDP or torch.compile take the model; examples/train_imagenet.py is a whole script.

    Args:
        model: any module; itself a block, or with blocks anywhere below.
        channels_last: also lay out the model's convolution weights so, in place, and with them whatever runs unfused
            (the stem in evaluation, for one). Faster; but code that takes views of the weights, as torch's pruning
            does, may fail.
    Returns:
        ReplacementReport
    Numerics: see `ops.residual_block`.
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
        refused = kind.refused(block)
        if refused:
            block.__class__ = kind.original
            skipped[name] = refused
            continue
        replaced.append(name)
        note = kind.note(block)
        if note:
            notes[name] = note
    if replaced and channels_last:
        for conv in _convolutions(model):
            if not conv.weight.is_contiguous(memory_format=torch.channels_last):
                conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
                conv.__dict__[_RELAID] = True
    return ReplacementReport(tuple(replaced), skipped, notes, tuple(stems))


def _convolutions(model: nn.Module) -> Iterator[nn.Conv2d]:
    """Those whose weight is a plain parameter: one computed by a parametrization has no layout to keep."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and type(module._parameters.get("weight")) is nn.Parameter:
            yield module


def restore_blocks(model: nn.Module) -> tuple[str, ...]:
    """Undo `replace_blocks`: class and weight layout as they were. Returns the names of the blocks restored."""
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
        if conv.__dict__.pop(_RELAID, False):
            conv.weight.data = conv.weight.data.contiguous()
    return tuple(restored)
