"""Gradient flow: the norm of the gradient of each 3x3 convolution's weight, at initialisation and after training, in
plain and residual networks (He et al. 2015, arXiv 1512.03385, section 4.1; He et al. 2016, 1603.05027, section 2).

    python examples/experiments/gradient_flow.py [--data CIFAR]

In a residual network the Jacobian from a layer to the loss is a product of sums that contain the identity. In a plain
network it is a product of the layers' Jacobians alone.

An interrupted run resumes when the same command is started again.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

from data import Images, on
from plots import Row, band, select, style_of_plain_or_residual, values_of, whole_numbers
from shared import SMALL_IMAGES, Experiment, main, networks_of
from torch import nn
from torch.nn import functional as F

KINDS = ("plain", "residual")


def gradients(model: nn.Module, images: Images, epoch: int) -> list[Row]:
    """Return a row for each 3x3 convolution: the gradient's norm for the first test images, with batch statistics."""
    x, y = next(images.test())
    device = next(model.parameters()).device.type
    model.train().zero_grad()
    F.cross_entropy(model(on(x, device)), y.to(device)).backward()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    rows = [{"epoch": epoch, "layer": i + 1, "gradient_norm": w.grad.norm().item()} for i, w in enumerate(weights)]
    model.zero_grad()
    return rows


def draw(figure: Any, rows: list[Row]) -> None:
    depths = values_of(rows, "depth")
    for axes, epoch in zip(figure.subplots(1, 2, sharey=True), sorted(values_of(rows, "epoch")), strict=True):
        for depth in depths:
            for kind in KINDS:
                style = style_of_plain_or_residual(kind, depth, depths)
                chosen = select(rows, net=kind, depth=depth, epoch=epoch)
                band(axes, chosen, "layer", "gradient_norm", f"{kind}, {depth} layers", **style)
        title = f"norm of the weight's gradient, {when(epoch)}"
        axes.set(xlabel="layer, from the image on", yscale="log", title=title)
        whole_numbers(axes)
    axes.legend(frameon=False)


def when(epoch: int) -> str:
    return f"after {epoch} epochs" if epoch else "at initialisation"


def verdict(rows: list[Row]) -> list[str]:
    sentences, spans = [], {}
    for epoch in sorted(values_of(rows, "epoch")):
        for depth in values_of(rows, "depth"):
            for kind in KINDS:
                norms = [
                    statistics.geometric_mean([row["gradient_norm"] + 1e-30 for row in select(chosen, layer=layer)])
                    for chosen in [select(rows, net=kind, depth=depth, epoch=epoch)]
                    for layer in values_of(chosen, "layer")
                ]
                spans[kind, depth, epoch] = max(norms) / min(norms)
                sentences.append(
                    f"{kind}, {depth} layers, {when(epoch)}: gradient norm of the first layer {norms[0]:.3g}, of the "
                    f"last {norms[-1]:.3g}, greatest / least {max(norms) / min(norms):.3g}"
                )
    deepest = max(values_of(rows, "depth"))
    plain, residual = spans["plain", deepest, 0], spans["residual", deepest, 0]
    sentences.append(
        f"At {deepest} layers and initialisation the gradient norms span a factor of {plain:.3g} without shortcuts and "
        f"{residual:.3g} with them: residual networks have {'the smaller' if residual < plain else 'NO smaller'} span."
    )
    return sentences


EXPERIMENT = Experiment(
    "gradient_flow",
    "Gradient flow",
    {
        "digits": {"depths": [20, 56], "epochs": 6, "seeds": 3},
        "cifar": {"depths": [20, 56], "epochs": 20},
        "folder": SMALL_IMAGES | {"depths": [20, 56], "epochs": 5},
    },
    networks_of(KINDS, gradients),
    draw,
    verdict,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
