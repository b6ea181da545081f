"""Trains a torchvision residual network on a folder of images, with fused blocks.

    python examples/train_imagenet.py DATA --model resnet50 --out OUT
    torchrun --nproc-per-node 8 examples/train_imagenet.py DATA --model resnet50 --amp bf16 --sync-bn --out OUT

DATA has the folders train/ and val/, each with one folder of images per class.

The checkpoint OUT/checkpoint.pt is written after every epoch, and on SIGINT and SIGTERM after the current step. After a
signal the exit code is 130 or 143. (torchrun passes the signal on, kills processes that take longer than 30 s, and
exits with 1.) `--resume OUT/checkpoint.pt` continues at the next step, with the same batches and augmentations as a run
that was not interrupted. The checkpoint's "model" is the state dict of torchvision's network.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

import resnet_kernels as rk
from resnet_kernels.testing.images import MEAN, STD, residual_networks

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Processes:
    """This process and its place among those that torchrun started, if it did."""

    def __init__(self, device: str) -> None:
        self.rank, self.size, local = (
            int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        if device == "cuda":
            if local >= torch.cuda.device_count():
                raise ValueError(
                    f"device: expected a GPU for each process, got {torch.cuda.device_count()} for {local + 1}"
                )
            torch.cuda.set_device(local)
        self.device = torch.device(device, local) if device == "cuda" else torch.device(device)
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)
        if "RANK" in os.environ:
            # gloo beside nccl: losses and signals are reduced on the host, without waiting for the device.
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")

    def _interrupt(self, number: int, frame: Any) -> None:
        self.signal = self.signal or number

    def sum(self, values: list[float]) -> list[float]:
        """Return the sums over all processes."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def _reduce(self, values: list[float], op: Any) -> list[float]:
        if self.size == 1:
            return values
        table = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(table, op)
        return table.tolist()

    def check(self) -> None:
        """Raise Interrupted in all processes if any of them received a signal."""
        number = int(self._reduce([self.signal], dist.ReduceOp.MAX)[0])
        if number:
            raise Interrupted(number)


class Interrupted(Exception):
    """Raised in all processes when one of them received the signal `number`."""

    def __init__(self, number: int) -> None:
        self.number = number


class Shuffled(Sampler):
    """The (epoch, index) of this process's images, in the random order of `epoch`, from batch `step` on.

    Images that do not fill a batch in every process are left out.
    """

    def __init__(self, count: int, batch: int, processes: Processes, seed: int) -> None:
        self.count, self.batch, self.processes, self.seed = count, batch, processes, seed
        self.epoch = self.step = 0
        self.steps = count // (batch * processes.size)
        if not self.steps:
            raise ValueError(f"train: expected at least {batch * processes.size} images for one step, got {count}")

    def __len__(self) -> int:
        return (self.steps - self.step) * self.batch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        mine = order[self.processes.rank :: self.processes.size]
        return ((self.epoch, i) for i in mine[self.step * self.batch : self.steps * self.batch])


class Augmented(Dataset):
    """Augmented images by (epoch, index).

    The augmentation of an image depends only on epoch, index and seed. It depends neither on the number of processes
    and workers, nor on whether training was resumed.
    """

    def __init__(self, images: ImageFolder, seed: int) -> None:
        self.images, self.seed = images, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed * 1_000_003 + epoch) * 1_000_000_007 + index)
            return self.images[index]


def folder(data: Path, name: str, transform: Callable) -> ImageFolder:
    """Return the images of DATA/train or DATA/val. Raises ValueError if there are none."""
    if not (data / name).is_dir():
        raise ValueError(f"data: expected a folder with train/ and val/, got {data}, which has no {name}/")
    try:
        return ImageFolder(str(data / name), transform)
    except FileNotFoundError as error:  # there are no classes, or a class has no images
        raise ValueError(f"data: expected a folder of images per class in {data / name}: {error}") from error


def ignore_group_signals(worker: int) -> None:
    """Move a worker process of the loader to a process group of its own.

    A terminal and torchrun send signals to whole groups of processes. The workers must go on until the current step is
    done. A signal sent to a worker itself still ends it.
    """
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def loaders(args: argparse.Namespace, processes: Processes) -> tuple[DataLoader, DataLoader, Shuffled, list[str]]:
    """Return (the training images' loader, the validation images' loader, the training order, the class names)."""
    end = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    crops = [transforms.RandomResizedCrop(args.size, antialias=True), transforms.RandomHorizontalFlip()]
    centre = [transforms.Resize(args.size * 8 // 7, antialias=True), transforms.CenterCrop(args.size)]
    train = folder(args.data, "train", transforms.Compose([*crops, *end]))
    val = folder(args.data, "val", transforms.Compose([*centre, *end]))
    if train.classes != val.classes:
        different = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(f"data: expected the same classes in train/ and val/, got {', '.join(different[:5])} in one")
    common: dict[str, Any] = {"batch_size": args.batch, "num_workers": args.workers}
    common |= {"worker_init_fn": ignore_group_signals}
    common |= {"pin_memory": processes.device.type == "cuda", "persistent_workers": args.workers > 0}
    sampler = Shuffled(len(train), args.batch, processes, args.seed)
    # The processes' parts may differ in size: no image is repeated to fill them up, so each counts once.
    part = Subset(val, range(processes.rank, len(val), processes.size))
    loader = DataLoader(Augmented(train, args.seed), sampler=sampler, **common)
    return loader, DataLoader(part, **common), sampler, train.classes


class Training:
    """The network, its optimizer and everything else that a checkpoint stores.

    `epoch` epochs and `step` steps of the next one are done. say: prints a line.
    """

    def __init__(
        self, args: argparse.Namespace, processes: Processes, classes: list[str], sampler: Shuffled, say: Callable
    ) -> None:
        self.processes, self.sampler = processes, sampler
        self.epoch = self.step = 0
        torch.manual_seed(args.seed)
        net = torchvision.models.get_model(args.model, weights=None, num_classes=len(classes))
        self.net = net.to(processes.device, memory_format=torch.channels_last)
        if not args.eager:
            say(str(rk.replace_blocks(self.net)))
        self.batch = args.batch * processes.size
        self.about = {"model": args.model, "classes": classes, "batch": self.batch, "seed": args.seed}
        self._make_optimizer(args, sampler.steps)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=args.amp == "fp16")
        self.autocast = torch.autocast(processes.device.type, AMP.get(args.amp), enabled=args.amp is not None)
        self.loss = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
        if args.resume:
            self.load(args.resume)
            say(f"resuming from {args.resume} at epoch {self.epoch + 1}, step {self.step + 1}")
        if args.compile:
            self.net.compile()
        ids = [processes.device.index] if processes.device.type == "cuda" else None
        self.model = DistributedDataParallel(self.net, device_ids=ids) if dist.is_initialized() else self.net
        if args.sync_bn and dist.is_initialized():
            # After DDP has taken the model, because DDP refuses synchronized batch norms on CPUs. The conversion is in
            # place and keeps the parameters.
            nn.SyncBatchNorm.convert_sync_batchnorm(self.net)

    def _make_optimizer(self, args: argparse.Namespace, steps: int) -> None:
        """Make SGD with a learning rate that rises linearly, then falls by a cosine. steps: of an epoch."""
        # Batch norms and biases have no weight decay.
        groups = [
            {"params": [p for p in self.net.parameters() if (p.dim() > 1) == decayed], "weight_decay": decay}
            for decayed, decay in ((True, args.weight_decay), (False, 0.0))
        ]
        self.optimizer = torch.optim.SGD(groups, args.lr * self.batch / 256, momentum=args.momentum)
        warm_up, total = args.warm_up * steps, args.epochs * steps

        def factor(step: int) -> float:
            if step < warm_up:
                return (step + 1) / warm_up
            return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(total - warm_up, 1)))

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take a training step and return the loss."""
        with self.autocast:
            loss = self.loss(self.model(images), labels)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return loss.detach()

    def save(self, path: Path) -> None:
        """Write a checkpoint, in the process of rank 0."""
        if self.processes.rank:
            return
        parts = {name: getattr(self, name).state_dict() for name in ("optimizer", "scheduler", "scaler")}
        state = {"model": self.net.state_dict(), **parts, "epoch": self.epoch, "step": self.step, "about": self.about}
        # Written beside the checkpoint and then renamed, so that an interrupted write leaves the old checkpoint.
        unfinished = path.with_suffix(".part")
        torch.save(state, unfinished)
        os.replace(unfinished, path)

    def load(self, path: Path) -> None:
        """Load a checkpoint. Raises ValueError if it is none, or belongs to another model or other classes."""
        if not path.is_file():
            raise ValueError(f"resume: expected a checkpoint, got {path}, which is not a file")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            about = state["about"]
        except Exception as error:  # torch.load of foreign bytes may raise anything
            raise ValueError(f"resume: expected a checkpoint of this script, got {path}: {error!r}") from error
        # In the middle of an epoch the step counts batches of one size in one order, so batch and seed must be the
        # same.
        for name in ("model", "classes", *(("batch", "seed") if state["step"] else ())):
            if about[name] != self.about[name]:
                expected, got = (
                    f"{len(v)} classes from {v[0]} to {v[-1]}" if isinstance(v, list) else v
                    for v in (self.about[name], about[name])
                )
                raise ValueError(f"resume: {path} has another {name}: expected {expected}, got {got}")
        self.net.load_state_dict(state["model"])
        for name in ("optimizer", "scheduler", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.epoch, self.step = state["epoch"], state["step"]


@torch.no_grad()
def evaluate(training: Training, loader: DataLoader) -> tuple[float, float]:
    """Return top-1 and top-5 accuracy over the images of all processes. Raises Interrupted after a signal."""
    processes, net = training.processes, training.net
    net.eval()
    counts = [0.0, 0.0, 0.0]
    for images, labels in loader:
        if processes.signal:
            break
        images, labels = images.to(processes.device, memory_format=torch.channels_last), labels.to(processes.device)
        with training.autocast:
            logits = net(images)
        right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        counts = [c + float(n) for c, n in zip(counts, (right[:, 0].sum(), right.sum(), len(labels)), strict=True)]
    processes.check()
    top1, top5, count = processes.sum(counts)
    return top1 / count, top5 / count


def train_epoch(training: Training, loader: DataLoader, args: argparse.Namespace, console: Console) -> float:
    """Train until the end of the epoch and return images/s over all processes.

    Raises Interrupted after a signal, and RuntimeError if the loss is not finite.
    """
    processes, sampler = training.processes, training.sampler
    sampler.epoch, sampler.step = training.epoch, training.step
    training.net.train()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    first, start = training.step, time.perf_counter()
    with (
        Progress(*columns, console=console, disable=processes.rank > 0, transient=True) as progress,
        contextlib.ExitStack() as stack,
    ):
        log = stack.enter_context(open(args.out / "log.jsonl", "a")) if not processes.rank else None
        task = progress.add_task(f"epoch {training.epoch + 1}/{args.epochs}", total=sampler.steps, completed=first)
        for images, labels in loader:
            lr = training.scheduler.get_last_lr()[0]
            images = images.to(processes.device, memory_format=torch.channels_last, non_blocking=True)
            loss = training.train_step(images, labels.to(processes.device, non_blocking=True))
            training.step += 1
            progress.update(task, advance=1)
            if training.step % args.log_every == 0 or training.step == sampler.steps:
                mean = processes.sum([loss.item()])[0] / processes.size
                if not math.isfinite(mean) and not training.scaler.is_enabled():
                    raise RuntimeError(
                        f"the loss is {mean} at epoch {training.epoch + 1}, step {training.step}; try a smaller --lr"
                    )
                rate = (training.step - first) * training.batch / (time.perf_counter() - start)
                row = {"epoch": training.epoch + 1, "step": training.step, "loss": mean, "lr": lr, "images/s": rate}
                if log:
                    print(json.dumps(row), file=log, flush=True)
                text = f"epoch {training.epoch + 1}/{args.epochs}: loss {mean:.3f}, lr {lr:.3g}, {rate:.1f} images/s"
                progress.update(task, description=text)
            processes.check()
    return (training.step - first) * training.batch / (time.perf_counter() - start)


def train(args: argparse.Namespace, processes: Processes, console: Console) -> int:
    """Train and evaluate all epochs; return the exit code."""

    def say(text: str) -> None:
        if not processes.rank:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    if args.model not in residual_networks():
        raise ValueError(f"model: expected one of {', '.join(residual_networks())}, got {args.model!r}")
    if args.sync_bn and args.eager and processes.device.type == "cpu" and processes.size > 1:
        raise ValueError(
            "sync-bn: expected fused blocks on CPUs, got --eager: torch's SyncBatchNorm does not run on CPUs"
        )
    loader, val, sampler, classes = loaders(args, processes)
    training = Training(args, processes, classes, sampler, say)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"
    try:
        while training.epoch < args.epochs:
            rate = train_epoch(training, loader, args, console)
            training.epoch, training.step = training.epoch + 1, 0
            training.save(checkpoint)
            top1, top5 = evaluate(training, val)
            say(f"epoch {training.epoch}/{args.epochs}: top-1 {top1:.2%}, top-5 {top5:.2%}, {rate:.1f} images/s")
    except Interrupted as interrupted:
        training.save(checkpoint)
        name = signal.Signals(interrupted.number).name
        say(f"{name} in epoch {training.epoch + 1} after step {training.step}; continue with --resume {checkpoint}")
        return 128 + interrupted.number
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/ and val/")
    parser.add_argument(
        "--out", type=Path, default=Path("runs"), help="folder of checkpoint.pt and log.jsonl (default: runs)"
    )
    parser.add_argument("--resume", type=Path, help="a checkpoint to continue from")
    parser.add_argument(
        "--model", default="resnet50", help="one of torchvision's residual networks (default: resnet50)"
    )
    parser.add_argument("--eager", action="store_true", help="train torchvision's own blocks instead of the fused ones")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=90, help="default: 90")
    parser.add_argument("--batch", type=int, default=64, help="images per step and process (default: 64)")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images (default: 224)")
    parser.add_argument("--workers", type=int, default=8, help="processes per process that load images (default: 8)")
    parser.add_argument(
        "--lr",
        type=float,
        default=0.1,
        help="learning rate for 256 images per step over all processes; scaled linearly for other numbers "
        "(default: 0.1)",
    )
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument(
        "--weight-decay", type=float, default=1e-4, help="of all parameters but batch norms and biases (default: 1e-4)"
    )
    parser.add_argument("--warm-up", type=float, default=5, help="epochs in which the learning rate rises (default: 5)")
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--amp", choices=AMP, help="autocast dtype; fp16 scales the loss (default: no autocast, fp32)")
    parser.add_argument("--sync-bn", action="store_true", help="batch norm statistics over all processes")
    parser.add_argument("--compile", action="store_true", help="compile the network with torch.compile")
    parser.add_argument("--log-every", type=int, default=10, help="steps between lines of log.jsonl (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> int:
    args = arguments().parse_args()
    rank = int(os.environ.get("RANK", 0))
    try:
        processes = Processes(args.device)
        return train(args, processes, Console(width=None if sys.stdout.isatty() else 120))
    except (ValueError, RuntimeError) as error:
        if not rank:
            text = f"train_imagenet.py: {error}"
            Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
