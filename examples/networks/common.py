"""Code shared by the example networks: scikit-learn's digits and their key points, the training loop, the plot.

In shapes, N is the number of pictures and K the number of key points.
"""

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

INK = 0.5  # a pixel with a greater value belongs to a stroke
POINTS = ("centre of mass", "top", "bottom", "left", "right")


def digits(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return (training pictures, test pictures), each (N, 1, size, size) with values from 0 to 1.

    A fifth of all pictures is for the test. A digit takes two thirds of a picture's height and width, at a random
    place.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits are part of scikit-learn: pip install scikit-learn pillow matplotlib"
        ) from error
    pictures = torch.from_numpy(load_digits().images).float()[:, None] / 16
    pictures = F.interpolate(F.pad(pictures, (2, 2, 2, 2)), (size, size), mode="bilinear")
    pictures = pictures[torch.randperm(len(pictures), generator=generator)]
    # Pixels that roll moves from one side to the other belong to the margin, which is as wide as the greatest shift.
    shifts = torch.randint(-(size // 6), size // 6 + 1, (len(pictures), 2), generator=generator).tolist()
    pictures = torch.stack([p.roll(shift, (1, 2)) for p, shift in zip(pictures, shifts, strict=True)])
    return pictures[len(pictures) // 5 :], pictures[: len(pictures) // 5]


def noisy(pictures: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Return the pictures with normally distributed noise of this standard deviation."""
    noise = torch.randn(pictures.shape, generator=generator)
    return (pictures + deviation * noise).contiguous(memory_format=torch.channels_last)


def key_points(pictures: Tensor) -> Tensor:
    """Return (N, 5, 2): x and y, in pixels, of the `POINTS` of each digit.

    "top" is the middle of the ink in the first row with ink, "left" that in the first column with ink, and so on.
    """
    ink = (pictures[:, 0] > INK).float()
    place = torch.arange(ink.shape[-1], dtype=torch.float32)

    def middle(mass: Tensor) -> Tensor:
        return (mass * place).sum(-1) / mass.sum(-1).clamp_min(1)

    def end(along: int, last: bool) -> Tensor:
        """Return the middle of the ink in the first (or last) row with ink if along = 2; column if along = 1."""
        with_ink = ink.amax(along)
        line = with_ink.flip(-1).argmax(-1) if last else with_ink.argmax(-1)
        line = ink.shape[-1] - 1 - line if last else line
        across = middle((ink if along == 2 else ink.mT)[torch.arange(len(ink)), line])
        return torch.stack([across, line.float()] if along == 2 else [line.float(), across], -1)

    centre = torch.stack([middle(ink.sum(1)), middle(ink.sum(2))], -1)
    return torch.stack([centre, end(2, False), end(2, True), end(1, False), end(1, True)], 1)


def heat_maps(points: Tensor, size: int, stride: int, sigma: float = 1.5) -> Tensor:
    """Return heat maps (N, K, size, size): a Gaussian of height 1 around each point.

    Args:
        points: (N, K, 2), x and y in pixels of the picture, whose height and width are `size * stride`.
        sigma: standard deviation of the Gaussian in pixels of the heat map.
    """
    place = torch.arange(size, dtype=torch.float32) * stride + (stride - 1) / 2
    x, y = (points[..., i, None] - place for i in range(2))
    return torch.exp(-(x.square()[..., None, :] + y.square()[..., :, None]) / (2 * (sigma * stride) ** 2))


def located(heat: Tensor, stride: int) -> Tensor:
    """Return (N, K, 2): x and y of each heat map's maximum, in pixels of the picture."""
    at, W = heat.flatten(2).argmax(2), heat.shape[3]
    return torch.stack([at % W, at // W], -1).float() * stride + (stride - 1) / 2


def found(predicted: Tensor, points: Tensor, pixels: float) -> float:
    """Return the share of the points that are predicted within so many pixels."""
    return ((predicted - points).norm(dim=-1) <= pixels).double().mean().item()


def train(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    count: int,
    args: argparse.Namespace,
    generator: torch.Generator,
    console: Console,
) -> list[float]:
    """Train for args.steps steps with AdamW and return the loss of each step.

    Args:
        loss_of: returns the loss for pictures, given by their indices below `count`.
    """
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
def predicted(model: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
    """Return the model's results for all pictures, 64 at a time. The model must be in evaluation mode."""
    return torch.cat([model(x) for x in pictures.split(64)])


class KeyPoints:
    """The task of hourglass.py and simple_baseline.py: find the `POINTS` of a noisy digit by heat maps.

    Args:
        args: the script's options.
        size: height and width of the pictures.
        stride: a heat map is `stride` times smaller.
        noise: standard deviation of the noise in the pictures.
    """

    def __init__(self, args: argparse.Namespace, size: int, stride: int, noise: float) -> None:
        self.generator = torch.Generator().manual_seed(args.seed)
        torch.manual_seed(args.seed)
        self.size, self.stride, self.noise = size, stride, noise
        self.pictures, self.tests = digits(size, self.generator)
        self.targets = heat_maps(key_points(self.pictures), size // stride, stride)

    def noisy(self, pictures: Tensor) -> Tensor:
        """Return the pictures with noise."""
        return noisy(pictures, self.noise, self.generator)

    def report(
        self, model: Callable[[Tensor], Tensor], losses: list[float], title: str, path: Path, console: Console
    ) -> None:
        """Print the share of points found in the test pictures, and draw some of them. model: returns heat maps."""
        x, points = self.noisy(self.tests), key_points(self.tests)
        heat = predicted(model, x)
        located_points = located(heat, self.stride)
        share = found(located_points, points, self.size / 16)
        result = f"{share:.1%} of the points of {len(x)} unseen digits found within {self.size // 16} pixels"
        console.print(result, highlight=False)
        rows = {"digit": x[:8, 0], "heat maps, summed": heat[:8].sum(1)}
        marks = {"true": points[:8], "found": located_points[:8]}
        draw(path, rows, losses, f"{title}: {result}", marks)


def draw(path: Path, rows: dict[str, Tensor], losses: list[float], title: str, marks: dict[str, Tensor]) -> None:
    """Write a plot of the losses beside rows of pictures as PNG.

    Args:
        rows: pictures (n, H, W) by the row's name; n columns, H and W height and width.
        marks: up to two sets of points (n, K, 2), by name, to draw on the pictures of the first row.
    """
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
        legend = ", ".join(f"{marker}: {name}" for marker, name in zip("ox", marks, strict=False))
        figure.text(0.99, 0.01, legend, fontsize=8, ha="right")
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
    """Run a script's command and return its exit code.

    Args:
        name: of the script and its plot.
        doc: the script's description.
        steps, lr: defaults of its options.
        function: trains, and writes the plot to args.out.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=steps, help=f"default: {steps}")
    parser.add_argument("--batch", type=positive, default=32, help="pictures per step (default: 32)")
    parser.add_argument("--lr", type=float, default=lr, help=f"highest learning rate of the schedule (default: {lr})")
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
