"""Building the frozen copy of a model."""

from __future__ import annotations

import collections
import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torchvision.models import resnet
from torchvision.models._utils import IntermediateLayerGetter

from ..backends import select
from ..backends.contract import BackendUnavailable, Geometry, accumulator_dtype
from ..nn import BasicBlock, Bottleneck, ResNet, fusable, gated
from ..ops import block_inference as block_op
from ..ops import stem_inference as stem_op
from ..ops.batch_norm import affine_of
from ..replace import as_gated, kinds_in
from .graphs import Graphs
from .modules import FrozenGated, FrozenResNet
from .trunk import FrozenTrunk, Step

BLOCKS = (resnet.BasicBlock, resnet.Bottleneck)


PREACTIVATION = "its batch norms stand in front of its convolutions"


def _why_gated_left(view: gated.Gated) -> str | None:
    hook = fusable.hook_on(view)
    reason = f"it carries {hook}" if hook else gated.structure(view)
    if reason:
        return reason
    pieces = view._pieces()
    assert isinstance(pieces, gated.Pieces)
    if pieces.chain.preactivation or pieces.first is not None:
        return PREACTIVATION
    if pieces.drop is not None:
        return "its drop_path is in training mode"
    return next((reason for reason in map(fusable.known_statistics, pieces.chain.norms) if reason), None)


class Freezer:
    """Builds the frozen copy of a model. Copying is `copy.deepcopy`'s, told beforehand what stands for what."""

    def __init__(self, source: nn.Module, dtype: torch.dtype | None, cuda_graphs: bool) -> None:
        self.kinds = kinds_in(source)
        first = next((m for m in source.modules() if self._is_block(m)), None)
        weight = None if first is None else cast(nn.Conv2d, first.get_submodule("conv1")).weight
        if weight is None:
            raise ValueError(
                f"model: expected residual blocks of torchvision or timm in it, found none in {type(source).__name__}"
            )
        self.dtype = dtype or weight.dtype
        if not self.dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating dtype, got {self.dtype}")
        self.device = weight.device
        self.graphs = cuda_graphs
        self.fused: list[str] = []
        self.left: dict[str, str] = {}
        self.memo: dict[int, Any] = {}  # id of a module -> what stands for it in the copy, as deepcopy wants it
        self.compute_dtype = self.dtype
        counts = collections.Counter(id(m) for _, m in source.named_modules(remove_duplicate=False))
        self.shared = {i for i, count in counts.items() if count > 1}  # registered in more than one place
        with torch.no_grad():
            self._plan(source)
            if not self.fused and not all(reason == PREACTIVATION for reason in self.left.values()):
                reasons = "; ".join(f"{name}: {reason}" for name, reason in self.left.items())
                raise ValueError(f"model: expected residual blocks that can be folded, found none; {reasons}")
            self.net = copy.deepcopy(source, self.memo)
            for name, module in source.named_modules():
                if type(module) in (resnet.ResNet, ResNet):
                    self._join(module, f"{name}." if name else "")
            # All that is not a trunk (whose weights are no parameters) computes in the same dtype as the trunks.
            self.net.to(self.compute_dtype)

    def _plan(self, source: nn.Module) -> None:
        inside: set[int] = set()  # ids of blocks below a Sequential that is folded as one
        for name, module in source.named_modules():
            prefix = f"{name}." if name else ""
            if type(module) is IntermediateLayerGetter:
                self._stem_of(module, prefix)
            elif type(module) is nn.Sequential and module._modules and not fusable.hook_on(module):
                # Not named_children(), which names a block that stands there twice once.
                blocks = {n: b for n, b in module._modules.items() if b is not None and self._is_block(b)}
                if len(blocks) == len(module._modules) and all(map(self._whole, blocks.values())):
                    self.memo[id(module)] = self._trunk([self._block(b, prefix + n) for n, b in blocks.items()])
                    inside.update(id(b) for b in blocks.values())
            elif self._is_block(module) and id(module) not in inside:
                reason = self._why_left(module)
                if reason:
                    self.left[name] = reason
                elif self._whole(module):
                    self.memo[id(module)] = self._trunk([self._block(module, name)])
                else:
                    self.memo[id(module)] = self._gated(module, name)

    def _trunk(self, steps: list[Step]) -> FrozenTrunk:
        self.fused += [step.name for step in steps if step.name not in self.fused]
        self.compute_dtype = steps[0].backend().compute_dtype(self.dtype)
        return FrozenTrunk(steps, self.compute_dtype, self.graphs)

    def _join(self, model: resnet.ResNet, prefix: str) -> None:
        """Give the copy of a ResNet a trunk of its own. Its stem and stages stay, for whoever calls them."""
        stem, twin = self._stem(model, prefix), self.memo[id(model)]
        if stem is None or fusable.hook_on(model):
            return
        names = [f"layer{i}" for i in (1, 2, 3, 4)]
        folded = list(itertools.takewhile(lambda name: isinstance(getattr(twin, name), FrozenTrunk), names))
        twin.__class__ = FrozenResNet
        twin.trunk = self._trunk([stem, *(step for name in folded for step in getattr(twin, name).steps)])
        twin.after_trunk = tuple(names[len(folded) :])
        twin.graphs = Graphs() if self.graphs else None

    def _stem_of(self, getter: IntermediateLayerGetter, prefix: str) -> None:
        """Fold the stem of a backbone, which runs its children in order, if nobody else sees what is inside it."""
        first = list(getter.items())[: len(fusable.STEM)]
        seen = set(getter.return_layers) & set(fusable.STEM[:-1]) or any(
            id(module) in self.shared for _, module in first
        )
        if tuple(name for name, _ in first) != fusable.STEM or seen or fusable.hook_on(getter):
            return
        step = self._stem(getter, prefix)
        if step is not None:
            self.memo[id(getter.conv1)] = self._trunk([step])
            self.memo.update({id(module): nn.Identity() for _, module in first[1:]})

    def _pack(self, name: str, convs: list, norms: list, call: Callable, **kind: Any) -> Step:
        devices = {t.device for c, bn in zip(convs, norms, strict=True) for t in (c.weight, bn.running_mean)}
        if devices != {self.device}:
            raise ValueError(f"{name}: expected it on {self.device}, as the first block, got {devices}")
        geometries = tuple(fusable.geometry(c) for c in convs)
        shapes = tuple(tuple(c.weight.shape) for c in convs)
        described = call(self.device, self.dtype, shapes, geometries)
        select.choose(described)  # raises if the backend that was named cannot
        affines = [[t.to(accumulator_dtype(self.dtype)) for t in affine_of(bn)] for bn in norms]
        shifts = block_op.chain_shifts([b for _, b in affines], kind.get("shortcut", ""))
        return Step(
            name,
            described,
            select.named(),
            # Copies, so that a later change of the source shows at refresh() and not before.
            tuple(c.weight.detach().to(self.dtype, memory_format=torch.channels_last, copy=True) for c in convs),
            tuple(a for a, _ in affines),
            tuple(shifts),
            geometries,
            **kind,
        )

    def _is_block(self, module: nn.Module) -> bool:
        return isinstance(module, BLOCKS) or as_gated(module, self.kinds) is not None

    def _whole(self, block: nn.Module) -> fusable.Parts | None:
        """The block as one step, or None."""
        if self._why_left(block):
            return None
        view = as_gated(block, self.kinds)
        p = fusable.parts(block) if view is None else view._pieces()
        return p.whole if isinstance(p, gated.Pieces) else cast(fusable.Parts, p)

    def _why_left(self, block: nn.Module) -> str | None:
        view = as_gated(block, self.kinds)
        if view is not None:
            return _why_gated_left(view)
        if type(block) not in (resnet.BasicBlock, resnet.Bottleneck, BasicBlock, Bottleneck):
            return f"{type(block).__qualname__} is a subclass and may compute something else"
        hook = fusable.hook_on(block)
        return f"it carries {hook}" if hook else fusable.structure(block) or fusable.statistics(block)

    def _block(self, block: nn.Module, name: str) -> Step:
        p = self._whole(block)
        assert p is not None
        return self._step(p, name)

    def _step(self, p: fusable.Parts, name: str) -> Step:
        call = functools.partial(block_op.call_of_block, shortcut=p.shortcut)
        return self._pack(name, p.convs, p.norms, call, shortcut=p.shortcut, relu=p.relu)

    def _gated(self, block: nn.Module, name: str) -> FrozenGated:
        view = as_gated(block, self.kinds)
        assert view is not None
        pieces = view._pieces()
        assert isinstance(pieces, gated.Pieces)

        def trunk(p: fusable.Parts) -> FrozenTrunk:
            # A graph for each of them would copy what goes from one to the next.
            return FrozenTrunk([self._step(p, name)], self.compute_dtype, False)

        def twin(module: nn.Module) -> nn.Module:
            return copy.deepcopy(module, self.memo)

        self.fused.append(name)
        parts = [segment.parts for segment in pieces.segments]
        self.compute_dtype = self._step(parts[0], name).backend().compute_dtype(self.dtype)
        chain: list[nn.Module] = []
        last = None
        for p, (_, after) in zip(parts, pieces.segments, strict=True):
            pointwise = len(p.convs) > 1 and fusable.geometry(p.convs[-1]) == Geometry()
            if pieces.squeeze is not None and p is parts[-1] and pointwise:
                last = trunk(p._replace(convs=p.convs[-1:], norms=p.norms[-1:]))
                p = p._replace(convs=p.convs[:-1], norms=p.norms[:-1], relu=True)
            chain += [trunk(p), *map(twin, after)]
        shortcut: nn.Module | None = None
        if isinstance(pieces.shortcut, fusable.Parts):
            shortcut = trunk(pieces.shortcut)
        elif pieces.shortcut != "identity":
            assert block.downsample is not None
            shortcut = twin(cast(nn.Module, block.downsample))
        squeeze = None if pieces.squeeze is None else twin(pieces.squeeze)
        pool = None if pieces.pool is None else twin(pieces.pool)
        return FrozenGated(chain, last, squeeze, type(view), pool, shortcut)

    def _stem(self, model: nn.Module, prefix: str) -> Step | None:
        p = fusable.stem(model)
        if isinstance(p, str) or p.pool is None or p.norms[0].training or fusable.known_statistics(p.norms[0]):
            return None

        def call(device: torch.device, dtype: torch.dtype, shapes: tuple, geometries: tuple) -> Any:
            return stem_op.call_of_stem(device, dtype, shapes[0], geometries[0])

        try:
            return self._pack(f"{prefix}stem", p.convs, p.norms, call, pool=p.pool)
        except BackendUnavailable:
            # Named for the blocks, and without a pooling pass: the stem is copied.
            return None
