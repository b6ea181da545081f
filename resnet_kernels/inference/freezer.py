"""Building the frozen copy of a model.

`Freezer` fills a map from modules of the source to the frozen modules that replace them, then copies the source with
these replacements. Replaced are: every residual block; a Sequential of nothing but blocks, by one trunk; the stem of a
backbone cut out by torchvision; and a torchvision ResNet, by a `FrozenResNet` whose trunk runs stem and stages
together.
"""

from __future__ import annotations

import collections
import copy
import functools
import itertools
from collections.abc import Callable, Mapping
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
from ..replace import anatomy_of, kinds_in
from .graphs import Graphs
from .modules import FrozenGated, FrozenResNet
from .trunk import FrozenTrunk, Step

WHOLE_BLOCKS = (resnet.BasicBlock, resnet.Bottleneck, BasicBlock, Bottleneck)

PREACTIVATION = "its batch norms stand before its convolutions"


def copied(source: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Return a deep copy of the source in which each module of the map is its replacement, wherever it is referred
    to."""
    # deepcopy takes what its memo holds for an object instead of copying it.
    return copy.deepcopy(source, {id(module): replacement for module, replacement in replacements.items()})


def _why_gated_left(block: nn.Module, anatomy: gated.Anatomy) -> str | None:
    """Return why a block that can be decomposed is copied as it is, or None."""
    hook = fusable.hook_on(block)
    reason = f"it carries {hook}" if hook else anatomy.why_unfused(block)
    if reason:
        return reason
    pieces = anatomy.decompose(block)
    assert isinstance(pieces, gated.Pieces)
    if pieces.chain.preactivation or pieces.first is not None:
        return PREACTIVATION
    if pieces.drop is not None:
        return "its drop_path is in training mode"
    return next((reason for reason in map(fusable.why_not_affine, pieces.chain.norms) if reason), None)


class Freezer:
    """Builds the frozen copy `net` of a model.

    fused: names of the blocks and stems that were folded. left: name -> why a block was copied as it is. dtype,
    compute_dtype: of the results, and of the arithmetic between them.
    """

    def __init__(self, source: nn.Module, dtype: torch.dtype | None, cuda_graphs: bool) -> None:
        self.kinds = kinds_in(source)
        self.dtype, self.device = self._dtype_and_device(source, dtype)
        self.graphs = cuda_graphs
        self.fused: list[str] = []
        self.left: dict[str, str] = {}
        self.replacements: dict[nn.Module, nn.Module] = {}
        self.compute_dtype = self.dtype
        counts = collections.Counter(id(m) for _, m in source.named_modules(remove_duplicate=False))
        self.shared = {i for i, count in counts.items() if count > 1}  # modules registered in more than one place
        with torch.no_grad():
            self._fill(source)
            if not self.fused and not all(reason == PREACTIVATION for reason in self.left.values()):
                reasons = "; ".join(f"{name}: {reason}" for name, reason in self.left.items())
                raise ValueError(f"model: expected residual blocks that can be folded, found none; {reasons}")
            self.net = self._with_joined_resnets(source, copied(source, self.replacements))
            # Everything that is not a trunk (whose weights are no parameters) computes in the trunks' dtype.
            self.net.to(self.compute_dtype)

    def _dtype_and_device(self, source: nn.Module, dtype: torch.dtype | None) -> tuple[torch.dtype, torch.device]:
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype: expected a torch.dtype such as torch.bfloat16, got {dtype!r}")
        weights = {n: b.get_submodule("conv1").weight for n, b in source.named_modules() if self._is_block(b)}
        if not weights:
            raise ValueError(
                f"model: expected residual blocks of torchvision or timm in it, found none in {type(source).__name__}"
            )
        first = next(iter(weights.values()))
        other = next((name for name, weight in weights.items() if weight.dtype != first.dtype), None)
        if dtype is None and other is not None:
            got = f"{first.dtype} and {weights[other].dtype} ({other})"
            raise ValueError(f"model: expected weights of one dtype, got {got}; pass dtype= to convert them")
        dtype = dtype or first.dtype
        if not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
        return dtype, first.device

    def _fill(self, source: nn.Module) -> None:
        """Fill `replacements`."""
        inside: set[int] = set()  # ids of blocks below a Sequential that is replaced as a whole
        for name, module in source.named_modules():
            prefix = f"{name}." if name else ""
            if type(module) is IntermediateLayerGetter:
                self._replace_stem(module, prefix)
            elif type(module) is nn.Sequential and module._modules and not fusable.hook_on(module):
                # Not named_children(), which yields a block that is registered twice only once.
                blocks = {n: b for n, b in module._modules.items() if b is not None and self._is_block(b)}
                if len(blocks) == len(module._modules) and all(map(self._whole, blocks.values())):
                    self.replacements[module] = self._trunk([self._block(b, prefix + n) for n, b in blocks.items()])
                    inside.update(id(b) for b in blocks.values())
            elif self._is_block(module) and id(module) not in inside:
                reason = self._why_left(module)
                if reason:
                    self.left[name] = reason
                elif self._whole(module):
                    self.replacements[module] = self._trunk([self._block(module, name)])
                else:
                    self.replacements[module] = self._gated(module, name)

    def _trunk(self, steps: list[Step]) -> FrozenTrunk:
        self.fused += [step.name for step in steps if step.name not in self.fused]
        self.compute_dtype = steps[0].backend().compute_dtype(self.dtype)
        return FrozenTrunk(steps, self.compute_dtype, self.graphs)

    def _with_joined_resnets(self, source: nn.Module, net: nn.Module) -> nn.Module:
        """Return the copy `net` of the source with a `FrozenResNet` in place of each torchvision ResNet."""
        for name, module in source.named_modules():
            if type(module) in (resnet.ResNet, ResNet):
                joined = self._joined(module, net.get_submodule(name), f"{name}." if name else "")
                if joined is not None and not name:
                    return joined
                if joined is not None:
                    net.set_submodule(name, joined)
        return net

    def _joined(self, source: nn.Module, twin: nn.Module, prefix: str) -> FrozenResNet | None:
        """Return the copy `twin` of a ResNet with one trunk for stem and stages, or None if its stem is not folded."""
        stem = None if fusable.hook_on(source) else self._stem(source, prefix)
        if stem is None:
            return None
        names = [f"layer{i}" for i in (1, 2, 3, 4)]
        folded = list(itertools.takewhile(lambda name: isinstance(getattr(twin, name), FrozenTrunk), names))
        trunk = self._trunk([stem, *(step for name in folded for step in getattr(twin, name).steps)])
        return FrozenResNet(twin, trunk, tuple(names[len(folded) :]), Graphs() if self.graphs else None)

    def _replace_stem(self, getter: IntermediateLayerGetter, prefix: str) -> None:
        """Replace the stem of a backbone, which runs its children in order, if nothing else uses the stem's modules."""
        first = list(getter.items())[: len(fusable.STEM)]
        used = set(getter.return_layers) & set(fusable.STEM[:-1]) or any(
            id(module) in self.shared for _, module in first
        )
        if tuple(name for name, _ in first) != fusable.STEM or used or fusable.hook_on(getter):
            return
        step = self._stem(getter, prefix)
        if step is not None:
            self.replacements[getter.conv1] = self._trunk([step])
            self.replacements |= {module: nn.Identity() for _, module in first[1:]}

    def _step(self, p: fusable.Parts, name: str, call: Callable) -> Step:
        """Return the folded parts of a block or stem. call: makes the `Call` that says what a backend must support."""
        devices = {t.device for c, bn in zip(p.convs, p.norms, strict=True) for t in (c.weight, bn.running_mean)}
        if devices != {self.device}:
            raise ValueError(f"{name}: expected it on {self.device}, as the first block, got {devices}")
        described = call(self.device, self.dtype, tuple(p.shapes), tuple(p.geometries))
        select.choose(described)  # raises if the backend that was named cannot run it
        affines = [[t.to(accumulator_dtype(self.dtype)) for t in affine_of(bn)] for bn in p.norms]
        return Step(
            name,
            described,
            select.named(),
            # Copies, so that a later change of the source shows at refresh() and not before.
            tuple(c.weight.detach().to(self.dtype, memory_format=torch.channels_last, copy=True) for c in p.convs),
            tuple(a for a, _ in affines),
            tuple(block_op.chain_shifts([b for _, b in affines], p.shortcut)),
            tuple(p.geometries),
            p.spec,
        )

    def _is_block(self, module: nn.Module) -> bool:
        return isinstance(module, WHOLE_BLOCKS) or anatomy_of(module, self.kinds) is not None

    def _why_left(self, block: nn.Module) -> str | None:
        anatomy = anatomy_of(block, self.kinds)
        if anatomy is not None:
            return _why_gated_left(block, anatomy)
        if type(block) not in WHOLE_BLOCKS:
            return f"{type(block).__qualname__} is a subclass and may compute something else"
        hook = fusable.hook_on(block)
        return f"it carries {hook}" if hook else fusable.why_unfused(block) or fusable.why_not_frozen(block)

    def _whole(self, block: nn.Module) -> fusable.Parts | None:
        """Return the parts of a block that runs as one step, or None."""
        if self._why_left(block):
            return None
        anatomy = anatomy_of(block, self.kinds)
        if anatomy is None:
            return cast(fusable.Parts, fusable.parts(block))
        return cast(gated.Pieces, anatomy.decompose(block)).whole

    def _block(self, block: nn.Module, name: str) -> Step:
        p = self._whole(block)
        assert p is not None
        return self._block_step(p, name)

    def _block_step(self, p: fusable.Parts, name: str) -> Step:
        return self._step(p, name, functools.partial(block_op.call_of_block, shortcut=p.shortcut))

    def _gated(self, block: nn.Module, name: str) -> FrozenGated:
        anatomy = anatomy_of(block, self.kinds)
        assert anatomy is not None
        pieces = anatomy.decompose(block)
        assert isinstance(pieces, gated.Pieces)

        def trunk(p: fusable.Parts) -> FrozenTrunk:
            # No graph of its own: each graph would copy what passes from one to the next.
            return FrozenTrunk([self._block_step(p, name)], self.compute_dtype, False)

        def twin(module: nn.Module | None) -> nn.Module | None:
            return None if module is None else copied(module, self.replacements)

        self.fused.append(name)
        parts = [segment.parts for segment in pieces.segments]
        self.compute_dtype = self._block_step(parts[0], name).backend().compute_dtype(self.dtype)
        chain: list[nn.Module] = []
        last = None
        for p, (_, after) in zip(parts, pieces.segments, strict=True):
            pointwise = len(p.convs) > 1 and fusable.geometry(p.convs[-1]) == Geometry()
            if pieces.squeeze is not None and p is parts[-1] and pointwise:
                last = trunk(p._replace(convs=p.convs[-1:], norms=p.norms[-1:]))
                p = p._replace(convs=p.convs[:-1], norms=p.norms[:-1], relu=True)
            chain += [trunk(p), *(cast(nn.Module, twin(module)) for module in after)]
        shortcut: nn.Module | None = None
        if isinstance(pieces.shortcut, fusable.Parts):
            shortcut = trunk(pieces.shortcut)
        elif pieces.shortcut != "identity":
            shortcut = twin(block.get_submodule("downsample"))
        return FrozenGated(chain, last, twin(pieces.squeeze), anatomy, twin(pieces.pool), shortcut)

    def _stem(self, model: nn.Module, prefix: str) -> Step | None:
        p = fusable.stem(model)
        if isinstance(p, str) or p.pool is None or p.norms[0].training or fusable.why_not_affine(p.norms[0]):
            return None

        def call(device: torch.device, dtype: torch.dtype, shapes: tuple, geometries: tuple) -> Any:
            return stem_op.call_of_stem(device, dtype, shapes[0], geometries[0])

        try:
            return self._step(p, f"{prefix}stem", call)
        except BackendUnavailable:
            # The backend was named for the blocks and has no pooling pass: the stem is copied.
            return None
