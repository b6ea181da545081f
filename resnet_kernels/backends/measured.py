"""Measured choices: for each GPU a table that says which backend computed a call right there, and fastest.

A table is a JSON file in resnet_kernels/tuning, named as you like:

    {"gpu": "NVIDIA H200", "triton": "3.6.0", "rows": [{"call": key(call), "fastest": "triton"}, ...]}

It holds for that GPU and that version of Triton, whose compiler made the kernels that were checked.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import warnings
from pathlib import Path

import torch

from .contract import Call

TABLES = Path(__file__).parent.parent / "tuning"


def key(call: Call) -> str:
    """What a measurement of the call holds for."""
    weights = " ".join(f"{'x'.join(map(str, shape))}{tuple(geometry)}" for shape, geometry in call.weights)
    size = "x".join(map(str, call.size))
    return f"{str(call.dtype).removeprefix('torch.')} {'+'.join(sorted(call.needs))} {size}: {weights}"


@functools.cache
def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def _table(gpu: str, folder: Path) -> dict[str, str]:
    """key -> backend. A file that is no table is ignored with a warning."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
            if (content["gpu"], content["triton"]) == (gpu, _triton_version()):
                found |= {row["call"]: row["fastest"] for row in content["rows"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"{path}: expected a table of measured choices, ignored: {error!r}", stacklevel=2)
    return found


def fastest(call: Call) -> str | None:
    """The name of the backend that a table says is fastest for the call, or None."""
    if call.device.type != "cuda" or not torch.cuda.is_available():
        return None
    table = _table(torch.cuda.get_device_name(call.device), TABLES)
    # Every call asks: without a table not even the key is made.
    return table.get(key(call)) if table else None
