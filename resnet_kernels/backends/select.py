"""Which backend runs a call, and why the others do not.

`CANDIDATES` is the order of preference. Automatic choice takes what a measured table says is fastest, else the first
whose `why_not` is None and that may be chosen unasked; a backend that was named runs or raises `BackendUnavailable`.
"""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager
from typing import cast

from . import cpu, gpu, library, reference, tables
from .contract import Backend, BackendUnavailable, Call
from .gpu import cuda, sm90

CANDIDATES: tuple[Backend, ...] = tuple(cast(Backend, module) for module in (cpu, gpu, sm90, cuda, library, reference))
BY_NAME = {backend.NAME: backend for backend in CANDIDATES}

# Never chosen unasked, whatever their why_not says, unless a measured table does.
UNPROVED = "chosen by name, or where a measured table of this GPU says so: there is none for this call"
ONLY_BY_NAME = {
    "triton": UNPROVED,
    "sm90": UNPROVED,
    "cuda": UNPROVED,
    "reference": "chosen only by name: it defines the result, slowly",
}

# "eager" names no backend but the plain chain of torch modules; nn looks at it before an op is called.
EAGER = "eager"

_named: str | None = None


def _check_name(name: str) -> str:
    if name not in BY_NAME and name != EAGER:
        raise ValueError(f"expected a backend named {', '.join([*BY_NAME, EAGER])}, got {name!r}")
    return name


def named() -> str | None:
    """The backend the user named, by `use_backend` or RESNET_KERNELS_BACKEND."""
    if _named is not None:
        return _named
    from_environment = os.environ.get("RESNET_KERNELS_BACKEND")
    return _check_name(from_environment) if from_environment else None


class _Previous(AbstractContextManager):
    def __init__(self, name: str | None) -> None:
        self.name = name

    def __exit__(self, *exc: object) -> None:
        global _named
        _named = self.name


def use_backend(name: str | None) -> AbstractContextManager:
    """Name the backend that runs every fused call of this process from now on, or None to choose automatically.

    Used as a context manager it is in force inside the `with` only. A named backend is never silently replaced:
    where it cannot run, the call raises `BackendUnavailable` with the reason. "eager" runs the plain torch modules.

    Raises:
        ValueError: no backend has that name.
    """
    global _named
    previous = _Previous(_named)
    _named = None if name is None else _check_name(name)
    return previous


def reasons(call: Call) -> dict[str, str | None]:
    """For every candidate, in order of preference: None if it may be chosen for the call, else why not."""
    best = tables.fastest(call)
    unasked = {name: reason for name, reason in ONLY_BY_NAME.items() if name != best}
    return {b.NAME: b.why_not(call) or unasked.get(b.NAME) for b in CANDIDATES}


@functools.lru_cache(maxsize=4096)
def _choose(call: Call, name: str | None, best: str | None) -> Backend:
    if name is not None:
        reason = BY_NAME[name].why_not(call)
        if reason:
            raise BackendUnavailable(f"backend {name!r} was named and cannot run this call: {reason}")
        return BY_NAME[name]
    why_not = reasons(call)
    for candidate in (best, *BY_NAME):
        if candidate is not None and why_not.get(candidate, "unknown") is None:
            return BY_NAME[candidate]
    raise BackendUnavailable("no backend can run this call: " + "; ".join(f"{n}: {r}" for n, r in why_not.items()))


def choose(call: Call, name: str | None = None) -> Backend:
    """The backend for a call: the named one (None: the one the user named, if any). Raises `BackendUnavailable`."""
    name = name or named()
    # A graph that was compiled before "eager" was named still calls the op: the reference is the plain chain.
    return _choose(call, reference.NAME if name == EAGER else name, tables.fastest(call))
