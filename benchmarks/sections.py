"""The sections that measure. Each runs in a process of its own, so that a kernel that crashes ends only that process.

    python -m benchmarks.sections NAME --device cuda --events FILE --budget SECONDS

`gpu_suite` starts these processes. If one crashes or hangs, `gpu_suite` starts it again, and it continues after the row
that was to blame.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

import resnet_kernels as rk
from resnet_kernels.analysis.roofline import launches_of, training_launches_of
from resnet_kernels.analysis.timing import Clock, sample
from resnet_kernels.backends import tables

from . import accuracy, cases, layers
from .cases import DTYPES, Case
from .events import Log
from .measure import measure
from .providers import providers_of


@dataclasses.dataclass(frozen=True)
class Options:
    """The user's choices. None: the default for the device. full: measure every case instead of the most important."""

    models: list[str] | None = None
    dtypes: list[str] | None = None
    batches: list[int] | None = None
    providers: list[str] | None = None
    rounds: int | None = None
    full: bool = False


@dataclasses.dataclass
class Context:
    """The arguments of every section."""

    device: torch.device
    log: Log
    options: Options

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def rounds(self, gpu: int, cpu: int) -> int:
        """Return the user's number of rounds, or the default for the device."""
        return self.options.rounds or (gpu if self.gpu else cpu)


# Facts


PACKAGES = ("torch", "torchvision", "triton", "nvidia-cudnn-frontend", "timm", "openvino", "onnxruntime", "numpy")


def static_facts(device: str, commit: str | None = None) -> dict[str, Any]:
    """Return the facts of the machine and the installation that need no measurement.

    commit: the commit of this code. None: as `git describe` reports it; "unknown" without git.
    """
    if commit is None:
        describe = ["git", "-C", str(Path(__file__).parent.parent), "describe", "--always", "--dirty", "--exclude", "*"]
        with contextlib.suppress(OSError):
            commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    versions = {name: tables.version(name) for name in PACKAGES}
    facts = {
        "device": device,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "versions": {"resnet_kernels": rk.__version__, **{n: v for n, v in versions.items() if v != "none"}},
        "threads": torch.get_num_threads(),
    }
    if device == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return facts | {"processor": tables.processor(), "capability": capability}
    return facts | {"processor": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}


def _smi(**fields: str) -> dict[str, str]:
    """Return nvidia-smi's values by our names, {our name: nvidia-smi's field}; empty if nvidia-smi does not run."""
    try:
        command = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader"]
        line = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return {}
    return dict(zip(fields, (v.strip() for v in line.split(",")), strict=False))


def _best_seconds(call: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Return the 20th percentile of the call's time."""
    clock = Clock(device, queued=True)
    call()
    return sample([clock.seconds(call) for _ in range(rounds)]).p20


def copy_rate(device: torch.device) -> float:
    """Return the bytes/s that a large copy reads and writes."""
    source = torch.empty(1 << (30 if device.type == "cuda" else 27), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / _best_seconds(lambda: target.copy_(source), device, 10)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations/s of a large matrix product or a 3x3 convolution, whichever is faster, on normal
    numbers."""
    n, images = (8192, 256) if device.type == "cuda" else (1536, 4)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    x = torch.randn(images, 256, 28, 28, device=device).to(dtype, memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    work: dict[float, Callable[[], Tensor]] = {
        2 * n**3: lambda: a @ b,
        2 * images * 28 * 28 * 9 * 256**2: lambda: torch.nn.functional.conv2d(x, w, padding=1),
    }
    return max(flops / _best_seconds(run, device, 10) for flops, run in work.items())


def fp8_rate(device: torch.device) -> float:
    """Return the operations/s of a large matrix product of e4m3 numbers. Raises RuntimeError if the GPU has none."""
    n = 8192
    a, b = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)

    def product() -> Tensor:
        return torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16)

    return 2 * n**3 / _best_seconds(product, device, 10)


def facts(c: Context) -> None:
    """Record the machine and measure its ceilings. The GPU's clocks are left as they are."""
    if c.gpu:
        p = torch.cuda.get_device_properties(c.device)
        found = {
            "capability": f"sm_{p.major}{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_size": p.total_memory,
            "l2": p.L2_cache_size,
            **_smi(
                driver="driver_version", clock_before="clocks.sm", most_clock="clocks.max.sm", power_limit="power.limit"
            ),
        }
        c.log.add("facts", found)
    with torch.no_grad():
        c.log.add("facts", {"memory": copy_rate(c.device)})
        matrix = {}
        for name, dtype in DTYPES.items():
            # On a CPU without 16-bit instructions they are emulated, and a product would take minutes.
            if c.gpu or name == "fp32" or torch.ops.mkldnn._is_mkldnn_bf16_supported() and name == "bf16":
                matrix[name] = matrix_rate(c.device, dtype)
        if c.gpu:
            try:
                matrix["fp8"] = fp8_rate(c.device)
            except RuntimeError as error:
                c.log.add("details", {"fp8": str(error).splitlines()[0]})
        c.log.add("facts", {"matrix": matrix})
    if c.gpu:
        c.log.add("facts", _smi(clock_after="clocks.sm", memory_clock_after="clocks.mem"))


# Compilation ahead


def _launches_ahead(c: Context, arch: int, tuning: bool) -> list[Any]:
    """Return the launches of later sections, and with `tuning` those that the tuner will try; Launch objects."""
    from resnet_kernels.tuning import CANDIDATES
    from resnet_kernels.tuning.launches import candidates_of, problems_of

    found, candidates = [], []
    todo = list(_models(c, "inference"))
    for case in todo:
        with torch.device("meta"):
            model = torchvision.models.get_model(case.name).eval().to(DTYPES[case.dtype])
            images = torch.empty(case.batch, 3, case.size, case.size, dtype=DTYPES[case.dtype])
        launches = launches_of(model, images, arch)
        found += launches
        # The first model's only: the tuner will hardly reach the others.
        if tuning and case.name == todo[0].name:
            problems = {problem.key: problem for problem in problems_of(launches)}
            candidates = [m for p in problems.values() for m in candidates_of(p, c.device, CANDIDATES).made.values()]
    for case in cases.blocks(todo[0].dtype, 256, c.options.full):
        with torch.device("meta"):
            x = torch.empty(case.batch, case.channels, case.size, case.size, dtype=DTYPES[case.dtype])
            found += launches_of(case.make().to(x.dtype), x.to(memory_format=torch.channels_last), arch)
    for case in _models(c, "training"):
        model = torchvision.models.get_model(case.name).to("meta", DTYPES[case.dtype])
        images = torch.empty(case.batch, 3, case.size, case.size, dtype=DTYPES[case.dtype], device="meta")
        launches = training_launches_of(model, images.to(memory_format=torch.channels_last), arch)
        found += [m for m in launches if m.kernel is not None]  # None: computed by torch's library
    return found + candidates


def ahead(c: Context, tuning: bool = False) -> None:
    """Compile the Triton kernels of later sections on all cores, into Triton's cache.

    tuning: also compile the kernels that the tuner will try.
    """
    from resnet_kernels.backends.gpu.ahead import compile_all
    from resnet_kernels.backends.gpu.launch import CudaLaunch, arch_of
    from resnet_kernels.backends.gpu.offline import specialize

    os.nice(10)  # the sections that run at the same time have priority
    arch = arch_of(c.device)
    by_triton = [m for m in _launches_ahead(c, arch, tuning) if not isinstance(m, CudaLaunch)]
    distinct = list({str(specialize(m, arch)[0]): m for m in by_triton}.values())
    begun = time.monotonic()
    compiled = compile_all(distinct, arch, max(1, (os.cpu_count() or 2) - 2))
    bad = [f"{m.what}: {r}" for m, r in zip(distinct, compiled, strict=True) if isinstance(r, str)]
    c.log.add("details", {"launches": len(distinct), "failed": bad, "seconds": round(time.monotonic() - begun, 1)})


# Tuning


def tuning(c: Context) -> None:
    """Run rk.tune on the models of the section "inference". Later sections read the tables that it writes."""
    todo = list(_models(c, "inference"))
    report = {}
    for i, case in enumerate(todo):
        if c.log.left() <= 0:
            report[str(case)] = "not begun"
            continue
        model = case.make().eval().to(c.device, DTYPES[case.dtype])
        x = torch.randn(case.batch, 3, case.size, case.size, device=c.device).to(DTYPES[case.dtype])
        # Each model gets half of the time left, because the first ones matter most; the last one gets all of it.
        budget = c.log.left() if i == len(todo) - 1 else c.log.left() / 2
        row = dataclasses.replace(case.row("tune", "ok"), section="tuning")
        found = rk.tune(
            model,
            x.contiguous(memory_format=torch.channels_last),
            budget=budget,
            before=lambda what, row=row: c.log.begin(dataclasses.replace(row, part=what)),
        )
        c.log.begin(None)
        report[str(case)] = [*map(str, found.measured), f"{found.kept} known before, {found.left} left"]
        c.log.add("details", dict(report))


# Measurements


def _chosen(c: Context, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the user's models, dtypes and batches, or the defaults where the user chose none."""
    return {name: getattr(c.options, name) or default for name, default in defaults.items()}


def _models(c: Context, section: str) -> Iterable[Case]:
    """Yield the models of a section, the most important first, because a cut loses the last ones."""
    if c.gpu and section == "inference":
        defaults = {"models": ["resnet50"], "dtypes": ["bf16"], "batches": [256, 32, 1]}
        first = cases.networks(section, **_chosen(c, defaults))
        rest = ["resnet18", "resnet101", "resnext50_32x4d"]
        more = cases.networks(section, rest, c.options.dtypes or ["bf16"], c.options.batches or [256, 32, 1])
        return [*first, *([] if c.options.models else more)]
    if c.gpu:
        defaults = {"models": ["resnet50", "resnet18"], "dtypes": ["bf16"], "batches": [128]}
    elif section == "inference":
        defaults = {"models": ["resnet50", "resnet18"], "dtypes": ["fp32"], "batches": [8]}
    else:
        defaults = {"models": ["resnet18", "resnet50"], "dtypes": ["fp32"], "batches": [8]}
    return cases.networks(section, **_chosen(c, defaults))


def _measure(c: Context, todo: Iterable[Case], rounds: int, seconds: float, first: float = 0.5) -> None:
    """Measure the cases in their order, the most important first.

    seconds: the most seconds of timing per case. first: the share of the remaining time that a case may take; the last
    one may take all of it.
    """
    waiting = list(todo)
    while waiting:
        case, *waiting = waiting
        budget = c.log.left() * (first if waiting else 1)
        if budget < 1:
            row = case.row("all", "cut", reason="the budget ended before it was begun")
            c.log.row(row)
            continue
        providers = providers_of(case.section, c.device.type, c.options.providers)
        measure(case, c.device, providers, c.log, rounds, seconds, budget)


def _dtypes_and_batches(c: Context) -> Iterator[tuple[str, int]]:
    """Yield the dtypes and batches of convolutions and blocks."""
    chosen = _chosen(c, {"dtypes": ["bf16"] if c.gpu else ["fp32"], "batches": [256 if c.gpu else 4]})
    return itertools.product(chosen["dtypes"], chosen["batches"])


def primitives(c: Context) -> None:
    for dtype, batch in _dtypes_and_batches(c):
        _measure(c, cases.primitives(dtype, batch, c.gpu or c.options.full), c.rounds(30, 8), 3.0)


def blocks(c: Context) -> None:
    for dtype, batch in _dtypes_and_batches(c):
        _measure(c, cases.blocks(dtype, batch, c.options.full), c.rounds(30, 8), 4.0 if c.gpu else 8.0)


def layers_of(c: Context) -> None:
    for case in list(_models(c, "inference"))[:2]:
        if c.log.left() > 0:
            layers.measure(case, c.device, c.log, c.rounds(20, 3))


def inference(c: Context) -> None:
    # On a GPU the first case, ResNet-50 at batch 256, gets more time, because max-autotune compiles for a minute.
    _measure(c, _models(c, "inference"), c.rounds(25, 6), 6.0 if c.gpu else 90.0, 0.7 if c.gpu else 0.5)


def training(c: Context) -> None:
    _measure(c, _models(c, "training"), c.rounds(15, 4), 10.0 if c.gpu else 120.0)


def accuracy_of(c: Context) -> None:
    chosen = _chosen(c, {"dtypes": ["fp32", "bf16"], "batches": [4]})
    for batch in chosen["batches"]:
        for case in accuracy.cases(batch):
            for dtype in chosen["dtypes"]:
                for data in accuracy.DATA:
                    accuracy.measure(case, dtype, data, c.device, c.log, c.rounds(5, 5))


# The sections by name. "ahead" and "ahead of tuning" compile beside other sections.
RUN: dict[str, Callable[[Context], None]] = {
    "facts": facts,
    "ahead": ahead,
    "ahead of tuning": functools.partial(ahead, tuning=True),
    "tuning": tuning,
    "primitives": primitives,
    "blocks": blocks,
    "layers": layers_of,
    "inference": inference,
    "training": training,
    "accuracy": accuracy_of,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=RUN)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--events", type=Path, required=True, help="file to append events to (benchmarks/events.py)")
    parser.add_argument("--budget", type=float, required=True, help="seconds")
    parser.add_argument("--options", default="{}", help="the fields of Options, as JSON")
    parser.add_argument("--plugin", help="a module to import first; it may add to benchmarks.providers.PROVIDERS")
    args = parser.parse_args()
    if args.plugin:
        importlib.import_module(args.plugin)
    log = Log(args.events, args.budget)
    RUN[args.section](Context(torch.device(args.device), log, Options(**json.loads(args.options))))


if __name__ == "__main__":
    main()
