"""Recorded steps by C++: memory, launches and views without Python between them.

What Python takes for a launch, tens of microseconds, is more than most of a training step's kernels run. The C++ part
(csrc/replay.h) knows addresses and sizes alone; it launches by the driver's function, and calls back only for the few
ops of torch between kernels.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from typing import Any

from .. import extension
from . import tape

# How a launch takes a number, by Triton's name of the type.
FORMATS = {"i1": "q", "i8": "q", "i16": "q", "i32": "q", "i64": "q", "u1": "Q", "u8": "Q", "u16": "Q", "u32": "Q"}
FORMATS |= {"u64": "Q", "fp32": "f", "fp64": "d"}
THREADS = 32  # of a warp


class Unknown(Exception):
    """A step that C++ does not do."""


@functools.cache
def driver() -> int:
    """The address of cuLaunchKernel, or 0."""
    try:
        return ctypes.cast(ctypes.CDLL("libcuda.so.1").cuLaunchKernel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


def of(steps: Sequence[Any], given: int, count: int, results: Sequence[Any]) -> Any:
    """The steps in C++, or None: there is no extension, no driver, or a step that is not done there."""
    module, _ = extension.load()
    if module is None or not driver():
        return None
    try:
        return build(module, driver(), steps, given, count, results)
    except Unknown:
        return None


def build(module: Any, launcher: int, steps: Sequence[Any], given: int, count: int, results: Sequence[Any]) -> Any:
    """Raises Unknown. given: slots of arguments. A view that only launches read is an offset to them."""
    views = {s.made.at: s for s in steps if isinstance(s, tape.View)}
    wanted = {r.at for r in results}
    for s in steps:
        if isinstance(s, tape.Op):
            wanted |= set(tape._indices(s.arguments))
    kept = [s for s in steps if not isinstance(s, tape.View) or s.made.at in wanted]
    runs = [_parameters(s, views) if isinstance(s, tape.Run) else () for s in kept]
    last: dict[int, int] = {}
    for i, (s, parameters) in enumerate(zip(kept, runs, strict=True)):
        used = [at for at, _, _ in parameters if at >= 0] if parameters else tape._indices(tuple(s))
        last |= dict.fromkeys(used, i)
    ends: list[list[int]] = [[] for _ in kept]
    for at, i in last.items():
        if at >= given and at not in {r.at for r in results}:
            ends[i].append(at)
    replay = module.Replay(count, launcher, [r.at for r in results])
    for s, parameters, dead in zip(kept, runs, ends, strict=True):
        _add(replay, s, parameters)
        replay.release(dead)
    return replay


def _add(replay: Any, step: Any, parameters: Sequence[tuple[int, int, int]]) -> None:
    if isinstance(step, tape.Empty):
        replay.empty(step.made.at, step.sizes, step.strides, step.dtype, step.device)
    elif isinstance(step, tape.View):
        replay.view(step.made.at, step.base.at, step.sizes, step.strides, step.offset)
    elif isinstance(step, tape.Op):
        values = step.arguments.values
        at = [v.at if isinstance(v, tape.Slot) else -1 for v in values]
        if any(a < 0 and any(True for _ in tape._indices(v)) for a, v in zip(at, values, strict=True)):
            raise Unknown(f"{step.function} takes a list of tensors")
        results = [-1 if r is None else r.at for r in step.results]
        function = getattr(step.function, "_op", step.function)
        replay.call(
            function, [None if a >= 0 else v for a, v in zip(at, values, strict=True)], at, tuple(step.names), results
        )
    else:
        m = step.compiled.metadata
        special = (
            getattr(m, "launch_pdl", False), getattr(m, "launch_cooperative_grid", False), m.num_ctas > 1,
            getattr(m, "global_scratch_size", 0), getattr(m, "profile_scratch_size", 0),
        )  # fmt: skip
        if any(special):
            raise Unknown(f"{m.name} wants more than a launch")
        replay.launch(m.name, step.compiled.function, step.grid, THREADS * m.num_warps, m.shared, parameters)


def _parameters(run: Any, views: dict[int, Any]) -> list[tuple[int, int, int]]:
    """(slot, offset in bytes, 0) of a pointer; (-1, 0, bits) of a number; in the order of the compiled kernel."""
    found: list[tuple[int, int, int]] = []

    def add(kind: Any, value: Any) -> None:
        if isinstance(kind, tuple):
            for k, v in zip(kind, value, strict=True):
                add(k, v)
        elif kind == "constexpr":
            pass
        elif kind.startswith("*") and isinstance(value, tape.Slot):
            view = views.get(value.at)
            found.append((value.at, 0, 0) if view is None else (view.base.at, view.offset * view.itemsize, 0))
        elif kind in FORMATS:
            found.append((-1, 0, struct.unpack("<Q", struct.pack("<" + FORMATS[kind], value).ljust(8, b"\0"))[0]))
        else:
            raise Unknown(f"an argument of type {kind}")

    for kind, value in zip(run.compiled.src.signature.values(), run.arguments.values, strict=True):
        add(kind, value)
    # Where a kernel's scratch memory is: it has none.
    return [*found, (-1, 0, 0), (-1, 0, 0)]
