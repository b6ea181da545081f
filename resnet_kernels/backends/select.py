"""Which backend runs a call, and why each other candidate does not.

`CANDIDATES` is the order of preference. Automatic choice takes the backend that a measured table calls fastest, else
the first candidate that can run the call and may be chosen without being named. A backend that the user named runs the
call or raises `BackendUnavailable`: nothing else takes its place.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import cast

import torch

from . import cpu, gpu, library, reference, tables
from .contract import Backend, BackendUnavailable, Call
from .gpu import cuda, sm90, triton_only

CANDIDATES: tuple[Backend, ...] = tuple(cast(Backend, module) for module in (cpu, gpu, library, reference))
# Parts of the backend `gpu` that tests and benchmarks name to force one family of kernels.
FAMILIES: tuple[Backend, ...] = tuple(cast(Backend, module) for module in (triton_only.FAMILY, cuda, sm90))
BY_NAME = {backend.NAME: backend for backend in (*CANDIDATES, *FAMILIES)}

# Candidates that are chosen only if they are named, or if a measured table says so.
ONLY_BY_NAME = {
    "gpu": "chosen if it is named, or where a table measured on this GPU says so; no table has this call",
    "reference": "chosen only if it is named: it defines the result and is slow",
}

# "eager" names no backend but the plain torch modules. Modules look at it before they call an op.
EAGER = "eager"

# Names of the version before this one; to be removed in the next.
RENAMED = {"triton": "gpu", "aten": "library", "sm90": "gpu:sm90", "cuda": "gpu:cuda"}

_named: contextvars.ContextVar[str | None] = contextvars.ContextVar("resnet_kernels_backend", default=None)


def _checked(name: str) -> str:
    if name in RENAMED:
        warnings.warn(f"backend {name!r} is now called {RENAMED[name]!r}", FutureWarning, stacklevel=3)
        return RENAMED[name]
    if name not in BY_NAME and name != EAGER:
        raise ValueError(f"backend: expected one of {', '.join([*BY_NAME, EAGER])}, got {name!r}")
    return name


# A compiled graph holds the choice that was made when it was traced.
@torch.compiler.assume_constant_result
def named() -> str | None:
    """Return the backend that the user named by `use_backend` or RESNET_KERNELS_BACKEND, or None."""
    name = _named.get()
    if name is not None:
        return name
    from_environment = os.environ.get("RESNET_KERNELS_BACKEND")
    return _checked(from_environment) if from_environment else None


@contextlib.contextmanager
def _restoring(token: contextvars.Token[str | None]) -> Iterator[None]:
    try:
        yield
    finally:
        _named.reset(token)


def use_backend(name: str | None) -> AbstractContextManager[None]:
    """Name the backend that runs every fused call of this thread or asyncio task from now on.

    As a context manager the name holds inside the `with` block only. A named backend is never silently replaced: where
    it cannot run a call, the call raises `BackendUnavailable` with the reason. What `freeze` makes under a name keeps
    that name.

    Args:
        name: "cpu", "gpu", "library" (PyTorch's own engines with batch norms folded), "reference" (the definition of
            the result), "eager" (the plain torch modules), or None to choose automatically. "gpu:triton", "gpu:cuda"
            and "gpu:sm90" restrict the backend gpu to one family of its kernels.
    Raises:
        ValueError: no backend has that name.
    """
    return _restoring(_named.set(None if name is None else _checked(name)))


def reasons(call: Call) -> dict[str, str | None]:
    """Return, for every candidate in order of preference, None if it may be chosen for the call, else why not."""
    best = tables.fastest(call)
    refused = {name: reason for name, reason in ONLY_BY_NAME.items() if name != best}
    return {b.NAME: b.why_not(call) or refused.get(b.NAME) for b in CANDIDATES}


@functools.lru_cache(maxsize=4096)
def _choose(call: Call, name: str | None, best: str | None) -> Backend:
    if name is not None:
        reason = BY_NAME[name].why_not(call)
        if reason:
            raise BackendUnavailable(f"backend {name!r} was named and cannot run this call: {reason}")
        return BY_NAME[name]
    why_not = reasons(call)
    if best in BY_NAME and BY_NAME[best].why_not(call) is None:
        return BY_NAME[best]
    for candidate, reason in why_not.items():
        if reason is None:
            return BY_NAME[candidate]
    raise BackendUnavailable("no backend can run this call: " + "; ".join(f"{n}: {r}" for n, r in why_not.items()))


def choose(call: Call, name: str | None = None) -> Backend:
    """Return the backend for a call: the one of this name, else the one the user named, else the automatic choice.

    Raises `BackendUnavailable` where the named backend cannot run the call, or no backend can.
    """
    name = name or named()
    # A graph that was compiled before "eager" was named still calls the op: the reference computes the plain chain.
    return _choose(call, reference.NAME if name == EAGER else name, tables.fastest(call))
