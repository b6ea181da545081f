"""Whole models, replaced and frozen, against torchvision's."""

import copy
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import resnet
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.segmentation import deeplabv3_resnet50

import resnet_kernels as rk
from resnet_kernels.backends import library, select
from resnet_kernels.nn import ZeroPadShortcut
from resnet_kernels.testing import assert_matches, randomize_

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLASSIFIERS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2"]
NONE = {"weights": None, "weights_backbone": None}
MODELS = {name: lambda name=name: torchvision.models.get_model(name, num_classes=64) for name in CLASSIFIERS} | {
    "deeplabv3_resnet50": lambda: deeplabv3_resnet50(num_classes=5, **NONE),
    "fasterrcnn_resnet50_fpn-backbone": lambda: fasterrcnn_resnet50_fpn(**NONE).backbone,
}
REDUCTION = 2048


def outputs(result):
    return dict(result) if isinstance(result, dict) else {"logits": result}


def channels_last(model, x):
    """PyTorch's own result in our layout: oneDNN's error differs twofold between layouts (fp32, AVX-512: rms 2.3e-5 in
    NCHW and 4.7e-5 in channels_last, of values of 30, for the features of a Faster R-CNN)."""
    format = torch.channels_last
    return copy.deepcopy(model).to(memory_format=format)(x.contiguous(memory_format=format))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_models_replaced_and_frozen(name, dtype):
    dtype = DTYPES[dtype]
    model = randomize_(MODELS[name]()).eval().to(dtype)
    x = torch.randn(3, 3, 48, 40).to(dtype)
    with torch.no_grad():
        want, exact = outputs(channels_last(model, x)), outputs(copy.deepcopy(model).double()(x.double()))
        frozen = rk.freeze(model)
        assert not frozen.left
        report = rk.replace_blocks(model)
        assert not report.skipped and len(frozen.fused) == len(report.replaced) + 1
        for how, got in (("frozen", outputs(frozen(x))), ("replaced", outputs(model(x)))):
            assert got.keys() == want.keys()
            for key in want:
                assert_matches(got[key], want[key], exact[key], REDUCTION, f"{how} {key}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_models_on_a_gpu(name, dtype):
    dtype = DTYPES[dtype]
    model = randomize_(MODELS[name]()).eval().to("cuda", dtype)
    x = torch.randn(3, 3, 96, 80, device="cuda").to(dtype)
    with torch.no_grad():
        want, exact = outputs(model(x)), outputs(copy.deepcopy(model).double()(x.double()))
        got = outputs(rk.freeze(model)(x))
        rk.replace_blocks(model)
        for key, value in outputs(model(x)).items():
            assert_matches(value, want[key], exact[key], REDUCTION, key)
            assert_matches(got[key], want[key], exact[key], REDUCTION, key)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(7)
    return randomize_(resnet.ResNet(resnet.Bottleneck, [1, 2, 1, 1], num_classes=32)).eval()


def reference(model, x):
    with torch.no_grad():
        return model(x)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_frozen_takes_any_dtype_and_layout_and_gives_its_own(model):
    x = torch.randn(2, 3, 64, 64)
    want = reference(model, x)
    frozen = rk.freeze(model)
    for t in (x, x.contiguous(memory_format=torch.channels_last), x.repeat(2, 1, 1, 1)[::2], x.double()):
        close(frozen(t), reference(model, t.float()))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        y = rk.freeze(model, dtype)(x)
        assert y.dtype == dtype
        assert (y.float() - want).norm() <= 8 * max(torch.finfo(dtype).eps, 1e-6) * want.norm()


@pytest.mark.parametrize("N", [0, 1, 2, 5, 7])
def test_frozen_in_passes(model, N, monkeypatch):
    from resnet_kernels.backends import cpu

    monkeypatch.setattr(cpu, "images_per_pass", lambda image_bytes: 2)
    x = torch.randn(N, 3, 64, 64)
    before = x.clone()
    frozen = rk.freeze(model)
    for _ in range(2):
        close(frozen(x), reference(model, x))
    assert torch.equal(x, before)


def test_frozen_results_are_not_overwritten_by_the_next_call(model):
    frozen = rk.freeze(model)
    first = frozen(torch.randn(2, 3, 64, 64))
    kept = first.clone()
    frozen(torch.randn(2, 3, 64, 64))
    assert torch.equal(first, kept)


def test_frozen_forgets_old_sizes(model):
    frozen = rk.freeze(model)
    trunk = frozen.net.trunk
    for size in range(32, 32 * 8, 32):
        x = torch.randn(1, 3, size, 32)
        close(frozen(x), reference(model, x))
    assert len(trunk._packed) == trunk.MAX_SIZES * len(trunk.steps)


def test_refresh_follows_the_source(model):
    source, x = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    frozen = rk.freeze(source)
    before = frozen(x)
    source.layer2[0].conv2.weight.data.mul_(2)
    source.bn1.running_mean.add_(1)
    source.fc.bias.data.add_(1)
    assert torch.equal(frozen(x), before)
    frozen.refresh()
    close(frozen(x), reference(source, x))


def test_freeze_leaves_the_source_alone(model):
    source = copy.deepcopy(model)
    rk.freeze(source, torch.bfloat16)(torch.randn(1, 3, 64, 64))
    for a, b in zip(source.modules(), model.modules(), strict=True):
        assert type(a) is type(b)
    for a, b in zip(source.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


def test_frozen_copies_pickles_and_saves(model, tmp_path):
    frozen, x = rk.freeze(model), torch.randn(2, 3, 64, 64)
    torch.save(frozen, tmp_path / "frozen.pt")
    for other in (
        copy.deepcopy(frozen),
        pickle.loads(pickle.dumps(frozen)),
        torch.load(tmp_path / "frozen.pt", weights_only=False),
    ):
        assert torch.equal(other(x), frozen(x))


def test_frozen_from_several_threads(model):
    frozen = rk.freeze(model)
    inputs = [torch.randn(1 + i % 3, 3, 32 * (1 + i % 2), 64) for i in range(12)]
    want = [reference(model, x) for x in inputs]
    got = [None] * len(inputs)

    def work(i):
        for _ in range(3):
            got[i] = frozen(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(got, want, strict=True):
        close(a, b)


def test_frozen_propagates_nan(model):
    x = torch.randn(2, 3, 64, 64)
    x[1, 0, 20, 20] = float("nan")
    y = rk.freeze(model)(x)
    assert y[1].isnan().all() and y[0].isfinite().all()


def test_frozen_under_autocast_and_grad(model):
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    frozen = rk.freeze(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen(x)
    assert y.dtype == torch.float32 and not y.requires_grad
    close(y, reference(model, x))


def test_frozen_is_for_inference_and_says_so(model):
    frozen = rk.freeze(model)
    with pytest.raises(RuntimeError, match="for inference only"):
        frozen.train()
    assert not frozen.eval().training
    with pytest.raises(RuntimeError, match="cannot be moved or cast"):
        frozen.to(torch.float64)
    with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\) of a floating dtype, got \(3, 64, 64\)"):
        frozen(torch.randn(3, 64, 64))
    with pytest.raises(ValueError, match="expected it on cpu, as the frozen model, got meta"):
        frozen(torch.randn(1, 3, 64, 64, device="meta"))


def test_freeze_names_what_it_cannot_take(model):
    with pytest.raises(ValueError, match="expected it in evaluation mode, got 'bn1' in training mode"):
        rk.freeze(copy.deepcopy(model).train())
    with pytest.raises(ValueError, match="expected residual blocks of torchvision or timm in it, found none in Seq"):
        rk.freeze(nn.Sequential(nn.Conv2d(3, 3, 1)))
    with pytest.raises(ValueError, match="found none in ReLU"):
        rk.freeze(nn.ReLU())
    with pytest.raises(TypeError, match="expected a floating dtype, got torch.int8"):
        rk.freeze(model, torch.int8)
    with rk.use_backend("gpu:cuda"), pytest.raises(rk.BackendUnavailable, match="expected tensors on cuda, got cpu"):
        rk.freeze(model)


def test_blocks_that_cannot_be_folded_are_copied_with_their_reason(model):
    source, seen = copy.deepcopy(model), []
    source.layer2[1].conv2.register_forward_hook(lambda m, i, o: seen.append(1))
    source.layer3[0].bn2 = nn.GroupNorm(8, 256)
    frozen, x = rk.freeze(source), torch.randn(2, 3, 64, 64)
    assert frozen.left == {
        "layer2.1": "conv2 carries a forward hook",
        "layer3.0": "bn2: expected one of BatchNorm2d, SyncBatchNorm, FrozenBatchNorm2d, got GroupNorm",
    }
    assert set(frozen.fused) == {"stem", "layer1.0", "layer2.0", "layer4.0"}
    close(frozen(x), reference(source, x))
    assert len(seen) == 2
    assert "conv2 carries a forward hook" in str(rk.explain(frozen, x))


def features(r, x):
    """As an encoder's owner does: the ResNet's parts one by one."""
    stem = r.relu(r.bn1(r.conv1(x)))
    first = r.layer1(r.maxpool(stem))
    return {"stem": stem, "layer1": first, "layer2": r.layer2(first)}


def same_features(got, want):
    assert got.keys() == want.keys()
    for name in want:
        close(got[name], want[name])


class Encoder(nn.Module):
    def __init__(self, r):
        super().__init__()
        self.r = r

    def forward(self, x):
        return features(self.r, x)


def test_a_resnet_whose_owner_calls_its_parts(model):
    source, x = Encoder(copy.deepcopy(model)), torch.randn(2, 3, 64, 64)
    same_features(rk.freeze(source.eval())(x), reference(source, x))
    frozen = rk.freeze(model)
    with torch.no_grad():
        same_features(features(frozen.net, x), features(model, x))


@pytest.mark.parametrize(
    "layers", [{"relu": "s", "layer2": "a"}, {"bn1": "s", "layer1": "a"}, {"maxpool": "s", "layer4": "a"}]
)
def test_backbones_that_return_a_part_of_the_stem(model, layers):
    from torchvision.models._utils import IntermediateLayerGetter

    source, x = IntermediateLayerGetter(copy.deepcopy(model), layers), torch.randn(1, 3, 64, 64)
    same_features(rk.freeze(source)(x), reference(source, x))


def test_modules_that_stand_in_several_places():
    x = torch.randn(2, 3, 32, 32)
    twice = randomize_(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])).eval()
    twice.layer1 = nn.Sequential(twice.layer1[0], twice.layer1[0])
    twice.fc = nn.Sequential(nn.Linear(512, 16), twice.relu, nn.Linear(16, 8))
    close(rk.freeze(twice)(x), reference(twice, x))
    first, second = (randomize_(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])).eval() for _ in range(2))
    second.conv1, second.bn1 = first.conv1, first.bn1

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList([first, second])

        def forward(self, x):
            return torch.stack([net(x) for net in self.nets])

    close(rk.freeze(Both().eval())(x), reference(Both(), x))


def test_overridden_forwards_and_dropout_are_kept(model):
    source, x = copy.deepcopy(model), torch.randn(1, 3, 64, 64)
    source._forward_impl = lambda x: source.layer1(source.maxpool(source.relu(source.bn1(source.conv1(x)))))
    close(rk.freeze(source)(x), reference(source, x))
    source = copy.deepcopy(model)
    source.fc = nn.Sequential(nn.Dropout(0.5).train(), source.fc)
    frozen = rk.freeze(source)
    assert not torch.equal(frozen(x), frozen(x)) and not frozen.training


def test_copies_of_a_frozen_model_hold_its_weights_and_not_the_sources(model):
    source, x = copy.deepcopy(model), torch.randn(1, 3, 64, 64)
    frozen = rk.freeze(source)
    source.train().layer1[0].conv1.weight.data.zero_()
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(other(x), frozen(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_frozen_model_refuses_to_be_traced(model):
    with pytest.raises(RuntimeError, match="cannot be traced or exported"):
        torch.jit.trace(rk.freeze(model), torch.randn(1, 3, 64, 64))


def test_dtype_and_device_are_the_blocks():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
            self.net = randomize_(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]))

        def forward(self, x):
            return self.net(x)

    source, x = Mixed().eval(), torch.randn(1, 3, 32, 32)
    close(rk.freeze(source)(x), reference(source, x))
    source.net.layer4.to("meta")
    with pytest.raises(ValueError, match="layer4.0: expected it on cpu, as the first block, got"):
        rk.freeze(source)


def test_hooks_on_stages_survive(model):
    source, maps = copy.deepcopy(model), {}
    source.layer2.register_forward_hook(lambda m, i, o: maps.update({len(maps): o}))
    x = torch.randn(1, 3, 64, 64)
    want = reference(source, x)
    close(rk.freeze(source)(x), want)
    close(maps[1], maps[0])


@pytest.mark.parametrize("stem", ["strided-7x7", "cifar", "deep"])
def test_other_stems_and_subclasses(stem):
    class Cifar(resnet.ResNet):
        def forward(self, x):
            x = torch.relu(self.bn1(self.conv1(x)))
            return self.fc(self.avgpool(self.layer4(self.layer3(self.layer2(self.layer1(x))))).flatten(1))

    net = Cifar(resnet.BasicBlock, [1, 2, 1, 1]) if stem == "cifar" else resnet.ResNet(resnet.BasicBlock, [1, 2, 1, 1])
    if stem == "cifar":
        net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    if stem == "deep":
        net.conv1 = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.Conv2d(32, 64, 3, 1, 1, bias=False))
    randomize_(net).eval()
    x = torch.randn(2, 3, 32, 32)
    frozen = rk.freeze(net)
    assert ("stem" in frozen.fused) == (stem == "strided-7x7")
    close(frozen(x), reference(net, x))


def test_option_a_and_frozen_batch_norms():
    from torchvision.ops import FrozenBatchNorm2d

    net = resnet.ResNet(rk.nn.BasicBlock, [1, 1, 1, 1], norm_layer=FrozenBatchNorm2d)
    for i, planes in ((2, 64), (3, 128), (4, 256)):
        getattr(net, f"layer{i}")[0].downsample = ZeroPadShortcut(planes, 2 * planes, 2)
    net, x = net.train(), torch.randn(2, 3, 32, 32)
    close(rk.freeze(net)(x), reference(net, x))


def test_detection_model_end_to_end():
    net = fasterrcnn_resnet50_fpn(**NONE, num_classes=3, min_size=64, max_size=64).eval()
    images = [torch.rand(3, 60, 50), torch.rand(3, 40, 64)]
    for got, want in zip(rk.freeze(net)(images), reference(net, images), strict=True):
        assert got.keys() == want.keys() and got["boxes"].dtype == torch.float32
        assert len(got["boxes"]) == len(want["boxes"])
        close(got["scores"], want["scores"])


@pytest.mark.parametrize("backend", ["reference", "library", "cpu"])
def test_every_backend_freezes(model, backend):
    x = torch.randn(2, 3, 64, 64)
    with rk.use_backend(backend):
        frozen = rk.freeze(model)
    assert {e.chosen for e in rk.explain(frozen, x)} == {backend}
    close(frozen(x), reference(model, x))


def test_eager_by_name_means_the_reference_for_an_op():
    with rk.use_backend("eager"):
        assert select.choose(select.Call(torch.device("cpu"), torch.float32, frozenset({"conv"}))).NAME == "reference"
    assert library.why_not(select.Call(torch.device("cpu"), torch.int8, frozenset({"conv"}))) is not None


def peak_of_process(build):
    """Peak resident bytes above those before a call, in a process of its own. The least of several: what the process
    does for the first time (stacks, scratch of the engines) can only add."""
    code = f"""
import torch, torchvision, resnet_kernels as rk
torch.set_num_threads(1)
model = torchvision.models.resnet18().eval()
x = torch.randn(16, 3, 224, 224)
model = {build}
def status(key):
    return next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith(key))
with torch.no_grad():
    peaks = []
    for _ in range(3):
        model(x)
        import ctypes; ctypes.CDLL('libc.so.6').malloc_trim(0)
        open('/proc/self/clear_refs', 'w').write('5')
        before = status('VmRSS')
        model(x)
        peaks.append(status('VmHWM') - before)
    print(min(peaks))
"""
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc/self/clear_refs")
def test_peak_activation_memory_is_at_most_half_of_eagers():
    eager, frozen = peak_of_process("model"), peak_of_process("rk.freeze(model)")
    assert eager > 50e6
    assert frozen <= 0.5 * eager, f"eager {eager / 1e6:.0f} MB, frozen {frozen / 1e6:.0f} MB"
