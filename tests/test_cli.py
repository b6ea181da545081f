"""The command as a user types it, and what it answers to mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import resnet_kernels as rk
from resnet_kernels.backends import extension, select
from resnet_kernels.cli import verify as verify_module
from resnet_kernels.cli.main import main
from resnet_kernels.testing.images import classifier, photographs, residual_networks
from resnet_kernels.tuning import TuningReport
from resnet_kernels.tuning.tuner import Measured


def run(capsys, *args):
    code = main(list(args))
    out, err = capsys.readouterr()
    return code, out, " ".join(err.split())


def test_info_fits_a_screen(capsys, monkeypatch):
    monkeypatch.setenv("RESNET_KERNELS_TUNING", "off")
    code, out, _ = run(capsys, "info")
    lines = out.splitlines()
    assert code == 0 and len(lines) <= 24 and max(map(len, lines)) <= 100
    for text in (
        torch.__version__.split("+")[0],
        "C++ extension",
        "RESNET_KERNELS_TUNING=off",
        "resnet-kernels explain",
    ):
        assert text in out
    rows = [line.split() for line in lines if line.startswith("cpu ")]
    assert [row[:4] for row in rows] == [["cpu", dtype, "cpu", "cpu"] for dtype in ("fp32", "bf16", "fp16")]
    if not torch.cuda.is_available():
        assert "this GPU" not in out and not any(line.startswith("cuda ") for line in lines)


def test_info_gives_the_reason_where_the_extension_is_missing(capsys, monkeypatch):
    missing = (None, "the C++ extension was not built")
    monkeypatch.setattr(extension, "load", lambda: missing)
    select._choose.cache_clear()
    try:
        out = run(capsys, "info")[1]
    finally:
        select._choose.cache_clear()
    assert "library" in out and "torch modules" in out and "cpu: the C++ extension was not built" in out


def test_verify_passes_and_lists_every_block(capsys):
    code, out, _ = run(capsys, "verify", "--model", "resnet18", "--size", "64", "--dtype", "bf16")
    assert code == 0 and "10 of 10 within the rule" in out and "layer4.1" in out and "logits, frozen" in out


def test_verify_passes_on_maps_of_one_pixel(capsys):
    """A 3x3 filter has one tap there, and Winograd's transforms err more than that sum."""
    code, out, _ = run(capsys, "verify", "--model", "resnet18", "--size", "1", "--batch", "1")
    assert code == 0 and "10 of 10 within the rule" in out


def test_verify_fails_on_a_wrong_kernel(capsys, monkeypatch):
    from resnet_kernels.backends import cpu

    right = cpu.residual_blocks
    monkeypatch.setattr(cpu, "residual_blocks", lambda *args: right(*args) * 1.001)
    code, out, _ = run(capsys, "verify", "--model", "resnet18", "--size", "64")
    assert code == 1 and "WRONG" in out and "wrong: layer1.0" in out


def test_verify_in_a_named_backend(capsys):
    assert run(capsys, "verify", "--model", "resnet18", "--size", "64", "--backend", "library")[0] == 0


def test_explain(capsys):
    code, out, _ = run(capsys, "explain", "--model", "resnet18", "--size", "64")
    assert code == 0 and "layer1.0: cpu" in out and "library: can run it" in out


def test_demo_draws_its_chart(capsys, tmp_path):
    code, out, _ = run(capsys, "demo", "--model", "resnet18", "--batch", "2", "--out", str(tmp_path))
    assert code == 0 and "Replaced and frozen agree" in out and "Weights: random" in out
    chart = tmp_path / "resnet18.png"
    assert chart.read_bytes().startswith(b"\x89PNG") and chart.stat().st_size > 10_000


@pytest.mark.parametrize(
    "args, says",
    [
        (("verify", "--model", "vgg16"), "expected one of resnet101, "),
        (("demo", "--weights", "no/such/file.pth"), "a torchvision checkpoint of resnet50, got no/such/file.pth"),
        (("explain", "--backend", "gpu:cuda", "--size", "64"), "expected tensors on cuda, got cpu"),
        (
            ("info", "--backend", "nonsense"),
            f"backend: expected one of {', '.join([*select.BY_NAME, select.EAGER])}, got 'nonsense'",
        ),
    ],
)
def test_errors_are_a_sentence_and_a_code(capsys, args, says):
    code, _, err = run(capsys, *args)
    assert code == 2 and err.startswith("resnet-kernels: ") and says in err


def test_weights_come_from_a_torchvision_checkpoint(tmp_path, capsys):
    images = photographs(2, 64)
    model = torchvision.models.resnet18()
    torch.save(model.state_dict(), tmp_path / "resnet18.pth")
    loaded = classifier("resnet18", tmp_path / "resnet18.pth", images)
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))


def test_checkpoints_are_taken_out_of_their_wrappers(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    prefixed = {f"module.{key}": value for key, value in state.items()}
    for content in (prefixed, {"state_dict": prefixed, "epoch": 3}, {"model": state}):
        torch.save(content, tmp_path / "resnet18.pth")
        loaded = classifier("resnet18", tmp_path / "resnet18.pth", None).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_what_is_no_checkpoint_is_described_in_a_sentence(tmp_path):
    path = tmp_path / "weights.pth"
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, path)
    whole = path.read_bytes()
    classes = {**state, "fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}
    cases = [
        ("resnet34", state, "is no checkpoint of resnet34: expected 34 layers with weights, got 18"),
        ("resnet18", classes, r"fc.weight: expected shape \(1000, 512\), got \(10, 512\)"),
        ("resnet18", {"conv.weight": torch.zeros(2)}, r"keys: 102 missing \(first: conv1.weight\), 1 unexpected"),
        ("resnet18", {"epoch": 3}, "to hold a state dict of tensors, .* got dict"),
        ("resnet18", [1, 2], "to hold a state dict of tensors, .* got list"),
        ("resnet18", whole[: len(whole) // 2], "torch.load cannot read .*: it is truncated, no PyTorch checkpoint, or"),
        ("resnet18", b"no checkpoint", "torch.load cannot read "),
    ]
    for name, content, says in cases:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(ValueError, match=says) as raised:
            classifier(name, path, None)
        assert len(str(raised.value)) < 400


def test_numbers_that_are_none_are_refused(capsys):
    for args, says in (
        (("tune", "--budget", "-1"), "argument --budget: expected a number of seconds that is not negative, got '-1'"),
        (("tune", "--batch", "many"), "argument --batch: expected a positive whole number, got 'many'"),
        (("verify", "--size", "0"), "argument --size: expected a positive whole number, got '0'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(list(args))
        assert stopped.value.code == 2 and says in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match="budget: expected a number of seconds that is not negative, got -1"):
        rk.tune(classifier("resnet18", None, None), torch.zeros(1, 3, 32, 32), budget=-1)


def test_tables_that_cannot_be_written_are_refused_before_anything_is_measured(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    tune = ("tune", "--model", "resnet18", "--size", "32", "--batch", "1")
    for table in (tmp_path / "file" / "table.json", tmp_path, Path("/proc/table.json")):
        code, _, err = run(capsys, *tune, "--table", str(table))
        assert code == 2 and "table: expected a file in a folder that can be written, got " in err
    monkeypatch.setenv("RESNET_KERNELS_CACHE", str(tmp_path / "file"))
    code, _, err = run(capsys, *tune)
    assert code == 2 and "RESNET_KERNELS_CACHE" in err and "Traceback" not in err


def test_tune_explains_its_rule():
    row = Measured("layer1.0", "cpu", "cpu", {"cpu": 2e-3, "library": 1.99e-3}, {})
    assert "(the default; library, 1990.0 us, is not faster by more than the noise)" in str(row)
    report = str(TuningReport(Path("table.json"), (row,), 3, 1))
    assert "below 98% of the default's" in report and "1 choices measured, 3 already in the table, 1 left" in report


def test_coverage_says_where_it_found_no_results(tmp_path):
    from resnet_kernels.cli import coverage

    text = coverage.table(tmp_path, [])
    assert f"{tmp_path} holds no results files, so the last column is empty" in text


def test_photographs_are_the_real_ones():
    images = photographs(6, 96)
    assert images.shape == (6, 3, 96, 96) and images.dtype == torch.float32
    assert images.std() > 0.5 and not torch.equal(images[2], images[4])
    assert torch.equal(images, photographs(6, 96))
    assert "resnet50" in residual_networks() and "resnext50_32x4d" in residual_networks()


def test_verify_leaves_the_model_alone():
    model = classifier("resnet18", None, photographs(2, 64))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    results = verify_module.verify(model, photographs(2, 64))
    assert all(errors.ok for errors in results.values())
    assert type(model.layer1[0]) is torchvision.models.resnet.BasicBlock
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_installed_as_a_command():
    command = Path(sys.executable).parent / "resnet-kernels"
    out = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    assert out.startswith("resnet_kernels ")


def test_importing_loads_no_tooling(tmp_path):
    code = (
        "import sys, resnet_kernels as rk; rk.tune, rk.TuningReport\n"
        "print([m for m in ('rich', 'jinja2', 'matplotlib', 'filelock', 'platformdirs') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert out.strip() == "[]"


def test_importing_compiles_nothing_and_needs_no_extension(tmp_path):
    code = (
        "import sys; sys.modules['resnet_kernels._C'] = None\n"
        "import torch, resnet_kernels as rk, torchvision\n"
        "m = torchvision.models.resnet18().eval(); rk.replace_blocks(m)\n"
        "with torch.no_grad(): m(torch.zeros(1, 3, 32, 32))\n"
        "print(rk.explain(m, torch.zeros(1, 3, 32, 32))[0])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "layer1.0: library" in out and "was not built" in out
