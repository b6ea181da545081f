"""Loads the compiled extension `resnet_kernels._C` once. A missing or broken extension is a reason, never an error."""

from __future__ import annotations

import functools
import importlib
from typing import Any


@functools.cache
def load() -> tuple[Any, str | None]:
    """Return (module, None), or (None, reason) if the extension is not built or does not load."""
    try:
        return importlib.import_module("resnet_kernels._C"), None
    except ModuleNotFoundError:
        return None, "the C++ extension was not built (RESNET_KERNELS_BUILD=none, or an install without a compiler)"
    except ImportError as error:
        return None, f"the C++ extension does not load: {error}; was it built for another torch? Then build it again"
