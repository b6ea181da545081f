"""The machine code for sm_90 of every shipped kernel, held to committed digests: a change that should change no kernel
changes none. `python tests/test_machine_code.py` writes the file anew; then say in the commit what changed and why."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton's kernels are compiled by Triton")

from resnet_kernels.backends import extension  # noqa: E402
from resnet_kernels.backends.gpu import launch, offline  # noqa: E402
from resnet_kernels.backends.gpu.inference import dispatch  # noqa: E402

FILE = Path(__file__).parent / "machine_code_sm90.json"
ARCH = 90
# The compilers whose output the file holds: Triton's, and CUDA's as CUDART_VERSION numbers it.
TRITON, CUDA = "3.6.0", 13000


def tuned_launches():
    """ResNet-50 in bf16, batch 256, by the shipped table of the H200."""
    from test_triton import model_and_input

    from resnet_kernels.analysis.roofline import launches_of

    (table,) = (Path(dispatch.__file__).parents[3] / "tuning").glob("nvidia-h200-*.json")
    rows = {row["launch"]: row for row in json.loads(table.read_text())["launches"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "measured_choice", lambda device, problem: rows.get(problem.key))
        return launches_of(*model_and_input("resnet50", 256, torch.bfloat16), ARCH)


def launches_of_gates(dtype):
    from resnet_kernels.backends.gpu.training import gates

    with launch.recording(ARCH) as launches:
        for K, P in ((256, 56), (21, 5)):
            z = torch.empty(2, K, P, P, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
            gate = torch.empty(2, K, device="meta")
            gates.gated(z, gate, z, True)
            gates.gated_grad(z, z, z, gate, (True, True, True))
    return launches


def triton_digests():
    """{kernel: digests of its machine code, over all configurations that ship}."""
    import test_triton
    import test_triton_reductions
    import test_triton_training

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    compiled = [*test_triton.compiled(ARCH, bf16, *test_triton.MODELS)]
    compiled += test_triton.compiled(ARCH, fp16, ("resnet50", 256))
    launches = tuned_launches()
    cases = test_triton_training.large(*(c for c in test_triton_training.RESNET_CASES if not c.basic))
    for case in cases:
        launches += test_triton_training.launches_of_training(case, bf16, ARCH)
    with pytest.MonkeyPatch.context() as patch:
        for dtype, tf32 in ((bf16, False), (fp16, False), (fp32, False), (fp32, True)):
            patch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
            launches += test_triton_reductions.launches_of_training(dtype, ARCH)
            launches += launches_of_gates(dtype)
    found = {}
    for made in launches:
        if not isinstance(made, (launch.CudaLaunch, launch.Library)):
            found.setdefault(offline.specialize(made, ARCH)[0], made)
    compiled += [(made, offline.read(made, ARCH)) for made in found.values()]
    digests = {}
    for made, c in compiled:
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


@pytest.mark.skipif(triton.__version__ != TRITON, reason=f"the digests are of what Triton {TRITON} compiles")
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


if __name__ == "__main__":
    content = {"triton": triton_digests(), "csrc/cuda/sm90": hopper_digests(library_of_hopper())}
    FILE.write_text(json.dumps(content, indent=1) + "\n")
    sys.exit(0)
