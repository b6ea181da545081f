"""Builds the CUDA kernels for the CPU, so that tests run them without a GPU.

The kernels' sources are compiled by the host's C++ compiler. Headers of tests/emulation replace those that hold PTX and
launches; a kernel's blocks run one after another, the threads of a block as fibers.
"""

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
# Libraries are kept from run to run, named by a digest of their flags and sources.
BUILT = ROOT / "build" / "emulation"
FLAGS = [
    *("-std=c++20", "-O2", "-fPIC", "-w", "-Wno-psabi", "-fno-strict-aliasing", f"-I{HERE / 'emulation'}"),
    # The GPU library, which may be loaded too, has functions of the same names: do not share their static variables.
    "-fno-gnu-unique",
    # CUDA headers from packages include <nv/target>, which only the toolkit has.
    f"-idirafter{HERE / 'emulation/host'}",
]


def cuda_headers() -> list[Path] | None:
    """Return CUDA's include folders, from the toolkit or from packages of torch and Triton; None if there are none."""
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
    # -Bsymbolic: calls of the CUDA runtime bind to the emulated functions, whatever else is loaded.
    scratch = made.with_suffix(f".{os.getpid()}")
    subprocess.run([compiler, "-shared", "-Wl,-Bsymbolic", "-o", scratch, *objects], check=True)
    scratch.replace(made)
    for file in objects:
        file.unlink()


@functools.cache
def library(sources: Sequence[Path]) -> ctypes.CDLL:
    """Build the sources, a tuple of files, into one library and load it.

    Skips the test if there is no C++ compiler or no CUDA headers.
    """
    compiler, headers = shutil.which("c++") or shutil.which("g++"), cuda_headers()
    if compiler is None or headers is None:
        pytest.skip("emulating the kernels needs a C++ compiler and CUDA's headers; one of them is missing")
    digest = hashlib.sha256(repr((FLAGS, headers)).encode())
    folders = dict.fromkeys([HERE / "emulation", HERE / "emulation/cuda", *(source.parent for source in sources)])
    for file in (file for folder in folders for file in sorted(folder.glob("*.*"))):
        digest.update(file.read_bytes())
    made = BUILT / f"{digest.hexdigest()[:16]}.so"
    BUILT.mkdir(parents=True, exist_ok=True)
    # Of several test processes one builds the library while the others wait.
    with filelock.FileLock(made.with_suffix(".lock")):
        if not made.is_file():
            build(sources, made, compiler, [*FLAGS, *(f"-I{folder}" for folder in (ROOT / "csrc", *headers))])
    return ctypes.CDLL(str(made))


def cuda() -> ctypes.CDLL:
    """Return the emulated library of the backend `cuda`."""
    return library(tuple(sorted((ROOT / "csrc/cuda").glob("*.cu"))))


def sm90() -> ctypes.CDLL:
    """Return the emulated library of the sm_90a kernels."""
    folders = (ROOT / "csrc/cuda/sm90", HERE / "emulation/cuda/sm90")
    return library(tuple(file for folder in folders for file in sorted([*folder.glob("*.cu"), *folder.glob("*.cpp")])))
