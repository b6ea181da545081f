"""Check, then time: a provider whose result is outside the rule of `testing.compare` has no time."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_kernels.analysis.results import Row
from resnet_kernels.analysis.timing import Clock, captured, interleaved, rotating, synchronize
from resnet_kernels.backends import extension
from resnet_kernels.testing import compare

from .cases import Case, Prepared, results_of, trained
from .events import PREPARATION, Log
from .providers import Built, Provider


@dataclasses.dataclass
class Ready:
    """A provider in a mode, checked. call: the next of its calls, which took about so many seconds."""

    row: Row
    call: Callable[[], Any]
    queued: bool
    seconds: float


def check(case: Case, prepared: Prepared, got: Sequence[Tensor]) -> tuple[bool, dict[str, float], str]:
    """(whether all results are within the rule, the first's errors, what is wrong)."""
    wrong, first = [], {}
    for i, (out, eager, exact) in enumerate(zip(got, prepared.eager, prepared.exact, strict=True)):
        errors = compare(out, eager, exact, case.terms)
        # Of gradients, where one flipped sign of a ReLU moves a whole value, the RMS is the measure.
        ok = errors.ok if not case.training else errors.misplaced == 0 and errors.rms <= errors.allowed_rms
        if not ok:
            wrong.append(str(errors))
        if i == 0:
            names = ("rms", "max", "eager_rms", "eager_max", "allowed_rms", "allowed_max")
            first = {name: getattr(errors, name) for name in names}
        elif case.training:
            first |= {"gradient_rms": errors.rms, "eager_gradient_rms": errors.eager_rms}
    return not wrong, first, "; ".join(wrong)


def _as(provider: Provider, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.contiguous() for t in inputs) if provider.contiguous else inputs


def _results(case: Case, prepared: Prepared, built: Built, run: Callable[..., Any], inputs: tuple) -> list[Tensor]:
    """Of the first inputs, or of a trial step."""
    if not case.training:
        for _ in range(2):  # a frozen model captures its graph at the second call; the one below replays it
            run(*inputs)
        return [t.clone() for t in results_of(run(*inputs))]
    assert built.module is not None
    state = {name: t.clone() for name, t in built.module.state_dict().items()}
    found = trained(built.module, inputs, case.dtype)
    built.module.load_state_dict(state)  # the trial moved the running statistics
    return found


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Memory above what there is before a call, at most; None where it cannot be told. On a CPU resident memory, and
    what our pool of activations holds ready: the least of two, after a first call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    peaks, (module, _) = [], extension.load()
    with contextlib.suppress(OSError, StopIteration):
        for _ in range(2):
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = status("VmRSS:") - (module.pool_bytes() if module is not None else 0)
            call()
            peaks.append(status("VmHWM:") - before)
    return min(peaks, default=None)


def _replayed(fixed: tuple[Tensor, ...], replay: Callable[[], None], result: Any, *inputs: Tensor) -> Any:
    """A graph reads where it was captured: as in a frozen model, the inputs are copied there."""
    for target, source in zip(fixed, inputs, strict=True):
        target.copy_(source)
    replay()
    return result


def _modes(built: Built, inputs: tuple) -> dict[str, tuple[Callable[..., Any], str]]:
    """Each mode's function, or "" and why there is none. Captures what brings no graph of its own, of training a step,
    on a GPU."""
    modes: dict[str, tuple[Callable[..., Any], str]] = {mode: (run, "") for mode, run in built.runs.items()}
    if inputs[0].is_cuda and "graph" not in modes:
        run = built.runs["call"]
        run(*inputs)
        fixed = tuple(t.clone() for t in inputs)
        try:
            replay, result = captured(run, fixed)
        except RuntimeError as error:
            modes["graph"] = run, _line(error)
        else:
            modes["graph"] = functools.partial(_replayed, fixed, replay, result), ""
    return modes


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def build(case: Case, prepared: Prepared, provider: Provider, log: Log, left: float) -> dict[str, Ready]:
    """The provider's modes that are right; the others are told to the log. left: seconds there are for it."""
    device = prepared.inputs[0][0].device
    # For sizes that stay, as here, a user lets cuDNN try its algorithms.
    torch.backends.cudnn.benchmark = True
    row = case.row(provider.name, "ok", peer=provider.peer, floor=case.floor(log.facts))
    if log.knows(row):
        return {}
    reason = provider.why_not(prepared, case)
    if reason:
        log.row(dataclasses.replace(row, status="unavailable", reason=reason))
        return {}
    patience = provider.patience_on(device, case.section)
    if left < patience:
        reason = f"{max(0, left):.0f} s of the budget are left, building may take {patience:.0f}"
        log.row(dataclasses.replace(row, status="cut", reason=reason))
        return {}
    log.begin(row, 30 + 3 * patience if device.type == "cuda" else None)
    ready: dict[str, Ready] = {}
    try:
        built = provider.build(prepared, case)
        trial = _as(provider, prepared.trial)
        for mode, (run, reason) in _modes(built, _as(provider, prepared.inputs[0])).items():
            mine = dataclasses.replace(row, mode=mode)
            if reason:
                log.row(dataclasses.replace(mine, status="unavailable", reason=f"no graph: {reason}"))
                continue
            ok, mine.errors, wrong = check(case, prepared, _results(case, prepared, built, run, trial))
            if not ok:
                log.row(dataclasses.replace(mine, status="wrong", reason=wrong))
                continue
            call = rotating(run, [_as(provider, inputs) for inputs in prepared.inputs])
            begun = time.perf_counter()
            call()
            synchronize(device)
            seconds = time.perf_counter() - begun
            whole = case.section in ("inference", "training") and mode == next(iter(built.runs))
            if whole and not provider.keeps_memory:
                mine.peak_bytes = peak_bytes(call, device)
            ready[f"{provider.name}, {mode}"] = Ready(mine, call, mode == "graph", seconds)
        synchronize(device)
    except Exception as error:  # whatever it was, it is this provider's
        log.row(dataclasses.replace(row, status="failed", reason=_line(error)))
        synchronize(device)  # raises where the device is lost: then this process is, and the next goes on
        ready = {}
    log.begin(None)
    return ready


def ready_for(device: torch.device) -> None:
    """Before a case: nothing is left of the one before."""
    torch._dynamo.reset()  # else what was compiled counts towards the limit of recompilations
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# Seconds to build from which a provider may be the end of its case.
LONG = 10.0
# Rounds of timing for which time is kept while providers are built.
KEPT_ROUNDS = 3


def measure(
    case: Case,
    device: torch.device,
    providers: Sequence[Provider],
    log: Log,
    rounds: int,
    seconds: float,
    budget: float,
) -> None:
    """Every provider on the case, in rounds in which each has its turn, of at most `seconds`; all in `budget` seconds,
    or as soon after as a provider that was begun ends. Rows go to the log."""
    first, deadline = case.row("", "ok"), time.monotonic() + budget
    if log.knows(first):
        return
    ready_for(device)
    log.begin(case.row(PREPARATION, "ok"))
    prepared = case.prepare(device)
    log.begin(None)
    clocks = {queued: Clock(device, queued) for queued in (False, True)}
    ready: dict[str, Ready] = {}

    def take_time(rounds: int) -> None:
        spent = KEPT_ROUNDS * sum(r.seconds for r in ready.values())
        samples = interleaved(
            {key: r.call for key, r in ready.items()},
            {key: clocks[r.queued] for key, r in ready.items()},
            rounds,
            max(spent, min(seconds, deadline - time.monotonic())),
            before=lambda key: log.begin(ready[key].row, 30 + 5 * ready[key].seconds),
        )
        log.begin(None)
        for key, r in ready.items():
            r.row.seconds, r.row.p20, r.row.p80, r.row.rounds = samples[key]
            log.row(r.row)

    # What takes long to build comes last, so that a cut leaves the others; and before it they are timed, for it may
    # take longer than is thought. In the end all are timed again, together.
    for provider in sorted(providers, key=lambda p: p.patience_on(device, case.section)):
        if provider.patience_on(device, case.section) >= LONG:
            take_time(KEPT_ROUNDS)
        kept = KEPT_ROUNDS * sum(r.seconds for r in ready.values())
        ready |= build(case, prepared, provider, log, deadline - time.monotonic() - kept)
    take_time(rounds)
    log.done(first.group)
