"""Simple baseline of pose estimation (Xiao et al. 2018, arXiv 1804.06208): a ResNet, three deconvolutions, heat maps.

    python examples/networks/simple_baseline.py --steps 120 --out simple_baseline.png

Finds five points of a digit. The ResNet is of `rk.nn.BasicBlock`. Needs `pip install 'resnet_kernels[demo]'`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import common
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_kernels as rk

SIZE, STRIDE, NOISE = 64, 4, 0.2


class SimpleBaseline(nn.Module):
    """x: (N, 3, H, W), H and W multiples of 32 -> heat maps (N, points, H/4, W/4)."""

    def __init__(self, points: int, layers: Sequence[int] = (1, 1, 1, 1), channels: int = 64) -> None:
        super().__init__()
        self.backbone = rk.nn.ResNet(rk.nn.BasicBlock, list(layers))
        # What makes logits of the last stage is not wanted: the features go out as they are.
        outputs = self.backbone.fc.in_features
        self.backbone.avgpool, self.backbone.fc = nn.Identity(), nn.Identity()
        deconvolutions: list[nn.Module] = []
        for inputs in (outputs, channels, channels):
            conv = nn.ConvTranspose2d(inputs, channels, 4, stride=2, padding=1, bias=False)
            deconvolutions += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
        self.deconvolutions = nn.Sequential(*deconvolutions)
        self.head = nn.Conv2d(channels, points, 1)
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        N, _, H, W = x.shape
        # The ResNet ends with a flattening of (N, K, H/32, W/32).
        features = self.backbone(x).view(N, self.outputs, H // 32, W // 32)
        return self.head(self.deconvolutions(features))


def locate(args: argparse.Namespace, console: Console) -> None:
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    pictures, tests = common.digits(SIZE, generator)
    points, test_points = common.key_points(pictures), common.key_points(tests)
    targets = common.heat_maps(points, SIZE // STRIDE, STRIDE)
    model = SimpleBaseline(len(common.POINTS)).to(memory_format=torch.channels_last)

    def images(clean: Tensor) -> Tensor:
        return common.noisy(clean, NOISE, generator).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)

    def loss_of(chosen: Tensor) -> Tensor:
        return F.mse_loss(model(images(pictures[chosen])), targets[chosen])

    losses = common.train(model, loss_of, len(pictures), args, generator, console)
    x = images(tests)
    heat = common.predicted(model, x)
    predicted = common.located(heat, STRIDE)
    share = common.found(predicted, test_points, SIZE / 16)
    told = f"points of {len(tests)} digits not seen found within {SIZE // 16} pixels: {share:.1%}"
    console.print(told, highlight=False)
    rows = {"digit": x[:8, 0], "heat maps, summed": heat[:8].sum(1)}
    marks = {"true": test_points[:8], "found": predicted[:8]}
    common.draw(args.out, rows, losses, f"ResNet and three deconvolutions: {told}", marks)


def main() -> int:
    return common.run("simple_baseline", __doc__, 120, 0.002, locate)


if __name__ == "__main__":
    sys.exit(main())
