"""Shortcuts that are not the identity: highway gates (Srivastava et al. 2015, arXiv 1505.00387) and the scaled, gated
and projected shortcuts of He et al. 2016 (1603.05027, section 3, table 1), against the identity.

    python examples/experiments/highway.py [--data CIFAR --depths 110]

    identity            y = relu(F(x) + x)
    highway gates       y = relu(g F(x) + (1 - g) x), g = sigmoid(conv1x1(x) + b), b = -6 at first
    gated shortcut      y = relu(F(x) + (1 - g) x)
    constant scaling    y = relu(F(x) / 2 + x / 2)
    projection          y = relu(F(x) + bn(conv1x1(x)))

The paper finds the identity best. Where the shape changes all have zero padding (A), but the projection. Blocks with
the identity or a projection are the package's fused ones, the others torch's modules around the same convolutions.
Killed and started again with the same command, it goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from typing import Any

import torch
from data import Images
from plots import COLORS, Row, error_curves, final, spread, values_of
from shared import SMALL_IMAGES, Experiment, Run, grid, main, network
from torch import Tensor, nn

import resnet_kernels as rk

KINDS = ("identity", "highway gates", "gated shortcut", "constant scaling", "projection")
# The best of the paper's for both gated kinds (its table 1).
GATE_BIAS = -6.0


class GatedBlock(nn.Module):
    """y = relu(a F(x) + b x), F = bn2(conv2(relu(bn1(conv1(x))))) of a `BasicBlock` of one shape. x: (N, C, H, W)."""

    def __init__(self, block: rk.nn.BasicBlock, kind: str) -> None:
        super().__init__()
        self.kind, self.relu = kind, nn.ReLU(inplace=True)
        self.conv1, self.bn1, self.conv2, self.bn2 = block.conv1, block.bn1, block.conv2, block.bn2
        self.gate = None
        if kind != "constant scaling":
            channels = block.conv1.in_channels
            self.gate = nn.Conv2d(channels, channels, 1)
            nn.init.kaiming_normal_(self.gate.weight)
            nn.init.constant_(self.gate.bias, GATE_BIAS)

    def forward(self, x: Tensor) -> Tensor:
        f = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.gate is None:
            return self.relu(torch.lerp(f, x, 0.5))
        g = torch.sigmoid(self.gate(x))
        return self.relu((f if self.kind == "gated shortcut" else g * f) + (1 - g) * x)


def gated(kind: str, depth: int, args: argparse.Namespace, images: Images) -> nn.Module:
    if kind in ("identity", "projection"):
        return network("A" if kind == "identity" else "C", depth, args, images)
    model = network("A", depth, args, images)
    for stage in (model.layer1, model.layer2, model.layer3):
        for i, block in enumerate(stage):
            if block.downsample is None:
                stage[i] = GatedBlock(block, kind)
    return model


def runs(args: argparse.Namespace, images: Images) -> Iterable[Run]:
    return grid(args, KINDS, lambda kind, depth: gated(kind, depth, args, images))


def draw(figure: Any, rows: list[Row]) -> None:
    depths = values_of(rows, "depth")

    def style(row: Row) -> Row:
        return {"color": COLORS[KINDS.index(row["net"])], "linestyle": ("-", "--", ":")[depths.index(row["depth"]) % 3]}

    error_curves(figure, rows, lambda row: f"{row['net']}, {row['depth']} layers", style)


def verdict(rows: list[Row]) -> list[str]:
    told = []
    for depth in values_of(rows, "depth"):
        mean = {}
        for kind in KINDS:
            train, test = (final(rows, column, net=kind, depth=depth) for column in ("train_error", "test_error"))
            mean[kind] = statistics.fmean(test)
            told.append(f"{kind}, {depth} layers: training error {spread(train)}, test error {spread(test)}")
        ahead = [kind for kind in KINDS if mean[kind] < mean["identity"]]
        found = f"not the best: {', '.join(ahead)} had a lower test error" if ahead else "the best, or level"
        told.append(f"{depth} layers: the identity is {found}; the paper's is the best.")
    return told


EXPERIMENT = Experiment(
    "highway",
    "Gates against the identity",
    {
        "digits": {"depths": [56]},
        "cifar": {"depths": [110]},
        "folder": SMALL_IMAGES | {"depths": [110]},
    },
    runs,
    draw,
    verdict,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
