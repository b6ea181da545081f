"""What the example networks share: scikit-learn's digits with key points, the loop that trains, the plot."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

INK = 0.5  # from where on a picture's value is a stroke
POINTS = ("centre of mass", "top", "bottom", "left", "right")


def digits(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (N, 1, size, size) of 0 to 1, to train with, and a fifth of all to test with; the digits, of two thirds
    of their size, stand anywhere."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the digits are scikit-learn's: pip install 'resnet_kernels[demo]'") from error
    pictures = torch.from_numpy(load_digits().images).float()[:, None] / 16
    pictures = F.interpolate(F.pad(pictures, (2, 2, 2, 2)), (size, size), mode="bilinear")
    pictures = pictures[torch.randperm(len(pictures), generator=generator)]
    # What goes out at one side and comes in at the other is margin.
    shifts = torch.randint(-(size // 6), size // 6 + 1, (len(pictures), 2), generator=generator).tolist()
    pictures = torch.stack([p.roll(shift, (1, 2)) for p, shift in zip(pictures, shifts, strict=True)])
    return pictures[len(pictures) // 5 :], pictures[: len(pictures) // 5]


def noisy(pictures: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(pictures.shape, generator=generator)
    return (pictures + deviation * noise).contiguous(memory_format=torch.channels_last)


def key_points(pictures: Tensor) -> Tensor:
    """(N, 5, 2): x and y, in pixels, of `POINTS` of each digit's strokes; an end is the middle of its row or column."""
    ink = (pictures[:, 0] > INK).float()
    place = torch.arange(ink.shape[-1], dtype=torch.float32)

    def middle(mass: Tensor) -> Tensor:
        return (mass * place).sum(-1) / mass.sum(-1).clamp_min(1)

    def end(along: int, last: bool) -> Tensor:
        """Of the first or last row (along 2) or column (along 1) with ink: its place, and the middle of its ink."""
        with_ink = ink.amax(along)
        line = with_ink.flip(-1).argmax(-1) if last else with_ink.argmax(-1)
        line = ink.shape[-1] - 1 - line if last else line
        across = middle((ink if along == 2 else ink.mT)[torch.arange(len(ink)), line])
        return torch.stack([across, line.float()] if along == 2 else [line.float(), across], -1)

    centre = torch.stack([middle(ink.sum(1)), middle(ink.sum(2))], -1)
    return torch.stack([centre, end(2, False), end(2, True), end(1, False), end(1, True)], 1)


def heat_maps(points: Tensor, size: int, stride: int, sigma: float = 1.5) -> Tensor:
    """(N, K, size, size): 1 at each point of (N, K, 2), in pixels of a picture `stride` times as large, and a Gaussian
    around it."""
    place = torch.arange(size, dtype=torch.float32) * stride + (stride - 1) / 2
    x, y = (points[..., i, None] - place for i in range(2))
    return torch.exp(-(x.square()[..., None, :] + y.square()[..., :, None]) / (2 * (sigma * stride) ** 2))


def located(heat: Tensor, stride: int) -> Tensor:
    """(N, K, 2): x and y, in pixels, of each heat map's maximum."""
    at, W = heat.flatten(2).argmax(2), heat.shape[3]
    return torch.stack([at % W, at // W], -1).float() * stride + (stride - 1) / 2


def found(predicted: Tensor, points: Tensor, pixels: float) -> float:
    """The share of the points that are predicted at most so far off."""
    return ((predicted - points).norm(dim=-1) <= pixels).double().mean().item()


def train(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    count: int,
    args: argparse.Namespace,
    generator: torch.Generator,
    console: Console,
) -> list[float]:
    """Losses of args.steps steps of Adam; loss_of: of the pictures by their numbers, out of `count`."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
    losses: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=args.steps)
        for _ in range(args.steps):
            loss = loss_of(torch.randint(count, (args.batch,), generator=generator))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.update(task, advance=1, description=f"loss {losses[-1]:.4f}")
    return losses


@torch.no_grad()
def predicted(model: nn.Module, pictures: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(x) for x in pictures.split(64)])


def draw(path: Path, rows: dict[str, Tensor], losses: list[float], title: str, marks: dict[str, Tensor]) -> None:
    """The losses beside rows of pictures (n, H, W); marks: points (n, K, 2) on the pictures of the first row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count = len(next(iter(rows.values())))
    figure = plt.figure(figsize=(3.6 + 1.15 * count, max(1.25 * len(rows), 2.6) + 0.4), layout="constrained")
    curve, pictures = figure.subfigures(1, 2, width_ratios=(3.4, 1.15 * count))
    axes = curve.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color="#1f4e9c", linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss of the batch", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    grid = pictures.subplots(len(rows), count, squeeze=False)
    for line, (name, row) in zip(grid, rows.items(), strict=True):
        for cell, picture in zip(line, row, strict=True):
            cell.imshow(picture.numpy(), cmap="gray_r")
            cell.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=8)
    colors = plt.get_cmap("tab10").colors[: len(POINTS)]
    for (name, points), (marker, size) in zip(marks.items(), (("o", 40), ("x", 25)), strict=False):
        for cell, own in zip(grid[0], points.numpy(), strict=True):
            edge = {"edgecolors": colors, "facecolors": "none"} if marker == "o" else {"color": colors}
            cell.scatter(own[:, 0], own[:, 1], size, marker=marker, linewidths=1.3, label=name, **edge)
    if marks:
        told = ", ".join(f"{marker}: {name}" for marker, name in zip("ox", marks, strict=False))
        figure.text(0.99, 0.01, told, fontsize=8, ha="right")
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return int(text)


def run(
    name: str, doc: str | None, steps: int, lr: float, function: Callable[[argparse.Namespace, Console], None]
) -> int:
    """The script's exit code; steps and lr: its defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=steps, help=f"default: {steps}")
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--lr", type=float, default=lr, help=f"the highest of the schedule (default: {lr})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(f"{name}.png"), help=f"file of the plot (default: {name}.png)")
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        args = parser.parse_args()
        if args.out.is_dir():
            raise ValueError(f"out: expected a file, got {args.out}, which is a folder")
        function(args, console)
    except (ValueError, RuntimeError, ModuleNotFoundError) as error:
        text = f"{name}.py: {error}"
        Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    console.print(f"Plot: {args.out}", highlight=False, soft_wrap=True)
    return 0
