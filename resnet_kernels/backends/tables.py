"""Tables of measured choices: for each device, the backend that ran a call right and fastest, and the kernel and
configuration of each launch.

`rk.tune` makes tables (tuning/). There is one JSON file per device and versions. Shipped ones are in
resnet_kernels/tuning, the user's in a cache folder; the user's win. A table holds for its `identity` only. This module
measures nothing: without a table the heuristics decide. RESNET_KERNELS_TUNING=off ignores all tables.
"""

from __future__ import annotations

import ast
import contextlib
import contextvars
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import tokenize
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .contract import Call

SCHEMA = 1
SHIPPED = Path(__file__).parent.parent / "tuning"
_GPU = Path(__file__).parent / "gpu"


class Table(NamedTuple):
    """The choices measured on one device.

    calls: `key` of a call -> its row, {"call", "fastest", "seconds": {backend: median}}. launches: key of a launch ->
    its row, {"launch", "kernel", "config" or None, ...}; only the backend that wrote the row reads its other fields.
    """

    calls: dict[str, dict[str, Any]]
    launches: dict[str, dict[str, Any]]


def key(call: Call) -> str:
    """Return the key of a call: equal for calls that one measurement serves."""
    weights = " ".join(f"{'x'.join(map(str, shape))}{tuple(geometry)}" for shape, geometry in call.weights)
    size = "x".join(map(str, call.size))
    return f"{str(call.dtype).removeprefix('torch.')} {'+'.join(sorted(call.needs))} {size}: {weights}"


def version(package: str) -> str:
    """Return the version of an installed package, or "none"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def processor() -> str:
    """Return the CPU's name, as the system reports it."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


# The modules of the kernels that tables are about: those of inference.
_TUNED = ("inference/boxes", "inference/conv_pool", "device", "inference/gather", "inference/pooling", "inference/tail")


# How wide an indentation is, and how a line ends, does not count: these tokens stand for themselves.
_LAYOUT = {token: tokenize.tok_name[token] for token in (tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE)}


def _jitted_tokens(source: str) -> Iterator[str]:
    """The tokens of a module's jitted functions without comments, docstrings, blank lines and whitespace."""
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
            kept = range(node.decorator_list[0].lineno, (node.end_lineno or 0) + 1)
            docstring = node.body[0] if ast.get_docstring(node) is not None else None
            dropped = range(docstring.lineno, (docstring.end_lineno or 0) + 1) if docstring else ()
            text = "".join(lines[i - 1] for i in kept if i not in dropped)
            for token in tokenize.generate_tokens(io.StringIO(text).readline):
                if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
                    yield _LAYOUT.get(token.type, token.string)


@functools.cache
def kernels_digest() -> str:
    """Return a digest of the Triton kernels' tokens: a GPU has proved this code, and no later one.

    Comments, docstrings and whitespace do not count. Python 3.10 to 3.13 compute the same digest: f-strings alone are
    other tokens from 3.12 on, and no jitted function has one.
    """
    digest = hashlib.sha256()
    for path in (_GPU / f"{name}.py" for name in _TUNED):
        for token in _jitted_tokens(path.read_text(encoding="utf-8")):
            digest.update(token.encode() + b"\n")
    return digest.hexdigest()[:16]


@functools.cache
def _identity(device: torch.device, threads: int) -> dict[str, str]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name, capability = torch.cuda.get_device_name(device), f"sm_{major}{minor}"
    else:
        name, capability = processor(), f"{torch.backends.cpu.get_cpu_capability()}, {threads} threads"
    versions = {"torch": torch.__version__, "triton": version("triton"), "resnet_kernels": version("resnet_kernels")}
    return {"device": name, "capability": capability, **versions, "kernels": kernels_digest()}


def identity(device: torch.device) -> dict[str, str]:
    """Return the identity of a table made on the device now."""
    return _identity(device, torch.get_num_threads() if device.type == "cpu" else 0)


def cache_folder() -> Path:
    """The user's tables: RESNET_KERNELS_CACHE, else the system's place for caches.

    Raises ModuleNotFoundError where neither is known.
    """
    named = os.environ.get("RESNET_KERNELS_CACHE")
    if named:
        return Path(named)
    try:
        import platformdirs
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("tables need platformdirs, or RESNET_KERNELS_CACHE set to a folder") from error
    return Path(platformdirs.user_cache_dir("resnet_kernels")) / "tuning"


def file_of(holds_for: Mapping[str, str]) -> str:
    """Return the file name of the table with this identity."""
    slug = re.sub(r"[^a-z0-9]+", "-", holds_for["device"].lower()).strip("-")
    return f"{slug}-{hashlib.sha256(json.dumps(dict(holds_for), sort_keys=True).encode()).hexdigest()[:8]}.json"


def read(path: Path) -> tuple[dict[str, str], Table]:
    """Return (identity, table) of a file. Raises ValueError if the file is no table."""
    try:
        content = json.loads(path.read_text())
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r}")
        calls = {row["call"]: row for row in content["calls"] if isinstance(row["fastest"], str)}
        launches = {row["launch"]: row for row in content["launches"] if isinstance(row["kernel"], str)}
        return {str(k): str(v) for k, v in content["identity"].items()}, Table(calls, launches)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a table of measured choices of schema {SCHEMA}: {error!r}") from error


def _tables(folders: tuple[Path, ...], holds_for: Mapping[str, str]) -> Iterator[Table]:
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            try:
                found, table = read(path)
            except ValueError as error:
                warnings.warn(f"{error}; ignored", stacklevel=2)
                continue
            if found == dict(holds_for):
                yield table


@functools.cache
def _table(device: torch.device, threads: int, folders: tuple[Path, ...]) -> Table:
    merged = Table({}, {})
    for table in _tables(folders, _identity(device, threads)):
        merged.calls.update(table.calls)
        merged.launches.update(table.launches)
    return merged


# Folders beside the shipped one and the user's, for the current thread or task.
_more_folders: contextvars.ContextVar[tuple[Path, ...]] = contextvars.ContextVar("more_folders", default=())


@contextlib.contextmanager
def also(folder: Path) -> Iterator[None]:
    """Inside, the tables of this folder count too, and win over all others."""
    token = _more_folders.set((*_more_folders.get(), folder))
    try:
        yield
    finally:
        _more_folders.reset(token)


@functools.cache
def _folders(shipped: Path, named: str | None) -> tuple[Path, ...]:
    try:
        return shipped, cache_folder()
    except ModuleNotFoundError:
        return (shipped,)


def forget() -> None:
    """Forget the tables in memory: the next call reads the files again."""
    _table.cache_clear()
    _folders.cache_clear()


def table(device: torch.device) -> Table:
    """Return the choices measured on the device with these versions; empty if there are none."""
    known = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())
    setting = os.environ.get("RESNET_KERNELS_TUNING", "")
    if setting not in ("", "off"):
        raise ValueError(f"RESNET_KERNELS_TUNING: expected off, or unset, got {setting!r}")
    if not known or setting == "off":
        return Table({}, {})
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return _table(device, threads, _folders(SHIPPED, os.environ.get("RESNET_KERNELS_CACHE")) + _more_folders.get())


def fastest(call: Call) -> str | None:
    """Return the name of the backend that a table calls fastest for the call, or None."""
    calls = table(call.device).calls
    # This runs at every call: without a table not even the key is computed.
    row = calls.get(key(call)) if calls else None
    return row["fastest"] if row else None
