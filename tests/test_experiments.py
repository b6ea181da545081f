"""examples/experiments: tiny runs of each experiment, the files they write, resuming, and error messages."""

import csv
import importlib
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
FOLDER = Path(__file__).parents[1] / "examples" / "experiments"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the examples are in the repository only")

TINY = ("--batch", 16, "--steps", 2, "--epochs", 2, "--size", 4, "--device", "cpu")
# By experiment: options, the number of rows of the CSV, and parts of the printed sentences.
EXPERIMENTS = {
    "degradation": (
        ("--depths", 8, 14, "--seeds", 2),
        2 * 2 * 2 * 2,
        ["From 8 to 14 layers", "residual, 14 layers: 6"],
    ),
    "shortcuts": (("--depths", 8, "--seeds", 1), 4 * 2, ["every shortcut is", "C, 8 layers: 3 blocks by"]),
    "gradient_flow": (("--depths", 8, 14, "--seeds", 1), 2 * 2 * (7 + 13), ["At 14 layers and initialisation"]),
    "layer_responses": (("--depths", 8, 14, "--seeds", 1), 2 * (7 + 13), ["Residual networks respond"]),
    # The whole network, 4 blocks deleted one at a time, and 4 numbers of blocks with 5 draws of 2 kinds.
    "lesions": (("--depths", 14), 2 * (1 + 4 + 4 * 5 * 2), ["A deleted block costs"]),
    "preactivation": (("--depths", 8, "--seeds", 1), 2 * 2, ["8 layers: pre-activation learns", "3 blocks by"]),
    "thousand_layers": (
        ("--depths", 14, 11),
        2 * 2,
        ["14 layers, seed 0: training loss", "pre-activation, 11 layers: 3"],
    ),
    "highway": (("--depths", 14), 5 * 2, ["14 layers: the identity is", "identity, 14 layers: 6 blocks by"]),
    "ode": (("--depths", 2, "--width", 8), 4 + 2, ["Trained with 2 steps", "Euler: orders"]),
}


@pytest.fixture(scope="module")
def modules():
    """The experiments' modules and the modules that they share, by name."""
    names = ["data", "plots", "shared", *EXPERIMENTS]
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(modules, monkeypatch, name, *options):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
    return modules["shared"].main(modules[name].EXPERIMENT, modules[name].__doc__)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_writes_its_rows_a_plot_and_a_verdict(name, device, modules, monkeypatch, tmp_path, capsys):
    options, count, sentences = EXPERIMENTS[name]
    monkeypatch.setattr(modules["ode"], "STEPS", {"Euler": [1, 2, 4, 8], "Runge-Kutta 4": [1, 2]})
    assert run(modules, monkeypatch, name, *TINY, *options, "--device", device, "--out", tmp_path) == 0
    text = " ".join(capsys.readouterr().out.split())
    for sentence in sentences:
        assert sentence in text
    with (tmp_path / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == count
    assert {"net", "depth", "seed", "epoch"} < rows[0].keys()
    for row in rows:
        for column in {"train_error", "test_error"} & row.keys():
            assert 0 <= float(row[column]) <= 1
        for column in {"train_loss", "gradient_norm", "std", "error"} & row.keys():
            assert float(row[column]) > 0
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part"))


def test_a_killed_run_resumes_with_the_same_results(modules, monkeypatch, tmp_path, capsys):
    options = (*TINY, "--epochs", 4, "--depths", 8, "--seeds", 2)
    assert run(modules, monkeypatch, "degradation", *options, "--out", tmp_path / "whole") == 0
    out = tmp_path / "killed"
    command = [sys.executable, FOLDER / "degradation.py", *options, "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 100
        # Wait until the first run's rows are written, so that the second one is interrupted.
        while time.monotonic() < deadline and process.poll() is None:
            if (out / "degradation.csv").exists():
                break
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    state = torch.load(out / "degradation.pt", weights_only=True)
    assert 1 <= state["done"] < 4
    capsys.readouterr()
    assert run(modules, monkeypatch, "degradation", *options, "--out", out) == 0
    assert f"{state['done']} of 4 runs done" in capsys.readouterr().out
    for end in ("csv", "png"):
        assert (out / f"degradation.{end}").read_bytes() == (tmp_path / "whole" / f"degradation.{end}").read_bytes()


@pytest.mark.parametrize("saves", [1, 3])
def test_an_interrupted_run_resumes_with_the_same_results(saves, modules, monkeypatch, tmp_path):
    """Interrupted right after an epoch of the first or the second run, which measures at the beginning and the end."""
    options = (*TINY, "--depths", 8, "--seeds", 1)
    assert run(modules, monkeypatch, "gradient_flow", *options, "--out", tmp_path / "whole") == 0
    checkpoint = modules["shared"].Checkpoint
    save, count = checkpoint.save, iter(range(100))

    def interrupted(self):
        save(self)
        if next(count) == saves:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", interrupted)
        assert run(modules, patch, "gradient_flow", *options, "--out", tmp_path) == 130
    assert run(modules, monkeypatch, "gradient_flow", *options, "--out", tmp_path) == 0
    name = "gradient_flow.csv"
    assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_errors_are_a_sentence_and_an_exit_code(modules, monkeypatch, tmp_path, capsys):
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes" / "degradation.pt").write_bytes(b"no checkpoint")
    (tmp_path / "cifar" / "cifar-10-batches-py").mkdir(parents=True)
    for part in ("train", "val"):
        (tmp_path / "folder" / part / "cat").mkdir(parents=True)
    common = (*TINY, "--depths", 8, "--seeds", 1)
    assert run(modules, monkeypatch, "degradation", *common, "--out", tmp_path / "done") == 0
    wrong = {
        (
            "--data",
            tmp_path / "none",
        ): "data: expected a folder with cifar-10-batches-py/ (CIFAR-10, unpacked), or with",
        ("--data", tmp_path / "cifar"): "data: expected the complete CIFAR-10 in",
        ("--data", tmp_path / "folder"): "data: expected a folder of images per class in train/ and val/",
        ("--batch", 1000): "batch: expected at most the 1438 training images in 2 steps, got 1000",
        ("--depths", 9): "depth: expected 6n + 2, at least 8, got 9",
        ("--depths", 18): "depths: 18 is ImageNet's network",
        ("--out", tmp_path / "bytes"): "bytes/degradation.pt, which cannot be read",
        ("--out", tmp_path / "done", "--lr", 0.5): "of a run with other settings, lr: expected 0.5, got 0.02",
        ("--out", tmp_path / "done", "--epochs", 3): "of a run with other settings, epochs: expected 3, got 2",
    }
    if not torch.cuda.is_available():
        wrong["--device", "cuda"] = "device: expected a GPU for cuda, got none"
    for options, expected in wrong.items():
        capsys.readouterr()
        assert run(modules, monkeypatch, "degradation", *common, "--out", tmp_path / "out", *options) == 2
        assert expected in capsys.readouterr().err


def test_cifar_is_read_and_augmented(modules, monkeypatch, tmp_path):
    """Files in CIFAR-10's format with few images; torchvision's check of the real files' checksums is turned off."""
    folder, random = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = random.integers(0, 256, (10, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": list(range(10))}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    options = ("--depths", 8, "--batch", 16, "--epochs", 1, "--data", tmp_path, "--out", tmp_path, "--device", "cpu")
    assert run(modules, monkeypatch, "degradation", *options) == 0
    monkeypatch.setattr(sys, "argv", ["degradation.py", *map(str, options)])
    args = modules["shared"].arguments(modules["degradation"].EXPERIMENT, "")
    images = modules["data"].load(args)
    assert (images.x.shape, images.steps, images.padding) == ((50, 3, 32, 32), 3, 4)
    assert args.lr == 0.1


def test_crops_and_flips_come_from_the_zero_padded_image(modules):
    x = torch.rand(4, 1, 5, 5)
    labels = torch.arange(4)
    images = modules["data"].InMemory((x, labels), (x, labels), batch=4, padding=2)
    padded = torch.nn.functional.pad(images.x, (2, 2, 2, 2))
    windows = [padded[:, :, r : r + 5, c : c + 5] for r in range(5) for c in range(5)]
    windows += [w.flip(3) for w in windows]
    found = set()
    for epoch in range(20):
        batches = list(images.train(seed=0, epoch=epoch))
        assert [len(y) for _, y in batches] == [4]
        for image, label in zip(*batches[0], strict=True):
            here = [i for i, w in enumerate(windows) if torch.equal(w[label], image)]
            assert len(here) == 1
            found |= {here[0]}
    # 80 draws of 50 equally frequent ones miss more than half of them with a probability below 1e-6.
    assert len(found) > 25
    (x1, y1), (x2, y2) = (next(images.train(seed=0, epoch=3)) for _ in range(2))
    assert torch.equal(x1, x2) and torch.equal(y1, y2)
    assert not torch.equal(x1, next(images.train(seed=1, epoch=3))[0])


def test_a_folder_of_images(modules, monkeypatch, tmp_path, capsys):
    """Two runs of a network for small images write the same rows; a network for ImageNet runs too."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for part, first, count in (("train", 0, 8), ("val", 20, 3)):
        for label in (0, 1):
            (tmp_path / part / str(label)).mkdir(parents=True)
            for i, image in enumerate(digits.images[digits.target == label][first : first + count]):
                picture = Image.fromarray((image * 15.9).astype("uint8")).resize((32, 32)).convert("RGB")
                picture.save(tmp_path / part / str(label) / f"{i}.png")
    common = ("--data", tmp_path, "--size", 32, "--batch", 8, "--workers", 0, "--epochs", 1, "--device", "cpu")
    for out, depth in (("a", 8), ("b", 8), ("c", 18)):
        assert run(modules, monkeypatch, "degradation", *common, "--depths", depth, "--out", tmp_path / out) == 0
    assert "residual, 18 layers: 8 blocks by" in capsys.readouterr().out
    assert (tmp_path / "a/degradation.csv").read_bytes() == (tmp_path / "b/degradation.csv").read_bytes()


@pytest.mark.parametrize(
    "kind, depth, share, expected",
    [("cifar", 56, 0.0, 0.1), ("cifar", 110, 0.0, 0.01), ("cifar", 110, 0.01, 0.1), ("cifar", 56, 0.49, 0.1)]
    + [("cifar", 56, 0.5, 0.01), ("cifar", 56, 0.75, 0.001), ("folder", 34, 0.4, 0.01)],
)
def test_the_papers_rates(kind, depth, share, expected, modules, monkeypatch):
    shared = modules["shared"]
    monkeypatch.setattr(shared, "kind_of", lambda _: kind)
    args = type("Arguments", (), {"data": None, "lr": 0.1})
    assert shared.rate(args, depth, int(share * 64_000), 64_000) == pytest.approx(expected)


def test_fully_open_and_closed_gates_give_known_blocks(modules):
    """With g = 0 a highway block is the identity (x is non-negative); with g = 1 it is the residual function alone."""
    import resnet_kernels as rk

    block = rk.nn.BasicBlock(8, 8).eval()
    x = torch.rand(2, 8, 5, 5)
    alone = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
    for kind, bias, expected in (
        ("highway gates", -60, x),
        ("highway gates", 60, alone.relu()),
        ("gated shortcut", -60, (alone + x).relu()),
        ("constant scaling", 0, ((alone + x) / 2).relu()),
    ):
        gated = modules["highway"].GatedBlock(block, kind).eval()
        if gated.gate is not None:
            torch.nn.init.zeros_(gated.gate.weight)
            torch.nn.init.constant_(gated.gate.bias, bias)
        torch.testing.assert_close(gated(x), expected)


def test_lesions_restore_the_model(modules):
    import resnet_kernels as rk

    model = rk.models.cifar_resnet(14, in_channels=1)
    before = {name: id(m) for name, m in model.named_modules()}
    images = modules["data"].load(type("Arguments", (), {"data": None, "size": 8, "batch": 64, "steps": None}))
    rows = modules["lesions"].lesions(model, images, 1)
    assert {name: id(m) for name, m in model.named_modules()} == before
    # Two of the six blocks change the shape of their input, so four can be deleted.
    assert [row["amount"] for row in rows if row["study"] == "delete the block"] == [1, 2, 3, 4]
