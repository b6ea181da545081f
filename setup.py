"""Builds the extension resnet_kernels._C and, for Hopper GPUs, the library resnet_kernels._sm90; what is built is
chosen by RESNET_KERNELS_BUILD.

auto  CUDA and C++ when nvcc and a CUDA build of torch are both there, else C++ only (the default)
cuda  CUDA and C++; an error when nvcc or a CUDA build of torch is missing
cpu   C++ only
none  pure Python

_sm90 is built with CUDA for 9.0a where CUTLASS's headers are found: in the package nvidia-cutlass, or under
$CUTLASS_HOME/include.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import setup

# One binary per major version runs on all its minors; sm_90a is what wgmma needs; PTX carries later GPUs.
DEFAULT_ARCHS = "8.0;9.0a;10.0;12.0+PTX"


def find_cuda_home() -> str | None:
    """CUDA_HOME, else where nvcc says it lives: what is on the PATH may be a link or a wrapper of it."""
    home, nvcc = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    if home or not nvcc:
        return home
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    top = [line.partition("TOP=")[2] for line in dry_run.stderr.splitlines() if "TOP=" in line]
    return os.path.realpath(top[0]) if top else None


def find_cutlass() -> Path | None:
    """The folder of CUTLASS's headers."""
    if os.environ.get("CUTLASS_HOME"):
        found = Path(os.environ["CUTLASS_HOME"], "include")
        if not (found / "cute/arch/mma_sm90_gmma.hpp").is_file():
            raise SystemExit(f"CUTLASS_HOME: expected CUTLASS 3 or newer, with headers in {found}")
        return found
    package = importlib.util.find_spec("cutlass_library")
    if package is None or package.origin is None:
        return None
    return Path(package.origin).parent / "source/include"


def hopper(flags: list[str], archs: str) -> list:
    """resnet_kernels._sm90: kernels for sm_90a alone, behind a C interface, so without torch and without Python."""
    if "9.0a" not in archs:
        return []
    cutlass = find_cutlass()
    if cutlass is None:
        hint = "pip install --no-deps nvidia-cutlass==4.2.0.0, or set CUTLASS_HOME"
        print(f"CUTLASS's headers are missing: the kernels for Hopper are left out ({hint})", file=sys.stderr)
        return []
    from torch.utils.cpp_extension import CUDAExtension

    extension = CUDAExtension(
        "resnet_kernels._sm90",
        sorted(glob("csrc/cuda/sm90/*.cu")),
        include_dirs=[str(Path("csrc").resolve()), str(cutlass)],
        extra_compile_args={"cxx": [], "nvcc": [*flags, "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a"]},
    )
    extension.libraries = ["cudart"]
    return [extension]


def extensions() -> list:
    build = os.environ.get("RESNET_KERNELS_BUILD", "auto")
    if build not in ("auto", "cuda", "cpu", "none"):
        raise SystemExit(f"RESNET_KERNELS_BUILD: expected auto, cuda, cpu or none, got {build!r}")
    if build == "none":
        return []
    cuda_home = find_cuda_home()
    if cuda_home:
        os.environ["CUDA_HOME"] = cuda_home  # before torch's builder looks for it
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise SystemExit("Python.h is missing: install Python's headers, or set RESNET_KERNELS_BUILD=none")
    missing = None if cuda_home else "nvcc was not found"
    missing = missing or (None if torch.version.cuda else f"torch {torch.__version__} is a CPU-only build")
    if build == "cuda" and missing:
        raise SystemExit(f"RESNET_KERNELS_BUILD=cuda: {missing}")
    with_cuda = build == "cuda" or (build == "auto" and not missing)

    debug = os.environ.get("RESNET_KERNELS_DEBUG") == "1"
    flags = {"cxx": ["-O0" if debug else "-O3", "-g" if debug else "-g0", "-fopenmp"]}
    sources = ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
    if not with_cuda:
        return [
            CppExtension(
                "resnet_kernels._C",
                sources,
                include_dirs=[str(Path("csrc").resolve())],
                extra_compile_args=flags,
                extra_link_args=["-fopenmp"],
            )
        ]
    archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)
    flags["cxx"] += ["-DRESNET_KERNELS_CUDA", f'-DRESNET_KERNELS_ARCHS="{archs}"']
    flags["nvcc"] = ["-O3", "-lineinfo", *(["-G", "-g"] if debug else ["-DNDEBUG"])]
    return [
        CUDAExtension(
            "resnet_kernels._C",
            sources + sorted(glob("csrc/cuda/*.cu")),
            include_dirs=[str(Path("csrc").resolve())],
            extra_compile_args=flags,
            extra_link_args=["-fopenmp"],
        ),
        *hopper(flags["nvcc"], archs),
    ]


def command_classes() -> dict:
    if os.environ.get("RESNET_KERNELS_BUILD") == "none":
        return {}
    from torch.utils.cpp_extension import BuildExtension

    return {"build_ext": BuildExtension}


setup(ext_modules=extensions(), cmdclass=command_classes())
