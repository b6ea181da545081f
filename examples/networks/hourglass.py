"""Stacked hourglasses (Newell et al. 2016, arXiv 1603.06937): finds five points of a digit by heat maps.

    python examples/networks/hourglass.py --steps 100 --out hourglass.png

The residual modules are `resnet_kernels.nn.PreactivationBottleneck`. Needs
`pip install scikit-learn pillow matplotlib` (in a clone: `pip install -e '.[demo]'`).
"""

from __future__ import annotations

import argparse
import sys

import common
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_kernels as rk

SIZE, NOISE = 32, 0.2


def residual(channels: int) -> nn.Module:
    return rk.nn.PreactivationBottleneck(channels, channels // 4)


class Hourglass(nn.Module):
    """y = residual(x) + upsample(residual(inner(residual(pool(x))))).

    `inner` is an hourglass of depth - 1, or a residual module at depth 1.
    x: (N, C, H, W) -> (N, C, H, W): images, channels, height, width. H and W are multiples of 2 ** depth.
    """

    def __init__(self, depth: int, channels: int) -> None:
        super().__init__()
        self.beside = residual(channels)
        self.before = residual(channels)
        self.inner = Hourglass(depth - 1, channels) if depth > 1 else residual(channels)
        self.after = residual(channels)

    def forward(self, x: Tensor) -> Tensor:
        low = self.after(self.inner(self.before(F.max_pool2d(x, 2))))
        return self.beside(x) + F.interpolate(low, scale_factor=2)


class StackedHourglass(nn.Module):
    """A run of hourglasses. Each one predicts heat maps.

    The features and heat maps of an hourglass are added, after 1x1 convolutions, to the input of the next one.
    x: (N, 1, H, W) -> a list with the heat maps (N, points, H, W) of every hourglass.
    """

    def __init__(self, points: int, stacks: int = 2, depth: int = 3, channels: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 5, padding=2), residual(channels))
        self.hourglasses = nn.ModuleList(Hourglass(depth, channels) for _ in range(stacks))
        self.features = nn.ModuleList(
            nn.Sequential(residual(channels), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 1))
            for _ in range(stacks)
        )
        self.heat = nn.ModuleList(nn.Conv2d(channels, points, 1) for _ in range(stacks))
        self.features_back = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(stacks - 1))
        self.heat_back = nn.ModuleList(nn.Conv2d(points, channels, 1) for _ in range(stacks - 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        maps = []
        for i, hourglass in enumerate(self.hourglasses):
            features = self.features[i](hourglass(x))
            maps.append(self.heat[i](features))
            if i < len(self.heat_back):
                x = x + self.features_back[i](features) + self.heat_back[i](maps[-1])
        return maps


def locate(args: argparse.Namespace, console: Console) -> None:
    """Train the network; print and draw how well it finds the points."""
    task = common.KeyPoints(args, SIZE, stride=1, noise=NOISE)
    model = StackedHourglass(len(common.POINTS)).to(memory_format=torch.channels_last)

    def loss_of(chosen: Tensor) -> Tensor:
        maps = model(task.noisy(task.pictures[chosen]))
        return sum((F.mse_loss(heat, task.targets[chosen]) for heat in maps), maps[0].new_zeros(()))

    losses = common.train(model, loss_of, len(task.pictures), args, task.generator, console)
    model.eval()
    task.report(lambda x: model(x)[-1], losses, "Two stacked hourglasses", args.out, console)


def main() -> int:
    return common.run("hourglass", __doc__, 100, 0.004, locate)


if __name__ == "__main__":
    sys.exit(main())
