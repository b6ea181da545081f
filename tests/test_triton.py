"""The Triton kernels without a GPU: in the interpreter, and compiled for GPUs that are not here; and on one."""

import collections
import copy
import dataclasses
from pathlib import Path

import emulated
import offline_launches
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet

import resnet_kernels as rk
from resnet_kernels import cli
from resnet_kernels.analysis.roofline import H200, launches_of
from resnet_kernels.backends import gpu
from resnet_kernels.backends.contract import Call, Geometry, Operand, Packed, PackedBlock, Pool
from resnet_kernels.backends.gpu import configs, launch, offline
from resnet_kernels.backends.gpu.convolution import Convolution
from resnet_kernels.backends.gpu.inference import boxes, dispatch, gather, tail
from resnet_kernels.backends.gpu.inference import hopper as hopper_kernels
from resnet_kernels.backends.gpu.sm90 import launchers
from resnet_kernels.ops import stem_inference as stem_op
from resnet_kernels.testing import ODD_CASES, RESNET_CASES, RESNEXT_CASES, assert_matches, randomize_
from resnet_kernels.tuning import launches

HERE = Path(__file__).parent
NHWC = torch.channels_last
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpreted, id="interpreted"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]


# Kernels by themselves, with configurations of our choice.


def draw(sizes, K, R, g, dtype, device, *, residual=False, second=None):
    """A Convolution; second: (C2, stride)."""
    N, C, H, W = sizes
    x = torch.randn(sizes).to(device, dtype).contiguous(memory_format=NHWC)
    fan = C // g.groups * R * R
    weight = (torch.randn(K, R, R, C // g.groups, device=device) * fan**-0.5).to(dtype)
    scale, shift = torch.randn(K, device=device), torch.randn(K, device=device)
    c = Convolution(x, weight, g, scale, shift, relu=True)
    N, K, P, Q = c.output_sizes
    if residual:
        r = torch.randn(N, K, P, Q, device=device).to(dtype).contiguous(memory_format=NHWC)
        c = dataclasses.replace(c, residual=r)
    if second:
        C2, s = second
        x2 = torch.randn(N, C2, P * s - s // 2, Q * s - s // 2).to(device, dtype).contiguous(memory_format=NHWC)
        w2 = (torch.randn(K, 1, 1, C2, device=device) * C2**-0.5).to(dtype)
        c = dataclasses.replace(c, second=(x2[:, :, ::s, ::s], w2))
    return c


def computed(c, dtype):
    """The convolution by torch, products in `dtype`, rounded to it."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def product(x, weight, g):
        return F.conv2d(x.to(dtype), weight.permute(0, 3, 1, 2).to(dtype), None, *g).to(wide)

    t = product(c.x, c.weight, c.geometry)
    if c.scale is not None:
        t = t * c.scale[:, None, None]
    if c.second is not None:
        t = t + product(*c.second, Geometry())
    t = t + c.shift[:, None, None]
    if c.residual is not None:
        t[:, : c.residual.shape[1]] += c.residual
    return torch.relu(t).to(dtype)


def poisoned_like(c):
    return torch.full(c.output_sizes, float("nan"), dtype=c.x.dtype, device=c.x.device).contiguous(memory_format=NHWC)


TILES = {
    "one-box": configs.Config(64, 32, 32, 4, 2),
    "many": configs.Config(32, 16, 16, 4, 3),
    "persistent": configs.Config(32, 16, 16, 4, 2, persistent=True),
    "wide": configs.Config(128, 64, 64, 8, 3),
}
CONVOLUTIONS = {
    "1x1": ((2, 32, 9, 7), 40, 1, Geometry(), {}),
    "1x1-residual-projection": ((2, 32, 8, 8), 48, 1, Geometry(), {"residual": True, "second": (24, 2)}),
    "3x3": ((3, 24, 10, 6), 32, 3, Geometry(1, 1), {"residual": True}),
    "3x3-down": ((2, 64, 12, 8), 32, 3, Geometry(2, 1), {}),
    "3x3-down-projection": ((5, 64, 6, 10), 32, 3, Geometry(2, 1), {"second": (64, 2)}),
    "3x3-dilated": ((2, 32, 11, 9), 16, 3, Geometry(1, 2, 2), {}),
    "3x3-groups": ((2, 128, 5, 4), 128, 3, Geometry(1, 1, 1, 2), {}),
    "5x5-stride-3": ((2, 64, 9, 12), 16, 5, Geometry(3, 2), {}),
    "map-1x1": ((70, 32, 1, 1), 16, 3, Geometry(1, 1), {}),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=["fp16", "fp32", "bf16"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("kernel", ["boxes", "gather"])
def test_convolutions_by_both_kernels_in_any_tile(kernel, name, tile, dtype, device, monkeypatch):
    if device == "cuda" and kernel == "boxes" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("boxes need the tensor copy engine, which begins with sm_90")
    if device == "cpu" and dtype == torch.float32 and tile in ("many", "persistent"):
        pytest.skip("the interpreter takes as long as there are tiles: small ones in fp16, large ones in both dtypes")
    monkeypatch.setattr(boxes, "LEAST_FILLED", 0.0)
    sizes, K, R, g, more = CONVOLUTIONS[name]
    c, config = draw(sizes, K, R, g, dtype, device, **more), TILES[tile]
    y = poisoned_like(c)
    if kernel == "boxes":
        reason = boxes.why_not(c, 90, config)
        if reason and "whole slices" in reason:
            config = dataclasses.replace(config, BLOCK_K=32)
            reason = boxes.why_not(c, 90, config)
        assert reason is None
        launch.submit(boxes.launch(c, config, y))
    else:
        launch.submit(gather.launch(c, config, y))
    assert_matches(y, computed(c, dtype), computed(c, torch.float64), R * R * sizes[1])


def in_tf32(t):
    """Rounded to tf32's 10 bits."""
    wide = (t.view(torch.int32).long() + 0x1000) & ~0x1FFF
    return wide.to(torch.int32).view(torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("kernel", ["boxes", "gather"])
def test_tf32_is_rounded_and_not_cut_off(kernel, name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32")
    monkeypatch.setattr(boxes, "LEAST_FILLED", 0.0)
    sizes, K, R, g, more = CONVOLUTIONS[name]
    c = draw(sizes, K, R, g, torch.float32, "cuda", **more)
    config, y = configs.Config(64, 32, 32, 4, 2), poisoned_like(c)
    refused = boxes.why_not(c, launch.arch_of(c.x.device), config) if kernel == "boxes" else None
    if refused:
        pytest.skip(f"boxes refuse it: {refused}")
    launch.submit((boxes if kernel == "boxes" else gather).launch(c, config, y))
    second = None if c.second is None else tuple(map(in_tf32, c.second))
    rounded = computed(dataclasses.replace(c, x=in_tf32(c.x), weight=in_tf32(c.weight), second=second), torch.float64)
    exact = computed(c, torch.float64)
    assert_matches(y, rounded.float(), exact, R * R * sizes[1])
    assert not torch.allclose(y.double(), exact, rtol=1e-5, atol=1e-5)


TAILS = {  # N, J, H, W, stride, K, residual, J1
    "no-residual": (2, 64, 8, 8, 1, 128, False, 64),
    "then-next": (2, 64, 8, 8, 1, 256, True, 64),
    "down": (3, 64, 8, 16, 2, 128, True, 128),
    "J-128": (1, 128, 8, 8, 1, 64, True, 256),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", TAILS)
def test_the_tail_of_a_block_and_the_beginning_of_the_next(name, dtype, device, monkeypatch):
    monkeypatch.setattr(boxes, "LEAST_FILLED", 0.0)
    if device == "cuda" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("tails are for GPUs whose products read shared memory: sm_90 and sm_100")
    N, J, H, W, stride, K, residual, J1 = TAILS[name]
    first = draw((N, J, H, W), J, 3, Geometry(stride, 1), dtype, device)
    last = draw((N, J, H // stride, W // stride), K, 1, Geometry(), dtype, device, residual=residual)
    following = draw((N, K, H // stride, W // stride), J1, 1, Geometry(), dtype, device)
    config = dataclasses.replace(configs.for_tail(90, 2, first.rows, J, 1), BLOCK_M=64)
    assert tail.why_not(first, last, 90, config, 1) is None
    assert tail.why_not_after(following) is None
    y, ahead = poisoned_like(last), poisoned_like(following)
    launch.submit(tail.launch(tail.Tail(first, last, following), config, y, ahead))

    def chain(to):
        h = computed(first, to)
        y = computed(dataclasses.replace(last, x=h), to)
        return y, computed(dataclasses.replace(following, x=y), to)

    for got, want, exact in zip((y, ahead), chain(dtype), chain(torch.float64), strict=True):
        assert_matches(got, want, exact, 9 * J)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "weights, geometries",
    [
        ([(128, 256, 1), (64, 128, 3), (256, 64, 1)], [(1, 1, 1)] * 3),
        ([(64, 256, 1), (64, 64, 3), (256, 64, 1), (256, 256, 1)], [(1, 1, 1), (1, 1, 1), (2, 1, 1), (2, 1, 1)]),
        ([(64, 256, 1), (64, 64, 3), (256, 32, 1)], [(1, 1, 1), (1, 1, 1), (1, 1, 2)]),
        ([(64, 256, 1), (64, 64, 3), (256, 64, 1)], [(1, 1, 1), (1, 2, 1), (1, 1, 1)]),
    ],
    ids=["narrowing-3x3", "stride-on-the-last", "groups-in-the-last", "dilated-3x3"],
)
def test_blocks_that_are_no_resnets(weights, geometries, device, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED_PROCESSORS", 1)
    x = torch.randn(4, 256, 16, 16, device=device, dtype=torch.float16)
    ws = [torch.randn(k, c, r, r, device=device, dtype=torch.float16) * (c * r * r) ** -0.5 for k, c, r in weights]
    scales, shifts = ([torch.rand(w.shape[0], device=device) for w in ws] for _ in range(2))
    shortcut = "projection" if len(ws) == 4 else "identity"

    def block(backend, dtype):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        per_channel = [[t.to(wide) for t in ts] for ts in (scales, shifts)]
        with rk.use_backend(backend):
            spec = rk.ops.BlockSpec(*map(tuple, zip(*geometries, strict=True)), shortcut)
            return rk.ops.residual_block(x.to(dtype), [w.to(dtype) for w in ws], *per_channel, spec)

    want, exact = block("library", torch.float16), block("reference", torch.float64)
    assert_matches(block("gpu", torch.float16), want, exact, 9 * 128)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_in_its_group_where_groups_are_not_joined(device):
    x = torch.randn(1, 192, 6, 6, device=device, dtype=torch.float16).contiguous(memory_format=NHWC)
    x[0, 100, 2, 2] = float("nan")
    w = torch.randn(192, 96, 3, 3, device=device, dtype=torch.float16)
    g = Geometry(1, 1, 1, 2)
    y, _ = gpu.conv([dispatch.Product(Operand(x), w, g)], dispatch.Epilogue())
    assert torch.equal(y.isnan(), F.conv2d(x, w, None, *g).isnan()) and y.isnan().any() and not y.isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_weight_inside_a_flat_buffer_of_parameters(device):
    flat = torch.randn(64 * 64 + 1, device=device, dtype=torch.float16)
    w = flat[1:].view(64, 64, 1, 1)
    x = torch.randn(2, 64, 8, 8, device=device, dtype=torch.float16).contiguous(memory_format=NHWC)
    y, _ = gpu.conv([dispatch.Product(Operand(x), w)], dispatch.Epilogue())
    assert_matches(y, F.conv2d(x, w), F.conv2d(x.double(), w.double()), 64)


def pooled(x, weight, shift, g, dtype):
    c = F.conv2d(x.to(dtype), weight.to(dtype), None, *g)
    c = (c.to(shift.dtype) + shift[:, None, None]).to(dtype)
    return F.max_pool2d(torch.relu(c), 3, 2, 1)


STEMS = {  # N, C, H, W, K, R, geometry
    "resnet": (1, 3, 34, 50, 64, 7, Geometry(2, 3)),
    "odd": (2, 3, 37, 21, 24, 7, Geometry(2, 3)),
    "wider-than-a-tile": (1, 1, 9, 270, 16, 3, Geometry(1, 1)),
    "taller-than-a-strip": (1, 4, 75, 11, 16, 5, Geometry(2, 2)),
    "tiny": (2, 3, 1, 2, 70, 7, Geometry(2, 3)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=["fp16", "fp32", "bf16"])
@pytest.mark.parametrize("name", STEMS)
def test_the_stem_in_one_kernel(name, dtype, device, poisoned):
    N, C, H, W, K, R, g = STEMS[name]
    x = torch.randn(N, C, H, W, device=device).to(dtype)
    x[0, 0, H // 2, W // 2] = float("nan")
    weight = (torch.randn(K, C, R, R, device=device) * (C * R * R) ** -0.5).to(dtype)
    shift = torch.randn(K, device=device)
    pool = Pool(3, 2, 1)
    packed = gpu.pack_stem(weight, torch.ones(K, device=device), g, pool)
    assert gpu.stem_channels(tuple(weight.shape), g, pool) == 4 and packed.weight.dim() == 3
    padded = F.pad(x, (0, 0, 0, 0, 0, 4 - C)).contiguous(memory_format=NHWC)
    y = stem_op.run(gpu, padded, packed, shift, g, pool)
    want, exact = pooled(x, weight, shift, g, dtype), pooled(x.double(), weight, shift.double(), g, torch.float64)
    assert exact.isnan().any()
    assert_matches(y, want, exact, C * R * R)


@pytest.mark.parametrize("device", DEVICES)
def test_a_stem_that_pools_otherwise_takes_two_kernels(device):
    x, weight = torch.randn(2, 3, 20, 22, device=device), torch.randn(8, 3, 7, 7, device=device) / 12
    shift, g, pool = torch.randn(8, device=device), Geometry(2, 3), Pool(2, 2, 0)
    assert gpu.stem_channels(tuple(weight.shape), g, pool) == 3
    packed = gpu.pack_stem(weight, torch.ones(8, device=device), g, pool)
    y = stem_op.run(gpu, x.contiguous(memory_format=NHWC), packed, shift, g, pool)
    want = F.max_pool2d(torch.relu(F.conv2d(x, weight, shift, *g)), 2)
    exact = F.max_pool2d(torch.relu(F.conv2d(x.double(), weight.double(), shift.double(), *g)), 2)
    assert_matches(y, want, exact, 147)


@pytest.mark.parametrize("device", DEVICES)
def test_a_stem_with_groups(device):
    x, weight = torch.randn(2, 6, 20, 22, device=device), torch.randn(64, 3, 7, 7, device=device) / 12
    shift, g, pool = torch.randn(64, device=device), Geometry(2, 3, 1, 2), Pool(3, 2, 1)
    assert gpu.stem_channels(tuple(weight.shape), g, pool) == 6
    packed = gpu.pack_stem(weight, torch.ones(64, device=device), g, pool)
    y = stem_op.run(gpu, x.contiguous(memory_format=NHWC), packed, shift, g, pool)
    assert_matches(
        y,
        pooled(x, weight, shift, g, x.dtype),
        pooled(*(t.double() for t in (x, weight, shift)), g, torch.float64),
        147,
    )


@pytest.fixture
def hopper(monkeypatch):
    """What `native` hands to csrc/cuda/sm90 runs emulated; the rest in the interpreter. Returns the names of the
    emulated, counted."""
    library, names = launchers.declared(emulated.sm90()), collections.Counter()

    def run_emulated(name, call, device):
        names[name] += 1
        library.invoke(name, call, None)

    monkeypatch.setattr(launchers, "_run", run_emulated)
    monkeypatch.setattr(launchers.glue, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(hopper_kernels, "_why_not_here", lambda t, arch: None)
    monkeypatch.setattr(dispatch, "gpu_of", lambda device: torch.device("cuda"))
    monkeypatch.setattr(launch, "INTERPRETED_PROCESSORS", 1)
    with launch.assume_arch(90):
        yield names


def bottleneck_with_projection(C, J, stride):
    down = nn.Sequential(nn.Conv2d(C, 4 * J, 1, stride, bias=False), nn.BatchNorm2d(4 * J))
    return resnet.Bottleneck(C, J, stride, down)


@pytest.mark.interpreted
@pytest.mark.parametrize("by", ["rule", "table"])
def test_a_frozen_stage_is_right_by_the_kernels_for_hopper(by, hopper, monkeypatch):
    """By rule by those that are preferred, by a table by those that join most."""

    def measured(device, problem):
        assert device.type == "cpu"  # where it runs, though what it reads may not be there yet
        kernel, config = {
            hopper_kernels.WholeBottleneck: (hopper_kernels.SM90_BOTTLENECK, hopper_kernels.SM90_BOTTLENECK_CONFIG),
            tail.Tail: (hopper_kernels.SM90_TAIL, hopper_kernels.SM90_TAIL_CONFIG),
        }.get(type(problem), (None, None))
        return None if kernel is None else {"kernel": kernel, "config": dataclasses.asdict(config)}

    if by == "table":
        monkeypatch.setattr(dispatch, "measured_choice", measured)
    stages = [
        bottleneck_with_projection(64, 64, 1),
        resnet.Bottleneck(256, 64),
        bottleneck_with_projection(256, 128, 2),
        *(resnet.Bottleneck(512, 128) for _ in range(2)),
    ]
    module = randomize_(nn.Sequential(*stages)).eval().half()
    x = torch.relu(torch.randn(8, 64, 8, 8)).half().contiguous(memory_format=NHWC)
    with torch.no_grad():
        eager, exact = module(x), module.double()(x.double())
        with rk.use_backend("gpu"):
            y = rk.freeze(module.half(), cuda_graphs=False)(x)
    assert_matches(y, eager, exact, 1152)
    # Of 128 channels the one block is a pair, or a tail, and the next one's first convolution is there; likewise of 64.
    joined = {"rule": {"tail": 1, "pair": 1, "bottleneck": 0}, "table": {"tail": 1, "pair": 0, "bottleneck": 2}}
    assert {name: hopper[name] for name in joined[by]} == joined[by] and hopper["conv_act"], hopper


@pytest.mark.interpreted
def test_every_way_of_a_whole_bottleneck_is_right(hopper):
    stage = [bottleneck_with_projection(64, 64, 1), resnet.Bottleneck(256, 64), resnet.Bottleneck(256, 64)]
    x = torch.empty(8, 64, 6, 5, dtype=torch.half)
    with rk.use_backend("gpu"):
        made = launches_of(nn.Sequential(*stage).half(), x)
        wholes = {m.within.key: m.within for m in made if isinstance(m.within, hopper_kernels.WholeBottleneck)}
        assert len(wholes) == 2
        ways = {dispatch.SEPARATE: {"conv_act": 3}, hopper_kernels.SM90_BOTTLENECK: {"bottleneck": 1}}
        for whole, ran in zip(wholes.values(), (ways, ways | {dispatch.CONSECUTIVE_TAILS: {"tail": 1}}), strict=True):
            whole = launches.materialize(whole, x.device)
            exact, plain = launches.plain(whole, torch.float64), launches.plain(whole, x.dtype)
            choices = list(dispatch.candidates_to_measure(whole))
            assert {choice.kernel for choice in choices} == set(ran)
            for choice in choices:
                hopper.clear()
                for y, p, e in zip(launches.run_candidate(whole, choice), plain, exact, strict=True):
                    assert_matches(y, p, e, 576, choice.kernel)
                assert hopper == ran[choice.kernel]


@pytest.mark.interpreted
@pytest.mark.parametrize("name, arch", [("resnet18", 80), ("resnet50", 90), ("resnext50_32x4d", 80)])
def test_frozen_models_in_the_interpreter(name, arch, monkeypatch):
    """Shallow and narrow models, but as large a batch as fused tails and whole boxes want. Of each stage a block that
    changes the map; of the first stage, where tails are fused, another behind it."""
    width = {"groups": 32, "width_per_group": 4} if "next" in name else {}
    kind = resnet.BasicBlock if name == "resnet18" else resnet.Bottleneck
    model = resnet.ResNet(kind, [2, 1, 1, 1], num_classes=8, **width)
    model = randomize_(model).eval().half()
    x = torch.randn(4, 3, 32, 32).half()
    names = collections.Counter()
    monkeypatch.setattr(dispatch, "submit", lambda made: (names.update([made.name]), launch.submit(made)))
    with torch.no_grad(), launch.assume_arch(arch):
        want = copy.deepcopy(model).to(memory_format=NHWC)(x.contiguous(memory_format=NHWC))
        exact = copy.deepcopy(model).double()(x.double())
        with rk.use_backend("gpu"):
            got = rk.freeze(model)(x)
    assert_matches(got, want, exact, 512 * 9)
    assert names["conv_pool"] == 1 and ("conv_box" in names) == (arch == 90)
    assert ("conv3x3_conv1x1" in names) == (arch == 90 and name == "resnet50")


@pytest.mark.interpreted
@pytest.mark.parametrize("groups, C, K", [(4, 4, 4), (32, 4, 8), (3, 20, 20), (2, 64, 32), (6, 1, 2), (5, 7, 3)])
def test_joined_groups_are_the_grouped_convolution(groups, C, K):
    weight = torch.randn(groups * K, 3, 3, C)
    joined = dispatch.join_groups(weight, groups)
    x = torch.randn(1, groups * C, 4, 4)
    to = x.shape[1] // joined.shape[3]
    got = F.conv2d(x, joined.permute(0, 3, 1, 2), groups=to)
    torch.testing.assert_close(got, F.conv2d(x, weight.permute(0, 3, 1, 2), groups=groups))
    assert to == 1 or (groups * K // to) % dispatch.JOINED == 0


# What would run on a GPU: recorded.


def test_resnet50_moves_at_most_40_megabytes_an_image():
    launches = launches_of(*offline_launches.model_and_input("resnet50", 256, torch.bfloat16), 90)
    moved = sum(made.work.bytes for made in launches) / 256
    assert moved <= 40e6, f"{moved / 1e6:.1f} MB"
    assert len(launches) <= 40
    # 8.18 GFLOP but for the classifier.
    assert sum(made.work.flops for made in launches) / 256 == pytest.approx(8.17e9, rel=2e-3)


def test_bytes_of_a_block_counted_by_hand():
    case = next(c for c in RESNET_CASES if c.name == "r50-layer1")
    N, M = 64, 64 * 56 * 56
    model = nn.Sequential(case.make(), case.make()).eval().bfloat16()
    launches = launches_of(model, torch.empty(N, 256, 56, 56, dtype=torch.bfloat16), 90)
    assert [made.name for made in launches] == ["conv_box", "conv3x3_conv1x1", "conv_box", "conv_box"]
    weights = 256 * 64, 9 * 64 * 64, 64 * 256
    # conv1: x in, h1 out. The tail: h1 and x in, y and the next h1 out. Then h1 in, h2 out; h2 and y in, y out.
    elements = [
        M * (256 + 64) + weights[0],
        M * (64 + 256 + 256 + 64) + sum(weights),
        M * (64 + 64) + weights[1],
        M * (64 + 256 + 256) + weights[2],
    ]
    assert [made.work.bytes for made in launches] == [2 * n for n in elements]
    assert [made.work.flops for made in launches] == [
        2 * M * 256 * 64,
        2 * M * (9 * 64 * 64 + 64 * 256 + 256 * 64),
        2 * M * 9 * 64 * 64,
        2 * M * 64 * 256,
    ]
    assert all(made.work.issued >= made.work.flops and made.work.copied >= 0 for made in launches)
    # 4.3 TB/s: this block is bound by memory, its first convolution too.
    assert H200.floor(launches[0].work) == 2 * elements[0] / 4.3e12


def test_why_a_kernel_was_not_taken():
    launches = launches_of(*offline_launches.model_and_input("resnet50", 1, torch.bfloat16), 90)
    assert any(dispatch.TRITON_TAIL in made.refused for made in launches)
    assert any("full" in made.refused.get("boxes", "") for made in launches if made.name == "conv_gather")
    launches = launches_of(*offline_launches.model_and_input("resnet18", 8, torch.bfloat16), 80)
    assert {made.refused.get("boxes") for made in launches[1:]} == {"expected sm_90 or sm_100, got sm_80"}


# Compiled, and read.


def check_compiled(made, c):
    name = f"{made.name} {made.what} sm_{c.arch}"
    assert not c.wrong(), f"{name}: {c.wrong()}"
    if made.name.startswith("conv"):
        assert set(c.matrix) == {offline_launches.MATRIX_UNIT[c.arch]}, f"{name}: {c.matrix}"
        assert c.nan_max, f"{name}: no maximum that keeps NaN"
    by_boxes = made.name in ("conv_box", "conv3x3_conv1x1")
    assert (c.bulk_copies > 0) == by_boxes, name
    if made.name == "conv_gather":
        assert c.async_copies > 0, f"{name}: rows are not copied asynchronously"
    if made.options.get("num_stages", 1) > 1:
        # What is read from registers waits for the product before: a tail's taps and parts, boxes too narrow to turn.
        a = made.arguments
        waits = a["BOX_N"] * a["BOX_H"] > 1 and not a.get("TURNED") if by_boxes else False
        allowed = 2 if waits else 0
        assert c.full_waits <= allowed, f"{name}: {c.full_waits} full waits in a loop that multiplies"
    assert c.programs >= 1, name


@offline_launches.of_one_triton
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_shipped_configurations_compile_clean(arch):
    rows = offline_launches.compiled(arch, torch.bfloat16, *offline_launches.MODELS)
    for made, c in rows:
        check_compiled(made, c)
    names = {made.name for made, _ in rows}
    by_boxes = {"conv_box", "conv3x3_conv1x1"} if arch in configs.OPERANDS_IN_SHARED else set()
    assert names == {"conv_pool", "conv_gather"} | by_boxes


@offline_launches.of_one_triton
@pytest.mark.parametrize("arch", [90])
def test_fp16_compiles_clean(arch):
    for made, c in offline_launches.compiled(arch, torch.float16, ("resnet50", 256)):
        check_compiled(made, c)


@offline_launches.of_one_triton
@pytest.mark.parametrize("tf32, arch", [(True, 80), (True, 90), (False, 90)])
def test_fp32_compiles_clean_by_torchs_flag(tf32, arch, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    model, x = offline_launches.model_and_input("resnet18", 64, torch.float32)
    for made, c in offline_launches.read(launches_of(model, x, arch), arch):
        assert not c.wrong(), f"{made.what}: {c.wrong()}"
        assert bool(c.matrix) == tf32, f"{made.what}: {c.matrix}"


@offline_launches.of_one_triton
@pytest.mark.parametrize("arch, dtype", [(80, torch.bfloat16), (90, torch.bfloat16)], ids=str)
def test_odd_blocks_compile_clean(arch, dtype):
    launches = []
    for case in ODD_CASES + RESNEXT_CASES:
        if case.N:
            model = nn.Sequential(case.make().to(dtype))
            launches += launches_of(model, torch.empty(case.input().shape, dtype=dtype), arch)
    for made, c in offline_launches.read(launches, arch):
        assert not c.wrong(), f"{made.what}: {c.wrong()}"


@offline_launches.of_one_triton
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("sizes", [(512, 512, 15, 3, 2), (516, 512, 14, 3, 1), (1028, 1024, 14, 1, 1)], ids=str)
def test_what_boxes_refuse_compiles_clean_in_large(sizes, arch):
    C, K, H, R, stride = sizes
    with launch.recording(arch) as launches, torch.device("meta"):
        x = torch.empty(256, C, H, H, dtype=torch.bfloat16).to(memory_format=NHWC)
        w = torch.empty(K, C, R, R, dtype=torch.bfloat16)
        gpu.conv(
            [dispatch.Product(Operand(x), w, Geometry(stride, R // 2))], dispatch.Epilogue(torch.empty(K), relu=True)
        )
    (made,) = launches
    assert made.name == "conv_gather" and not offline.read(made, arch).wrong(), offline.read(made, arch).wrong()


@offline_launches.of_one_triton
@pytest.mark.parametrize("arch", [80, 90])
def test_the_lazy_operand_and_passes_compile_clean(arch):
    with launch.recording(arch) as launches, torch.device("meta"):
        for C, K, R, H in ((64, 64, 3, 56), (64, 256, 1, 56), (512, 512, 3, 7)):
            x = torch.empty(64, C, H, H, dtype=torch.bfloat16).to(memory_format=NHWC)
            a, w = torch.empty(C), torch.empty(K, C, R, R, dtype=torch.bfloat16)
            lazy = Operand(x, (a, a), relu=True)
            gpu.conv([dispatch.Product(lazy, w, Geometry(1, R // 2))], dispatch.Epilogue(relu=True))
            gpu.bn_pass(lazy, dispatch.Epilogue(residual=Operand(x)), Pool(3, 2, 1) if R == 3 else None)
    for made, c in offline_launches.read(launches, arch):
        assert not c.wrong() and c.nan_max, f"{made.what}: {c.wrong()}"
        if arch == 90 and made.name == "conv_box":
            # Its operand goes through registers: "wgmma" reads it there.
            assert set(c.matrix) == {"wgmma"}, made.what


@offline_launches.of_one_triton
def test_the_documented_table_is_what_compiles(capsys):
    documented = (HERE.parent / "docs/kernels.md").read_text().split("### ")[1]
    assert cli.main(["kernels"]) == 0
    assert capsys.readouterr().out.strip().removeprefix("### ") == documented.strip(), "run `make kernels`"


@offline_launches.of_one_triton
def test_a_reading_that_should_fail_fails():
    launches = offline_launches.launches_of_models(90, torch.bfloat16, *offline_launches.MODELS)
    ((made, c),) = offline_launches.read(launches[1:2], 90)
    assert dataclasses.replace(c, stack=8).wrong() and dataclasses.replace(c, plain_max=1).wrong()
    assert dataclasses.replace(c, shared=300 << 10).wrong()
    dropped = c.ptx.replace("max.NaN", "max")
    assert offline.count(dropped)["plain_max"] and not offline.count(dropped)["nan_max"]
    loop = "$L__BB0_1:\n wgmma.mma_async x;\n wgmma.wait_group.sync.aligned 0;\n @%p1 bra $L__BB0_1;\n"
    assert offline.count(loop)["full_waits"] == 1
    read = loop.replace("async x", "async {%r1, %r2}, {%r3, %r4}, %rd1").replace("aligned 0", "aligned 3")
    assert offline.count(read)["partial_waits"] == 1 and dataclasses.replace(c, partial_waits=1).wrong()
    assert offline.count(read.replace("{%r3, %r4}", "%rd2"))["partial_waits"] == 0


# Selection and errors.


THREE = (((64, 64, 3, 3), Geometry(1, 1)),)


def call(device="cuda", dtype=torch.bfloat16, weights=THREE, needs=("conv", "residual")):
    return Call(torch.device(device), dtype, frozenset(needs), weights)


def test_why_not():
    assert "expected tensors on cuda, got cpu" in gpu.why_not(call("cpu"))
    assert "expected float32, bfloat16, float16, got torch.float64" in gpu.why_not(call(dtype=torch.float64))
    assert "not implemented here: bottleneck" in gpu.why_not(call(needs=("conv", "bottleneck")))
    assert gpu.why_not(call(needs=("training",))) is None
    second = (((64, 64, 1, 1), Geometry()), ((64, 64, 3, 3), Geometry(1, 1)))
    reason = gpu.why_not(call(weights=second, needs=("conv", "two_products")))
    assert "expected a second product that is an ungrouped 1x1, got 3x3" in reason
    assert gpu.why_not(call()) is None


def test_the_interpreter_is_refused_bf16(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETING", True)
    monkeypatch.setattr(dispatch, "INTERPRETING", True)
    assert gpu.why_not(call("cpu")) == "Triton's interpreter multiplies bfloat16 wrongly"
    assert gpu.why_not(call("cpu", torch.float16)) is None


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    """The last image of a batch whose activations pass 2^31 elements, by both kernels and the pass."""
    N, C, H = 720, 256, 112
    x = torch.randn(N, C, H, H, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=NHWC)
    assert x.numel() > 2**31
    w = torch.randn(C, C, 1, 1, device="cuda", dtype=torch.bfloat16) / 16
    c = Convolution(x, w.permute(0, 2, 3, 1).contiguous(), Geometry(), None, torch.zeros(C, device="cuda"))
    want = F.conv2d(x[-1:], w)
    for module, config in ((boxes, TILES["wide"]), (gather, TILES["wide"])):
        if module is boxes and torch.cuda.get_device_capability() < (9, 0):
            continue
        y = torch.empty_like(x)
        launch.submit(module.launch(c, config, y))
        torch.testing.assert_close(y[-1:], want, rtol=2e-2, atol=2e-2)
    y = gpu.bn_pass(Operand(x), dispatch.Epilogue(relu=True))[0]
    assert torch.equal(y[-1:], torch.relu(x[-1:]))


@pytest.mark.gpu
def test_blocks_on_a_side_stream_and_twice_the_same():
    case = next(c for c in RESNET_CASES if c.name == "r50-layer2")
    block = rk.nn.Bottleneck(512, 128).eval().to("cuda", torch.bfloat16)
    x = dataclasses.replace(case, N=64).input(torch.bfloat16, "cuda")
    with torch.no_grad(), rk.use_backend("gpu"):
        want = block(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = [block(x) for _ in range(3)]
        torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(y, want) for y in got)


def test_blocks_are_chained_only_where_that_is_right():
    """A basic block behind a bottleneck begins with a 3x3; a first convolution with a stride is not the same 1x1."""
    packed = Packed(torch.empty(64, 3, 3, 256, device="meta"), None, (64, 256, 3, 3))
    c = dispatch._chain(PackedBlock([packed], [torch.empty(64, device="meta")], [Geometry(1, 1)], "identity"))[0]
    assert "expected a 1x1 convolution" in tail.why_not_after(c)
