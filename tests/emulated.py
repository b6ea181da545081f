"""CUDA kernels without a GPU: their sources, compiled by the host's compiler with tests/emulation in place of what only
nvcc knows, run on the CPU, a block after the other."""

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent
# Kept from run to run; a file's name tells what it was made of.
BUILT = ROOT / "build" / "emulation"
FLAGS = [
    *("-std=c++20", "-O2", "-fPIC", "-w", "-Wno-psabi", "-fno-strict-aliasing", f"-I{HERE / 'emulation'}"),
    # The library for GPUs, where it is loaded too, has functions of the same names: no static of theirs is shared.
    "-fno-gnu-unique",
    # Packages' headers ask for one that only the toolkit has.
    f"-idirafter{HERE / 'emulation/host'}",
]


def cuda_headers() -> list[Path] | None:
    """Of the toolkit, or of the packages that torch and Triton bring along."""
    nvcc = shutil.which("nvcc")
    if nvcc:
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
        tops = [line.partition("TOP=")[2] for line in dry.stderr.splitlines() if "TOP=" in line]
        if tops and (Path(tops[0]) / "include/cuda_bf16.h").is_file():
            return [Path(tops[0]) / "include"]
    found = []
    for package, folder in (("nvidia", "cu13/include"), ("triton", "backends/nvidia/include")):
        spec = importlib.util.find_spec(package)
        found += [Path(where) / folder for where in (spec.submodule_search_locations if spec else ())]
    there = [f for f in found if f.is_dir()]
    return there if any((f / "cuda_bf16.h").is_file() for f in there) else None


def build(sources: Sequence[Path], made: Path, compiler: str, flags: Sequence[str]) -> None:
    objects = [BUILT / f"{made.stem}-{i}.o" for i in range(len(sources))]

    def compile(source: Path, to: Path) -> None:
        command = [compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(to)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        list(pool.map(compile, sources, objects))
    # What is emulated of CUDA's runtime is ours, whatever else is loaded.
    scratch = made.with_suffix(f".{os.getpid()}")
    subprocess.run([compiler, "-shared", "-Wl,-Bsymbolic", "-o", scratch, *objects], check=True)
    scratch.replace(made)
    for file in objects:
        file.unlink()


@functools.cache
def library(sources: Sequence[Path]) -> ctypes.CDLL:
    """The sources, a tuple of files, as one library. Skips the test where there is no compiler, or no CUDA headers."""
    compiler, headers = shutil.which("c++") or shutil.which("g++"), cuda_headers()
    if compiler is None or headers is None:
        pytest.skip("kernels are emulated with a C++ compiler and CUDA's headers; one of them is not here")
    digest = hashlib.sha256(repr((FLAGS, headers)).encode())
    folders = dict.fromkeys([HERE / "emulation", HERE / "emulation/cuda", *(source.parent for source in sources)])
    for file in (file for folder in folders for file in sorted(folder.glob("*.*"))):
        digest.update(file.read_bytes())
    made = BUILT / f"{digest.hexdigest()[:16]}.so"
    BUILT.mkdir(parents=True, exist_ok=True)
    # Of processes side by side one builds it, and the others wait.
    with filelock.FileLock(made.with_suffix(".lock")):
        if not made.is_file():
            build(sources, made, compiler, [*FLAGS, *(f"-I{folder}" for folder in (ROOT / "csrc", *headers))])
    return ctypes.CDLL(str(made))


def cuda() -> ctypes.CDLL:
    """The kernels of the backend `cuda`."""
    return library(tuple(sorted((ROOT / "csrc/cuda").glob("*.cu"))))


def sm90() -> ctypes.CDLL:
    """The kernels for Hopper."""
    folders = (ROOT / "csrc/cuda/sm90", HERE / "emulation/cuda/sm90")
    return library(tuple(file for folder in folders for file in sorted([*folder.glob("*.cu"), *folder.glob("*.cpp")])))
