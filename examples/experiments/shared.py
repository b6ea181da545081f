"""Code shared by the experiments: networks, the training loop, checkpoints, results files and the command line."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from data import Images, kind_of, load, on
from plots import Row
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_kernels as rk

# Default options by kind of data. An experiment's own defaults replace them.
# digits: at the paper's learning rate of 0.1, the 110 steps of a run are too few for 56 layers to recover from the
# first steps, with shortcuts or without. Operations on the digits are so short that several threads wait for each other
# longer than they work.
# cifar: as in He et al. 2015, section 4.2; 164 epochs of 390 batches are 64k steps.
# folder: as for ImageNet in section 3.4.
# steps: of an epoch; None: all images. threads: None: torch's choice.
COMMON: Row = {"lr": 0.1, "width": 16, "steps": None, "seeds": 1, "threads": None}
DEFAULTS: dict[str, Row] = {
    "digits": COMMON | {"size": 8, "batch": 128, "epochs": 10, "lr": 0.02, "threads": 1},
    "cifar": COMMON | {"size": 32, "batch": 128, "epochs": 164},
    "folder": COMMON | {"size": 224, "batch": 256, "epochs": 90},
}
# Defaults for a folder of images where the experiment's networks are those for small images.
SMALL_IMAGES: Row = {"size": 32, "batch": 128}
# The shares of the training after which the learning rate is divided by 10.
MILESTONES = {"digits": (0.5, 0.75), "cifar": (0.5, 0.75), "folder": (1 / 3, 2 / 3)}
# He et al. 2015, section 4.2: networks of 110 and more layers train with a tenth of the rate for 400 of 64k steps.
WARM_UP = (110, 400 / 64_000)


# ---- Networks


def network(kind: str, depth: int, args: argparse.Namespace, images: Images) -> nn.Module:
    """Return a network.

    kind: "plain", "residual" (the paper's shortcuts), "A", "B" or "C" (these shortcuts), or "pre-activation".
    depth: layers. 18 and 34 are the networks for ImageNet, all others those for small images.
    """
    if depth in (18, 34):
        if images.channels != 3 or kind == "pre-activation":
            raise ValueError(
                f"depths: {depth} is ImageNet's network, plain or residual, for --data with train/ and val/; got "
                f"{kind} for images of {images.channels} channels"
            )
        if kind == "plain":
            return getattr(rk.models, f"plain{depth}")(images.classes)
        shortcut = "B" if kind == "residual" else kind
        return getattr(rk.models, f"resnet{depth}")(images.classes, shortcut=shortcut)
    options: Row = {"in_channels": images.channels, "width": args.width}
    if kind == "pre-activation":
        bottleneck = None if depth % 6 == 2 else True
        return rk.models.cifar_preactivation(depth, images.classes, bottleneck, **options)
    if kind == "plain":
        return rk.models.cifar_plain(depth, images.classes, **options)
    return rk.models.cifar_resnet(depth, images.classes, shortcut="A" if kind == "residual" else kind, **options)


def backends(model: nn.Module, x: Tensor) -> str:
    """Return a sentence part: how many blocks of a training step run fused, and by which backend."""
    chosen = Counter(e.chosen for e in rk.explain(model.train(), x) if not e.name.endswith("stem"))
    return ", ".join(f"{n} blocks by {name}" for name, n in chosen.items()) or "no fused blocks, only torch's modules"


# ---- Runs


@dataclasses.dataclass(frozen=True)
class Run:
    """A network to train.

    about: the first columns of the run's rows, among them "net", "depth" and "seed".
    make: returns the network.
    measure: (model, images, epoch) -> rows; called with epoch 0 before training, and after the last epoch. Without it
        there is one row per epoch: learning rate, training loss and error in the course of the epoch, and the test
        error after it.
    lr: a constant learning rate, in place of the papers' schedule.
    """

    about: Row
    make: Callable[[], nn.Module]
    measure: Callable[[nn.Module, Images, int], list[Row]] | None = None
    lr: float | None = None

    @property
    def name(self) -> str:
        return ", ".join(f"{k} {v}" if k in ("depth", "seed") else str(v) for k, v in self.about.items())


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment.

    name: of its results files. title: of its plot.
    defaults: default options, by kind of data.
    runs: returns the runs, in order.
    draw: draws the rows into a matplotlib figure.
    verdict: returns sentences that state what the rows show.
    """

    name: str
    title: str
    defaults: dict[str, Row]
    runs: Callable[[argparse.Namespace, Images], Iterable[Run]]
    draw: Callable[[Any, list[Row]], None]
    verdict: Callable[[list[Row]], list[str]]
    figsize: tuple[float, float] = (8.5, 3.8)


def grid(
    args: argparse.Namespace,
    kinds: Iterable[str],
    make: Callable[[str, int], nn.Module],
    measure: Callable[[nn.Module, Images, int], list[Row]] | None = None,
) -> Iterator[Run]:
    """Yield a run for every seed, depth and kind of network. make: returns the network of a kind and a depth."""
    for seed in range(args.seed, args.seed + args.seeds):
        for depth in args.depths:
            for kind in kinds:
                about = {"net": kind, "depth": depth, "seed": seed}
                yield Run(about, functools.partial(make, kind, depth), measure)


def networks_of(
    kinds: Iterable[str], measure: Callable[[nn.Module, Images, int], list[Row]] | None = None
) -> Callable[[argparse.Namespace, Images], Iterator[Run]]:
    """Return the `runs` of an experiment on these kinds of `network`."""

    def runs(args: argparse.Namespace, images: Images) -> Iterator[Run]:
        return grid(args, kinds, lambda kind, depth: network(kind, depth, args, images), measure)

    return runs


def rate(args: argparse.Namespace, depth: int, step: int, steps: int) -> float:
    """Return the learning rate of a step out of `steps` under the papers' schedule."""
    deep, share = WARM_UP
    if depth >= deep and step < share * steps:
        return args.lr / 10
    return args.lr * 0.1 ** sum(step >= at * steps for at in MILESTONES[kind_of(args.data)])


@torch.no_grad()
def test_error(model: nn.Module, images: Images, device: str) -> float:
    """Return the share of the test images that the model classifies wrongly, in evaluation mode."""
    model.eval()
    wrong = total = 0
    for x, y in images.test():
        wrong += (model(on(x, device)).argmax(1) != y.to(device)).sum().item()
        total += len(y)
    return wrong / total


class Training:
    """The training of a run, of which `epoch` epochs are done."""

    def __init__(self, run: Run, args: argparse.Namespace, images: Images) -> None:
        self.run, self.args, self.images = run, args, images
        self.epoch, self.rows = 0, list[Row]()
        torch.manual_seed(run.about["seed"])
        self.model = run.make().to(args.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)

    def state(self) -> Row:
        """Return what a checkpoint stores."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer")}
        return {**parts, "epoch": self.epoch, "rows": self.rows}

    def load(self, state: Row) -> None:
        for name in ("model", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.epoch, self.rows = state["epoch"], state["rows"]

    def _measure(self) -> None:
        if self.run.measure:
            self.rows += [self.run.about | row for row in self.run.measure(self.model, self.images, self.epoch)]

    def epochs(self, advance: Callable[[str], None]) -> Iterator[None]:
        """Train, and yield after every epoch. advance: called with a text after every step."""
        if self.epoch == 0:
            self._measure()
        while self.epoch < self.args.epochs:
            row = self._train(advance)
            self.epoch += 1
            if not self.run.measure:
                error = test_error(self.model, self.images, self.args.device)
                self.rows.append(self.run.about | row | {"test_error": error})
            elif self.epoch == self.args.epochs:
                self._measure()
            yield

    def _train(self, advance: Callable[[str], None]) -> Row:
        """Train for an epoch and return the columns of its row."""
        device, steps, losses, wrong, total = self.args.device, self.images.steps, [], 0, 0
        self.model.train()
        for i, (x, y) in enumerate(self.images.train(self.run.about["seed"], self.epoch)):
            at, depth = (self.epoch * steps + i, self.args.epochs * steps), self.run.about["depth"]
            lr = rate(self.args, depth, *at) if self.run.lr is None else self.run.lr
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            y = y.to(device)
            logits = self.model(on(x, device))
            loss = F.cross_entropy(logits, y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
            wrong += (logits.argmax(1) != y).sum().item()
            total += len(y)
            advance(f"{self.run.name}: loss {losses[-1]:.3f}")
        return {
            "epoch": self.epoch + 1,
            "lr": lr,
            "train_loss": statistics.fmean(losses),
            "train_error": wrong / total,
        }


# ---- Checkpoints and results


class Checkpoint:
    """OUT/NAME.pt: the rows of the finished runs, and the state of the unfinished one."""

    def __init__(self, path: Path, settings: Row) -> None:
        self.path, self.settings = path, settings
        self.done, self.rows, self.running = 0, list[Row](), dict[str, Any]()

    def load(self, device: str) -> bool:
        """Load the file. Returns False if there is none; raises ValueError if it belongs to another experiment."""
        if not self.path.exists():
            return False
        try:
            state = torch.load(self.path, weights_only=True, map_location=device)
            found = state["settings"]
            self.done, self.rows, self.running = state["done"], state["rows"], state["running"]
        except Exception as error:  # unpickling foreign bytes may raise anything
            raise ValueError(
                f"out: expected a checkpoint of this experiment, got {self.path}, which cannot be read "
                f"({type(error).__name__}); remove it to start over"
            ) from error
        for name in sorted(self.settings.keys() | found.keys()):
            if self.settings.get(name) != found.get(name):
                raise ValueError(
                    f"out: {self.path} is of a run with other settings, {name}: expected {self.settings.get(name)}, "
                    f"got {found.get(name)}; choose another --out, or remove the file to start over"
                )
        return True

    def save(self) -> None:
        state = {"settings": self.settings, "done": self.done, "rows": self.rows, "running": self.running}
        # Written beside the checkpoint and then renamed, so that an interrupted write leaves the old checkpoint.
        unfinished = self.path.with_suffix(".part")
        torch.save(state, unfinished)
        os.replace(unfinished, self.path)


def write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_plot(path: Path, experiment: Experiment, rows: list[Row], about: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    quiet = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 9.5}
    with plt.rc_context(quiet):
        figure = plt.figure(figsize=experiment.figsize, layout="constrained")
        experiment.draw(figure, rows)
        figure.suptitle(f"{experiment.title}: {about}", fontsize=10, x=0.01, ha="left")
        figure.savefig(path, dpi=110)
        plt.close(figure)


# ---- The command


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return int(text)


OPTIONS = {
    "width": "channels of the first stage",
    "steps": "steps per epoch",
    "seeds": "number of seeds",
    "threads": "CPU threads",
    "size": "height and width of the images",
    "batch": "images per step",
    "epochs": "epochs of training",
}


def arguments(experiment: Experiment, description: str) -> argparse.Namespace:
    """Return the command's arguments, with the defaults of the experiment for the given kind of data."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CIFAR-10 or an ImageNet folder (default: scikit-learn's digits)")
    parser.add_argument(
        "--out", type=Path, default=Path("experiments"), help="folder of results (default: experiments)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed; --seeds is their number (default: 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--workers", type=int, default=4, help="processes that read a folder's images (default: 4)")
    parser.add_argument("--lr", type=float, help="learning rate (the default depends on experiment and data)")
    numbers = {name: experiment.defaults["digits"].get(name, value) for name, value in DEFAULTS["digits"].items()}
    for name, value in numbers.items():
        if name != "lr":
            text = f"{OPTIONS[name]} (default for the digits: {value or 'all images'})"
            parser.add_argument(f"--{name}", type=positive, help=text)
    parser.add_argument("--depths", type=positive, nargs="+", help="numbers of layers of the networks")
    args = parser.parse_args()
    kind = kind_of(args.data)
    for name, value in (DEFAULTS[kind] | experiment.defaults[kind]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a GPU for cuda, got none: torch sees no GPU")
    return args


def train_all(
    runs: list[Run],
    args: argparse.Namespace,
    images: Images,
    checkpoint: Checkpoint,
    csv_path: Path,
    console: Console,
) -> None:
    """Train the runs that the checkpoint does not contain yet. It is written after every epoch, the CSV after a run."""
    steps = args.epochs * images.steps
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        before = checkpoint.done * steps + checkpoint.running.get("epoch", 0) * images.steps
        task = progress.add_task("", total=len(runs) * steps, completed=before)
        printed = set()
        for run in runs[checkpoint.done :]:
            training = Training(run, args, images)
            name = f"{run.about['net']}, {run.about['depth']} layers"
            if name not in printed:
                x = on(next(images.test())[0][:8], args.device)
                say(console, f"{name}: {backends(training.model, x)}")
            printed.add(name)
            if checkpoint.running:
                training.load(checkpoint.running)
            for _ in training.epochs(lambda text: progress.update(task, advance=1, description=text)):
                checkpoint.running = training.state()
                checkpoint.save()
            checkpoint.rows += training.rows
            checkpoint.done, checkpoint.running = checkpoint.done + 1, {}
            checkpoint.save()
            write_csv(csv_path, checkpoint.rows)


def say(console: Console, text: str) -> None:
    """Print a line as it is: rich neither colors nor wraps it."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def conduct(experiment: Experiment, args: argparse.Namespace, console: Console) -> None:
    """Train the networks, write the results and the plot, and print the verdict."""
    if args.threads:
        torch.set_num_threads(args.threads)
    start = time.perf_counter()
    images = load(args)
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items() if name != "out"}
    args.out.mkdir(parents=True, exist_ok=True)
    csv_path = args.out / f"{experiment.name}.csv"
    checkpoint = Checkpoint(csv_path.with_suffix(".pt"), settings)
    runs = list(experiment.runs(args, images))
    if checkpoint.load(args.device):
        epochs = f", and {checkpoint.running['epoch']} epochs of the next" if checkpoint.running else ""
        say(console, f"resuming from {checkpoint.path}: {checkpoint.done} of {len(runs)} runs done{epochs}")
    train_all(runs, args, images, checkpoint, csv_path, console)
    about = {"digits": "scikit-learn's digits", "cifar": "CIFAR-10", "folder": str(args.data)}[kind_of(args.data)]
    write_csv(csv_path, checkpoint.rows)
    write_plot(csv_path.with_suffix(".png"), experiment, checkpoint.rows, about)
    for sentence in experiment.verdict(checkpoint.rows):
        say(console, sentence)
    written = f"Rows: {csv_path}. Plot: {csv_path.with_suffix('.png')}"
    say(console, f"{written}. This took {time.perf_counter() - start:.0f} s.")


def main(experiment: Experiment, description: str) -> int:
    """Run the experiment's command and return its exit code."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        conduct(experiment, arguments(experiment, description), console)
    except KeyboardInterrupt:
        console.print("interrupted; the same command resumes after the last complete epoch")
        return 130
    except (ValueError, ModuleNotFoundError) as error:
        text = f"{experiment.name}.py: {error}"
        Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0
