"""Triton's convolutions in training: in the interpreter against the reference, and compiled for GPUs not here."""

import contextlib
import dataclasses

import pytest
import torch
from test_training import CASES, SMALL, check
from torch import nn

from resnet_kernels.backends import gpu, reference
from resnet_kernels.backends.contract import Epilogue, Geometry, Normalized, Operand, Product
from resnet_kernels.backends.gpu import launch, offline
from resnet_kernels.backends.gpu.training import products
from resnet_kernels.ops import chain_training
from resnet_kernels.ops.chain_backward import Backward
from resnet_kernels.ops.spec import BlockSpec, NormSpec, TrainingPlan
from resnet_kernels.testing import RESNET_CASES, assert_matches

NHWC = torch.channels_last
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpreted, id="interpreted"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]


class Draw:
    """What a product of C channels to K on N maps of P x Q takes."""

    def __init__(self, dtype, device, N, C, K, P, Q):
        self.dtype, self.device = dtype, device
        self.N, self.C, self.K, self.P, self.Q = N, C, K, P, Q

    def t(self, channels, stride=1, upsample=1):
        """A map whose every stride-th row and column is P x Q, or P x Q's every upsample-th."""
        P, Q = (-(-n // upsample) * stride - stride // 2 for n in (self.P, self.Q))
        return torch.randn(self.N, channels, P, Q).to(self.device, self.dtype).contiguous(memory_format=NHWC)

    def v(self, channels):
        return torch.randn(channels).to(self.device)

    def w(self, K, C, R=1):
        return (torch.randn(K, C, R, R) * (C * R * R) ** -0.5).to(self.device, self.dtype)

    def m(self, channels):
        return torch.rand(self.N, channels, self.P, self.Q).to(self.device) > 0.4

    def x(self, channels, stride=1):
        return Operand(self.t(channels, stride), stride=stride)

    def h(self, channels, upsample=1):
        return Operand(self.t(channels, 1, upsample), (self.v(channels), self.v(channels)), relu=True)

    def g(self, channels):
        return Operand(self.t(channels), mask=self.m(channels))

    def dc(self, channels):
        second = self.t(channels), self.v(channels), self.v(channels)
        return Operand(self.t(channels), (self.v(channels), self.v(channels)), second)

    def by(self, operand, scale=False):
        """A forward product."""
        C, g = operand.tensor.shape[1], Geometry()
        return Product(operand, self.w(self.K, C), g, self.v(self.K) if scale else None)

    def back(self, operand, R=1, g=None):
        w = self.w(operand.tensor.shape[1], self.K, R)
        return Product(operand, w, g or Geometry(), data_grad_size=(self.P, self.Q))

    def xhat(self, tensor):
        return Normalized(tensor, self.v(self.K), self.v(self.K))

    def under(self, shift=None):
        """Masked by an activation, with the sums of its batch norm."""
        h = self.h(self.K)
        return Epilogue(shift, mask=h, reduce=self.xhat(h.tensor))


# Each feature alone, then what blocks ask for, then what is left to the library.
CALLS = {
    "statistics": lambda d: ([d.by(d.x(d.C))], Epilogue(reduce="stats")),
    "mask-out": lambda d: ([d.by(d.x(d.C))], Epilogue(reduce="mask")),
    "affine-relu": lambda d: ([d.by(d.h(d.C))], Epilogue(reduce="stats")),
    "masked": lambda d: ([d.by(d.g(d.C))], Epilogue()),
    "two-tensors": lambda d: ([d.by(d.dc(d.C))], Epilogue()),
    "all-in-one": lambda d: ([d.by(dataclasses.replace(d.dc(d.C), mask=d.m(d.C), relu=True))], Epilogue()),
    "centred": lambda d: ([d.by(dataclasses.replace(d.h(d.C), centre=d.v(d.C)))], Epilogue()),
    "strided-operand": lambda d: ([d.by(d.x(d.C, 2))], Epilogue(reduce="stats")),
    "strided-geometry": lambda d: (
        [Product(Operand(d.t(d.C, 3)), d.w(d.K, d.C), Geometry(3))],
        Epilogue(reduce="stats"),
    ),
    "data-gradient": lambda d: ([d.back(d.x(d.C))], Epilogue()),
    "scale-shift-relu": lambda d: ([d.by(d.x(d.C), True)], Epilogue(d.v(d.K), relu=True, reduce="mask")),
    "two-scales": lambda d: ([d.by(d.x(d.C), True), d.by(d.h(7), True)], Epilogue(d.v(d.K), reduce="stats")),
    "residual": lambda d: ([d.by(d.g(d.C))], Epilogue(None, d.x(d.K))),
    "residual-affine": lambda d: ([d.by(d.g(d.C))], Epilogue(None, d.h(d.K))),
    "residual-two-tensors": lambda d: ([d.by(d.g(d.C))], Epilogue(None, d.dc(d.K))),
    "residual-strided": lambda d: ([d.by(d.g(d.C))], Epilogue(None, d.x(d.K, 2))),
    "residual-narrow": lambda d: ([d.by(d.g(d.C))], Epilogue(None, d.g(d.K - 3))),
    "residual-sliced": lambda d: ([d.by(d.g(d.C))], Epilogue(None, Operand(d.t(d.K)[:, 3:]))),
    "mask-tensor": lambda d: ([d.by(d.x(d.C))], Epilogue(mask=d.m(d.K))),
    "mask-operand": lambda d: ([d.by(d.x(d.C))], Epilogue(mask=d.h(d.K))),
    "mask-plain": lambda d: ([d.by(d.x(d.C))], Epilogue(mask=Operand(torch.relu(d.t(d.K))))),
    "mask-two-tensors": lambda d: ([d.by(d.x(d.C))], Epilogue(mask=d.dc(d.K))),
    "xhat": lambda d: ([d.by(d.x(d.C))], Epilogue(reduce=d.xhat(d.t(d.K)))),
    "xhat-another-mask": lambda d: ([d.by(d.x(d.C))], Epilogue(mask=d.h(d.K), reduce=d.xhat(d.t(d.K)))),
    "tail": lambda d: ([d.by(d.h(d.C), True)], Epilogue(d.v(d.K), d.x(d.K), True, reduce="mask")),
    "tail-projection": lambda d: (
        [d.by(d.h(d.C), True), d.by(d.x(21, 2), True)],
        Epilogue(d.v(d.K), None, True, reduce="mask"),
    ),
    "dh": lambda d: ([d.back(d.g(d.C)), d.by(d.h(d.K))], d.under(d.v(d.K))),
    "dh-stored": lambda d: ([d.back(dataclasses.replace(d.dc(d.C), mask=d.m(d.C)))], d.under()),
    "dx": lambda d: ([d.back(d.dc(d.C))], Epilogue(None, d.g(d.K))),
    "dx-projection": lambda d: ([d.back(d.dc(d.C))], Epilogue(None, Operand(d.t(d.K, 1, 2)), upsample=2)),
    "dx-zero-pad": lambda d: ([d.back(d.dc(d.C))], Epilogue(None, Operand(d.t(d.K, 1, 2)[:, :-2]), upsample=2)),
    "dx-upsample-affine": lambda d: ([d.back(d.dc(d.C))], Epilogue(None, d.h(d.K, 2), upsample=2)),
    "lazy-projection": lambda d: ([d.by(d.h(d.C)), d.by(dataclasses.replace(d.x(9, 2), relu=True))], Epilogue()),
    "through-projection": lambda d: ([d.back(d.g(d.C)), d.by(d.x(d.K, 2))], Epilogue(d.v(d.K))),
    "3x3-statistics": lambda d: (
        [Product(d.h(d.C), d.w(d.K, d.C, 3), Geometry(1, 1))],
        Epilogue(reduce="stats"),
    ),
    "3x3-gradient": lambda d: ([d.back(d.dc(d.C), 3, Geometry(1, 1))], d.under()),
    "3x3-alone": lambda d: ([d.back(d.x(d.C), 3, Geometry(1, 1))], Epilogue()),
    "3x3-frozen": lambda d: (
        [Product(d.h(d.C), d.w(d.K, d.C, 3), Geometry(1, 1), d.v(d.K)), d.by(d.x(7, 2), True)],
        Epilogue(d.v(d.K), d.x(d.K), True, reduce="mask"),
    ),
    "1x1-strided-gradient": lambda d: (
        [Product(Operand(d.t(d.C, 1, 2)), d.w(d.C, d.K), Geometry(2), data_grad_size=(d.P, d.Q))],
        Epilogue(None, d.x(d.K)),
    ),
}  # fmt: skip

# N, C, K, P, Q and the architecture whose tiles are taken.
SIZES = {
    "odd": (2, 20, 24, 5, 7, 80),
    "tiles": (2, 72, 136, 9, 8, 90),
    "words": (1, 64, 32, 11, 12, 90),
    "row": (1, 13, 11, 1, 1, 80),
}


def converted(value, dtype, pack=False):
    """Activations, weights and vectors in dtype, as far as they are not its own; a mask of an operand packed."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() and dtype == torch.float64 else value
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(converted(v, dtype, pack) for v in value)
    if isinstance(value, Normalized):
        return Normalized(*(converted(v, dtype) for v in value))
    if dataclasses.is_dataclass(value):
        fields = {f.name: converted(getattr(value, f.name), dtype, pack) for f in dataclasses.fields(value)}
        if pack and isinstance(value, Operand) and value.mask is not None:
            fields["mask"] = products.packed_bits(value.mask)
        return type(value)(**fields)
    return value


def plain_sums(y, by):
    """What torch's own sums in fp32 leave: the reference's are in fp64."""
    v = y.float()
    if by == "stats":
        mean = v.mean((0, 2, 3))
        return mean, (v - mean[:, None, None]).square().sum((0, 2, 3))
    off = by.tensor.float() - by.mean.float()[:, None, None]
    return v.sum((0, 2, 3)), (v * off).sum((0, 2, 3)) * by.rstd


def compare(call, dtype, arch, backend=gpu):
    """The backend's call against the reference's, and what it reduces against the result it is of."""
    terms, epilogue = converted(call, dtype, pack=True)
    with launch.assume_arch(arch) if launch.INTERPRETING else contextlib.nullcontext():
        y, reduced = backend.conv(terms, epilogue)
    # What it is reduced to is tested apart: the reference's is of another rounding.
    want, _ = reference.conv(*call)
    exact, _ = reference.conv(*converted(call, torch.float64))
    assert y.is_contiguous(memory_format=NHWC)
    longest = sum(p.packed.shape[1] * p.packed.shape[2] ** 2 for p in call[0])
    # The library sums in an order of its own: on CPUs fp16 in parts that are rounded.
    by_library = any(p.packed.shape[2] > 1 for p in call[0])
    assert_matches(y, want, exact, longest, maximum=not by_library)
    by = epilogue.reduce
    if by is None:
        assert reduced is None
    elif by == "mask":
        assert tuple(reduced.shape) == gpu.mask_size(y.shape)
        assert torch.equal(reduced, products.packed_bits(~(y <= 0)))
    else:
        exact_sums = reference.reduce(Operand(y.double()), converted(by, torch.float64))
        if by == "stats":
            assert reduced.rows == exact_sums.rows
        for got, eager, of_ours in zip(reduced[-2:], plain_sums(y, by), exact_sums[-2:], strict=True):
            assert got.dtype == torch.float32
            # The interpreter (numpy) adds a tile's rows one after the other, a GPU as a tree, torch in pairs: the
            # largest of a vector of twenty errors is compared on GPUs only.
            assert_matches(got, eager, of_ours, y[:, 0].numel(), maximum=not launch.INTERPRETING)
    return y


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", CALLS)
def test_convolutions(name, sizes, dtype, device, poisoned):
    if name == "centred" and dtype != "fp32":
        pytest.skip("an operand is centred in fp32 only")
    *numbers, arch = SIZES[sizes]
    compare(CALLS[name](Draw(DTYPES[dtype], device, *numbers)), DTYPES[dtype], arch)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tail", "dh", "dh-stored", "dx", "3x3-gradient"])
def test_nan_passes_where_the_reference_lets_it(name, dtype, device, poisoned):
    """In an operand (dropped by its mask, or not), its second tensor, a residual, and what masks the result."""
    terms, epilogue = CALLS[name](Draw(DTYPES[dtype], device, 2, 24, 40, 5, 6))
    operands = [p.operand for p in terms] + [o for o in (epilogue.residual, epilogue.mask) if o is not None]
    tensors = [o.tensor for o in operands] + [o.second[0] for o in operands if o.second is not None]
    for i, t in enumerate(tensors):
        t[0, i, 0, i] = t[1, 3, i, 2] = float("nan")
    y = compare((terms, dataclasses.replace(epilogue, reduce=None)), DTYPES[dtype], 90)
    assert y.isnan().any() and not y.isnan().all()
    if epilogue.reduce == "mask":
        with launch.assume_arch(90):
            y, bits = gpu.conv(terms, epilogue)
        assert torch.equal(bits, products.packed_bits(~(y <= 0))) and products.packed_bits(y.isnan()).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows, span", [(1, 64), (64, 64), (65, 64), (3000, 64), (200_001, 64)])
def test_statistics_are_merged_by_chans_formula(rows, span, device, poisoned):
    """Two levels of merging at most here, of means that are far from zero."""
    x = (1000 + torch.randn(rows, 3, dtype=torch.float64)).to(device)
    tiles = x.split(span)
    means = torch.stack([t.mean(0) for t in tiles]).float()
    M2s = torch.stack([(t - t.mean(0)).square().sum(0) for t in tiles]).float()
    mean, M2 = products.merge(torch.stack([means, M2s]), rows, span, True)
    torch.testing.assert_close(mean.double(), x.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(M2.double(), (x - x.mean(0)).square().sum(0), rtol=1e-4, atol=1e-3)
    rstd = torch.rand(3, device=device)
    one, two = products.merge(torch.stack([means, M2s]), rows, span, False, rstd)
    torch.testing.assert_close(one, means.double().sum(0).float())
    torch.testing.assert_close(two, M2s.sum(0) * rstd, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, kept", [(torch.float32, True), (torch.float16, False)], ids=["fp32", "fp16"])
def test_a_mask_is_of_the_rounded_value(dtype, kept, device):
    d = Draw(dtype, device, 1, 8, 8, 3, 3)
    tiny = torch.full((8,), 1e-9, device=device)
    by = Operand(torch.ones_like(d.t(8)), (tiny, torch.zeros_like(tiny)), relu=True)
    y, _ = gpu.conv([d.by(d.x(8))], Epilogue(mask=by))
    assert bool(y.all()) == kept and bool(y.any()) == kept


@pytest.mark.parametrize("device", DEVICES)
def test_an_empty_batch(device):
    x, w = torch.randn(0, 8, 4, 4, device=device), torch.randn(16, 8, 1, 1, device=device)
    for by in ("stats", "mask", Normalized(torch.randn(0, 16, 4, 4, device=device), *torch.ones(2, 16, device=device))):
        y, reduced = gpu.conv([Product(Operand(x), w)], Epilogue(reduce=by))
        assert y.shape == (0, 16, 4, 4)
        if by == "mask":
            assert tuple(reduced.shape) == gpu.mask_size(y.shape) == (0, 2)
        else:
            assert not torch.stack(reduced[-1:]).any()


@pytest.mark.parametrize("device", DEVICES)
def test_what_materializes(device):
    d = Draw(torch.float32, device, 2, 8, 8, 4, 3)
    h, x = d.h(8), d.x(8)
    assert gpu.materialize(h, 1) is h and gpu.materialize(x, 3).tensor is x.tensor
    materialized = gpu.materialize(h, 3)
    assert materialized.plain
    torch.testing.assert_close(materialized.tensor, reference.bn_pass(h, Epilogue())[0])


@pytest.mark.parametrize("device", DEVICES)
def test_twice_the_same_bits(device):
    call = CALLS["dh"](Draw(torch.float16, device, 3, 40, 72, 8, 9))
    (y, sums), (again, sums_again) = (gpu.conv(*converted(call, torch.float16, pack=True)) for _ in range(2))
    assert torch.equal(y, again) and all(map(torch.equal, sums, sums_again))


# Whole blocks.


def of_case(case, device, frozen=False):
    """A function that draws the block, its last batch norms frozen if told so, and its input."""

    def make():
        block = case.make().train().to(device)
        last = [block.bn2 if case.basic else block.bn3, block.downsample]
        for m in last if frozen else []:
            if m is not None:
                m.eval()
        return block, case.input(device=device)

    return make


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [c for c in SMALL if c.name != "wide"], ids=str)
def test_blocks_train(case, dtype, device, poisoned):
    check(of_case(case, device), DTYPES[dtype], "gpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["odd-channels-down", "basic-odd-down", "batch-7"])
def test_blocks_train_with_their_last_batch_norms_frozen(name, dtype, device, poisoned):
    # As many draws as make 64 values of a vector of the narrowest batch norm.
    check(of_case(CASES[name], device, frozen=True), DTYPES[dtype], "gpu", draws=-(-64 // CASES[name].planes))


# What a GPU would run: recorded, compiled and read.


def launches_of_training(case, dtype, arch):
    """Of a block's forward and backward pass."""
    convs = [m for m in case.make().modules() if isinstance(m, nn.Conv2d)]
    shortcut = "projection" if len(convs) == (3 if case.basic else 4) else "identity"
    with launch.recording(arch) as launches, torch.device("meta"):
        x = torch.empty(case.N, case.inplanes, case.H, case.W, dtype=dtype).to(memory_format=NHWC)
        weights = [torch.empty(c.weight.shape, dtype=dtype) for c in convs]
        vectors = [torch.empty(w.shape[0]) for w in weights]
        unused = [torch.empty(0) for _ in weights]
        n = len(convs)
        fields = [
            tuple(c.stride[0] for c in convs),
            tuple(c.dilation[0] for c in convs),
            tuple(c.groups for c in convs),
        ]
        spec, batch = BlockSpec(*fields, shortcut), [True] * n
        shapes = [w.shape for w in weights]
        stored = chain_training.stored_outputs(x.shape, shapes, spec, batch, spec.geometries(weights))
        plan = TrainingPlan(spec, (NormSpec(1e-5, True, ""),) * n, stored, "gpu")
        kept = chain_training.Forward(gpu, x, weights, vectors, vectors, unused, unused, plan).run()
        every = [True] * n
        Backward(gpu, x, weights, kept, plan, True, every, every).run(torch.empty_like(kept.y))
    return launches


def read_all(cases, dtype, arch):
    """Every distinct kernel of products.py."""
    found = {}
    for case in cases:
        for made in launches_of_training(case, dtype, arch):
            if made.name in ("products", "merge"):
                found.setdefault(offline.specialize(made, arch)[0], made)
    return [(made, offline.read(made, arch)) for made in found.values()]


def large(*cases):
    return [dataclasses.replace(c, N=256) for c in cases]


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_training_compiles_clean(arch):
    bottlenecks = [c for c in RESNET_CASES if not c.basic]
    rows = read_all(large(*bottlenecks), torch.bfloat16, arch)
    assert {made.name for made, _ in rows} == {"products", "merge"}
    for made, c in rows:
        name = f"{made.name} {made.what} sm_{arch}"
        assert not c.wrong(), f"{name}: {c.wrong()}"
        assert c.programs >= 1 and made.work.bytes > 0, name
        if made.name == "products":
            assert set(c.matrix) == {{80: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}[arch]}, f"{name}: {c.matrix}"
            assert c.async_copies > 0, f"{name}: rows are not copied asynchronously"
            operands = [made.arguments[n] for n in ("first", "second", "residual") if made.arguments[n] is not None]
            assert bool(c.nan_max) == (made.arguments["RELU"] or any(o.RELU.value for o in operands)), name


@pytest.mark.parametrize("arch, dtype", [(80, torch.float16), (90, torch.float32)], ids=str)
@pytest.mark.parametrize("tf32", [False, True])
def test_training_compiles_clean_in_other_dtypes(tf32, arch, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    cases = [c for c in RESNET_CASES if c.name in ("r50-layer1-first", "r50-layer2-down")]
    for made, c in read_all(large(*cases), dtype, arch):
        assert not c.wrong(), f"{made.name} {made.what}: {c.wrong()}"
        if made.name == "products" and dtype == torch.float32:
            assert bool(c.matrix) == tf32, f"{made.what}: {c.matrix}"


def test_bytes_of_a_products_launch_counted_by_hand():
    case = next(c for c in RESNET_CASES if c.name == "r50-layer1")
    N, M, J, K = 64, 64 * 56 * 56, 64, 256
    launches = launches_of_training(dataclasses.replace(case, N=N), torch.bfloat16, 90)
    made = [m for m in launches if m.name == "products"]
    first, tail, dh, dx = made
    tiles = [m.grid // -(-n // m.arguments["BLOCK_N"]) for m, n in zip(made, (J, K, J, K), strict=True)]
    weight = 2 * J * K
    assert [m.work.bytes for m in made] == [
        2 * M * (K + J) + weight + 8 * tiles[0] * J,
        2 * M * (J + K + K) + weight + M * K // 8,
        # g and its bits, h2, gh2; c2 that h2 is made of is what masks.
        2 * M * (K + J + J) + M * K // 8 + weight + 2 * J * J + 8 * tiles[2] * J,
        2 * M * (J + J + K + K) + M * K // 8 + weight,
    ]
    assert [m.work.flops for m in made] == [2 * M * J * K, 2 * M * J * K, 2 * M * (J * K + J * J), 2 * M * J * K]
    assert all(m.work.issued >= m.work.flops and m.work.copied >= m.work.bytes for m in made)
