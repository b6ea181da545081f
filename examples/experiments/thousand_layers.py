"""More than 1000 layers: the original network of 1202 layers (He et al. 2015, arXiv 1512.03385, section 4.2) and the
pre-activation network of 1001 layers (He et al. 2016, 1603.05027, section 5) train.

    python examples/experiments/thousand_layers.py [--data CIFAR --epochs 164 --width 16]

On the digits an epoch is a few steps, and each network has its own constant learning rate.

An interrupted run resumes when the same command is started again.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from typing import Any

from data import Images
from plots import COLORS, Row, band, select, values_of, whole_numbers
from shared import SMALL_IMAGES, Experiment, Run, main, network

# Learning rates on the digits, where there are 40 steps. At 0.02 the loss of the original network rose to 40. The
# pre-activation network learned at the paper's 0.1, and hardly at 0.005.
RATES = {"residual": 0.002, "pre-activation": 0.1}


def runs(args: argparse.Namespace, images: Images) -> Iterable[Run]:
    """Yield a run for every seed and depth. Depths of 6n + 2 are original networks, others pre-activation networks."""
    for seed in range(args.seed, args.seed + args.seeds):
        for depth in args.depths:
            kind = "residual" if depth % 6 == 2 else "pre-activation"
            about = {"net": kind, "depth": depth, "seed": seed}
            lr = (args.lr or RATES[kind]) if args.data is None else None
            yield Run(about, lambda kind=kind, depth=depth: network(kind, depth, args, images), lr=lr)


def draw(figure: Any, rows: list[Row]) -> None:
    left, right = figure.subplots(1, 2)
    rows = [row | {"error": 100 * row["train_error"]} for row in rows]
    for color, depth in zip(COLORS, values_of(rows, "depth"), strict=False):
        chosen = select(rows, depth=depth)
        kind = "original" if chosen[0]["net"] == "residual" else "pre-activation"
        for axes, column in ((left, "train_loss"), (right, "error")):
            band(axes, chosen, "epoch", column, f"{kind}, {depth} layers", color=color, marker=".")
    left.set(xlabel="epoch", title="training loss", ylim=(0, None))
    right.set(xlabel="epoch", title="training error, %", ylim=(0, 100))
    whole_numbers(left)
    whole_numbers(right)
    left.legend(frameon=False)


def verdict(rows: list[Row]) -> list[str]:
    sentences = []
    for depth in values_of(rows, "depth"):
        for seed in values_of(rows, "seed"):
            losses = [row["train_loss"] for row in select(rows, depth=depth, seed=seed)]
            errors = [row["train_error"] for row in select(rows, depth=depth, seed=seed)]
            learns = math.isfinite(losses[-1]) and losses[-1] < 0.9 * losses[0] and errors[-1] < 0.9 * errors[0]
            sentences.append(
                f"{depth} layers, seed {seed}: training loss from {losses[0]:.2f} to {losses[-1]:.2f}, training error "
                f"from {100 * errors[0]:.0f}% to {100 * errors[-1]:.0f}%: the network "
                f"{'learns' if learns else 'does NOT learn'} (it counts as learning if both fall below nine tenths of "
                "the first epoch's)."
            )
    return sentences


EXPERIMENT = Experiment(
    "thousand_layers",
    "More than 1000 layers",
    {
        "digits": {"depths": [1202, 1001], "batch": 64, "epochs": 8, "steps": 5, "width": 8, "lr": None},
        "cifar": {"depths": [1202, 1001]},
        "folder": SMALL_IMAGES | {"depths": [1202, 1001]},
    },
    runs,
    draw,
    verdict,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
