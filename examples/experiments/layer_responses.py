"""Layer responses: the standard deviation of each 3x3 layer's output in plain and residual networks (He et al. 2015,
arXiv 1512.03385, section 4.2 and figure 7).

    python examples/experiments/layer_responses.py [--data CIFAR]

The output is taken after the layer's batch norm and before the addition and the ReLU. The paper finds smaller responses
in residual networks, and smaller ones the deeper they are: the function that a block adds is closer to zero.

An interrupted run resumes when the same command is started again.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import torch
from data import Images, on
from plots import Row, band, select, style_of_plain_or_residual, values_of, whole_numbers
from shared import SMALL_IMAGES, Experiment, main, networks_of
from torch import nn

KINDS = ("plain", "residual")


@torch.no_grad()
def responses(model: nn.Module, images: Images, epoch: int) -> list[Row]:
    """Return a row for each 3x3 layer: the standard deviation of its output for the first test images, in evaluation.

    A hook on a batch norm makes its block run as torch's modules, which compute the same values as the fused block.
    """
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


def draw(figure: Any, rows: list[Row]) -> None:
    """Draw the responses by layer, and sorted by size."""
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
                style = style_of_plain_or_residual(kind, depth, depths)
                band(axes, chosen, x, "std", f"{kind}, {depth} layers", **style)
        order = "the greatest first" if by_size else "from the image on"
        axes.set(xlabel=f"layer, {order}", ylim=(0, None))
        whole_numbers(axes)
    axes.legend(frameon=False)
    figure.axes[0].set_ylabel("standard deviation of the response")


def verdict(rows: list[Row]) -> list[str]:
    depths = sorted(values_of(rows, "depth"))
    mean = {
        (kind, depth): statistics.fmean(row["std"] for row in select(rows, net=kind, depth=depth))
        for kind in KINDS
        for depth in depths
    }
    sentences = [
        f"{kind}, {depth} layers: standard deviation {value:.3f} in the mean of all layers"
        for (kind, depth), value in mean.items()
    ]
    smaller = all(mean["residual", d] < mean["plain", d] for d in depths)
    falls = all(mean["residual", a] > mean["residual", b] for a, b in zip(depths, depths[1:], strict=False))
    sentences.append(
        f"Residual networks respond {'less' if smaller else 'NOT less'} than plain ones at every depth, and "
        f"{'less' if falls else 'NOT less'} the deeper they are; the paper finds both."
    )
    return sentences


EXPERIMENT = Experiment(
    "layer_responses",
    "Layer responses",
    {
        "digits": {"depths": [20, 56], "seeds": 2},
        "cifar": {"depths": [20, 56, 110]},
        "folder": SMALL_IMAGES | {"depths": [20, 56]},
    },
    networks_of(KINDS, responses),
    draw,
    verdict,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
