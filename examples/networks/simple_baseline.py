"""The simple baseline for pose estimation (Xiao et al. 2018, arXiv 1804.06208): a ResNet and three transposed
convolutions find five points of a digit by heat maps.

    python examples/networks/simple_baseline.py --steps 120 --out simple_baseline.png

The ResNet's blocks are `resnet_kernels.nn.BasicBlock`. Needs `pip install scikit-learn pillow matplotlib` (in a clone:
`pip install -e '.[demo]'`).
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
    """x: (N, 3, H, W), N images, H and W multiples of 32 -> heat maps (N, points, H/4, W/4)."""

    def __init__(self, points: int, layers: Sequence[int] = (1, 1, 1, 1), channels: int = 64) -> None:
        super().__init__()
        self.backbone = rk.nn.ResNet(rk.nn.BasicBlock, list(layers))
        # Without average pooling and classifier the backbone returns the features of its last stage.
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
        # torchvision's ResNet flattens its features (N, outputs, H/32, W/32) at the end.
        features = self.backbone(x).view(N, self.outputs, H // 32, W // 32)
        return self.head(self.deconvolutions(features))


def locate(args: argparse.Namespace, console: Console) -> None:
    """Train the network; print and draw how well it finds the points."""
    task = common.KeyPoints(args, SIZE, STRIDE, NOISE)
    model = SimpleBaseline(len(common.POINTS)).to(memory_format=torch.channels_last)

    def heat_of(x: Tensor) -> Tensor:
        return model(x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last))

    def loss_of(chosen: Tensor) -> Tensor:
        return F.mse_loss(heat_of(task.noisy(task.pictures[chosen])), task.targets[chosen])

    losses = common.train(model, loss_of, len(task.pictures), args, task.generator, console)
    model.eval()
    task.report(heat_of, losses, "ResNet and three transposed convolutions", args.out, console)


def main() -> int:
    return common.run("simple_baseline", __doc__, 120, 0.002, locate)


if __name__ == "__main__":
    sys.exit(main())
