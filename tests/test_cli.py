"""The command, as a user types it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from resnet_kernels.cli import verify as verify_module
from resnet_kernels.cli.main import main
from resnet_kernels.testing.images import classifier, photographs, residual_networks


def run(capsys, *args):
    code = main(list(args))
    out, err = capsys.readouterr()
    return code, out, " ".join(err.split())


def test_info(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    for text in (torch.__version__.split("+")[0], "extension", "chosen only by name", "by name, or where a"):
        assert text in out


def test_verify_passes_and_tells_every_block(capsys):
    code, out, _ = run(capsys, "verify", "--model", "resnet18", "--size", "64", "--dtype", "bf16")
    assert code == 0 and "10 of 10 within the rule" in out and "layer4.1" in out and "logits, frozen" in out


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
    assert code == 0 and "layer1.0: cpu" in out and "aten: can run it" in out


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
            "backend named cpu, triton, sm90, cuda, aten, reference, eager, got 'nonsense'",
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
    for name, content in (("resnet34", None), ("resnet18", b"no checkpoint")):
        if content:
            (tmp_path / "resnet18.pth").write_bytes(content)
        with pytest.raises(ValueError, match=f"is no checkpoint of {name}: "):
            classifier(name, tmp_path / "resnet18.pth", images)


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


def test_importing_compiles_nothing_and_needs_no_extension(tmp_path):
    code = (
        "import sys; sys.modules['resnet_kernels._C'] = None\n"
        "import torch, resnet_kernels as rk, torchvision\n"
        "m = torchvision.models.resnet18().eval(); rk.replace_blocks(m)\n"
        "with torch.no_grad(): m(torch.zeros(1, 3, 32, 32))\n"
        "print(rk.explain(m, torch.zeros(1, 3, 32, 32))[0])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "layer1.0: aten" in out and "was not built" in out
