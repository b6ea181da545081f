"""Blocks against torchvision's: outputs and gradients in evaluation mode."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from resnet_kernels.nn.fusable import why_plain
from resnet_kernels.ops import BlockSpec
from resnet_kernels.testing import ODD_CASES, RESNET_CASES, RESNEXT_CASES, assert_matches

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
REDUCTION = 512 * 9


def fused(block):
    ours = copy.deepcopy(block)
    report = rk.replace_blocks(ours)
    assert report.replaced and not report.skipped and not report.notes
    return ours


def check(case, dtype, backend, device="cpu"):
    block, x = case.make().to(device, dtype), case.input(dtype, device)
    with torch.no_grad():
        want, exact = block(x), copy.deepcopy(block).double()(x.double())
        with rk.use_backend(backend):
            y = fused(block)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_matches(y, want, exact, REDUCTION)


@pytest.mark.parametrize("backend", ["reference", "library", "cpu"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", RESNET_CASES, ids=str)
def test_resnet_blocks(case, dtype, backend, poisoned):
    check(case, DTYPES[dtype], backend)


@pytest.mark.parametrize("backend", ["reference", "library", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_odd_blocks(case, dtype, backend, poisoned):
    if dtype == "fp64" and backend == "cpu":
        with (
            rk.use_backend("cpu"),
            pytest.raises(rk.BackendUnavailable, match="expected float32, .* got torch.float64"),
        ):
            fused(case.make().double())(case.input(torch.float64))
        return
    check(case, DTYPES[dtype], backend)


def interpret(case, dtype, arch):
    from resnet_kernels.backends.gpu.launch import assume_arch

    with assume_arch(arch):
        check(case, DTYPES[dtype], "gpu")


# sm_90 computes ungrouped blocks by boxes, whose tiles depend on channels and maps: all of them. By pointers, as sm_80
# computes all and sm_90 those with groups, it is the same kernel whatever they are: one of each kind.
BY_POINTERS = ("r18-layer1", "r18-layer2-down", "r50-layer1-first", "r50-layer2-down", "x50-layer1", "x50-layer2-down")
INTERPRETED = [
    *((case, 90) for case in RESNET_CASES),
    *((case, 80) for case in RESNET_CASES + RESNEXT_CASES if case.name in BY_POINTERS),
    *((case, 90) for case in RESNEXT_CASES if case.name in ("x50-layer1-first", "x50-layer2-down", "x50-layer4-down")),
]


@pytest.mark.interpreted
@pytest.mark.parametrize("case, arch", INTERPRETED, ids=str)
def test_resnet_and_resnext_blocks_in_tritons_interpreter(case, arch, poisoned):
    if case.H > 14:
        # Half of the map, of one image: what a tile computes does not depend on how many there are.
        case = dataclasses.replace(case, N=1, H=case.H // 2, W=case.W // 2)
    interpret(case, "fp16", arch)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_odd_blocks_in_tritons_interpreter(case, dtype, arch, poisoned):
    interpret(case, dtype, arch)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "library", "gpu:cuda", "gpu"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", RESNET_CASES + RESNEXT_CASES + ODD_CASES, ids=str)
def test_blocks_on_a_gpu(case, dtype, backend):
    check(case, DTYPES[dtype], backend, "cuda")


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_a_batch_in_passes_is_the_batch(limit, monkeypatch):
    case = next(c for c in ODD_CASES if c.name == "batch-7")
    block, x = fused(case.make()), case.input()
    with torch.no_grad(), rk.use_backend("cpu"):
        want = block(x)
        monkeypatch.setattr(rk.backends.cpu, "images_per_pass", lambda image_bytes: limit)
        torch.testing.assert_close(block(x), want)


def gradients(block, x, dy):
    x = x.clone().requires_grad_()
    block.zero_grad()
    y = block(x)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in block.named_parameters()}


@torch.no_grad()
def keep_off_zero_(block, x):
    """Shift every batch norm so that what reaches a ReLU is far above zero in even channels and far below in odd ones:
    one sign flipped by rounding at a pre-activation of 1e-8 moves a gradient by its whole size."""
    names = ["bn1", "bn2", "bn3"] if hasattr(block, "bn3") else ["bn1", "bn2"]
    seen = []
    hook = block.relu.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    for name in names:
        seen.clear()
        block(x)
        bn, t = getattr(block, name), seen[names.index(name)]
        low, high = t.amin((0, 2, 3)), t.amax((0, 2, 3))
        even = torch.arange(len(low)) % 2 == 0
        bn.bias += torch.where(even, 0.5 - low, -0.5 - high)
    hook.remove()


GRADIENT_CASES = [c for c in ODD_CASES if c.N] + [c for c in RESNET_CASES if c.H <= 14]


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradients_in_evaluation_mode(case, dtype):
    dtype = DTYPES[dtype]
    block = case.make()
    x = case.input()
    keep_off_zero_(block, x)
    block, x = block.to(dtype), x.to(dtype)
    dy = torch.randn_like(block(x)).detach()
    assert why_plain(fused(block), x) is None
    got, want = gradients(fused(block), x, dy), gradients(copy.deepcopy(block), x, dy)
    exact = gradients(copy.deepcopy(block).double(), x.double(), dy.double())
    for name in want:
        assert_matches(got[name], want[name], exact[name], REDUCTION, name, maximum=False)


@pytest.mark.parametrize("size", [5, 2])
def test_gradcheck_and_second_derivatives(size):
    args = [
        torch.randn(2, 4, size, size),
        [torch.randn(4, 2, 3, 3), torch.randn(6, 4, 1, 1), torch.randn(6, 4, 1, 1)],
        [torch.randn(4), torch.randn(6), torch.randn(6)],
        [torch.randn(4), torch.randn(6), torch.randn(6)],
    ]
    flat = [t.double().requires_grad_() for a in args for t in (a if isinstance(a, list) else [a])]

    def op(x, *rest):
        spec = BlockSpec((2, 1, 2), (1, 1, 1), (2, 1, 1), "projection")
        return rk.ops.residual_block(x, list(rest[:3]), list(rest[3:6]), list(rest[6:]), spec)

    torch.autograd.gradcheck(op, flat)
    torch.autograd.gradgradcheck(op, flat)


def test_frozen_batch_norms_in_a_training_block_are_fused():
    case = ODD_CASES[0]
    block = case.make().train()
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    ours, x = fused(block), case.input()
    assert why_plain(ours, x) is None
    dy = torch.randn_like(block(x))
    got, want = gradients(fused(block), x, dy), gradients(block, x, dy)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["reference", "library", "cpu"])
def test_nan_and_inf_come_through(backend, value):
    case = next(c for c in RESNET_CASES if c.name == "r50-layer4")
    block, x = case.make(), case.input()
    x[1, 5, 3, 3] = value
    with torch.no_grad(), rk.use_backend(backend):
        y, want = fused(block)(x), block(x)
    assert not want[1].isfinite().all() and want[0].isfinite().all()
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())


@pytest.mark.parametrize("layout", ["nchw", "sliced", "expanded", "transposed"])
def test_any_layout_of_input(layout):
    case = next(c for c in ODD_CASES if c.name == "dilation-2")
    block = case.make()
    x = torch.relu(torch.randn(4, 80, 11, 11))
    x = {
        "nchw": x[:2, :64].contiguous(),
        "sliced": x[1:3, 8:72, 1:10, 2:],
        "expanded": x[:1, :64].expand(3, -1, -1, -1),
        "transposed": x[:, :64].transpose(2, 3),
    }[layout]
    with torch.no_grad():
        torch.testing.assert_close(fused(block)(x), block(x), rtol=1e-4, atol=1e-4)


def test_same_inputs_same_bits():
    case = next(c for c in RESNET_CASES if c.name == "r50-layer3-down")
    block, x = fused(case.make()), case.input()
    with torch.no_grad():
        assert torch.equal(block(x), block(x))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shortcut", ["identity", "projection", "zero_pad", "none"])
def test_opcheck(shortcut, device):
    K = 8 if shortcut == "identity" else 12
    weights = [torch.randn(5, 8, 3, 3), torch.randn(K, 5, 1, 1)] + [torch.randn(K, 8, 1, 1)] * (
        shortcut == "projection"
    )
    stride = 1 if shortcut == "identity" else 2
    n = len(weights)
    affine = [[torch.randn(w.shape[0]) for w in weights] for _ in range(2)]
    tensors = [torch.randn(2, 8, 7, 7).contiguous(memory_format=torch.channels_last), weights, *affine]
    tensors = torch.utils._pytree.tree_map(lambda t: t.to(device).requires_grad_(), tensors)
    projected = shortcut == "projection"
    strides = (stride, *[1] * (n - 1 - projected), *[stride] * projected)
    spec = BlockSpec(strides, (1,) * n, (1,) * n, shortcut, relu=shortcut != "none")
    torch.library.opcheck(torch.ops.resnet_kernels.residual_block.default, (*tensors, *spec.flat()))


BAD = {
    "x-3d": (dict(x=torch.randn(4, 5, 5)), ValueError, r"x: expected \(N, C, H, W\), got \(4, 5, 5\)"),
    "x-int": (
        dict(x=torch.ones(2, 4, 5, 5, dtype=torch.int32)),
        TypeError,
        "x: expected a floating dtype, got torch.int32",
    ),
    "channels": (dict(x=torch.randn(2, 6, 5, 5)), ValueError, "does not fit 6 channels"),
    "mixed-dtype": (dict(x=torch.randn(2, 4, 5, 5).double()), TypeError, "expected torch.float64 .* got torch.float32"),
    "mixed-device": (dict(x=torch.randn(2, 4, 5, 5, device="meta")), ValueError, "expected it on meta, as x, got cpu"),
    "shortcut": (
        dict(spec=dict(shortcut="id")),
        ValueError,
        "expected one of identity, projection, zero_pad, none, got 'id'",
    ),
    "lengths": (dict(spec=dict(strides=(1,))), ValueError, "expected one weight, stride, dilation"),
    "even": (dict(weights=[torch.randn(4, 4, 2, 2)] * 2), ValueError, "with R odd, got"),
    "scale": (dict(scales=[torch.ones(3)] * 2), ValueError, r"expected \(4,\), got \(3,\)"),
    "identity": (dict(spec=dict(strides=(2, 1))), ValueError, r"identity needs y of x's sizes"),
    "half-scale": (dict(scales=[torch.ones(4).half()] * 2), TypeError, "expected torch.float32 .* got torch.float16"),
}


@pytest.mark.parametrize("change, error, says", BAD.values(), ids=BAD)
def test_the_op_names_what_is_wrong(change, error, says):
    good = dict(
        x=torch.randn(2, 4, 5, 5),
        weights=[torch.randn(4, 4, 3, 3)] * 2,
        scales=[torch.ones(4)] * 2,
        shifts=[torch.ones(4)] * 2,
        spec=BlockSpec((1, 1), (1, 1), (1, 1)),
    )
    rk.ops.residual_block(**good)
    bad = good | change
    if isinstance(bad["spec"], dict):
        bad["spec"] = dataclasses.replace(good["spec"], **bad["spec"])
    with pytest.raises(error, match=says):
        rk.ops.residual_block(**bad)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(64, 9, 9),
        torch.randn(2, 63, 9, 9),
        torch.randn(2, 64, 9, 9).double(),
        torch.randn(2, 64, 9, 9, device="meta"),
    ],
    ids=["3d", "channels", "dtype", "device"],
)
def test_a_block_raises_what_torchvisions_raises(x):
    case = next(c for c in ODD_CASES if c.name == "dilation-2")
    block = case.make()
    with torch.no_grad():
        # Whatever torch raises, ours must raise the same.
        with pytest.raises(Exception) as theirs:  # noqa: B017
            block(x)
        with pytest.raises(type(theirs.value)) as ours:
            fused(block)(x)
    assert str(ours.value) == str(theirs.value)


def test_shortcut_options():
    from resnet_kernels.nn import ZeroPadShortcut, make_shortcut

    assert make_shortcut("A", 8, 8) is None and make_shortcut("B", 8, 8) is None
    assert isinstance(make_shortcut("C", 8, 8), nn.Sequential)
    pad = make_shortcut("A", 8, 12, 2)
    x = torch.randn(1, 8, 5, 5)
    y = pad(x)
    assert isinstance(pad, ZeroPadShortcut) and y.shape == (1, 12, 3, 3)
    assert torch.equal(y[:, :8], x[:, :, ::2, ::2]) and not y[:, 8:].any()
    with pytest.raises(ValueError, match="expected 'A', 'B' or 'C', got 'D'"):
        make_shortcut("D", 8, 8)
    with pytest.raises(ValueError, match="expected at least in_channels = 8, got 4"):
        ZeroPadShortcut(8, 4)
