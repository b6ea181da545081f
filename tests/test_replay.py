"""Recorded steps by C++: the same as by Python, launches with what the driver is to get."""

import ctypes
import struct
import weakref
from types import SimpleNamespace

import pytest
import torch

from resnet_kernels.backends import extension
from resnet_kernels.backends.triton import replay, tape
from resnet_kernels.backends.triton.tape import Arguments, Run, Slot

module, reason = extension.load()
pytestmark = pytest.mark.skipif(module is None, reason=str(reason))
LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    *[ctypes.c_uint] * 7,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)


class Driver:
    """What cuLaunchKernel would be given, as bytes of so many sizes; `do` computes for the kernel."""

    def __init__(self, sizes, do=lambda *parameters: None, error=0):
        self.sizes, self.do, self.error, self.launches = sizes, do, error, []
        self.function = LAUNCHER(self._launch)
        self.address = ctypes.cast(self.function, ctypes.c_void_p).value

    def _launch(self, function, *rest):
        *sizes, stream, parameters, extra = rest
        values = [ctypes.string_at(parameters[i], size) for i, size in enumerate(self.sizes)]
        self.launches.append((function, *sizes, stream, extra))
        self.do(*values)
        return self.error


def compiled(signature, **metadata):
    fields = {"name": "kernel", "num_warps": 4, "num_ctas": 1, "shared": 1024} | metadata
    return SimpleNamespace(function=77, metadata=SimpleNamespace(**fields), src=SimpleNamespace(signature=signature))


def recorded(function, *tensors):
    found = tape.Tape(tensors)
    with tape._recording(found):
        results = function(*tensors)
    found.end(results)
    return found


def native(found, driver, steps=None):
    return replay.build(module, driver.address, steps or found.steps, found._given, found.count, found.results)


def test_ops_views_and_memory_as_python_does_them():
    def run(x, w):
        t = torch.empty_like(x, dtype=torch.float64)
        t.copy_(x)
        first, second = t.unbind()
        y = torch.nn.functional.conv2d(x, w.to(x.dtype), padding=1)[1, 1:, ::2]
        return [second.mT, y, first[1:].sum(0, keepdim=True) + second[0], x]

    x, w = torch.randn(9, 2, 6, 5)[3:5], torch.randn(3, 2, 3, 3, dtype=torch.float64)
    found = recorded(run, x, w)
    assert not found.unknown and any(isinstance(s, tape.View) for s in found.steps)
    again = native(found, Driver([]))
    for _ in range(3):
        x, w = torch.randn(7, 2, 6, 5)[1:3], torch.randn(3, 2, 3, 3, dtype=torch.float64)
        want = run(x, w)
        for got in (again.run([x, w], 0), found.again([x, w])):
            assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(got, want, strict=True))


def test_a_launch_gets_addresses_numbers_and_scratch():
    """out[1:] of an allocation = x[2:] * factor, by a kernel whose arguments are a tuple and numbers of all kinds."""

    def record(x):
        out = torch.empty(4)
        return [out, out[1:], x[2:]]

    def kernel(out, size, x, n, factor, wide, scratch, profile):
        out, x = (struct.unpack("<Q", p)[0] for p in (out, x))
        n, factor = struct.unpack("<i", n)[0], struct.unpack("<f", factor)[0]
        assert (n, factor, struct.unpack("<q", wide)[0], struct.unpack("<d", size)[0]) == (-3, 0.5, -(1 << 40), 2.5)
        assert scratch == profile == bytes(8)
        read = (ctypes.c_float * 3).from_address(x)
        ctypes.memmove(out, (ctypes.c_float * 3)(*(v * factor for v in read)), 12)

    x = torch.randn(5)
    found = recorded(record, x)
    out, part, given = found.results
    signature = {
        "out": ("*fp32", "constexpr", "fp64"),
        "x": "*fp32",
        "n": "i32",
        "TILE": "constexpr",
        "f": "fp32",
        "w": "i64",
    }
    values = Arguments([(part, None, 2.5), given, -3, 128, 0.5, -(1 << 40)])
    found.results = [out]
    driver = Driver([8, 8, 8, 4, 4, 8, 8, 8], kernel)
    again = native(found, driver, [*found.steps, Run(None, compiled(signature), 6, values, {}, [])])
    for _ in range(2):
        x = torch.randn(5)
        (got,) = again.run([x], 5)
        assert torch.equal(got[1:], x[2:] * 0.5)
    assert driver.launches == [(77, 6, 1, 1, 128, 1, 1, 1024, 5, None)] * 2


def test_a_failed_launch_names_the_kernel():
    found = recorded(lambda x: [x], torch.zeros(2))
    again = native(found, Driver([], error=700), [Run(None, compiled({}), 3, Arguments([]), {}, [])])
    with pytest.raises(RuntimeError, match="kernel: cuLaunchKernel returned 700 for a grid of 3, 128 threads"):
        again.run([torch.zeros(2)], 0)


@pytest.mark.parametrize(
    "step",
    [
        Run(None, compiled({}, num_ctas=2), 1, Arguments([]), {}, []),
        Run(None, compiled({}, launch_pdl=True), 1, Arguments([]), {}, []),
        Run(None, compiled({"x": "tensordesc<bf16[64, 64]>"}), 1, Arguments([Slot(0)]), {}, []),
    ],
    ids=["cluster", "dependent launch", "descriptor"],
)
def test_what_is_more_than_a_launch_is_left_to_python(step):
    found = recorded(lambda x: [x], torch.zeros(2))
    with pytest.raises(replay.Unknown):
        native(found, Driver([]), [step])


def test_what_nothing_reads_any_more_is_let_go():
    found = recorded(lambda x: [((x + 1) + 2) + 3], torch.zeros(3))
    alive = []

    def watched(step):
        def run(x, y):
            alive.append(sum(ref() is not None for ref in made))
            result = step.function(x, y)
            made.append(weakref.ref(result.untyped_storage()))
            return result

        return step._replace(function=run)

    made = []
    (got,) = native(found, Driver([]), list(map(watched, found.steps))).run([torch.zeros(3)], 0)
    assert torch.equal(got, torch.full((3,), 6.0))
    # The last one's argument only.
    assert alive == [0, 1, 1]
