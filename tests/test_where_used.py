"""Where ResNets are used: torchvision's segmentation and detection models, replaced, against themselves and fp64.

A ReLU's sign near zero is chance, and one that flips moves gradients by more than all rounding does. So the networks
that are compared have their ReLUs decided (`decided_`): their batch norms shift every channel far to one side of zero.
"""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models import detection, resnet, segmentation
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d

import resnet_kernels as rk
from resnet_kernels import cli
from resnet_kernels.cli import coverage
from resnet_kernels.nn.blocks import Fused
from resnet_kernels.testing import assert_matches

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "coverage.md"
NHWC = torch.channels_last
NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)


@torch.no_grad()
def decided_(model, images):
    """Batch norms of the blocks put every value of a channel 8 deviations above zero, of every second channel below;
    those before an addition above all of them. Known statistics become those of the images."""
    ends = set()
    for block in model.modules():
        if isinstance(block, (resnet.BasicBlock, resnet.Bottleneck)):
            last = block.bn3 if hasattr(block, "bn3") else block.bn2
            ends |= {id(last), id(block.downsample[1])} if block.downsample else {id(last)}
    handles = []

    def measure(bn, args):
        x = args[0]
        bn.running_mean.copy_(x.mean((0, 2, 3)))
        bn.running_var.copy_(x.var((0, 2, 3)))

    for bn in model.modules():
        if isinstance(bn, NORMS):
            bn.weight.uniform_(0.5, 1.5)
            bn.bias.fill_(8)
            if id(bn) not in ends:
                bn.bias[1::2] = -8
            handles.append(bn.register_forward_pre_hook(measure))
    model(images)
    for handle in handles:
        handle.remove()
    return model


def blocks(model):
    return [m for m in model.modules() if isinstance(m, (resnet.BasicBlock, resnet.Bottleneck))]


def replaced(model):
    """A copy, every block of it fused."""
    ours = copy.deepcopy(model)
    report = rk.replace_blocks(ours)
    assert len(report.replaced) == len(blocks(model)) and not report.skipped and not report.notes
    return ours


def step(model, images, loss):
    """Loss, gradients and buffers after a training step, by name."""
    model = copy.deepcopy(model)
    value = loss(model(images))
    value.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": value.detach()} | grads | dict(model.named_buffers())


def check_step(model, images, loss):
    check_steps([(model, images, loss)])


def check_steps(draws):
    """Steps of replaced models by the rule, in fp32 beside PyTorch's in the same layout and fp64; errors of all draws
    together."""
    alike = {}
    for model, images, loss in draws:
        model = model.to(memory_format=NHWC)
        images = images.to(memory_format=NHWC)
        ours = replaced(model)
        assert all(e.why_plain is None for e in rk.explain(ours, images) if not e.name.endswith("stem"))
        got, theirs = step(ours, images, loss), step(model, images, loss)
        exact = step(copy.deepcopy(model).double(), images.double(), loss)
        assert got.keys() == theirs.keys() and len(got) > 20
        for name, want in exact.items():
            if not want.is_floating_point():
                assert torch.equal(got[name], want), name
                continue
            alike.setdefault(name, []).append([t.flatten() for t in (got[name], theirs[name], want)])
    for name, rows in alike.items():
        assert_matches(*map(torch.cat, zip(*rows, strict=True)), images.numel() // 3, name, maximum=False)


# Segmentation: the last two stages dilated.


def dilated(depths):
    return resnet.ResNet(resnet.Bottleneck, depths, replace_stride_with_dilation=[False, True, True])


SEGMENTERS = {
    "fcn": lambda: segmentation.fcn._fcn_resnet(dilated([1, 1, 2, 2]), 4, aux=True),
    "deeplabv3": lambda: segmentation.deeplabv3._deeplabv3_resnet(dilated([1, 1, 1, 2]), 4, aux=None),
}


@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_training_step_of_a_segmenter(name):
    """Of two draws together: a batch norm of one value an image stands before much of deeplabv3's gradients, and of a
    few its error is chance."""
    draws = []
    for _ in range(2 if name == "deeplabv3" else 1):
        model, images = SEGMENTERS[name]().train(), torch.randn(8, 3, 48, 40)
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
        decided_(model, images)
        labels = torch.randint(4, (8, 48, 40))
        draws.append((model, images, lambda out, t=labels: sum(F.cross_entropy(logits, t) for logits in out.values())))
    check_steps(draws)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmenters_in_evaluation(name):
    model, images = SEGMENTERS[name](), torch.randn(2, 3, 48, 40).to(memory_format=NHWC)
    decided_(model.train(), images)
    model.eval().to(memory_format=NHWC)
    ours = replaced(model)
    assert all(e.why_plain is None for e in rk.explain(ours, images))
    with torch.no_grad():
        got, theirs, exact = ours(images)["out"], model(images)["out"], model.double()(images.double())["out"]
    assert_matches(got, theirs, exact, 9 * 2048)


# Detection: frozen batch norms below a feature pyramid.


def pyramid(trainable=3):
    """Of one block a stage, the stem and the first stage not trained, as in torchvision's detectors."""
    backbone = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], norm_layer=FrozenBatchNorm2d)
    return _resnet_fpn_extractor(backbone, trainable)


SIZES = dict(min_size=64, max_size=96)
FEW = dict(
    rpn_pre_nms_top_n_train=50, rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_train=20, rpn_post_nms_top_n_test=20,
    box_batch_size_per_image=16, box_detections_per_img=4, box_score_thresh=0.0,
)  # fmt: skip
DETECTORS = {
    "fasterrcnn": lambda: detection.FasterRCNN(pyramid(), 3, **SIZES, **FEW),
    "maskrcnn": lambda: detection.MaskRCNN(pyramid(), 3, **SIZES, **FEW),
    "keypointrcnn": lambda: detection.KeypointRCNN(pyramid(), 2, num_keypoints=3, **SIZES, **FEW),
    "retinanet": lambda: detection.RetinaNet(pyramid(), 3, **SIZES, score_thresh=0.0, detections_per_img=4),
}


def objects(name):
    """Two images with a box, or two, in each."""
    boxes = [torch.tensor([[8.0, 8.0, 40.0, 44.0], [20.0, 4.0, 60.0, 30.0]]), torch.tensor([[12.0, 20.0, 50.0, 60.0]])]
    targets = []
    for b in boxes:
        target = {"boxes": b, "labels": torch.ones(len(b), dtype=torch.long)}
        if name == "maskrcnn":
            target["masks"] = torch.zeros(len(b), 64, 72, dtype=torch.uint8)
            for mask, (x0, y0, x1, y1) in zip(target["masks"], b.long().tolist(), strict=True):
                mask[y0:y1, x0:x1] = 1
        elif name == "keypointrcnn":
            centre = (b[:, :2] + b[:, 2:]) / 2
            points = torch.stack([b[:, :2], centre, b[:, 2:]], 1)
            target["keypoints"] = F.pad(points, (0, 1), value=1.0)
        targets.append(target)
    return list(torch.rand(2, 3, 64, 72)), targets


@pytest.mark.parametrize("trainable", [3, 5])
def test_a_training_step_of_a_detectors_pyramid(trainable):
    """The features and their gradients: what a detector does with them, proposals sorted, suppressed and drawn, is no
    continuous function of them, so that rounding may decide it."""
    model, images = pyramid(trainable).train(), torch.randn(2, 3, 64, 72)
    decided_(model, images)
    weights = [torch.randn(()) for _ in range(5)]
    check_step(
        model, images, lambda out: sum(w * f.square().mean() for w, f in zip(weights, out.values(), strict=True))
    )


def detector(name, training):
    """It and its copy that is replaced, images and targets."""
    model = DETECTORS[name]().train(training)
    images, targets = objects(name)
    decided_(model.backbone, torch.stack(images))
    return model, replaced(model), images, targets


@pytest.mark.parametrize("name", DETECTORS)
def test_a_training_step_of_a_detector(name):
    """The whole of it, drawn by the same seed. Its losses to a hundredth: a proposal may be another."""
    *models, images, targets = detector(name, True)
    losses = []
    for model in models:
        torch.manual_seed(0)
        found = model(images, targets)
        sum(found.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        losses.append({key: value.detach() for key, value in found.items()})
    theirs, got = losses
    torch.testing.assert_close(got, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_in_evaluation(name):
    """As many are found, with the same scores to a hundredth: of two boxes as good as each other it may be either."""
    *models, images, _ = detector(name, False)
    with torch.no_grad():
        theirs, got = (model(images) for model in models)
    for a, b in zip(theirs, got, strict=True):
        assert a.keys() == b.keys() and len(a["scores"]) == 4
        torch.testing.assert_close(b["scores"], a["scores"], rtol=1e-2, atol=1e-3)
        assert all(b[key].shape == a[key].shape and b[key].isfinite().all() for key in a)


# By the names of torchvision's own: how many blocks of each are replaced.

REGISTERED = {
    "fcn_resnet50": 16,
    "deeplabv3_resnet50": 16,
    "deeplabv3_resnet101": 33,
    "fasterrcnn_resnet50_fpn": 16,
    "maskrcnn_resnet50_fpn": 16,
    "keypointrcnn_resnet50_fpn": 16,
    "retinanet_resnet50_fpn": 16,
}


@pytest.mark.parametrize("name, count", REGISTERED.items())
def test_torchvisions_are_replaced_and_restored(name, count):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    kinds = [type(m) for m in model.modules()]
    report = rk.replace_blocks(model)
    assert len(report.replaced) == count and not report.skipped and not report.notes
    assert sum(isinstance(m, Fused) for m in model.modules()) == count
    assert rk.restore_blocks(model) == report.replaced
    assert [type(m) for m in model.modules()] == kinds


# The table of replaced blocks.


def table_rows(text):
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row] for row in cells[2:]}


@pytest.mark.parametrize("title", ["torchvision DenseNet", "torchvision FCN", "timm SE-ResNet"])
def test_the_readmes_table_is_current(title):
    """Its other rows are made in the same way; `make readme` makes all."""
    family = next(f for f in coverage.FAMILIES if f"{f.library} {f.title}" == title)
    pytest.importorskip(family.library)
    table = coverage.BLOCK.search(PAGE.read_text())[2]
    made = coverage.table(ROOT / "benchmarks" / "results", [family])
    assert table_rows(table)[title] == table_rows(made)[title]


def test_the_readmes_table_holds_every_family():
    table = coverage.BLOCK.search(PAGE.read_text())[2]
    assert list(table_rows(table)) == [f"{f.library} {f.title}" for f in coverage.FAMILIES]


class Own(resnet.BasicBlock):
    pass


def test_what_is_counted(monkeypatch):
    def make(library, name):
        model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
        model.layer2[0].__class__ = Own
        model.layer3[0].relu = nn.SiLU()
        return model

    monkeypatch.setattr(coverage, "make", make)
    row = coverage.line(coverage.Family("torchvision", "Own", ("own", "same")))
    assert row[:2] == ["torchvision Own", "own 3, same 3"]
    assert row[2] == "2: Own is a subclass and may compute something else"
    assert row[3] == "4 fused; 2 plain: relu: expected ReLU, got SiLU"
    assert row[4] == "4 fused; 2 plain: relu: expected ReLU, got SiLU, the stem too"
    assert row[5] == "–"


def test_the_command_puts_the_table_into_a_readme(monkeypatch, tmp_path, capsys):
    families = [coverage.Family("torchvision", "ResNet", ("resnet18",)), coverage.Family("absent_library", "X", ("x",))]
    monkeypatch.setattr(coverage, "FAMILIES", families)
    results = ["--results", str(ROOT / "benchmarks" / "results")]
    assert cli.main(["coverage", *results]) == 0
    printed = capsys.readouterr().out.strip()
    assert "| torchvision ResNet | resnet18 8 | – | fused | fused, the stem too | " in printed
    assert "inference resnet18 1.27x (fp32, cpu-zen3)" in printed
    assert printed.endswith("absent_library is not installed: its models are not listed.")
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- coverage -->\nold\n<!-- end of coverage -->\nafter\n")
    for _ in range(2):
        assert cli.main(["coverage", *results, "--readme", str(path)]) == 0
        assert path.read_text() == f"before\n<!-- coverage -->\n\n{printed}\n\n<!-- end of coverage -->\nafter\n"
    path.write_text("nothing")
    assert cli.main(["coverage", *results, "--readme", str(path)]) == 2
    assert cli.main(["coverage", *results, "--readme", str(tmp_path / "none")]) == 2
