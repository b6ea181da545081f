"""Trains a small ResNet on scikit-learn's digits twice, by PyTorch and by fused blocks, and plots both losses.

    python examples/train_digits.py --steps 100 --out digits.png

Both networks start from the same weights and take the same batches, in turn, so that their losses and times can be
compared. Needs `pip install scikit-learn pillow matplotlib` (in a clone: `pip install -e '.[demo]'`).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torchvision.models import resnet

import resnet_kernels as rk

SIZE = 32
# Steps that do not count for the time: the first ones map memory and choose engines.
WARM_UP = 3


@dataclasses.dataclass
class Run:
    """A model in training, with the loss and time of each step and the accuracy on the test images."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    accuracy: float = 0.0

    @classmethod
    def of(cls, model: nn.Module, steps: int, lr: float) -> Run:
        """lr: the highest learning rate of the schedule."""
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)
        return cls(model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps))

    @property
    def step_time(self) -> float:
        """The median seconds of a step."""
        return statistics.median(self.seconds[WARM_UP:] or self.seconds)

    def step(self, images: Tensor, labels: Tensor, autocast: torch.autocast) -> None:
        self.model.train()
        start = time.perf_counter()
        with autocast:
            loss = nn.functional.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        # Reading the loss waits for the device, so the time is that of the whole step.
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def test(self, images: Tensor, labels: Tensor, autocast: torch.autocast) -> None:
        self.model.eval()
        with autocast:
            predicted = torch.cat([self.model(x).argmax(1) for x in images.split(256)])
        self.accuracy = (predicted == labels).double().mean().item()


def digits(device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (training images (N, 3, 32, 32), training labels (N,), test images, test labels).

    N is the number of images. A fifth of all images is for the test.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits are part of scikit-learn: pip install scikit-learn pillow matplotlib"
        ) from error
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    images = nn.functional.interpolate((images - 0.3) / 0.37, (SIZE, SIZE), mode="bilinear").expand(-1, 3, -1, -1)
    images = images.contiguous(memory_format=torch.channels_last)
    order = torch.randperm(len(images), generator=generator)
    images, labels = images[order].to(device), torch.from_numpy(data.target)[order].to(device)
    count = len(images) // 5
    return images[count:], labels[count:], images[:count], labels[:count]


def network() -> resnet.ResNet:
    """Return a ResNet of two bottlenecks: the first two stages, which suffice for the digits."""
    model = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=10)
    model.layer3, model.layer4 = nn.Identity(), nn.Identity()
    model.fc = nn.Linear(128 * resnet.Bottleneck.expansion, 10)
    return model


def compared(eager: Run, fused: Run) -> str:
    """Return the sentence that compares the times of a step."""
    ratio = fused.step_time / eager.step_time
    if 0.97 < ratio < 1.03:
        return f"resnet_kernels is as fast as PyTorch here: its step takes {ratio:.2f} times as long."
    verdict = "slower" if ratio > 1 else "faster"
    return f"resnet_kernels is {verdict} than PyTorch here: its step takes {ratio:.2f} times as long."


def draw(path: Path, runs: dict[str, Run], title: str) -> None:
    """Write a plot of both losses as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for (name, run), color, width in zip(runs.items(), ("#9aa5b1", "#1f4e9c"), (4, 1.5), strict=True):
        label = f"{name}: {run.accuracy:.2%} of the test images, {1e3 * run.step_time:.1f} ms per step"
        axes.plot(range(1, len(run.losses) + 1), run.losses, label=label, color=color, linewidth=width)
    axes.set(xlabel="step", ylabel="loss of the batch", title=title, yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)


def train(args: argparse.Namespace, console: Console) -> None:
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(args.seed)
    images, labels, test_images, test_labels = digits(device, generator)
    torch.manual_seed(args.seed)
    model = network().to(device, memory_format=torch.channels_last)
    ours = copy.deepcopy(model)
    report = rk.replace_blocks(ours)
    console.print(str(report), highlight=False)
    runs = {"PyTorch": Run.of(model, args.steps, args.lr), "resnet_kernels": Run.of(ours, args.steps, args.lr)}
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=args.steps)
        for step in range(args.steps):
            batch = torch.randint(len(images), (args.batch,), generator=generator).to(device)
            # The order alternates, because a step leaves the caches warm for the one after it.
            for run in list(runs.values())[:: 1 if step % 2 else -1]:
                run.step(images[batch], labels[batch], autocast)
            losses = ", ".join(f"{name} {run.losses[-1]:.3f}" for name, run in runs.items())
            progress.update(task, advance=1, description=f"loss: {losses}")

    title = f"{args.steps} steps of {args.batch} images"
    table = Table("", "last loss", "test accuracy", "ms per step (median)", title=title)
    for name, run in runs.items():
        run.test(test_images, test_labels, autocast)
        table.add_row(name, f"{run.losses[-1]:.4f}", f"{run.accuracy:.2%}", f"{1e3 * run.step_time:.1f}")
    console.print(table)
    console.print(compared(*runs.values()), highlight=False)
    draw(args.out, runs, f"ResNet of 2 bottlenecks on handwritten digits, {args.dtype}, {device}")
    console.print(f"Plot: {args.out}", highlight=False, soft_wrap=True)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=100, help="default: 100")
    parser.add_argument("--batch", type=positive, default=64, help="images per step (default: 64)")
    parser.add_argument("--lr", type=float, default=0.05, help="highest learning rate of the schedule (default: 0.05)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 uses autocast (default: fp32)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="file of the plot (default: digits.png)")
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        train(parser.parse_args(), console)
    except (ValueError, RuntimeError, ModuleNotFoundError) as error:
        text = f"train_digits.py: {error}"
        Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
