"""A launch is data first: what would run, with its bytes and operations. Then it runs, or is recorded.

Recording is how a machine without a GPU sees what would run there: the same code on meta tensors, for a given
architecture. Tables, `explain` and the tests that read compiled kernels are made from it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import operator
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import tables
from ..contract import tf32_allowed
from .configs import known

# Multiprocessors of a recording's GPU (H200's), and of the interpreter's, which is slow by the tile.
RECORDED_PROCESSORS, INTERPRETED_PROCESSORS = 132, 4
INTERPRETING: bool = triton.knobs.runtime.interpret


class Work(NamedTuple):
    """bytes: of device memory that must move. flops: operations that must be done. copied: bytes that programs read,
    mostly from L2. issued: operations that they do, with a tile's padding, a halo, the zeros between joined groups."""

    bytes: int
    flops: int
    copied: int
    issued: int

    def plus(self, other: Work) -> Work:
        return Work(*map(operator.add, self, other))


@dataclasses.dataclass(frozen=True, eq=False)
class Launch:
    """kernel[grid](**arguments, **options). refused: kernels that were preferred, and why they were not taken. problem:
    what it computes, as what chose it was given it: another launch may compute the same. within: a larger problem that
    it begins, which one launch might compute."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    options: dict[str, int]
    what: str
    work: Work
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    problem: Any = None
    within: Any = None

    @property
    def device(self) -> torch.device:
        values = (v.base if isinstance(v, TensorDescriptor) else v for v in self.arguments.values())
        return next(v.device for v in values if isinstance(v, Tensor))

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_").removesuffix("_kernel")

    def run(self) -> Any:
        """Returns what was compiled."""
        return self.kernel[(self.grid,)](**self.arguments, **self.options)


class Native(Launch):
    """Of a kernel that was compiled when the package was built: `kernel` is what launches it, `grid` its tiles."""

    def run(self) -> None:
        self.kernel(**self.arguments)


class Library(Launch):
    """What torch's library computes between the kernels: recorded for its bytes and operations, never submitted."""

    @property
    def name(self) -> str:
        return "library"


@dataclasses.dataclass
class Recording:
    """device: whose tables choose, and which has so many multiprocessors; None: an H200 that nobody measured."""

    arch: int
    device: torch.device | None = None
    launches: list[Launch] = dataclasses.field(default_factory=list)


_recording: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("recording", default=None)
_assumed_arch: contextvars.ContextVar[int] = contextvars.ContextVar("assumed_arch", default=90)


class _Listening(threading.local):
    """tape: a `tape.Tape` that hears of every launch of this thread, or None."""

    tape: Any = None


listening = _Listening()


@contextlib.contextmanager
def recording(arch: int, device: torch.device | None = None) -> Iterator[list[Launch]]:
    """Inside, launches on meta tensors are recorded as a GPU of this architecture would run them: the device, with
    what was measured on it, or if there is none an H200 without tables."""
    record = Recording(arch, device)
    token = _recording.set(record)
    try:
        yield record.launches
    finally:
        _recording.reset(token)


@contextlib.contextmanager
def assume_arch(arch: int) -> Iterator[None]:
    """Inside, Triton's interpreter runs what a GPU of this architecture would."""
    token = _assumed_arch.set(arch)
    try:
        yield
    finally:
        _assumed_arch.reset(token)


@functools.cache
def _properties(device: torch.device) -> tuple[int, int]:
    p = torch.cuda.get_device_properties(device)
    return p.major * 10 + p.minor, p.multi_processor_count


def gpu_of(device: torch.device) -> torch.device | None:
    """The GPU that a launch with operands on the device would run on, or None: one that is imagined."""
    record = _recording.get()
    found = device if record is None else record.device
    return found if found is not None and found.type == "cuda" else None


def expected_device() -> str:
    """Where tensors must be for a launch."""
    return "meta" if _recording.get() is not None else "cpu" if INTERPRETING else "cuda"


def arch_of(device: torch.device) -> int:
    """80 for sm_80, 90 for sm_90, ...: the one whose configurations the device takes."""
    record = _recording.get()
    if record is not None:
        return record.arch
    return known(_properties(device)[0]) if device.type == "cuda" else _assumed_arch.get()


def measured_choice(device: torch.device, problem: Any) -> dict[str, Any] | None:
    """What a table says of a launch with operands on the device, that computes what `problem.key` says."""
    record = _recording.get()
    owner = device if record is None else record.device
    rows = {} if owner is None else tables.table(owner).launches
    # Every launch asks: without a table not even the key is made.
    return rows.get(problem.key) if rows else None


def processors_of(device: torch.device) -> int:
    record = _recording.get()
    if record is not None and device.type == "meta":
        if record.device is None:
            return RECORDED_PROCESSORS
        device = record.device
    return _properties(device)[1] if device.type == "cuda" else INTERPRETED_PROCESSORS


def precision() -> str:
    """Of products of fp32."""
    return "tf32" if tf32_allowed() else "ieee"


def nbytes(*tensors: Tensor | None) -> int:
    """Of the elements that a kernel touches, each once."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def descriptor(t: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]) -> TensorDescriptor:
    return TensorDescriptor(t, list(shape), list(strides), list(block))


def note_library(x: Tensor, weight: Tensor, y: Tensor, of: str = "") -> None:
    """Record, if anything is, a convolution of x to y by torch's library, or the gradient of one."""
    record = _recording.get()
    if record is not None:
        K, C, R, S = weight.shape
        _, _, P, Q = y.shape
        what = f"{R}x{S} {x.shape[1]}->{K} {P}x{Q}{of}"
        moved, flops = nbytes(x, weight, y), 2 * y.numel() * C * R * S
        arguments = {"x": x, "weight": weight, "y": y}
        record.launches.append(Library(None, 0, arguments, {}, what, Work(moved, flops, moved, flops)))


def submit(launch: Launch) -> None:
    record = _recording.get()
    if record is not None:
        record.launches.append(launch)
        return
    device = launch.device
    # The interpreter computes by torch's ops, which are no part of what called it.
    with torch.cuda.device(device) if device.type == "cuda" else _disable_current_modes():
        compiled = launch.run()
    if listening.tape is not None:
        listening.tape.add_launch(launch, compiled)
