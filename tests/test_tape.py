"""A recorded step does what deciding it anew would do."""

import copy
import weakref

import pytest
import torch

import resnet_kernels as rk
from resnet_kernels.backends.gpu.training import tape
from resnet_kernels.testing import ODD_CASES

NHWC = torch.channels_last
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpreted, id="interpreted"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]
CASES = ODD_CASES[:2]


@pytest.fixture
def fresh(monkeypatch):
    tape.forget()
    # Libraries may add in any order else.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    yield
    tape.forget()


def step(model, x, dy):
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_recorded_steps_are_the_same_as_decided_ones(case, device, fresh, monkeypatch):
    model = torch.nn.Sequential(case.make()).to(device).train()
    rk.replace_blocks(model)
    twin = copy.deepcopy(model)
    with rk.use_backend("gpu"):
        for sizes in ((2, 4, 4), (3, 5, 3), (2, 4, 4)):
            x = torch.randn(sizes[0], case.inplanes, *sizes[1:], device=device).contiguous(memory_format=NHWC)
            with torch.no_grad():
                dy = torch.randn_like(copy.deepcopy(model)(x))
            got = step(model, x, dy)
            with monkeypatch.context() as without:
                without.setattr(tape, "MOST", 0)
                without.setattr(tape, "_tapes", {})
                want = step(twin, x, dy)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    # Forward and backward, of two sizes.
    assert len(tape._tapes) == 4 and not any(t.unknown for t, _ in tape._tapes.values())


@pytest.mark.interpreted
def test_what_differs_is_recorded_by_itself(fresh):
    def run(x, y):
        return tape.taped("add", [x, y], lambda: [x + y, x])

    a, b = torch.randn(2, 4)
    wide = torch.randn(8)
    for x, y in ((a, b), (a, a), (b, a), (wide[::2], a), (wide[1:5], a), (a.double(), b), (b, b)):
        total, first = run(x, y)
        assert torch.equal(total, x + y) and first is x
    # (a, b) and (b, a) are one kind, (a, a) and (b, b) another.
    assert len(tape._tapes) == 5


@pytest.mark.interpreted
def test_what_reads_numbers_or_takes_tensors_from_elsewhere_is_never_done_again(fresh):
    elsewhere = torch.zeros(3)

    def reads(x):
        return tape.taped("reads", [x], lambda: [x * 2 if x[0] > 0 else x * 3])

    def takes(x):
        return tape.taped("takes", [x], lambda: [x + elsewhere])

    for x in (torch.ones(3), -torch.ones(3)):
        assert torch.equal(reads(x)[0], x * (2 if x[0] > 0 else 3))
        elsewhere += 1
        assert torch.equal(takes(x)[0], x + elsewhere)
    assert all(t.unknown for t, _ in tape._tapes.values())


@pytest.mark.interpreted
def test_intermediates_are_let_go(fresh):
    alive = []

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            alive.append(sum(ref() is not None for ref in made))
            result = function(*args, **(kwargs or {}))
            made.append(weakref.ref(result))
            return result

    def run(x):
        def chain():
            t = x
            for _ in range(6):
                t = t + 1
            t * 2  # nobody looks at it
            return [t]

        return tape.taped("chain", [x], chain)

    for _ in range(2):
        made = []
        with Watching():
            run(torch.zeros(4))
        # The one before, and the one before that as long as it is an argument.
        assert max(alive) <= 2
    assert len(next(iter(tape._tapes.values()))[0].steps) == 6
