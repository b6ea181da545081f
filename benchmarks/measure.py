"""Checks and then times the providers of a case. A result that breaks the rule of `testing.compare` is not timed."""

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
    """A provider in one mode, whose result was checked and is ready to be timed.

    row: its row, still without times. call: makes one call with the next inputs. queued: as for `Clock`. seconds: the
    time of one call, roughly.
    """

    row: Row
    call: Callable[[], Any]
    queued: bool
    seconds: float


def check(case: Case, prepared: Prepared, got: Sequence[Tensor]) -> tuple[bool, dict[str, float], str]:
    """Return (whether all results are within the rule, the errors of the first one, the errors that break the rule).

    In training the results are the logits and the gradients, and the errors contain the gradients' RMS as well.
    """
    wrong, first = [], {}
    for i, (out, eager, exact) in enumerate(zip(got, prepared.eager, prepared.exact, strict=True)):
        errors = compare(out, eager, exact, case.terms)
        # In training only the RMS counts: one flipped sign at a ReLU changes a gradient by its whole value.
        ok = errors.ok if not case.training else errors.misplaced == 0 and errors.rms <= errors.allowed_rms
        if not ok:
            wrong.append(str(errors))
        if i == 0:
            names = ("rms", "max", "eager_rms", "eager_max", "allowed_rms", "allowed_max")
            first = {name: getattr(errors, name) for name in names}
        elif case.training:
            first |= {"gradient_rms": errors.rms, "eager_gradient_rms": errors.eager_rms}
    return not wrong, first, "; ".join(wrong)


def _in_layout_of(provider: Provider, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the inputs as NCHW if the provider takes that, else as they are (channels_last)."""
    return tuple(t.contiguous() for t in inputs) if provider.contiguous else inputs


def _results(case: Case, prepared: Prepared, built: Built, run: Callable[..., Any], inputs: tuple) -> list[Tensor]:
    """Return the results to check: of a call with these inputs, or of a training step on them."""
    if not case.training:
        # A frozen model captures its CUDA graph at the second call. The third call, below, replays it.
        for _ in range(2):
            run(*inputs)
        return [t.clone() for t in results_of(run(*inputs))]
    assert built.module is not None
    state = {name: t.clone() for name, t in built.module.state_dict().items()}
    found = trained(built.module, inputs, case.dtype)
    built.module.load_state_dict(state)  # the step changed the running statistics
    return found


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Return the highest memory use during a call, above the use before it; None if it cannot be measured.

    On a CPU this is resident memory. Memory that this package's pool of activations holds before the call counts as
    unused, because the call takes its activations from there. The call is made twice and the smaller value returned.
    """
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
    """Copy the inputs to the tensors that the graph was captured with, as a frozen model does, and replay it."""
    for target, source in zip(fixed, inputs, strict=True):
        target.copy_(source)
    replay()
    return result


def _modes(built: Built, inputs: tuple) -> dict[str, tuple[Callable[..., Any], str]]:
    """Return {mode: (function, reason why the mode is unavailable, or "")}.

    On a GPU the calls of a provider without a graph of its own are captured as one; in training, a step.
    """
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
    """Return an exception's type and first line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def build(case: Case, prepared: Prepared, provider: Provider, log: Log, left: float) -> dict[str, Ready]:
    """Build a provider and return its modes whose results are right, by "name, mode".

    The rows of other modes, and of a provider that cannot run, go to the log. left: seconds that it may take.
    """
    device = prepared.inputs[0][0].device
    # The sizes are fixed, so a user would let cuDNN try its algorithms.
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
        reason = f"{max(0, left):.0f} s of the budget are left, and building may take {patience:.0f} s"
        log.row(dataclasses.replace(row, status="cut", reason=reason))
        return {}
    log.begin(row, 30 + 3 * patience if device.type == "cuda" else None)
    ready: dict[str, Ready] = {}
    try:
        built = provider.build(prepared, case)
        for mode, (run, reason) in _modes(built, _in_layout_of(provider, prepared.inputs[0])).items():
            row_of_mode = dataclasses.replace(row, mode=mode)
            if reason:
                log.row(dataclasses.replace(row_of_mode, status="unavailable", reason=f"no graph: {reason}"))
                continue
            checked = _check_mode(case, prepared, provider, built, run, row_of_mode)
            if checked is None:
                log.row(row_of_mode)
            else:
                ready[f"{provider.name}, {mode}"] = checked
        synchronize(device)
    except Exception as error:  # a provider's failure is its result, and must not end the section
        log.row(dataclasses.replace(row, status="failed", reason=_line(error)))
        # Raises if the device is lost. That ends this process, and the suite continues in a new one.
        synchronize(device)
        ready = {}
    log.begin(None)
    return ready


def _check_mode(
    case: Case, prepared: Prepared, provider: Provider, built: Built, run: Callable[..., Any], row: Row
) -> Ready | None:
    """Check one mode of a provider and fill in the row's errors and memory; None, and a reason, if it is wrong."""
    device = prepared.inputs[0][0].device
    got = _results(case, prepared, built, run, _in_layout_of(provider, prepared.trial))
    ok, row.errors, wrong = check(case, prepared, got)
    if not ok:
        row.status, row.reason = "wrong", wrong
        return None
    call = rotating(run, [_in_layout_of(provider, inputs) for inputs in prepared.inputs])
    begun = time.perf_counter()
    call()
    synchronize(device)
    seconds = time.perf_counter() - begun
    whole_model = case.section in ("inference", "training") and row.mode == next(iter(built.runs))
    if whole_model and not provider.keeps_memory:
        row.peak_bytes = peak_bytes(call, device)
    return Ready(row, call, row.mode == "graph", seconds)


def ready_for(device: torch.device) -> None:
    """Free what an earlier case left on the device."""
    torch._dynamo.reset()  # otherwise earlier compilations count towards torch.compile's limit of recompilations
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# A provider that may take this many seconds to build may use up the budget of its case.
LONG = 10.0
# Rounds of timing for which time is reserved while providers are built.
RESERVED_ROUNDS = 3


def measure(
    case: Case,
    device: torch.device,
    providers: Sequence[Provider],
    log: Log,
    rounds: int,
    seconds: float,
    budget: float,
) -> None:
    """Measure all providers on a case and log their rows.

    Args:
        rounds: the most rounds of timing; in each round every provider is timed once.
        seconds: the most seconds of timing.
        budget: the most seconds for everything. A provider that has begun may exceed it.
    """
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
        reserved = RESERVED_ROUNDS * sum(r.seconds for r in ready.values())
        samples = interleaved(
            {key: r.call for key, r in ready.items()},
            {key: clocks[r.queued] for key, r in ready.items()},
            rounds,
            max(reserved, min(seconds, deadline - time.monotonic())),
            before=lambda key: log.begin(ready[key].row, 30 + 5 * ready[key].seconds),
        )
        log.begin(None)
        for key, r in ready.items():
            r.row.seconds, r.row.p20, r.row.p80, r.row.rounds = samples[key]
            log.row(r.row)

    # Providers that take long to build come last, so that a cut loses only them. Before each of them the others are
    # timed, because building may take longer than estimated. In the end all are timed again, together.
    for provider in sorted(providers, key=lambda p: p.patience_on(device, case.section)):
        if provider.patience_on(device, case.section) >= LONG:
            take_time(RESERVED_ROUNDS)
        reserved = RESERVED_ROUNDS * sum(r.seconds for r in ready.values())
        ready |= build(case, prepared, provider, log, deadline - time.monotonic() - reserved)
    take_time(rounds)
    log.done(first.group)
