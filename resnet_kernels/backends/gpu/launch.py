"""A launch as data: the kernel, its arguments, and the bytes and operations it costs. A launch is then run or recorded.

Recording lets a machine without a GPU see what would run on one: the same code runs on meta tensors for a given
architecture. Tuning tables, `explain` and the tests that read compiled kernels are made from recorded launches.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import tables
from ..contract import tf32_allowed
from .configs import nearest_arch

# Multiprocessors of a recording without a device (an H200's), and of the interpreter, whose time grows with the tiles.
RECORDED_PROCESSORS, INTERPRETED_PROCESSORS = 132, 4
INTERPRETING: bool = triton.knobs.runtime.interpret


class Work(NamedTuple):
    """The cost of a launch.

    bytes: device memory traffic that the problem needs. flops: operations that the problem needs. copied: bytes that
    the CTAs read, mostly from L2. issued: operations that the CTAs execute, including a tile's padding, a halo and the
    zeros between joined groups.
    """

    bytes: int
    flops: int
    copied: int
    issued: int

    def plus(self, other: Work) -> Work:
        return Work(*map(operator.add, self, other))


@dataclasses.dataclass(frozen=True, eq=False)
class Launch:
    """kernel[grid](**arguments, **options).

    what: the problem in words. refused: {kernel: reason} of the candidates that were preferred but cannot run.
    problem: the problem that the kernel was chosen for (a `dispatch.FusedProblem`), if it was chosen among candidates;
    other kernels may compute the same. within: a larger problem that this launch begins, which one launch might
    compute.
    """

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
        """Launch the kernel and return what Triton compiled."""
        return self.kernel[(self.grid,)](**self.arguments, **self.options)


class CudaLaunch(Launch):
    """The launch of a CUDA C++ kernel that was compiled when the package was built. `kernel` is the function that
    launches it, `grid` the number of its tiles."""

    def run(self) -> None:
        self.kernel(**self.arguments)


class Library(Launch):
    """A computation by torch's library between the kernels. It is recorded for its bytes and operations, and never
    submitted."""

    @property
    def name(self) -> str:
        return "library"


@dataclasses.dataclass
class Recording:
    """The launches recorded for an architecture.

    device: the GPU whose tables and number of multiprocessors decide. None: an H200 without tables.
    """

    arch: int
    device: torch.device | None = None
    launches: list[Launch] = dataclasses.field(default_factory=list)


_recording: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("recording", default=None)
_assumed_arch: contextvars.ContextVar[int] = contextvars.ContextVar("assumed_arch", default=90)


# The `tape.Tape` that records every launch of this thread or task, or None.
active_tape: contextvars.ContextVar[Any] = contextvars.ContextVar("active_tape", default=None)


@contextlib.contextmanager
def recording(arch: int, device: torch.device | None = None) -> Iterator[list[Launch]]:
    """Record launches on meta tensors as a GPU of this architecture would run them.

    device: the GPU whose tables decide. None: an H200 without tables.
    """
    record = Recording(arch, device)
    token = _recording.set(record)
    try:
        yield record.launches
    finally:
        _recording.reset(token)


@contextlib.contextmanager
def assume_arch(arch: int) -> Iterator[None]:
    """Make Triton's interpreter run the launches that a GPU of this architecture would run."""
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
    """Return the GPU that a launch with operands on the device would run on, or None if that GPU is not present."""
    record = _recording.get()
    found = device if record is None else record.device
    return found if found is not None and found.type == "cuda" else None


def expected_device() -> str:
    """Return the type of device on which a launch's tensors must be."""
    return "meta" if _recording.get() is not None else "cpu" if INTERPRETING else "cuda"


def arch_of(device: torch.device) -> int:
    """Return the architecture whose configurations the device uses: 80 for sm_80, 90 for sm_90, and so on."""
    record = _recording.get()
    if record is not None:
        return record.arch
    return nearest_arch(_properties(device)[0]) if device.type == "cuda" else _assumed_arch.get()


def measured_choice(device: torch.device, problem: Any) -> dict[str, Any] | None:
    """Return the row of the device's measured table for `problem.key`, or None."""
    record = _recording.get()
    owner = device if record is None else record.device
    rows = {} if owner is None else tables.table(owner).launches
    # Every launch comes here: without a table, do not even build the key.
    return rows.get(problem.key) if rows else None


def processors_of(device: torch.device) -> int:
    """Return the number of multiprocessors that the device's grids should fill."""
    record = _recording.get()
    if record is not None and device.type == "meta":
        if record.device is None:
            return RECORDED_PROCESSORS
        device = record.device
    return _properties(device)[1] if device.type == "cuda" else INTERPRETED_PROCESSORS


def precision() -> str:
    """Return tl.dot's input_precision for fp32: "tf32" or "ieee", as torch's flags allow."""
    return "tf32" if tf32_allowed() else "ieee"


def nbytes(*tensors: Tensor | None) -> int:
    """Return the bytes of the tensors' elements, each counted once."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def descriptor(t: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]) -> TensorDescriptor:
    return TensorDescriptor(t, list(shape), list(strides), list(block))


def record_library(x: Tensor, weight: Tensor, y: Tensor, gradient: str = "") -> None:
    """If a recording is active, record a convolution of x to y by torch's library, or the gradient named by `gradient`
    (" dx", " dweight")."""
    record = _recording.get()
    if record is not None:
        K, C, R, S = weight.shape
        _, _, P, Q = y.shape
        what = f"{R}x{S} {x.shape[1]}->{K} {P}x{Q}{gradient}"
        moved, flops = nbytes(x, weight, y), 2 * y.numel() * C * R * S
        arguments = {"x": x, "weight": weight, "y": y}
        record.launches.append(Library(None, 0, arguments, {}, what, Work(moved, flops, moved, flops)))


def submit(launch: Launch) -> None:
    """Record the launch if a recording is active, else run it; a tape of this thread records it as it runs."""
    record = _recording.get()
    if record is not None:
        record.launches.append(launch)
        return
    device = launch.device
    # The interpreter computes by torch's ops. Dispatch modes must not see them: they are not the caller's ops.
    with torch.cuda.device(device) if device.type == "cuda" else _disable_current_modes():
        compiled = launch.run()
    tape = active_tape.get()
    if tape is not None:
        tape.add_launch(launch, compiled)
