"""tune: measure, on this device, what runs a model's calls right and fastest, and keep it in a table.

Measured are: for each launch of the Triton backend the kernel and its configuration; then for each residual block and
stem the backend; then whether those choices together beat what would be chosen without them, as a run of blocks may
gain by having one backend. A candidate is checked against fp64, on random inputs of the call's own sizes and strides,
before it is timed; one that is wrong, or does not compile without spills, is out.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from ..analysis.roofline import launches_of
from ..analysis.timing import Clock, Sample, captured, interleaved, synchronize
from ..backends import gpu, reference, select, tables
from ..backends.contract import Call, accumulator_dtype
from ..inference import FrozenModel, FrozenResNet, FrozenTrunk, Step, freeze
from ..ops import block_inference as block_op
from ..testing import compare
from .store import store

# Launch configurations to time per launch, beside the one that is chosen without.
CANDIDATES = 8

# A challenger replaces what would be chosen anyway only if it takes less than this share of its time, most of the time.
WORTH = 0.98


@dataclasses.dataclass(frozen=True)
class Measured:
    """One choice. seconds: of every candidate that was right, by name. out: candidates that were not timed, and why.
    default: what would be chosen without a table."""

    what: str
    chosen: str
    default: str
    seconds: dict[str, float]
    out: dict[str, str]

    def __str__(self) -> str:
        if not self.seconds:
            return f"{self.what}: nothing ran right"
        before = self.seconds.get(self.default)
        gain = (
            f", {before / self.seconds[self.chosen]:.2f}x {self.default}"
            if before and self.chosen != self.default
            else ""
        )
        text = f"{self.what}: {self.chosen}, {1e6 * self.seconds[self.chosen]:.1f} us{gain}"
        return text + "".join(f"\n    out: {name}: {reason}" for name, reason in self.out.items())


@dataclasses.dataclass(frozen=True)
class TuningReport:
    """What was tables, in order; how many choices the table held before, and how many the budget left. path: of the
    table."""

    path: Path
    measured: tuple[Measured, ...]
    kept: int
    left: int

    def __str__(self) -> str:
        lines = [str(m) for m in self.measured]
        lines.append(f"{len(self.measured)} choices measured, {self.kept} known before, {self.left} left; {self.path}")
        return "\n".join(lines)


@torch.no_grad()
def tune(
    model: nn.Module,
    example_input: Tensor,
    *,
    candidates: int = CANDIDATES,
    budget: float = math.inf,
    path: Path | None = None,
    again: bool = False,
    console: Console | None = None,
    before: Callable[[str], None] = lambda what: None,
) -> TuningReport:
    """Measure what runs a model's residual blocks and stem fastest on its device, for inputs like the example, and keep
    it in a table that later calls with these sizes follow: replaced models and models frozen from then on.

    Args:
        model: a model that `freeze` takes, in evaluation mode, or a frozen one. It is not changed.
        example_input: (N, C, H, W) on the model's device; choices hold for its sizes and dtype (a frozen model's own).
        candidates: launch configurations to time per launch of the Triton backend, best predicted first.
        budget: seconds after which no further choice is begun; launches have the first half.
        path: of the table; None for one in the user's cache folder, named after device and versions.
        again: measure also what the table holds already.
        console: where a progress bar goes; None for none.
        before: called with the name of each choice before it is measured.
    Returns:
        TuningReport. The table is written after every choice: what was measured before an interruption stays.
    Raises:
        ValueError: as `freeze` does.
        ModuleNotFoundError: no path was given and the cache folder is not known.
    Numerics: a candidate's error against fp64 is at most twice that of torch's own chain in the same dtype
        (`testing.compare`), over the whole batch.
    """
    if isinstance(model, FrozenModel):
        frozen = model
    else:
        frozen = freeze(model, example_input.dtype, cuda_graphs=False)
    holds_for = tables.identity(frozen.device)
    path = path or tables.cache_folder() / tables.file_of(holds_for)
    if again or not path.exists():
        known = tables.Table({}, {})
    else:
        known = _known(path, holds_for)
    trunks = _trunks(frozen, example_input)
    jobs = [*_launch_jobs(trunks, candidates, known.launches), *_call_jobs(trunks), *_trunk_jobs(trunks)]
    todo = [job for job in jobs if job.key not in known.calls and job.key not in known.launches]
    begun, done = time.monotonic(), 0
    rows: list[Measured] = []
    progress = Progress(console=console, transient=True, disable=console is None)
    # What was measured first already serves those that follow.
    with progress, tables.also(path.parent):
        bar = progress.add_task("tuning", total=len(todo))
        for job in todo:
            # The launches' half of the time; without the backends' choices theirs would count for nothing.
            if time.monotonic() - begun > (budget / 2 if job.launch else budget):
                continue
            progress.update(bar, description=job.what[:60])
            before(job.what)
            row = job.run(functools.partial(store, path, holds_for))
            rows += [] if row is None else [row]
            done += 1
            progress.advance(bar)
    return TuningReport(path, tuple(rows), len(jobs) - len(todo), len(todo) - done)


def _known(path: Path, holds_for: dict[str, str]) -> tables.Table:
    try:
        found, table = tables.read(path)
    except ValueError:
        return tables.Table({}, {})  # `store` replaces the file, and says so
    return table if found == holds_for else tables.Table({}, {})


Store = Callable[[tables.Table], None]


@dataclasses.dataclass(frozen=True)
class Job:
    """A choice to be measured. run stores what it finds, first what holds if it never ends: a kernel that takes the
    process along is not tried again. It returns what was found, None if there was nothing to choose."""

    key: str
    what: str
    run: Callable[[Store], Measured | None]
    launch: bool = False


def _trunks(frozen: FrozenModel, example: Tensor) -> list[tuple[FrozenTrunk, tuple[int, ...]]]:
    """The trunks that run, with the sizes of their inputs."""
    seen: list[tuple[FrozenTrunk, tuple[int, ...]]] = []
    hooks = [
        m.register_forward_pre_hook(lambda m, args: seen.append((m, tuple(args[0].shape))))
        for m in frozen.modules()
        if isinstance(m, FrozenTrunk)
    ]
    graphs = [(m, m.graphs) for m in frozen.modules() if isinstance(m, (FrozenTrunk, FrozenResNet))]
    for m, _ in graphs:
        m.graphs = None  # a graph runs past its trunk's hooks
    try:
        frozen(example)
    finally:
        for hook in hooks:
            hook.remove()
        for m, kept in graphs:
            m.graphs = kept
    return seen


def _time(calls: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, Sample]:
    on_gpu = device.type == "cuda"
    return interleaved(calls, Clock(device, queued=True), 30 if on_gpu else 7, 0.4 if on_gpu else 4.0)


def _best(samples: Mapping[str, Sample], default: str) -> str:
    """The fastest, if it is so by more than noise."""
    best = min(samples, key=lambda name: samples[name].median)
    if default not in samples:
        return best
    before, after = samples[default], samples[best]
    return best if after.median < WORTH * before.median and after.p80 < before.median else default


def _medians(samples: Mapping[str, Sample]) -> dict[str, float]:
    return {name: s.median for name, s in samples.items()}


def _call_jobs(trunks: Iterable[tuple[FrozenTrunk, tuple[int, ...]]]) -> list[Job]:
    jobs: dict[str, Job] = {}
    for trunk, size in trunks:
        for step, call in zip(trunk.steps, _calls(trunk, size), strict=True):
            names = _names(step, call)
            key = tables.key(call)
            if len(names) > 1:
                run = functools.partial(_tune_call, step, call.size, names, key)
                jobs.setdefault(key, Job(key, f"{step.name} {'x'.join(map(str, call.size))}", run))
    return list(jobs.values())


def _names(step: Step, call: Call) -> list[str]:
    """Of the backends that may run it. All steps of a trunk compute in one dtype: that of the default."""
    dtype = select.BY_NAME[_default(step)].compute_dtype(call.dtype)
    able = [b for b in select.CANDIDATES if b.why_not(call) is None and b.compute_dtype(call.dtype) == dtype]
    # The definition is no candidate, and the interpreter is for proofs.
    left_out = (reference.NAME, *[gpu.NAME] * gpu.interpreting())
    return [b.NAME for b in able if b.NAME not in left_out]


def _plain_step(step: Step, x: Tensor, dtype: torch.dtype) -> Tensor:
    """As torch's own modules compute it, in dtype."""

    def conv_bn(h: Tensor, i: int) -> Tensor:
        c = F.conv2d(h, step.weights[i].to(dtype), None, *step.geometries[i])
        # The chain's shifts are one fewer than its weights if there is a projection, whose shift is in the last.
        shift = step.shifts[i] if i < len(step.shifts) else torch.zeros_like(step.scales[i])
        a, b = (t.to(accumulator_dtype(dtype))[:, None, None] for t in (step.scales[i], shift))
        return (c.to(a.dtype) * a + b).to(dtype)

    x = x.to(dtype)
    last = len(step.shifts) - 1
    h = x
    for i in range(last):
        h = torch.relu(conv_bn(h, i))
    h = conv_bn(h, last)
    if step.spec.pool is not None:
        return F.max_pool2d(torch.relu(h), *step.spec.pool)
    if step.spec.shortcut == "projection":
        return torch.relu(h + conv_bn(x, last + 1))
    if step.spec.shortcut == "zero_pad":
        x = block_op.zero_pad(x, block_op.total_stride(step.geometries), h.shape[1])
    return torch.relu(h + x)


def _by_images(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Some at a time: in fp64 the intermediates of all may not fit."""
    return torch.cat([function(part) for part in x.split(32)]) if len(x) else function(x)


def _checked(
    calls: Mapping[str, Callable[[], Any]], wrong: Callable[[Any], str], out: dict[str, str], device: torch.device
) -> dict[str, Callable[[], Any]]:
    """Those that are right, as they are to be timed: on a GPU as graphs, for what launching takes is no kernel's doing.
    Why the others are not goes to `out`. Raises where a candidate took the device along."""
    right = {}
    for name, call in calls.items():
        try:
            reason = wrong(call())
            if not reason:
                right[name] = captured(call, ())[0] if device.type == "cuda" else call
        except Exception as error:  # whatever it was, the candidate is out
            reason = f"{type(error).__name__}: {error}"[:200]
        if reason:
            out[name] = reason
        synchronize(device)
    return right


def _tune_call(step: Step, size: tuple[int, ...], names: list[str], key: str, store: Store) -> Measured:
    default = _default(step)
    store(tables.Table({key: {"call": key, "fastest": default, "unfinished": True}}, {}))
    x = torch.randn(size, device=step.shifts[0].device)
    x = (x if step.spec.pool is not None else torch.relu(x)).to(step.call.dtype, memory_format=torch.channels_last)
    exact = _by_images(lambda part: _plain_step(step, part, torch.float64), x)
    plain = _by_images(lambda part: _plain_step(step, part, x.dtype), x)
    terms = max(w[0].numel() for w in step.weights)
    calls: dict[str, Callable[[], Any]] = {}
    out: dict[str, str] = {}
    for name in names:
        named = dataclasses.replace(step, named=name)
        calls[name] = functools.partial(FrozenTrunk([named], named.backend().compute_dtype(x.dtype), graphs=False), x)

    def wrong(y: Tensor) -> str:
        errors = compare(y.to(x.dtype), plain, exact, terms)
        return "" if errors.ok else f"wrong: {errors}"

    samples = _time(_checked(calls, wrong, out, x.device), x.device)
    what, seconds = f"{step.name} {'x'.join(map(str, size))}", _medians(samples)
    chosen = _best(samples, default) if samples else ""
    if samples:
        store(tables.Table({key: {"call": key, "fastest": chosen, "seconds": seconds}}, {}))
    return Measured(what, chosen, default, seconds, out)


def _default(step: Step) -> str:
    """The backend without a table: none knows a call of no size."""
    return select.choose(dataclasses.replace(step.call, size=())).NAME


def _calls(trunk: FrozenTrunk, size: tuple[int, ...]) -> Iterator[Call]:
    """Each step's, of the sizes it sees."""
    N, *image = size
    for step in trunk.steps:
        yield dataclasses.replace(step.call, size=(N, *image))
        image = list(step.map_sizes((image[0], image[1], image[2]))[1][-1])


def _trunk_jobs(trunks: Iterable[tuple[FrozenTrunk, tuple[int, ...]]]) -> list[Job]:
    jobs = []
    for trunk, size in trunks:
        keys = [tables.key(call) for call in _calls(trunk, size)]
        key = "all together: " + hashlib.sha256(" ".join(keys).encode()).hexdigest()[:16]
        what = f"{trunk.steps[0].name} to {trunk.steps[-1].name} {'x'.join(map(str, size))}"
        jobs.append(Job(key, what, functools.partial(_tune_trunk, trunk, size, keys, key, what)))
    return jobs


def _tune_trunk(
    trunk: FrozenTrunk, size: tuple[int, ...], keys: list[str], key: str, what: str, store: Store
) -> Measured | None:
    """Whether the steps' choices hold when they run one after the other; else all take what they would without."""
    device = trunk.steps[0].shifts[0].device
    table = {k: row for k, row in tables.table(device).calls.items() if k in keys}
    default = [_default(step) for step in trunk.steps]
    chosen = [table[k]["fastest"] if k in table else name for k, name in zip(keys, default, strict=True)]
    if chosen == default:
        store(tables.Table({key: {"call": key, "fastest": "default"}}, {}))
        return None
    x = torch.randn(size, device=device).to(trunk.dtype, memory_format=torch.channels_last)
    calls: dict[str, Callable[[], Any]] = {}
    for name, names in {"default": default, "measured": chosen}.items():
        steps = [dataclasses.replace(step, named=n) for step, n in zip(trunk.steps, names, strict=True)]
        calls[name] = functools.partial(FrozenTrunk(steps, trunk.dtype, graphs=False), x)
    samples = _time(_checked(calls, lambda y: "", {}, device), device)
    best = _best(samples, "default")
    rows: dict[str, dict[str, Any]] = {key: {"call": key, "fastest": best, "seconds": _medians(samples)}}
    if best == "default":
        without = dict(zip(keys, default, strict=True))
        rows |= {k: row | {"fastest": without[k], "alone": row["fastest"]} for k, row in table.items()}
    store(tables.Table(rows, {}))
    return Measured(what, best, "default", _medians(samples), {})


def _launch_jobs(trunks: Iterable[tuple[FrozenTrunk, tuple[int, ...]]], most: int, known: Container[str]) -> list[Job]:
    """Of the Triton backend, where it runs. What is known already is not compiled again."""
    from . import launches

    problems: dict[str, Any] = {}
    device = torch.device("cpu")
    for trunk, size in trunks:
        device = trunk.steps[0].shifts[0].device
        if not any(gpu.why_not(step.call) for step in trunk.steps):
            x = torch.empty(size, dtype=trunk.dtype, device=device)
            problems |= {p.key: p for p in launches.problems_of(launches_of(trunk, x))}
    unknown = [p for key, p in problems.items() if key not in known]
    # All at once, when the first is asked for: a process a problem would begin as often.
    prune = functools.cache(lambda: launches.prune(unknown, device, most))
    return [
        Job(key, _what(key), functools.partial(_tune_launch, p, device, prune), True) for key, p in problems.items()
    ]


def _what(key: str) -> str:
    return key.split(": ", 1)[1]


def _tune_launch(
    problem: Any, device: torch.device, prune: Callable[[], dict[str, Any]], store: Store
) -> Measured | None:
    from . import launches

    key, found = problem.key, prune()[problem.key]
    default, out, named = found.default, dict(found.out), {launches.name(choice): choice for choice in found.choices}
    if list(named) == [default] and not out:
        store(tables.Table({}, {key: {"launch": key, **launches.row(named[default])}}))
        return None
    if default in named:
        row = {"launch": key, **launches.row(named[default]), "unfinished": True}
        store(tables.Table({}, {key: row}))
    real = launches.materialize(problem, device)
    exact, plain = launches.plain(real, torch.float64), launches.plain(real, real.parts[0].x.dtype)
    terms = max(c.weight[0].numel() for c in real.parts)

    def wrong(results: list[Tensor]) -> str:
        errors = [compare(got, p, e, terms) for got, p, e in zip(results, plain, exact, strict=True)]
        bad = [str(e) for e in errors if not e.ok]
        return "wrong: " + "; ".join(bad) if bad else ""

    calls = {name: functools.partial(launches.run_so, real, choice) for name, choice in named.items()}
    samples = _time(_checked(calls, wrong, out, device), device)
    seconds = _medians(samples)
    chosen = _best(samples, default) if samples else ""
    if samples:
        store(tables.Table({}, {key: {"launch": key, **launches.row(named[chosen]), "seconds": seconds}}))
    return Measured(_what(key), chosen, default, seconds, out)
