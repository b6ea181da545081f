"""The README's Python blocks run, in order, in one namespace."""

import re
from pathlib import Path

import pytest
import torch

from resnet_kernels.analysis.report import readme_tables
from resnet_kernels.analysis.results import load

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore")
def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) >= 2
    namespace = {"images": torch.randn(2, 3, 64, 64)}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["logits"].shape == (2, 1000)


def test_every_environment_variable_is_documented():
    root = README.parent
    files = [root / "setup.py", root / "Makefile", *root.glob("resnet_kernels/**/*.py"), *root.glob("csrc/**/*")]
    used = set()
    for file in files:
        if file.is_file():
            used |= set(re.findall(r"RESNET_KERNELS_(?:BUILD|BACKEND|CACHE|DEBUG|TUNING)\b", file.read_text()))
    assert used == set(re.findall(r"RESNET_KERNELS_(?:BUILD|BACKEND|CACHE|DEBUG|TUNING)\b", README.read_text()))


def test_the_tables_are_what_the_results_say():
    """`make readme` makes them."""
    text = README.read_text()
    assert text.count("<!-- results ") >= 3
    assert readme_tables(text, README.parent) == text


def test_every_committed_results_file_is_one():
    paths = sorted((README.parent / "benchmarks" / "results").glob("*"))
    assert paths and all(load(path).rows for path in paths)
