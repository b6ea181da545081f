"""The images of the experiments: scikit-learn's digits, CIFAR-10, or folders of images per class.

Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# (images (N, C, H, W), labels (N,)) of a batch.
Batches = Iterator[tuple[Tensor, Tensor]]


def on(x: Tensor, device: str) -> Tensor:
    """Return the images on the device, in channels_last."""
    return x.to(device, memory_format=torch.channels_last)


def steps_of(images: int, batch: int, steps: int | None) -> int:
    """Return the steps of an epoch; None: as many as there are whole batches."""
    if images < batch * (steps or 1):
        raise ValueError(f"batch: expected at most the {images} training images in {steps or 1} steps, got {batch}")
    return steps or images // batch


class InMemory:
    """Images that fit in memory, normalised by the training images' mean and standard deviation.

    Args:
        train, test: (images (N, C, H, W) fp32, labels (N,)).
        batch: images per step.
        steps: steps of an epoch; None: as many as there are whole batches.
        padding: augmentation: a training image is padded by so many zeros at each side, cropped to its size at a random
            place, and flipped with probability 1/2. 0: no augmentation.
    """

    def __init__(
        self,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        batch: int,
        steps: int | None = None,
        padding: int = 0,
    ) -> None:
        mean, std = train[0].mean(0), train[0].std()
        (self.x, self.y), (self.test_x, self.test_y) = (((x - mean) / std, y) for x, y in (train, test))
        self.batch, self.padding = batch, padding
        self.channels, self.classes = self.x.shape[1], int(self.y.max()) + 1
        self.steps = steps_of(len(self.x), batch, steps)

    def train(self, seed: int, epoch: int) -> Batches:
        """Yield the batches of an epoch. Order and augmentation depend on seed and epoch only.

        Images that do not fill a batch are left out.
        """
        g = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        for chosen in torch.randperm(len(self.x), generator=g)[: self.steps * self.batch].split(self.batch):
            yield self._augmented(self.x[chosen], g), self.y[chosen]

    def _augmented(self, x: Tensor, g: torch.Generator) -> Tensor:
        if not self.padding:
            return x
        (N, _, H, W), p = x.shape, self.padding
        padded = F.pad(x, (p, p, p, p))
        rows, columns = torch.randint(2 * p + 1, (2, N), generator=g).tolist()
        crops = torch.stack([t[:, r : r + H, c : c + W] for t, r, c in zip(padded, rows, columns, strict=True)])
        return torch.where(torch.rand(N, 1, 1, 1, generator=g) < 0.5, crops.flip(3), crops)

    def test(self) -> Batches:
        """Yield the test images in batches of 512."""
        return zip(self.test_x.split(512), self.test_y.split(512), strict=True)


class Folder:
    """Folders of images per class, read when they are needed. Training images are cropped at random and flipped, test
    images are cropped at the centre.

    Args:
        data: a folder with train/ and val/, each with one folder of images per class.
        size: height and width of the crops.
        batch: images per step.
        steps: steps of an epoch; None: as many as there are whole batches.
        workers: processes that read images.
    """

    def __init__(self, data: Path, size: int, batch: int, steps: int | None, workers: int) -> None:
        from torchvision import transforms
        from torchvision.datasets import ImageFolder

        from resnet_kernels.testing.images import MEAN, STD

        end = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        crops = [transforms.RandomResizedCrop(size, antialias=True), transforms.RandomHorizontalFlip()]
        centre = [transforms.Resize(size * 8 // 7, antialias=True), transforms.CenterCrop(size)]
        try:
            self.train_set = ImageFolder(str(data / "train"), transforms.Compose([*crops, *end]))
            self.test_set = ImageFolder(str(data / "val"), transforms.Compose([*centre, *end]))
        except FileNotFoundError as error:  # no classes, or one without images
            raise ValueError(f"data: expected a folder of images per class in train/ and val/: {error}") from error
        if self.train_set.classes != self.test_set.classes:
            raise ValueError(f"data: expected the same classes in train/ and val/ of {data}, got different ones")
        self.batch, self.workers, self.channels = batch, workers, 3
        self.classes = len(self.train_set.classes)
        self.steps = steps_of(len(self.train_set), batch, steps)

    def _batches(self, images: Any, **options: Any) -> Batches:
        return iter(torch.utils.data.DataLoader(images, self.batch, num_workers=self.workers, **options))

    def train(self, seed: int, epoch: int) -> Batches:
        # Worker processes are seeded by the generator. Without workers the loader draws from this process's state.
        torch.manual_seed(1_000_003 * seed + epoch)
        g = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        return itertools.islice(self._batches(self.train_set, shuffle=True, generator=g), self.steps)

    def test(self) -> Batches:
        return self._batches(self.test_set)


Images = InMemory | Folder


def kind_of(data: Path | None) -> str:
    """Return "digits", "cifar" or "folder". Raises ValueError for a folder that is neither of the latter."""
    if data is None:
        return "digits"
    if (data / "cifar-10-batches-py").is_dir():
        return "cifar"
    if (data / "train").is_dir() and (data / "val").is_dir():
        return "folder"
    raise ValueError(
        "data: expected a folder with cifar-10-batches-py/ (CIFAR-10, unpacked), or with train/ and val/ and in each a "
        f"folder of images per class (ImageNet); got {data}, which has neither"
    )


def load(args: argparse.Namespace) -> Images:
    """Return the images that --data names, at the size of --size."""
    kind = kind_of(args.data)
    if kind == "folder":
        return Folder(args.data, args.size, args.batch, args.steps, args.workers)
    make = cifar if kind == "cifar" else digits
    train, test, padding = make(args)
    if train[0].shape[-1] != args.size:
        train, test = ((F.interpolate(x, (args.size, args.size), mode="bilinear"), y) for x, y in (train, test))
    return InMemory(train, test, args.batch, args.steps, padding)


def digits(args: argparse.Namespace) -> tuple:
    """Return (training set, test set, padding): scikit-learn's 1797 handwritten digits, 8 x 8.

    A fifth of them is the test set, the same for every seed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits are part of scikit-learn: pip install scikit-learn pillow matplotlib"
        ) from error
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(data.images).float()[order, None], torch.from_numpy(data.target)[order]
    test = len(x) // 5
    return (x[test:], y[test:]), (x[:test], y[:test]), 0


def cifar(args: argparse.Namespace) -> tuple:
    """Return (training set, test set, padding) of CIFAR-10, whose unpacked files are in the folder of --data."""
    from torchvision.datasets import CIFAR10

    def part(train: bool) -> tuple[Tensor, Tensor]:
        try:
            found = CIFAR10(str(args.data), train=train, download=False)
        except RuntimeError as error:
            raise ValueError(
                f"data: expected the complete CIFAR-10 in {args.data}/cifar-10-batches-py: {error}"
            ) from error
        return torch.from_numpy(found.data).permute(0, 3, 1, 2).float(), torch.tensor(found.targets)

    return part(True), part(False), 4
