"""The example networks: short runs of the scripts, and a step of each compared with that of torch's modules."""

import copy
import runpy
import sys
from pathlib import Path

import pytest
import torch

import resnet_kernels as rk
from resnet_kernels.nn.blocks import Fused

pytest.importorskip("sklearn")
FOLDER = Path(__file__).parents[1] / "examples" / "networks"
SCRIPTS = ("unet", "hourglass", "simple_baseline")
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the examples are in the repository only")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    sys.modules.pop("common", None)


def load(name):
    return runpy.run_path(str(FOLDER / f"{name}.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run(name, monkeypatch, tmp_path, capsys):
    plot = tmp_path / "plots" / f"{name}.png"
    arguments = ["--steps", "2", "--batch", "4", "--out", str(plot)]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    assert load(name)["main"]() == 0
    text = capsys.readouterr().out
    assert "of 359 unseen digits" in text and f"Plot: {plot}" in text
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 20_000


def test_errors_are_a_sentence_and_an_exit_code(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["unet", "--out", str(tmp_path)])
    assert load("unet")["main"]() == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error == f"unet.py: out: expected a file, got {tmp_path}, which is a folder"


NETWORKS = {  # a constructor, the sizes of the input, the number of fused blocks
    "unet": (lambda m: m["UNet"]((8, 16)), (2, 1, 16, 24), 4),
    "hourglass": (lambda m: m["StackedHourglass"](3, stacks=2, depth=2, channels=16), (2, 1, 16, 16), 17),
    "simple_baseline": (lambda m: m["SimpleBaseline"](3, channels=8), (3, 3, 64, 64), 4),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_step_matches_torchs_modules(name):
    """In fp64, where the fused algebra and torch's modules agree to the last digits."""
    make, sizes, count = NETWORKS[name]
    model, x = make(load(name)).double().train(), torch.randn(sizes).double()
    assert sum(isinstance(m, Fused) for m in model.modules()) == count
    found = []
    for backend in ("eager", "reference"):
        own = copy.deepcopy(model)
        with rk.use_backend(backend):
            out = own(x)
            sum(y.square().mean() for y in (out if isinstance(out, list) else [out])).backward()
        outputs = out if isinstance(out, list) else [out]
        found.append([*outputs, *(p.grad for p in own.parameters()), *own.buffers()])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_block_runs_fused(name):
    make, sizes, count = NETWORKS[name]
    explained = rk.explain(make(load(name)).train(), torch.randn(sizes))
    assert len(explained) >= count and all(e.why_plain is None for e in explained)


def test_key_points_by_hand():
    import common

    picture = torch.zeros(1, 1, 8, 8)
    picture[0, 0, 2, 3:6] = 1
    picture[0, 0, 3:7, 4] = 1
    # Ink by column: 3 once, 4 five times, 5 once; by row: 2 three times, 3 to 6 once each.
    want = [[4, 24 / 7], [4, 2], [4, 6], [3, 2], [5, 2]]
    points = common.key_points(picture)
    torch.testing.assert_close(points[0], torch.tensor(want))
    heat = common.heat_maps(points, 8, stride=1)
    assert heat[0, 1, 2, 4] == 1 and heat.max() == 1
    torch.testing.assert_close(common.located(heat, 1)[0, 1:], points[0, 1:])
    assert common.found(points + torch.tensor([0.0, 3.0]), points, 2) == 0 and common.found(points, points, 0) == 1
