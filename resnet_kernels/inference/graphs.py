"""A function of one tensor as CUDA graphs: one graph per input size, launched as a whole.

A graph owns all memory that it touches: an input buffer that each call fills, activations in one memory pool that the
graphs of a `Graphs` share, and a result that is copied out. So replays must not overlap: a call waits, on the device,
for the call before it, on whichever stream that ran. The host waits only for a capture and before a graph is deleted.

The first call with a size runs kernel by kernel, the second captures: sizes that occur once cost no capture. The
captures of a process take turns. During a capture another thread may launch work but must not synchronise the device.
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
    """A captured graph: its input buffer, its result, and the function that replays it."""

    buffer: Tensor
    result: Tensor
    replay: Callable[[], None]


def usable(x: Tensor) -> bool:
    """Return whether a call with x may replay a graph. Inside another capture the call becomes part of that."""
    return x.is_cuda and x.numel() > 0 and not torch.cuda.is_current_stream_capturing()


def _flags() -> Hashable:
    """Return the settings that a capture fixes and a user may change between calls."""
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
    """The captured graphs of the `MAX_GRAPHS` latest used sizes. A copy or an unpickled object starts empty."""

    MAX_GRAPHS = 8

    def __init__(self) -> None:
        self._captured: collections.OrderedDict[Hashable, Captured] = collections.OrderedDict()
        self._seen: collections.deque[Hashable] = collections.deque(maxlen=4 * self.MAX_GRAPHS)
        self._lock = threading.Lock()
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._replayed: torch.cuda.Event | None = None

    def __reduce__(self) -> tuple:
        return Graphs, ()

    def __len__(self) -> int:
        return len(self._captured)

    def __del__(self) -> None:
        # The allocator must not reuse the memory while a replay still runs.
        self._wait_for_replay()

    def run(
        self,
        x: Tensor,
        buffer: Callable[[Tensor], Tensor],
        fill: Callable[[Tensor, Tensor], None],
        function: Callable[[Tensor], Tensor],
        kind: Hashable = None,
    ) -> Tensor:
        """Return function(b) for b = buffer(x) after fill(b, x), as a new tensor.

        function: must launch everything on the current stream, read no result on the host, and not change b. Whatever
            else it reads must stay at its address.
        kind: distinguishes this function from others for the same size of x.

        Raises RuntimeError if the capture fails.
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
        # A capture allocates from the pool, whose memory an earlier replay may still use.
        self._wait_for_replay()
        while len(self._captured) >= self.MAX_GRAPHS:
            self._captured.popitem(last=False)
        # Tensors made in inference mode could not be written to outside it.
        with _capturing, torch.inference_mode(False), torch.no_grad():
            b = buffer(x)
            fill(b, x)
            try:
                self._captured[key] = self._capture(b, function)
            except Exception as error:  # any error, raised again with advice
                self._pool = None  # Its state is unknown.
                raise RuntimeError(
                    f"CUDA graph: the capture failed ({error}); pass cuda_graphs=False to run without graphs"
                ) from error

    def _capture(self, b: Tensor, function: Callable[[Tensor], Tensor]) -> Captured:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self._stream is None:
            # One stream for all captures: the allocator reuses memory only on the stream that allocated it.
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # This call compiles, chooses algorithms and packs weights, which must not happen in a capture.
            function(b)
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # thread_local: the capture excludes what other threads launch.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = function(b)
        return Captured(b, result, graph.replay)
