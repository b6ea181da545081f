"""A setting of the current thread or task: precompiled CUDA kernels may be chosen beside Triton's, or not."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

_excluded: contextvars.ContextVar[bool] = contextvars.ContextVar("cuda_kernels_excluded", default=False)


@contextlib.contextmanager
def excluding_cuda_kernels() -> Iterator[None]:
    """Inside, only Triton's kernels are chosen."""
    token = _excluded.set(True)
    try:
        yield
    finally:
        _excluded.reset(token)


def cuda_kernels_excluded() -> bool:
    return _excluded.get()
