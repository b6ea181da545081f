"""Shortcuts other than the identity: highway gates (Srivastava et al. 2015, arXiv 1505.00387) and the scaled, gated and
projected shortcuts of He et al. 2016 (1603.05027, section 3, table 1), compared with the identity.

    python examples/experiments/highway.py [--data CIFAR --depths 110]

    identity            y = relu(F(x) + x)
    highway gates       y = relu(g F(x) + (1 - g) x), g = sigmoid(conv1x1(x) + b), b = -6 at first
    gated shortcut      y = relu(F(x) + (1 - g) x)
    constant scaling    y = relu(F(x) / 2 + x / 2)
    projection          y = relu(F(x) + bn(conv1x1(x)))

F is the block's residual function, b the bias of the gate. The paper finds the identity best. Where the shape changes,
all networks but the one with projections have zero padding (shortcut A). Blocks with the identity or a projection are
the package's fused blocks; the others are torch's modules around the same convolutions.

An interrupted run resumes when the same command is started again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

import torch
from data import Images
from plots import Row, error_curves_by_kind, errors_by_kind, values_of
from shared import SMALL_IMAGES, Experiment, Run, grid, main, network
from torch import Tensor, nn

import resnet_kernels as rk

KINDS = ("identity", "highway gates", "gated shortcut", "constant scaling", "projection")
# The initial bias of the gates that is best in the paper, for both gated kinds (its table 1).
GATE_BIAS = -6.0


class GatedBlock(nn.Module):
    """y = relu(a F(x) + b x), with F(x) = bn2(conv2(relu(bn1(conv1(x))))).

    Args:
        block: a `BasicBlock` with an identity shortcut; its modules are used.
        kind: "highway gates", "gated shortcut" or "constant scaling"; it defines a and b (see the top of this file).
    x: (N, C, H, W) -> (N, C, H, W): images, channels, height, width.
    """

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
    """Return the network of one of KINDS."""
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


def verdict(rows: list[Row]) -> list[str]:
    sentences = []
    for depth in values_of(rows, "depth"):
        mean, of_kinds = errors_by_kind(rows, KINDS, depth)
        sentences += of_kinds
        better = [kind for kind in KINDS if mean[kind] < mean["identity"]]
        found = f"NOT the best: {', '.join(better)} had a lower test error" if better else "the best, or as good"
        sentences.append(f"{depth} layers: the identity is {found}; in the paper it is the best.")
    return sentences


EXPERIMENT = Experiment(
    "highway",
    "Gates against the identity",
    {
        "digits": {"depths": [56]},
        "cifar": {"depths": [110]},
        "folder": SMALL_IMAGES | {"depths": [110]},
    },
    runs,
    error_curves_by_kind(KINDS),
    verdict,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
