"""Training: outputs, gradients and running statistics of fused blocks against torchvision's and against fp64."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from resnet_kernels.nn.fusable import why_plain
from resnet_kernels.ops import training
from resnet_kernels.testing import ODD_CASES, RESNET_CASES, RESNEXT_CASES, BlockCase, assert_matches

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = {c.name: c for c in RESNET_CASES + RESNEXT_CASES + ODD_CASES}
TRAINABLE = [c for c in ODD_CASES if c.N > 1 and c.H > 1]
# Rows enough for the tail's and the projection's outputs never to be stored, and too few.
BY_MOMENTS = BlockCase("by-moments", False, 48, 16, 9, 8, option="C", N=4)
STORED = BlockCase("stored", False, 64, 64, 4, 4, 2, N=3)
SMALL = [*TRAINABLE, BY_MOMENTS, STORED]


class RecordedReLU(nn.Module):
    """ReLU that tells where it let through."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def forward(self, z):
        self.masks.append(~(z <= 0))
        return torch.relu(z)


class GivenReLU(nn.Module):
    """Zero where the masks, one after the other, say so."""

    def __init__(self, masks):
        super().__init__()
        self.masks = iter(masks)

    def forward(self, z):
        return torch.where(next(self.masks).to(z.device), z, 0)


def results(block, x, dy):
    x = x.clone().requires_grad_()
    y = block(x)
    y.backward(dy)
    grads = {name: p.grad for name, p in block.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad} | grads | {n: b for n, b in block.named_buffers()}


def eager(block, x, dy):
    """(results, masks) of torchvision's block."""
    block = copy.deepcopy(block)
    block.relu = RecordedReLU()
    return results(block, x, dy), block.relu.masks


def exact(block, x, dy, masks):
    """Results in fp64, with the gradients under these masks."""
    block = copy.deepcopy(block).double()
    y = copy.deepcopy(block)(x.double()).detach()
    block.relu = GivenReLU(masks)
    return results(block, x.double(), dy.double()) | {"y": y}


def ours(block, x, dy, backend, monkeypatch):
    """(results, masks) of the fused block."""
    block = copy.deepcopy(block)
    rk.replace_blocks(block)
    kept = []
    monkeypatch.setattr(training.Kept, "of", kept_of(kept))
    with rk.use_backend(backend):
        assert why_plain(block, x) is None
        out = results(block, x, dy)
    monkeypatch.undo()
    k = kept[0]
    masks = []
    n = 3 if hasattr(block, "bn3") else 2
    for i in range(n - 1):
        a, b = (t.double()[:, None, None] for t in k.tables[i][:2])
        masks.append(~((a * k.c[i].double() + b).float() <= 0))
    return out, [*masks, ~(out["y"] <= 0)]


def kept_of(kept):
    original = training.Kept.of.__func__

    def of(flat, plan):
        kept.append(original(training.Kept, flat, plan))
        return kept[-1]

    return staticmethod(of)


def check(make, dtype, backend, monkeypatch, draws=1):
    """Every result under the rule, each implementation against fp64 under its own masks.

    make() -> block, x. draws: of how many blocks and inputs the errors are taken together: the RMS of a vector of five
    channels is chance.
    """
    found = {}
    for _ in range(draws):
        block, x = make()
        block, x = block.to(dtype), x.to(dtype).contiguous(memory_format=torch.channels_last)
        dy = torch.randn_like(copy.deepcopy(block)(x)).detach()
        theirs, their_masks = eager(block, x, dy)
        got, masks = ours(block, x, dy, backend, monkeypatch)
        want, want_of_theirs = exact(block, x, dy, masks), exact(block, x, dy, their_masks)
        for name in theirs:
            if not theirs[name].is_floating_point():
                assert torch.equal(got[name], theirs[name]), name
                continue
            # Eager's error is about what it computes exactly: shifted to ours, so that one comparison does.
            shifted = (theirs[name].double() - want_of_theirs[name] + want[name]).to(dtype)
            found.setdefault(name, []).append((got[name], shifted, want[name]))
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    for name, results in found.items():
        out, theirs, want = (torch.stack(t) for t in zip(*results, strict=True))
        assert_matches(out, theirs, want, rows, name, maximum=name == "y")


def of_case(case):
    return lambda: (case.make().train(), case.input())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_odd_blocks(case, dtype, backend, monkeypatch, poisoned):
    check(of_case(case), DTYPES[dtype], backend, monkeypatch, draws=-(-64 // case.planes))


@pytest.mark.parametrize("case", RESNET_CASES + RESNEXT_CASES[1:3], ids=str)
def test_resnet_blocks(case, monkeypatch, poisoned):
    check(of_case(case), torch.float32, "cpu", monkeypatch)


@pytest.mark.parametrize("name", ["r50-layer1", "r50-layer3-down", "r18-layer2-down"])
def test_resnet_blocks_in_bf16(name, monkeypatch, poisoned):
    check(of_case(dataclasses.replace(CASES[name], H=14, W=14)), torch.bfloat16, "cpu", monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", RESNET_CASES + RESNEXT_CASES[1:3] + tuple(SMALL), ids=str)
def test_blocks_on_a_gpu(case, dtype, monkeypatch):
    def make():
        return case.make().train().cuda(), case.input(device="cuda")

    check(make, DTYPES[dtype], "triton", monkeypatch, draws=-(-64 // case.planes))


def adversarial(case, kind):
    block, x = case.make().train(), case.input()
    if kind == "large-mean":
        x = x + 100
        block.bn1.bias.data += 100
        block.bn2.bias.data += 100
    elif kind == "constant":
        x[:, ::3] = 0.75
        block.conv1.weight.data[1] = 0
    elif kind == "dead":
        block.bn1.bias.data[::2] -= 50
        block.bn2.bias.data[1::2] -= 50
        block.bn2.weight.data[2] = 0
    elif kind == "outlier":
        x[0, 3, 1, 1] = 1e4
    elif kind == "two-rows":
        x = x[:2, :, :1, :1]
    return block, x


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["large-mean", "constant", "dead", "outlier", "two-rows"])
@pytest.mark.parametrize("case", [BY_MOMENTS, STORED], ids=str)
def test_adversarial_statistics(case, kind, dtype, backend, monkeypatch):
    check(lambda: adversarial(case, kind), DTYPES[dtype], backend, monkeypatch, draws=3)
