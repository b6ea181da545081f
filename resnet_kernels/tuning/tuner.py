"""Measure, on this device, which implementations run a model's calls right and fastest, and save them in a table.

The tuner measures three things: for each Triton launch, the kernel and its configuration; for each residual block and
stem, the backend; and for each run of consecutive blocks, whether those choices together beat the default choices, as a
run may gain by staying on one backend. Each candidate is first checked against fp64, on random inputs of the call's own
sizes and strides. A candidate that is wrong, or whose kernel spills, is not timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..analysis.roofline import launches_of
from ..analysis.timing import Clock, Sample, captured, interleaved, synchronize
from ..backends import gpu, reference, select, tables
from ..backends.contract import Call, accumulator_dtype
from ..inference import FrozenModel, FrozenResNet, FrozenTrunk, Step, freeze
from ..ops import block_inference as block_op
from ..testing import compare
from .store import store

if TYPE_CHECKING:
    from rich.console import Console

# Launch configurations to time per launch, in addition to the default.
CANDIDATES = 8

# A challenger replaces the default only if its median is below this share of the default's, and its 80th percentile is
# below the default's median.
WORTH = 0.98
RULE = (
    f"A candidate replaces the default if its median time is below {WORTH:.0%} of the default's and its 80th "
    "percentile is below the default's median."
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """The measurement of one choice.

    chosen, default: names of candidates; the default is the choice without a table. seconds: the median of every
    candidate that was right. out: the candidates that were not timed, and why.
    """

    what: str
    chosen: str
    default: str
    seconds: dict[str, float]
    out: dict[str, str]

    def __str__(self) -> str:
        if not self.seconds:
            return f"{self.what}: no candidate ran right" + self._refused()
        before = self.seconds.get(self.default)
        gain = (
            f", {before / self.seconds[self.chosen]:.2f}x {self.default}"
            if before and self.chosen != self.default
            else ""
        )
        text = f"{self.what}: {self.chosen}, {1e6 * self.seconds[self.chosen]:.1f} us{gain}"
        best = min(self.seconds, key=lambda name: self.seconds[name])
        if self.seconds[best] < self.seconds[self.chosen]:
            text += f" (the default; {best}, {1e6 * self.seconds[best]:.1f} us, is not faster by more than the noise)"
        return text + self._refused()

    def _refused(self) -> str:
        return "".join(f"\n    not timed: {name}: {reason}" for name, reason in self.out.items())


@dataclasses.dataclass(frozen=True)
class TuningReport:
    """The result of `tune`.

    path: of the table. measured: the choices, in the order they were measured. kept: the number of choices that the
    table already held. left: the number that the budget did not reach.
    """

    path: Path
    measured: tuple[Measured, ...]
    kept: int
    left: int

    def __str__(self) -> str:
        lines = [str(m) for m in self.measured]
        if self.measured:
            lines.append(RULE)
        lines.append(
            f"{len(self.measured)} choices measured, {self.kept} already in the table, {self.left} left by the budget; "
            f"{self.path}"
        )
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
    """Measure which implementations run a model's residual blocks and stem fastest on its device, and save them.

    Replaced models, and models frozen from then on, follow the table for inputs of the example's sizes.

    Args:
        model: a model that `freeze` accepts, in evaluation mode, or a frozen model. It is not changed.
        example_input: (N, C, H, W) on the model's device. The choices hold for its sizes and dtype, or for the dtype of
            a frozen model.
        candidates: number of launch configurations to time per Triton launch, the best predicted first.
        budget: seconds after which no further measurement begins; launches have the first half.
        path: of the table; by default a file in the user's cache folder, named after the device and the versions.
        again: measure again what the table already holds.
        console: where the progress bar is drawn; by default there is none.
        before: called with the name of each choice before it is measured.
    Returns:
        TuningReport. The table is written after every choice, so an interruption loses only the choice in progress.
    Raises:
        ValueError: the budget is negative, the table cannot be written at its path, or `freeze` refuses the model.
        ModuleNotFoundError: `path` is None, and platformdirs, which finds the cache folder, is not installed.
    Numerics: a candidate's error against fp64 is at most twice that of torch's own chain in the same dtype
        (`testing.compare`), over the whole batch. A candidate replaces the default if its median time is below 98 % of
        the default's and its 80th percentile is below the default's median.
    """
    if not budget >= 0:
        raise ValueError(f"budget: expected a number of seconds that is not negative, got {budget}")
    frozen = model if isinstance(model, FrozenModel) else freeze(model, example_input.dtype, cuda_graphs=False)
    holds_for = tables.identity(frozen.device)
    path = path or tables.cache_folder() / tables.file_of(holds_for)
    _check_writable(path)
    known = tables.Table({}, {}) if again or not path.exists() else _known(path, holds_for)
    trunks = _trunks(frozen, example_input)
    jobs = [*_launch_jobs(trunks, candidates, known.launches), *_call_jobs(trunks), *_trunk_jobs(trunks)]
    todo = [job for job in jobs if job.key not in known.calls and job.key not in known.launches]
    begun, done = time.monotonic(), 0
    rows: list[Measured] = []
    # Each measurement uses the choices stored before it.
    with _progress(console, len(todo)) as advance, tables.also(path.parent):
        for job in todo:
            # Launches have half of the time: without a choice of the backend theirs has no effect.
            if time.monotonic() - begun > (budget / 2 if job.launch else budget):
                continue
            advance(job.what[:60], 0)
            before(job.what)
            row = job.run(functools.partial(store, path, holds_for))
            rows += [] if row is None else [row]
            done += 1
            advance(job.what[:60], 1)
    return TuningReport(path, tuple(rows), len(jobs) - len(todo), len(todo) - done)


@contextlib.contextmanager
def _progress(console: Console | None, total: int) -> Iterator[Callable[[str, int], None]]:
    """Yield a function of a description and the steps to advance by; without a console it does nothing."""
    if console is None:
        yield lambda what, steps: None
        return
    # Imported here, so that `import resnet_kernels` loads no tooling.
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("tuning", total=total)
        yield lambda what, steps: progress.update(bar, description=what, advance=steps)


def _check_writable(path: Path) -> None:
    """Raise ValueError if the table cannot be written: its lock would be waited for without end."""
    reason = "is a folder" if path.is_dir() else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        # The lock's file may be another user's.
        for file in (path, Path(f"{path}.lock")):
            if file.is_file():
                file.open("r+b").close()
    except OSError as error:
        reason = f"cannot be written: {error.strerror}"
    if reason:
        raise ValueError(
            f"table: expected a file in a folder that can be written, got {path}, which {reason}; name a file with "
            "--table (`path` in Python), or a folder with RESNET_KERNELS_CACHE"
        )


def _known(path: Path, holds_for: dict[str, str]) -> tables.Table:
    try:
        found, table = tables.read(path)
    except ValueError:
        return tables.Table({}, {})  # `store` replaces the file with a warning
    return table if found == holds_for else tables.Table({}, {})


Store = Callable[[tables.Table], None]


@dataclasses.dataclass(frozen=True)
class Job:
    """A choice to be measured.

    run first stores the default as unfinished, so that a kernel that kills the process is not tried again, then stores
    and returns the measurement, or None if there was only one candidate. launch: whether it is a choice of a kernel.
    """

    key: str
    what: str
    run: Callable[[Store], Measured | None]
    launch: bool = False


def _trunks(frozen: FrozenModel, example: Tensor) -> list[tuple[FrozenTrunk, tuple[int, ...]]]:
    """Return the trunks that a forward runs, with the sizes of their inputs."""
    seen: list[tuple[FrozenTrunk, tuple[int, ...]]] = []
    hooks = [
        m.register_forward_pre_hook(lambda m, args: seen.append((m, tuple(args[0].shape))))
        for m in frozen.modules()
        if isinstance(m, FrozenTrunk)
    ]
    graphs = [(m, m.graphs) for m in frozen.modules() if isinstance(m, (FrozenTrunk, FrozenResNet))]
    for m, _ in graphs:
        m.graphs = None  # a graph's replay calls no hooks of its trunk
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
    """Return the name of the fastest candidate, if it beats the default by more than noise, else the default."""
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
    """Return the backends that may run the call, in the dtype of the default: a trunk's steps all compute in one."""
    dtype = select.BY_NAME[_default(step)].compute_dtype(call.dtype)
    able = [b for b in select.CANDIDATES if b.why_not(call) is None and b.compute_dtype(call.dtype) == dtype]
    # The reference and the interpreted kernels are too slow to be candidates.
    left_out = (reference.NAME, *[gpu.NAME] * gpu.interpreting())
    return [b.NAME for b in able if b.NAME not in left_out]


def _plain_step(step: Step, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the step's result as torch's own modules compute it, in dtype."""

    def conv_bn(h: Tensor, i: int) -> Tensor:
        c = F.conv2d(h, step.weights[i].to(dtype), None, *step.geometries[i])
        # A projection has no shift of its own: the last convolution's includes it.
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
    """Apply the function to 32 images at a time: in fp64 the intermediates of a whole batch may not fit."""
    return torch.cat([function(part) for part in x.split(32)]) if len(x) else function(x)


def _checked(
    calls: Mapping[str, Callable[[], Any]], wrong: Callable[[Any], str], out: dict[str, str], device: torch.device
) -> dict[str, Callable[[], Any]]:
    """Return the candidates that are right, as they are to be timed: on a GPU as CUDA graphs, which leave out the time
    of launching. Write the reasons against the others to `out`. Raise if a candidate left the device unusable."""
    right = {}
    for name, call in calls.items():
        try:
            reason = wrong(call())
            if not reason:
                right[name] = captured(call, ())[0] if device.type == "cuda" else call
        except Exception as error:  # any failure excludes the candidate
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
    """Return the backend that is chosen without a table: tables hold no calls without a size."""
    return select.choose(dataclasses.replace(step.call, size=())).NAME


def _calls(trunk: FrozenTrunk, size: tuple[int, ...]) -> Iterator[Call]:
    """Yield the call of each step, with the size of the step's input."""
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
    """Measure the steps' choices together; if they do not beat the defaults, store the defaults for all steps."""
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
    """Return the choices of kernels, where the backend gpu runs. Launches that the table holds are not compiled."""
    from . import launches

    problems: dict[str, Any] = {}
    device = torch.device("cpu")
    for trunk, size in trunks:
        device = trunk.steps[0].shifts[0].device
        if not any(gpu.why_not(step.call) for step in trunk.steps):
            x = torch.empty(size, dtype=trunk.dtype, device=device)
            problems |= {p.key: p for p in launches.problems_of(launches_of(trunk, x))}
    unknown = [p for key, p in problems.items() if key not in known]
    # All are compiled together when the first is needed: one pool of processes serves them all.
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

    calls = {name: functools.partial(launches.run_candidate, real, choice) for name, choice in named.items()}
    samples = _time(_checked(calls, wrong, out, device), device)
    seconds = _medians(samples)
    chosen = _best(samples, default) if samples else ""
    if samples:
        store(tables.Table({}, {key: {"launch": key, **launches.row(named[chosen]), "seconds": seconds}}))
    return Measured(_what(key), chosen, default, seconds, out)
