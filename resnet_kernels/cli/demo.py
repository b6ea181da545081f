"""`resnet-kernels demo`: photographs through torchvision's model, the replaced model and the frozen model."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torchvision.models import ResNet50_Weights

from ..inference import freeze
from ..replace import replace_blocks
from ..testing.images import classifier, photographs

ROUNDS = 5


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _best_of_torchvision(rates: dict[str, float]) -> float:
    return max(rate for how, rate in rates.items() if how.startswith("torchvision"))


def _chart(path: Path, title: str, rates: dict[str, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    bars = axes.barh(list(rates), list(rates.values()), color=["#9aa5b1", "#9aa5b1", "#3b7dd8", "#1f4e9c"])
    best = _best_of_torchvision(rates)
    axes.bar_label(bars, [f"{rate:.1f}  ({rate / best:.2f}x)" for rate in rates.values()], padding=4)
    axes.set(
        xlabel="images per second (and relative to torchvision's faster layout)",
        title=title,
        xlim=(0, 1.3 * max(rates.values())),
    )
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


@torch.no_grad()
def demo(name: str, weights: Path | None, out: Path, batch: int, console: Console) -> bool:
    """Print the tables and write the chart.

    Args:
        name: one of `testing.images.residual_networks()`.
        weights: a checkpoint, or None for random weights with calibrated batch norms.
        out: folder of the chart.
        batch: number of images to time with.
    Returns:
        Whether the replaced and the frozen model agree with torchvision's on the top 5 of both photographs.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("photographs and weights", total=4 + 4 * ROUNDS)
        images = photographs(max(batch, 8), 224)
        model = classifier(name, weights, images[:8]).to(device)
        images = images[:batch].to(device)
        progress.update(task, advance=1, description="replacing and freezing")
        nhwc = copy.deepcopy(model).to(memory_format=torch.channels_last)
        replaced = copy.deepcopy(model)
        report = replace_blocks(replaced, channels_last=True)
        frozen = freeze(model)
        runs = {"torchvision": model, "torchvision, channels_last": nhwc, "replaced": replaced, "frozen": frozen}
        progress.update(task, advance=1, description="fp64 reference")
        exact = copy.deepcopy(model).double()(images[:2].double())
        progress.update(task, advance=1, description="warming up")
        logits = {how: m(images)[:2] for how, m in runs.items()}
        progress.update(task, advance=1)
        times: dict[str, list[float]] = {how: [] for how in runs}
        for _ in range(ROUNDS):
            for how, m in runs.items():
                progress.update(task, advance=1, description=f"timing {how}")
                times[how].append(_seconds(functools.partial(m, images), device))

    console.print(str(report))
    agree = _print_agreement(logits, weights is None, console)
    rates = {how: batch / statistics.median(t) for how, t in times.items()}
    errors = {how: (y.double() - exact).abs().max().item() for how, y in logits.items()}
    heading = f"{name}, batch {batch}, fp32, {device}"
    _print_speed(f"{heading}, {torch.get_num_threads()} threads, median of {ROUNDS}", rates, errors, console)
    path = out / f"{name}.png"
    _chart(path, heading, rates)
    console.print(f"Chart: {path}")
    return agree


def _print_agreement(logits: dict[str, Tensor], random_weights: bool, console: Console) -> bool:
    """Print the classes of both photographs. Returns whether all models agree on the top 5."""
    if random_weights:
        console.print(
            "Weights: random, with batch norms calibrated on the photographs. The classes below are therefore "
            "arbitrary (--weights FILE loads a trained checkpoint); the agreement and the speed are real."
        )
    top = {how: y[:2].topk(5).indices.tolist() for how, y in logits.items()}
    categories = ResNet50_Weights.DEFAULT.meta["categories"]
    agree = all(t == top["torchvision"] for t in top.values())
    table = Table(title="Top 5 of the two photographs by torchvision's model")
    for heading in ("photograph", "top 5"):
        table.add_column(heading)
    for photo, classes in zip(("temple", "flower"), top["torchvision"], strict=False):
        table.add_row(photo, ", ".join(categories[c] if c < len(categories) else str(c) for c in classes))
    console.print(table)
    console.print(
        "Replaced and frozen agree with torchvision's model: the same classes in the same order."
        if agree
        else "Replaced and frozen DISAGREE with torchvision's model on these classes or their order."
    )
    return agree


def _print_speed(title: str, rates: dict[str, float], errors: dict[str, float], console: Console) -> None:
    table = Table(title=title)
    for heading in ("", "images/s", "vs. torchvision's faster layout", "largest logit error vs. fp64"):
        table.add_column(heading, justify="left" if not heading else "right")
    for how, rate in rates.items():
        table.add_row(how, f"{rate:.1f}", f"{rate / _best_of_torchvision(rates):.2f}x", f"{errors[how]:.1e}")
    console.print(table)
