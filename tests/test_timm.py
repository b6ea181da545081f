"""timm's models, replaced, against themselves and fp64; their state dicts in ours.

As in test_where_used: a ReLU's sign near zero is chance, so that the networks that are compared have theirs decided.
"""

import copy
import pickle
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_kernels as rk
from resnet_kernels.inference import FrozenGated, FrozenTrunk
from resnet_kernels.nn import gated
from resnet_kernels.nn.blocks import Fused
from resnet_kernels.testing import assert_matches, calibrate_, randomize_

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


def family(name, value):
    """With what a result is compared: a channel vector, an attention's few weights, with those of all blocks."""
    return re.sub(r"layer\d+\.\d+\.", "", name) if value.ndim == 1 or ".se." in name else name


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_and_an_evaluation(name, poisoned):
    """Of three models together: by the RMS of a few values, whose errors have one cause, eager's own error is chance
    (of 30 models one has attention weights 5 times as exact as the next)."""
    found = {}
    for draw in torch.randint(1 << 32, (3,)).tolist():
        torch.manual_seed(draw)
        model, images = made(name).train(), torch.randn(6, 3, 64, 64).to(memory_format=NHWC)
        decided_(model, images)
        model = model.to(memory_format=NHWC)
        ours = replaced(model)
        assert all(e.why_plain is None for e in rk.explain(ours, images)) and len(rk.explain(ours, images)) == len(
            blocks(model)
        )
        whole = [b.decompose().whole is not None for b in ours.modules() if isinstance(b, gated.Gated)]
        assert sum(whole) == MODELS[name][2]
        got, theirs, exact = (
            step(ours, images),
            step(model, images),
            step(copy.deepcopy(model).double(), images.double()),
        )
        assert got.keys() == theirs.keys() and len(got) > 50
        for key, want in exact.items():
            if want.is_floating_point():
                found.setdefault(family(key, want), []).append([t.flatten() for t in (got[key], theirs[key], want)])
            else:
                assert torch.equal(got[key], want), key
    for key, drawn in found.items():
        assert_matches(*map(torch.cat, zip(*drawn, strict=True)), images.numel() // 3, key, maximum=False)
    model.eval(), ours.eval()
    assert all(e.why_plain is None for e in rk.explain(ours, images))
    with torch.no_grad():
        assert_matches(ours(images), model(images), copy.deepcopy(model).double()(images.double()), 9 * 2048)
        frozen = rk.freeze(model)(images)
        assert_matches(frozen, model(images), copy.deepcopy(model).double()(images.double()), 9 * 2048, "frozen")
    assert len(rk.restore_blocks(ours)) == len(blocks(model))
    assert [type(m) for m in ours.modules()] == [type(m) for m in model.modules()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["seresnet50", "ecaresnet50d", "resnetblur50", "resnetv2_50d"])
def test_under_autocast(name, training):
    """Of several models together: a model's rounded weights err in the same way in all its logits."""
    found = []
    for _ in range(4):
        model, images = made(name, zero_init_last=False), torch.randn(6, 3, 64, 64).to(memory_format=NHWC)
        model = calibrate_(model, images).to(memory_format=NHWC).train(training)
        ours = replaced(model)
        exact = copy.deepcopy(model).double()(images.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert all(e.why_plain is None for e in rk.explain(ours, images))
            found.append((ours(images), model(images), exact))
        found[-1][0].sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
    assert_matches(*(torch.stack(t).detach() for t in zip(*found, strict=True)), 9 * 2048, maximum=False)


@pytest.mark.parametrize("name", ["seresnet18", "seresnet50", "seresnext50_32x4d", "resnet34"])
def test_a_state_dict_of_timms_fits_its_namesake(name):
    theirs = randomize_(timm.create_model(name, zero_init_last=False)).eval()
    ours = getattr(rk.models, name)().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert_matches(ours(x), theirs(x), copy.deepcopy(theirs).double()(x.double()), 9 * 2048)


def test_timm_is_imported_for_models_of_its_alone():
    code = (
        "import sys, torchvision, resnet_kernels as rk\n"
        "model = torchvision.models.resnet18()\n"
        "assert len(rk.replace_blocks(model).replaced) == 8 == len(rk.restore_blocks(model))\n"
        "rk.freeze(model.eval())\n"
        "sys.exit('timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class Own(timm.models.resnet.BasicBlock):
    pass


def test_every_block_that_stays_has_a_reason():
    model = timm.create_model("resnet18", **SMALL)
    model.layer1[0].__class__ = Own
    model.layer1[1].forward = model.layer1[1].forward
    model.layer2[0].act1 = nn.SiLU()
    model.layer3[0].bn1.register_forward_hook(lambda *a: None)
    report = rk.replace_blocks(model)
    assert report.replaced == ("layer3.0", "layer4.0")
    assert report.skipped == {
        "layer1.0": f"{__name__}.Own is a subclass and may compute something else",
        "layer1.1": "its forward was overridden on the instance",
        "layer2.0": "act1: expected ReLU, got SiLU",
    }
    assert report.notes == {"layer3.0": "bn1 carries a forward hook"}
    assert set(rk.replace_blocks(model).skipped) == {*report.skipped, *report.replaced}
    assert rk.restore_blocks(model) == report.replaced


OTHERS = {
    "resnet50_gn": "bn1: expected one of BatchNorm2d, SyncBatchNorm, FrozenBatchNorm2d, got GroupNorm",
    "resnetv2_50x1_bit": "norm1: expected one of BatchNormAct2d, SyncBatchNormAct, got GroupNormAct",
    "legacy_seresnet18": "blocks of the class SEResNetBlock are not supported",
    "res2net50_26w_4s": "blocks of the class Bottle2neck are not supported",
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_with_other_blocks(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    report = rk.replace_blocks(model)
    assert not report.replaced and len(report.skipped) >= 8 and set(report.skipped.values()) == {OTHERS[name]}


def test_modules_in_between_keep_their_hooks(poisoned):
    """Where they run as modules; a block whose fused parts are looked into is plain."""
    seen = []
    for name, inner, options in (
        ("seresnet50", "se", {}),
        ("seresnet50", "se.fc1", {}),
        ("ecaresnet50d", "se", {}),
        ("resnetblur50", "aa", {}),
        ("resnet50", "drop_path", dict(drop_path_rate=0.2)),
        ("resnetv2_50", "downsample", {}),
    ):
        model = timm.create_model(name, **{**(WIDE if "v2" in name else SMALL), **options}).eval()
        decided_(model, torch.randn(2, 3, 64, 64))
        x = torch.randn(2, 3, 64, 64)
        want = model(x)
        rk.replace_blocks(model)
        block = model.get_submodule("stages.1.blocks.0" if "v2" in name else "layer2.0")
        block.get_submodule(inner).register_forward_hook(lambda m, i, o, name=name: seen.append(name))
        assert all(e.why_plain is None for e in rk.explain(model, x))
        seen.clear()
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
        assert seen == [name]


def test_what_is_frozen_how():
    model = timm.create_model("resnet50d", **SMALL).eval()
    frozen = rk.freeze(model)
    assert type(frozen.net.layer1) is FrozenTrunk and type(frozen.net.layer2[0]) is FrozenGated
    assert frozen.fused == ("layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0") and not frozen.left
    plain = rk.freeze(timm.create_model("resnetv2_50", **WIDE).eval())
    assert not plain.fused and set(plain.left.values()) == {"its batch norms stand before its convolutions"}
    model = timm.create_model("seresnet50", **SMALL).eval()
    report = rk.replace_blocks(model)
    frozen = pickle.loads(pickle.dumps(rk.freeze(model)))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-3, atol=1e-3)
    assert frozen.fused == report.replaced


@pytest.mark.parametrize("name", ["seresnet50", "resnetv2_50"])
def test_compiled_whole_and_copied(name):
    torch._dynamo.reset()
    model = timm.create_model(name, **(WIDE if "v2" in name else SMALL)).eval()
    x = torch.randn(2, 3, 64, 64)
    decided_(model, x)
    rk.replace_blocks(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pickle.loads(pickle.dumps(copy.deepcopy(model)))(x), model(x))


def test_synchronized_batch_norms_of_a_preactivation_are_known():
    model = timm.create_model("resnetv2_50", **WIDE).train()
    ours = copy.deepcopy(model)
    ours = timm.layers.convert_sync_batchnorm(ours)
    assert len(rk.replace_blocks(ours).replaced) == 5
    # torch's own, in the stem, does not run on CPUs.
    x = torch.randn(4, 64, 8, 8)
    rk.replace_blocks(model)
    for mine, theirs in zip(ours.stages[0].blocks, model.stages[0].blocks, strict=True):
        assert mine.why_plain(x) is None
        torch.testing.assert_close(mine(x), theirs(x))
        x = theirs(x)
