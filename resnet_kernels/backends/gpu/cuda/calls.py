"""The CUDA C++ kernels of csrc/cuda as a C library (csrc/cuda/api.h), called by ctypes.

Tests put a subclass of `Library` in its place that runs the kernels on a CPU.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from ... import extension
from .. import glue
from ..c_library import CLibrary


class View(ctypes.Structure):
    C_NAME = "ResnetKernelsView"

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in "nhw")]


class Mask(ctypes.Structure):
    C_NAME = "ResnetKernelsMask"

    _fields_ = [
        ("view", View),
        *((name, ctypes.c_void_p) for name in "ab"),
        ("kind", ctypes.c_int64),
    ]


class Source(ctypes.Structure):
    C_NAME = "ResnetKernelsOperand"

    _fields_ = [
        *((name, View) for name in ("view", "second")),
        ("mask", Mask),
        *((name, ctypes.c_void_p) for name in "a b a2 mean centre".split()),
        *((name, ctypes.c_int32) for name in "relu rounds channels".split()),
    ]


class Pass(ctypes.Structure):
    C_NAME = "ResnetKernelsPass"

    _fields_ = [
        *((name, Source) for name in ("x", "residual")),
        ("mask", Mask),
        ("normalized", View),
        *((name, ctypes.c_void_p) for name in "shift mean rstd y bits parts first second".split()),
        *((name, ctypes.c_int64) for name in ("M", "span")),
        *((name, ctypes.c_int32) for name in "P Q C spread relu reduce mapped aligned type".split()),
    ]


class Table(ctypes.Structure):
    C_NAME = "ResnetKernelsTable"

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "mean M2 gamma beta table".split()),
        *((name, ctypes.c_double) for name in "rows least eps".split()),
        ("K", ctypes.c_int64),
    ]


class BnGrad(ctypes.Structure):
    C_NAME = "ResnetKernelsBnGrad"

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "dbeta dgamma a rstd be shift".split()),
        ("rows", ctypes.c_double),
        ("K", ctypes.c_int64),
    ]


class ProductOf(ctypes.Structure):
    C_NAME = "ResnetKernelsProduct"

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "weight mu M2 product".split()),
        ("rows", ctypes.c_double),
        *((name, ctypes.c_int32) for name in "K J type".split()),
    ]


class ProductTable(ctypes.Structure):
    C_NAME = "ResnetKernelsProductTable"

    _fields_ = [
        ("of", ProductOf),
        *((name, ctypes.c_void_p) for name in "gamma beta table".split()),
        *((name, ctypes.c_double) for name in ("least", "eps")),
    ]


class TailGradCall(ctypes.Structure):
    C_NAME = "ResnetKernelsTailGrad"

    _fields_ = [
        ("of", ProductOf),
        *((name, ctypes.c_void_p) for name in "sg G centre a mean rstd dweight dgamma q v A B".split()),
    ]


class PoolCall(ctypes.Structure):
    C_NAME = "ResnetKernelsPool"

    _fields_ = [
        ("x", View),
        *((name, ctypes.c_void_p) for name in ("y", "winners")),
        *((name, ctypes.c_int32) for name in "N C H W P Q kernel stride padding aligned type".split()),
    ]


class Outer(ctypes.Structure):
    C_NAME = "ResnetKernelsOuter"

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "g x parts sum_parts result sums".split()),
        *((name, ctypes.c_int64) for name in ("M", "span")),
        *((name, ctypes.c_int32) for name in "K C moments aligned type".split()),
    ]


# Functions that launch kernels -> their structures; functions of integers -> how many they take.
LAUNCHES: dict[str, type[ctypes.Structure]] = {
    "pass": Pass,
    "table": Table,
    "bn_grad": BnGrad,
    "product_table": ProductTable,
    "tail_grad": TailGradCall,
    "max_pool": PoolCall,
    "max_pool_grad": PoolCall,
    "outer": Outer,
}
NUMBERS = {"span": 3, "outer_span": 6}

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Library(CLibrary):
    """The kernels of csrc/cuda, built for the architectures `archs`, for tensors on `device`."""

    device = "cuda"

    def __init__(self, functions: Any, archs: str) -> None:
        super().__init__(functions, "resnet_kernels_cuda", LAUNCHES)
        self.archs = archs
        self.numbers = {name: getattr(functions, f"{self.prefix}_{name}") for name in NUMBERS}
        for name, function in self.numbers.items():
            function.argtypes, function.restype = [ctypes.c_int64] * NUMBERS[name], ctypes.c_int64

    def why_not(self, device: torch.device) -> str | None:
        """Return why the kernels do not run on the device, or None."""
        if not torch.cuda.is_available():
            return None
        capability = torch.cuda.get_device_capability(device)
        if not built_for(self.archs, capability):
            return f"expected a GPU of compute capability {self.archs} (the build), got {capability[0]}.{capability[1]}"
        return None

    def number(self, name: str, *arguments: int) -> int:
        return self.numbers[name](*arguments)

    def multiprocessors(self, device: torch.device) -> int:
        return glue.multiprocessors(device)


def built_for(archs: str, capability: tuple[int, int]) -> bool:
    """Return whether code for `archs` ("8.0;9.0a;12.0+PTX") runs on a GPU of this compute capability.

    Binary code runs on the same major version with the same or a later minor version; with a letter on exactly that
    version. PTX runs on any later version.
    """
    for arch in archs.replace(" ", ";").split(";"):
        number, ptx = arch.removesuffix("+PTX"), arch.endswith("+PTX")
        major, minor = (int(n) for n in number.rstrip("af").split("."))
        exact = number[-1:].isalpha()
        if (major, minor) == capability or (not exact and major == capability[0] and minor <= capability[1]):
            return True
        if ptx and not exact and (major, minor) <= capability:
            return True
    return False


@functools.cache
def _opened(module: Any) -> tuple[Any, str | None]:
    info = module.build_info()
    if info["cuda"] is None:
        return None, "the extension was not built with CUDA"
    try:
        return Library(ctypes.CDLL(module.__file__), info["archs"]), None
    except (AttributeError, OSError) as error:
        return None, f"the extension was built from other sources: {error}"


def load() -> tuple[Any, str | None]:
    """Return (the library, None), or (None, why there is none)."""
    module, reason = extension.load()
    return (None, reason) if module is None else _opened(module)


def library() -> Library:
    found, reason = load()
    if found is None:
        raise RuntimeError(f"cuda: {reason}")
    return found


def in_rows(t: Tensor) -> Tensor:
    """Return the tensor, or a channels_last copy if its channels are not contiguous."""
    return t if t.shape[1] == 1 or t.stride(1) == 1 else t.contiguous(memory_format=torch.channels_last)


def vector(t: Tensor, size: int, device: torch.device, name: str) -> Tensor:
    """Return one fp32 value per channel, contiguous. Raises ValueError unless t is (size,) on the device."""
    if t.shape != (size,) or t.device != device:
        raise ValueError(f"{name}: expected ({size},) on {device}, got {tuple(t.shape)} on {t.device}")
    return t if t.dtype == torch.float32 and t.is_contiguous() else t.float().contiguous()
