"""The CUDA C++ kernels for Hopper: what was built, read without a GPU; their results on one, and emulated."""

import collections
import copy
import ctypes
import dataclasses
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import emulated
import pytest
import test_contract as contract
import test_cuda
import test_training as training
import torch
import torch.nn.functional as F
import torchvision
from torch.nn.grad import conv2d_weight

import resnet_kernels as rk
from resnet_kernels.backends import extension, reference, select
from resnet_kernels.backends.contract import Call, Epilogue, Geometry, Operand, Product, accumulator_dtype
from resnet_kernels.backends.gpu import cuda, sm90
from resnet_kernels.backends.gpu.cuda import calls as cuda_library
from resnet_kernels.backends.gpu.sm90 import launchers
from resnet_kernels.testing import BlockCase, assert_matches

NHWC = torch.channels_last
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def library():
    found, reason = launchers.load()
    if found is None:
        module, _ = extension.load()
        built = module is not None and module.build_info()["cuda"] and "9.0a" in module.build_info()["archs"]
        assert not built, f"built for 9.0a, but {reason}"
        pytest.skip(reason)
    return Path(found.functions._name)


@pytest.fixture(params=[pytest.param("cpu", id="emulated"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where the kernels run."""
    if request.param == "cpu":
        library = launchers.declared(emulated.sm90())
        monkeypatch.setattr(launchers, "_run", lambda name, call, device: library.invoke(name, call, None))
        monkeypatch.setattr(launchers.glue, "multiprocessors", lambda device: 3)
        monkeypatch.setattr(launchers, "why_not_here", lambda device, dtype: None)
    return request.param


@pytest.fixture
def with_passes(device, monkeypatch):
    """The backend `cuda`'s kernels beside them."""
    if device == "cpu":
        built = test_cuda.Emulated(emulated.cuda(), "")
        monkeypatch.setattr(cuda_library, "load", lambda: (built, None))
        monkeypatch.setattr(cuda, "load", lambda: (built, None))
    select._choose.cache_clear()
    yield
    select._choose.cache_clear()


def too_large(device, elements):
    if device == "cpu" and elements > 200_000:
        pytest.skip("takes a GPU")


def cuobjdump(library, *options):
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton", reason="cuobjdump comes with CUDA or with triton; neither is here")
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *options, library], capture_output=True, text=True, check=True).stdout


def test_indices_are_those_of_brute_force(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    here = Path(__file__).parent
    program = tmp_path / "hopper_index"
    source, include = here / "hopper_index.cpp", here.parent / "csrc"
    subprocess.run([compiler, "-std=c++20", f"-I{include}", str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_tiles_are_those_that_were_built(library):
    assert launchers.load()[0].functions.resnet_kernels_sm90_tiles().decode().split() == list(launchers.NUMBERS)


# The digest of csrc/cuda/sm90 without comments and spaces. An NVIDIA H200 passed all tests marked gpu with an earlier
# version. Changed since then, and run by no GPU: `STATISTICS_TILES` and `SUMS_TILES`, which nothing chooses; in
# conv_act's tiles "turn" every warp hands the turn on, where one warp did so for all; and the launch of `tail` takes
# numbers of channels. All other machine code is the same; `test_machine_code.py` holds it.
PROVED = "d8370ba42a8b64ab"
# Files of kernels that no GPU has run: no rule chooses them; the backend by its name and a tuned table may.
UNPROVED = {f"{kernel}.{ending}" for kernel in ("wgrad", "wide_tail", "bottleneck") for ending in ("cu", "cuh", "h")}


def test_the_kernels_are_those_that_a_gpu_has_proved():
    folder = Path(__file__).parent.parent / "csrc/cuda/sm90"
    code = "".join(
        re.sub(r"//[^\n]*|\s", "", path.read_text()) for path in sorted(folder.iterdir()) if path.name not in UNPROVED
    )
    found = hashlib.sha256(code.encode()).hexdigest()[:16]
    assert found == PROVED, "changed: prove them again (pytest -m gpu tests/test_sm90.py), measure, and note it here"


def test_kernels_have_no_stack_and_the_registers_that_three_warp_groups_can_have(library):
    resources = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    usage = re.findall(resources, cuobjdump(library, "-res-usage"))
    kinds = [re.search(r"(conv_act|bottleneck|wide_tail|tail|pair|stem|wgrad)_kernel", name)[1] for name, *_ in usage]
    of_two = {"tail": 2, "wide_tail": 1, "bottleneck": 2, "stem": 1, "wgrad": 2}
    of_two |= {"conv_act": len(launchers.NUMBERS), "pair": len(launchers.PAIRS)}
    expected = {kind: 2 * n for kind, n in of_two.items()}
    assert {kind: kinds.count(kind) for kind in kinds} == expected
    # 65536 for 384 or 512 threads; the warp groups that multiply take more from the one that moves.
    assert all(int(reg) == (128 if kind == "stem" else 168) for kind, (_, reg, _, _) in zip(kinds, usage, strict=True))
    assert all((stack, local) == ("0", "0") for *_, stack, local in usage)


def test_kernels_multiply_by_wgmma_move_by_the_copy_engine_and_keep_nan(library):
    functions = re.split(r"Function : ", cuobjdump(library, "-sass"))[1:]
    for sass in functions:
        name = sass.split()[0]
        assert "HGMMA" in sass and "HMMA." not in sass, name
        assert "UTMALDG" in sass and ("UTMASTG" in sass or "wgrad" in name), name
        assert "LDL" not in sass and "STL" not in sass, name
        # fmaxf would make NaN a zero.
        assert not re.search(r"FMNMX(?!\.NAN)", sass), name
        # Products that ptxas serializes are awaited one by one.
        products, waits = len(re.findall(r"HGMMA", sass)), len(re.findall(r"WARPGROUP\.DEPBAR", sass))
        assert products >= 2 * waits, name


def test_what_cannot_run_is_told_before_it_is_launched(monkeypatch):
    cuda = torch.device("cuda")

    def why_not(shape=(64, 64, 1, 1), geometry=None, dtype=torch.bfloat16, device=cuda, needs=("conv",)):
        weights = ((shape, geometry or Geometry()),)
        return sm90.why_not(Call(device, dtype, frozenset(needs), weights))

    assert "expected tensors on cuda, got cpu" in why_not(device=torch.device("cpu"))
    monkeypatch.setattr(launchers, "why_not_here", lambda device, dtype: None)
    assert why_not() is None and why_not((256, 64, 3, 3), Geometry(2, 1)) is None
    assert "expected bfloat16, float16, got torch.float32" in why_not(dtype=torch.float32)
    assert "not implemented here: gated" in why_not(needs=("gated",))
    assert "expected one group, got 2" in why_not((64, 32, 3, 3), Geometry(1, 1, 1, 2))
    assert "expected channels in multiples of 8, got 12 and 64" in why_not((64, 12, 1, 1))
    assert "stride up to 8" in why_not((64, 64, 3, 3), Geometry(9, 1))
    assert "reach of the filter" in why_not((64, 64, 3, 3), Geometry(1, 64, 64))
    of_gradient = ("conv", "data_grad")
    assert why_not((64, 128, 3, 3), Geometry(1, 1), needs=of_gradient) is None
    assert "expected stride 1 and a square filter" in why_not((64, 64, 3, 3), Geometry(2, 1), needs=of_gradient)
    assert "expected stride 1 and a square filter" in why_not((64, 64, 1, 1), Geometry(1, 1), needs=of_gradient)


def test_a_missing_library_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(launchers, "__file__", str(tmp_path / "backends" / "gpu" / "sm90" / "launchers.py"))
    assert "were not built" in launchers.load.__wrapped__()[1]
    of_other_sources = ctypes.CDLL(None)  # this process: it has none of the functions
    with monkeypatch.context() as m:
        m.setattr(launchers.ctypes, "CDLL", lambda path: of_other_sources)
        (tmp_path / "_sm90.so").touch()
        says = "expected a structure of [0-9]+ bytes, got 0; build the package again"
        assert re.search(says, launchers.load.__wrapped__()[1])
    (tmp_path / "_sm90.so").write_text("no library")
    assert "do not load" in launchers.load.__wrapped__()[1]


def test_the_stem_tells_what_it_cannot_take():
    stem, g = (64, 3, 7, 7), Geometry(2, 3)
    assert launchers.why_not_stem(stem, g, 224) is None
    assert "even image width up to 224, got 225" in launchers.why_not_stem(stem, g, 225)
    assert "even image width up to 224, got 226" in launchers.why_not_stem(stem, g, 226)
    assert "7x7 convolution of stride 2" in launchers.why_not_stem((64, 3, 3, 3), Geometry(2, 1), 224)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("g, R", [(Geometry(1, 1), 3), (Geometry(1, 2, 2), 3), (Geometry(), 1), (Geometry(1, 0), 2)])
def test_the_backends_statistics_and_data_gradients(g, R, dtype, device, poisoned):
    x, weight = 3 + draw(3, 24, 9, 11, dtype=dtype, device=device), draw(72, 24, R, R, dtype=dtype, device=device)
    product = Product(Operand(x), weight, g, torch.rand(72, device=device))
    y, stats = sm90.conv([product], Epilogue(reduce="stats"))
    want, _ = reference.conv([product], Epilogue())
    torch.testing.assert_close(y, want, rtol=0.01, atol=0.1)
    exact = reference.reduce(Operand(y.double()), "stats")
    assert stats.rows == exact.rows
    for got, true in ((stats.mean, exact.mean), (stats.M2, exact.M2)):
        torch.testing.assert_close(got, true.float(), rtol=1e-5, atol=1e-5)
    nothing, stats = sm90.conv([Product(Operand(x[:0]), weight, g)], Epilogue(reduce="stats"))
    assert stats.rows == 0 == nothing.shape[0] and not stats.M2.any()
    back = Product(Operand(y), weight, g, torch.rand(24, device=device), data_grad_size=(9, 11))
    dx, _ = sm90.conv([back], Epilogue())
    torch.testing.assert_close(dx, reference.conv([back], Epilogue())[0], rtol=0.02, atol=0.5)


def draw(*sizes, dtype, device, scale=1.0):
    t = (torch.randn(sizes, device=device) * scale).to(dtype)
    return t.contiguous(memory_format=NHWC) if len(sizes) == 4 else t


def krsc(weight):
    return weight.permute(0, 2, 3, 1).contiguous()


def chain(x, weight, g, scale=None, shift=None, second=None, residual=None, relu=False):
    """What a user would write, every result rounded to x's dtype."""
    per_channel = [None if t is None else t.to(accumulator_dtype(x.dtype))[:, None, None] for t in (scale, shift)]
    t = F.conv2d(x, weight, None, *g)
    if per_channel[0] is not None:
        t = (t * per_channel[0]).to(x.dtype)
    if per_channel[1] is not None:
        t = (t + per_channel[1]).to(x.dtype)
    if second is not None:
        t = t + F.conv2d(*second)
    if residual is not None:
        t = t + residual
    return torch.relu(t) if relu else t


# x (N, C, H, W), K, filter, geometry, what is added: odd sizes, tails of tiles, slices of channels that are not full.
CONVS = {
    "1x1": ((5, 64, 7, 7), 136, 1, Geometry(), "residual relu"),
    "1x1-one-pixel": ((3, 8, 1, 1), 8, 1, Geometry(), "shift"),
    "1x1-wide": ((2, 264, 9, 5), 512, 1, Geometry(), "shift residual relu"),
    "1x1-two": ((3, 64, 13, 13), 256, 1, Geometry(), "second shift relu"),
    "1x1-two-odd": ((2, 72, 5, 11), 80, 1, Geometry(), "second residual"),
    "3x3": ((3, 40, 9, 9), 72, 3, Geometry(1, 1), "scale shift relu"),
    "3x3-down": ((2, 72, 11, 10), 64, 3, Geometry(2, 1), "shift residual relu"),
    "3x3-dilated": ((2, 64, 12, 9), 128, 3, Geometry(1, 2, 2), "scale shift"),
    "3x3-no-padding": ((1, 192, 6, 5), 320, 3, Geometry(), "residual"),
    "5x5": ((2, 16, 13, 7), 24, 5, Geometry(1, 2), "shift relu"),
    "2x2-stride-3": ((2, 128, 10, 8), 64, 2, Geometry(3, 0), ""),
    "many-tiles": ((64, 64, 28, 28), 256, 3, Geometry(1, 1), "shift residual relu"),
}


def drawn(name, dtype, device):
    """x, weight, geometry, what is added, and where the result goes."""
    sizes, K, R, g, what = CONVS[name]
    too_large(device, torch.Size(sizes).numel())
    weight = draw(K, sizes[1], R, R, dtype=dtype, device=device, scale=(sizes[1] * R * R) ** -0.5)
    maps = (g.output_size(n, R) for n in sizes[2:])
    y = torch.empty(sizes[0], K, *maps, device=device, dtype=dtype).to(memory_format=NHWC)
    return draw(*sizes, dtype=dtype, device=device), weight, g, what, y


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("tile", launchers.TILES)
def test_conv_act(tile, name, dtype, device, poisoned):
    x, weight, g, what, y = drawn(name, dtype, device)
    N, K, P, Q = y.shape
    scale, shift = (torch.randn(K, device=device) if part in what else None for part in ("scale", "shift"))
    residual = draw(N, K, P, Q, dtype=dtype, device=device) if "residual" in what else None
    second = None
    if "second" in what:
        # A view: what a projection of stride 2 samples.
        x2, weight2 = (
            draw(N, 136, 2 * P, 2 * Q, dtype=dtype, device=device),
            draw(K, 136, 1, 1, dtype=dtype, device=device, scale=0.1),
        )
        second = (x2[:, :, ::2, ::2], weight2)
    packed = None if second is None else (second[0], krsc(second[1]))
    run = (x, krsc(weight), y, g, tile, scale, shift, packed, residual, "relu" in what)
    launchers.conv_act(*run)
    eager = chain(x, weight, g, scale, shift, second, residual, "relu" in what)
    double = [None if t is None else t.double() for t in (scale, shift)]
    exact = chain(
        x.double(), weight.double(), g, *double, second and tuple(t.double() for t in second),
        None if residual is None else residual.double(), "relu" in what,
    )  # fmt: skip
    assert_matches(y, eager, exact, weight[0].numel())
    first = y.clone()
    launchers.conv_act(*run)
    assert torch.equal(y, first), "another result the second time"


def statistics_in_fp32(y):
    """Mean and squared deviations as batch norm takes them on a GPU, by Welford's formula in fp32 (torch on a CPU does
    it in fp64): where deviations are small beside the mean, all that fp32 leaves of them."""
    if y.is_cuda:
        var, mean = torch.var_mean(y.float(), (0, 2, 3), correction=0)
        return mean, var * (y.numel() // y.shape[1])
    mean, M2 = torch.zeros(2, y.shape[1])
    for i, row in enumerate(y.permute(0, 2, 3, 1).flatten(0, 2).float()):
        delta = row - mean
        mean = mean + delta / (i + 1)
        M2 = M2 + delta * (row - mean)
    return mean, M2


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("tile", launchers.STATISTICS_TILES)
def test_statistics_of_a_result(tile, name, dtype, device, poisoned):
    x, weight, g, what, y = drawn(name, dtype, device)
    plain, K = torch.empty_like(y), y.shape[1]
    rows = y.numel() // K
    shift = 5 + torch.randn(K, device=device)
    parts = torch.empty(2, -(-rows // 128), K, device=device)
    run = (x, krsc(weight), y, g, tile, None, shift, None, None, "relu" in what, parts)
    launchers.conv_act(*run)
    launchers.conv_act(x, krsc(weight), plain, g, tile.replace("stats", "turn"), None, shift, relu="relu" in what)
    assert torch.equal(y, plain)
    stats, exact = launchers.statistics_of(parts, rows), reference.reduce(Operand(y.double()), "stats")
    mean, M2 = statistics_in_fp32(y)
    assert_matches(stats.mean, mean, exact.mean, rows)
    assert_matches(stats.M2, M2, exact.M2, rows)
    first = parts.clone()
    launchers.conv_act(*run)
    assert torch.equal(parts, first), "another result the second time"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("tile", launchers.SUMS_TILES)
def test_masks_and_sums_of_a_result(tile, name, dtype, device, poisoned):
    x, weight, g, what, y = drawn(name, dtype, device)
    (N, K, P, Q), second = y.shape, None
    z, (shift, a, b, mean) = 3 + draw(N, K, P, Q, dtype=dtype, device=device), torch.randn(4, K, device=device)
    mean, b = mean + 3, b - 3 * a
    z[0, 1, 0, 0] = float("nan")
    if "second" in what:
        second = (draw(N, 72, P, Q, dtype=dtype, device=device), draw(K, 72, 1, 1, dtype=dtype, device=device) * 0.1)
    parts = torch.empty(2, -(-y.numel() // K // 128), K, device=device)
    packed = None if second is None else (second[0], krsc(second[1]))
    masks = torch.stack((shift, a, b, mean), 1)
    run = (x, krsc(weight), y, g, tile, None, None, packed, z, False, parts, masks)
    launchers.conv_act(*run)

    def plain(w):
        """Where and what, and the sums of what came out above."""
        h = torch.relu(a[:, None, None].to(w) * z.to(w) + b[:, None, None].to(w)).to(dtype)
        t = chain(x.to(w), weight.to(w), g, shift=shift.to(w), second=second and tuple(v.to(w) for v in second))
        off = z.to(w) - mean[:, None, None].to(w)
        return torch.where(h <= 0, 0, t), y.to(w).sum((0, 2, 3)), (y.to(w) * off).sum((0, 2, 3))

    exact, eager = plain(torch.float64), plain(torch.float32)
    # A mask may fall the other way where what it masks by is within rounding of zero.
    flipped = (exact[0] == 0) != (y == 0)
    edge = a[:, None, None].double() * z.double() + b[:, None, None].double()
    assert (edge[flipped].abs() < 1e-5).all()
    assert_matches(
        torch.where(flipped, 0, y),
        torch.where(flipped, 0, eager[0]).to(dtype),
        torch.where(flipped, 0, exact[0]),
        weight[0].numel(),
    )
    for got, e, d in zip(parts.sum(1), eager[1:], exact[1:], strict=True):
        assert torch.equal(got.isnan(), d.isnan())
        assert_matches(got, e, d, y.numel() // K)
    assert y.isfinite().any() and (y == 0).any()
    first = y.clone(), parts.clone()
    launchers.conv_act(*run)
    assert torch.equal(y, first[0]) and torch.equal(parts.nan_to_num(7), first[1].nan_to_num(7)), "another result"


def test_conv_act_reads_views_and_keeps_nan(device):
    whole = draw(4, 64, 20, 24, dtype=torch.bfloat16, device=device)
    whole[1, 5, 6, 8] = float("nan")
    x, weight = whole[1:3, :, 2:17, 4::2], draw(128, 64, 3, 3, dtype=torch.bfloat16, device=device, scale=0.04)
    y = torch.empty(2, 128, 15, 10, device=device, dtype=x.dtype).to(memory_format=NHWC)
    shift = torch.randn(128, device=device)
    launchers.conv_act(x, krsc(weight), y, Geometry(1, 1), "turn128x128", shift=shift, relu=True)
    eager = chain(x, weight, Geometry(1, 1), shift=shift, relu=True)
    exact = chain(x.double(), weight.double(), Geometry(1, 1), shift=shift.double(), relu=True)
    assert torch.equal(y.isnan(), exact.isnan()) and y.isnan().any()
    assert_matches(y, eager, exact, 576)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("columns", launchers.WGRAD_COLUMNS)
def test_parts_of_a_weight_gradient(columns, name, dtype, device, poisoned):
    x, weight, g, _, y = drawn(name, dtype, device)
    dy, (K, C, R, _) = draw(*y.shape, dtype=dtype, device=device), weight.shape
    M = dy.numel() // K
    span = 256 if M > 256 else 128
    parts = torch.empty(-(-M // span), K, R, R, C, device=device)
    sums = parts.new_empty(len(parts), K)
    run = (dy, x, (R, R), g, span, columns, parts, sums)
    launchers.wgrad_parts(*run)
    shape = (K, C, R, R)
    exact, eager = (conv2d_weight(x.to(w), shape, dy.to(w), *g) for w in (torch.float64, torch.float32))
    assert_matches(parts.sum(0).permute(0, 3, 1, 2), eager, exact, M)
    rows = dy.permute(0, 2, 3, 1).flatten(0, 2)
    for i, some in enumerate(rows.split(span)):
        assert_matches(sums[i], some.float().sum(0), some.double().sum(0), span)
    first = parts.clone()
    launchers.wgrad_parts(*run)
    assert torch.equal(parts, first), "another result the second time"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_weight_gradients_of_views_keep_nan(dtype, device, poisoned):
    x = draw(3, 40, 14, 9, dtype=dtype, device=device)
    whole = draw(3, 80, 7, 5, dtype=dtype, device=device)
    g, geometry = whole[:, 8:], Geometry(2, 1)
    got, sums = sm90.wgrad(Operand(g), Operand(x), (3, 3), geometry, sums=True)
    eager, _ = reference.wgrad(Operand(g), Operand(x), (3, 3), geometry)
    exact, totals = reference.wgrad(Operand(g.double()), Operand(x.double()), (3, 3), geometry, sums=True)
    assert_matches(got, eager, exact, 105)
    assert_matches(sums, g.float().sum((0, 2, 3)), totals, 105)
    one, _ = sm90.wgrad(Operand(whole), Operand(x, stride=2), (1, 1), Geometry())
    eager, exact = (
        reference.wgrad(Operand(whole.to(w)), Operand(x.to(w), stride=2), (1, 1), Geometry())[0]
        for w in (torch.float32, torch.float64)
    )
    assert_matches(one, eager, exact, 105)
    x[1, 5, 6, 8] = float("nan")
    got, _ = sm90.wgrad(Operand(g), Operand(x), (3, 3), geometry)
    exact, _ = reference.wgrad(Operand(g.double()), Operand(x.double()), (3, 3), geometry)
    assert torch.equal(got.isnan(), exact.isnan()) and got.isnan().any()
    nothing, sums = sm90.wgrad(Operand(g[:0]), Operand(x[:0]), (3, 3), geometry, sums=True)
    assert nothing.shape == (72, 40, 3, 3) and not nothing.any() and not sums.any()


@pytest.mark.parametrize("mean", [0.0, 5.0])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("J", [8, 64, 136, 296])
def test_moments(J, dtype, mean, device, poisoned):
    h = (mean + draw(3, J, 19, 23, dtype=torch.float32, device=device)).to(dtype).contiguous(memory_format=NHWC)
    got, exact = sm90.moments(Operand(h)), reference.moments(Operand(h.double()))
    # As a product in fp32, of which the mean's is then subtracted: what is lost grows with the mean's square.
    rows = h.permute(0, 2, 3, 1).flatten(0, 2).float()
    products = (rows.T @ rows).double() - len(rows) * exact.mean[:, None] * exact.mean
    assert got.rows == exact.rows
    assert_matches(got.mean, rows.mean(0), exact.mean, got.rows)
    assert_matches(got.M2, products.float(), exact.M2, got.rows)
    assert torch.equal(got.M2, got.M2.T)
    nothing = sm90.moments(Operand(h[:0]))
    assert nothing.rows == 0 and nothing.mean.isnan().all() and not nothing.M2.any()


def test_parts_fill_the_multiprocessors():
    for M, K, C, taps in ((802816, 64, 256, 1), (200704, 128, 512, 1), (12544, 512, 512, 9), (50176, 256, 256, 9)):
        columns = launchers.wgrad_columns(C, taps)
        tiles = launchers.wgrad_tiles(K, C, taps, columns)
        span = launchers.wgrad_span(M, tiles, K * C * taps, 132)
        parts = -(-M // span)
        assert span % launchers.FLUSH == 0 and (parts - 1) * span < M
        rounds = tiles * parts / 132
        assert rounds / -(-rounds // 1) > 0.85, (M, K, C, taps, parts)
    assert launchers.wgrad_span(5, 1, 64, 132) == launchers.FLUSH


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "J, K, ahead, N, H, W",
    [
        *((64, 256, ahead, *map) for ahead in (64, 128) for map in ((3, 56, 56), (2, 5, 7), (1, 1, 1), (40, 15, 56))),
        # Of a tile the second half beyond the map, in part, and whole; rows alone; fewer tiles than warp groups; more.
        *((128, *rest) for rest in ((512, 128, 1, 28, 28), (64, 128, 2, 5, 20), (192, 128, 1, 1, 1))),
        *((128, *rest) for rest in ((128, 128, 2, 14, 14), (512, 128, 90, 28, 28), (64, 128, 7, 9, 5))),
    ],
)
def test_tail(J, K, ahead, N, H, W, dtype, device, poisoned):
    too_large(device, N * J * H * W)
    x = torch.relu(draw(N, J, H, W, dtype=dtype, device=device))
    residual = draw(N, K, H, W, dtype=dtype, device=device)
    if W > 8:
        x[0, 3, 2, 8] = float("nan")
    shapes = [(J, J, 3, 3), (K, J, 1, 1), (ahead, K, 1, 1)]
    weights = [draw(*s, dtype=dtype, device=device, scale=(s[1] * s[2] * s[3]) ** -0.5) for s in shapes]
    shifts = [torch.randn(s[0], device=device) for s in shapes]
    y, after = (torch.empty(N, k, H, W, device=device, dtype=dtype).to(memory_format=NHWC) for k in (K, ahead))
    run = (x, tuple(map(krsc, weights)), tuple(shifts), residual, y, after)
    launchers.tail(*run)

    def plain(x, residual, weights, shifts):
        h = chain(x, weights[0], Geometry(1, 1), shift=shifts[0], relu=True)
        t = chain(h, weights[1], Geometry(), shift=shifts[1], residual=residual, relu=True)
        return t, chain(t, weights[2], Geometry(), shift=shifts[2], relu=True)

    eager = plain(x, residual, weights, shifts)
    exact = plain(x.double(), residual.double(), [w.double() for w in weights], [s.double() for s in shifts])
    for got, e, d in zip((y, after), eager, exact, strict=True):
        assert torch.equal(got.isnan(), d.isnan())
        assert_matches(got, e, d, 9 * J)
    first = y.clone(), after.clone()
    launchers.tail(*run)
    assert torch.equal(y.nan_to_num(), first[0].nan_to_num()) and torch.equal(after.nan_to_num(), first[1].nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("N, H, W", [(1, 9, 56), (2, 6, 7), (1, 1, 1), (7, 11, 5), (3, 56, 56), (150, 13, 28)])
@pytest.mark.parametrize("shortcut", launchers.BOTTLENECKS)
def test_bottleneck(shortcut, N, H, W, dtype, device, poisoned):
    too_large(device, N * 256 * H * W)
    shapes = launchers.BOTTLENECKS[shortcut]
    C = shapes[0][1]
    x = draw(N, C, H, W, dtype=dtype, device=device)
    if H > 6:
        x[0, 50, 4, W - 1] = float("nan")
    weights = [draw(*s, dtype=dtype, device=device, scale=(s[1] * s[2] * s[3]) ** -0.5) for s in shapes]
    shifts = [torch.randn(s[0], device=device) for s in shapes[:3]]
    y = torch.empty(N, 256, H, W, device=device, dtype=dtype).to(memory_format=NHWC)
    run = (x, tuple(map(krsc, weights)), tuple(shifts), y)
    launchers.bottleneck(*run)

    def plain(x, weights, shifts):
        h = chain(x, weights[0], Geometry(), shift=shifts[0], relu=True)
        h = chain(h, weights[1], Geometry(1, 1), shift=shifts[1], relu=True)
        added = F.conv2d(x, weights[3]) if shortcut == "projection" else x
        return chain(h, weights[2], Geometry(), shift=shifts[2], residual=added, relu=True)

    exact = plain(x.double(), [w.double() for w in weights], [s.double() for s in shifts])
    assert torch.equal(y.isnan(), exact.isnan())
    assert_matches(y, plain(x, weights, shifts), exact, 576)
    first = y.clone()
    launchers.bottleneck(*run)
    assert torch.equal(y.nan_to_num(), first.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("J, ahead", launchers.PAIRS)
@pytest.mark.parametrize("N, K, H, W", [(3, 512, 9, 7), (1, 64, 1, 1), (2, 192, 13, 11), (64, 256, 28, 28)])
def test_pair(N, K, H, W, J, ahead, dtype, device, poisoned):
    too_large(device, N * J * H * W)
    x, residual = torch.relu(draw(N, J, H, W, dtype=dtype, device=device)), draw(N, K, H, W, dtype=dtype, device=device)
    x[0, 3, 0, 0] = float("nan")
    weights = [draw(*s, 1, 1, dtype=dtype, device=device, scale=s[1] ** -0.5) for s in ((K, J), (ahead, K))]
    shifts = [torch.randn(k, device=device) for k in (K, ahead)]
    y, after = (torch.empty(N, k, H, W, device=device, dtype=dtype).to(memory_format=NHWC) for k in (K, ahead))
    run = (x, tuple(map(krsc, weights)), tuple(shifts), residual, y, after)
    launchers.pair(*run)

    def plain(x, residual, weights, shifts):
        t = chain(x, weights[0], Geometry(), shift=shifts[0], residual=residual, relu=True)
        return t, chain(t, weights[1], Geometry(), shift=shifts[1], relu=True)

    eager = plain(x, residual, weights, shifts)
    exact = plain(x.double(), residual.double(), [w.double() for w in weights], [s.double() for s in shifts])
    for got, e, d in zip((y, after), eager, exact, strict=True):
        assert torch.equal(got.isnan(), d.isnan())
        assert_matches(got, e, d, max(J, K))
    first = y.clone(), after.clone()
    launchers.pair(*run)
    assert torch.equal(y.nan_to_num(), first[0].nan_to_num()) and torch.equal(after.nan_to_num(), first[1].nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("N, H, W", [(3, 224, 224), (2, 50, 38), (1, 7, 2), (5, 65, 222), (40, 33, 64)])
def test_stem(N, H, W, dtype, device, poisoned):
    too_large(device, N * 3 * H * W)
    image, weight = (
        draw(N, 3, H, W, dtype=dtype, device=device),
        draw(64, 3, 7, 7, dtype=dtype, device=device, scale=147**-0.5),
    )
    if H > 8:
        image[0, 1, 5, 4] = float("nan")
    shift = torch.randn(64, device=device)
    x = torch.zeros(N, 4, H, W, device=device, dtype=dtype).to(memory_format=NHWC)
    x[:, :3] = image
    packed = torch.full((64, 7, 8, 4), float("nan"), device=device, dtype=dtype)
    packed[:, :, :7] = F.pad(weight, (0, 0, 0, 0, 0, 1)).permute(0, 2, 3, 1)

    def plain(image, weight, shift):
        return F.max_pool2d(chain(image, weight, Geometry(2, 3), shift=shift, relu=True), 3, 2, 1)

    exact = plain(image.double(), weight.double(), shift.double())
    y = torch.empty(exact.shape, device=device, dtype=dtype).to(memory_format=NHWC)
    launchers.stem(x, packed.flatten(2), shift, y)
    assert torch.equal(y.isnan(), exact.isnan())
    assert_matches(y, plain(image, weight, shift), exact, 147)


def test_nan_in_an_image_spreads_one_pooled_column_further_at_most(device):
    image, weight = (
        draw(1, 3, 40, 60, dtype=torch.bfloat16, device=device),
        draw(64, 3, 7, 7, dtype=torch.bfloat16, device=device, scale=0.1),
    )
    image[0, 1, 20, 30] = float("nan")
    shift = torch.randn(64, device=device)
    x = torch.zeros(1, 4, 40, 60, device=device, dtype=image.dtype).to(memory_format=NHWC)
    x[:, :3] = image
    packed = F.pad(weight, (0, 1, 0, 0, 0, 1)).permute(0, 2, 3, 1).contiguous()
    exact = F.max_pool2d(
        chain(image.double(), weight.double(), Geometry(2, 3), shift=shift.double(), relu=True), 3, 2, 1
    )
    y = torch.empty(exact.shape, device=device, dtype=image.dtype).to(memory_format=NHWC)
    launchers.stem(x, packed.flatten(2), shift, y)
    due = exact.isnan()
    more = due | F.pad(due, (1, 0))[..., :-1]
    assert (y.isnan() | ~due).all() and (~y.isnan() | more).all()


@pytest.mark.parametrize("frozen", [False, True], ids=["replaced", "frozen"])
@pytest.mark.parametrize(
    "C, stride, launches",
    [(256, 1, ["bottleneck"]), (64, 2, ["conv_act"] * 3), (64, 1, ["bottleneck"])],
    ids=["identity", "strided", "projection"],
)
def test_the_backend_by_name_runs_blocks(C, stride, launches, frozen, device, with_passes, monkeypatch):
    case = BlockCase("", basic=False, inplanes=C, planes=64, H=7, W=9, stride=stride, N=2)
    module, x = case.make().to(device).bfloat16(), case.input(torch.bfloat16, device)
    names, run = [], launchers._run
    monkeypatch.setattr(launchers, "_run", lambda name, *rest: [names.append(name), run(name, *rest)])
    with torch.no_grad(), rk.use_backend("gpu:sm90"):
        blocks = torch.nn.Sequential(module)
        if frozen:
            ours = rk.freeze(blocks)
        else:
            ours = copy.deepcopy(blocks)
            rk.replace_blocks(ours)
        y = ours(x)
        assert names == launches
        eager, exact = module(x), module.double()(x.double())
    assert_matches(y, eager, exact, 576)


def test_what_no_whole_block_is_for_is_told():
    shapes, geometries = launchers.BOTTLENECKS["identity"], [Geometry(), Geometry(padding=1), Geometry()]
    assert launchers.why_not_bottleneck(shapes, geometries, "identity", 56) is None
    assert "at most 56 columns, got 57" in launchers.why_not_bottleneck(shapes, geometries, "identity", 57)
    assert "and zero_pad" in launchers.why_not_bottleneck(shapes, geometries, "zero_pad", 56)
    dilated = [Geometry(), Geometry(1, 2, 2), Geometry()]
    assert "strides, dilations and groups of 1" in launchers.why_not_bottleneck(shapes, dilated, "identity", 56)
    assert "(128, 256, 1, 1)" in launchers.why_not_bottleneck(((128, 256, 1, 1),), geometries, "identity", 56)
    for (J, K, ahead, columns), says in {
        (96, 256, 64, 56): "64, 128 inner channels, got 96",
        (64, 320, 64, 56): "expected 256 outer channels, got 320",
        (128, 96, 128, 28): "expected multiples of 64 outer channels, got 96",
        (128, 512, 256, 28): "expected 128 output channels of the next convolution, got 256",
        (128, 512, 128, 29): "at most 28 columns, got 29",
    }.items():
        assert says in launchers.why_not_tail(J, K, ahead, columns)


def test_a_launch_that_fails_is_named(device):
    x, w = (
        draw(1, 64, 3, 3, dtype=torch.bfloat16, device=device),
        draw(64, 1, 1, 64, dtype=torch.bfloat16, device=device),
    )
    with pytest.raises(RuntimeError, match="sm90 conv_act: no tensor map of y"):
        launchers.conv_act(x, w, torch.empty_like(x)[:, 1:], Geometry(), "turn128x64")


# What is beyond the kernels is the library's, whose weight gradients are rounded to 16 bits.
WGRADS = [
    name
    for name, (sizes, (K, R), g) in contract.WGRADS.items()
    if sm90.why_not_convolution((K, sizes[1] // g.groups, R, R), g, turned=False) is None
]


@pytest.mark.parametrize("lazy, dtype", [(False, torch.float16), (True, torch.bfloat16)], ids=["plain", "lazy"])
@pytest.mark.parametrize("name", WGRADS)
def test_gradients_as_the_contract_has_them(name, lazy, dtype, device, with_passes, poisoned):
    contract.check_gradients(sm90, device, name, lazy, dtype)


@pytest.mark.parametrize("C", [16, 21, 48])
def test_reductions_as_the_contract_has_them(C, device, with_passes, poisoned):
    contract.check_reductions(sm90, device, C, torch.bfloat16)


# Of the blocks' cases those that take longest to emulate are a GPU's.
BLOCKS = {c.name: c for c in training.SMALL}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_train(name, dtype, device, with_passes, poisoned):
    case = BLOCKS[name]
    draws = min(8, -(-64 // case.planes))

    def make():
        return case.make().train().to(device), case.input(device=device)

    training.check(make, dtype, "gpu:sm90", draws=draws)


def test_a_block_trains_by_these_kernels(with_passes, device, monkeypatch):
    """And not by the library's, which would be as right."""
    names, run = collections.Counter(), launchers._run

    def counted(name, call, device):
        kind = (
            list(launchers.NUMBERS)[call.tile].rstrip("0123456789x") + " two" * bool(call.x2)
            if name == "conv_act"
            else ""
        )
        names[f"{name} {kind or ('upper' if call.upper else f'{call.R}x{call.S}')}"] += 1
        run(name, call, device)

    monkeypatch.setattr(launchers, "_run", counted)
    case = BLOCKS["by-moments"]
    training.check(lambda: (case.make().train().to(device), case.input(device=device)), torch.bfloat16, "gpu:sm90")
    assert names == {
        "conv_act stats": 3,
        "conv_act turn": 3,
        "conv_act sums two": 1,
        "conv_act sums": 1,
        "wgrad upper": 1,
        "wgrad 1x1": 3,
        "wgrad 3x3": 1,
    }


def launched(monkeypatch, batch, model="resnet50", dtype=torch.bfloat16, arch=90):
    """What a frozen model would launch on a Hopper GPU, as far as metadata tell."""
    pytest.importorskip("triton", reason="the plan is the Triton backend's")
    from resnet_kernels.analysis.roofline import launches_of
    from resnet_kernels.backends.gpu.inference import dispatch, hopper

    def why_not_here(t, arch):
        return None if arch == 90 and t.dtype in DTYPES.values() else "expected sm_90 and 16 bits"

    monkeypatch.setattr(hopper, "_why_not_here", why_not_here)
    monkeypatch.setattr(dispatch, "gpu_of", lambda device: torch.device("cuda"))
    images = torch.empty(batch, 3, 224, 224, dtype=dtype)
    return launches_of(getattr(torchvision.models, model)().eval().to(dtype), images, arch)


def test_a_frozen_resnet50_runs_by_these_kernels_where_they_were_faster(monkeypatch):
    names = [launch.name for launch in launched(monkeypatch, 256)]
    # Tails of the first stage, pairs of the second and third; large 3x3 and long 1x1 stay Triton's.
    assert names.count("stem") == 1 and names.count("tail") == 2 and names.count("pair") == 3 + 4
    assert names.count("conv_act") >= 12 and set(names) <= {"stem", "tail", "pair", "conv_act", "conv_box", "bn_pass"}
    by_triton = {launch.what for launch in launched(monkeypatch, 256) if launch.name == "conv_box"}
    assert by_triton == {
        "3x3 128->128 28x28",
        "3x3 128->128 56x56 /2",
        "3x3 256->256 14x14",
        "3x3 256->256 28x28 /2",
        "1x1 1024->256 14x14",
        "1x1 1024->512 14x14",
    }


def test_the_tail_of_128_channels_runs_where_it_is_named_alone(monkeypatch):
    from resnet_kernels.backends.gpu.inference import dispatch, hopper

    of_128 = [m for m in launched(monkeypatch, 256) if m.name == "pair" and m.problem.first.weight.shape[0] == 128]
    ways = [[choice.kernel for choice in dispatch.candidates_to_measure(m.problem)] for m in of_128]
    # The last is followed by 256 channels, which do not fit.
    assert [hopper.SM90_TAIL in found for found in ways] == [True, True, False] and {found[0] for found in ways} == {
        hopper.SM90_PAIR
    }
    with monkeypatch.context() as m:
        m.setattr(hopper, "PROVED_TAILS", (64, 128))
        now = launched(m, 256)
    wide = [m for m in now if m.name == "tail" and m.problem.first.weight.shape[0] == 128]
    assert len(wide) == 2 and all(m.grid == 256 * 28 // 4 / 2 for m in wide)
    # The 3x3's result is neither written nor read.
    pair, tail = of_128[0].work, wide[0].work
    assert tail.bytes - pair.bytes == 128 * 128 * 9 * 2 and tail.issued > tail.flops > pair.flops


def test_whole_bottlenecks_run_where_a_table_says_so(monkeypatch):
    from resnet_kernels.backends.gpu.inference import dispatch, hopper

    there = [m.within for m in launched(monkeypatch, 256) if isinstance(m.within, hopper.WholeBottleneck)]
    # The first stage's first block, which projects, and its second. Of the third the first convolution is in the tail.
    assert len(there) == 2 and [w.last.second is None for w in there] == [False, True]
    ways = [[choice.kernel for choice in dispatch.candidates_to_measure(whole)] for whole in there]
    assert ways == [
        [dispatch.SEPARATE, hopper.SM90_BOTTLENECK],
        [dispatch.SEPARATE, dispatch.CONSECUTIVE_TAILS, hopper.SM90_BOTTLENECK],
    ]

    def launched_by(kernel, config):
        row = {"kernel": kernel, "config": config}
        with monkeypatch.context() as m:
            m.setattr(
                dispatch,
                "measured_choice",
                lambda device, problem: row if isinstance(problem, hopper.WholeBottleneck) else None,
            )
            return launched(m, 256)

    assert [m.name for m in launched_by(dispatch.CONSECUTIVE_TAILS, None)] == [
        m.name for m in launched(monkeypatch, 256)
    ]
    now = launched_by(hopper.SM90_BOTTLENECK, dataclasses.asdict(hopper.SM90_BOTTLENECK_CONFIG))
    names = [m.name for m in now]
    assert names.count("bottleneck") == 3 and names.count("tail") == 0 and names.count("pair") == 3 + 4
    first, second, third = (m.work for m in now if m.name == "bottleneck")
    positions = 256 * 56 * 56 * 2
    assert second == third and 0 < second.bytes - positions * 512 < 2e5 and 0 < first.bytes - positions * 320 < 2e5
    # 256 to 64 and 64 to 256 channels, or 64 to 64 and twice 64 to 256.
    macs = 256 * 56 * 56 * 64
    assert second.flops == 2 * macs * (256 + 576 + 256) and first.flops == 2 * macs * (64 + 576 + 256 + 256)
    assert second.issued * 56 == second.flops * 64 and second.copied - second.bytes == positions * 256


def test_small_batches_and_other_gpus_stay_with_triton(monkeypatch):
    assert {launch.name for launch in launched(monkeypatch, 1)} <= {"stem", "conv_box", "conv_gather"}
    ours = {"stem", "tail", "pair", "conv_act"}
    assert not ours & {launch.name for launch in launched(monkeypatch, 256, arch=100)}
    with monkeypatch.context() as m:
        assert not ours & {launch.name for launch in launched(m, 256, dtype=torch.float32)}


def test_what_runs_there_moves_what_was_planned(monkeypatch):
    launches = launched(monkeypatch, 256)
    # By Triton alone 37 MB (docs/kernels.md): the tails of 128 channels are two kernels, others share more.
    assert 30e6 < sum(launch.work.bytes for launch in launches) / 256 < 40e6
    # No less is done than the convolutions are, and not twice.
    flops = sum(launch.work.flops for launch in launches) / 256
    assert 8.0e9 < flops < 8.4e9
    assert all(launch.work.issued >= launch.work.flops * 0.99 for launch in launches)
