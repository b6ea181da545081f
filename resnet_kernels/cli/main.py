"""The command resnet-kernels."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import resnet_kernels as rk

from ..backends import extension, select
from ..backends.contract import Call, Geometry
from ..backends.gpu.sm90 import launchers as hopper_kernels
from ..testing import Errors
from ..testing.images import classifier, photographs

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def info(console: Console, args: argparse.Namespace) -> int:
    table = Table("what", "found", title="resnet_kernels")
    table.add_row(
        "versions", ", ".join(f"{p} {_version(p)}" for p in ("resnet_kernels", "torch", "torchvision", "triton"))
    )
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    table.add_row("torch's CUDA", torch.version.cuda or "none: a CPU-only build, so no CUDA extension either")
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    table.add_row("GPUs", ", ".join(gpus) or "none that torch sees")
    table.add_row("CPU", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    module, reason = extension.load()
    if module is None:
        table.add_row("extension", f"none: {reason}")
    else:
        built = module.build_info()
        cuda = (
            f"CUDA {built['cuda'] // 1000}.{built['cuda'] % 1000 // 10} for {built['archs']}"
            if built["cuda"]
            else "no CUDA"
        )
        table.add_row("extension", f"built for torch {built['torch']}, C++, {cuda}")
    hopper = hopper_kernels.load()[1]
    table.add_row("kernels for Hopper", f"none: {hopper}" if hopper else "built for sm_90a")
    table.add_row("named backend", select.named() or "none: automatic choice")
    console.print(table)
    table = Table("call", "backend", "why not", title="A bottleneck in inference: candidates in order of preference")
    for device in ("cpu", "cuda"):
        for name, dtype in DTYPES.items():
            call = Call(torch.device(device), dtype, frozenset({"conv", "residual"}), (((64, 64, 1, 1), Geometry()),))
            for backend, why in select.reasons(call).items():
                no_gpu = device == "cuda" and not gpus
                table.add_row(f"{device} {name}", backend, why or ("no GPU here" if no_gpu else "[green]can run it"))
    console.print(table)
    return 0


def verify(console: Console, args: argparse.Namespace) -> int:
    from .verify import verify as run

    with console.status("photographs and weights"):
        images = photographs(max(8, args.batch), args.size)
        model = classifier(args.model, args.weights, images[:8])
    dtype = DTYPES[args.dtype]
    device = torch.device(args.device)
    with console.status(f"{args.model} in {args.dtype} on {device}, against fp64"):
        results = run(model.to(device, dtype), images[: args.batch].to(device, dtype))
    table = Table(
        "",
        "rms",
        "eager's",
        "allowed",
        "max",
        "eager's",
        "allowed",
        "",
        title=f"{args.model}, {args.dtype}, {device}: errors against fp64; allowed is twice eager's and a floor",
    )

    def row(name: str, e: Errors) -> None:
        figures = (e.rms, e.eager_rms, e.allowed_rms, e.max, e.eager_max, e.allowed_max)
        verdict = "[green]ok" if e.ok else "[red]NaN or Inf differ" if e.misplaced else "[red]WRONG"
        table.add_row(name, *(f"{f:.1e}" for f in figures), verdict)

    for name, errors in results.items():
        row(name, errors)
    console.print(table)
    wrong = [name for name, e in results.items() if not e.ok]
    console.print(
        f"{len(results) - len(wrong)} of {len(results)} within the rule"
        + (f"; wrong: {', '.join(wrong)}" if wrong else "")
    )
    return 1 if wrong else 0


def explain(console: Console, args: argparse.Namespace) -> int:
    images = torch.zeros(args.batch, 3, args.size, args.size, dtype=DTYPES[args.dtype], device=args.device)
    model = classifier(args.model, args.weights, None).to(args.device, DTYPES[args.dtype])
    rk.replace_blocks(model)
    console.print(str(rk.explain(model, images)), markup=False, highlight=False)
    return 0


def tune(console: Console, args: argparse.Namespace) -> int:
    images = torch.randn(args.batch, 3, args.size, args.size).to(args.device, DTYPES[args.dtype])
    model = classifier(args.model, args.weights, None).to(args.device, DTYPES[args.dtype])
    budget = float("inf") if args.budget is None else args.budget
    report = rk.tune(model, images, budget=budget, path=args.table, again=args.again, console=console)
    console.print(str(report), markup=False, highlight=False)
    return 0 if all(m.seconds for m in report.measured) else 1


def kernels(console: Console, args: argparse.Namespace) -> int:
    from ..analysis.launch_tables import table

    # Only its sizes matter: no memory is taken for weights.
    with torch.device("meta"):
        model = classifier(args.model, None, None).to(DTYPES[args.dtype])
        images = torch.empty(args.batch, 3, args.size, args.size, dtype=DTYPES[args.dtype])
    print(f"### {args.model}, {args.dtype}, batch {args.batch}, {args.size} x {args.size}, sm_{args.arch}\n")
    for line in table(model, images, args.arch):
        print(line)
    return 0


def demo(console: Console, args: argparse.Namespace) -> int:
    from .demo import demo as run

    return 0 if run(args.model, args.weights, args.out, args.batch, console) else 1


def coverage(console: Console, args: argparse.Namespace) -> int:
    from .coverage import coverage as run

    return run(console, args.results, args.readme)


def report(console: Console, args: argparse.Namespace) -> int:
    from ..analysis.report import readme, report

    if args.readme is None and not args.check:
        return report(console, args.results, args.out, args.png, args.fail_on_regression)
    if args.readme is None or args.results:
        raise ValueError("expected --readme FILE, with or without --check, and no results files beside it")
    return readme(console, args.readme, args.check)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("resnet-kernels", description="Fused residual blocks for PyTorch.")
    top.add_argument("--version", action="version", version=f"resnet_kernels {rk.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Callable[[Console, argparse.Namespace], int], text: str, *options: str) -> None:
        p = commands.add_parser(function.__name__, help=text, description=text)
        p.set_defaults(run=function)
        p.add_argument("--backend", help="name the backend (default: automatic)")
        if "model" in options:
            p.add_argument("--model", default="resnet50", help="a torchvision residual network (default: resnet50)")
            p.add_argument("--weights", type=Path, help="a torchvision checkpoint (default: calibrated random weights)")
            p.add_argument("--batch", type=_positive, default=16 if function is demo else 2)
        if "input" in options:
            p.add_argument("--dtype", choices=DTYPES, default="fp32")
            p.add_argument("--size", type=_positive, default=224, help="height and width of the images")
            p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        if function is tune:
            p.add_argument("--budget", type=float, help="seconds after which no further choice is begun")
            p.add_argument("--table", type=Path, help="file of the table (default: one in the user's cache folder)")
            p.add_argument("--again", action="store_true", help="measure also what the table holds already")
        if function is kernels:
            p.add_argument("--model", default="resnet50", help="a torchvision residual network (default: resnet50)")
            p.add_argument("--batch", type=_positive, default=256)
            p.add_argument("--dtype", choices=DTYPES, default="bf16")
            p.add_argument("--size", type=_positive, default=224, help="height and width of the images")
            p.add_argument("--arch", type=int, choices=ARCHITECTURES, default=90, help="90 is sm_90")
        if function is demo:
            p.add_argument("--out", type=Path, default=Path("demo"), help="folder of the chart (default: demo)")
        if function is coverage:
            p.add_argument("--results", type=Path, help="folder of results files (default: benchmarks/results)")
            p.add_argument("--readme", type=Path, help="instead of printing: put the table between its markers")
        if function is report:
            p.add_argument("results", type=Path, nargs="*", help="a results file, or two: the baseline and the new one")
            p.add_argument("--out", type=Path, default=Path("report"), help="folder of the report (default: report)")
            p.add_argument("--png", action="store_true", help="write each plot as a PNG beside it too")
            p.add_argument(
                "--fail-on-regression",
                action="store_true",
                help="of two files: exit code 1 if a row of ours is slower, or right no more",
            )
            p.add_argument("--readme", type=Path, help="instead: make the tables between its markers anew")
            p.add_argument("--check", action="store_true", help="of a README: change nothing, exit code 1 if it would")

    command(info, "versions, GPU, what was built for which architectures, which backends run and why the others do not")
    command(demo, "a photograph through torchvision's model, the replaced and the frozen one", "model")
    command(
        verify,
        "every block and the logits, replaced and frozen, against fp64; exit code 1 if one is wrong",
        "model",
        "input",
    )
    command(
        tune,
        "measure which backend and kernel configuration runs each block right and fastest here, and keep it in a "
        "table; exit code 1 if nothing ran right",
        "model",
        "input",
    )
    command(kernels, "what the Triton backend launches, compiled and read for a GPU that need not be here, as Markdown")
    command(explain, "which backend runs each block, and why each other candidate does not", "model", "input")
    command(coverage, "what is replaced in torchvision's and timm's models, and whether it runs fused, as Markdown")
    command(report, "a results file as Markdown and HTML with plots, two compared, or the README's tables")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        with rk.use_backend(args.backend) if args.backend else contextlib.nullcontext():
            return args.run(console, args)
    except (ValueError, TypeError, RuntimeError, ModuleNotFoundError) as error:
        Console(stderr=True).print(f"resnet-kernels: {error}", style="red", markup=False, highlight=False)
        return 2
