"""The compiled extension, loaded once and never fatal: what is missing is a reason, not an error."""

from __future__ import annotations

import functools
import importlib
from typing import Any


@functools.cache
def load() -> tuple[Any, str | None]:
    """(module, None), or (None, why there is none)."""
    try:
        return importlib.import_module("resnet_kernels._C"), None
    except ModuleNotFoundError:
        return None, "the C++ extension was not built (RESNET_KERNELS_BUILD=none, or an install without a compiler)"
    except ImportError as error:
        return None, f"the C++ extension does not load: {error}; was it built for another torch?"
