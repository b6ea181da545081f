"""The family `gpu:triton`: the backend gpu restricted to Triton's kernels, as tests and benchmarks need it."""

from __future__ import annotations

import functools
from typing import Any

from .. import gpu
from .scope import excluding_cuda_kernels


class TritonOnly:
    """A backend whose names are those of the module `gpu`, with the precompiled CUDA kernels excluded inside calls."""

    NAME = "gpu:triton"

    def __getattr__(self, name: str) -> Any:
        value = getattr(gpu, name)
        if not callable(value):
            return value

        @functools.wraps(value)
        def call(*args: Any, **keywords: Any) -> Any:
            with excluding_cuda_kernels():
                return value(*args, **keywords)

        return call


FAMILY = TritonOnly()
