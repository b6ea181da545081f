"""What the experiments share: networks, the loop that trains, checkpoints, CSV and the command line."""

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

# By kind of data; an experiment's own come on top. The digits' rate: 110 steps of 0.1, the paper's, are too few for 56
# layers to recover from their first ones, with shortcuts or without. CIFAR's are those of He et al. 2015, section 4.2:
# 164 epochs of 390 batches are 64k steps. ImageNet's are those of its section 3.4. steps None: all of an epoch; threads
# None: torch's choice. The digits' operations are so short that threads wait for each other longer than they work.
COMMON: Row = {"lr": 0.1, "width": 16, "steps": None, "seeds": 1, "threads": None}
DEFAULTS: dict[str, Row] = {
    "digits": COMMON | {"size": 8, "batch": 128, "epochs": 10, "lr": 0.02, "threads": 1},
    "cifar": COMMON | {"size": 32, "batch": 128, "epochs": 164},
    "folder": COMMON | {"size": 224, "batch": 256, "epochs": 90},
}
# Of experiments for whose networks a folder's images are made small.
SMALL_IMAGES: Row = {"size": 32, "batch": 128}
MILESTONES = {"digits": (0.5, 0.75), "cifar": (0.5, 0.75), "folder": (1 / 3, 2 / 3)}
# He et al. 2015, section 4.2: networks from 110 layers on begin with a tenth of the rate, for 400 of 64k steps.
WARM_UP = (110, 400 / 64_000)


# ---- Networks


def network(kind: str, depth: int, args: argparse.Namespace, images: Images) -> nn.Module:
    """kind: "plain", "residual" (shortcuts as in the paper), "A", "B", "C", or "pre-activation". 18 and 34 layers are
    ImageNet's networks, other depths those for small images."""
    if depth in (18, 34):
        if images.channels != 3 or kind == "pre-activation":
            raise ValueError(f"depths: {depth} is ImageNet's network, for --data with train/ and val/; got {kind}")
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
    """What runs the residual blocks of a training step."""
    chosen = Counter(e.chosen for e in rk.explain(model.train(), x) if not e.name.endswith("stem"))
    return ", ".join(f"{n} blocks by {name}" for name, n in chosen.items()) or "no fused block, torch's modules"


# ---- Runs


@dataclasses.dataclass(frozen=True)
class Run:
    """A network to train. about: the first columns of its rows, "net", "depth" and "seed" among them.

    measure: (model, images, epoch) -> rows, called before the first epoch, as 0, and after the last. Without it a row
    tells of an epoch: rate, loss and error of its batches as they were trained with, and the test error after it.
    lr: the learning rate throughout, in place of the papers' schedule.
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
    """defaults: of options, by kind of data. runs, in order. draw: into a figure. verdict: sentences, from the rows."""

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
    """Every kind of network at every depth, with every seed."""
    for seed in range(args.seed, args.seed + args.seeds):
        for depth in args.depths:
            for kind in kinds:
                about = {"net": kind, "depth": depth, "seed": seed}
                yield Run(about, functools.partial(make, kind, depth), measure)


def rate(args: argparse.Namespace, depth: int, step: int, steps: int) -> float:
    deep, share = WARM_UP
    if depth >= deep and step < share * steps:
        return args.lr / 10
    return args.lr * 0.1 ** sum(step >= at * steps for at in MILESTONES[kind_of(args.data)])


@torch.no_grad()
def test_error(model: nn.Module, images: Images, device: str) -> float:
    """Of the model as it is, in evaluation."""
    model.eval()
    wrong = total = 0
    for x, y in images.test():
        wrong += (model(on(x, device)).argmax(1) != y.to(device)).sum().item()
        total += len(y)
    return wrong / total


class Training:
    """A run under way. `epoch` epochs are done."""

    def __init__(self, run: Run, args: argparse.Namespace, images: Images) -> None:
        self.run, self.args, self.images = run, args, images
        self.epoch, self.rows = 0, list[Row]()
        torch.manual_seed(run.about["seed"])
        self.model = run.make().to(args.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)

    def state(self) -> Row:
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
        """Trains, and yields after every epoch. advance: told at every step."""
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
    """OUT/NAME.pt: the rows of the runs that are done, and the one under way."""

    def __init__(self, path: Path, settings: Row) -> None:
        self.path, self.settings = path, settings
        self.done, self.rows, self.running = 0, list[Row](), dict[str, Any]()

    def load(self, device: str) -> bool:
        if not self.path.exists():
            return False
        try:
            state = torch.load(self.path, weights_only=True, map_location=device)
            found = state["settings"]
            self.done, self.rows, self.running = state["done"], state["rows"], state["running"]
        except Exception as error:  # whatever unpickling the bytes of something else raises
            raise ValueError(
                f"out: expected a checkpoint of this experiment, got {self.path}, which cannot be read "
                f"({type(error).__name__}); remove it to begin anew"
            ) from error
        for name in sorted(self.settings.keys() | found.keys()):
            if self.settings.get(name) != found.get(name):
                raise ValueError(
                    f"out: {self.path} is of a run with other settings, {name}: expected {self.settings.get(name)}, "
                    f"got {found.get(name)}; name another --out, or remove it to begin anew"
                )
        return True

    def save(self) -> None:
        state = {"settings": self.settings, "done": self.done, "rows": self.rows, "running": self.running}
        # Whole or not at all, whatever ends the process meanwhile.
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


def arguments(experiment: Experiment, description: str) -> argparse.Namespace:
    """As given, what is not given from the defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CIFAR-10 or an ImageNet folder (default: scikit-learn's digits)")
    parser.add_argument("--out", type=Path, default=Path("experiments"), help="folder (default: experiments)")
    parser.add_argument("--seed", type=int, default=0, help="the first (default: 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--workers", type=int, default=4, help="processes that read a folder's images (default: 4)")
    parser.add_argument("--lr", type=float)
    numbers = {name: experiment.defaults["digits"].get(name, value) for name, value in DEFAULTS["digits"].items()}
    for name, value in numbers.items():
        if name != "lr":
            parser.add_argument(f"--{name}", type=positive, help=f"(default for the digits: {value or 'all'})")
    parser.add_argument("--depths", type=positive, nargs="+", help="layers")
    args = parser.parse_args()
    kind = kind_of(args.data)
    for name, value in (DEFAULTS[kind] | experiment.defaults[kind]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a GPU for cuda, got none that torch sees")
    return args


def run(experiment: Experiment, args: argparse.Namespace, console: Console) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    start, say = time.perf_counter(), lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)
    images = load(args)
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items() if name != "out"}
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint(args.out / f"{experiment.name}.pt", settings)
    runs = list(experiment.runs(args, images))
    if checkpoint.load(args.device):
        told = f", epoch {checkpoint.running['epoch']} of the next" if checkpoint.running else ""
        say(f"going on from {checkpoint.path}: {checkpoint.done} of {len(runs)} runs done{told}")
    steps = args.epochs * images.steps
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        before = checkpoint.done * steps + checkpoint.running.get("epoch", 0) * images.steps
        task = progress.add_task("", total=len(runs) * steps, completed=before)
        told = set()
        for r in runs[checkpoint.done :]:
            training = Training(r, args, images)
            what = f"{r.about['net']}, {r.about['depth']} layers"
            if what not in told:
                x = on(next(images.test())[0][:8], args.device)
                say(f"{what}: {backends(training.model, x)}")
            told.add(what)
            if checkpoint.running:
                training.load(checkpoint.running)
            for _ in training.epochs(lambda text: progress.update(task, advance=1, description=text)):
                checkpoint.running = training.state()
                checkpoint.save()
            checkpoint.rows += training.rows
            checkpoint.done, checkpoint.running = checkpoint.done + 1, {}
            checkpoint.save()
            write_csv(args.out / f"{experiment.name}.csv", checkpoint.rows)
    about = {"digits": "scikit-learn's digits", "cifar": "CIFAR-10", "folder": str(args.data)}[kind_of(args.data)]
    write_csv(args.out / f"{experiment.name}.csv", checkpoint.rows)
    write_plot(args.out / f"{experiment.name}.png", experiment, checkpoint.rows, about)
    for sentence in experiment.verdict(checkpoint.rows):
        say(sentence)
    say(f"{args.out / experiment.name}.csv and .png, {time.perf_counter() - start:.0f} s")


def main(experiment: Experiment, description: str) -> int:
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        run(experiment, arguments(experiment, description), console)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on after the last whole epoch")
        return 130
    except (ValueError, ModuleNotFoundError) as error:
        text = f"{experiment.name}.py: {error}"
        Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0
