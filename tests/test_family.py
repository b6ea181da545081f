"""resnet_kernels.models: the papers' sizes, the results of torch's own modules, torchvision's state dicts."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import resnet_kernels as rk
from resnet_kernels import models
from resnet_kernels.nn.blocks import Fused

TORCHVISION = [name for name in models.__all__ if hasattr(torchvision.models, name)]
# A constructor and the network's millions of parameters, as the papers' tables and texts round them.
PARAMETERS = {
    "resnet50": (lambda: models.resnet50(), 25.6),
    "resnet152": (lambda: models.resnet152(), 60.2),
    "resnext50": (lambda: models.resnext50_32x4d(), 25.0),
    "wide-resnet50-2": (lambda: models.wide_resnet50_2(), 68.9),
    "seresnet50": (lambda: models.seresnet50(), 28.1),
    "seresnet101": (lambda: models.seresnet101(), 49.3),
    "seresnet152": (lambda: models.seresnet152(), 66.8),
    "seresnext50": (lambda: models.seresnext50_32x4d(), 27.56),
    "preactivation-resnet200": (lambda: models.preactivation_resnet200(), 64.7),
    "resnet20": (lambda: models.cifar_resnet(20), 0.27),
    "resnet32": (lambda: models.cifar_resnet(32), 0.46),
    "resnet44": (lambda: models.cifar_resnet(44), 0.66),
    "resnet56": (lambda: models.cifar_resnet(56), 0.85),
    "resnet110": (lambda: models.cifar_resnet(110), 1.7),
    "resnet1202": (lambda: models.cifar_resnet(1202), 19.4),
    "preactivation-110": (lambda: models.cifar_preactivation(110), 1.7),
    "preactivation-164": (lambda: models.cifar_preactivation(164), 1.7),
    "preactivation-1001": (lambda: models.cifar_preactivation(1001), 10.3),
}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_of_the_papers(name):
    make, millions = PARAMETERS[name]
    with torch.device("meta"):
        count = parameters(make()) / 1e6
    # Half a unit of the last digit that the paper gives.
    assert abs(count - millions) <= 0.5 * 10 ** -len(str(millions).split(".")[1]) + 0.005


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_state_dicts_fit_the_networks_of_the_same_name(name):
    with torch.device("meta"):
        ours, theirs = getattr(models, name)(), getattr(torchvision.models, name)()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert [type(m).__name__ for m in ours.layer3] == [type(m).__name__ for m in theirs.layer3]


def test_stochastic_depth_grows_with_the_block_and_has_no_parameters():
    with torch.device("meta"):
        model, plain = models.resnet50(drop_path=0.3), models.resnet50()
        small = models.cifar_resnet(20, drop_path=0.4)
    assert list(model.state_dict()) == list(plain.state_dict())
    for m, depth, last in ((model, 16, 0.3), (small, 9, 0.4)):
        rates = [b.drop_path.p if b.drop_path else 0.0 for b in m.modules() if isinstance(b, Fused)]
        assert rates == pytest.approx([last * i / (depth - 1) for i in range(depth)])


def convolutions(model):
    """Return the number of layers as the papers count them: convolutions other than projections, and the classifier."""
    projections = sum(isinstance(m, nn.Conv2d) for n, m in model.named_modules() if "downsample" in n)
    return sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) - projections


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_depths_are_in_the_names(depth):
    with torch.device("meta"):
        assert convolutions(getattr(models, f"resnet{depth}")()) == depth
        if depth < 50:
            assert convolutions(getattr(models, f"plain{depth}")()) == depth


@pytest.mark.parametrize("depth", [20, 56, 110, 1202])
def test_depths_of_small_networks(depth):
    with torch.device("meta"):
        assert convolutions(models.cifar_resnet(depth)) == convolutions(models.cifar_plain(depth)) == depth


@pytest.mark.parametrize("depth, bottleneck", [(110, False), (110, True), (164, None), (1001, None)])
def test_depths_of_preactivation(depth, bottleneck):
    with torch.device("meta"):
        model = models.cifar_preactivation(depth, bottleneck=bottleneck)
    assert convolutions(model) == depth
    assert hasattr(model.stages[0][0], "conv3") == (bottleneck is not False)


# 10^9 multiply-adds for an image of 224 x 224, as table 1 of He et al. 2015 rounds them.
@pytest.mark.parametrize("depth, billions", [(18, 1.8), (34, 3.6), (50, 3.8), (101, 7.6), (152, 11.3)])
def test_operations_are_those_of_the_paper_with_the_original_stride(depth, billions):
    with torch.device("meta"):
        model = getattr(models, f"resnet{depth}")(original_stride=True).eval()
        image = torch.empty(1, 3, 224, 224)
    with rk.use_backend("eager"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    assert abs(counter.get_total_flops() / 2e9 - billions) < 0.3


MADE = {
    "resnet18": lambda: models.resnet18(num_classes=5),
    "resnet18-A": lambda: models.resnet18(num_classes=5, shortcut="A"),
    "resnet18-C": lambda: models.resnet18(num_classes=5, shortcut="C"),
    "resnet50-original": lambda: models.resnet50(num_classes=5, original_stride=True),
    "resnext50": lambda: models.resnext50_32x4d(num_classes=5),
    "resnet18-drop-path": lambda: models.resnet18(num_classes=5, drop_path=0.5),
    "seresnet18": lambda: models.seresnet18(num_classes=5),
    "seresnet50-A": lambda: models.seresnet50(num_classes=5, shortcut="A", drop_path=0.3),
    "seresnext50": lambda: models.seresnext50_32x4d(num_classes=5),
    "plain18": lambda: models.plain18(num_classes=5),
    "cifar-20-drop-path": lambda: models.cifar_resnet(20, drop_path=0.5),
    "cifar-20": lambda: models.cifar_resnet(20),
    "cifar-20-B": lambda: models.cifar_resnet(20, shortcut="B"),
    "cifar-plain-20": lambda: models.cifar_plain(20),
    "preactivation-20": lambda: models.cifar_preactivation(20),
    "preactivation-29": lambda: models.cifar_preactivation(29, bottleneck=True),
}


@pytest.mark.parametrize("name", MADE)
def test_a_step_and_an_evaluation_match_torchs_modules(name):
    """In fp64 the fused algebra (backend "reference") and torch's modules ("eager") agree to the last digits.

    The kernels have their own tests.
    """
    torch.manual_seed(0)
    model = MADE[name]().double()
    images, labels = torch.randn(4, 3, 40, 40).double(), torch.randint(0, 5, (4,))
    found, plain = {}, "plain" in name
    for backend in ("eager", "reference"):
        model.zero_grad()
        statistics = {k: v.clone() for k, v in model.state_dict().items()}
        # A named backend must run every block, and plain networks have no block that a backend could run.
        with rk.use_backend(None if plain and backend == "reference" else backend):
            model.train()
            torch.manual_seed(1)  # stochastic depth drops the same branches by each backend
            F.cross_entropy(model(images), labels).backward()
            model.eval()
            with torch.no_grad():
                logits = model(images)
        found[backend] = [logits, *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]
        model.load_state_dict(statistics)
    for a, b in zip(found["eager"], found["reference"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    blocks = sum(isinstance(m, Fused) for m in model.modules())
    assert blocks == (0 if plain else len(rk.explain(model, images)))


def test_errors_name_the_wrong_option():
    with pytest.raises(ValueError, match="expected 6n \\+ 2, at least 8, got 21"):
        models.cifar_resnet(21)
    with pytest.raises(ValueError, match="expected 9n \\+ 2 for bottlenecks, got 111"):
        models.cifar_preactivation(111, bottleneck=True)
    with pytest.raises(ValueError, match="shortcut: expected 'A', 'B' or 'C', got 'D'"):
        models.resnet18(shortcut="D")
    for make in (models.plain18, lambda drop_path: models.cifar_plain(20, drop_path=drop_path)):
        with pytest.raises(ValueError, match="drop_path: expected blocks with shortcuts, got plain blocks"):
            make(drop_path=0.1)
    with pytest.raises(ValueError, match="drop_path: expected a probability of at least 0 and below 1, got 1.5"):
        models.resnet50(drop_path=1.5)
    with pytest.raises(ValueError, match="expected no dilation"):
        models.resnet50(replace_stride_with_dilation=[False, False, True])
