"""Stacked hourglasses (Newell et al. 2016, arXiv 1603.06937): find five points of a digit, as heat maps.

    python examples/networks/hourglass.py --steps 100 --out hourglass.png

Residual modules are `resnet_kernels.nn.PreactivationBottleneck`. Needs `pip install 'resnet_kernels[demo]'`.
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
    """x: (N, C, H, W), H and W multiples of 2 ** depth -> the same sizes.

    y = residual(x) + double(residual(inner(residual(pool(x))))), inner an hourglass of one depth less, or a residual.
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
    """x: (N, 1, H, W) -> of every hourglass its heat maps (N, points, H, W), in a list.

    The features and heat maps of one go, by 1x1 convolutions, into the next.
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
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    pictures, tests = common.digits(SIZE, generator)
    points, test_points = common.key_points(pictures), common.key_points(tests)
    targets = common.heat_maps(points, SIZE, stride=1)
    model = StackedHourglass(len(common.POINTS)).to(memory_format=torch.channels_last)

    def loss_of(chosen: Tensor) -> Tensor:
        maps = model(common.noisy(pictures[chosen], NOISE, generator))
        return sum((F.mse_loss(heat, targets[chosen]) for heat in maps), maps[0].new_zeros(()))

    losses = common.train(model, loss_of, len(pictures), args, generator, console)
    x = common.noisy(tests, NOISE, generator)
    model.eval()
    with torch.no_grad():
        heat = torch.cat([model(part)[-1] for part in x.split(64)])
    predicted = common.located(heat, stride=1)
    share = common.found(predicted, test_points, SIZE / 16)
    told = f"points of {len(tests)} digits not seen found within {SIZE // 16} pixels: {share:.1%}"
    console.print(told, highlight=False)
    rows = {"digit": x[:8, 0], "heat maps, summed": heat[:8].sum(1)}
    marks = {"true": test_points[:8], "found": predicted[:8]}
    common.draw(args.out, rows, losses, f"Two stacked hourglasses: {told}", marks)


def main() -> int:
    return common.run("hourglass", __doc__, 100, 0.004, locate)


if __name__ == "__main__":
    sys.exit(main())
