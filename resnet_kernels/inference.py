"""freeze: a model for inference only, its residual blocks folded, packed and run depth first.

What is fused: every torchvision or timm residual block (or ours), a Sequential of nothing but blocks in one
`FrozenTrunk`, a block that is gated or interrupted in a `FrozenGated` of several, the stem of a backbone cut out by
torchvision, and a whole torchvision ResNet's stem and stages in one trunk, beside its stages, which stay for whoever
calls them. Everything else is copied.

A trunk runs its blocks depth first over a few images at a time, so the activations in flight are those of a few
images, whatever the batch. The model holds only weights that never change, and may be called from several threads.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from torchvision.models import resnet
from torchvision.models._utils import IntermediateLayerGetter

from .backends import select
from .backends.contract import Backend, BackendUnavailable, Block, Call, Geometry, Packed, Pool, wide
from .graphs import Graphs, usable
from .nn import BasicBlock, Bottleneck, ResNet, fusable, gated
from .ops import block as block_op
from .ops import stem_inference as stem_op
from .ops.batch_norm import affine_of
from .ops.gated import gated_tail
from .replace import as_gated, kinds_in

BLOCKS = (resnet.BasicBlock, resnet.Bottleneck)


@dataclasses.dataclass(frozen=True)
class Step:
    """A stem or block of a trunk: its weights with their batch norms' scales, the chain's shifts (the last with a
    projection's added), and how they go together. named: the backend that was named when it was frozen."""

    name: str
    call: Call
    named: str | None
    weights: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    shifts: tuple[Tensor, ...]
    geometries: tuple[Geometry, ...]
    shortcut: str | None = None
    pool: Pool | None = None
    relu: bool = True

    def backend(self, size: tuple[int, ...] = ()) -> Backend:
        """For an input of (N, C, H, W)."""
        return select.choose(dataclasses.replace(self.call, size=size), self.named)

    def walk(self, size: tuple[int, int, int]) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
        """(C, H, W) of every convolution's operand, and of the activations that follow each other, the result last."""
        operands, maps = block_op.walk(size, [w.shape for w in self.weights], self.geometries, self.shortcut)
        if self.pool is not None:
            K, H, W = maps[-1]
            g = Geometry(self.pool.stride, self.pool.padding)
            maps.append((K, g.output_size(H, self.pool.kernel), g.output_size(W, self.pool.kernel)))
        return operands, maps

    def pack(self, backend: Backend, sizes: list[tuple[int, int, int, int]]) -> list[Packed]:
        """Its weights, for operands of these sizes (N, C, H, W)."""
        if self.pool is not None and hasattr(backend, "pack_stem"):
            return [backend.pack_stem(self.weights[0], self.scales[0], self.geometries[0], self.pool)]
        rows = zip(self.weights, self.scales, self.geometries, sizes, strict=True)
        return [backend.pack(*row) for row in rows]


class Ready(NamedTuple):
    """A step with its backend, and its weights packed for it."""

    step: Step
    backend: Backend
    packed: list[Packed]

    @property
    def kind(self) -> tuple[str, bool]:
        return self.backend.NAME, self.step.pool is not None


def _advance(x: Tensor, steps: list[Ready], ours: bool) -> Tensor:
    """The steps, one after the other. ours: whether x's memory may be taken."""
    for _, same in itertools.groupby(steps, lambda ready: ready.kind):
        rows = list(same)
        step, backend, packed = rows[0]
        if step.pool is not None:
            x = stem_op.run(backend, x, packed[0], step.shifts[0], step.geometries[0], step.pool)
        else:
            blocks = [Block(weights, s.shifts, s.geometries, s.shortcut or "", s.relu) for s, _, weights in rows]
            x = block_op.run(backend, x, blocks, ours)
        ours = True
    return x


class FrozenTrunk(nn.Module):
    """Steps that follow each other, run depth first over a few images at a time; on a GPU as a CUDA graph.

    x: (N, C, H, W) of any floating dtype, in any memory format. Weights are packed at the first call with a size of
    input and kept for the `KEPT` latest sizes.
    """

    KEPT = 4

    def __init__(self, steps: list[Step], dtype: torch.dtype, graphs: bool) -> None:
        super().__init__()
        self.steps = steps
        self.dtype = dtype
        self.graphs = Graphs() if graphs else None
        self._forget_packed()

    def _forget_packed(self) -> None:
        self._packed: collections.OrderedDict[tuple, Ready] = collections.OrderedDict()
        self._fixed: collections.OrderedDict[tuple, Ready] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights belong to this process: a copy or an unpickled trunk packs its own.
        return {name: value for name, value in self.__dict__.items() if name not in ("_packed", "_fixed", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_packed()

    def _plan(self, N: int, size: tuple[int, int, int]) -> list[tuple[int, list[Ready]]]:
        """For N images of `size` (C, H, W): runs of steps ready to go, each with its images per pass. Later steps,
        whose maps are smaller, take more images at a time: as many as a whole number of passes of the run before."""
        operands, limits, backends = [], [], self.backends((N, *size))
        for step, backend in zip(self.steps, backends, strict=True):
            inner, maps = step.walk(size)
            limits.append(backend.images_per_pass(self.dtype.itemsize * block_op.largest_pair(maps)))
            operands.append(inner)
            size = maps[-1]
        images: list[int] = []
        for limit in reversed(limits):
            N = block_op.pass_size(N, limit)
            images.insert(0, N)
        with self._lock:
            rows = zip(range(len(images)), backends, operands, images, strict=True)
            ready = [self._packed_step(i, backend, [(n, *size) for size in inner]) for i, backend, inner, n in rows]
            while len(self._packed) > self.KEPT * len(self.steps):
                self._packed.popitem(last=False)
        runs = itertools.groupby(zip(images, ready, strict=True), lambda row: row[0])
        return [(n, [step for _, step in run]) for n, run in runs]

    def _packed_step(self, i: int, backend: Backend, sizes: list[tuple[int, int, int, int]]) -> Ready:
        # What does not depend on the size stays for good: graphs read it where it is.
        kept, key = (
            (self._packed, (i, backend.NAME, *sizes)) if backend.PACKS_FOR_SIZE else (self._fixed, (i, backend.NAME))
        )
        if key not in kept:
            kept[key] = Ready(self.steps[i], backend, self.steps[i].pack(backend, sizes))
        kept.move_to_end(key)
        return kept[key]

    def backends(self, size: Sequence[int]) -> list[Backend]:
        """Each step's, for an input of (N, C, H, W)."""
        N, *image = size
        found = []
        for step in self.steps:
            found.append(step.backend((N, *image)))
            image = list(step.walk((image[0], image[1], image[2]))[1][-1])
        return found

    @property
    def channels(self) -> int:
        """Of the input."""
        return self.steps[0].weights[0].shape[1] * self.steps[0].geometries[0].groups

    def _buffer_channels(self, x: Tensor) -> int:
        """Of the input in memory: a stem may want zeros behind the image's."""
        first = self.steps[0]
        wanted = getattr(first.backend(tuple(x.shape)), "stem_channels", None)
        if first.pool is None or wanted is None:
            return self.channels
        return wanted(tuple(first.weights[0].shape), first.geometries[0], first.pool)

    def buffer(self, x: Tensor) -> Tensor:
        """Where `fill` puts an input like x."""
        N, _, H, W = x.shape
        size, nhwc = (N, self._buffer_channels(x), H, W), torch.channels_last
        return torch.empty(size, dtype=self.dtype, device=x.device, memory_format=nhwc).zero_()

    def fill(self, buffer: Tensor, x: Tensor) -> None:
        buffer[:, : self.channels].copy_(x)

    def _load(self, x: Tensor) -> Tensor:
        if self._buffer_channels(x) == self.channels:
            return x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        buffer = self.buffer(x)
        self.fill(buffer, x)
        return buffer

    def run(self, x: Tensor, load: Callable[[Tensor], Tensor] = lambda part: part) -> Tensor:
        """The steps over load(x), a few images at a time."""

        def after(images: int, run: list[Ready], before: Callable[[Tensor], Tensor], ours: bool) -> Callable:
            """`before`, then the run, that many images at a time. ours: whether the run may reuse its operand."""
            return lambda part: block_op.in_passes(part, images, lambda p: _advance(before(p), run, ours))

        function, ours = load, False
        for images, run in self._plan(x.shape[0], (self.channels, x.shape[2], x.shape[3])):
            function, ours = after(images, run, function, ours), True
        return function(x)

    def check(self, x: Tensor) -> None:
        """Raises ValueError unless x is an input."""
        if x.dim() != 4 or x.shape[1] != self.channels or not x.dtype.is_floating_point:
            expected = f"(N, {self.channels}, H, W) of a floating dtype"
            raise ValueError(f"x: expected {expected}, got {tuple(x.shape)} in {x.dtype}")
        if x.device != self.steps[0].shifts[0].device:
            raise ValueError(f"x: expected it on {self.steps[0].shifts[0].device}, as the frozen model, got {x.device}")

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if self.graphs is not None and usable(x):
            return self.graphs.run(x, self.buffer, self.fill, self.run)
        return self.run(x, self._load)

    def extra_repr(self) -> str:
        return f"{', '.join(s.name for s in self.steps)}; {self.steps[0].backend().NAME}, {self.dtype}"


class FrozenGated(nn.Module):
    """A block of trunks with modules between them, and its end, y = relu(gate * z + shortcut(x)).

    chain: trunks and modules. squeeze: squeeze-and-excitation, of blocks of `kind`, or None. last: where squeeze sees z
    = W h + b before it is there, by the mean of h, W's trunk, which then follows the chain.
    """

    def __init__(
        self,
        chain: list[nn.Module],
        last: FrozenTrunk | None,
        squeeze: nn.Module | None,
        kind: type[gated.Gated],
        pool: nn.Module | None,
        shortcut: nn.Module | None,
    ) -> None:
        super().__init__()
        self.chain, self.last = nn.Sequential(*chain), last
        self.squeeze, self.kind = squeeze, kind
        self.pool, self.shortcut = pool, shortcut

    def _gate(self, z: Tensor) -> Tensor | None:
        """z: h where there is a `last`."""
        if self.squeeze is None:
            return None
        mean = z.mean((2, 3), keepdim=True)
        if self.last is not None:
            step = self.last.steps[0]
            w = wide(z.dtype)
            products = functional.linear(mean.flatten(1).to(w), step.weights[0].flatten(1).to(w))
            mean = torch.addcmul(step.shifts[0], step.scales[0], products)[:, :, None, None].to(z.dtype)
        excite = self.kind._excite(self.squeeze)
        assert excite is not None
        return excite(mean).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.chain(x)
        gate = self._gate(z)
        if self.last is not None:
            z = self.last(z)
        shortcut = x if self.pool is None else self.pool(x)
        return gated_tail(z, gate, shortcut if self.shortcut is None else self.shortcut(shortcut))


class FrozenResNet(resnet.ResNet):
    """A ResNet's copy whose trunk runs from the image through the stem and the first stages, usually all, in one; on a
    GPU the whole model is one CUDA graph."""

    trunk: FrozenTrunk
    after_trunk: tuple[str, ...]
    graphs: Graphs | None

    def _after_trunk(self, x: Tensor) -> Tensor:
        for name in self.after_trunk:
            x = getattr(self, name)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def _known_to_the_end(self) -> bool:
        """Whether nothing behind the trunk is a user's, which may do what no capture allows, or see no replay."""
        last = (self.avgpool, self.fc)
        known = type(last[0]) is nn.AdaptiveAvgPool2d and type(last[1]) in (nn.Linear, nn.Identity)
        return known and not self.after_trunk and not any(map(fusable.hook_on, last))

    def forward(self, x: Tensor) -> Tensor:
        trunk = self.trunk
        trunk.check(x)
        if self.graphs is not None and self._known_to_the_end() and usable(x):
            last = (id(self.avgpool), id(self.fc))
            return self.graphs.run(x, trunk.buffer, trunk.fill, lambda b: self._after_trunk(trunk.run(b)), last)
        return self._after_trunk(trunk(x))


class FrozenModel(nn.Module):
    """What `freeze` returns. Call it like the model it came from; inputs may be of any floating dtype.

    fused: names of the blocks and stems that were folded. left: name -> why a residual block was copied as it was.
    """

    def __init__(self, source: nn.Module, dtype: torch.dtype | None, cuda_graphs: bool) -> None:
        super().__init__()
        self.training = False
        # In a tuple, so that the source is no submodule: its weights are not this model's.
        self._source = (source,)
        self._asked = dtype, cuda_graphs
        self.refresh()

    def refresh(self) -> None:
        """Fold and pack the source model's weights and statistics as they are now. A call that is running in
        another thread finishes with the old ones."""
        built = _Freezer(self._source[0], *self._asked)
        self.fused, self.left = tuple(built.fused), built.left
        self.dtype, self.compute_dtype, self.device = built.dtype, built.compute_dtype, built.device
        self.net = built.net

    def train(self, mode: bool = True) -> FrozenModel:
        if mode:
            raise RuntimeError("a frozen model is for inference only; train the model it was made from, then refresh()")
        return super().train(False)

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
            raise RuntimeError("a frozen model cannot be traced or exported; export the model it was made from")
        available = torch.amp.is_autocast_available(self.device.type)  # on meta tensors it is not
        plain = torch.autocast(self.device.type, enabled=False) if available else contextlib.nullcontext()
        with torch.no_grad(), plain:
            if not isinstance(self.net, FrozenResNet):  # whose trunk casts as it loads
                args, kwargs = pytree.tree_map(_caster(self.compute_dtype), (args, kwargs))
            return pytree.tree_map(_caster(self.dtype), self.net(*args, **kwargs))

    def _apply(self, fn: Callable, recurse: bool = True) -> FrozenModel:
        raise RuntimeError("a frozen model cannot be moved or cast; move the model it was made from and freeze that")


def _caster(dtype: torch.dtype) -> Callable[[Any], Any]:
    return lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t


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


class _Freezer:
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
        affines = [[t.to(wide(self.dtype)) for t in affine_of(bn)] for bn in norms]
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


def freeze(model: nn.Module, dtype: torch.dtype | None = None, cuda_graphs: bool = True) -> FrozenModel:
    """A copy of the model for inference: batch norms folded, weights packed for the processor, blocks and stem fused.

    Args:
        model: a torchvision or timm ResNet, ResNeXt or Wide ResNet, one with squeeze-and-excitation, or any model with
            their blocks (segmentation and detection models and their backbones, your own), in evaluation mode,
            replaced or not. It is not changed; later
            changes of its weights show after `refresh()`.
        dtype: fp32, bf16, fp16 or fp64 of weights, activations and results; None for the model's own.
        cuda_graphs: on a GPU, capture one graph per size of input, at the second call with it, and replay that (a
            ResNet as a whole, other models by their trunks; the 8 latest sizes are kept). While a graph is captured no
            other thread may synchronise the device. Calls on several streams and from several threads wait for each
            other on the device. False launches kernel by kernel.
    Returns:
        FrozenModel. Same arguments and results as the model's, results in `dtype`; no gradients.
    Raises:
        ValueError: a batch norm is in training mode, or there is nothing to fold.
        BackendUnavailable: the backend that was named cannot run it.
    Numerics: scale = weight / sqrt(running_var + eps) is multiplied into the convolution's weight in fp32 and rounded
        once to `dtype`. CPUs without 16-bit arithmetic compute 16-bit models in fp32 and round the results.
    """
    training = next(
        (name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training),
        None,
    )
    if training is not None:
        raise ValueError(f"model: expected it in evaluation mode, got {training!r} in training mode; call model.eval()")
    return FrozenModel(model, dtype, cuda_graphs)
