"""Build the extension resnet_kernels._C and, for Hopper GPUs, the library resnet_kernels._sm90.

RESNET_KERNELS_BUILD chooses what is built:

auto  CUDA and C++ if nvcc is found and torch is a CUDA build, else C++ only (the default)
cuda  CUDA and C++; an error if nvcc is missing or torch is a CPU-only build
cpu   C++ only
none  nothing is compiled: pure Python

_sm90 is built with CUDA for 9.0a if CUTLASS's headers are found: in the package nvidia-cutlass, or under
$CUTLASS_HOME/include.

The build prints one line per extension, and the compilers' output only if one fails; V=1 prints every command.
"""

import contextlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from glob import glob
from pathlib import Path

from setuptools import setup

# One binary per major version runs on all its minors; wgmma needs sm_90a; PTX carries later GPUs.
DEFAULT_ARCHS = "8.0;9.0a;10.0;12.0+PTX"
VERBOSE = os.environ.get("V") == "1"

NO_TORCH = (
    "resnet_kernels: this build finds no torch, and the extension must be compiled against the torch that will import "
    "it. pip's isolated builds never see the installed torch: install torch, torchvision, ninja and 'setuptools>=77', "
    "then run: pip install --no-build-isolation . (or, to compile nothing: RESNET_KERNELS_BUILD=none pip install .)"
)


def find_cuda_home() -> str | None:
    """Return CUDA_HOME, else the folder that nvcc reports: the nvcc on the PATH may be a link or a wrapper."""
    home, nvcc = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    if home or not nvcc:
        return home
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    top = [line.partition("TOP=")[2] for line in dry_run.stderr.splitlines() if "TOP=" in line]
    return os.path.realpath(top[0]) if top else None


def find_cutlass() -> Path | None:
    """Return the folder of CUTLASS's headers, or None."""
    if os.environ.get("CUTLASS_HOME"):
        found = Path(os.environ["CUTLASS_HOME"], "include")
        if not (found / "cute/arch/mma_sm90_gmma.hpp").is_file():
            raise SystemExit(f"CUTLASS_HOME: expected CUTLASS 3 or newer, got no such headers in {found}")
        return found
    package = importlib.util.find_spec("cutlass_library")
    if package is None or package.origin is None:
        return None
    return Path(package.origin).parent / "source/include"


def hopper(flags: list[str], archs: str) -> list:
    """Return the extension resnet_kernels._sm90: kernels for sm_90a behind a C interface, without torch and Python."""
    if "9.0a" not in archs:
        return []
    cutlass = find_cutlass()
    if cutlass is None:
        hint = "pip install nvidia-cutlass==4.2.0.0, or set CUTLASS_HOME"
        print(f"CUTLASS's headers are missing, so the kernels for Hopper are not built ({hint})", file=sys.stderr)
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
    """Return the extensions to build. Raises SystemExit if what RESNET_KERNELS_BUILD asks for cannot be built here."""
    build = os.environ.get("RESNET_KERNELS_BUILD", "auto")
    if build not in ("auto", "cuda", "cpu", "none"):
        raise SystemExit(f"RESNET_KERNELS_BUILD: expected auto, cuda, cpu or none, got {build!r}")
    if build == "none":
        return []
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(NO_TORCH)
    cuda_home = find_cuda_home()
    if cuda_home:
        os.environ["CUDA_HOME"] = cuda_home  # torch's builder reads it when it is imported
    if not VERBOSE:
        # It warns that no GPU is visible, which a build does not need.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
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
    # pybind11's classes have hidden visibility, and so must what contains them. CUDA's C interface stays visible.
    flags = {"cxx": ["-O0" if debug else "-O3", "-g" if debug else "-g0", "-fopenmp", "-fvisibility=hidden"]}
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


@contextlib.contextmanager
def redirected(log: Path) -> Iterator[None]:
    """Send all output of this process and its children to the file."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, saved in zip((1, 2), before, strict=True):
                os.dup2(saved, descriptor)
                os.close(saved)


def described(name: str, sources: list[str]) -> str:
    """Return the line that announces the build of an extension."""
    if name.endswith("_sm90"):
        return "building CUDA kernels for Hopper (sm_90a)"
    cuda = any(source.endswith(".cu") for source in sources)
    return "building C++ extension" + (f" and CUDA kernels for {os.environ['TORCH_CUDA_ARCH_LIST']}" if cuda else "")


def command_classes() -> dict:
    """Return the build command: torch's, with the compilers' output in a file under build/ unless V=1."""
    if os.environ.get("RESNET_KERNELS_BUILD") == "none":
        return {}
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extension(self, ext):  # type: ignore[no-untyped-def]
            print(f"{described(ext.name, ext.sources)}, {len(ext.sources)} files", flush=True)
            if VERBOSE:
                return super().build_extension(ext)
            log = Path(self.build_temp, f"{ext.name}.log")
            log.parent.mkdir(parents=True, exist_ok=True)
            try:
                with redirected(log):
                    super().build_extension(ext)
            except Exception as error:  # any failure of a compiler: its log is printed, and the build stops
                print(log.read_text(errors="replace"), file=sys.stderr)
                # torch raises the compiler's failure as one chain of exceptions, whose trace says nothing more.
                raise SystemExit(f"{ext.name} was not built: {error}; output above and in {log}") from None

    return {"build_ext": Build}


setup(ext_modules=extensions(), cmdclass=command_classes())
