"""The end of a block whose branch is gated: the op against fp64, its gradients, and blocks with it."""

import copy
import pickle

import offline_launches
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_kernels as rk
from resnet_kernels.analysis import traffic
from resnet_kernels.backends import select
from resnet_kernels.backends.contract import BackendUnavailable
from resnet_kernels.inference import FrozenGated
from resnet_kernels.nn import gated
from resnet_kernels.nn.gated import why_plain
from resnet_kernels.ops import BlockSpec
from resnet_kernels.testing import assert_matches, calibrate_, randomize_

NHWC = torch.channels_last
interpreted = pytest.mark.interpreted
BACKENDS = [
    *(pytest.param(name, "cpu", id=name) for name in ("cpu", "library", "reference")),
    pytest.param("gpu", "cpu", marks=interpreted, id="triton-interpreted"),
    pytest.param("gpu", "cuda", marks=pytest.mark.gpu, id="triton-gpu"),
]
on = pytest.mark.parametrize("backend, device", BACKENDS)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
in_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# More rows of a map than are summed by one thread or program; channels that fill no vector; more than a chunk has.
SIZES = {
    "odd": (3, 21, 5, 7),
    "segments": (2, 9, 37, 33),
    "map-1x1": (5, 40, 1, 1),
    "wide": (1, 4100, 1, 2),
    "one-channel": (2, 1, 9, 4),
}
of_sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def draw(*sizes, dtype=torch.float32, device="cpu"):
    t = torch.randn(sizes).to(device, dtype)
    return t.contiguous(memory_format=NHWC) if t.dim() == 4 else t


def plain(z, gate=None, shortcut=None, relu=True):
    """By torch's modules, in the dtype of z."""
    t = z if gate is None else z * gate.to(z.dtype)[:, :, None, None]
    t = t if shortcut is None else t + shortcut
    return torch.relu(t) if relu else t


def step(function, inputs, dy, relu=True):
    inputs = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    y = function(*inputs, relu)
    y.backward(dy)
    return [y.detach(), *(None if t is None else t.grad for t in inputs)]


def exact_step(inputs, dy, y, relu=True):
    """In fp64, the gradients under the mask of the result y that is compared."""
    z, gate, shortcut = (None if t is None else t.double() for t in inputs)
    factor = torch.ones_like(z[:, :, :1, :1]) if gate is None else gate[:, :, None, None]
    g = torch.where(y <= 0, 0, dy.double()) if relu else dy.double()
    sums = (g * z).sum((2, 3))
    dgate = None if gate is None else sums.sum(1, keepdim=True) if gate.shape[1] != z.shape[1] else sums
    return [plain(z, gate, shortcut, relu), g * factor, dgate, None if shortcut is None else g]


@on
@in_dtypes
@of_sizes
@pytest.mark.parametrize("gated", ["channel", "image", "none"])
def test_a_step_is_as_accurate_as_torchs(gated, sizes, dtype, backend, device, poisoned):
    N, K = sizes[:2]
    gate = {"channel": draw(N, K).sigmoid(), "image": (torch.rand(N, 1) > 0.4) / 0.6, "none": None}[gated]
    gate = None if gate is None else gate.to(device, dtype)
    for shortcut, relu in ((True, True), (False, True), (True, False), (False, False)):
        inputs = draw(*sizes, dtype=dtype, device=device), gate, draw(*sizes, dtype=dtype, device=device)
        inputs = inputs if shortcut else (*inputs[:2], None)
        dy = draw(*sizes, dtype=dtype, device=device)
        with rk.use_backend(backend):
            ours = step(rk.ops.gated_tail, inputs, dy, relu)
        eager = step(plain, inputs, dy, relu)
        exact = exact_step(inputs, dy, ours[0], relu)
        eager_exact = exact_step(inputs, dy, eager[0], relu)
        assert ours[0].is_contiguous(memory_format=NHWC)
        for name, a, b, c, d in zip(("y", "dz", "dgate", "ds"), ours, eager, exact, eager_exact, strict=True):
            assert (a is None) == (c is None), name
            if c is not None:
                # Eager's error is that under its own mask.
                assert_matches(a, (c + (b.double() - d)).to(b.dtype), c, K * sizes[2] * sizes[3], name)


@on
@in_dtypes
def test_nan_and_inf_stand_where_torch_has_them(dtype, backend, device):
    inf, nan = float("inf"), float("nan")
    z = draw(2, 19, 4, 5, dtype=dtype, device=device)
    shortcut, gate = torch.zeros_like(z), draw(2, 19, dtype=dtype, device=device).sigmoid()
    z[0, 3, 1, 2], z[1, 18, 3, 4], z[0, 0, 0, 0] = nan, inf, -inf
    shortcut[1, 7, 2, 2], shortcut[1, 18, 3, 4] = nan, -inf
    gate[1, 0], gate[0, 18] = nan, 0
    z[0, 18, 0, 0] = inf
    dy = draw(2, 19, 4, 5, dtype=dtype, device=device)
    dy[1, 2, 0, 0], shortcut[1, 2, 0, 0], z[1, 2, 0, 0] = nan, 1, 1
    with rk.use_backend(backend):
        ours = step(rk.ops.gated_tail, (z, gate, shortcut), dy)
    for a, b in zip(ours, step(plain, (z, gate, shortcut), dy), strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())
        assert a.isnan().any()


@on
def test_any_layout_and_none_of_an_image(backend, device):
    nchw = torch.randn(2, 6, 5, 4, device=device)
    gate, shortcut = torch.rand(6, 2, device=device).t(), torch.randn(2, 12, 5, 4, device=device)[:, ::2]
    with rk.use_backend(backend):
        y = rk.ops.gated_tail(nchw, gate, shortcut)
        torch.testing.assert_close(y, plain(nchw, gate, shortcut))
        for sizes in ((0, 6, 5, 4), (2, 6, 0, 4)):
            empty = torch.empty(sizes, device=device)
            found = step(rk.ops.gated_tail, (empty, gate[: sizes[0]], empty), empty)
            assert found[0].shape == sizes and found[2].shape == (sizes[0], 6) and not found[2].any()


def test_the_gradient_is_the_same_with_any_number_of_threads():
    z, gate, dy = draw(2, 67, 37, 33), torch.rand(2, 67), draw(2, 67, 37, 33)
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with rk.use_backend("cpu"):
                found.append(step(rk.ops.gated_tail, (z, gate, z.flip(0)), dy))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("gated, shortcut", [(True, True), (True, False), (False, True)])
def test_first_and_second_derivatives(gated, shortcut, relu):
    z = draw(2, 3, 2, 2).double().requires_grad_()
    gate = torch.rand(2, 3, dtype=torch.float64, requires_grad=True) if gated else None
    s = draw(2, 3, 2, 2).double().requires_grad_() if shortcut else None
    with rk.use_backend("reference"):
        inputs = [t for t in (z, gate, s) if t is not None]

        def function(*tensors):
            rest = iter(tensors)
            return rk.ops.gated_tail(*(None if t is None else next(rest) for t in (z, gate, s)), relu)

        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_what_torch_asks_of_an_op():
    z, gate, s = draw(2, 5, 4, 3), torch.rand(2, 5), draw(2, 5, 4, 3)
    op = torch.ops.resnet_kernels.gated_tail
    for arguments in ((z, gate, s), (z, None, s), (z, gate, None)):
        for relu in (True, False):
            wanted = [None if t is None else t.clone().requires_grad_() for t in arguments]
            torch.library.opcheck(op, (*wanted, relu, "cpu"))


def test_compiled_whole():
    inputs = draw(2, 5, 4, 3), torch.rand(2, 5), draw(2, 5, 4, 3)
    compiled = torch.compile(rk.ops.gated_tail, fullgraph=True, backend="aot_eager")
    dy = draw(2, 5, 4, 3)
    for a, b in zip(step(compiled, inputs, dy), step(rk.ops.gated_tail, inputs, dy), strict=True):
        torch.testing.assert_close(a, b)


def test_what_does_not_fit_is_named():
    z = draw(2, 5, 4, 3)
    for arguments, error, says in (
        ((z[0],), ValueError, r"z: expected \(N, K, P, Q\), got \(5, 4, 3\)"),
        ((z.int(),), TypeError, "z: expected a floating dtype, got torch.int32"),
        ((z, torch.rand(2, 4)), ValueError, r"gate: expected \(2, 5\) or \(2, 1\), got \(2, 4\)"),
        ((z, torch.ones(2, 5, dtype=torch.long)), TypeError, "gate: expected a floating dtype"),
        ((z, None, z.half()), TypeError, "shortcut: expected torch.float32 on cpu, got torch.float16"),
        ((z, None, z[:1]), ValueError, r"shortcut: expected \(2, 5, 4, 3\), as z, got \(1, 5, 4, 3\)"),
    ):
        with pytest.raises(error, match=says):
            rk.ops.gated_tail(*arguments)
    with rk.use_backend("gpu:cuda"), pytest.raises(BackendUnavailable, match="not implemented here: gated"):
        rk.ops.gated_tail(z)


def test_triton_is_chosen_by_name_alone():
    call = rk.ops.gating.call_of_gated(torch.device("cuda"), torch.float32)
    assert select.choose(call).NAME == "library" and select.ONLY_BY_NAME["gpu"] == select.reasons(call)["gpu"]


@offline_launches.of_one_triton
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@in_dtypes
def test_kernels_compile_clean(dtype, arch):
    launches = offline_launches.launches_of_gates(dtype, arch)
    assert [made.name for made in launches] == ["gated", "gated_grad"] * 2
    for made, compiled in offline_launches.read(launches, arch):
        assert not compiled.wrong() and compiled.programs >= 1, compiled.wrong()
        assert compiled.nan_max or made.name != "gated"
    itemsize, M = dtype.itemsize, 2 * 56 * 56
    assert launches[0].work.bytes == 3 * M * 256 * itemsize + 4 * 2 * 256
    assert launches[1].work.bytes == 5 * M * 256 * itemsize + 4 * 2 * 256 * (1 + 4)


# The chain in front of it, with known statistics: an op without shortcut.


@pytest.mark.parametrize("relu", [True, False])
def test_a_chain_without_a_shortcut(relu):
    x = draw(2, 8, 6, 5)
    weights, vectors = [torch.randn(16, 8, 1, 1), torch.randn(16, 16, 3, 3)], [torch.randn(16) for _ in range(4)]
    ones = (1, 1)

    def plainly(x, w1, w2, a1, a2, b1, b2):
        h = F.conv2d(x, w1) * a1[:, None, None] + b1[:, None, None]
        y = F.conv2d(torch.relu(h), w2, padding=1) * a2[:, None, None] + b2[:, None, None]
        return torch.relu(y) if relu else y

    def ours(x, w1, w2, a1, a2, b1, b2):
        return rk.ops.residual_block(x, [w1, w2], [a1, a2], [b1, b2], BlockSpec(ones, ones, ones, "none", relu))

    inputs = [x, *weights, *vectors]
    doubles = [t.double().requires_grad_() for t in inputs]
    for backend in ("cpu", "library", "reference"):
        with rk.use_backend(backend):
            assert_matches(ours(*inputs), plainly(*inputs), plainly(*doubles), 144, backend)
    with rk.use_backend("reference"):
        assert torch.autograd.gradcheck(ours, doubles, fast_mode=True)


def test_only_a_chain_without_a_shortcut_may_end_without_a_relu():
    w, a = [torch.randn(4, 4, 1, 1)], [torch.randn(4)]
    with pytest.raises(ValueError, match="relu: expected True with shortcut 'identity'"):
        rk.ops.residual_block(draw(1, 4, 2, 2), w, a, a, BlockSpec((1,), (1,), (1,), "identity", False))


# Blocks. As in test_where_used, ReLUs are decided: one that flips moves gradients by more than all rounding does.

KINDS = {
    "se-basic": (rk.nn.SEBasicBlock, dict()),
    "se-bottleneck": (rk.nn.SEBottleneck, dict()),
    "se-grouped-drop": (rk.nn.SEBottleneck, dict(groups=2, base_width=32, drop_path=0.4)),
    "drop": (rk.nn.GatedBottleneck, dict(drop_path=0.4)),
}


def block(name, option="B", down=True):
    kind, options = KINDS[name]
    stride, planes = (2, 32) if down else (1, 16)
    inplanes = planes * kind.expansion // stride
    shortcut = rk.nn.make_shortcut(option, inplanes, planes * kind.expansion, stride)
    made = randomize_(kind(inplanes, planes, stride, shortcut, **options))
    ends = {made.bn3 if hasattr(made, "bn3") else made.bn2}
    ends |= {m for m in made.downsample.modules()} if made.downsample is not None else set()
    for bn in made.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.bias.data.fill_(8)
            if bn not in ends:
                bn.bias.data[1::2] = -8
    if made.se is not None:
        made.se.fc1.bias.data.fill_(20)
        made.se.fc1.bias.data[1::2] = -20
        made.se.fc2.weight.data.mul_(0.05)
    x = torch.relu(draw(8, inplanes, 8, 6))
    return calibrate_(made.to(memory_format=NHWC), x), x


def run(module, x, dy):
    module, x = copy.deepcopy(module), x.clone().requires_grad_()
    torch.manual_seed(3)  # of what is dropped
    y = module(x)
    y.backward(dy)
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "x": x.grad} | grads | dict(module.named_buffers())


@pytest.mark.parametrize("training", [True, False])
@in_dtypes
@pytest.mark.parametrize("option, down", [("B", True), ("A", True), ("B", False)], ids=["B", "A", "identity"])
@pytest.mark.parametrize("name", KINDS)
def test_blocks(name, option, down, dtype, training, poisoned):
    """Errors of several draws together: vectors of a few channels are decided by chance."""
    found = {}
    for _ in range(3):
        made, x = block(name, option, down)
        made, x = made.to(dtype).train(training), x.to(dtype)
        dy = draw(8, *(made(x).shape[1:]), dtype=dtype)
        assert why_plain(made, x) is None
        with rk.use_backend("eager"):
            eager = run(made, x, dy)
            exact = run(copy.deepcopy(made).double(), x.double(), dy.double())
        for key, got in run(made, x, dy).items():
            if got.is_floating_point():
                found.setdefault(key, []).append((got, eager[key], exact[key]))
            else:
                assert torch.equal(got, eager[key]), key
    for key, draws in found.items():
        assert_matches(*(torch.stack(t) for t in zip(*draws, strict=True)), x.numel(), key, maximum=key == "y")


def test_the_plain_chain_drops_what_the_fused_one_drops():
    made, x = block("drop")
    for scale in (made.train(), made.eval()):
        found = []
        for backend in (None, "eager"):
            with rk.use_backend(backend):
                torch.manual_seed(11)
                found.append(scale(x))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    drop = gated.drop_gate(x.new_empty(20000, 1, 1, 1), 0.25, True)
    assert set(drop.unique().tolist()) == {0.0, float(1 / torch.tensor(0.75))} and abs(float(drop.mean()) - 1) < 0.05


def test_what_runs_as_modules_and_what_makes_the_chain_plain():
    made, x = block("se-grouped-drop")
    seen = []
    want = made.eval()(x)
    for name in ("se", "se.fc1", "drop_path"):
        handle = made.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.append(name))
        assert why_plain(made, x) is None
        torch.testing.assert_close(made(x), want, rtol=1e-4, atol=1e-4)
        handle.remove()
    assert seen == ["se", "se.fc1", "drop_path"]
    made.downsample[1].register_forward_hook(lambda *a: seen.append("shortcut"))
    assert why_plain(made, x) is None and seen.pop() != made(x) and seen[-1] == "shortcut"
    made.bn2.register_forward_hook(lambda *a: None)
    assert why_plain(made, x) == "bn2 carries a forward hook"
    with rk.use_backend("cpu"), pytest.raises(BackendUnavailable, match="bn2 carries a forward hook"):
        made(x)
    made.bn2 = nn.GroupNorm(4, 64)
    assert "bn2: expected one of BatchNorm2d" in why_plain(made, x)
    made, x = block("se-basic")
    with rk.use_backend("gpu:cuda"):
        assert "not implemented here: gated" in why_plain(made.eval(), x)


@pytest.mark.parametrize("training", [True, False])
def test_blocks_compile_whole(training):
    torch._dynamo.reset()
    made, x = block("se-grouped-drop")
    made.train(training)
    made.drop_path.p = 0.0 if training else 0.4  # a compiler draws in its own way
    compiled = torch.compile(copy.deepcopy(made), fullgraph=True, backend="aot_eager")
    dy = draw(*made(x).shape)
    found = []
    for module in (compiled, made):
        a = x.clone().requires_grad_()
        y = module(a)
        y.backward(dy)
        found.append((y, a.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_autocast():
    made, x = block("se-bottleneck", down=False)
    x16 = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert why_plain(made, x16) is None
        got = made(x16)
        with rk.use_backend("eager"):
            want = made(x16)
    assert got.dtype == want.dtype == torch.bfloat16
    exact = copy.deepcopy(made).double()(x16.double())
    assert_matches(got, want, exact, x.numel())


def test_replaced_already_explained_and_frozen():
    model = rk.models.seresnet50(num_classes=7, drop_path=0.2)
    report = rk.replace_blocks(model)
    assert not report.replaced and set(report.skipped.values()) == {"it is fused already"}
    x = torch.randn(2, 3, 64, 64)
    randomize_(model).eval()
    assert [e.why_plain for e in rk.explain(model, x)] == [None] * 16
    frozen = rk.freeze(model)
    assert len(frozen.fused) == 16 and not frozen.left
    for part in (frozen, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        with torch.no_grad(), rk.use_backend("eager"):
            want, exact = model(x), copy.deepcopy(model).double()(x.double())
        assert_matches(part(x), want, exact, 9 * 2048)
    ends = [m for m in frozen.modules() if isinstance(m, FrozenGated)]
    assert len(ends) == 16 and all(m.last is not None and m.squeeze is not None for m in ends)
    assert rk.explain(frozen, x)
    with torch.no_grad():
        model.layer1[0].se.fc2.bias.add_(1)
    frozen.refresh()
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-3, atol=1e-3)
    model.layer1[1].drop_path.train()
    assert rk.freeze(model).left == {"layer1.1": "its drop_path is in training mode"}


def test_traffic_is_counted_of_blocks_that_are_one_op_alone():
    for module in (rk.models.seresnet18(), rk.nn.SEBottleneck(64, 16)):
        with pytest.raises(TypeError, match="expected blocks that are one op, got SEB"):
            traffic.block_sizes(module, (2, 3 if hasattr(module, "fc") else 64, 32, 32))
