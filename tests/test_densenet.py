"""DenseNet's layers and networks against torchvision's and against fp64."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from test_training import norms_of
from torch import nn
from torchvision.models import densenet

import resnet_kernels as rk
from resnet_kernels.nn.densenet import why_plain
from resnet_kernels.ops import chain_training
from resnet_kernels.ops.spec import BlockSpec, NormSpec, TrainingPlan
from resnet_kernels.testing import GivenReLU, RecordedReLU, assert_matches, randomize_

NHWC = torch.channels_last
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = {  # N, channels of each input, H, W; growth rate, bn_size
    "one": (2, (16,), 9, 7, 8, 4),
    "three": (2, (16, 8, 8), 6, 10, 8, 4),
    "densenet121": (2, (64, 32, 32), 8, 8, 32, 4),
    "odd-channels": (3, (13, 5), 5, 9, 3, 3),
}
BACKENDS = [
    pytest.param("reference"),
    pytest.param("cpu"),
    pytest.param("gpu", marks=pytest.mark.interpreted, id="triton-interpreted"),
]


def make(name, drop_rate=0.0, memory_efficient=False):
    """A layer of torchvision's, its inputs and a gradient of its result."""
    N, channels, H, W, growth, bn_size = CASES[name]
    layer = randomize_(densenet._DenseLayer(sum(channels), growth, bn_size, drop_rate, memory_efficient))
    return layer, [torch.relu(torch.randn(N, C, H, W)) for C in channels], torch.randn(N, growth, H, W)


def ours(layer):
    layer = copy.deepcopy(layer)
    assert rk.replace_blocks(layer).replaced == ("",) and type(layer) is rk.nn.DenseLayer
    return layer


def step(layer, maps, dy, masks=None):
    """Results of a step, the gradients of all inputs as one; the masks of the ReLUs, as given or as they came."""
    layer, maps = copy.deepcopy(layer), [t.clone().requires_grad_() for t in maps]
    relus = []
    if type(layer) is densenet._DenseLayer:
        relus = [GivenReLU([m]) for m in masks] if masks else [RecordedReLU(), RecordedReLU()]
        layer.relu1, layer.relu2 = relus
    y = layer(maps)
    if not relus:
        node = y.grad_fn
        plan = TrainingPlan.of(node.plan)
        kept = chain_training.Saved.of(node.saved_tensors[1 + node.count :], plan)
        operands = torch.cat(maps, 1).detach(), kept.c[1]
        tables = [table.double()[:2, :, None, None] for table in kept.tables]
        masks = [~((a * u.double() + b).float() <= 0) for u, (a, b) in zip(operands, tables, strict=True)]
    y.backward(dy)
    masks = masks or [relu.masks[0] for relu in relus]
    grads = {"x": torch.cat([t.grad for t in maps], 1)} | {n: p.grad for n, p in layer.named_parameters()}
    return {"y": y.detach()} | grads | dict(layer.named_buffers()), masks


def check(make, dtype, backend, draws=1):
    """As in test_training: each implementation against fp64 under its own masks, errors of several draws together."""
    found = {}
    for _ in range(draws):
        layer, maps, dy = make()
        maps, dy = ([t.to(dtype, memory_format=NHWC) for t in ts] for ts in (maps, [dy]))
        layer = layer.to(dtype)
        double = copy.deepcopy(layer).double(), [t.double() for t in maps], dy[0].double()
        theirs, their_masks = step(layer, maps, *dy)
        fused = ours(layer)
        with rk.use_backend(backend):
            assert why_plain(fused, maps) is None
            got, masks = step(fused, maps, *dy)
        y = step(*double)[0]["y"]
        wants = [step(*double, m)[0] | {"y": y} for m in (masks, their_masks)]
        for name, value in theirs.items():
            if not value.is_floating_point():
                assert torch.equal(got[name], value), name
                continue
            shifted = (value.double() - wants[1][name] + wants[0][name]).to(dtype)
            found.setdefault(name, []).append((got[name], shifted, wants[0][name]))
    rows = y.numel() // y.shape[1]
    for name, drawn in found.items():
        out, eager, want = (torch.stack(t) for t in zip(*drawn, strict=True))
        assert_matches(out, eager, want, rows, name, maximum=name == "y")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_layers(name, dtype, backend, poisoned):
    check(lambda: make(name), DTYPES[dtype], backend, draws=-(-64 // CASES[name][4] // CASES[name][5]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [(1,), (2,), (1, 2)], ids=str)
def test_layers_with_known_statistics(frozen, backend, poisoned):
    def made():
        layer, *rest = make("three")
        for i in frozen:
            layer.get_submodule(f"norm{i}").eval()
        return layer, *rest

    check(made, torch.float32, backend, draws=2)


def test_gradcheck():
    layer = ours(randomize_(densenet._DenseLayer(3, 2, 2, 0.0))).double()
    maps = [torch.randn(2, C, 3, 2).double().requires_grad_() for C in (2, 1)]
    names = [name for name, _ in layer.named_parameters()]

    def run(a, b, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), ([a, b],))

    with rk.use_backend("reference"):
        inputs = (*maps, *(p.detach().requires_grad_() for p in layer.parameters()))
        torch.autograd.gradcheck(run, inputs, atol=1e-4, fast_mode=True)


def test_opcheck():
    x = torch.randn(2, 8, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = [torch.randn(6, 8, 1, 1, requires_grad=True), torch.randn(4, 6, 3, 3, requires_grad=True)]
    gammas, betas = ([torch.randn(C, requires_grad=True) for C in (8, 6)] for _ in range(2))
    empty = [torch.empty(0)] * 2
    ones = (1, 1)
    spec = BlockSpec(ones, ones, ones, "none", relu=False, preactivation=True)
    plan = TrainingPlan(spec, (NormSpec(1e-5, True, ""),) * 2, (False, False), "cpu").flat()
    op = torch.ops.resnet_kernels.residual_block_training.default
    torch.library.opcheck(op, (x, weights, gammas, betas, empty, empty, *plan))


def test_a_tensor_is_taken_as_a_list_of_one():
    layer, (x,), _ = make("one")
    with torch.no_grad():
        a, b = ours(layer), ours(layer)
        assert torch.equal(a(x), b([x]))
        torch.testing.assert_close(ours(layer.eval())(x), layer(x), rtol=1e-4, atol=1e-4)


def test_dropout_drops_what_torchs_does():
    """The same elements of maps in the same layout."""
    layer, maps, _ = make("three", drop_rate=0.4)
    fused = ours(layer)
    maps = [t.to(memory_format=NHWC) for t in maps]
    outcomes = []
    for module in (layer.to(memory_format=NHWC), fused):
        torch.manual_seed(1)
        outcomes.append(module(maps))
    dropped = [float((y == 0).double().mean()) for y in outcomes]
    assert why_plain(fused, maps) is None and 0.3 < dropped[0] < 0.5
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-4)
    assert not (fused.eval()(maps) == 0).any()


def test_memory_efficient_layers_are_torchvisions_where_there_is_a_gradient():
    layer, maps, dy = make("three", memory_efficient=True)
    fused = ours(layer)
    with torch.no_grad():
        assert why_plain(fused, maps) is None
    for t in maps:
        t.requires_grad_()
    assert "memory_efficient" in why_plain(fused, maps)
    outcomes = []
    for module in (layer, fused):
        module(maps).backward(dy)
        outcomes.append([*(p.grad for p in module.parameters()), *module.buffers(), *(t.grad.clone() for t in maps)])
        for t in maps:
            t.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def spoil(kind, layer):
    """Make the layer one that runs as torch's modules, and tell how it says so."""
    if kind == "hook":
        layer.conv1.register_forward_hook(lambda *_: None)
        return "conv1 carries a forward hook"
    if kind == "bias":
        layer.conv2 = nn.Conv2d(layer.conv2.in_channels, layer.conv2.out_channels, 3, padding=1)
        return "conv2: the convolution has a bias"
    if kind == "norm":
        layer.norm1 = nn.GroupNorm(4, layer.norm1.num_features)
        return "norm1: expected one of BatchNorm2d"
    if kind == "relu":
        layer.relu2 = nn.LeakyReLU()
        return "relu2: expected ReLU, got LeakyReLU"
    bound = layer.bn_function
    layer.bn_function = lambda inputs: bound(inputs)
    return "its bn_function was overridden on the instance"


@pytest.mark.parametrize("kind", ["hook", "bias", "norm", "relu", "bn_function"])
def test_layers_that_run_as_torchs_modules(kind):
    layer, maps, _ = make("three")
    says = spoil(kind, layer)
    fused = ours(layer)
    assert says in why_plain(fused, maps)
    with torch.no_grad():
        assert torch.equal(fused(maps), layer(maps))
    with rk.use_backend("cpu"), pytest.raises(rk.BackendUnavailable, match=says.split(":")[0]):
        fused(maps)


def test_wrong_inputs_raise_as_in_torch():
    layer, maps, _ = make("three")
    for wrong in ([], [maps[0], maps[1][:, :, 1:]], maps[:2], [t[:1, :, :1, :1] for t in maps]):
        raised = []
        for module in (layer, ours(layer)):
            with pytest.raises((RuntimeError, ValueError)) as told:
                module(wrong)
            raised.append(str(told.value))
        assert raised[0] == raised[1]


def test_under_autocast():
    layer, maps, dy = make("three")
    fused = ours(layer)
    grads = []
    for module in (layer, fused):
        with torch.autocast("cpu", torch.bfloat16):
            y = module([t.bfloat16() for t in maps])
        assert y.dtype == torch.bfloat16
        y.float().backward(dy)
        grads.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    assert grads[1].dtype == torch.float32 and F.cosine_similarity(*grads, 0) > 0.99


def test_compiled_and_traced():
    layer, maps, dy = make("three")
    fused = ours(layer)
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    outcomes = []
    for module in (fused, compiled):
        y = module(maps)
        y.backward(dy)
        outcomes.append([y.detach(), *(p.grad for p in module.parameters()), *module.buffers()])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    graph = torch.fx.symbolic_trace(fused.eval())
    layer.load_state_dict(fused.state_dict())
    assert torch.equal(graph(maps), layer.eval()(maps))


# Networks.


def test_torchvisions_densenets_are_replaced_and_restored():
    for name, count in (("densenet121", 58), ("densenet161", 78), ("densenet169", 82), ("densenet201", 98)):
        with torch.device("meta"):
            model = torchvision.models.get_model(name)
        report = rk.replace_blocks(model)
        assert len(report.replaced) == count and not report.skipped and not report.notes
        assert set(rk.replace_blocks(model).skipped.values()) == {"it is fused already"}
        assert rk.restore_blocks(model) == report.replaced
        assert not any(isinstance(m, rk.nn.DenseLayer) for m in model.modules())


def test_what_is_noted():
    model = densenet.DenseNet(4, (1, 1, 1, 1), 8, memory_efficient=True)
    model.features.denseblock2.denselayer1.relu1 = nn.SiLU()
    notes = rk.replace_blocks(model).notes
    assert "memory_efficient" in notes["features.denseblock1.denselayer1"]
    assert notes["features.denseblock2.denselayer1"] == "relu1: expected ReLU, got SiLU"
    explained = rk.explain(model.eval(), torch.randn(1, 3, 64, 64))
    assert [e.why_plain for e in explained] == [None, "relu1: expected ReLU, got SiLU", None, None]
    assert explained[0].chosen in ("cpu", rk.explain.__globals__["PLAIN"])


def decided_(model):
    """Every channel far to one side of zero behind its batch norm: see test_where_used."""
    for bn in norms_of(model):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.constant_(bn.bias, 8)
        with torch.no_grad():
            bn.bias[1::2] = -8
    return model


def step_of_a_network(model, x, t):
    model = copy.deepcopy(model)
    loss = F.cross_entropy(model(x), t)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers())


def test_a_training_step_of_densenet121():
    """Of 600 tensors some err twice as much by chance: compared are all that are the same of a layer, norm1.weight for
    one, each over its own size, of three models (the transitions have three norms)."""
    alike = {}
    for _ in range(3):
        model, x, t = torchvision.models.densenet121(num_classes=5).train(), torch.randn(4, 3, 64, 64), torch.arange(4)
        decided_(model).to(memory_format=NHWC)
        fused, x = copy.deepcopy(model), x.to(memory_format=NHWC)
        rk.replace_blocks(fused)
        assert all(e.why_plain is None for e in rk.explain(fused, x))
        got, theirs = step_of_a_network(fused, x, t), step_of_a_network(model, x, t)
        for name, want in step_of_a_network(model.double(), x.double(), t).items():
            if want.is_floating_point():
                size = want.square().mean().sqrt().item()
                rows = [value.flatten() / size for value in (got[name], theirs[name], want)]
                alike.setdefault(".".join(name.split(".")[-2:]), []).append(rows)
            else:
                assert torch.equal(got[name], want), name
    assert len(alike["conv2.weight"]) == 3 * 58
    for name, rows in alike.items():
        assert_matches(*map(torch.cat, zip(*rows, strict=True)), 4 * 32 * 32, name, maximum=False)


def test_a_densenet_in_evaluation():
    model = randomize_(densenet.DenseNet(8, (2, 2, 2, 2), 16, num_classes=5)).eval().to(memory_format=NHWC)
    x = torch.randn(2, 3, 64, 64).to(memory_format=NHWC)
    fused = copy.deepcopy(model)
    rk.replace_blocks(fused)
    assert all(e.why_plain is None for e in rk.explain(fused, x))
    with torch.no_grad():
        assert_matches(fused(x), model(x), copy.deepcopy(model).double()(x.double()), 4 * 32 * 32)
