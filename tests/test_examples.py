"""The training examples: short runs of the scripts."""

import contextlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torchvision

pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).parents[1] / "examples"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
CLASSES = ("0", "1", "2")
# Images per step in each of two processes. The 24 images of 32 x 32 make 3 steps per epoch.
BATCH, STEPS = 4, 3
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are in the repository only")


def start(*arguments, processes=1, **rest):
    """Start train_imagenet.py in a process group of its own; with several processes, by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    common = ["--model", "resnet18", "--size", "32", "--workers", "1", "--device", "cpu", "--log-every", "1"]
    command = [sys.executable, *launcher, EXAMPLES / "train_imagenet.py", *common, *arguments]
    return subprocess.Popen(
        list(map(str, command)),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **rest,
    )


def main(monkeypatch, script, *arguments):
    """Run the script in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return runpy.run_path(str(EXAMPLES / script))["main"]()
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def finish(process, code=0):
    """Wait for the process, check its exit code and return its output."""
    try:
        text, _ = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, text
    return text


def logged(out):
    path = out / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(out):
    return [(row["epoch"], row["step"], row["loss"]) for row in logged(out)]


def interrupt(process, out, number, steps):
    """Send the signal once so many steps are logged."""
    deadline = time.monotonic() + 100
    while len(logged(out)) < steps and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """scikit-learn's digits as a folder of images per class."""
    from PIL import Image
    from sklearn.datasets import load_digits

    root, digits = tmp_path_factory.mktemp("digits"), load_digits()
    for part, first, count in (("train", 0, STEPS * 2 * BATCH // len(CLASSES)), ("val", 20, 5)):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for i, image in enumerate(digits.images[digits.target == int(name)][first : first + count]):
                picture = Image.fromarray((image * 15.9).astype("uint8")).resize((32, 32)).convert("RGB")
                picture.save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Train two epochs by two processes without interruption; return (folder, output)."""
    out = tmp_path_factory.mktemp("whole")
    text = finish(start(data, "--batch", BATCH, "--epochs", 2, "--sync-bn", "--out", out, processes=2))
    return out, text


needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")


@needs_gloo
def test_two_processes_train(whole):
    out, text = whole
    assert "8 residual blocks replaced, 0 left alone" in text
    found = re.findall(r"epoch (\d)/2: top-1 ([\d.]+)%, top-5 100.00%, [\d.]+ images/s", text)
    assert [epoch for epoch, _ in found] == ["1", "2"]
    rows = logged(out)
    assert [(row["epoch"], row["step"]) for row in rows] == [(e, s) for e in (1, 2) for s in (1, 2, 3)]
    # The learning rate rises in the first five epochs.
    assert [row["lr"] for row in rows] == sorted(row["lr"] for row in rows)
    assert not list(out.glob("*.part"))


@needs_gloo
def test_a_checkpoint_loads_into_torchvisions_model(whole):
    state = torch.load(whole[0] / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"], state["about"]["classes"]) == (2, 0, list(CLASSES))
    model = torchvision.models.resnet18(num_classes=3)
    model.load_state_dict(state["model"], strict=True)
    assert model.layer1[0].bn1.num_batches_tracked == 2 * STEPS
    decays = [(group["weight_decay"], len(group["params"])) for group in state["optimizer"]["param_groups"]]
    matrices = sum(p.dim() > 1 for p in model.parameters())
    assert decays == [(1e-4, matrices), (0.0, len(list(model.parameters())) - matrices)]


@needs_gloo
def test_an_interrupted_run_resumes_with_the_same_results(data, whole, tmp_path):
    arguments = (data, "--batch", BATCH, "--epochs", 2, "--sync-bn", "--out", tmp_path)
    process = start(*arguments, processes=2)
    interrupt(process, tmp_path, signal.SIGINT, 1)
    # torchrun exits with 1, regardless of its processes' exit codes.
    text = finish(process, code=1)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    done = len(logged(tmp_path))
    assert state["epoch"] * STEPS + state["step"] == done and 0 < done < 2 * STEPS
    assert f"SIGINT in epoch {state['epoch'] + 1} after step {state['step']}; continue with --resume" in text
    text = finish(start(*arguments, "--resume", tmp_path / "checkpoint.pt", processes=2))
    assert f"at epoch {state['epoch'] + 1}, step {state['step'] + 1}" in text
    assert losses(tmp_path) == losses(whole[0])


def test_one_process_exits_with_the_signals_code(data, tmp_path):
    process = start(data, "--batch", 2 * BATCH, "--epochs", 50, "--amp", "bf16", "--out", tmp_path)
    interrupt(process, tmp_path, signal.SIGTERM, 2)
    assert "SIGTERM in epoch" in finish(process, code=143)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["epoch"] * STEPS + state["step"] == len(logged(tmp_path))


def test_errors_are_a_sentence_and_an_exit_code(data, whole, tmp_path, monkeypatch, capsys):
    empty = tmp_path / "empty"
    for name in ("train/cat", "val/cat"):
        (empty / name).mkdir(parents=True)
    (tmp_path / "bytes.pt").write_bytes(b"no checkpoint")
    checkpoint = whole[0] / "checkpoint.pt"
    wrong = {
        (tmp_path / "nowhere",): "data: expected a folder with train/ and val/, got .*nowhere, which has no train/",
        (empty,): "data: expected a folder of images per class in .*train.* cat",
        (data, "--model", "vgg11"): "model: expected one of resnet101, .* got 'vgg11'",
        (data, "--batch", "25"): "train: expected at least 25 images for one step, got 24",
        (data, "--resume", tmp_path / "none.pt"): "resume: expected a checkpoint, got .*none.pt, which is not a file",
        (data, "--resume", tmp_path / "bytes.pt"): "resume: expected a checkpoint of this script, got .*bytes.pt",
        (data, "--model", "resnet34", "--resume", checkpoint): "another model: expected resnet34, got resnet18",
    }
    for arguments, expected in wrong.items():
        common = ("--batch", "2", "--workers", "0", "--device", "cpu", "--out", tmp_path / "out")
        assert main(monkeypatch, "train_imagenet.py", *common, *arguments) == 2
        assert re.search(f"train_imagenet.py: .*{expected}", capsys.readouterr().err), expected


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_digits(dtype, tmp_path, monkeypatch, capsys):
    plot = tmp_path / "plots" / "digits.png"
    options = ("--steps", 4, "--batch", 16, "--dtype", dtype, "--device", "cpu", "--out", plot)
    assert main(monkeypatch, "train_digits.py", *options) == 0
    text = capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "2 residual blocks replaced" in text
    assert re.search(r"resnet_kernels is (slower than|faster than|as fast as) PyTorch here", text)
    rows = re.findall(r"(PyTorch|resnet_kernels) +│ +([\d.]+) +│ +([\d.]+)% +│ +([\d.]+) ", text)
    assert [row[0] for row in rows] == ["PyTorch", "resnet_kernels"]
    assert abs(float(rows[0][1]) - float(rows[1][1])) < 0.2, "the loss after the same four batches"
