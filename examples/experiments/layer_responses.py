"""Layer responses: the standard deviation of what each 3x3 layer puts out, after its batch norm and before the addition
and the nonlinearity, in plain and residual networks (He et al. 2015, arXiv 1512.03385, section 4.2 and figure 7).

    python examples/experiments/layer_responses.py [--data CIFAR]

The paper finds smaller responses in residual networks, and the smaller the deeper they are: a block's function is
closer to zero. Killed and started again with the same command, it goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from typing import Any

import torch
from data import Images, on
from plots import COLORS, Row, band, select, values_of
from shared import SMALL_IMAGES, Experiment, Run, grid, main, network
from torch import nn

KINDS = ("plain", "residual")


@torch.no_grad()
def responses(model: nn.Module, images: Images, epoch: int) -> list[Row]:
    """Of all values of a layer, over the first test images, in evaluation. A hook on a batch norm makes its block run
    as torch's modules, the same values."""
    if epoch == 0:
        return []
    found: list[float] = []
    convolution = None
    hooks = []
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d) and convolution is not None and convolution.kernel_size == (3, 3):
            hooks.append(m.register_forward_hook(lambda _, __, y: found.append(y.double().std().item())))
        convolution = m if isinstance(m, nn.Conv2d) else convolution
    try:
        model.eval()(on(next(images.test())[0], next(model.parameters()).device.type))
    finally:
        for hook in hooks:
            hook.remove()
    return [{"epoch": epoch, "layer": i + 1, "std": value} for i, value in enumerate(found)]


def runs(args: argparse.Namespace, images: Images) -> Iterable[Run]:
    return grid(args, KINDS, lambda kind, depth: network(kind, depth, args, images), responses)


def draw(figure: Any, rows: list[Row]) -> None:
    depths = values_of(rows, "depth")
    for axes, by_size in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        for depth in depths:
            for kind in KINDS:
                chosen = select(rows, net=kind, depth=depth)
                x = "layer"
                if by_size:
                    x = "rank"
                    chosen = [
                        row | {"rank": i + 1}
                        for seed in values_of(chosen, "seed")
                        for i, row in enumerate(sorted(select(chosen, seed=seed), key=lambda row: -row["std"]))
                    ]
                style = {"color": COLORS[depths.index(depth)], "linestyle": "--" if kind == "plain" else "-"}
                band(axes, chosen, x, "std", f"{kind}, {depth} layers", **style)
        order = "the greatest first" if by_size else "from the image on"
        axes.set(xlabel=f"layer, {order}", ylim=(0, None))
    axes.legend(frameon=False)
    figure.axes[0].set_ylabel("standard deviation of the response")


def verdict(rows: list[Row]) -> list[str]:
    depths = sorted(values_of(rows, "depth"))
    mean = {
        (kind, depth): statistics.fmean(row["std"] for row in select(rows, net=kind, depth=depth))
        for kind in KINDS
        for depth in depths
    }
    told = [f"{kind}, {depth} layers: mean of the layers' {value:.3f}" for (kind, depth), value in mean.items()]
    smaller = all(mean["residual", d] < mean["plain", d] for d in depths)
    falls = all(mean["residual", a] > mean["residual", b] for a, b in zip(depths, depths[1:], strict=False))
    told.append(
        f"Residual networks respond {'less' if smaller else 'NOT less'} than plain ones at every depth, and "
        f"{'less' if falls else 'NOT less'} the deeper they are; the paper finds both."
    )
    return told


EXPERIMENT = Experiment(
    "layer_responses",
    "Layer responses",
    {
        "digits": {"depths": [20, 56], "seeds": 2},
        "cifar": {"depths": [20, 56, 110]},
        "folder": SMALL_IMAGES | {"depths": [20, 56]},
    },
    runs,
    draw,
    verdict,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
