"""The backend `cuda` without a GPU: its source, launchers and kernels, compiled by g++ and run on fibers
(tests/emulation); and its machine code, read."""

import copy
import ctypes
import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path

import emulated as emulation
import pytest
import test_contract as contract
import test_training as training
import torch

import resnet_kernels as rk
from resnet_kernels.backends import extension, reference, select
from resnet_kernels.backends.contract import Affine, Call, Epilogue, Geometry, Moments, Normalized, Operand, Stats
from resnet_kernels.backends.gpu import cuda
from resnet_kernels.backends.gpu.cuda import calls
from resnet_kernels.testing import assert_matches

NHWC = torch.channels_last


class Emulated(calls.Library):
    """The kernels on CPU tensors. multiprocessors: few, so that a thread has many rows, or many, so that there are
    parts."""

    device = "cpu"
    processors = 2

    def why_not(self, device):
        return None

    def run(self, name, call, device):
        self.invoke(name, call, None)

    def multiprocessors(self, device):
        return self.processors


@pytest.fixture(scope="module")
def built():
    return Emulated(emulation.cuda(), "")


@pytest.fixture
def emulated(built, monkeypatch):
    monkeypatch.setattr(calls, "load", lambda: (built, None))
    monkeypatch.setattr(cuda, "load", lambda: (built, None))
    select._choose.cache_clear()
    yield built
    select._choose.cache_clear()


# The contract's own tests, of this backend on a CPU.

DTYPES = contract.DTYPES


def each(*names):
    return pytest.mark.parametrize("name", names or tuple(contract.CONVS))


@each()
@pytest.mark.parametrize("dtype", DTYPES)
def test_conv(emulated, name, dtype, poisoned):
    contract.check_conv(cuda, "cpu", DTYPES[dtype], name, with_residual=dtype != "fp16", relu=True)
    contract.check_conv(cuda, "cpu", DTYPES[dtype], name, with_residual=False, relu=False)


@pytest.mark.parametrize(
    "test",
    [
        contract.test_conv_with_packed_weights_and_two_products,
        contract.test_conv_of_a_sliced_and_an_expanded_operand,
        contract.test_conv_may_take_the_residuals_memory_only_when_told,
    ],
)
def test_convs_of_the_contract(emulated, test):
    test(cuda, "cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf(emulated, value):
    for dtype in (torch.float32, torch.bfloat16):
        contract.test_nan_and_inf_go_through_conv_and_relu(cuda, "cpu", dtype, value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bn_pass(emulated, dtype, poisoned):
    for terms in ("relu", "affine", "shift-residual-relu"):
        contract.test_bn_pass(cuda, "cpu", terms, DTYPES[dtype], None, poisoned)
    contract.test_bn_pass(cuda, "cpu", "affine", DTYPES[dtype], contract.Pool(3, 2, 1), poisoned)
    contract.test_bn_pass_of_a_lazy_operand(cuda, "cpu", DTYPES[dtype], poisoned)


@each("1x1", "3x3-down-odd", "odd-channels", "map-1x1")
@pytest.mark.parametrize("dtype", DTYPES)
def test_conv_of_a_lazy_operand(emulated, name, dtype, poisoned):
    for stride in (1, 2):
        contract.test_conv_of_a_lazy_operand(cuda, "cpu", name, DTYPES[dtype], stride, stride == 1, poisoned)


@each(*(n for n, c in contract.WGRADS.items() if c[0][1] < 500 and c[1][0] < 200))
def test_gradients_of_a_convolution(emulated, name, poisoned):
    for lazy in (False, True):
        contract.test_gradients_of_a_convolution(cuda, "cpu", name, lazy, poisoned)


@pytest.mark.parametrize("C", [16, 21, 300])
def test_moments_statistics_and_sums(emulated, C, poisoned):
    contract.test_moments_statistics_and_sums(cuda, "cpu", C, poisoned)


@pytest.mark.parametrize("pool", contract.POOLS, ids=lambda p: "-".join(map(str, p)))
def test_pooling(emulated, pool, poisoned):
    for dtype in (torch.float32, torch.float16):
        contract.test_pooling_tells_its_winners_and_they_get_the_gradient(cuda, "cpu", pool, dtype, poisoned)


def test_residuals_of_fewer_channels_and_rows(emulated, poisoned):
    contract.test_residuals_of_fewer_channels_and_rows(cuda, "cpu", poisoned)


# What the contract's tests do not reach: 16 bits, many parts, memory that is not aligned, odd numbers.


def rows(N, C, H, W, dtype, mean=0.0):
    return (mean + torch.randn(N, C, H, W)).to(dtype).contiguous(memory_format=NHWC)


def matches(run, reduction, maximum=False):
    """run(primitives, to) -> tensors, of this backend against the reference. Twice the same bits."""
    got, again = run(cuda, lambda t: t), run(cuda, lambda t: t)
    want, exact = run(reference, lambda t: t), run(reference, torch.Tensor.double)
    for i, (mine, twice, theirs, true) in enumerate(zip(got, again, want, exact, strict=True)):
        assert torch.equal(mine.nan_to_num(), twice.nan_to_num()), f"result {i} is not the same twice"
        assert_matches(mine, theirs, true, reduction, f"result {i}", maximum=maximum)


OUTER = {  # N, H, W; K, C; stride
    "64": ((2, 17, 19), (64, 64), 1),
    "ragged": ((3, 13, 11), (40, 200), 1),
    "odd-channels": ((2, 9, 15), (21, 13), 1),
    "large-tiles": ((2, 13, 13), (136, 144), 1),
    "odd-large-tiles": ((1, 12, 12), (130, 131), 1),
    "few-rows": ((1, 3, 5), (16, 24), 1),
    "one-row": ((1, 1, 1), (8, 8), 1),
    "strided": ((2, 14, 15), (32, 48), 2),
    "many-parts": ((4, 37, 31), (8, 16), 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OUTER)
def test_weight_gradients_of_1x1(emulated, name, dtype, poisoned, monkeypatch):
    monkeypatch.setattr(emulated, "processors", 20)
    (N, H, W), (K, C), stride = OUTER[name]
    x, dtype = rows(N, C, H, W, DTYPES[dtype]), DTYPES[dtype]
    g = rows(N, K, -(-H // stride), -(-W // stride), dtype, 0.5)

    def run(primitives, to):
        return primitives.wgrad(Operand(to(g)), Operand(to(x)), (1, 1), Geometry(stride), sums=True)

    matches(run, g.numel() // K)


def test_long_sums_are_promoted(emulated, monkeypatch):
    """Of one sign, in one part: what tensor cores cut off at every step adds up."""
    monkeypatch.setattr(emulated, "processors", 1)
    g, x = (torch.rand(2, 8, 64, 64).add(1).bfloat16().contiguous(memory_format=NHWC) for _ in "gx")
    dweight, sums = cuda.wgrad(Operand(g), Operand(x), (1, 1), Geometry(), sums=True)
    exact, exact_sums = reference.wgrad(Operand(g.double()), Operand(x.double()), (1, 1), Geometry(), sums=True)
    assert ((dweight - exact) / exact).abs().max() < 5e-7 and ((sums - exact_sums) / exact_sums).abs().max() < 5e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C, sizes", [(16, (3, 37, 31)), (21, (2, 19, 17)), (136, (2, 17, 9)), (8, (1, 1, 1))])
def test_moments(emulated, C, sizes, dtype, poisoned, monkeypatch):
    """Also of a mean of 50 deviations, and of what masks and affines leave."""
    monkeypatch.setattr(emulated, "processors", 20)
    x = rows(sizes[0], C, *sizes[1:], DTYPES[dtype])
    a, b, keep = torch.rand(C) + 0.5, torch.randn(C), torch.rand(x.shape) > 0.3

    def run(primitives, to):
        h = Operand(to(x), (to(a), to(b)), relu=True, mask=keep)
        return primitives.moments(h)[1:3]

    matches(run, x.numel() // C)
    # In 16 bits what is summed is 2500 times the variance: of 7 digits a few are left, of eager's result none.
    far = rows(sizes[0], C, *sizes[1:], DTYPES[dtype], 50.0)
    got, exact = cuda.moments(Operand(far)), reference.moments(Operand(far.double()))
    assert (got.mean - exact.mean).norm() <= 1e-6 * exact.mean.norm()
    assert (got.M2 - exact.M2).norm() <= (1e-6 if dtype == "fp32" else 1e-2) * exact.M2.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [8, 13, 300])
def test_reductions_of_many_parts_and_large_means(emulated, C, dtype, poisoned, monkeypatch):
    monkeypatch.setattr(emulated, "processors", 7)
    dtype = DTYPES[dtype]
    x, t = rows(3, C, 23, 19, dtype, 50.0), rows(3, C, 23, 19, dtype)
    mean, rstd = 50 + torch.randn(C), torch.rand(C) + 0.5

    def run(primitives, to):
        stats = primitives.reduce(Operand(to(x)), "stats")
        sums = primitives.reduce(Operand(to(t)), Normalized(to(x), to(mean), to(rstd)))
        return *stats[1:], *sums

    matches(run, 3 * 23 * 19)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C, channels", [(24, slice(0, 16)), (40, slice(8, 32)), (24, slice(3, 19))])
def test_passes_of_views(emulated, C, channels, dtype, poisoned):
    """Channels, rows and columns out of larger tensors, aligned or not, with everything that an operand may hold."""
    dtype = DTYPES[dtype]
    big, second, other = (rows(3, C, 9, 11, dtype) for _ in range(3))
    n = channels.stop - channels.start
    a, b, a2, mean, shift, ra, rb, rstd = torch.randn(8, n)
    kept = torch.rand(2, n, 8, 10) > 0.4

    def run(primitives, to):
        x, second_, other_ = (to(t)[1:, channels, 1:, :-1] for t in (big, second, other))
        full = Operand(x, (to(a), to(b)), (second_, to(a2), to(mean)), relu=True, mask=kept)
        lazy_mask = Operand(other_, (to(ra), to(rb)), relu=True)
        results = []
        for by in (None, "stats", Normalized(other_, to(mean), to(rstd))):
            residual = Operand(second_, (to(ra), to(rb)), mask=kept)
            t, reduced = primitives.bn_pass(full, Epilogue(to(shift), residual, True, lazy_mask, by))
            results += [t, *(reduced[-2:] if by else ())]
        strided = dataclasses.replace(full, stride=2, mask=lazy_mask)
        few = Operand(other_[:, : n // 2, ::2, ::2][:, :, ::2, ::2])
        results.append(primitives.bn_pass(strided, Epilogue(residual=few, upsample=2, mask=kept[:, :, ::2, ::2]))[0])
        return results

    matches(run, 160)


def test_addresses_of_more_than_32_bits(emulated):
    """Two images 2^32 elements apart, of a tensor of which little is touched."""
    try:
        memory = torch.empty(2**32 + 4096, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("9 GB of address space are not to be had")
    far = memory.as_strided((2, 16, 3, 4), (2**32, 1, 64, 16))
    near = rows(2, 16, 3, 4, torch.bfloat16)
    far.copy_(near)
    a, b, a2, mean = torch.randn(4, 16)

    def run(t):
        lazy = Operand(t, (a, b), relu=True)
        operand = Operand(t, (a, b), (t, a2, mean), mask=lazy)
        y, sums = cuda.bn_pass(operand, Epilogue(None, lazy, mask=lazy, reduce=Normalized(t, mean, a)))
        return y, *sums, cuda.bn_pass(operand, Epilogue(reduce="mask"))[1]

    assert all(map(torch.equal, run(far), run(near)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [8, 13])
def test_bits_tell_what_is_kept(emulated, C, dtype):
    """Also of a map with a stride; a NaN is kept, and zeros of both signs are not."""
    x = rows(2, C, 5, 7, DTYPES[dtype])
    x[0, :, 0, 0], x[1, 1, 2, 2], x[1, 2, 2, 2], x[1, 3, 4, 4] = float("nan"), 0.0, -0.0, -float("inf")
    y, bits = cuda.bn_pass(Operand(x), Epilogue(reduce="mask"))
    assert tuple(bits.shape) == cuda.mask_size(x.shape) and torch.equal(y.nan_to_num(7), x.nan_to_num(7))
    keep = ~(x <= 0)
    expected = [(bits[:, c // 8] >> c % 8 & 1).view(2, 5, 7).bool() for c in range(C)]
    assert torch.equal(torch.stack(expected, 1), keep)
    t = rows(2, C, 5, 7, DTYPES[dtype])
    for stride in (1, 2):
        want, _ = cuda.bn_pass(Operand(t, mask=keep, stride=stride), Epilogue())
        for mask in (bits, Operand(x), x):
            got, _ = cuda.bn_pass(Operand(t, mask=mask, stride=stride), Epilogue())
            assert torch.equal(got, want)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_in_reductions_and_products(emulated, dtype, value):
    x, g = rows(2, 16, 9, 5, DTYPES[dtype]), rows(2, 24, 9, 5, DTYPES[dtype])
    x[1, 3, 2, 2] = value

    def run(primitives, to):
        stats = primitives.reduce(Operand(to(x)), "stats")
        dweight, _ = primitives.wgrad(Operand(to(g)), Operand(to(x)), (1, 1), Geometry())
        sums = primitives.reduce(Operand(to(x)), Normalized(to(g)[:, :16], torch.zeros(16), torch.ones(16)))
        return stats.M2, dweight, *sums, primitives.bn_pass(Operand(to(x), relu=True), Epilogue())[0]

    for mine, exact in zip(run(cuda, lambda t: t), run(reference, torch.Tensor.double), strict=True):
        assert torch.equal(mine.isnan(), exact.isnan()) and torch.equal(mine.isinf(), exact.isinf())


def test_no_rows(emulated):
    x, g = torch.randn(0, 8, 4, 4).contiguous(memory_format=NHWC), torch.randn(0, 16, 4, 4)
    t, stats = cuda.bn_pass(Operand(x), Epilogue(reduce="stats"))
    assert t.shape == x.shape and stats.rows == 0 and not stats.M2.any()
    dweight, sums = cuda.wgrad(Operand(g), Operand(x), (1, 1), Geometry(), sums=True)
    assert dweight.shape == (16, 8, 1, 1) and not dweight.any() and not sums.any()
    m = cuda.moments(Operand(x))
    assert m.rows == 0 and m.M2.shape == (8, 8) and not m.M2.any()


def moments_of(rows, J):
    h = torch.relu(torch.randn(rows, J)) + 0.25
    off = h - h.mean(0)
    return Moments(rows, h.mean(0), off.T @ off), h


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K, J", [(40, 24), (131, 70), (8, 3)])
def test_finalize(emulated, K, J, dtype, poisoned):
    """Against the algebra in fp64, with a centre and without."""
    m, _ = moments_of(97, J)
    w = (torch.randn(K, J) * J**-0.5).to(DTYPES[dtype])
    gamma, beta, sg, dbeta, dgamma = torch.randn(5, K)
    G, centre = torch.randn(K, J), m.mean.clone()
    # Means of -0.5 to 0.5 against a mean that is far: a rounding of it would show.
    stats = Stats(97, 30 + torch.randn(K), 97 * torch.rand(K))

    def run(primitives, to):
        wide = Moments(97, to(m.mean), to(m.M2))
        a, b = primitives.finalize_stats(Stats(97, *map(to, stats[1:])), to(gamma), to(beta), 1e-5)[:2]
        table = primitives.finalize_moments(wide, to(w), to(gamma), to(beta), 1e-5)
        affine = Affine.of(table)
        grads = primitives.finalize_bn_grad((to(dbeta), to(dgamma)), 97, affine)
        results = [a, b, *table, *grads]
        for c in (None, to(centre)):
            results += primitives.finalize_tail_grad(to(sg), to(G), c, wide, to(w), affine)
        return results

    matches(run, max(K, J))


def test_bad_input_is_named_before_anything_is_launched(emulated, monkeypatch):
    monkeypatch.setattr(emulated, "run", lambda name, *rest: pytest.fail(f"{name} was launched"))
    x, ones = rows(2, 8, 5, 5, torch.float32), torch.ones(8)
    by = Normalized(x[:, :, 1:], ones, ones)
    for call, error, says in [
        (lambda: cuda.bn_pass(Operand(x, (ones[:3], ones)), Epilogue()), ValueError, r"x: a: expected \(8,\) on cpu"),
        (lambda: cuda.bn_pass(Operand(x), Epilogue(shift=ones[:2])), ValueError, r"shift: expected \(8,\)"),
        (lambda: cuda.bn_pass(Operand(x), Epilogue(residual=Operand(x[:1]))), ValueError, "residual: expected"),
        (lambda: cuda.bn_pass(Operand(x), Epilogue(residual=Operand(x.half()))), TypeError, "residual: expected torch"),
        (lambda: cuda.bn_pass(Operand(x, mask=x[:, :4] > 0), Epilogue()), ValueError, r"mask: expected \(2, 8, 5, 5\)"),
        (lambda: cuda.bn_pass(Operand(x, mask=torch.zeros(3, 1).byte()), Epilogue()), ValueError, "bytes of bits"),
        (
            lambda: cuda.bn_pass(Operand(x.half(), centre=ones), Epilogue()),
            TypeError,
            "expected float32 where a centre",
        ),
        (lambda: cuda.reduce(Operand(x), by), ValueError, "normalized: expected"),
        (lambda: cuda.wgrad(Operand(x[:1]), Operand(x), (1, 1), Geometry()), ValueError, "expected x of 1 images"),
        (lambda: cuda.conv([], Epilogue()), ValueError, "expected at least one product"),
        (
            lambda: cuda.finalize_moments(moments_of(9, 4)[0], torch.randn(3, 5), ones[:3], ones[:3], 1e-5),
            ValueError,
            r"mean: expected \(5,\)",
        ),
    ]:
        with pytest.raises(error, match=says):
            call()


def test_a_launch_that_fails_tells_which(emulated):
    call = calls.Pass(type=7)
    with pytest.raises(RuntimeError, match="pass: expected a type of 0 to 2"):
        emulated.run("pass", call, torch.device("cpu"))


@pytest.mark.parametrize(
    "archs, capability, runs",
    [
        ("8.0;9.0a;10.0;12.0+PTX", (8, 6), True),
        ("8.0;9.0a;10.0;12.0+PTX", (9, 0), True),
        ("8.0;9.0a;10.0;12.0+PTX", (7, 5), False),
        ("8.0;9.0a;10.0;12.0+PTX", (13, 0), True),
        ("8.6", (8, 0), False),
        ("8.0 8.6", (8, 9), True),
        ("9.0a", (10, 0), False),
        ("10.0a", (10, 3), False),
    ],
)
def test_which_gpus_it_was_built_for(archs, capability, runs):
    assert calls.built_for(archs, capability) == runs


def test_it_is_chosen_by_name_only(emulated):
    call = Call(torch.device("cpu"), torch.float32, frozenset({"conv"}), (), ())
    assert cuda.why_not(call) is None and select.choose(call).NAME != cuda.NAME
    assert select.choose(call, cuda.NAME) is cuda
    assert "float64" in cuda.why_not(dataclasses.replace(call, dtype=torch.float64))
    assert "expected tensors on cpu" in cuda.why_not(dataclasses.replace(call, device=torch.device("meta")))


# Whole blocks, through the ops.


BLOCKS = {c.name: c for c in training.SMALL}
MANY = ["odd-channels-down", "basic-odd-down", "groups-down", "option-A-down", "basic-option-C", "by-moments", "stored"]
OF_DTYPES = {"fp32": MANY, "bf16": MANY, "fp16": ["basic-odd-down", "by-moments"]}


@pytest.mark.parametrize("dtype, name", [(dtype, name) for dtype, names in OF_DTYPES.items() for name in names])
def test_blocks(emulated, name, dtype, poisoned):
    case = BLOCKS[name]
    training.check(training.of_case(case), DTYPES[dtype], "gpu:cuda", draws=min(8, -(-64 // case.planes)))


@pytest.mark.parametrize("dtype, size", [("fp32", 100), ("bf16", 10)])
@pytest.mark.parametrize("case", [training.BY_MOMENTS, training.STORED], ids=str)
def test_blocks_of_large_means(emulated, case, dtype, size):
    training.check(lambda: training.adversarial(case, "large-mean", size), DTYPES[dtype], "gpu:cuda", draws=4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("frozen", [(2,), (0, 1, 2)], ids=["last", "all"])
@pytest.mark.parametrize("case", [training.BY_MOMENTS, training.STORED], ids=str)
def test_blocks_with_frozen_batch_norms(emulated, case, frozen, dtype, poisoned):
    def make():
        block = case.make().train()
        for i in frozen:
            (block.bn1, block.bn2, block.bn3)[i].eval()
        return block, case.input()

    training.check(make, DTYPES[dtype], "gpu:cuda", draws=3)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", [rk.nn.PreactivationBasicBlock, rk.nn.PreactivationBottleneck])
def test_preactivation(emulated, kind, stride, poisoned):
    """As the reference in fp64."""
    channels = 16 * kind.expansion
    shortcut = torch.nn.Conv2d(channels, channels, 1, stride, bias=False) if stride > 1 else None
    block = kind(channels, 16, stride, shortcut).train()
    x = torch.randn(3, channels, 9, 7)
    found = []
    for name, dtype in (("gpu:cuda", torch.float32), ("reference", torch.float64)):
        mine, leaf = copy.deepcopy(block).to(dtype), x.to(dtype, copy=True).requires_grad_()
        with rk.use_backend(name):
            y = mine(leaf)
            y.backward(torch.ones_like(y).cumsum(1) / channels)
        found.append({"y": y.detach(), "x": leaf.grad} | {n: p.grad for n, p in mine.named_parameters()})
    for name, exact in found[1].items():
        assert (found[0][name] - exact).norm() <= 1e-5 * exact.norm().clamp_min(1e-3), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["resnet", "odd-channels", "dilation"])
def test_stems(emulated, name, dtype, poisoned):
    training.check_stem(name, DTYPES[dtype], "gpu:cuda")


# The machine code, where it was built.


def cuobjdump(*options):
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton", reason="cuobjdump comes with CUDA or with triton; neither is here")
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    module, _ = extension.load()
    return subprocess.run([tool, *options, module.__file__], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def archs():
    module, reason = extension.load()
    if module is None:
        pytest.skip(reason)
    info = module.build_info()
    if info["cuda"] is None:
        by_choice = os.environ.get("RESNET_KERNELS_BUILD") == "cpu"
        assert by_choice or torch.version.cuda is None or shutil.which("nvcc") is None
        pytest.skip("built without CUDA: no nvcc, or a CPU-only torch")
    return info["archs"]


@pytest.fixture(scope="module")
def machine_code(archs):
    """By kernel with its template's arguments, mangled."""
    if "9.0a" not in archs:
        pytest.skip(f"read for sm_90a; built for {archs}")
    functions = re.split(r"Function : ", cuobjdump("-sass", "-arch", "sm_90a"))[1:]
    return {f.split()[0].removeprefix("_ZN14resnet_kernels"): f for f in functions}


def test_kernels_have_no_stack_and_spill_nothing(archs):
    usage = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", cuobjdump("--dump-resource-usage"))
    assert len(usage) >= 60 * len(re.findall(r"\d+\.\d", archs))
    assert all((stack, local) == ("0", "0") for _, stack, local in usage)


def test_passes_move_16_bytes_at_a_time(machine_code):
    """Reduced or not, full or not, in three dtypes; those that only reduce may still store."""
    aligned = [code for name, code in machine_code.items() if re.match(r"11pass_kernelI.*Li\dELb1ELb\dE", name)]
    assert len(aligned) == 24
    assert all("LDG.E.128" in code and "STG.E.128" in code for code in aligned)


def test_weight_gradients_and_moments_are_products_of_tensor_cores(machine_code):
    """In 16 bits, with large and small tiles; both operands transposed from shared memory, copied asynchronously."""
    kernels = {name: code for name, code in machine_code.items() if name.startswith("12outer_kernel")}
    assert len(kernels) == 8
    for name, code in kernels.items():
        assert ("HMMA.16816.F32.BF16" if "bfloat16" in name else "HMMA.16816.F32 ") in code, name
        assert re.search(r"LDSM\.16\.MT88\.4", code) and "FADD" in code, name
        aligned = re.search(r"Lb1EEE", name) is not None
        assert ("LDGSTS.E.BYPASS.128" in code) == aligned, name


def test_no_maximum_drops_nan(machine_code):
    for name, code in machine_code.items():
        assert not re.search(r"FMNMX(?!\.NAN)", code), name
    assert any("FMNMX.NAN" in code for code in machine_code.values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", training.RESNET_CASES + tuple(training.SMALL), ids=str)
def test_blocks_on_a_gpu(case, dtype):
    def make():
        return case.make().train().cuda(), case.input(device="cuda")

    training.check(make, DTYPES[dtype], "gpu:cuda", draws=-(-64 // case.planes))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", training.STEMS)
def test_stems_on_a_gpu(name, dtype):
    training.check_stem(name, DTYPES[dtype], "gpu:cuda", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("C", [1, 3, 8, 13, 64, 100, 2047, 2048])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bn_pass_at_every_width(C, dtype, poisoned):
    x, r = (torch.randn(3, C, 9, 7, device="cuda").to(DTYPES[dtype]).contiguous(memory_format=NHWC) for _ in "xr")
    x[1, 0, 2, 2] = float("nan")
    a, b = torch.randn(2, C, device="cuda")

    def run(backend, to):
        return backend.bn_pass(Operand(to(x), (to(a), to(b))), Epilogue(residual=Operand(to(r)), relu=True))[0]

    assert_matches(run(cuda, lambda t: t), run(reference, lambda t: t), run(reference, torch.Tensor.double))


def test_an_extension_of_other_sources_is_a_reason():
    class Old:
        __file__ = None  # this process: it has none of the functions

        @staticmethod
        def build_info():
            return {"cuda": 13000, "archs": "9.0a"}

    assert "built from other sources" in calls._opened.__wrapped__(Old)[1]


def test_a_library_of_other_structures_is_refused(built, monkeypatch):
    monkeypatch.setitem(calls.LAUNCHES, "outer", calls.Pass)
    with pytest.raises(OSError, match=f"outer: expected a structure of {ctypes.sizeof(calls.Pass)} bytes, got [0-9]+"):
        Emulated(emulation.cuda(), "")
