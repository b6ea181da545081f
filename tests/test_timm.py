"""timm's models, replaced, against themselves and fp64; their state dicts in ours.

As in test_where_used: a ReLU's sign near zero is chance, so that the networks that are compared have theirs decided.
"""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_kernels as rk
from resnet_kernels.nn import gated
from resnet_kernels.nn.blocks import Fused
from resnet_kernels.testing import assert_matches, randomize_

timm = pytest.importorskip("timm")

NHWC = torch.channels_last
SMALL = dict(layers=(2, 1, 1, 1), channels=(16, 32, 48, 64), num_classes=5)
# Of resnetv2 a stage's first block always has a projection.
WIDE = dict(SMALL, channels=(64, 96, 128, 160))
# Name: timm's, options, and how many of the blocks run as one op.
MODELS = {
    "resnet18": ("resnet18", SMALL, 5),
    "resnet50": ("resnet50", SMALL, 5),
    "resnext50": ("resnext50_32x4d", SMALL, 5),
    "wide": ("wide_resnet50_2", SMALL, 5),
    "seresnet50": ("seresnet50", SMALL, 0),
    "seresnet18": ("seresnet18", SMALL, 0),
    "resnet50-drop-path": ("resnet50", dict(SMALL, drop_path_rate=0.4), 1),
    "seresnet50-drop-path": ("seresnet50", dict(SMALL, drop_path_rate=0.4), 0),
    "resnet50d": ("resnet50d", SMALL, 2),
    "ecaresnet50d": ("ecaresnet50d", SMALL, 0),
    "resnetblur50": ("resnetblur50", SMALL, 2),
    "resnetaa50": ("resnetaa50", SMALL, 2),
    "drop-block": ("resnet50", dict(SMALL, drop_block_rate=0.2), 3),
    "senet": ("senet154", dict(SMALL, layers=(1, 1, 1, 1), cardinality=8, base_width=32), 0),
    "resnetv2_50": ("resnetv2_50", WIDE, 5),
    "resnetv2_50-drop-path": ("resnetv2_50", dict(WIDE, drop_path_rate=0.4), 1),
    "resnetv2_50d": ("resnetv2_50d", WIDE, 2),
}


def made(name, **more):
    timms, options, _ = MODELS[name]
    return timm.create_model(timms, **{**options, **more})


def blocks(model):
    return [m for m in model.modules() if hasattr(m, "downsample")]


@torch.no_grad()
def decided_(model, images):
    """As test_where_used has it, of timm's blocks; and weights that timm begins with zero are drawn."""
    ends, handles = set(), []
    for block in blocks(model):
        if "bn2" in block._modules:
            ends.add(id(block.bn3 if hasattr(block, "bn3") else block.bn2))
            ends |= {id(m) for m in block.downsample.modules()} if block.downsample else set()

    def measure(bn, args):
        bn.running_mean.copy_(args[0].mean((0, 2, 3)))
        bn.running_var.copy_(args[0].var((0, 2, 3)))

    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
        if isinstance(m, nn.BatchNorm2d):
            m.weight.uniform_(0.5, 1.5)
            m.bias.fill_(8)
            if id(m) not in ends:
                m.bias[1::2] = -8
            handles.append(m.register_forward_pre_hook(measure))
    torch.manual_seed(5)
    model(images)
    for handle in handles:
        handle.remove()
    return model


def replaced(model):
    ours = copy.deepcopy(model)
    report = rk.replace_blocks(ours)
    assert len(report.replaced) == len(blocks(model)) == sum(isinstance(m, Fused) for m in ours.modules())
    assert not report.skipped and not report.notes
    return ours


def step(model, images):
    model = copy.deepcopy(model)
    torch.manual_seed(7)  # of what is dropped
    value = F.cross_entropy(model(images), torch.arange(len(images)) % 5)
    value.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": value.detach()} | grads | dict(model.named_buffers())


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_and_an_evaluation(name, poisoned):
    model, images = made(name).train(), torch.randn(6, 3, 64, 64).to(memory_format=NHWC)
    decided_(model, images)
    model = model.to(memory_format=NHWC)
    ours = replaced(model)
    assert all(e.why_plain is None for e in rk.explain(ours, images)) and len(rk.explain(ours, images)) == len(
        blocks(model)
    )
    whole = [b._pieces().whole is not None for b in ours.modules() if isinstance(b, gated.Gated)]
    assert sum(whole) == MODELS[name][2]
    got, theirs, exact = step(ours, images), step(model, images), step(copy.deepcopy(model).double(), images.double())
    assert got.keys() == theirs.keys() and len(got) > 50
    for key, want in exact.items():
        if not want.is_floating_point():
            assert torch.equal(got[key], want), key
            continue
        assert_matches(got[key], theirs[key], want, images.numel() // 3, key, maximum=False)
    model.eval(), ours.eval()
    assert all(e.why_plain is None for e in rk.explain(ours, images))
    with torch.no_grad():
        assert_matches(ours(images), model(images), copy.deepcopy(model).double()(images.double()), 9 * 2048)
        frozen = rk.freeze(model)(images)
        assert_matches(frozen, model(images), copy.deepcopy(model).double()(images.double()), 9 * 2048, "frozen")
    assert len(rk.restore_blocks(ours)) == len(blocks(model))
    assert [type(m) for m in ours.modules()] == [type(m) for m in model.modules()]
