"""A function of one tensor as CUDA graphs: one per input size, launched as a whole.

Everything a graph touches is its own: an input buffer that each call fills, activations in one memory pool that all
graphs of a `Graphs` share, and a result that is copied out. So replays must not overlap: a call waits, on the device,
for the one before it, whichever stream that ran on. Nothing waits on the host, but for capturing and for forgetting a
graph.

The first call of a size runs kernel by kernel, the second captures: sizes that come once cost no capture. Captures of a
process take turns. While one is under way, another thread may launch work, but must not synchronise the device.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..backends import select
from ..backends.contract import tf32_allowed


@dataclasses.dataclass(frozen=True)
class Captured:
    buffer: Tensor
    result: Tensor
    replay: Callable[[], None]


def usable(x: Tensor) -> bool:
    """Whether a call with x may be a graph's replay. Inside somebody else's capture it is part of theirs."""
    return x.is_cuda and x.numel() > 0 and not torch.cuda.is_current_stream_capturing()


def _flags() -> Hashable:
    """What a capture fixes and a user may change between calls."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        select.named(),
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        tf32_allowed(),
        matmul.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
    )


# torch captures one graph of a process at a time.
_capturing = threading.Lock()


class Graphs:
    """Captured calls, the `KEPT` latest used. A copy or an unpickled one starts empty."""

    KEPT = 8

    def __init__(self) -> None:
        self._captured: collections.OrderedDict[Hashable, Captured] = collections.OrderedDict()
        self._seen: collections.deque[Hashable] = collections.deque(maxlen=4 * self.KEPT)
        self._lock = threading.Lock()
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._replayed: torch.cuda.Event | None = None

    def __reduce__(self) -> tuple:
        return Graphs, ()

    def __len__(self) -> int:
        return len(self._captured)

    def __del__(self) -> None:
        # The memory must not become someone else's while a replay still runs.
        self._wait_for_replay()

    def run(
        self,
        x: Tensor,
        buffer: Callable[[Tensor], Tensor],
        fill: Callable[[Tensor, Tensor], None],
        function: Callable[[Tensor], Tensor],
        kind: Hashable = None,
    ) -> Tensor:
        """function(b) for b = buffer(x) after fill(b, x). The result is a new tensor. kind: what else, beside the size
        of x, tells this function from others.

        function must launch everything on the current stream, read no result on the host, and not change b. What it
        reads must stay where it is.

        Raises RuntimeError where the capture fails.
        """
        with self._lock, torch.cuda.device(x.device):
            key = (tuple(x.shape), kind, _flags())
            if key not in self._captured:
                if key not in self._seen:
                    self._seen.append(key)
                    b = buffer(x)
                    fill(b, x)
                    return function(b)
                self._add(key, x, buffer, fill, function)
            self._captured.move_to_end(key)
            return self._replay(self._captured[key], x, fill)

    def _replay(self, captured: Captured, x: Tensor, fill: Callable[[Tensor, Tensor], None]) -> Tensor:
        stream = torch.cuda.current_stream()
        if self._replayed is None:
            self._replayed = torch.cuda.Event()
        else:
            stream.wait_event(self._replayed)
        try:
            fill(captured.buffer, x)
            captured.replay()
            return captured.result.clone()
        finally:
            self._replayed.record(stream)

    def _wait_for_replay(self) -> None:
        if self._replayed is not None:
            self._replayed.synchronize()

    def _add(
        self,
        key: Hashable,
        x: Tensor,
        buffer: Callable[[Tensor], Tensor],
        fill: Callable[[Tensor, Tensor], None],
        function: Callable[[Tensor], Tensor],
    ) -> None:
        # A capture takes pool memory that an earlier replay may still be using.
        self._wait_for_replay()
        while len(self._captured) >= self.KEPT:
            self._captured.popitem(last=False)
        # Tensors made in inference mode could not be written to outside it.
        with _capturing, torch.inference_mode(False), torch.no_grad():
            b = buffer(x)
            fill(b, x)
            try:
                self._captured[key] = self._capture(b, function)
            except Exception as error:  # whatever it was: raised again, with the way out
                self._pool = None  # Of unknown state.
                raise RuntimeError(
                    f"CUDA graph: the capture failed ({error}); cuda_graphs=False runs without"
                ) from error

    def _capture(self, b: Tensor, function: Callable[[Tensor], Tensor]) -> Captured:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self._stream is None:
            # One for all captures: the allocator reuses memory only on the stream that had it.
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Compiles, chooses algorithms and packs weights: none of it may happen in a capture.
            function(b)
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads launch is not this capture's.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = function(b)
        return Captured(b, result, graph.replay)
