"""The primitives: the reference against autograd in fp64, every other backend against the reference."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from resnet_kernels.backends import cpu, gpu, library, reference
from resnet_kernels.backends.contract import (
    NO_WINNER,
    Affine,
    Epilogue,
    Geometry,
    Normalized,
    Operand,
    Pool,
    Pooled,
    Product,
    accumulator_dtype,
    call_of,
)
from resnet_kernels.backends.gpu import cuda, sm90
from resnet_kernels.testing import assert_matches

NHWC = torch.channels_last
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# name: (N, C, H, W), (K, R), geometry
CONVS = {
    "1x1": ((2, 64, 14, 14), (32, 1), Geometry()),
    "1x1-down": ((2, 32, 9, 7), (48, 1), Geometry(stride=2)),
    "1x1-padded": ((2, 32, 6, 6), (32, 1), Geometry(padding=1)),
    "3x3": ((2, 32, 14, 14), (32, 3), Geometry(padding=1)),
    "3x3-down-odd": ((2, 16, 9, 11), (24, 3), Geometry(stride=2, padding=1)),
    "3x3-dilated": ((2, 16, 9, 9), (16, 3), Geometry(padding=2, dilation=2)),
    "3x3-groups": ((2, 64, 7, 7), (64, 3), Geometry(padding=1, groups=32)),
    "3x3-groups-48": ((2, 96, 5, 6), (96, 3), Geometry(padding=1, groups=2)),
    "odd-channels": ((3, 13, 5, 7), (11, 3), Geometry(padding=1)),
    "map-1x1": ((2, 24, 1, 1), (8, 3), Geometry(padding=1)),
    "batch-1": ((1, 8, 6, 6), (8, 1), Geometry()),
    "batch-0": ((0, 8, 6, 6), (8, 3), Geometry(padding=1)),
    "7x7-stem": ((1, 3, 17, 14), (16, 7), Geometry(stride=2, padding=3)),
}


class Interpreted:
    """The Triton backend as a GPU of an architecture would run it."""

    def __init__(self, arch):
        self.arch = arch

    def __getattr__(self, name):
        value = getattr(gpu, name)

        def call(*args, **keywords):
            from resnet_kernels.backends.gpu.launch import assume_arch

            with assume_arch(self.arch):
                return value(*args, **keywords)

        return call if callable(value) else value


BACKENDS = [
    pytest.param(library, "cpu", id="library"),
    pytest.param(cpu, "cpu", id="cpu"),
    pytest.param(library, "cuda", id="library-gpu", marks=pytest.mark.gpu),
    pytest.param(cuda, "cuda", id="gpu-cuda", marks=pytest.mark.gpu),
    pytest.param(gpu, "cuda", id="gpu", marks=pytest.mark.gpu),
    pytest.param(Interpreted(80), "cpu", id="triton-sm80", marks=pytest.mark.interpreted),
    pytest.param(Interpreted(90), "cpu", id="triton-sm90", marks=pytest.mark.interpreted),
]
# Without Triton for sm_80, whose passes are those of sm_90.
PASSING = [b for b in BACKENDS if b.id != "triton-sm80"]
# Those and one that convolves plain operands alone.
CONVOLVING = [*BACKENDS, pytest.param(sm90, "cuda", id="sm90", marks=pytest.mark.gpu)]


def runs(backend, products, epilogue):
    """Skips what is not built, or not for this GPU (that it is where it can be is test_extension's), and of sm90 what
    it is not for: fp32, groups, channels that are no multiple of 8. Any other refusal fails."""
    reason = backend.why_not(call_of(products, epilogue))
    if backend in (cuda, sm90) and reason is not None and re.search("not built|for sm_90a only", reason):
        pytest.skip(reason)
    beyond = any(p.operand.tensor.dtype == torch.float32 or p.geometry.groups > 1 for p in products)
    beyond |= any(n % 8 for p in products for n in p.packed.shape[:2])
    if backend is sm90 and beyond:
        assert reason is not None
        pytest.skip(reason)
    assert reason is None


def draw(name, dtype, device="cpu"):
    """x, weight, scale, shift of a convolution."""
    sizes, (K, R), g = CONVS[name]
    x = torch.randn(sizes).to(dtype).contiguous(memory_format=NHWC)
    C = sizes[1] // g.groups
    weight = (torch.randn(K, C, R, R) * (C * R * R) ** -0.5).to(dtype)
    scale, shift = (t.to(accumulator_dtype(dtype)) for t in (torch.randn(K), torch.randn(K)))
    return tuple(t.to(device) for t in (x, weight, scale, shift))


def eager(x, weight, scale, shift, g, residual, relu):
    """What a user would write, every result rounded to x's dtype."""
    t = F.conv2d(x, weight, None, *g)
    t = (scale[:, None, None] * t + shift[:, None, None]).to(x.dtype)
    t = t if residual is None else t + residual
    return torch.relu(t) if relu else t


def check_conv(backend, device, dtype, name, with_residual, relu):
    x, weight, scale, shift = draw(name, dtype, device)
    g = CONVS[name][2]
    residual = None
    if with_residual:
        residual = torch.randn_like(eager(x, weight, scale, shift, g, None, False)).contiguous(memory_format=NHWC)
    products = [Product(Operand(x), weight, g, scale)]
    epilogue = Epilogue(shift, None if residual is None else Operand(residual), relu)
    runs(backend, products, epilogue)
    before = None if residual is None else residual.clone()
    y, reduced = backend.conv(products, epilogue)
    assert reduced is None
    if residual is not None:
        assert torch.equal(residual, before), "the residual was overwritten unasked"
    double = [None if t is None else t.double() for t in (x, weight, scale, shift)]
    exact = eager(*double, g, None if residual is None else residual.double(), relu)
    assert y.is_contiguous(memory_format=NHWC)
    assert_matches(y, eager(x, weight, scale, shift, g, residual, relu), exact, weight[0].numel())


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("backend, device", [pytest.param(reference, "cpu", id="reference"), *CONVOLVING])
def test_conv(backend, device, name, dtype, residual, relu, poisoned):
    check_conv(backend, device, dtype, name, residual, relu)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_conv_with_packed_weights_and_two_products(backend, device):
    x, weight, scale, shift = draw("3x3-down-odd", torch.float32, device)
    g, gs = CONVS["3x3-down-odd"][2], Geometry(stride=2)
    weight_s = torch.randn(24, 16, 1, 1, device=device) * 0.25
    scale_s = torch.randn(24, device=device)
    packed = backend.pack(weight, scale, g, x.shape), backend.pack(weight_s, scale_s, gs, x.shape)
    y, _ = backend.conv(
        [Product(Operand(x), packed[0], g), Product(Operand(x), packed[1], gs)], Epilogue(shift, relu=True)
    )
    want, _ = reference.conv(
        [Product(Operand(x), weight, g, scale), Product(Operand(x), weight_s, gs, scale_s)], Epilogue(shift, relu=True)
    )
    double = [t.double() for t in (x, weight, scale, weight_s, scale_s, shift)]
    exact, _ = reference.conv(
        [Product(Operand(double[0]), double[1], g, double[2]), Product(Operand(double[0]), double[3], gs, double[4])],
        Epilogue(double[5], relu=True),
    )
    assert_matches(y, want, exact, 160)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_conv_of_a_sliced_and_an_expanded_operand(backend, device):
    big = torch.randn(4, 40, 9, 9, device=device).contiguous(memory_format=NHWC)
    weight = torch.randn(8, 16, 3, 3, device=device)
    for x in (big[1:3, 8:24, 1:, :-1], big[:1, :16].expand(3, -1, -1, -1), big[:, :16].transpose(2, 3)):
        g = Geometry(padding=1)
        y, _ = backend.conv([Product(Operand(x), weight, g)], Epilogue())
        double = F.conv2d(x.double(), weight.double(), None, *g)
        assert_matches(y, F.conv2d(x, weight, None, *g), double, 144)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_conv_may_take_the_residuals_memory_only_when_told(backend, device):
    x, weight, scale, shift = draw("1x1", torch.float32, device)
    residual = torch.randn(2, 32, 14, 14, device=device).contiguous(memory_format=NHWC)
    products = [Product(Operand(x), weight, Geometry(), scale)]
    want, _ = backend.conv(products, Epilogue(shift, Operand(residual), relu=True))
    got, _ = backend.conv(products, Epilogue(shift, Operand(residual), relu=True, overwrite=True))
    assert torch.equal(got, want)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend, device", [pytest.param(reference, "cpu", id="reference"), *CONVOLVING])
def test_nan_and_inf_go_through_conv_and_relu(backend, device, dtype, value):
    x, weight, scale, shift = draw("3x3", dtype, device)
    x[0, 3, 5, 5] = value
    residual = torch.randn_like(x)
    residual[1, 7, 0, 0] = value
    product, epilogue = (
        Product(Operand(x), weight, Geometry(padding=1), scale),
        Epilogue(shift, Operand(residual), True),
    )
    runs(backend, [product], epilogue)
    y, _ = backend.conv([product], epilogue)
    want = eager(x, weight, scale, shift, Geometry(padding=1), residual, True)
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())
    if value != -float("inf"):
        assert not want.isfinite().all()


@pytest.mark.parametrize("pool", [None, Pool(3, 2, 1), Pool(2, 2, 0)], ids=["no-pool", "pool3", "pool2"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("terms", ["relu", "affine", "shift-residual-relu"])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_bn_pass(backend, device, terms, dtype, pool, poisoned):
    if pool is not None and "pool" not in backend.SUPPORTS:
        pytest.skip(f"{backend.NAME} has no pooling")
    x, r = (torch.randn(2, 21, 9, 12, device=device).to(dtype).contiguous(memory_format=NHWC) for _ in range(2))
    x[0, 0, 0, 0] = float("nan")
    x[1, 4, 3, 3] = float("inf")
    a, b, s = (torch.randn(21, device=device) for _ in range(3))

    def run(primitives, to):
        affine = (to(a), to(b)) if terms == "affine" else None
        more = "residual" in terms
        epilogue = Epilogue(to(s) if more else None, Operand(to(r)) if more else None, terms != "affine")
        return primitives.bn_pass(Operand(to(x), affine), epilogue, pool)[0]

    exact = run(reference, torch.Tensor.double)
    assert exact.isnan().any()
    assert_matches(run(backend, lambda t: t), run(reference, lambda t: t), exact)


LAZY = [b for b in BACKENDS if "lazy" in b.values[0].SUPPORTS]


@pytest.mark.parametrize("affine", [False, True], ids=["relu", "affine-relu"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["1x1", "3x3", "3x3-down-odd", "3x3-groups", "odd-channels", "map-1x1"])
@pytest.mark.parametrize("backend, device", LAZY)
def test_conv_of_a_lazy_operand(backend, device, name, dtype, stride, affine, poisoned):
    """Padding is zero after the affine and the ReLU: the shifts are positive, so that it would show."""
    x, weight, scale, shift = draw(name, dtype, device)
    g, C = CONVS[name][2], x.shape[1]
    a, b = torch.randn(C, device=device), 1 + torch.rand(C, device=device)
    if stride == 2 and x.shape[2] > 1:
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3).contiguous(memory_format=NHWC)

    def run(primitives, to):
        operand = Operand(to(x), (to(a), to(b)) if affine else None, relu=True, stride=stride)
        return primitives.conv([Product(operand, to(weight), g, to(scale))], Epilogue(to(shift), relu=True))[0]

    assert_matches(
        run(backend, lambda t: t), run(reference, lambda t: t), run(reference, torch.Tensor.double), weight[0].numel()
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("backend, device", LAZY)
def test_bn_pass_of_a_lazy_operand(backend, device, dtype, poisoned):
    x, r = (torch.randn(2, 21, 9, 12).to(device, dtype).contiguous(memory_format=NHWC) for _ in range(2))
    a, b, s = (torch.randn(21, device=device) for _ in range(3))

    def run(primitives, to):
        operand, residual = Operand(to(x), (to(a), to(b)), relu=True), Operand(to(r), (to(s), to(b)), stride=1)
        return primitives.bn_pass(operand, Epilogue(to(s), residual), Pool(3, 2, 1))[0]

    assert_matches(run(backend, lambda t: t), run(reference, lambda t: t), run(reference, torch.Tensor.double))


# The reference's own definition of the lazy operand, masks, reductions and gradients, against autograd.


@pytest.mark.parametrize("name", CONVS)
def test_reference_gradients_are_autograds(name):
    x, weight, scale, _ = (t.double() for t in draw(name, torch.float64))
    g = CONVS[name][2]
    x.requires_grad_()
    weight.requires_grad_()
    c = F.conv2d(x, weight, None, *g)
    dc = torch.randn_like(c)
    dx, dweight = torch.autograd.grad(c, (x, weight), dc)
    product = Product(Operand(dc), weight.detach(), g, data_grad_size=tuple(x.shape[2:]))
    torch.testing.assert_close(reference.conv([product], Epilogue())[0], dx)
    got, sums = reference.wgrad(Operand(dc), Operand(x.detach()), weight.shape[2:], g, sums=True)
    torch.testing.assert_close(got, dweight)
    torch.testing.assert_close(sums, dc.sum((0, 2, 3)))


def test_reference_lazy_operand_mask_and_reductions():
    x, second = (torch.randn(2, 6, 5, 5).double() for _ in range(2))
    a, b, a2, mean2 = (torch.randn(6).double() for _ in range(4))
    weight = torch.randn(4, 6, 1, 1).double()
    mask = torch.rand(2, 4, 3, 3) > 0.5
    operand = Operand(x, (a, b), (second, a2, mean2), relu=True, stride=2)
    a_, b_, a2_, mean2_ = (t[:, None, None] for t in (a, b, a2, mean2))
    v = torch.relu(a_ * x + a2_ * (second - mean2_) + b_)[:, :, ::2, ::2]
    want = F.conv2d(v, weight) * mask
    y, stats = reference.conv([Product(operand, weight)], Epilogue(mask=mask, reduce="stats"))
    torch.testing.assert_close(y, want)
    assert stats.rows == 18
    torch.testing.assert_close(stats.mean, want.mean((0, 2, 3)))
    torch.testing.assert_close(stats.M2 / 18, want.var((0, 2, 3), unbiased=False))
    xhat = torch.randn_like(want)
    mean, rstd = torch.randn(2, 4).double()
    by = Normalized(xhat, mean, rstd)
    _, (s, sx) = reference.conv([Product(operand, weight)], Epilogue(mask=mask, reduce=by))
    torch.testing.assert_close(s, want.sum((0, 2, 3)))
    normalized = (xhat - mean[:, None, None]) * rstd[:, None, None]
    torch.testing.assert_close(sx, (want * normalized).sum((0, 2, 3)))


def test_a_bottleneck_trains_by_the_primitives_alone():
    """An identity bottleneck in training mode, forward and backward, conv3's output never formed, against autograd."""
    N, K, J, H, eps = 3, 16, 6, 5, 1e-5
    x = torch.relu(torch.randn(N, K, H, H)).double()
    w1, w2, w3 = torch.randn(J, K, 1, 1).double(), torch.randn(J, J, 3, 3).double(), torch.randn(K, J, 1, 1).double()
    gammas, betas = ([torch.randn(n).double() for n in (J, J, K)] for _ in range(2))
    leaves = [x, w1, w2, w3, *gammas, *betas]
    for leaf in leaves:
        leaf.requires_grad_()

    def bn(c, i):
        return F.batch_norm(c, None, None, gammas[i], betas[i], training=True, eps=eps)

    h1 = torch.relu(bn(F.conv2d(x, w1), 0))
    h2 = torch.relu(bn(F.conv2d(h1, w2, padding=1), 1))
    want = torch.relu(bn(F.conv2d(h2, w3), 2) + x)
    dy = torch.randn_like(want)
    grads = torch.autograd.grad(want, leaves, dy)
    x, w1, w2, w3, *rest = (leaf.detach() for leaf in leaves)
    gammas, betas = rest[:3], rest[3:]
    pad = Geometry(padding=1)

    c1, s1 = reference.conv([Product(Operand(x), w1)], Epilogue(reduce="stats"))
    n1 = Affine.of(reference.finalize_stats(s1, gammas[0], betas[0], eps))
    h1 = Operand(c1, (n1.a, n1.b), relu=True)
    c2, s2 = reference.conv([Product(h1, w2, pad)], Epilogue(reduce="stats"))
    n2 = Affine.of(reference.finalize_stats(s2, gammas[1], betas[1], eps))
    h2 = Operand(c2, (n2.a, n2.b), relu=True)
    moments = reference.moments(h2)
    n3 = Affine.of(reference.finalize_moments(moments, w3[:, :, 0, 0], gammas[2], betas[2], eps))
    y, _ = reference.conv([Product(h2, w3, scale=n3.a)], Epilogue(n3.b, Operand(x), relu=True))
    torch.testing.assert_close(y, want)

    g = Operand(dy, mask=~(y <= 0))
    G, dbeta3 = reference.wgrad(g, h2, (1, 1), Geometry(), sums=True)
    dw3, dgamma3, A, B, v = reference.finalize_tail_grad(dbeta3, G[:, :, 0, 0], None, moments, w3[:, :, 0, 0], n3)
    products = [Product(g, A.T[:, :, None, None].contiguous()), Product(h2, B.T[:, :, None, None].contiguous())]
    gh2, sums2 = reference.conv(products, Epilogue(v, mask=h2, reduce=Normalized(c2, n2.mean, n2.rstd)))
    dbeta2, dgamma2 = sums2
    al, be, const = reference.finalize_bn_grad(sums2, s2.rows, n2)
    dc2 = Operand(gh2, (al, const), (c2, be, n2.mean))
    dw2, _ = reference.wgrad(dc2, h1, (3, 3), pad)
    gh1, sums1 = reference.conv(
        [Product(dc2, w2, pad, data_grad_size=(H, H))], Epilogue(mask=h1, reduce=Normalized(c1, n1.mean, n1.rstd))
    )
    dbeta1, dgamma1 = sums1
    al, be, const = reference.finalize_bn_grad(sums1, s1.rows, n1)
    dc1 = Operand(gh1, (al, const), (c1, be, n1.mean))
    dw1, _ = reference.wgrad(dc1, Operand(x), (1, 1), Geometry())
    dx, _ = reference.conv([Product(dc1, w1, data_grad_size=(H, H))], Epilogue(residual=g))

    got = [dx, dw1, dw2, dw3[:, :, None, None], dgamma1, dgamma2, dgamma3, dbeta1, dbeta2, dbeta3]
    for name, mine, autograds in zip(range(len(got)), got, grads, strict=True):
        torch.testing.assert_close(mine, autograds, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"gradient {n}: {m}")


@pytest.mark.parametrize(
    "build, error, says",
    [
        (lambda x, w: ([], Epilogue()), ValueError, "expected at least one product, got none"),
        (lambda x, w: ([Product(Operand(x[0]), w)], Epilogue()), ValueError, "expected 4-D operand and weight"),
        (lambda x, w: ([Product(Operand(x[:, :5]), w)], Epilogue()), ValueError, "expected an operand of 8 channels"),
        (lambda x, w: ([Product(Operand(x), w.double())], Epilogue()), TypeError, "expected a weight in torch.float32"),
        (lambda x, w: ([Product(Operand(x), w)], Epilogue(torch.ones(3))), ValueError, "expected 4 shifts, got"),
        (lambda x, w: ([Product(Operand(x), w)], Epilogue(residual=Operand(x))), ValueError, "expected a residual of"),
        (
            lambda x, w: ([Product(Operand(x), w), Product(Operand(x), w, Geometry(2))], Epilogue()),
            ValueError,
            "expected products of equal sizes",
        ),
        (
            lambda x, w: ([Product(Operand(x[:, :, :1]), w.expand(4, 8, 3, 3))], Epilogue()),
            ValueError,
            "does not fit a map of 1x6",
        ),
    ],
)
@pytest.mark.parametrize("backend", [reference, library, cpu], ids=lambda b: b.NAME)
def test_conv_names_what_does_not_fit(backend, build, error, says):
    with pytest.raises(error, match=says):
        backend.conv(*build(torch.randn(2, 8, 6, 6), torch.randn(4, 8, 1, 1)))


ENGINES = {
    "direct": ["1x1", "1x1-down", "3x3", "3x3-dilated", "7x7-stem", "few-channels", "ragged", "large-result"],
    "winograd": ["3x3", "ragged", "map-1x1-16", "batch-0-16", "wide-map", "large-filters"],
    "onednn": ["1x1", "3x3", "3x3-groups", "7x7-stem", "few-channels"],
}
CONVS_16 = CONVS | {
    "few-channels": ((2, 5, 9, 8), (16, 3), Geometry(padding=1)),
    "ragged": ((3, 40, 7, 5), (48, 3), Geometry(padding=1)),
    "map-1x1-16": ((2, 24, 1, 1), (16, 3), Geometry(padding=1)),
    "batch-0-16": ((0, 24, 4, 4), (16, 3), Geometry(padding=1)),
    "wide-map": ((1, 8, 3, 50), (16, 3), Geometry(padding=1)),
    # 17 MB go past the cache; 17 MB of transformed filters are far from it.
    "large-result": ((1, 16, 131, 129), (256, 1), Geometry()),
    "large-filters": ((2, 512, 7, 5), (512, 3), Geometry(padding=1)),
}


@pytest.mark.parametrize("overwrite", [False, True], ids=["keep", "overwrite"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("engine, name", [(e, n) for e, names in ENGINES.items() for n in names])
def test_engines_of_the_cpu_backend(engine, name, residual, overwrite, poisoned, monkeypatch):
    C = engine_module(engine)
    monkeypatch.setitem(CONVS, name, CONVS_16[name])
    x, weight, scale, shift = draw(name, torch.float32)
    g = CONVS[name][2]
    conv = C.pack_conv(weight, scale, g, [max(1, x.shape[0]), *x.shape[1:]], engine)
    assert conv.engine == engine
    r = (
        torch.randn_like(eager(x, weight, scale, shift, g, None, False)).contiguous(memory_format=NHWC)
        if residual
        else None
    )
    want = eager(x, weight, scale, shift, g, r, True)
    exact = eager(*(t.double() for t in (x, weight, scale, shift)), g, r.double() if residual else None, True)
    before = r.clone() if residual else None
    y = C.conv(x, conv, shift, r, overwrite, True)
    assert_matches(y, want, exact, weight[0].numel())
    if residual:
        assert torch.equal(r, y if overwrite else before)


def test_large_results_into_memory_that_is_not_aligned():
    # Stores past the cache want aligned addresses.
    C = engine_module("direct")
    sizes, x = (1, 256, 131, 129), torch.randn(1, 16, 131, 129).contiguous(memory_format=NHWC)
    memory = torch.randn(sizes[1] * sizes[2] * sizes[3] + 1)[1:]
    y = memory.as_strided(sizes, (memory.numel(), 1, sizes[3] * sizes[1], sizes[1]))
    weight, before = torch.randn(256, 16, 1, 1), y.clone()
    conv = C.pack_conv(weight, torch.ones(256), (1, 0, 1, 1), list(x.shape), "direct")
    got = C.conv(x, conv, None, y, True, True)
    assert got.data_ptr() == y.data_ptr()
    exact = torch.relu(torch.nn.functional.conv2d(x.double(), weight.double()) + before.double())
    assert_matches(got, torch.relu(torch.nn.functional.conv2d(x, weight) + before), exact, 16)
    got, _ = C.bn_pass(
        (y, *[None] * 6, False, None, None, (0,) * 5), -torch.ones(256), None, True, None, 0.0, True, y, "", None
    )
    assert got.data_ptr() == y.data_ptr()


def test_cpu_statistics_where_the_first_row_stands_off():
    """Their error reaches every row: within a few roundings, six deviations off or not."""
    import resnet_kernels.backends.cpu as cpu

    engine_module("onednn")
    x = torch.randn(4, 64, 16, 16).contiguous(memory_format=NHWC)
    x[0, :, 0, 0] = 6
    stats = cpu.reduce(Operand(x), "stats")
    exact = x.double().var((0, 2, 3), correction=0) * stats.rows
    assert ((stats.M2 - exact).abs() / exact).max() < 5e-7


def test_second_moments_of_many_rows_by_products_of_few():
    """A variance is what is left of them where they cancel: one product over all rows errs 4e-7."""
    module = engine_module("onednn")
    h = torch.randn(25, 40, 63, 63).contiguous(memory_format=NHWC)
    rows = h.permute(0, 2, 3, 1).flatten(0, 2).double()
    exact = rows.T @ rows
    assert (module.second_moments(h) - exact).norm() <= 1e-7 * exact.norm()
    rest = h[:1, :, :9, :7].contiguous(memory_format=NHWC)  # fewer rows than one product has
    few = rest.permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(module.second_moments(rest), few.T @ few)


def test_cpu_results_are_the_same_with_any_number_of_threads():
    import resnet_kernels.backends.cpu as cpu

    engine_module("onednn")
    x, h = (torch.randn(3, 32, 23, 21).contiguous(memory_format=NHWC) for _ in range(2))
    weights = [torch.randn(64, 32, 1, 1), torch.randn(64, 32, 3, 3)]
    geometries = [Geometry(), Geometry(padding=1)]

    # oneDNN's weight gradients and MKL's products, where ours do not run, divide their sums by the threads.
    ours = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")

    def run():
        moments = cpu.moments(Operand(h))
        found = [moments.mean, *[moments.M2] * ours]
        found += cpu.bn_pass(Operand(x), Epilogue(reduce="stats"))[1][1:]
        for w, g in zip(weights, geometries, strict=True):
            y, _ = cpu.conv([Product(Operand(x), w, g)], Epilogue())
            dweight, sums = cpu.wgrad(Operand(y), Operand(h), w.shape[2:], g, sums=True)
            found += [y, sums, *[dweight] * ours]
        return found

    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


IN_ANOTHER_PROCESS = """
import sys, torch
from resnet_kernels.backends import cpu, extension
from resnet_kernels.backends.contract import Epilogue, Geometry, Operand, Product

torch.manual_seed(1)
C, _ = extension.load()
found = []

def nhwc(*sizes):
    return torch.randn(sizes).contiguous(memory_format=torch.channels_last)

for channels, K in ((32, 64), (48, 80)):  # 80: two panels, two more and one
    x, g = nhwc(3, channels, 13, 11), nhwc(3, K, 13, 11)
    for R, geometry in ((1, Geometry()), (3, Geometry(padding=1)), (3, Geometry(2, 1)), (3, Geometry(1, 2, 2))):
        w, shift = torch.randn(K, channels, R, R), torch.randn(K)
        for engine in ("direct", "winograd")[: 1 + (geometry == Geometry(padding=1))]:
            conv = C.pack_conv(w, torch.rand(K), geometry, list(x.shape), engine)
            y = C.conv(x, conv, shift, None, False, False)
            found += [y, C.conv(x, conv, shift, y, False, True, torch.rand(K))]
        found.append(cpu.wgrad(Operand(y), Operand(x), (R, R), geometry, sums=True))
        found.append(C.data_grad(y, w, 13, 11, geometry))
    found.append(C.second_moments(g))
x, w = nhwc(1, 16, 131, 129), torch.randn(256, 16, 1, 1)  # 17 MB go past the cache
found.append(C.conv(x, C.pack_conv(w, torch.ones(256), Geometry(), list(x.shape), "direct"), None, None, False, True))
torch.save(found, sys.argv[1])
"""


def test_avx512_computes_what_avx2_does(tmp_path):
    """To the bit: every sum is in the same order."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("no AVX-512, or not by ATEN_CPU_CAPABILITY")
    found = []
    for capability in ("avx512", "avx2"):
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
        command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path / capability)]
        subprocess.run(command, env=environment, check=True)
        found.append(torch.load(tmp_path / capability))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert len(found[0]) == 2 * (5 * 2 + 4 * 2 + 1) + 1


def engine_module(engine):
    from resnet_kernels.backends import extension

    module, reason = extension.load()
    assert module is not None, reason
    if engine != "onednn" and "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("neither AVX2 nor AVX-512")
    return module


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_winograd_leaves_inputs_it_would_spoil_to_another_engine(value):
    C = engine_module("winograd")
    x, weight, scale, shift = draw("3x3", torch.float32)
    x[0, 3, 5, 5] = value
    conv = C.pack_conv(weight, scale, (1, 1, 1, 1), list(x.shape), "winograd")
    y, want = C.conv(x, conv, shift, None, False, True), eager(x, weight, scale, shift, CONVS["3x3"][2], None, True)
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())
    torch.testing.assert_close(y, want, equal_nan=True)


@pytest.mark.parametrize(
    "engine, sizes, geometry, says",
    [
        ("winograd", (16, 8, 3, 3), (2, 1, 1, 1), "expected a 3x3 filter of stride 1"),
        ("winograd", (16, 8, 1, 1), (1, 0, 1, 1), "expected a 3x3 filter of stride 1"),
        ("direct", (15, 8, 1, 1), (1, 0, 1, 1), "output channels a multiple of 16"),
        ("direct", (16, 4, 1, 1), (1, 0, 1, 2), "expected one group"),
        ("cudnn", (16, 8, 1, 1), (1, 0, 1, 1), "expected auto, onednn, direct or winograd, got cudnn"),
    ],
)
def test_engines_say_what_they_cannot_compute(engine, sizes, geometry, says):
    with pytest.raises(RuntimeError, match=says):
        engine_module(engine).pack_conv(torch.randn(sizes), torch.ones(sizes[0]), geometry, [1, 8, 8, 8], engine)


def test_activations_go_back_to_the_pool():
    C = engine_module("onednn")
    x = torch.randn(4, 64, 56, 56).contiguous(memory_format=NHWC)
    first = C.max_pool_relu(x, 3, 2, 1)
    address, size = first.data_ptr(), first.nbytes
    kept, held = first[1:], C.pool_bytes()
    del first
    assert C.pool_bytes() == held, "memory that a view still holds was given back"
    second = C.max_pool_relu(x, 3, 2, 1)
    assert second.data_ptr() != address
    held = C.pool_bytes()
    del kept
    assert C.pool_bytes() >= held + size
    held = C.pool_bytes()
    third = C.max_pool_relu(x, 3, 2, 1)
    assert C.pool_bytes() <= held - size and torch.equal(second, third)


# What training adds, of every backend that has it. Triton's kernels have tests of their own besides.

TRAINS = [b for b in BACKENDS if "training" in b.values[0].SUPPORTS and "interpreted" not in {m.name for m in b.marks}]
WGRADS = {name: c for name, c in CONVS_16.items() if c[0][0]} | {
    "3x3-16": ((2, 16, 9, 11), (32, 3), Geometry(padding=1)),
    "3x3-16-down": ((2, 16, 9, 11), (32, 3), Geometry(stride=2, padding=1)),
    "3x3-16-dilated": ((2, 32, 9, 7), (16, 3), Geometry(padding=2, dilation=2)),
    "1x1-many-rows": ((3, 48, 31, 29), (64, 1), Geometry()),
    "1x1-16-down": ((2, 16, 7, 9), (16, 1), Geometry(stride=2)),
}


@pytest.mark.parametrize("lazy", [False, True], ids=["plain", "lazy"])
@pytest.mark.parametrize("name", WGRADS)
@pytest.mark.parametrize("backend, device", TRAINS)
def test_gradients_of_a_convolution(backend, device, name, lazy, poisoned):
    check_gradients(backend, device, name, lazy, torch.float32)


def check_gradients(backend, device, name, lazy, dtype):
    """dweight with the sums of g, and dx with a mask and the batch norm's sums in the epilogue."""
    sizes, (K, R), g = WGRADS[name]
    C = sizes[1]
    x = torch.randn(sizes, device=device).to(dtype).contiguous(memory_format=NHWC)
    weight = (torch.randn(K, C // g.groups, R, R, device=device) * (C * R * R) ** -0.5).to(dtype)
    c = torch.randn_like(F.conv2d(x, weight, None, *g)).contiguous(memory_format=NHWC)
    dc = torch.randn_like(c)
    a, b, a2, mean = (torch.randn(K, device=device) for _ in range(4))
    p, q, m, r = (torch.randn(C, device=device) for _ in range(4))

    def run(primitives, to):
        dy = Operand(to(dc), (to(a), to(b)), (to(c), to(a2), to(mean))) if lazy else Operand(to(dc))
        h = Operand(to(x), (to(p), to(q)), relu=True) if lazy else Operand(to(x))
        dweight, sums = primitives.wgrad(dy, h, (R, R), g, sums=True)
        product = Product(dy, to(weight), g, data_grad_size=tuple(sizes[2:]))
        mask = Operand(to(x), (to(p), to(q)), relu=True)
        dx, (s, sx) = primitives.conv([product], Epilogue(mask=mask, reduce=Normalized(to(x), to(m), to(r))))
        return dweight, sums, dx, s, sx

    got, want, exact = run(backend, lambda t: t), run(reference, lambda t: t), run(reference, torch.Tensor.double)
    rows = c.numel() // K
    for mine, theirs, true in zip(got, want, exact, strict=True):
        assert_matches(mine, theirs, true, max(rows, K * R * R), maximum=False)


@pytest.mark.parametrize("C", [16, 21, 48, 300])
@pytest.mark.parametrize("backend, device", TRAINS)
def test_moments_statistics_and_sums(backend, device, C, poisoned):
    check_reductions(backend, device, C, torch.float32)


def check_reductions(backend, device, C, dtype):
    x = 5 + torch.randn(3, C, 19, 17, device=device).to(dtype).contiguous(memory_format=NHWC)
    t = torch.randn_like(x)
    a, b, mean, rstd = (torch.randn(C, device=device) for _ in range(4))

    def run(primitives, to):
        h = Operand(to(x), (to(a), to(b)), relu=True)
        moments, stats = primitives.moments(h), primitives.reduce(h, "stats")
        assert moments.rows == stats.rows == 3 * 19 * 17
        sums = primitives.reduce(Operand(to(t), mask=to(x) > 5), Normalized(to(x), to(mean), to(rstd)))
        y, kept = primitives.bn_pass(h, Epilogue(residual=Operand(to(t)), relu=True, reduce="mask"))
        masked, _ = primitives.bn_pass(Operand(to(t), mask=kept), Epilogue())
        return moments.mean, moments.M2, stats.mean, stats.M2, *sums, y, masked

    got, want, exact = run(backend, lambda t: t), run(reference, lambda t: t), run(reference, torch.Tensor.double)
    for mine, theirs, true in zip(got, want, exact, strict=True):
        assert_matches(mine, theirs, true, 3 * 19 * 17, maximum=False)


POOLS = [Pool(3, 2, 1), Pool(2, 2, 0), Pool(3, 1, 1), Pool(5, 3, 2), Pool(1, 2, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("pool", POOLS, ids=lambda p: "-".join(map(str, p)))
@pytest.mark.parametrize("backend, device", [b for b in PASSING if "training" in b.values[0].SUPPORTS])
def test_pooling_tells_its_winners_and_they_get_the_gradient(backend, device, pool, dtype, poisoned):
    """As autograd's, to the bit: of small integers, so that there are ties, with NaNs among them."""
    x, dy = torch.randint(-4, 5, (2, 21, 11, 8), device=device).to(dtype), None
    x[0, 3, 5, 2], x[1, 4, 0, 0], x[1, 4, 1, 1] = float("nan"), float("nan"), float("nan")
    x = x.contiguous(memory_format=NHWC)
    a, b = (torch.randint(-2, 3, (21,), device=device).float() for _ in range(2))
    z = (a[:, None, None] * x + b[:, None, None]).to(dtype).requires_grad_()
    want = F.max_pool2d(torch.relu(z), *pool)
    dy = torch.randint(-3, 4, want.shape, device=device).to(dtype).contiguous(memory_format=NHWC)
    (grad,) = torch.autograd.grad(want, z, dy)

    y, winners = backend.bn_pass(Operand(x, (a, b)), Epilogue(relu=True, reduce="winners"), pool)
    assert torch.equal(y.nan_to_num(99), want.detach().nan_to_num(99)) and winners.dtype == torch.uint8
    ends = want <= 0
    assert torch.equal(winners == NO_WINNER, ends) and (winners[~ends] < pool.kernel**2).all()
    g = Operand(dy, pooled=Pooled(winners, pool, (11, 8)))
    assert torch.equal(backend.bn_pass(g, Epilogue())[0], grad)
    # And with all that a batch norm's gradient applies on top.
    c = torch.randint(-3, 4, x.shape, device=device).to(dtype).contiguous(memory_format=NHWC)
    mean, rstd = torch.randint(-2, 3, (21,), device=device).float(), torch.ones(21, device=device)
    sums = backend.reduce(g, Normalized(c, mean, rstd))
    off = c.float() - mean[:, None, None]
    for got, expected in zip(sums, (grad.float().sum((0, 2, 3)), (grad.float() * off).sum((0, 2, 3))), strict=True):
        assert torch.equal(got, expected)
    dc = dataclasses.replace(g, affine=(a, b), second=(c, b, mean))
    expected = a[:, None, None] * grad + b[:, None, None] + b[:, None, None] * off
    assert torch.equal(backend.bn_pass(dc, Epilogue())[0], expected.to(dtype))
    images = torch.randint(-2, 3, (2, 5, 11, 8), device=device).to(dtype).contiguous(memory_format=NHWC)
    dweight, total = backend.wgrad(dc, Operand(images), (1, 1), Geometry(), sums=True)
    assert torch.equal(dweight[:, :, 0, 0], torch.einsum("nkpq,ncpq->kc", expected, images.float()))
    assert torch.equal(total, expected.sum((0, 2, 3)))


@pytest.mark.parametrize("backend, device", TRAINS)
def test_residuals_of_fewer_channels_and_rows(backend, device, poisoned):
    x, weight = (
        torch.randn(2, 16, 9, 7, device=device).contiguous(memory_format=NHWC),
        torch.randn(32, 16, 1, 1, device=device),
    )
    few, upsample = torch.randn(2, 20, 9, 7, device=device), torch.randn(2, 32, 5, 4, device=device)

    def run(primitives, to):
        product = [Product(Operand(to(x)), to(weight))]
        one, _ = primitives.conv(product, Epilogue(residual=Operand(to(few)), relu=True))
        two, _ = primitives.conv(product, Epilogue(residual=Operand(to(upsample)), upsample=2))
        return one, two

    got, want, exact = run(backend, lambda t: t), run(reference, lambda t: t), run(reference, torch.Tensor.double)
    for mine, theirs, true in zip(got, want, exact, strict=True):
        assert_matches(mine, theirs, true, 16)
