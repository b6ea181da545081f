"""The suite's cases and providers for pytest-benchmark: checked first, then timed by its fixture.

On a GPU the clock is CUDA events, with cold caches (`resnet_kernels.analysis.timing.Clock`).
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
import torch

from resnet_kernels.analysis.results import Row
from resnet_kernels.analysis.timing import Clock, Instant

from . import cases
from .cases import Case, Prepared
from .events import Log
from .measure import build, ready_for
from .providers import Provider, providers_of
from .sections import static_facts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run every case, dtype and provider; the default is a few")


class EventTimer:
    """A clock that pytest-benchmark reads before and after each call."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.running = clock, False

    def __call__(self) -> Instant:
        self.running = not self.running
        return self.clock.now(begins=self.running)


def all_cases(full: bool) -> list[Case]:
    """Return the cases to run; few by default on a CPU, where they take under 4 minutes on two cores."""
    gpu = DEVICE == "cuda"
    dtypes = ["bf16", "fp16"] if gpu and full else ["bf16"] if gpu else ["fp32"]
    names = ["resnet50", "resnet18"]
    found: list[Case] = []
    for dtype in dtypes:
        for batch in [256, 32, 1] if gpu and full else [256] if gpu else [4]:
            found += cases.primitives(dtype, batch, gpu or full)
            found += cases.blocks(dtype, batch, full)
            found += cases.networks("inference", names, [dtype], [batch])
        found += cases.networks("training", names if gpu or full else ["resnet18"], [dtype], [128 if gpu else 4])
    return found


def by_default(case: Case, provider: Provider) -> bool:
    """Return whether a provider runs without --full. On a CPU torch.compile takes longer than the others: it runs
    once."""
    return DEVICE == "cuda" or provider.name != "inductor" or (case.section, case.name) == ("inference", "resnet18")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full")
        section = metafunc.definition.name.removeprefix("test_")
        pairs = [
            pytest.param(case, provider, id=f"{case.name}-{case.dtype}-{case.batch}-{provider.name}".replace(" ", "_"))
            for case in all_cases(full)
            if case.section == section
            for provider in providers_of(section, DEVICE)
            if full or by_default(case, provider)
        ]
        metafunc.parametrize(("case", "provider"), pairs)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE == "cuda":
        timer = EventTimer(Clock(torch.device(DEVICE)))
        for item in items:
            if "benchmark" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.benchmark(timer=timer))


@functools.lru_cache(maxsize=1)
def prepared(case: Case) -> Prepared:
    ready_for(torch.device(DEVICE))
    return case.prepare(torch.device(DEVICE))


class Recorded(Log):
    """A log that holds a provider's rows in memory."""

    def __init__(self) -> None:
        super().__init__(Path(os.devnull), float("inf"))
        self.rows: list[Row] = []

    def row(self, row: Row) -> None:
        self.rows.append(row)


@pytest.fixture
def check_then_time(benchmark):
    """Return a function that times a provider on a case, in its first mode; the results of all modes are checked."""

    def run(case: Case, provider: Provider) -> None:
        log = Recorded()
        ready = build(case, prepared(case), provider, log, float("inf"))
        for row in log.rows:
            if row.status == "unavailable" and not ready:
                pytest.skip(row.reason)
            assert row.status == "unavailable", f"{row.provider}, {row.mode}: {row.status}: {row.reason}"
        first = next(iter(ready.values()))
        quick = first.seconds < 0.05
        benchmark.group = f"{case.section}: {case}"
        benchmark.pedantic(first.call, rounds=20 if quick else 3, warmup_rounds=2 if quick else 0)
        if benchmark.stats is None:  # --benchmark-disable
            return
        row = first.row
        row.seconds = benchmark.stats.stats.median
        benchmark.extra_info.update(
            provider=row.provider,
            peer=row.peer,
            mode=row.mode,
            dtype=row.dtype,
            batch=row.batch,
            images_per_second=row.images_per_second,
            bytes_per_second=row.bytes_per_second,
            flops_per_second=row.flops_per_second,
            peak_bytes=row.peak_bytes,
            errors=row.errors,
            **static_facts(DEVICE),
        )

    return run
