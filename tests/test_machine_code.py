"""The machine code for sm_90 of every shipped kernel, held to committed digests: a change that should change no kernel
changes none.

    python tests/test_machine_code.py            write the file anew; then say in the commit what changed and why
    python tests/test_machine_code.py --retable  the shipped table of measured choices holds for the kernels as they are
                                                 now, if all their machine code is as committed
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton's kernels are compiled by Triton")

import offline_launches  # noqa: E402

from resnet_kernels.analysis.roofline import launches_of  # noqa: E402
from resnet_kernels.backends import extension, tables  # noqa: E402
from resnet_kernels.backends.gpu import launch, offline  # noqa: E402
from resnet_kernels.backends.gpu.inference import dispatch  # noqa: E402
from resnet_kernels.testing import RESNET_CASES  # noqa: E402

FILE = Path(__file__).parent / "machine_code_sm90.json"
ARCH = 90
# The compilers whose output the file holds: Triton's, and CUDA's as CUDART_VERSION numbers it.
TRITON, CUDA = offline_launches.TRITON, 13000


def tuned_launches():
    """ResNet-50 in bf16, batch 256, by the shipped table of the H200."""
    rows = {row["launch"]: row for row in json.loads(shipped_table().read_text())["launches"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "measured_choice", lambda device, problem: rows.get(problem.key))
        return launches_of(*offline_launches.model_and_input("resnet50", 256, torch.bfloat16), ARCH)


def triton_digests():
    """{kernel: digests of its machine code, over all configurations that ship}."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    launches = [*offline_launches.launches_of_models(ARCH, bf16, *offline_launches.MODELS)]
    launches += offline_launches.launches_of_models(ARCH, fp16, ("resnet50", 256))
    launches += tuned_launches()
    for case in offline_launches.large(*(c for c in RESNET_CASES if not c.basic)):
        launches += offline_launches.launches_of_block_training(case, bf16, ARCH)
    with pytest.MonkeyPatch.context() as patch:
        for dtype, tf32 in ((bf16, False), (fp16, False), (fp32, False), (fp32, True)):
            patch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
            launches += offline_launches.launches_of_reductions(dtype, ARCH)
            launches += offline_launches.launches_of_gates(dtype, ARCH)
    digests = {}
    compiled = [made for made in launches if not isinstance(made, (launch.CudaLaunch, launch.Library))]
    for made, c in offline_launches.read(compiled, ARCH):
        digests.setdefault(made.name, set()).add(c.machine_code)
    return {name: sorted(codes) for name, codes in sorted(digests.items())}


def hopper_digests(library):
    """The digests of csrc/cuda/sm90's library."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([str(offline.CUOBJDUMP), "-xelf", "all", library], cwd=folder, check=True, capture_output=True)
        codes = [offline.machine_code(path.read_bytes()) for path in sorted(Path(folder).glob("*.cubin"))]
    return sorted(code for found in codes for code in found.values())


def library_of_hopper():
    built = sorted(Path(dispatch.__file__).parents[3].glob("_sm90*.so"))
    return str(built[0]) if built else None


@offline_launches.of_one_triton
def test_tritons_kernels_are_the_same_machine_code():
    committed, found = json.loads(FILE.read_text())["triton"], triton_digests()
    assert {name: len(codes) for name, codes in found.items()} == {name: len(c) for name, c in committed.items()}
    assert [name for name in found if found[name] != committed[name]] == []


@pytest.mark.skipif(library_of_hopper() is None, reason="the kernels for Hopper were not built")
def test_hoppers_kernels_are_the_same_machine_code():
    built, reason = extension.load()
    assert built is not None, reason
    if built.build_info()["cuda"] != CUDA:
        pytest.skip(f"the digests are of what CUDA {CUDA} compiles")
    committed, found = json.loads(FILE.read_text())["csrc/cuda/sm90"], hopper_digests(library_of_hopper())
    assert len(found) == len(committed) and set(found) == set(committed)


def shipped_table():
    (path,) = (Path(dispatch.__file__).parents[3] / "tuning").glob("nvidia-h200-*.json")
    return path


def retable(found):
    """Write the kernels' digest of today into the shipped table, and name its file by it.

    found: the machine code's digests, as compiled now. Raises ValueError unless they are the committed ones, whatever
    the kernels' names: what a GPU measured holds for the same machine code only.
    """
    if triton.__version__ != TRITON:
        raise ValueError(f"triton: expected {TRITON}, whose machine code is committed, got {triton.__version__}")
    content = json.loads(FILE.read_text())
    committed, compiled = (sorted(c for codes in of.values() for c in codes) for of in (content["triton"], found))
    if committed != compiled:
        changed = len(set(committed) ^ set(compiled))
        raise ValueError(
            f"{FILE.name}: expected the committed machine code, got {changed} other digests; measure again"
        )
    path = shipped_table()
    table = json.loads(path.read_text())
    table["identity"]["kernels"] = tables.kernels_digest()
    FILE.write_text(json.dumps(content | {"triton": found}, indent=1) + "\n")
    target = path.with_name(tables.file_of(table["identity"]))
    path.rename(target)
    target.write_text(json.dumps(table, indent=1) + "\n")
    return target


def test_the_shipped_table_is_of_these_kernels():
    path = shipped_table()
    identity, _ = tables.read(path)
    command = "if no machine code changed, run `python tests/test_machine_code.py --retable`; else measure again"
    assert identity["kernels"] == tables.kernels_digest(), command
    assert path.name == tables.file_of(identity), command


def test_a_table_is_never_moved_to_other_machine_code(monkeypatch, tmp_path):
    table = tmp_path / shipped_table().name
    table.write_bytes(shipped_table().read_bytes())
    monkeypatch.setattr(sys.modules[__name__], "shipped_table", lambda: table)
    monkeypatch.setattr(sys.modules[__name__], "FILE", tmp_path / FILE.name)
    committed = {"conv_box": ["0123456789abcdef", "fedcba9876543210"]}
    FILE.write_text(json.dumps({"triton": committed, "csrc/cuda/sm90": []}))
    monkeypatch.setattr(triton, "__version__", TRITON)
    with pytest.raises(ValueError, match="expected the committed machine code, got 2 other digests"):
        retable({"conv_box": ["0123456789abcdef", "1111111111111111"]})
    monkeypatch.setattr(tables, "kernels_digest", lambda: "another")
    made = retable({"renamed": committed["conv_box"]})
    identity, choices = tables.read(made)
    assert identity["kernels"] == "another" and made.name == tables.file_of(identity)
    assert choices == tables.read(Path(dispatch.__file__).parents[3] / "tuning" / table.name)[1] and not table.exists()
    monkeypatch.setattr(triton, "__version__", "3.8.0")
    with pytest.raises(ValueError, match=f"triton: expected {TRITON}"):
        retable(committed)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--retable"]):
        sys.exit("usage: python tests/test_machine_code.py [--retable]")
    if sys.argv[1:]:
        try:
            print(retable(triton_digests()))
        except ValueError as error:
            sys.exit(str(error))
    else:
        content = {"triton": triton_digests(), "csrc/cuda/sm90": hopper_digests(library_of_hopper())}
        FILE.write_text(json.dumps(content, indent=1) + "\n")
