"""CUDA kernels behind a C interface, called by ctypes: what the loaders of csrc/cuda and csrc/cuda/sm90 share."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch


class CLibrary:
    """The launch functions of a C library.

    Each function `PREFIX_NAME(const structure*, stream)` launches kernels and returns null, or an error message.

    functions: the opened library. structures: NAME -> the ctypes structure that the function takes; its attribute
    C_NAME names the C structure.
    Raises OSError if a function is missing or its structure has another size: the library was built from other sources.
    """

    def __init__(self, functions: Any, prefix: str, structures: Mapping[str, type[ctypes.Structure]]) -> None:
        self.functions, self.prefix = functions, prefix
        self.launches: dict[str, Any] = {}
        size_of = getattr(functions, f"{prefix}_bytes", None)
        for name, structure in structures.items():
            function: Any = getattr(functions, f"{prefix}_{name}", None)
            found = size_of(name.encode()) if function and size_of else 0
            if found != ctypes.sizeof(structure):
                expected = ctypes.sizeof(structure)
                raise OSError(f"{name}: expected a structure of {expected} bytes, got {found}; build the package again")
            function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_char_p
            self.launches[name] = function

    def run(self, name: str, call: ctypes.Structure, device: torch.device) -> None:
        """Launch on the current stream of the device. Raises RuntimeError if the launch fails."""
        with torch.cuda.device(device):
            self.invoke(name, call, torch.cuda.current_stream(device).cuda_stream)

    def invoke(self, name: str, call: ctypes.Structure, stream: int | None) -> None:
        error = self.launches[name](ctypes.byref(call), stream)
        if error is not None:
            raise RuntimeError(error.decode())
