"""Drop-in means nothing else changes: one test for each way a user could notice."""

import contextlib
import copy
import pickle
from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.models import resnet
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

import resnet_kernels as rk
from resnet_kernels.nn.fusable import why_plain
from resnet_kernels.testing import randomize_


def small(**options):
    """A ResNet with one block of each kind a ResNet-50 has, cheap to run."""
    return randomize_(resnet.ResNet(resnet.Bottleneck, [2, 1, 1, 1], **options)).eval()


@pytest.fixture
def pair():
    """A model, its replaced copy, and an input."""
    model = small()
    ours = copy.deepcopy(model)
    assert len(rk.replace_blocks(ours).replaced) == 5
    return model, ours, torch.randn(2, 3, 64, 64)


def same(ours, model, x, **tolerance):
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x), **({"rtol": 1e-4, "atol": 1e-4} | tolerance))


def blocks(model):
    return [m for m in model.modules() if isinstance(m, (resnet.BasicBlock, resnet.Bottleneck))]


def fused(model, x):
    return [e.why_plain is None for e in rk.explain(model, x)]


def test_blocks_are_torchvisions_by_type_name_and_parameter(pair):
    model, ours, x = pair
    assert all(type(b) is rk.nn.Bottleneck for b in blocks(ours))
    assert list(ours.state_dict()) == list(model.state_dict())
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in model.named_modules()]
    assert fused(ours, x) == [True] * 5
    same(ours, model, x)


def test_torchvisions_constructor_takes_our_blocks():
    for block, theirs, layers in (
        (rk.nn.Bottleneck, resnet.Bottleneck, [1, 1, 1, 1]),
        (rk.nn.BasicBlock, resnet.BasicBlock, [1] * 4),
    ):
        ours, model = resnet.ResNet(block, layers).eval(), resnet.ResNet(theirs, layers).eval()
        assert not rk.replace_blocks(ours).replaced
        model.load_state_dict(ours.state_dict(), strict=True)
        ours.load_state_dict(model.state_dict(), strict=True)
        same(ours, model, torch.randn(1, 3, 64, 64))


def test_replace_keeps_identity_parameters_hooks_and_optimizer(pair):
    model, ours, x = pair
    seen = []
    model.layer1[0].register_forward_hook(lambda m, i, o: seen.append(type(m)))
    ids = [id(m) for m in model.modules()], [id(p) for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rk.replace_blocks(model)
    assert ids == ([id(m) for m in model.modules()], [id(p) for p in model.parameters()])
    assert fused(model, x) == [True] * 5, "a hook on the block itself changes nothing"
    assert seen == [rk.nn.Bottleneck]
    before = copy.deepcopy(model.state_dict())
    model.train()(x).sum().backward()
    optimizer.step()
    assert not torch.equal(before["layer1.0.conv1.weight"], model.layer1[0].conv1.weight)
    rk.restore_blocks(ours)
    ours.load_state_dict(model.state_dict(), strict=True)
    same(model.eval(), ours.eval(), x)


def test_restore_undoes_replace(pair):
    model, ours, x = pair
    for m in (model, ours):
        m.layer2[0].to(memory_format=torch.channels_last)
    rk.restore_blocks(ours)
    assert len(rk.replace_blocks(ours, channels_last=True).replaced) == 5
    assert ours.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    same(ours, model, x)
    restored = rk.restore_blocks(ours)
    assert len(restored) == 5 and restored[0] == "layer1.0"
    for a, b in zip(model.modules(), ours.modules(), strict=True):
        assert type(a) is type(b) and a.__dict__.keys() == b.__dict__.keys()
    for a, b in zip(model.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    with torch.no_grad():
        assert torch.equal(model(x), ours(x))
    assert rk.restore_blocks(ours) == ()


def test_replacing_twice_and_a_bare_block():
    model = small()
    rk.replace_blocks(model)
    again = rk.replace_blocks(model)
    assert not again.replaced and set(again.skipped.values()) == {"it is fused already"}
    block = resnet.BasicBlock(8, 8)
    assert rk.replace_blocks(block).replaced == ("",) and type(block) is rk.nn.BasicBlock


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "torch.save"])
def test_copies_and_files(pair, through, tmp_path):
    _, ours, x = pair
    if through == "deepcopy":
        loaded = copy.deepcopy(ours)
    elif through == "pickle":
        loaded = pickle.loads(pickle.dumps(ours))
    else:
        torch.save(ours, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(loaded(x), ours(x))
    assert fused(loaded, x) == [True] * 5


def test_state_dict_both_ways(pair):
    model, ours, x = pair
    other = small()
    ours.load_state_dict(other.state_dict(), strict=True)
    same(ours, other, x)
    model.load_state_dict(ours.state_dict(), strict=True)
    same(model, other, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_and_half(pair, dtype):
    model, ours, x = pair
    ours.half() if dtype == torch.float16 else ours.to(dtype)
    exact = model.double()(x.double())
    with torch.no_grad():
        y = ours(x.to(dtype))
    assert y.dtype == dtype
    assert (y.double() - exact).norm() <= 8 * torch.finfo(dtype).eps * exact.norm()


def test_parameters_changed_through_data(pair):
    model, ours, x = pair
    with torch.no_grad():
        ours(x)
    for m in (model, ours):
        m.layer1[0].conv2.weight.data = m.layer1[0].conv2.weight.data * 2
        m.layer2[0].bn3.weight.data.mul_(-1.5)
        m.layer2[0].bn1.running_mean.data.add_(0.25)
    same(ours, model, x)


def test_ema_swap(pair):
    model, ours, x = pair
    averages = [torch.optim.swa_utils.AveragedModel(m) for m in (model, ours)]
    for m, average in zip((model, ours), averages, strict=True):
        with torch.no_grad():
            for p in m.parameters():
                p.mul_(1.1)
        average.update_parameters(m)
    same(averages[1], averages[0], x)
    for m, average in zip((model, ours), averages, strict=True):
        for p, q in zip(m.parameters(), average.module.parameters(), strict=True):
            p.data, q.data = q.data, p.data
    same(ours, model, x)


def test_pruning(pair):
    model, ours, x = pair
    for m in (model, ours):
        prune.l1_unstructured(m.layer1[0].conv2, "weight", amount=0.5)
    assert "conv2 carries a forward pre-hook" in rk.explain(ours, x)[0].why_plain
    same(ours, model, x)
    for m in (model, ours):
        prune.remove(m.layer1[0].conv2, "weight")
    assert fused(ours, x) == [True] * 5
    same(ours, model, x)


def test_old_spectral_norm(pair):
    model, ours, x = pair
    for m in (model, ours):
        torch.manual_seed(0)
        nn.utils.spectral_norm(m.layer1[0].conv2)
    assert fused(ours, x) == [False] + [True] * 4
    same(ours, model, x)


@pytest.mark.parametrize(
    "norm", [parametrizations.spectral_norm, parametrizations.weight_norm, parametrizations.orthogonal]
)
def test_parametrizations_are_read_through_weight(pair, norm):
    model, ours, x = pair
    for m in (model, ours):
        torch.manual_seed(0)
        norm(m.layer1[0].conv2)
        m.eval()
    assert fused(ours, x) == [True] * 5
    same(ours, model, x)


def test_grad_cam_hooks_on_an_inner_layer(pair):
    model, ours, x = pair
    maps = []
    for m in (model, ours):
        kept = {}
        m.layer4[0].conv3.register_forward_hook(lambda mod, i, o, kept=kept: kept.update(activation=o))
        m.layer4[0].conv3.register_full_backward_hook(lambda mod, gi, go, kept=kept: kept.update(gradient=go[0]))
        m(x)[:, 5].sum().backward()
        weights = kept["gradient"].mean((2, 3), keepdim=True)
        maps.append((weights * kept["activation"]).sum(1))
    assert maps[0].abs().sum() > 0
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-3, atol=1e-5)


def test_global_module_hooks(pair):
    _, ours, x = pair
    names = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: names.append(type(m).__name__))
    try:
        with torch.no_grad():
            ours(x)
    finally:
        handle.remove()
    assert names.count("Conv2d") == 20


def test_a_replaced_inner_module(pair):
    model, ours, x = pair
    swaps = {
        "relu": nn.LeakyReLU(0.1),
        "conv2": nn.Conv2d(64, 64, 3, padding=1, bias=True),
        "bn1": nn.GroupNorm(8, 64),
        "conv1": nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect", bias=False),
        "bn2": nn.InstanceNorm2d(64),
        "downsample": nn.Sequential(nn.AvgPool2d(1), nn.Conv2d(64, 256, 1, bias=False), nn.BatchNorm2d(256)),
    }
    for name, module in swaps.items():
        a, b = copy.deepcopy(model).eval(), copy.deepcopy(ours).eval()
        for m in (a, b):
            setattr(m.layer1[0], name, copy.deepcopy(module).eval())
        assert fused(b, x) == [False] + [True] * 4, name
        same(b, a, x)
    ours.layer1[0].conv1.forward = lambda t: torch.zeros(2, 64, 16, 16)
    assert "conv1 carries a forward of its own" in rk.explain(ours, x)[0].why_plain


def test_functional_transforms(pair):
    model, ours, x = pair

    def loss(m):
        params = dict(m.named_parameters())
        buffers = dict(m.named_buffers())
        return torch.func.grad(lambda p, t: torch.func.functional_call(m, (p, buffers), (t,)).square().mean())(
            params, x
        )

    for (name, a), b in zip(loss(model).items(), loss(ours).values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, msg=name)
    per_image = torch.func.vmap(lambda t: ours(t[None])[0])
    with torch.no_grad():
        torch.testing.assert_close(per_image(x), model(x), rtol=1e-4, atol=1e-4)
    _, tangent = torch.func.jvp(ours, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.func.jvp(model, (x,), (torch.ones_like(x),))[1], rtol=1e-3, atol=1e-3)


def test_forward_mode_differentiation(pair):
    model, ours, x = pair
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangents = [torch.autograd.forward_ad.unpack_dual(m(dual)).tangent for m in (model, ours)]
    torch.testing.assert_close(tangents[1], tangents[0], rtol=1e-3, atol=1e-3)


def test_fx_feature_extraction(pair):
    model, ours, x = pair
    nodes = {"layer1.0.bn2": "inner", "layer2": "stage", "layer3.0.relu_2": "out"}
    with torch.no_grad():
        want, got = (create_feature_extractor(m, nodes)(x) for m in (model, ours))
    for name in nodes.values():
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4)
    assert isinstance(torch.fx.symbolic_trace(ours), torch.fx.GraphModule)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx_export(pair, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    _, ours, x = pair
    torch.onnx.export(ours, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    nodes = {n.op_type for n in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "Conv" in nodes and not any("residual" in n for n in nodes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_trace(pair):
    _, ours, x = pair
    traced = torch.jit.trace(ours, x)
    assert "residual_block" not in str(traced.inlined_graph)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), ours(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["compile", "export"])
def test_compile_and_export_hold_the_op(pair, mode):
    _, ours, x = pair
    with torch.no_grad():
        if mode == "compile":
            graphs = []

            def backend(graph, inputs):
                graphs.append(graph)
                return graph.forward

            y = torch.compile(ours, fullgraph=True, backend=backend)(x)
            code = graphs[0].code
        else:
            program = torch.export.export(ours, (x,), dynamic_shapes=({0: torch.export.Dim("N", min=2, max=64)},))
            y, code = program.module()(x), str(program.graph)
            torch.testing.assert_close(
                program.module()(torch.cat([x, x])), ours(torch.cat([x, x])), rtol=1e-4, atol=1e-4
            )
        assert code.count("resnet_kernels.residual_block") == 5
        torch.testing.assert_close(y, ours(x), rtol=1e-4, atol=1e-4)


def test_inductor_forward_and_backward(pair):
    _, ours, x = pair
    block = ours.layer2[0]
    h = torch.relu(torch.randn(2, 256, 9, 9)).requires_grad_()
    compiled = torch.compile(block, fullgraph=True)
    want = torch.autograd.grad(block(h).square().sum(), [h, *block.parameters()])
    got = torch.autograd.grad(compiled(h).square().sum(), [h, *block.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_autocast(pair):
    model, ours, x = pair
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want, got = model(x), ours(x)
        assert fused(ours, x) == [True] * 5
        assert "under autocast" in why_plain(ours.layer1[0], torch.randn(1, 64, 8, 8))
        for block, h in ((ours.layer1[0], torch.randn(1, 64, 8, 8)), (ours.layer1[1], torch.randn(1, 256, 8, 8))):
            theirs = copy.deepcopy(block)
            theirs.__class__ = resnet.Bottleneck
            assert block(h).dtype == theirs(h).dtype
    assert got.dtype == want.dtype == torch.bfloat16
    exact = model.double()(x.double())
    assert (got - exact).norm() <= 2 * (want - exact).norm()


def test_inference_mode_and_no_grad_and_requires_grad(pair):
    model, ours, x = pair
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
    assert ours(x).requires_grad and not ours.requires_grad_(False)(x).requires_grad


def test_frozen_batch_norm_models():
    model = small(norm_layer=FrozenBatchNorm2d)
    ours, x = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    assert len(rk.replace_blocks(ours).replaced) == 5
    for training in (False, True):
        assert fused(ours.train(training), x) == [True] * 5
        same(ours, model.train(training), x)


def test_sync_batch_norm_models():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(small()).eval()
    ours, x = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    assert len(rk.replace_blocks(ours).replaced) == 5
    assert fused(ours, x) == [True] * 5
    same(ours, model, x)


class Louder(resnet.Bottleneck):
    def forward(self, x):
        return super().forward(x) * 2


def test_subclasses_and_instance_forwards_are_left_alone():
    model = resnet.ResNet(Louder, [1, 1, 1, 1]).eval()
    report = rk.replace_blocks(model)
    assert not report.replaced and len(report.skipped) == 4
    assert "Louder is a subclass and may compute something else" in str(report)
    model = small()
    model.layer1[0].forward = lambda t: torch.zeros(2, 256, 16, 16)
    report = rk.replace_blocks(model)
    assert report.skipped == {"layer1.0": "its forward was overridden on the instance"} and len(report.replaced) == 4


def test_unknown_norms_are_noted_and_run_plain():
    model = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], norm_layer=lambda n: nn.GroupNorm(8, n)).eval()
    ours, x = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    report = rk.replace_blocks(ours)
    assert "expected one of BatchNorm2d, SyncBatchNorm, FrozenBatchNorm2d, got GroupNorm" in str(report)
    assert fused(ours, x) == [False] * 4
    same(ours, model, x)


def test_tensor_subclasses_see_the_plain_chain(pair):
    class Tagged(torch.Tensor):
        pass

    _, ours, x = pair
    assert "expected a Tensor, got Tagged" in why_plain(ours.layer1[0], torch.randn(1, 64, 8, 8).as_subclass(Tagged))
    assert isinstance(ours(x.as_subclass(Tagged)), Tagged)


def test_parametrizations_in_training_mode_run_plain(pair):
    model, ours, x = pair
    for m in (model, ours):
        torch.manual_seed(0)
        parametrizations.spectral_norm(m.layer1[0].conv2)
        m.train()
        for bn in m.modules():
            if isinstance(bn, nn.BatchNorm2d):
                bn.eval()
    assert "parametrization in training mode" in rk.explain(ours, x)[0].why_plain
    model.load_state_dict(ours.state_dict())
    same(ours, model, x)


def test_backward_under_an_autocast_the_forward_did_not_have(pair):
    model, ours, x = pair
    gradients = []
    for m in (model, ours):
        h = x.clone().requires_grad_()
        y = m(h)
        with torch.autocast("cpu", torch.bfloat16):
            gradients.append(torch.autograd.grad(y.sum(), h)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


def test_frozen_batch_norms_that_widen_run_plain():
    model = small(norm_layer=FrozenBatchNorm2d)
    ours = copy.deepcopy(model)
    rk.replace_blocks(ours)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want, got = (m.layer1[0](torch.randn(1, 64, 8, 8).bfloat16()) for m in (model, ours))
    assert got.dtype == want.dtype == torch.float32


def test_shortcuts_that_do_not_fit_are_told():
    block = rk.nn.BasicBlock(16, 32, 2, rk.nn.ZeroPadShortcut(16, 64, 3)).eval()
    reason = why_plain(block, torch.randn(1, 16, 8, 8))
    assert reason.startswith(
        "downsample: ZeroPadShortcut(16, 64, stride=3) does not fit 16 channels to 32 with stride 2"
    )
    assert "None does not fit 16 channels to 32" in why_plain(rk.nn.BasicBlock(16, 32).eval(), torch.randn(1, 16, 8, 8))


def test_an_input_off_its_alignment():
    block = randomize_(rk.nn.Bottleneck(64, 16)).eval()
    memory = bytearray(2 * 64 * 6 * 6 * 4 + 2)
    x = torch.frombuffer(memory, dtype=torch.float32, offset=2).view(2, 6, 6, 64).permute(0, 3, 1, 2)
    x.normal_()
    with torch.no_grad():
        torch.testing.assert_close(block(x), block(x.clone()))


def test_explain_leaves_a_training_model_as_it_was(pair):
    _, ours, x = pair
    before = copy.deepcopy(ours.train().state_dict())
    explanations = rk.explain(ours, x)
    assert [e.name for e in explanations][:2] == ["stem", "layer1.0"]
    assert [e.chosen for e in explanations] == ["cpu"] * 6
    assert explanations[1].candidates["library"].startswith("not implemented here: training")
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_named_backends():
    model, x = small(), torch.randn(1, 3, 64, 64)
    rk.replace_blocks(model)
    with rk.use_backend("library"):
        assert {e.chosen for e in rk.explain(model, x)} == {"library"}
        with rk.use_backend(None):
            assert rk.explain(model, x)[0].chosen == "cpu"
        assert rk.explain(model, x)[0].chosen == "library"
        with pytest.raises(rk.BackendUnavailable, match="'library' was named and .*not implemented here: training"):
            model.train()(x)
    with rk.use_backend("eager"):
        model(torch.randn(2, 3, 64, 64))
        assert "'eager' was named" in rk.explain(model.eval(), x)[0].why_plain
    with (
        rk.use_backend("gpu:cuda"),
        pytest.raises(rk.BackendUnavailable, match="'gpu:cuda' was named .* expected tensors on cuda, got cpu"),
    ):
        model(x)
    with pytest.raises(
        ValueError, match="backend: expected one of cpu, gpu, library, reference, .* eager, got 'cudnn'"
    ):
        rk.use_backend("cudnn")
    rk.use_backend("reference")
    try:
        assert rk.explain(model, x)[0].chosen == "reference"
    finally:
        rk.use_backend(None)


def test_the_environment_names_a_backend(monkeypatch):
    model, x = small(), torch.randn(1, 3, 64, 64)
    rk.replace_blocks(model)
    monkeypatch.setenv("RESNET_KERNELS_BACKEND", "library")
    assert rk.explain(model, x)[0].chosen == "library"
    monkeypatch.setenv("RESNET_KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="got 'nonsense'"):
        model(x)


def test_without_the_extension_aten_runs(monkeypatch):
    from resnet_kernels.backends import extension, select

    monkeypatch.setattr(extension, "load", lambda: (None, "the C++ extension was not built"))
    select._choose.cache_clear()
    model, x = small(), torch.randn(1, 3, 64, 64)
    rk.replace_blocks(model)
    explanation = rk.explain(model, x)[0]
    assert explanation.chosen == "library" and explanation.candidates["cpu"] == "the C++ extension was not built"
    with rk.use_backend("cpu"), pytest.raises(rk.BackendUnavailable, match="not built"):
        model(x)
    select._choose.cache_clear()


@pytest.mark.parametrize("args, says", [((3,), "expected a module or ops.residual_block, got int")])
def test_explain_names_what_it_takes(args, says):
    with pytest.raises(TypeError, match=says):
        rk.explain(*args)


def test_explain_an_op_and_a_converted_input():
    w, a = [torch.randn(8, 8, 3, 3)] * 2, [torch.ones(8)] * 2
    x = torch.randn(2, 8, 6, 6)
    text = str(rk.explain(rk.ops.residual_block, x, w, a, a, rk.ops.BlockSpec((1, 1), (1, 1), (1, 1))))
    assert text.startswith("residual_block: cpu") and "converted to channels_last" in text
    assert "reference: chosen only if it is named" in text
    with contextlib.suppress(StopIteration):
        assert str(rk.explain(nn.Linear(2, 2), torch.ones(1, 2))) == "no fused residual block ran"


def test_torchvision_registry_models_are_all_replaced():
    names = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2"]
    expected = OrderedDict(zip(names, (8, 16, 16, 33, 50, 16, 16), strict=True))
    with torch.device("meta"):
        for name, count in expected.items():
            report = rk.replace_blocks(torchvision.models.get_model(name))
            assert len(report.replaced) == count and not report.skipped and not report.notes
