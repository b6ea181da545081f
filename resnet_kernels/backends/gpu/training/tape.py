"""Record a function of tensors once, and replay its steps in later calls without deciding anything.

A training step of ResNet-50 is 900 launches. To decide each one (operands, configuration, Triton's own binding) takes
longer than to run it. None of these decisions depends on values: for tensors of the same sizes, strides, dtypes and
alignment, the same kernels run with the same arguments except addresses. So the first call of a function is recorded:
torch's ops as the dispatcher sees them, and the launches between them. Later calls replay that list.

A slot stands for a tensor of the recording: an argument, or an intermediate result. A replay releases a slot's tensor
after its last use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import tables
from ...contract import tf32_allowed
from ..launch import INTERPRETING, Launch, active_tape, expected_device

# The number of recordings that are saved. Once it is reached, later functions are not recorded.
MOST = 4096


# `Run` launches a compiled kernel as Triton's own `JITFunction.run` does, by functions that are private to Triton: of
# another version nobody has read them.
TRITON = "3.6.0"


def why_not_recorded(device: torch.device) -> str | None:
    """Return why launches on the device cannot be recorded and done again, or None. The interpreter always can: there
    a recorded launch is an ordinary call of the kernel."""
    if device.type == "cuda" and triton.__version__ != TRITON:
        return f"recorded launches call Triton's private launch: expected Triton {TRITON}, got {triton.__version__}"
    return None


class Slot(NamedTuple):
    at: int


class Arguments:
    """The arguments of a step, with slots in place of tensors."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = list(values)
        # Most slots are whole arguments, which need no walk through nested arguments.
        self._plain = [(i, v.at) for i, v in enumerate(self.values) if isinstance(v, Slot)]
        plain = {i for i, _ in self._plain}
        self._nested = [i for i, v in enumerate(self.values) if i not in plain and any(True for _ in _indices(v))]

    def filled(self, slots: list[Any]) -> list[Any]:
        values = self.values.copy()
        for i, index in self._plain:
            values[i] = slots[index]
        for i in self._nested:
            values[i] = filled(values[i], slots)
        return values


class Op(NamedTuple):
    """An op of torch. names: its keyword arguments, the last of `arguments`. results: the slots of its results in
    order, None for a result that is not a tensor. dead: slots whose last use this is."""

    function: Any
    arguments: Arguments
    names: list[str]
    results: list[Slot | None]
    dead: list[int]

    def run(self, slots: list[Any], stream: int) -> None:
        values = self.arguments.filled(slots)
        first = len(values) - len(self.names)
        found = self.function(*values[:first], **dict(zip(self.names, values[first:], strict=True)))
        if isinstance(found, Tensor):
            found = (found,)
        for slot, t in zip(self.results, found or (), strict=True):
            if slot is not None:
                slots[slot.at] = t


class Run(NamedTuple):
    """A launch of a Triton kernel. It runs what Triton compiled, or the kernel itself in the interpreter. Arguments are
    in the kernel's order. dead: slots whose last use this is."""

    kernel: Any
    compiled: Any
    grid: int
    arguments: Arguments
    options: dict[str, int]
    dead: list[int]

    def run(self, slots: list[Any], stream: int) -> None:
        values, c, hooks = self.arguments.filled(slots), self.compiled, triton.knobs.runtime
        if INTERPRETING:
            self.kernel[(self.grid,)](*values, **self.options)
            return
        c.run(
            self.grid, 1, 1, stream, c.function, c.packed_metadata, c.launch_metadata((self.grid,), stream, *values),
            hooks.launch_enter_hook, hooks.launch_exit_hook, *values,
        )  # fmt: skip


def filled(argument: Any, slots: list[Any]) -> Any:
    """Return the argument with tensors in place of slots."""
    kind = type(argument)
    if kind is Slot:
        return slots[argument.at]
    if kind is list:
        return [filled(a, slots) for a in argument]
    if kind is TensorDescriptor:
        return TensorDescriptor(
            slots[argument.base.at], argument.shape, argument.strides, argument.block_shape, argument.padding
        )
    if isinstance(argument, tuple):
        made = (filled(a, slots) for a in argument)
        return kind(*made) if hasattr(argument, "_fields") else tuple(made)
    return argument


class Tape:
    """The recording of a function whose arguments are `tensors`. unknown: why it cannot be replayed, or ""."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.steps: list[Op | Run] = []
        self.results: list[Slot] = []
        self.unknown = ""
        self._known = WeakIdKeyDictionary({t: Slot(i) for i, t in enumerate(tensors)})
        self._given, self.count = len(tensors), len(tensors)

    # Recording

    def _slot(self, t: Tensor) -> Slot:
        if t not in self._known:
            self._known[t] = Slot(self.count)
            self.count += 1
        return self._known[t]

    def _slotted(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            if argument not in self._known:
                self.unknown = "the function uses a tensor that is neither an argument nor a recorded result"
            return self._slot(argument)
        if isinstance(argument, list):
            return [self._slotted(a) for a in argument]
        if isinstance(argument, TensorDescriptor):
            base = self._slotted(argument.base)
            made = object.__new__(TensorDescriptor)
            made.__dict__ |= argument.__dict__ | {"base": base}
            return made
        if isinstance(argument, tuple):
            parts = [self._slotted(a) for a in argument]
            return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
        return argument

    def add_op(self, function: Any, arguments: Sequence[Any], named: dict[str, Any], found: Any) -> None:
        if not (found is None or isinstance(found, (Tensor, list, tuple))):
            self.unknown = f"{function} reads values"  # on which later steps may depend
            return
        slotted = Arguments([self._slotted(a) for a in (*arguments, *named.values())])
        results = [found] if isinstance(found, Tensor) else list(found or ())
        if not function._schema.is_mutable and all(isinstance(t, Tensor) and t in self._known for t in results):
            return  # every result is an argument: nothing to replay
        made = [self._slot(t) if isinstance(t, Tensor) else None for t in results]
        self.steps.append(Op(function, slotted, list(named), made, []))

    def add_launch(self, launch: Launch, compiled: Any) -> None:
        values = [self._slotted(launch.arguments[name]) for name in launch.kernel.arg_names]
        self.steps.append(Run(launch.kernel, compiled, launch.grid, Arguments(values), launch.options, []))

    def end(self, results: Sequence[Tensor]) -> None:
        self.results = [self._slotted(t) for t in results]
        self._known = WeakIdKeyDictionary()
        kept = {slot.at for slot in self.results} | set(range(self._given))
        used, steps = set(kept), []
        for step in reversed(self.steps):
            idle = isinstance(step, Op) and not step.function._schema.is_mutable
            if idle and used.isdisjoint(_indices(step.results)):
                continue  # its results are not used
            now = set(_indices(tuple(step)))
            step.dead.extend(now - used)
            used |= now
            steps.append(step)
        self.steps = steps[::-1]

    # Replay

    def again(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        slots: list[Any] = [*tensors, *[None] * (self.count - len(tensors))]
        stream = 0
        if tensors[0].is_cuda:
            stream = torch._C._cuda_getCurrentRawStream(tensors[0].device.index)
        for step in self.steps:
            step.run(slots, stream)
            for index in step.dead:
                slots[index] = None
        return [slots[slot.at] for slot in self.results]


def _indices(argument: Any) -> Iterator[int]:
    if isinstance(argument, Slot):
        yield argument.at
    elif isinstance(argument, (list, tuple)):
        for a in argument:
            yield from _indices(a)
    elif isinstance(argument, Arguments):
        yield from _indices(argument.values)
    elif isinstance(argument, TensorDescriptor):
        yield from _indices(argument.base)


class _Recorder(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        self.tape.add_op(function, args, kwargs or {}, found)
        return found


@contextlib.contextmanager
def _recording(tape: Tape) -> Iterator[None]:
    token = active_tape.set(tape)
    try:
        with _Recorder(tape):
            yield
    finally:
        active_tape.reset(token)


# Each recording with the measured table that its choices come from: the reference keeps the table's id unique.
_tapes: dict[Hashable, tuple[Tape, Any]] = {}


def forget() -> None:
    """Drop all recordings: the next call of each function decides and records anew."""
    _tapes.clear()


def _kind(t: Tensor) -> Hashable:
    return t.shape, t.stride(), t.dtype, t.data_ptr() % 16


def taped(key: Hashable, tensors: Sequence[Tensor], function: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Return function(), replayed from a recording if there is one, else recorded if possible.

    function must depend on nothing but the tensors, the values in `key`, the measured tables, and whether tf32 is
    allowed.
    """
    device = tensors[0].device
    here = device.type == expected_device() != "meta"
    plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    if not here or not plain or active_tape.get() is not None or why_not_recorded(device) is not None:
        return function()
    table, ids = tables.table(device), list(map(id, tensors))
    same = tuple(map(ids.index, ids))
    whole = (key, device, tf32_allowed(), id(table), same, *map(_kind, tensors))
    known = _tapes.get(whole)
    if known is None and len(_tapes) < MOST:
        tape = Tape(tensors)
        with _recording(tape):
            results = function()
        tape.end(results)
        _tapes[whole] = tape, table
        return results
    if known is None or known[0].unknown:
        return function()
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return known[0].again(tensors)
