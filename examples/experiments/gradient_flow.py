"""Gradient flow: the norm of the loss's gradient by each 3x3 convolution's weight, at initialisation and after
training, in plain and residual networks (He et al. 2015, arXiv 1512.03385, section 4.1; He et al. 2016, 1603.05027,
section 2).

    python examples/experiments/gradient_flow.py [--data CIFAR]

What is between a residual layer and the loss is a sum with the identity in it, not a product alone. Killed and started
again with the same command, it goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from typing import Any

from data import Images, on
from plots import COLORS, Row, band, select, values_of
from shared import SMALL_IMAGES, Experiment, Run, grid, main, network
from torch import nn
from torch.nn import functional as F

KINDS = ("plain", "residual")


def gradients(model: nn.Module, images: Images, epoch: int) -> list[Row]:
    """Of the first test images, with batch statistics, a row for each 3x3 convolution."""
    x, y = next(images.test())
    device = next(model.parameters()).device.type
    model.train().zero_grad()
    F.cross_entropy(model(on(x, device)), y.to(device)).backward()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    rows = [{"epoch": epoch, "layer": i + 1, "gradient_norm": w.grad.norm().item()} for i, w in enumerate(weights)]
    model.zero_grad()
    return rows


def runs(args: argparse.Namespace, images: Images) -> Iterable[Run]:
    return grid(args, KINDS, lambda kind, depth: network(kind, depth, args, images), gradients)


def draw(figure: Any, rows: list[Row]) -> None:
    depths = values_of(rows, "depth")
    for axes, epoch in zip(figure.subplots(1, 2, sharey=True), sorted(values_of(rows, "epoch")), strict=True):
        for depth in depths:
            for kind in KINDS:
                style = {"color": COLORS[depths.index(depth)], "linestyle": "--" if kind == "plain" else "-"}
                chosen = select(rows, net=kind, depth=depth, epoch=epoch)
                band(axes, chosen, "layer", "gradient_norm", f"{kind}, {depth} layers", **style)
        when = f"after {epoch} epochs" if epoch else "at initialisation"
        axes.set(xlabel="layer, from the image on", yscale="log", title=f"norm of the weight's gradient, {when}")
    axes.legend(frameon=False)


def verdict(rows: list[Row]) -> list[str]:
    told, steepest = [], {}
    for epoch in sorted(values_of(rows, "epoch")):
        for depth in values_of(rows, "depth"):
            for kind in KINDS:
                norms = [
                    statistics.geometric_mean([row["gradient_norm"] + 1e-30 for row in select(chosen, layer=layer)])
                    for chosen in [select(rows, net=kind, depth=depth, epoch=epoch)]
                    for layer in values_of(chosen, "layer")
                ]
                steepest[kind, depth, epoch] = max(norms) / min(norms)
                told.append(
                    f"{kind}, {depth} layers, {f'after {epoch} epochs' if epoch else 'at initialisation'}: first layer "
                    f"{norms[0]:.3g}, last {norms[-1]:.3g}, greatest / least {max(norms) / min(norms):.3g}"
                )
    deepest = max(values_of(rows, "depth"))
    plain, residual = steepest["plain", deepest, 0], steepest["residual", deepest, 0]
    told.append(
        f"At {deepest} layers and initialisation the gradients span a factor of {plain:.3g} without shortcuts and "
        f"{residual:.3g} with them: residual networks {'keep' if residual < plain else 'do NOT keep'} them closer."
    )
    return told


EXPERIMENT = Experiment(
    "gradient_flow",
    "Gradient flow",
    {
        "digits": {"depths": [20, 56], "epochs": 6, "seeds": 3},
        "cifar": {"depths": [20, 56], "epochs": 20},
        "folder": SMALL_IMAGES | {"depths": [20, 56], "epochs": 5},
    },
    runs,
    draw,
    verdict,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
