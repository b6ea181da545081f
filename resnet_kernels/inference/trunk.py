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
from ..backends.contract import Backend, Call, Geometry, Packed, PackedBlock, Pool
from ..ops import block_inference as block_op
from ..ops import stem_inference as stem_op
from . import graphs
from .graphs import Graphs


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
            blocks = [PackedBlock(weights, s.shifts, s.geometries, s.shortcut or "", s.relu) for s, _, weights in rows]
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
        if self.graphs is not None and graphs.usable(x):
            return self.graphs.run(x, self.buffer, self.fill, self.run)
        return self.run(x, self._load)

    def extra_repr(self) -> str:
        return f"{', '.join(s.name for s in self.steps)}; {self.steps[0].backend().NAME}, {self.dtype}"
