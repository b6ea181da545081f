"""The CUDA C++ kernels as a C library (csrc/cuda/api.h), called by ctypes. A thing with `Library`'s names may stand in
its place: the tests' runs the kernels on a CPU."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import extension


class View(ctypes.Structure):
    """ResnetKernelsView."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in "nhw")]


class Mask(ctypes.Structure):
    """ResnetKernelsMask."""

    _fields_ = [
        ("view", View),
        *((name, ctypes.c_void_p) for name in "ab"),
        ("kind", ctypes.c_int64),
    ]


class Source(ctypes.Structure):
    """ResnetKernelsOperand."""

    _fields_ = [
        *((name, View) for name in ("view", "second")),
        ("mask", Mask),
        *((name, ctypes.c_void_p) for name in "a b a2 mean centre".split()),
        *((name, ctypes.c_int32) for name in "relu rounds channels".split()),
    ]


class Pass(ctypes.Structure):
    """ResnetKernelsPass."""

    _fields_ = [
        *((name, Source) for name in ("x", "residual")),
        ("mask", Mask),
        ("normalized", View),
        *((name, ctypes.c_void_p) for name in "shift mean rstd y bits parts first second".split()),
        *((name, ctypes.c_int64) for name in ("M", "span")),
        *((name, ctypes.c_int32) for name in "P Q C spread relu reduce mapped aligned type".split()),
    ]


class Table(ctypes.Structure):
    """ResnetKernelsTable."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "mean M2 gamma beta table".split()),
        *((name, ctypes.c_double) for name in "rows least eps".split()),
        ("K", ctypes.c_int64),
    ]


class BnGrad(ctypes.Structure):
    """ResnetKernelsBnGrad."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "dbeta dgamma a rstd be shift".split()),
        ("rows", ctypes.c_double),
        ("K", ctypes.c_int64),
    ]


class ProductOf(ctypes.Structure):
    """ResnetKernelsProduct."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "weight mu M2 product".split()),
        ("rows", ctypes.c_double),
        *((name, ctypes.c_int32) for name in "K J type".split()),
    ]


class ProductTable(ctypes.Structure):
    """ResnetKernelsProductTable."""

    _fields_ = [
        ("of", ProductOf),
        *((name, ctypes.c_void_p) for name in "gamma beta table".split()),
        *((name, ctypes.c_double) for name in ("least", "eps")),
    ]


class TailGradCall(ctypes.Structure):
    """ResnetKernelsTailGrad."""

    _fields_ = [
        ("of", ProductOf),
        *((name, ctypes.c_void_p) for name in "sg G centre a mean rstd dweight dgamma q v A B".split()),
    ]


class PoolCall(ctypes.Structure):
    """ResnetKernelsPool."""

    _fields_ = [
        ("x", View),
        *((name, ctypes.c_void_p) for name in ("y", "winners")),
        *((name, ctypes.c_int32) for name in "N C H W P Q kernel stride padding aligned type".split()),
    ]


class Outer(ctypes.Structure):
    """ResnetKernelsOuter."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "g x parts sum_parts result sums".split()),
        *((name, ctypes.c_int64) for name in ("M", "span")),
        *((name, ctypes.c_int32) for name in "K C moments aligned type".split()),
    ]


# The functions that launch, with what they take, and those that compute a number of so many.
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


class Library:
    """The functions of a library that was built for `archs`, for tensors on `device`. AttributeError or OSError: it was
    built of other sources than these."""

    device = "cuda"

    def __init__(self, functions: ctypes.CDLL, archs: str) -> None:
        self.archs = archs
        self.calls = {name: getattr(functions, f"resnet_kernels_cuda_{name}") for name in LAUNCHES}
        for name, call in LAUNCHES.items():
            found = functions.resnet_kernels_cuda_bytes(name.encode())
            if found != ctypes.sizeof(call):
                raise OSError(f"{name}: expected a call of {ctypes.sizeof(call)} bytes, got {found}")
        self.numbers = {name: getattr(functions, f"resnet_kernels_cuda_{name}") for name in NUMBERS}
        for function in self.calls.values():
            function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_char_p
        for name, function in self.numbers.items():
            function.argtypes, function.restype = [ctypes.c_int64] * NUMBERS[name], ctypes.c_int64

    def why_not(self, device: torch.device) -> str | None:
        """Why the kernels do not run on the device, or None."""
        if not torch.cuda.is_available():
            return None
        capability = torch.cuda.get_device_capability(device)
        if not built_for(self.archs, capability):
            return f"expected a GPU of {self.archs}, which it was built for, got {capability[0]}.{capability[1]}"
        return None

    def run(self, name: str, call: ctypes.Structure, device: torch.device) -> None:
        """Raises RuntimeError where the launch fails."""
        with torch.cuda.device(device):
            self.invoke(name, call, torch.cuda.current_stream(device).cuda_stream)

    def invoke(self, name: str, call: ctypes.Structure, stream: int | None) -> None:
        wrong = self.calls[name](ctypes.byref(call), stream)
        if wrong is not None:
            raise RuntimeError(wrong.decode())

    def number(self, name: str, *arguments: int) -> int:
        return self.numbers[name](*arguments)

    def multiprocessors(self, device: torch.device) -> int:
        return _multiprocessors(device)


def built_for(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code for `archs` ("8.0;9.0a;12.0+PTX") runs on a GPU of that compute capability: for the same major one
    and no later minor one (exactly these with a letter), or, as PTX, for any that is not later."""
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
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _opened(module: Any) -> tuple[Any, str | None]:
    info = module.build_info()
    if info["cuda"] is None:
        return None, "the extension was not built with CUDA"
    try:
        return Library(ctypes.CDLL(module.__file__), info["archs"]), None
    except (AttributeError, OSError) as error:
        return None, f"the extension was built from other sources, build it again: {error}"


def load() -> tuple[Any, str | None]:
    """(the library, None), or (None, why there is none)."""
    module, reason = extension.load()
    return (None, reason) if module is None else _opened(module)


def library() -> Library:
    found, reason = load()
    if found is None:
        raise RuntimeError(f"cuda: {reason}")
    return found


def empty(like: Tensor, sizes: Sequence[int]) -> Tensor:
    return torch.empty(tuple(sizes), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def in_rows(t: Tensor) -> Tensor:
    """The tensor, or a copy whose channels lie next to each other."""
    return t if t.shape[1] == 1 or t.stride(1) == 1 else t.contiguous(memory_format=torch.channels_last)


def vector(t: Tensor, size: int, device: torch.device, name: str) -> Tensor:
    """A value per channel, as kernels read it. Raises ValueError where there are not as many."""
    if t.shape != (size,) or t.device != device:
        raise ValueError(f"{name}: expected ({size},) on {device}, got {tuple(t.shape)} on {t.device}")
    return t if t.dtype == torch.float32 and t.is_contiguous() else t.float().contiguous()
