"""The bytes and operations of plans, compared with counts by hand, with PyTorch and with recorded launches.

The counts by hand are in units of U, the number of elements in the smallest tensor of a block. The comments name the
kernels in their order, separated by semicolons or commas, with the tensors that each reads and writes; the sums beside
them have one term per kernel. The names of tensors are those of `analysis/traffic.py`.
"""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models import resnet

from resnet_kernels import nn as ours
from resnet_kernels.analysis import traffic
from resnet_kernels.analysis.roofline import training_launches_of
from resnet_kernels.analysis.traffic import INFERENCE, PLANS, TRAINING, Need
from resnet_kernels.backends.contract import Geometry
from resnet_kernels.replace import replace_blocks

BF16, FP32 = 2, 4
N = 2


def on_meta(name, **options):
    """Return torchvision's model without memory for its parameters."""
    with torch.device("meta"):
        return torchvision.models.get_model(name, **options)


def projection(channels, out, stride):
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


def bytes_of(block, x_sizes, itemsize=BF16):
    """Return the bytes of a block by plan."""
    return {plan: traffic.block(block, x_sizes, itemsize, plan).bytes for plan in PLANS}


# The elements of the weights of a bottleneck: 1x1 256 -> 64, 3x3 64 -> 64, 1x1 64 -> 256.
WEIGHTS = 256 * 64 + 64 * 64 * 9 + 64 * 256


@pytest.mark.parametrize("itemsize", [BF16, FP32])
def test_a_bottleneck(itemsize):
    """A bottleneck of 256 -> 64 -> 256 channels on 56x56: c1 and c2 have U elements each, x and y four U."""
    U, M = N * 64 * 56 * 56, N * 56 * 56
    block, sizes = resnet.Bottleneck(256, 64), (N, 256, 56, 56)
    mask = 4 * U // 8
    eager = (
        # conv1, bn1, relu1; conv2, bn2, relu2; conv3, bn3; add, relu
        (4 + 1) + 3 + 2 + (1 + 1) + 3 + 2 + (1 + 4) + 3 * 4 + (4 + 4 + 4) + 2 * 4
        # relu; bn3, its two gradients; relu2, bn2, two gradients; relu1, bn1, two gradients; add
        + 3 * 4 + 5 * 4 + 2 * (4 + 1) + 3 + 5 + 2 * (1 + 1) + 3 + 5 + 2 * (1 + 4) + 3 * 4
    )  # fmt: skip
    lazy = (
        # conv1; conv2; moments of c2; c2, residual, y
        (4 + 1) + (1 + 1) + 1 + (1 + 4 + 4)
        # dW3: dy c2. dh2: dy c2 gh2. dW2: gh2 c2 c1. dh1: gh2 c2 c1 gh1. dW1: gh1 c1 x. dx: gh1 c1 dy dx
        + (4 + 1) + (4 + 1 + 1) + 3 + 4 + (1 + 1 + 4) + (1 + 1 + 4 + 4)
    )  # fmt: skip
    materialised = (
        # conv1; h1; conv2; statistics; moments; c2, residual, y
        (4 + 1) + 2 + 2 + 1 + 1 + (1 + 4 + 4)
        # dW3, dh2; dc2: gh2 c2 dc2. h1; dW2: dc2 h1. dh1: dc2 dh1. sums: dh1 c1. dW1: dh1 c1 x. dx: dh1 c1 dy dx
        + (4 + 1) + (4 + 1 + 1) + 3 + 2 + 2 + 2 + 2 + (1 + 1 + 4) + (1 + 1 + 4 + 4)
    )  # fmt: skip
    assert (eager, lazy, materialised) == (138, 51, 58)
    # Beside those: the mask is written once, and read with dy in dW3, dh2 and dx; cov is written in fp32, and B read.
    beside = 4 * mask + 64 * 64 * (4 + itemsize)
    assert bytes_of(block, sizes, itemsize) == {
        "convolution": itemsize * (((4 + 1) + (1 + 1) + (1 + 4 + 4)) * U + WEIGHTS),
        "tail": itemsize * (((4 + 1) + (1 + 4 + 4)) * U + WEIGHTS),
        "block": itemsize * ((4 + 4) * U + WEIGHTS),
        # Weights are read forward and for the data gradient; their gradients are written.
        "eager": itemsize * (138 * U + 3 * WEIGHTS),
        "lazy": itemsize * (51 * U + 3 * WEIGHTS) + beside,
        "materialised": itemsize * (58 * U + 3 * WEIGHTS) + beside,
    }
    forward, extra = 2 * M * WEIGHTS, 2 * (2 * M * 64 * 64)
    flops = [traffic.block(block, sizes, itemsize, plan).flops for plan in PLANS]
    assert flops == [forward, forward, forward, 3 * forward, 3 * forward + extra, 3 * forward + extra]
    # Saved by eager: x c1 h1 c2 h2 c3 y. By the other plans: x c1 c2 and the mask.
    assert traffic.saved(block, sizes, itemsize, "eager") == itemsize * (4 + 1 + 1 + 1 + 1 + 4 + 4) * U
    for plan in ("lazy", "materialised"):
        assert traffic.saved(block, sizes, itemsize, plan) == itemsize * (4 + 1 + 1) * U + mask


def test_a_bottleneck_with_a_strided_projection():
    """256 -> 128 -> 512 channels from 56x56 to 28x28: x has 8 U, c1 4, c2 1, y 4; the projection reads 2 U of x."""
    U = N * 128 * 28 * 28
    block = resnet.Bottleneck(256, 128, 2, projection(256, 512, 2))
    weights = 256 * 128 + 128 * 128 * 9 + 128 * 512 + 256 * 512
    eager = (
        # conv1, bn1, relu1; conv2, bn2, relu2; conv3, bn3; projection and its bn; add, relu
        (8 + 4) + 3 * 4 + 2 * 4 + (4 + 1) + 3 + 2 + (1 + 4) + 3 * 4 + (2 + 4) + 3 * 4 + 3 * 4 + 2 * 4
        # relu; bn3, its two gradients; relu2, bn2, two gradients; relu1, bn1, two gradients
        + 3 * 4 + 5 * 4 + 2 * (4 + 1) + 3 + 5 + 2 * (1 + 4) + 3 * 4 + 5 * 4 + 2 * (4 + 8)
        # bn of the projection; its weight's gradient; its x's, all of it; add
        + 5 * 4 + (4 + 2) + (4 + 8) + 3 * 8
    )  # fmt: skip
    lazy = (
        # conv1; conv2; moments of c2 and xs; c2 xs y
        (8 + 4) + (4 + 1) + 1 + 2 + (1 + 2 + 4)
        # dW3: dy c2. dWs: dy xs. dh2: dy c2 gh2. dW2: gh2 c2 c1. dh1: gh2 c2 c1 gh1. dW1: gh1 c1 x
        + (4 + 1) + (4 + 2) + (4 + 1 + 1) + (1 + 1 + 4) + (1 + 1 + 4 + 4) + (4 + 4 + 8)
        # dx: gh1 c1 dy xs dx
        + (4 + 4 + 4 + 2 + 8)
    )  # fmt: skip
    # More than lazy: h1 from c1, twice; statistics of c2; dc2 from gh2 and c2; sums of dh1 and c1; the gradient of xs,
    # which is written and read, in place of xs. Less than lazy: dW2 and dh1 read dc2 in place of gh2 and c2, and dh1
    # does not read c1.
    materialised = lazy + 2 * (4 + 4) + 1 + 3 + (4 + 4) + 2 * 2 - 2 - 4
    mask = 4 * U // 8
    # The mask is written, and read in dW3, dWs, dh2 and dx.
    beside = 5 * mask + (128**2 + 256**2) * (4 + BF16)
    assert (eager, lazy, materialised) == (275, 98, 124)
    sizes = (N, 256, 56, 56)
    assert bytes_of(block, sizes) == {
        "convolution": 2 * (((8 + 4) + (4 + 1) + (2 + 4) + (1 + 4 + 4)) * U + weights),
        "tail": 2 * (((8 + 4) + (4 + 2 + 4)) * U + weights),
        "block": 2 * ((8 + 4) * U + weights),
        "eager": 2 * (275 * U + 3 * weights),
        "lazy": 2 * (98 * U + 3 * weights) + beside,
        "materialised": 2 * (124 * U + 3 * weights) + beside,
    }
    # Saved by eager: x c1 h1 c2 h2 c3 cs y. By lazy: x c1 c2 and the mask.
    assert traffic.saved(block, sizes, BF16, "eager") == 2 * (8 + 4 + 4 + 1 + 1 + 4 + 4 + 4) * U
    assert traffic.saved(block, sizes, BF16, "lazy") == 2 * (8 + 4 + 1) * U + mask


def test_a_basic_block():
    """64 channels on 56x56: every tensor has U elements."""
    U, weights = N * 64 * 56 * 56, 2 * 64 * 64 * 9
    block, sizes = resnet.BasicBlock(64, 64), (N, 64, 56, 56)
    # conv1, bn1, relu1, conv2, bn2, add, relu; relu, bn2, two gradients, relu1, bn1, two gradients, add.
    eager = (2 + 3 + 2 + 2 + 3 + 3 + 2) + (3 + 5 + 2 + 2 + 3 + 5 + 2 + 2 + 3)
    # conv1, conv2, c2 x y; sums: dy c2. dW2: dy c2 c1. dh1: dy c2 c1 gh1. dW1: gh1 c1 x. dx: gh1 c1 dy dx.
    lazy = (2 + 2 + 3) + (2 + 3 + 4 + 3 + 4)
    # conv1, statistics, h1, conv2, statistics, c2 x y; sums: dy c2. dc2: dy c2 dc2. h1; dW2: dc2 h1. dh1: dc2 dh1.
    # sums: dh1 c1. dc1: dh1 c1 dc1. dW1: dc1 x. dx1: dc1 dx1. dx: dx1 dy dx.
    materialised = (2 + 1 + 2 + 2 + 1 + 3) + (2 + 3 + 2 + 2 + 2 + 2 + 3 + 2 + 2 + 3)
    assert bytes_of(block, sizes) == {
        "convolution": 2 * ((2 + 3) * U + weights),
        "tail": 2 * ((2 + 3) * U + weights),
        "block": 2 * (2 * U + weights),
        "eager": 2 * (eager * U + 3 * weights),
        # The mask is written, and read in sums, dW2, dh1 and dx.
        "lazy": 2 * (lazy * U + 3 * weights) + 5 * U // 8,
        # The mask is written, and read in sums, dc2 and dx.
        "materialised": 2 * (materialised * U + 3 * weights) + 4 * U // 8,
    }
    assert traffic.saved(block, sizes, BF16, "eager") == 2 * (1 + 1 + 1 + 1 + 1) * U  # x c1 h1 c2 y
    assert traffic.saved(block, sizes, BF16, "lazy") == 2 * 3 * U + U // 8  # x c1 c2


def test_the_shortcuts_of_a_basic_block():
    """64 -> 128 channels from 56x56 to 28x28: x has 4 U, c1, c2 and y 2; the shortcut reads 1 U of x."""
    U, sizes = N * 64 * 28 * 28, (N, 64, 56, 56)
    chain = 64 * 128 * 9 + 128 * 128 * 9
    # Without the shortcut's tensors. conv1, conv2, c2 y; sums: dy c2. dW2: dy c2 c1. dh1: dy c2 c1 gh1. dW1: gh1 c1 x.
    # dx: gh1 c1 dx.
    lazy = (4 + 2) + (2 + 2) + (2 + 2) + (2 + 2) + 3 * 2 + 4 * 2 + (2 + 2 + 4) + (2 + 2 + 4)

    projected = bytes_of(resnet.BasicBlock(64, 128, 2, projection(64, 128, 2)), sizes)
    weights = chain + 64 * 128
    # More with a projection: its kernel; cs read as residual and for the sums; dWs: dy cs xs. dx: dy cs.
    more = (1 + 2) + 2 + 2 + (2 + 2 + 1) + (2 + 2)
    assert projected["convolution"] == 2 * (((4 + 2) + (1 + 2) + (2 + 2 + 2)) * U + weights)
    assert projected["tail"] == 2 * (((4 + 2) + (2 + 1 + 2)) * U + weights)
    assert projected["lazy"] == 2 * ((lazy + more) * U + 3 * weights) + 6 * 2 * U // 8
    materialised = (
        # conv1, statistics, h1; conv2, statistics; moments of xs; c2 xs y
        (4 + 2) + 2 + (2 + 2) + (2 + 2) + 2 + 1 + (2 + 1 + 2)
        # dWs: dy xs. gs: dy xs gs. sums: dy c2. dc2: dy c2 dc2. h1; dW2: dc2 h1. dh1: dc2 dh1. sums: dh1 c1
        + (2 + 1) + (2 + 1 + 1) + (2 + 2) + (2 + 2 + 2) + (2 + 2) + (2 + 2) + (2 + 2) + (2 + 2)
        # dc1: dh1 c1 dc1. dW1: dc1 x. dx1: dc1 dx1. dx: dx1 gs dx
        + (2 + 2 + 2) + (2 + 4) + (2 + 4) + (4 + 1 + 4)
    )  # fmt: skip
    # The mask is written, and read in dWs, gs, sums and dc2. covs of 64 channels is written, and Bs read.
    beside = 5 * 2 * U // 8 + 64 * 64 * (4 + BF16)
    assert projected["materialised"] == 2 * (materialised * U + 3 * weights) + beside

    block = ours.BasicBlock(64, 128, 2, ours.ZeroPadShortcut(64, 128, 2))
    padded = bytes_of(block, sizes)
    assert padded["convolution"] == padded["tail"] == 2 * (((4 + 2) + (2 + 1 + 2)) * U + chain)
    # More with zero padding: r is read as residual, and for dx half of the channels of dy and mask.
    assert padded["lazy"] == 2 * ((lazy + 1 + 1) * U + 3 * chain) + 4 * 2 * U // 8 + U // 8
    eager = (
        # conv1, bn1, relu1, conv2, bn2; the padded shortcut made of its part of x; add, relu
        (4 + 2) + 3 * 2 + 2 * 2 + (2 + 2) + 3 * 2 + (1 + 2) + 3 * 2 + 2 * 2
        # relu; bn2, two gradients; relu1, bn1, two gradients; the part put back among zeros; add
        + 3 * 2 + 5 * 2 + 2 * (2 + 2) + 3 * 2 + 5 * 2 + 2 * (2 + 4) + (1 + 4) + 3 * 4
    )  # fmt: skip
    assert padded["eager"] == 2 * (eager * U + 3 * chain)
    assert traffic.saved(block, sizes, BF16, "lazy") == 2 * (4 + 2 + 2) * U + 2 * U // 8


def test_a_convolution():
    needed = traffic.convolution((8, 64, 56, 56), (256, 64, 1, 1), Geometry(), FP32, residual=True)
    positions = 8 * 56 * 56
    # x, the weight, the residual and y
    assert needed.bytes == 4 * (positions * 64 + 256 * 64 + 2 * positions * 256)
    assert needed.flops == 2 * positions * 256 * 64
    # Groups, odd maps and a stride of 2: a 3x3 filter reads all of x, a 1x1 filter every second row and column.
    needed = traffic.convolution((1, 64, 7, 9), (128, 2, 3, 3), Geometry(2, 1, 1, 32), BF16)
    assert needed == Need(2 * (64 * 7 * 9 + 128 * 2 * 9 + 128 * 4 * 5), 2 * 128 * 4 * 5 * 2 * 9)
    needed = traffic.convolution((1, 64, 7, 9), (128, 64, 1, 1), Geometry(2), BF16)
    assert needed == Need(2 * (64 * 4 * 5 + 128 * 64 + 128 * 4 * 5), 2 * 128 * 4 * 5 * 64)
    with pytest.raises(ValueError, match=r"expected 64 channels, got \(1, 32, 7, 9\)"):
        traffic.convolution((1, 32, 7, 9), (128, 64, 1, 1), Geometry(), BF16)


@pytest.mark.parametrize("kernel, g", [(1, Geometry(2)), (3, Geometry(1, 1)), (3, Geometry(2, 2, 2)), (3, Geometry(5))])
@pytest.mark.parametrize("size", [5, 8])
def test_rows_that_a_filter_reaches(size, kernel, g):
    row = torch.ones(1, 1, 1, size, requires_grad=True)
    weight = torch.ones(1, 1, 1, kernel)
    nn.functional.conv2d(row, weight, stride=g.stride, padding=(0, g.padding), dilation=g.dilation).sum().backward()
    assert traffic.reached(size, kernel, g) == int((row.grad != 0).sum())


def test_stem_and_head():
    """The stem makes 64 channels on 112x112, pooled to 56x56."""
    x, c, y, weight = N * 3 * 224 * 224, N * 64 * 112 * 112, N * 64 * 56 * 56, 64 * 3 * 7 * 7
    # The head: 2048 channels on 7x7, their means, 1000 classes with biases.
    last, p, z, classifier = N * 2048 * 7 * 7, N * 2048, N * 1000, 2048 * 1000 + 1000
    model = on_meta("resnet50")

    def of(plan):
        found = traffic.parts(model, (N, 3, 224, 224), BF16, plan)
        return found["stem"], found["head"]

    flops, head_flops = 2 * c * 3 * 7 * 7, 2 * N * 2048 * 1000
    head = 2 * ((last + p) + (p + classifier + z))
    for plan in INFERENCE:
        assert of(plan) == (Need(2 * (x + weight + y), flops), Need(head, head_flops))
    # The head's gradients: dW reads z and p, dp reads z and the classifier, dx reads dp.
    head += 2 * ((z + p + classifier) + (z + classifier + p) + (p + last))
    # conv, bn, relu, pool and its 64-bit indices; pool, relu, bn, weight gradient.
    eager = 2 * ((x + weight + c) + 3 * c + 2 * c + (c + y)) + 8 * y
    eager += 2 * ((y + c) + 3 * c + 5 * c + (c + x + weight)) + 8 * y
    # conv, pool; sums: dy c. weight gradient: dy c x.
    lazy = 2 * ((x + weight + c) + (c + y) + (y + c) + (y + c + x + weight))
    # conv, statistics, pool; sums: dy c. dc: dy c dc. weight gradient: dc x. A byte for each element of y, three times.
    materialised = 2 * ((x + weight + c) + c + (c + y) + (y + c) + (y + c + c) + (c + x + weight)) + 3 * y
    for plan, expected in zip(TRAINING, (eager, lazy, materialised), strict=True):
        assert of(plan) == (Need(expected, 2 * flops), Need(head, 3 * head_flops)), "no gradient of the images"


def test_a_stem_without_a_pool():
    model = on_meta("resnet18", num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False, device="meta"), nn.Identity()
    sizes = (N, 3, 32, 32)
    x, c, weight = N * 3 * 32 * 32, N * 64 * 32 * 32, 64 * 3 * 3 * 3
    # conv, bn, relu; relu, bn, weight gradient.
    stem = traffic.parts(model, sizes, BF16, "eager")["stem"]
    assert stem.bytes == 2 * ((x + weight + c) + 3 * c + 2 * c + 3 * c + 5 * c + (c + x + weight))
    assert "layer4.1" in traffic.parts(model, sizes, BF16, "eager")


def per_image(model, plan, itemsize=BF16, size=224):
    """Return the bytes that one more image takes, by part. Weights, which do not depend on the batch, drop out."""
    two, one = (traffic.parts(model, (n, 3, size, size), itemsize, plan) for n in (2, 1))
    return {name: two[name].bytes - one[name].bytes for name in one}


def blocks_of(found):
    return sum(count for name, count in found.items() if name.startswith("layer"))


def test_resnet50_by_its_stages():
    """Counts in U, the elements of a bottleneck's c2 in each stage.

    The first blocks of the stages have other counts: in layer1 x has 1 U, in the others the counts are those of
    `test_a_bottleneck_with_a_strided_projection`.
    """
    U = [64 * 56 * 56, 128 * 28 * 28, 256 * 14 * 14, 512 * 7 * 7]
    identities = [2, 3, 5, 2]
    model = on_meta("resnet50")
    # layer1.0: x, xs, c1 and c2 have 1 U, y has 4. Kernels of "convolution": conv1, conv2, projection, conv3; of
    # "tail": conv1, tail; "block" reads x and writes y.
    first = {"convolution": 2 + 2 + 5 + 9, "tail": 2 + 6, "block": 5}
    strided = {"convolution": 32, "tail": 22, "block": 12}
    identity = {"convolution": 16, "tail": 14, "block": 8}
    for plan in INFERENCE:
        count = first[plan] * U[0] + sum(strided[plan] * u for u in U[1:])
        count += sum(identity[plan] * n * u for n, u in zip(identities, U, strict=True))
        assert blocks_of(per_image(model, plan)) == 2 * count


# Megabytes per image from this project's design, rounded to a megabyte, hence the tolerance of 2 %. "materialised" is
# the plan that the package runs. The numbers for inference and for "eager" are those of the blocks alone; the stem adds
# 0.7 MB for inference and 32 MB for "eager".
@pytest.mark.parametrize(
    "plan, expected",
    [("convolution", 51), ("tail", 39), ("block", 22), ("eager", 438), ("lazy", 170), ("materialised", 200)],
)
def test_totals_of_resnet50(plan, expected):
    found = per_image(on_meta("resnet50"), plan)
    count = blocks_of(found) if plan in (*INFERENCE, "eager") else sum(found.values())
    assert count / 1e6 == pytest.approx(expected, rel=0.02)


def recorded(module, *sizes):
    """Return the launches of a training step on sm_90 in bf16."""
    pytest.importorskip("triton")
    return training_launches_of(module.to(torch.bfloat16), torch.empty(sizes, dtype=torch.bfloat16, device="meta"), 90)


def test_what_resnet50_moves_in_a_training_step():
    """The launches move the plan's bytes and those it neglects: partial sums, cov and what follows (5 MB an image)."""
    batch, model = 256, on_meta("resnet50")
    replace_blocks(model)
    launches = recorded(model, batch, 3, 224, 224)
    moved = sum(m.work.bytes for m in launches)
    plan = traffic.total(traffic.parts(model, (batch, 3, 224, 224), BF16, "materialised").values())
    assert [n / batch / 1e6 for n in (plan.bytes, moved)] == pytest.approx([199.7, 205.3], abs=0.1)
    # Moments are symmetric, so only one half of them is computed.
    done, expected = sum(m.work.flops for m in launches), plan.flops
    assert 0.98 * expected <= done <= expected


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_library_convolutions_of_a_training_step(name):
    block = on_meta(name).layer2[0]
    sizes = {"resnet18": [(64, 56, 2), (128, 28, 1)], "resnet50": [(128, 56, 2)]}[name]
    needs = [traffic.convolution((N, C, H, H), (128, C, 3, 3), Geometry(s, 1), BF16) for C, H, s in sizes]
    made = [m.work for m in recorded(block, N, block.conv1.in_channels, 56, 56) if m.name == "library"]
    # Each convolution counts three times: forward, weight gradient and data gradient.
    assert sorted(Need(w.bytes, w.flops) for w in made) == sorted(3 * needs)


def test_errors_name_blocks_that_are_not_counted_in_training():
    with pytest.raises(TypeError, match="expected a torchvision ResNet, BasicBlock or Bottleneck, got Conv2d"):
        recorded(nn.Conv2d(1, 1, 1), 1, 1, 8, 8)
    with pytest.raises(ValueError, match="downsample: expected"):
        recorded(resnet.BasicBlock(8, 8, downsample=nn.AvgPool2d(1)), 1, 8, 4, 4)


def test_what_resnet50_saves_for_the_backward():
    """A block's result, which is the next block's input, is saved once."""
    model, maps = on_meta("resnet50"), [56 * 56, 28 * 28, 14 * 14, 7 * 7]
    blocks, channels = [3, 4, 6, 3], [64, 128, 256, 512]
    # c1 of a stage's first block has the map size of the stage before.
    c1 = sum(
        c * (m * n + (before - m)) for c, m, n, before in zip(channels, maps, blocks, [maps[0], *maps], strict=False)
    )
    c2 = sum(c * m * n for c, m, n in zip(channels, maps, blocks, strict=True))
    y, cs, last = 4 * c2, 4 * sum(c * m for c, m in zip(channels, maps, strict=True)), 2048 * 7 * 7
    image, c0, pooled, p = 3 * 224 * 224, 64 * 112 * 112, 64 * 56 * 56, 2048
    # image, c and h of the stem, the first block's x and its indices; c1 h1 c2 h2 c3 cs y; the classifier's input.
    eager = 2 * (image + 2 * c0 + pooled + 2 * c1 + 2 * c2 + y + cs + y + p) + 8 * pooled
    # image, c of the stem, the first block's x; c1 c2, y as the next block's x, its mask.
    lazy = 2 * (image + c0 + pooled + c1 + c2 + (y - last) + p) + y // 8
    # And the positions of the maxima, one byte each.
    materialised = lazy + pooled
    for plan, expected in zip(TRAINING, (eager, lazy, materialised), strict=True):
        assert traffic.saved(model, (N, 3, 224, 224), BF16, plan) == N * expected
    # The design's 38 and 18 MB count the blocks only.
    assert 2 * (2 * c1 + 2 * c2 + y + cs + y) / 1e6 == pytest.approx(38, rel=0.02)
    assert (2 * (c1 + c2 + y) + y // 8) / 1e6 == pytest.approx(18, rel=0.02)


def trained(name):
    """Return a model on the meta device in training mode, and its images."""
    model = on_meta(name).to(torch.bfloat16, memory_format=torch.channels_last)
    x = torch.empty(N, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    return model.train(), x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_eager_saves_what_pytorch_saves(name):
    model, x = trained(name)
    parameters = {t.untyped_storage()._cdata for t in model.parameters()}
    saved = {}

    def pack(t):
        storage = t.untyped_storage()
        # Tensors of one dimension are vectors per channel, which the plans do not count.
        if t.dim() > 1 and storage._cdata not in parameters:
            saved[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    assert sum(s.nbytes() for s in saved.values()) == traffic.saved(model, x.shape, BF16, "eager")


class Moved(TorchDispatchMode):
    """Counts the bytes of the maps and weights that PyTorch's ops read and write, by kind of op."""

    KINDS = ("convolution", "batch_norm", "relu", "threshold", "add_", "add")

    def __init__(self):
        super().__init__()
        self.bytes = dict.fromkeys(self.KINDS, 0)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        kind = next((k for k in self.KINDS if (k == name if k.startswith("add") else k in name)), None)
        if kind:
            self.bytes[kind] += self.of(args) + self.of(result)
            backward = "backward" in name
            if kind == "batch_norm":
                self.bytes[kind] += self.of(args[: 1 + backward])  # c, or g and c, is read a second time
            elif kind == "convolution" and backward:
                # dc is read for each of the two gradients, the weight for the data gradient only.
                self.bytes[kind] += self.of(args[0]) if args[-1][0] else -self.of(args[2])
        return result

    def of(self, tensors):
        leaves = [t for t in tree_leaves(tensors) if isinstance(t, torch.Tensor) and t.dim() == 4]
        return sum(t.numel() * t.element_size() for t in leaves)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_eager_moves_what_pytorch_moves(name):
    model, x = trained(name)
    with Moved() as moved:
        y = model(x)
        y.backward(torch.empty_like(y))
    counted, unreached = dict.fromkeys(("bn", "relu", "add", "convolution"), 0), 0
    for part, launched in traffic.kernels(model, x.shape, BF16, "eager").items():
        for kernel in launched if part != "head" else ():
            kind = next((k for k in ("bn", "relu", "add", "pool") if kernel.what.startswith(k)), "convolution")
            if kind != "pool":
                counted[kind] += kernel.need.bytes
    for block in model.modules():
        if isinstance(block, (resnet.BasicBlock, resnet.Bottleneck)) and block.stride == 2:
            side = 56 // (block.conv1.in_channels // (64 * block.expansion))
            # The projection's op gets all of x but reads every fourth element: forward, and for the weight's gradient.
            unreached += 2 * BF16 * (N * block.conv1.in_channels * side * side) * 3 // 4
    assert counted == {
        "bn": moved.bytes["batch_norm"],
        "relu": moved.bytes["relu"] + moved.bytes["threshold"],
        "add": moved.bytes["add_"] + moved.bytes["add"],
        "convolution": moved.bytes["convolution"] - unreached,
    }


# 10^9 multiply-adds per image, as torchvision publishes them with its weights.
@pytest.mark.parametrize(
    "name, macs",
    [
        ("resnet18", 1.81),
        ("resnet34", 3.66),
        ("resnet50", 4.09),
        ("resnet101", 7.80),
        ("resnet152", 11.51),
        ("resnext50_32x4d", 4.23),
        ("wide_resnet50_2", 11.40),
    ],
)
def test_operations(name, macs):
    model, sizes = on_meta(name), (N, 3, 224, 224)
    forward = traffic.parts(model, sizes, BF16, "convolution")
    flops = traffic.total(forward.values()).flops
    assert flops / N / 2e9 == pytest.approx(macs, abs=0.006)
    assert flops / N / 2e9 == pytest.approx(torchvision.models.get_model_weights(name).DEFAULT.meta["_ops"], abs=0.001)
    trained = traffic.total(traffic.parts(model, sizes, BF16, "eager").values()).flops
    assert trained == 3 * flops - forward["stem"].flops


def test_batch_and_itemsize():
    model = on_meta("resnet50")

    def of(batch, itemsize, plan):
        return traffic.total(traffic.parts(model, (batch, 3, 64, 64), itemsize, plan).values())

    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 or name == "fc.bias")
    squares = sum(b.conv2.in_channels**2 for b in model.modules() if isinstance(b, resnet.Bottleneck))
    squares += sum(c**2 for c in (64, 256, 512, 1024))
    # In training weights are read twice (the stem's once), and their gradients are written.
    training = 3 * weights - model.conv1.weight.numel()
    # By stage: the elements of y, and how often its mask is written or read in all blocks.
    masks = [(256 * 16 * 16, 5 + 2 * 4), (512 * 8 * 8, 5 + 3 * 4), (1024 * 4 * 4, 5 + 5 * 4), (2048 * 2 * 2, 5 + 2 * 4)]
    bits = sum(y * count for y, count in masks) // 8
    for plan in PLANS:
        one, seven = of(1, BF16, plan), of(7, BF16, plan)
        image = (seven.bytes - one.bytes) // 6
        assert seven.bytes - one.bytes == 6 * image and seven.flops == 7 * one.flops
        double = 2 * one.bytes - of(1, FP32, plan).bytes
        if plan in INFERENCE:
            assert one.bytes - image == 2 * weights
            assert double == 0
        elif plan == "eager":
            assert one.bytes - image == 2 * training
            assert double == 2 * 8 * 64 * 16 * 16, "indices, written and read, take 8 bytes in each dtype"
        else:
            assert one.bytes - image == 2 * training + (4 + 2) * squares
            winners = 3 * 64 * 16 * 16 * (plan == "materialised")
            assert double == bits + winners + 4 * squares, "masks are bits, winners bytes, cov is fp32 in each dtype"


def test_dilation_replaces_strides():
    with torch.device("meta"):
        model = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
    found = traffic.parts(model, (1, 3, 224, 224), BF16, "block")
    # x and y of 2048 channels on 28x28 (7x7 without dilation), and the three weights.
    assert found["layer4.2"].bytes == 2 * (2 * 2048 * 28 * 28 + 2 * 2048 * 512 + 9 * 512 * 512)


def test_a_stride_in_the_first_1x1_reaches_a_quarter_of_the_input():
    block = resnet.Bottleneck(256, 128, 2, projection(256, 512, 2))
    block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    weights = sum(p.numel() for p in block.parameters() if p.dim() == 4)
    assert traffic.block(block, (1, 256, 56, 56), BF16).bytes == 2 * ((256 + 512) * 28 * 28 + weights)


def test_our_blocks_count_as_torchvisions():
    model = on_meta("resnet50")
    replaced = copy.deepcopy(model)
    for block in replaced.modules():
        if type(block) is resnet.Bottleneck:
            block.__class__ = ours.Bottleneck
    for plan in PLANS:
        sizes = (1, 3, 64, 64)
        assert traffic.parts(replaced, sizes, BF16, plan) == traffic.parts(model, sizes, BF16, plan)


def test_kernels_sum_to_parts():
    model, sizes = on_meta("resnet50"), (256, 3, 224, 224)
    for plan in PLANS:
        launched, needed = traffic.kernels(model, sizes, BF16, plan), traffic.parts(model, sizes, BF16, plan)
        assert list(launched) == list(needed) == ["stem", *(n for n in needed if n.startswith("layer")), "head"]
        assert {name: traffic.total(k.need for k in part) for name, part in launched.items()} == needed
        each = sum(k.need.seconds(4e12, 8e14) for part in launched.values() for k in part)
        assert each > traffic.total(needed.values()).seconds(4e12, 8e14)
    assert Need(8, 100).seconds(4, 100) == 2 and Need(8, 300).seconds(4, 100) == 3


def test_no_kernels_are_launched_for_an_absent_shortcut():
    def names(block, plan):
        (launched,) = traffic.kernels(block, (1, 256, 8, 8), BF16, plan).values()
        return [k.what for k in launched]

    for plan in PLANS:
        alone = ("projection", "bn of projection", "moments of xs", "weight gradient of p", "data gradient of p")
        assert not any(n.startswith(alone) for n in names(resnet.Bottleneck(256, 64), plan))
        assert not any("padding" in n for n in names(resnet.Bottleneck(256, 64, 1, projection(256, 256, 1)), plan))
    assert len(names(resnet.Bottleneck(256, 64), "lazy")) == 4 + 6
    assert len(names(resnet.Bottleneck(256, 64, 1, projection(256, 256, 1)), "lazy")) == 5 + 7


def test_the_model_is_left_alone():
    model = torchvision.models.resnet18(num_classes=4).train()
    calls = []
    hook = model.layer1[0].register_forward_hook(lambda *args: calls.append(args))
    before = {name: (id(t), t.clone(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    traffic.parts(model, (1, 3, 32, 32), FP32, "lazy")
    traffic.saved(model, (1, 3, 32, 32), FP32, "lazy")
    assert not calls and model.training
    for name, t in model.state_dict(keep_vars=True).items():
        identity, value, version = before[name]
        assert id(t) == identity and t._version == version and torch.equal(t, value)
    hook.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_errors_name_what_cannot_be_counted():
    with pytest.raises(
        ValueError, match="expected one of convolution, tail, block, eager, lazy, materialised, got 'all'"
    ):
        traffic.block(resnet.BasicBlock(8, 8), (1, 8, 4, 4), BF16, "all")
    with pytest.raises(TypeError, match="expected a torchvision ResNet, BasicBlock or Bottleneck, got Linear"):
        traffic.block(nn.Linear(1, 1), (1, 8, 4, 4), BF16)
    with pytest.raises(ValueError, match="downsample: expected"):
        traffic.block(resnet.BasicBlock(8, 8, downsample=nn.AvgPool2d(1)), (1, 8, 4, 4), BF16)
    with pytest.raises(ValueError, match="expected 8 channels"):
        traffic.block(resnet.BasicBlock(8, 8), (1, 16, 4, 4), BF16)
    model = torchvision.models.resnet18()
    model.conv1 = nn.Conv2d(3, 64, 7, 2, 3)
    with pytest.raises(ValueError, match="conv1: the convolution has a bias"):
        traffic.parts(model, (1, 3, 32, 32), BF16, "lazy")
