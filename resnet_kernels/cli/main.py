"""The command resnet-kernels: its arguments, and a function per subcommand."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import resnet_kernels as rk

from ..testing import Errors
from ..testing.images import classifier, photographs
from .info import DTYPES

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def info(console: Console, args: argparse.Namespace) -> int:
    from .info import info as run

    run(console)
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
        title=f"{args.model}, {args.dtype}, {device}: errors against fp64; allowed: twice eager's plus a floor",
    )

    def row(name: str, e: Errors) -> None:
        figures = (e.rms, e.eager_rms, e.allowed_rms, e.max, e.eager_max, e.allowed_max)
        verdict = "[green]ok" if e.ok else "[red]NaN or Inf misplaced" if e.misplaced else "[red]WRONG"
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

    # Only sizes matter here: on the meta device weights take no memory.
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
        raise ValueError("report: expected --readme FILE, optionally with --check, and no results files beside it")
    return readme(console, args.readme, args.check)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number of seconds that is not negative, got {text!r}")
    return value


def _add_common_options(p: argparse.ArgumentParser, function: Callable, options: Sequence[str]) -> None:
    p.add_argument("--backend", help="run everything on this backend (default: automatic choice)")
    if "model" in options:
        p.add_argument("--model", default="resnet50", help="a torchvision residual network (default: resnet50)")
        p.add_argument("--weights", type=Path, help="a torchvision checkpoint (default: calibrated random weights)")
        p.add_argument("--batch", type=_positive, default=16 if function is demo else 2)
    if "input" in options:
        p.add_argument("--dtype", choices=DTYPES, default="fp32")
        p.add_argument("--size", type=_positive, default=224, help="height and width of the images")
        p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    if function is tune:
        p.add_argument("--budget", type=_seconds, help="seconds after which no further measurement begins")
        p.add_argument("--table", type=Path, help="file of the table (default: a file in the user's cache folder)")
        p.add_argument("--again", action="store_true", help="measure again what the table already holds")


def _add_own_options(p: argparse.ArgumentParser, function: Callable) -> None:
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
        p.add_argument("--readme", type=Path, help="write the table into this file, between its markers")
    if function is report:
        p.add_argument("results", type=Path, nargs="*", help="a results file, or two: the baseline and the new one")
        p.add_argument("--out", type=Path, default=Path("report"), help="folder of the report (default: report)")
        p.add_argument("--png", action="store_true", help="also write each plot as a PNG")
        p.add_argument(
            "--fail-on-regression",
            action="store_true",
            help="for two files: exit code 1 if a row of ours is slower, or no longer right",
        )
        p.add_argument("--readme", type=Path, help="rewrite the tables between the markers of this file")
        p.add_argument(
            "--check",
            action="store_true",
            help="with --readme: change nothing; exit code 1 if that would",
        )


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("resnet-kernels", description="Fused residual blocks for PyTorch.")
    top.add_argument("--version", action="version", version=f"resnet_kernels {rk.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Callable[[Console, argparse.Namespace], int], text: str, *options: str) -> None:
        p = commands.add_parser(function.__name__, help=text, description=text)
        p.set_defaults(run=function)
        _add_common_options(p, function, options)
        _add_own_options(p, function)

    command(info, "the machine, versions, what was built, and which backend runs here in inference and training")
    command(
        demo,
        "photographs through torchvision's model, the replaced and the frozen model: agreement and speed",
        "model",
    )
    command(
        verify,
        "compare every block and the logits, replaced and frozen, with fp64; exit code 1 if a result is wrong",
        "model",
        "input",
    )
    command(
        tune,
        "measure which backend and kernel configuration runs each block right and fastest here, and save the choices "
        "in a table; exit code 1 if no candidate of a block ran right",
        "model",
        "input",
    )
    command(kernels, "the Triton kernels of a model, compiled for a GPU that need not be present, as Markdown")
    command(explain, "which backend runs each block, and why the other candidates do not", "model", "input")
    command(coverage, "which blocks of torchvision's and timm's models are replaced, and which run fused, as Markdown")
    command(report, "a results file as Markdown and HTML with plots, a comparison of two, or the tables of a document")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        with rk.use_backend(args.backend) if args.backend else contextlib.nullcontext():
            return args.run(console, args)
    except (ValueError, TypeError, RuntimeError, ModuleNotFoundError, OSError) as error:
        Console(stderr=True).print(f"resnet-kernels: {error}", style="red", markup=False, highlight=False)
        return 2
