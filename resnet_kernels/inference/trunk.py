"""A run of folded blocks, run depth first over a few images at a time."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import select
from ..backends.contract import Backend, Call, Geometry, Packed, PackedBlock
from ..ops import block_inference as block_op
from ..ops import stem_inference as stem_op
from ..ops.spec import BlockSpec, MapSize, MapSizes, map_sizes, pooled_size
from . import graphs
from .graphs import Graphs


@dataclasses.dataclass(frozen=True)
class Step:
    """A stem or block of a trunk, with its batch norms folded.

    call: what a backend must support. named: the backend that was named when the model was frozen, or None. weights,
    scales: one pair per convolution. shifts: one per convolution of the chain; the last includes the projection's.
    """

    name: str
    call: Call
    named: str | None
    weights: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    shifts: tuple[Tensor, ...]
    geometries: tuple[Geometry, ...]
    spec: BlockSpec

    def backend(self, size: tuple[int, ...] = ()) -> Backend:
        """Return the backend for an input of `size` (N, C, H, W)."""
        return select.choose(dataclasses.replace(self.call, size=size), self.named)

    def map_sizes(self, size: MapSize) -> MapSizes:
        """Return the sizes (C, H, W) of the activations for an image of `size`; a stem's pooled map is the last."""
        sizes = map_sizes(size, [w.shape for w in self.weights], self.geometries, self.spec.shortcut)
        if self.spec.pool is None:
            return sizes
        K, H, W = sizes.maps[-1]
        return MapSizes(sizes.operands, [*sizes.maps, (K, *pooled_size((H, W), self.spec.pool))])

    def pack(self, backend: Backend, sizes: list[tuple[int, int, int, int]]) -> list[Packed]:
        """Return the weights packed by the backend for operands of these sizes (N, C, H, W)."""
        if self.spec.pool is not None and hasattr(backend, "pack_stem"):
            return [backend.pack_stem(self.weights[0], self.scales[0], self.geometries[0], self.spec.pool)]
        rows = zip(self.weights, self.scales, self.geometries, sizes, strict=True)
        return [backend.pack(*row) for row in rows]


class Ready(NamedTuple):
    """A step with its backend and the weights packed for it. Equal `kind`s can run together."""

    step: Step
    backend: Backend
    packed: list[Packed]

    @property
    def kind(self) -> tuple[str, bool]:
        return self.backend.NAME, self.step.spec.pool is not None


def _advance(x: Tensor, steps: list[Ready], ours: bool) -> Tensor:
    """Return the result of consecutive steps. ours: whether x's memory may be overwritten."""
    for _, same in itertools.groupby(steps, lambda ready: ready.kind):
        rows = list(same)
        step, backend, packed = rows[0]
        if step.spec.pool is not None:
            x = stem_op.run(backend, x, packed[0], step.shifts[0], step.geometries[0], step.spec.pool)
        else:
            blocks = [
                PackedBlock(weights, s.shifts, s.geometries, s.spec.shortcut, s.spec.relu) for s, _, weights in rows
            ]
            x = block_op.run(backend, x, blocks, ours)
        ours = True
    return x


class FrozenTrunk(nn.Module):
    """Consecutive steps, run depth first over a few images at a time; on a GPU as a CUDA graph.

    x: (N, C, H, W) of any floating dtype, in any memory format. The first call with a size of input packs the weights
    for it. The packed weights of the `MAX_SIZES` latest sizes stay.
    """

    MAX_SIZES = 4

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
        """Return, for N images of `size` (C, H, W), groups of consecutive ready steps, each with its images per pass.

        Later steps have smaller maps and take more images at a time: a whole number of passes of the group before.
        """
        operands, limits, backends = [], [], self.backends((N, *size))
        for step, backend in zip(self.steps, backends, strict=True):
            inner, maps = step.map_sizes(size)
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
            while len(self._packed) > self.MAX_SIZES * len(self.steps):
                self._packed.popitem(last=False)
        runs = itertools.groupby(zip(images, ready, strict=True), lambda row: row[0])
        return [(n, [step for _, step in run]) for n, run in runs]

    def _packed_step(self, i: int, backend: Backend, sizes: list[tuple[int, int, int, int]]) -> Ready:
        # Weights whose packing does not depend on the size stay for good: CUDA graphs read them where they are.
        kept, key = (
            (self._packed, (i, backend.NAME, *sizes)) if backend.PACKS_FOR_SIZE else (self._fixed, (i, backend.NAME))
        )
        if key not in kept:
            kept[key] = Ready(self.steps[i], backend, self.steps[i].pack(backend, sizes))
        kept.move_to_end(key)
        return kept[key]

    def backends(self, size: Sequence[int]) -> list[Backend]:
        """Return each step's backend for an input of `size` (N, C, H, W)."""
        N, *image = size
        found = []
        for step in self.steps:
            found.append(step.backend((N, *image)))
            image = list(step.map_sizes((image[0], image[1], image[2])).maps[-1])
        return found

    @property
    def channels(self) -> int:
        """The number of channels of the input."""
        return self.steps[0].weights[0].shape[1] * self.steps[0].geometries[0].groups

    def _buffer_channels(self, x: Tensor) -> int:
        """Return the channels of the input buffer: a backend's stem may need zero channels after the image's."""
        first = self.steps[0]
        wanted = getattr(first.backend(tuple(x.shape)), "stem_channels", None)
        if first.spec.pool is None or wanted is None:
            return self.channels
        return wanted(tuple(first.weights[0].shape), first.geometries[0], first.spec.pool)

    def buffer(self, x: Tensor) -> Tensor:
        """Return a buffer into which `fill` copies an input like x."""
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
        """Return the steps' result over load(x), computed for a few images at a time."""

        def after(images: int, run: list[Ready], before: Callable[[Tensor], Tensor], ours: bool) -> Callable:
            """Return a function that applies `before`, then the steps, to so many images at a time.

            ours: whether the steps may overwrite their operand.
            """
            return lambda part: block_op.in_passes(part, images, lambda p: _advance(before(p), run, ours))

        function, ours = load, False
        for images, run in self._plan(x.shape[0], (self.channels, x.shape[2], x.shape[3])):
            function, ours = after(images, run, function, ours), True
        return function(x)

    def check(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless x can be the input."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4 or x.shape[1] != self.channels or not x.dtype.is_floating_point:
            expected = f"(N, {self.channels}, H, W) of a floating dtype"
            raise ValueError(f"x: expected {expected}, got {tuple(x.shape)} in {x.dtype}")
        if x.device != self.steps[0].shifts[0].device:
            raise ValueError(f"x: expected it on {self.steps[0].shifts[0].device}, as the frozen model, got {x.device}")

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if self.graphs is not None and graphs.usable(x):
            return self.graphs.run(x, self.buffer, self.fill, self.run)
        return self.run(x, self._load)

    def extra_repr(self) -> str:
        return f"{', '.join(s.name for s in self.steps)}; {self.steps[0].backend().NAME}, {self.dtype}"
