"""The Triton kernels of training that are no convolutions: passes and their reductions, weight gradients, moments, and
the algebra per channel. Against the reference in the interpreter and on a GPU; compiled for GPUs that are not here."""

import offline_launches
import pytest
import torch

from resnet_kernels.backends import reference
from resnet_kernels.backends.contract import (
    Affine,
    Epilogue,
    Geometry,
    Moments,
    Normalized,
    Operand,
    Stats,
)
from resnet_kernels.backends.gpu.training import finalize, products, reductions, wgrad
from resnet_kernels.testing import assert_matches

NHWC = torch.channels_last
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpreted, id="interpreted"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
on = pytest.mark.parametrize("device", DEVICES)
in_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])


def draw(sizes, dtype, device):
    return torch.randn(sizes).to(device, dtype).contiguous(memory_format=NHWC)


def vector(n, device):
    return torch.randn(n).to(device)


# Vectors with which an affine has the sign of the exact one in any precision: what is a mask must not flip.
def coarse(n, device):
    a = 2.0 ** torch.randint(-1, 2, (n,)) * torch.where(torch.rand(n) > 0.5, 1, -1)
    return a.to(device), (torch.randint(-4, 5, (n,)) / 4).to(device)


def exactly(value):
    """The same in fp64, whatever it consists of."""
    if isinstance(value, torch.Tensor):
        return value if value.dtype == torch.bool else value.double()
    if isinstance(value, tuple):
        parts = [exactly(v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, (Operand, Epilogue)):
        return type(value)(**{name: exactly(v) for name, v in vars(value).items()})
    return value


OPERANDS = {
    "plain": "",
    "stride": "stride",
    "mask": "mask",
    "affine": "affine",
    "relu": "relu",
    "lazy": "affine relu",
    "two": "mask affine second",
    "all": "mask affine second relu stride",
}


def operand_of(terms, sizes, dtype, device):
    """An operand that stands for `sizes`."""
    N, C, P, Q = sizes
    terms = terms.split()
    s = 2 if "stride" in terms else 1
    own = N, C, P * s - s // 2, Q * s - s // 2
    return Operand(
        draw(own, dtype, device),
        (vector(C, device), vector(C, device)) if "affine" in terms else None,
        (draw(own, dtype, device), vector(C, device), vector(C, device)) if "second" in terms else None,
        "relu" in terms,
        (torch.rand(own) > 0.4).to(device).contiguous(memory_format=NHWC) if "mask" in terms else None,
        s,
        vector(C, device) if "centre" in terms else None,
    )


EPILOGUES = [
    "",
    "shift",
    "residual",
    "residual-affine",
    "residual-mask",
    "fewer",
    "upsample",
    "relu",
    "bits",
    "operand",
    "bool",
    "shift residual-mask relu operand",
    "fewer upsample residual-affine relu bool",
]


def epilogue_of(terms, sizes, dtype, device, reduce=None):
    N, C, P, Q = sizes
    shift, residual, mask, upsample = None, None, None, 1
    if "shift" in terms:
        shift = vector(C, device)
    if "residual" in terms or "fewer" in terms or "upsample" in terms:
        upsample = 2 if "upsample" in terms else 1
        own = N, C - 3 if "fewer" in terms else C, -(-P // upsample), -(-Q // upsample)
        more = ("affine " if "affine" in terms else "") + ("mask" if "residual-mask" in terms else "")
        residual = operand_of(more, own, dtype, device)
    if "operand" in terms:
        mask = Operand(draw(sizes, dtype, device), coarse(C, device), relu=True)
    if "bool" in terms:
        mask = (torch.rand(sizes) > 0.5).to(device)
    return Epilogue(shift, residual, "relu" in terms, mask, reduce, False, upsample)


def check_pass(x, epilogue):
    t, reduced = reductions.bn_pass(x, epilogue)
    want, of_want = reference.bn_pass(x, epilogue)
    exact, of_exact = reference.bn_pass(exactly(x), exactly(epilogue))
    assert t.is_contiguous(memory_format=NHWC)
    assert_matches(t, want, exact)
    return t, reduced, of_want, of_exact


SIZES = [(2, 21, 5, 7), (1, 64, 1, 1), (3, 70, 3, 9)]


@on
@in_dtypes
@pytest.mark.parametrize("terms", OPERANDS)
def test_a_pass_of_any_operand(terms, dtype, device, poisoned):
    for sizes in SIZES:
        check_pass(operand_of(OPERANDS[terms], sizes, dtype, device), Epilogue())


@on
@in_dtypes
@pytest.mark.parametrize("terms", EPILOGUES)
def test_a_pass_with_any_epilogue(terms, dtype, device, poisoned):
    for sizes in SIZES:
        epilogue = epilogue_of(terms, sizes, dtype, device, "mask" if "bits" in terms else None)
        t, bits, *_ = check_pass(operand_of("affine", sizes, dtype, device), epilogue)
        if "bits" in terms:
            assert bits.dtype == torch.uint8 and torch.equal(bits, products.packed_bits(~(t <= 0)))


def rowwise(t):
    return t.permute(0, 2, 3, 1).flatten(0, 2)


def fp32_stats(t):
    """As fp32 sums make them, in two passes: the reference sums in fp64, and rounds once."""
    rows = rowwise(t.float())
    mean = rows.sum(0) / rows.shape[0]
    return Stats(rows.shape[0], mean, (rows - mean).square().sum(0))


@on
@in_dtypes
@pytest.mark.parametrize("sizes", [*SIZES, (7, 24, 11, 13)], ids=str)
def test_statistics_are_those_of_the_rounded_result(sizes, dtype, device, poisoned):
    found, rows = [], sizes[0] * sizes[2] * sizes[3]
    for _ in range(4):  # the errors of a few channels are chance
        epilogue = epilogue_of("residual relu", sizes, dtype, device, "stats")
        t, stats, _, _ = check_pass(operand_of("affine", sizes, dtype, device), epilogue)
        # Of our own rounded result.
        exact = reference.reduce(Operand(t.double()), "stats")
        alone = reductions.reduce(Operand(t), "stats")
        assert stats.rows == alone.rows == rows
        assert torch.equal(alone.mean, stats.mean) and torch.equal(alone.M2, stats.M2)
        found.append([*stats[1:], *fp32_stats(t)[1:], *exact[1:]])
    columns = [torch.stack(column) for column in zip(*found, strict=True)]
    for i, name in enumerate(("mean", "M2")):
        assert_matches(columns[i], columns[2 + i], columns[4 + i], rows, name)


@on
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_a_mean_of_50_standard_deviations_costs_statistics_nothing(dtype, device):
    x = (50 + torch.randn(9, 20, 23, 19)).to(device, dtype).contiguous(memory_format=NHWC)
    stats = reductions.reduce(Operand(x), "stats")
    exact = reference.reduce(Operand(x.double()), "stats")
    torch.testing.assert_close(stats.M2.double(), exact.M2, rtol=3e-6, atol=0)
    torch.testing.assert_close(stats.mean.double(), exact.mean, rtol=3e-7, atol=0)


@on
@in_dtypes
@pytest.mark.parametrize("terms", ["", "mask", "mask affine", "affine relu stride"])
@pytest.mark.parametrize("sizes", [*SIZES, (7, 24, 11, 13)], ids=str)
def test_sums_of_the_gradient(sizes, terms, dtype, device, poisoned):
    C, rows, found = sizes[1], sizes[0] * sizes[2] * sizes[3], []
    for _ in range(4):  # the errors of a few channels are chance
        x = operand_of(terms, sizes, dtype, device)
        by = Normalized(draw(sizes, dtype, device), vector(C, device), torch.rand(C).to(device) + 0.5)
        # The sums are those of the rounded values.
        value = reference._value(x)
        got = reductions.reduce(x, by)
        # What torch sums in fp32; the reference sums in fp64.
        v, off = value.float(), by.tensor.float() - by.mean[:, None, None]
        plain = v.sum((0, 2, 3)), (v * off).sum((0, 2, 3)) * by.rstd
        found.append([*got, *plain, *reference.reduce(Operand(value.double()), exactly(by))])
        t, again = reductions.bn_pass(x, Epilogue(reduce=by))
        assert all(map(torch.equal, got, again))
    sums = [torch.stack(column) for column in zip(*found, strict=True)]
    for i in range(2):
        assert_matches(sums[i], sums[2 + i], sums[4 + i], rows, maximum=False)


@on
def test_nan_goes_through_relu_masks_and_sums(device):
    x, m = (draw((1, 16, 4, 5), torch.float32, device) for _ in range(2))
    x[0, 1, 0, 0] = x[0, 2, 1, 1] = m[0, 3, 2, 2] = float("nan")
    m[0, 1, 0, 0] = 1
    keep = torch.ones_like(x, dtype=torch.bool)
    keep[0, 2, 1, 1] = False
    t, bits = reductions.bn_pass(Operand(x, mask=keep), Epilogue(relu=True, mask=Operand(m, relu=True), reduce="mask"))
    want, _ = reference.bn_pass(Operand(x, mask=keep), Epilogue(relu=True, mask=Operand(m, relu=True)))
    assert torch.equal(t.isnan(), want.isnan())
    # A masked NaN is gone, a kept one stays, and what a NaN masks is kept.
    assert t[0, 2, 1, 1] == 0 and t[0, 1, 0, 0].isnan()
    assert t[0, 3, 2, 2] == x[0, 3, 2, 2].clamp_min(0)
    assert torch.equal(bits, products.packed_bits(want))
    for by in ("stats", Normalized(x, x.new_zeros(16), x.new_ones(16))):
        got, of_reference = reductions.reduce(Operand(x), by), reference.reduce(Operand(x), by)
        for a, b in zip(got, of_reference, strict=True):
            assert not isinstance(a, torch.Tensor) or torch.equal(a.isnan(), b.isnan())


@on
def test_a_pass_over_no_rows(device):
    x = Operand(draw((0, 8, 4, 4), torch.float32, device))
    t, stats = reductions.bn_pass(x, Epilogue(reduce="stats"))
    assert t.shape == (0, 8, 4, 4) and stats.rows == 0 and stats.mean.isnan().all()
    assert reductions.bn_pass(x, Epilogue(reduce="mask"))[1].shape == (0, 1)
    dweight, sums = wgrad.wgrad(x, x, (1, 1), Geometry(), sums=True)
    assert dweight.shape == (8, 8, 1, 1) and not dweight.any() and not sums.any()
    assert wgrad.moments(x).rows == 0


# Weight gradients and moments.

# g's terms, x's terms: those of a tail, of a projection, of a first convolution, ...
PAIRS = [
    ("", ""),
    ("mask", "affine relu"),
    ("mask", "stride"),
    ("affine second", ""),
    ("mask affine second", "affine relu"),
    ("affine", "relu stride"),
    ("affine second stride", "mask affine second relu"),
]
GRADIENTS = [(2, 21, 13, 5, 7), (1, 70, 150, 3, 1), (2, 16, 70, 13, 11), (1, 5, 3, 1, 1)]  # N, K, C, P, Q


def check_wgrad(g, x, kernel, geometry):
    got = wgrad.wgrad(g, x, kernel, geometry, sums=True)
    want = reference.wgrad(g, x, kernel, geometry, sums=True)
    values = [Operand(reference._value(o).double()) for o in (g, x)]
    exact = reference.wgrad(*values, kernel, geometry, sums=True)
    rows = values[0].tensor[:, 0].numel()
    for name, a, b, e in zip(("dweight", "sums"), got, want, exact, strict=True):
        assert_matches(a, b, e, rows, name, maximum=False)
    assert got[0].untyped_storage().data_ptr() != got[1].untyped_storage().data_ptr()


@on
@in_dtypes
@pytest.mark.parametrize("parts", ["one", "many"])
@pytest.mark.parametrize("terms", PAIRS, ids=lambda pair: "-".join(p.replace(" ", "+") or "plain" for p in pair))
def test_weight_gradients_of_rows(terms, parts, dtype, device, poisoned, monkeypatch):
    if parts == "many":
        monkeypatch.setattr(wgrad, "LEAST_SPAN", 1)
    for N, K, C, P, Q in GRADIENTS:
        g = operand_of(terms[0], (N, K, P, Q), dtype, device)
        more = " centre" if dtype == torch.float32 and "relu" in terms[1] else ""
        x = operand_of(terms[1] + more, (N, C, P, Q), dtype, device)
        check_wgrad(g, x, (1, 1), Geometry())


@on
def test_a_strided_1x1_and_no_sums(device, poisoned):
    g, x = draw((2, 24, 4, 5), torch.float32, device), draw((2, 16, 7, 10), torch.float32, device)
    check_wgrad(Operand(g), Operand(x), (1, 1), Geometry(stride=2))
    dweight, sums = wgrad.wgrad(Operand(g), Operand(x), (1, 1), Geometry(stride=2))
    assert sums is None and dweight.shape == (24, 16, 1, 1)


@on
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    "kernel, geometry",
    [(3, Geometry(1, 1)), (3, Geometry(2, 1)), (3, Geometry(1, 1, 1, 4)), (1, Geometry(1, 0, 1, 2))],
    ids=["3x3", "3x3-down", "3x3-groups", "1x1-groups"],
)
def test_other_weight_gradients_are_the_librarys(kernel, geometry, dtype, device):
    x = operand_of("affine relu", (2, 16, 9, 7), dtype, device)
    sizes = 2, 24, geometry.output_size(9, kernel), geometry.output_size(7, kernel)
    g = operand_of("mask affine second", sizes, dtype, device)
    dweight, sums = wgrad.wgrad(g, x, (kernel, kernel), geometry, sums=True)
    assert dweight.dtype == torch.float32
    values = [Operand(reference._value(o)) for o in (g, x)]
    exact = reference.wgrad(*(Operand(v.tensor.double()) for v in values), (kernel, kernel), geometry, sums=True)
    # The library rounds to the dtype.
    want = reference.wgrad(*values, (kernel, kernel), geometry, sums=True)
    assert_matches(dweight.to(dtype), want[0].to(dtype), exact[0], 126, maximum=False)
    assert_matches(sums, want[1], exact[1], 126, maximum=False)


@on
@in_dtypes
@pytest.mark.parametrize("parts", ["one", "many"])
@pytest.mark.parametrize("terms", ["", "affine relu", "stride", "mask affine second"])
def test_moments(terms, parts, dtype, device, poisoned, monkeypatch):
    if parts == "many":
        monkeypatch.setattr(wgrad, "LEAST_SPAN", 1)
    # Two tiles of channels, and two of rows.
    several = (1, 70, 9, 8) if dtype == torch.float32 else (1, 130, 9, 8)
    for N, J, P, Q in [(2, 21, 5, 7), (1, 64, 1, 1), (2, 3, 16, 16)] + [several] * (terms == "affine relu"):
        h = operand_of(terms, (N, J, P, Q), dtype, device)
        got, want = wgrad.moments(h), reference.moments(h)
        exact = reference.moments(Operand(reference._value(h).double()))
        assert got.rows == N * P * Q
        # A sum in fp32 is rounded in the size of what is added, however near to zero the mean is.
        value = rowwise(reference._value(h).double())
        ours, theirs = ((m.double() - exact.mean).norm() for m in (got.mean, fp32_stats(reference._value(h)).mean))
        assert ours <= 2 * theirs + 2**-24 * value.norm() / got.rows**0.5, (ours, theirs)
        ours, theirs = ((m.M2.double() - exact.M2).norm() for m in (got, want))
        # In 16 bits h enters the products as it is: their sums are rounded before the mean is taken from them.
        raw = exact.M2 + (0 if dtype == torch.float32 else got.rows * torch.outer(exact.mean, exact.mean))
        assert ours <= 2 * theirs + 2**-23 * (0.25 + got.rows**0.5 / 8) * raw.norm(), (ours, theirs)
        assert torch.equal(got.M2, got.M2.T)


@on
@pytest.mark.parametrize("parts", ["one", "many"])
def test_a_mean_of_50_standard_deviations_costs_moments_nothing(parts, device, monkeypatch):
    if parts == "many":
        monkeypatch.setattr(wgrad, "LEAST_SPAN", 1)
    mix = torch.randn(24, 24)
    h = (torch.randn(2, 16, 32, 24) @ mix + 250).permute(0, 3, 1, 2).to(device)
    got, exact = wgrad.moments(Operand(h)), reference.moments(Operand(h.double()))
    error = (got.M2.double() - exact.M2).norm() / exact.M2.norm()
    assert error < 3e-7, error
    torch.testing.assert_close(got.mean.double(), exact.mean, rtol=2e-7, atol=0)


@on
def test_means_in_16_bits_are_centred_part_by_part(device, monkeypatch):
    """The rounded h enters the products: with one part for all rows their sum would grow with the rows."""
    monkeypatch.setattr(wgrad, "LEAST_SPAN", 1)
    h = (50 + torch.randn(2, 16, 32, 32)).to(device, torch.float16).contiguous(memory_format=NHWC)
    weight = torch.randn(64, 16) / 4
    got, exact = wgrad.moments(Operand(h)), reference.moments(Operand(h.double()))
    w = weight.to(device)
    variances = [((w.to(m.M2.dtype) @ m.M2) * w).sum(1) / m.rows for m in (got, exact)]
    # PyTorch's own: of the rounded output.
    c = torch.einsum("kj,njpq->nkpq", w.double(), h.double()).half().double()
    eager = c.var((0, 2, 3), unbiased=False)
    ours, theirs = ((v.double() - variances[1]).norm() for v in (variances[0], eager))
    assert ours <= 2 * theirs, (ours, theirs)


@on
def test_the_same_bits_twice(device):
    g, x = (
        operand_of("mask", (3, 40, 13, 11), torch.float16, device),
        operand_of("affine relu", (3, 40, 13, 11), torch.float16, device),
    )
    one, two = (wgrad.wgrad(g, x, (1, 1), Geometry(), sums=True) for _ in range(2))
    assert all(map(torch.equal, one, two))


def test_parts_fill_the_gpu_and_hold_whole_flushes():
    for M in (1, 49, 12544, 50176, 802816):
        for tiles in (1, 2, 10, 64, 400):
            parts, span = wgrad.parts_of(M, tiles, 264)
            assert (parts - 1) * span < M <= parts * span and span % wgrad.FLUSH == 0
            assert parts == 1 or (span >= wgrad.LEAST_SPAN and parts * tiles <= 264)


# The algebra per channel.


def norm_of(K, device):
    return torch.rand(K).to(device) + 0.5, vector(K, device)


def check_all(function, arguments, more, terms, names):
    """A finalizer of this backend against the reference's. more: what has no tensors."""
    got = getattr(finalize, function)(*arguments, *more)
    want = getattr(reference, function)(*arguments, *more)
    exact = getattr(reference, function)(*exactly(arguments), *more)
    for name, a, b, e in zip(names, got, want, exact, strict=True):
        assert_matches(a, b, e, terms, name)
    return got


@on
@pytest.mark.parametrize("K", [7, 21, 300])
@pytest.mark.parametrize("rows", [1, 2, 1000])
def test_a_table_from_statistics(rows, K, device, poisoned):
    stats = Stats(rows, 3 * vector(K, device), rows * torch.rand(K).to(device) * (rows > 1))
    check_all("finalize_stats", (stats, *norm_of(K, device)), (1e-5,), 1, Affine._fields)


@on
@pytest.mark.parametrize("K", [7, 21, 300])
def test_the_gradient_of_a_norm(K, device, poisoned):
    affine = Affine(*(vector(K, device) for _ in range(3)), torch.rand(K).to(device) + 0.5, vector(K, device))
    sums = vector(K, device), vector(K, device)
    check_all("finalize_bn_grad", (sums, 77, affine), (), 1, ("al", "be", "const"))


def moments_of(rows, J, dtype, device):
    """Of activations of `dtype`, with means of up to a few standard deviations."""
    h = (torch.randn(rows, J) * (0.5 + torch.rand(J)) + torch.randn(J)).to(dtype).double()
    off = h - h.mean(0)
    return h, Moments(rows, h.mean(0).float().to(device), (off.T @ off).float().to(device))


SHAPES = [(80, 5), (40, 21), (37, 70), (256, 64)]  # K, J


@on
@in_dtypes
@pytest.mark.parametrize("K, J", SHAPES, ids=str)
def test_a_table_from_moments(K, J, dtype, device, poisoned):
    _, m = moments_of(100, J, dtype, device)
    weight = (vector(K * J, device).view(K, J) * J**-0.5).to(dtype)
    arguments = m, weight, *norm_of(K, device)
    check_all("finalize_moments", arguments, (1e-5,), J, Affine._fields)


@on
def test_a_variance_of_zero_is_not_negative_and_nan_stays(device):
    m = Moments(4, torch.ones(2, device=device), -1e-9 * torch.eye(2, device=device))
    weight, norm = torch.eye(2, device=device), norm_of(2, device)
    got = Affine.of(finalize.finalize_moments(m, weight, *norm, 1e-5))
    assert (got.var == 0).all() and got.rstd.isfinite().all()
    m.M2[0, 0] = float("nan")
    assert Affine.of(finalize.finalize_moments(m, weight, *norm, 1e-5)).rstd.isnan().all()


@on
@in_dtypes
@pytest.mark.parametrize("centred", [False, True], ids=["", "centred"])
@pytest.mark.parametrize("K, J", SHAPES, ids=str)
def test_the_gradient_of_a_tail(K, J, centred, dtype, device, poisoned):
    h, m = moments_of(200, J, dtype, device)
    weight = (vector(K * J, device).view(K, J) * J**-0.5).to(dtype)
    affine = Affine.of(reference.finalize_moments(m, weight, *norm_of(K, device), 1e-5))
    g = torch.randn(200, K).double() + 0.1
    centre = m.mean if centred else None
    G = g.T @ (h - (m.mean.cpu().double() if centred else 0))
    sg, G = g.sum(0).float().to(device), G.float().to(device)
    arguments = sg, G, centre, m, weight, affine
    got, want = (f.finalize_tail_grad(*arguments) for f in (finalize, reference))
    exact = reference.finalize_tail_grad(*exactly(arguments))
    for name in ("dweight", "dgamma", "A", "B"):
        assert_matches(*(getattr(t, name) for t in (got, want, exact)), K, name, maximum=False)
    # v is made from the rounded A and B: ours from ours.
    off = m.mean.double() - (0 if centre is None else centre.double())
    of_rounded = [-(sg.double() / 200) @ t.A.double() - off @ t.B.double() for t in (got, want)]
    ours, theirs = ((t.v.double() - v).norm() for t, v in zip((got, want), of_rounded, strict=True))
    terms = (sg.double() / 200).abs() @ got.A.double().abs() + off.abs() @ got.B.double().abs()
    assert got.v.dtype == torch.float32 and ours <= 2 * theirs + 2**-23 * terms.norm(), (ours, theirs)


@on
def test_what_a_group_of_processes_shares_is_the_algebras(device):
    """Rows that are counted on the device."""
    rows = torch.tensor(50.0, device=device)
    stats = Stats(rows, vector(8, device), torch.rand(8).to(device))
    norm = norm_of(8, device)
    assert torch.equal(finalize.finalize_stats(stats, *norm, 1e-5), reference.finalize_stats(stats, *norm, 1e-5))
    affine = Affine(*(torch.rand(8).to(device) for _ in range(5)))
    got, want = (f.finalize_bn_grad(stats[1:], rows, affine) for f in (finalize, reference))
    assert all(map(torch.equal, got, want))


# Compiled for GPUs that are not here.


@offline_launches.of_one_triton
@pytest.mark.parametrize(
    "arch, dtype, tf32",
    [
        (80, torch.bfloat16, False),
        (90, torch.bfloat16, False),
        (100, torch.bfloat16, False),
        (120, torch.bfloat16, False),
        (90, torch.float16, False),
        (90, torch.float32, False),
        (90, torch.float32, True),
    ],
    ids=str,
)
def test_reductions_compile_clean(arch, dtype, tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    for made, c in offline_launches.read(offline_launches.launches_of_reductions(dtype, arch), arch):
        name = f"{made.name} {made.what} sm_{arch}"
        assert not c.wrong() and c.programs >= 1, f"{name}: {c.wrong()}"
        a = made.arguments
        if made.name == "wgrad" and dtype != torch.float32:
            assert set(c.matrix) == {offline_launches.MATRIX_UNIT[arch]}, f"{name}: {c.matrix}"
            # Each accumulator is added to another once in FLUSH rows.
            accumulators = a["BLOCK_K"] * a["BLOCK_C"] // (32 * c.warps)
            assert c.ptx.count("add.f32") + 2 * c.ptx.count("add.f32x2") >= accumulators, name
        if a.get("RELU") or any(getattr(v, "RELU", False) for v in a.values()):
            assert c.nan_max, f"{name}: no maximum that keeps NaN"


def test_bytes_of_the_launches_counted_by_hand():
    launches = offline_launches.launches_of_reductions(torch.bfloat16, 90)
    M, J, K = 256 * 56 * 56, 64, 256
    of = {made.name: made for made in reversed(launches) if "56x56" in made.what}
    gradient = next(made for made in launches if made.name == "wgrad")
    parts = gradient.arguments["parts_ptr"].shape[0]
    assert gradient.work.bytes == M * (2 * K + K // 8 + 2 * J) + 4 * parts * (K * J + K)
    assert gradient.work.flops == 2 * M * K * J <= gradient.work.issued
    first = next(made for made in launches if made.name == "pass")
    assert of["pass"] is first and first.work.bytes == M * (3 * 2 * K + K // 8)
    moments = next(made for made in launches if "moments" in made.what)
    parts = moments.arguments["parts_ptr"].shape[0]
    assert moments.work.bytes == 2 * M * J + 4 * parts * (J * J + J)
