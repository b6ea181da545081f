"""The backend `cuda` without a GPU: its source, launchers and kernels, compiled by g++ and run on fibers
(tests/emulation); and its machine code, read."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import test_contract as contract
import test_training as training
import torch

from resnet_kernels.backends import cuda, extension, reference, select
from resnet_kernels.backends.contract import Epilogue, Operand
from resnet_kernels.backends.cuda import library
from resnet_kernels.testing import assert_matches

HERE = Path(__file__).parent
NHWC = torch.channels_last


class Emulated(library.Library):
    """The kernels on CPU tensors. multiprocessors: few, so that a thread has many rows, or many, so that there are
    parts."""

    device = "cpu"
    processors = 2

    def run(self, name, call, device):
        self.invoke(name, call, None)

    def multiprocessors(self, device):
        return self.processors


def headers():
    """Folders of CUDA's headers: nvcc's, else those of packages; none where there are none."""
    nvcc = shutil.which("nvcc")
    if nvcc:
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
        top = [line.partition("TOP=")[2] for line in dry.splitlines() if "TOP=" in line]
        return [Path(t.strip()) / "include" for t in top[:1]]
    packages = Path(torch.__file__).parent.parent
    found = [packages / "nvidia/cu13/include", packages / "triton/backends/nvidia/include"]
    return found if all(f.is_dir() for f in found) else []


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    compiler, include = shutil.which("g++"), headers()
    if compiler is None or not include:
        pytest.skip("wants g++ and CUDA's headers")
    folder = tmp_path_factory.mktemp("emulated")
    sources = sorted((HERE.parent / "csrc/cuda").glob("*.cu"))
    flags = ["-O2", "-std=c++20", "-fPIC", "-Wno-unknown-pragmas"]
    folders = [f"-I{p}" for p in (HERE / "emulation", HERE.parent / "csrc", *include)]
    objects = [folder / f"{s.stem}.o" for s in sources]
    compiles = [
        subprocess.Popen([compiler, *flags, *folders, "-x", "c++", "-c", s, "-o", o])
        for s, o in zip(sources, objects, strict=True)
    ]
    assert all(c.wait() == 0 for c in compiles)
    subprocess.run([compiler, "-shared", *objects, "-o", folder / "emulated.so"], check=True)
    return Emulated(str(folder / "emulated.so"))


@pytest.fixture
def emulated(built, monkeypatch):
    monkeypatch.setattr(library, "load", lambda: (built, None))
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


# Whole blocks, through the ops.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", training.SMALL, ids=str)
def test_blocks(emulated, case, dtype, poisoned):
    training.check(training.of_case(case), DTYPES[dtype], "cuda", draws=-(-64 // case.planes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["resnet", "odd-channels", "dilation"])
def test_stems(emulated, name, dtype, poisoned):
    training.check_stem(name, DTYPES[dtype], "cuda")


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
        assert torch.version.cuda is None or shutil.which("nvcc") is None
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


def test_no_maximum_drops_nan(machine_code):
    for name, code in machine_code.items():
        assert not re.search(r"FMNMX(?!\.NAN)", code), name
    assert any("FMNMX.NAN" in code for code in machine_code.values())


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
