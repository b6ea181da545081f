"""Every test marked `interpreted`, in processes of their own: Triton reads TRITON_INTERPRET when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Tests that run side by side want parts of like length, longer than a process takes to start.
PARTS = 5


@pytest.mark.parametrize("part", range(PARTS))
def test_everything_marked_interpreted(part):
    marked = "pytest.mark." + "interpreted"
    files = [file.name for file in sorted(HERE.glob("test_*.py")) if marked in file.read_text()]
    # One core each: in the other process of `make test` the other tests run.
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "RESNET_KERNELS_TESTS_PART": f"{part}/{PARTS}",
    }
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    result = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    report = f"part {part} of {PARTS}\n{result.stdout[-4000:]}{result.stderr[-1000:]}"
    assert result.returncode == 0 and " passed" in result.stdout, report
