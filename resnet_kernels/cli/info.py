"""`resnet-kernels info`: the machine, the versions, what was built, and which backend runs here, on one screen."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..backends import extension, select, tables
from ..backends.contract import BackendUnavailable, Call, Geometry
from ..backends.gpu.sm90 import launchers as hopper_kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTH = 100

# Names of the processor's features, by the flags with which /proc/cpuinfo reports them.
FEATURES = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "bf16": ("avx512_bf16", "avx_ne_convert"),
    "AMX": ("amx_tile",),
}
VARIABLES = ("TRITON_INTERPRET", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}
    named = [name for name, any_of in FEATURES.items() if flags.intersection(any_of)]
    features = ", ".join(named) if flags else torch.backends.cpu.get_cpu_capability()
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{tables.processor()}, {cores}; {features or 'no AVX2'}"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return found


def _built() -> dict[str, str]:
    module, reason = extension.load()
    if module is None:
        cpp, cuda = f"no: {reason}", "no: it is part of the C++ extension"
    else:
        b = module.build_info()
        cpp = f"yes, for torch {b['torch']}"
        cuda = f"CUDA {b['cuda'] // 1000}.{b['cuda'] % 1000 // 10} for {b['archs']}" if b["cuda"] else "no"
    hopper = hopper_kernels.load()[1]
    return {"C++ extension": cpp, "CUDA kernels": cuda, "Hopper kernels": f"no: {hopper}" if hopper else "for sm_90a"}


def runs(device: torch.device, dtype: torch.dtype, training: bool) -> tuple[str, str]:
    """Return which backend runs a bottleneck's convolutions in inference or training, and why in one phrase."""
    needs = frozenset({"training"} if training else {"conv", "residual"})
    call = Call(device, dtype, needs, (((64, 64, 1, 1), Geometry()),))
    if select.named() == select.EAGER:
        return select.EAGER, "named"
    try:
        backend = select.choose(call)
    except BackendUnavailable as error:
        if select.named():
            return "none", str(error)
        reasons = select.reasons(call)
        why = next((f"{n}: {r}" for n, r in reasons.items() if not _elsewhere(r)), "no backend trains")
        return "torch modules", why
    if select.named():
        why = "named"
    elif backend.NAME == tables.fastest(call):
        why = "the fastest by a measured table"
    else:
        before = list(select.reasons(call).items())
        before = before[: [name for name, _ in before].index(backend.NAME)]
        why = next((f"{n}: {r}" for n, r in before if not _elsewhere(r)), "the preferred backend of this device")
    computes = backend.compute_dtype(dtype)
    if computes != dtype:
        why += f"; computes in {next(name for name, d in DTYPES.items() if d == computes)}"
    return backend.NAME, why


def _elsewhere(reason: str | None) -> bool:
    """Whether the reason is that the backend belongs to another kind of device."""
    return reason is None or reason.startswith("expected tensors on ")


def _choices(gpus: list[str]) -> Table:
    table = Table("device", "dtype", "inference", "training", "why", box=None, padding=(0, 2, 0, 0))
    for column in table.columns:
        column.no_wrap, column.overflow = True, "ellipsis"
    for kind in ["cpu", *["cuda"] * bool(gpus)]:
        for name, dtype in DTYPES.items():
            inference, why = runs(torch.device(kind), dtype, False)
            training, why_training = runs(torch.device(kind), dtype, True)
            whole = why if why == why_training else f"{why}; training: {why_training}"
            table.add_row(kind, name, inference, training, whole)
    return table


def info(console: Console) -> None:
    """Print at most 24 lines of 100 columns on a machine with one kind of GPU or none."""
    gpus = _gpus()
    versions = ", ".join(f"{p} {_version(p)}" for p in ("resnet_kernels", "torch", "torchvision", "triton"))
    rows = {
        "CPU": _cpu(),
        "GPU": "; ".join(f"{gpus.count(g)} x {g}" for g in dict.fromkeys(gpus)) or "none that torch sees",
        "system": f"Python {platform.python_version()}, {platform.system()}, "
        + (f"torch's CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU-only build"),
        "versions": versions,
        **_built(),
    }
    names = sorted(n for n in os.environ if n.startswith("RESNET_KERNELS_"))
    variables = [f"{n}={os.environ[n]}" for n in (*names, *VARIABLES) if n in os.environ]
    rows["environment"] = ", ".join(variables) or "none of our variables is set"
    rows["backend"] = f"{select.named()}, as named" if select.named() else "chosen automatically"
    facts = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        facts.add_row(name, value)
    width = min(console.width, WIDTH)
    console.print(facts, width=width, markup=False, highlight=False)
    console.print("\nA bottleneck runs on:", highlight=False)
    console.print(_choices(gpus), width=width, markup=False, highlight=False)
    console.print("\nresnet-kernels explain: which backend runs each block of a model, and why.", highlight=False)
