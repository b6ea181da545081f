"""How long calls take: right first, then interleaved rounds, medians, caches cold.

Used by the tuner, the suite and the pytest benchmarks alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sample(NamedTuple):
    """Seconds of one call over `rounds`."""

    median: float
    p20: float
    p80: float
    rounds: int


def sample(seconds: Sequence[float]) -> Sample:
    if len(seconds) == 1:
        return Sample(seconds[0], seconds[0], seconds[0], 1)
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return Sample(statistics.median(seconds), deciles[1], deciles[7], len(seconds))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Instant(NamedTuple):
    """On the host, in seconds, or on a GPU, as an event; the difference of two is in seconds, once the GPU is there."""

    at: Any

    def __sub__(self, before: Instant) -> float:
        if isinstance(self.at, float):
            return self.at - before.at
        self.at.synchronize()
        return before.at.elapsed_time(self.at) / 1e3


# Cycles.
HEAD_START = 1_000_000


class Clock:
    """Times single calls on a device.

    On a GPU between two events, with the L2 cache full of something else. queued: the call is launched while the GPU is
    still busy for half a millisecond, so that launching it costs nothing unless it takes longer; else the GPU is idle
    when the call begins, and waits for its launches as it does for a user's.
    """

    def __init__(self, device: torch.device, queued: bool = False) -> None:
        self.device, self.queued = device, queued
        self._other: Tensor | None = None
        if device.type == "cuda":
            # Twice the L2: written whole, it leaves nothing else there.
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            self._other = torch.empty(2 * l2 // 4, device=device, dtype=torch.int32)

    def now(self, begins: bool) -> Instant:
        """The beginning of a call, which it prepares, or its end."""
        if self._other is None:
            return Instant(time.perf_counter())
        with torch.cuda.device(self.device):
            if begins:
                self._other.fill_(1)
                if self.queued:
                    torch.cuda._sleep(HEAD_START)
                else:
                    torch.cuda.synchronize()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return Instant(event)

    def seconds(self, call: Callable[[], Any]) -> float:
        begin = self.now(True)
        call()
        return self.now(False) - begin


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    clocks: Clock | Mapping[str, Clock],
    rounds: int,
    budget: float = float("inf"),
    before: Callable[[str], None] = lambda name: None,
) -> dict[str, Sample]:
    """Each call's time, over rounds in which every call has its turn, in rotating order. No round begins that is
    expected to end after `budget` seconds, but at least one is made. before: called with the name of each call before
    it is made."""
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for i in range(rounds if names else 0):
        spent = time.perf_counter() - start
        if i and spent * (i + 1) / i > budget:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            before(name)
            clock = clocks if isinstance(clocks, Clock) else clocks[name]
            seconds[name].append(clock.seconds(calls[name]))
    return {name: sample(s) for name, s in seconds.items()}


def rotating(function: Callable[..., Any], inputs: Sequence[tuple]) -> Callable[[], Any]:
    """A call of function with the next of the inputs, so that none is still in a cache from the call before."""
    turn = -1

    def call() -> Any:
        nonlocal turn
        turn = (turn + 1) % len(inputs)
        return function(*inputs[turn])

    return call


def captured(function: Callable[..., Any], inputs: tuple) -> tuple[Callable[[], Any], Any]:
    """(a replay of function(*inputs) as one CUDA graph, what it writes). function must have run before.

    Raises RuntimeError where the function does what no capture allows.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*inputs)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, result
