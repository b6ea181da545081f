"""Timing of calls: interleaved rounds with cold caches, reported as medians.

The tuner, the measurement suite and the pytest benchmarks share it. They check a call's result before they time it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sample(NamedTuple):
    """The seconds of one call: median, 20th and 80th percentile over a number of rounds."""

    median: float
    p20: float
    p80: float
    rounds: int


def sample(seconds: Sequence[float]) -> Sample:
    """Return the statistics of the measured seconds, of which there is at least one."""
    if len(seconds) == 1:
        return Sample(seconds[0], seconds[0], seconds[0], 1)
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return Sample(statistics.median(seconds), deciles[1], deciles[7], len(seconds))


def synchronize(device: torch.device) -> None:
    """Wait for the device, if it is a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Instant(NamedTuple):
    """A point in time: on the host in seconds, on a GPU as a CUDA event.

    The difference of two is in seconds. For events it waits until the GPU has reached the later one.
    """

    at: Any

    def __sub__(self, before: Instant) -> float:
        if isinstance(self.at, float):
            return self.at - before.at
        self.at.synchronize()
        return before.at.elapsed_time(self.at) / 1e3


# Cycles for which the GPU is kept busy before a queued call, about half a millisecond.
HEAD_START = 1_000_000


class Clock:
    """Times single calls on a device.

    On a GPU the time is taken between two events, with other data in the L2 cache.

    Args:
        device: where the calls run.
        queued: the call is launched while the GPU is still busy for about half a millisecond. Launching it then costs
            no time, unless that takes longer. If False the GPU is idle when the call begins, so that launching counts,
            as it does for a user.
    """

    def __init__(self, device: torch.device, queued: bool = False) -> None:
        self.device, self.queued = device, queued
        self._other: Tensor | None = None  # written to displace what is in the L2 cache
        if device.type == "cuda":
            # Twice the size of the L2 cache: writing all of it leaves nothing else there.
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            self._other = torch.empty(2 * l2 // 4, device=device, dtype=torch.int32)

    def now(self, begins: bool) -> Instant:
        """Return the instant. begins: it starts a call, for which the device is prepared first."""
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
        """Return the seconds that one call takes."""
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
    """Return the time of each call, by name. Every round makes each call once, in an order that rotates.

    Args:
        calls: the functions to time, by name.
        clocks: one clock for all calls, or one per name.
        rounds: the most rounds to make.
        budget: seconds. No round begins that is expected to end later, but at least one is made.
        before: called with a call's name before each time that the call is made.
    """
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
    """Return a function that calls `function` with the next of the inputs, in turn.

    With enough inputs none of them is still in a cache from its last use.
    """
    turn = -1

    def call() -> Any:
        nonlocal turn
        turn = (turn + 1) % len(inputs)
        return function(*inputs[turn])

    return call


def captured(function: Callable[..., Any], inputs: tuple) -> tuple[Callable[[], Any], Any]:
    """Return (a function that replays function(*inputs) as one CUDA graph, the result that each replay overwrites).

    The function must have run before, so that kernels are compiled and libraries initialised.
    Raises RuntimeError if the function does something that a graph capture does not allow.
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
