"""A small U-Net (Ronneberger et al. 2015, arXiv 1505.04597) of residual blocks: finds the strokes of a noisy digit.

    python examples/networks/unet.py --steps 100 --out unet.png

Encoder and decoder are made of `resnet_kernels.nn.BasicBlock`. Needs `pip install scikit-learn pillow matplotlib` (in a
clone: `pip install -e '.[demo]'`).
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

SIZE, NOISE = 48, 0.5


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return rk.nn.BasicBlock(inputs, outputs, stride, rk.nn.make_shortcut("B", inputs, outputs, stride))


class UNet(nn.Module):
    """An encoder, whose levels halve the map, and a decoder, whose levels double it.

    A level of the decoder also takes the encoder's features of the same size, concatenated.
    x: (N, 1, H, W) -> logits (N, 1, H, W): images, channels, height, width. H and W are multiples of
    2 ** (len(widths) - 1).
    """

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        pairs = list(zip(widths, widths[1:], strict=False))
        self.stem = nn.Conv2d(1, widths[0], 3, padding=1)
        self.first = block(widths[0], widths[0])
        self.down = nn.ModuleList(nn.Sequential(block(a, b, stride=2), block(b, b)) for a, b in pairs)
        self.up = nn.ModuleList(block(b + a, a) for a, b in reversed(pairs))
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.first(self.stem(x))]
        for down in self.down:
            levels.append(down(levels[-1]))
        x = levels.pop()
        for up in self.up:
            x = up(torch.cat([F.interpolate(x, scale_factor=2), levels.pop()], 1))
        return self.head(x)


def overlap(logits: Tensor, strokes: Tensor) -> float:
    """Return the intersection over union of predicted strokes (positive logits) and true ones."""
    predicted, true = logits > 0, strokes > 0.5
    return ((predicted & true).sum() / (predicted | true).sum().clamp_min(1)).item()


def segment(args: argparse.Namespace, console: Console) -> None:
    """Train the network; print and draw how well it finds the strokes."""
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    pictures, tests = common.digits(SIZE, generator)
    model = UNet().to(memory_format=torch.channels_last)

    def loss_of(chosen: Tensor) -> Tensor:
        x = common.noisy(pictures[chosen], NOISE, generator)
        return F.binary_cross_entropy_with_logits(model(x), (pictures[chosen] > common.INK).float())

    losses = common.train(model, loss_of, len(pictures), args, generator, console)
    x, strokes = common.noisy(tests, NOISE, generator), (tests > common.INK).float()
    model.eval()
    logits = common.predicted(model, x)
    result = f"{overlap(logits, strokes):.1%} overlap with the strokes of {len(tests)} unseen digits"
    by_threshold = overlap(x - common.INK, strokes)
    console.print(f"{result}; a threshold on the noisy pictures reaches {by_threshold:.1%}", highlight=False)
    rows = {"noisy digit": x[:8, 0], "its strokes": strokes[:8, 0], "found": logits[:8, 0].sigmoid()}
    common.draw(args.out, rows, losses, f"U-Net of residual blocks: {result}", {})


def main() -> int:
    return common.run("unet", __doc__, 100, 0.01, segment)


if __name__ == "__main__":
    sys.exit(main())
