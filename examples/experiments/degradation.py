"""Degradation: plain and residual networks at growing depth, training and test error by epoch (He et al. 2015, arXiv
1512.03385, figures 1 and 6).

    python examples/experiments/degradation.py
    python examples/experiments/degradation.py --data CIFAR --epochs 164
    python examples/experiments/degradation.py --data IMAGENET --depths 18 34

A deeper plain network has a higher error on what it is trained with, though it could copy the shallower one and pass
its result on; a deeper residual network has not. Killed and started again with the same command, it goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from typing import Any

from data import Images
from plots import COLORS, Row, error_curves, final, spread, values_of
from shared import Experiment, Run, grid, main, network

KINDS = ("plain", "residual")


def runs(args: argparse.Namespace, images: Images) -> Iterable[Run]:
    return grid(args, KINDS, lambda kind, depth: network(kind, depth, args, images))


def draw(figure: Any, rows: list[Row]) -> None:
    depths = values_of(rows, "depth")

    def style(row: Row) -> Row:
        return {"color": COLORS[depths.index(row["depth"])], "linestyle": "--" if row["net"] == "plain" else "-"}

    error_curves(figure, rows, lambda row: f"{row['net']}, {row['depth']} layers", style)


def verdict(rows: list[Row]) -> list[str]:
    """Of the least and the greatest depth, in the mean of the seeds."""
    depths = sorted(values_of(rows, "depth"))
    told, degraded = [], {}
    for kind in KINDS:
        shallow, deep = (final(rows, "train_error", net=kind, depth=d) for d in (depths[0], depths[-1]))
        degraded[kind] = statistics.fmean(deep) - statistics.fmean(shallow)
        errors = ", ".join(f"{d} layers {spread(final(rows, 'train_error', net=kind, depth=d))}" for d in depths)
        told.append(f"{kind}, training error of the last epoch: {errors}")
    shown = degraded["plain"] > MARGIN >= degraded["residual"]
    told.append(
        f"From {depths[0]} to {depths[-1]} layers the training error changes by {100 * degraded['plain']:+.1f} points "
        f"without shortcuts and by {100 * degraded['residual']:+.1f} with them: the paper's effect is "
        f"{'shown' if shown else 'not shown'} (it is where the first is above {100 * MARGIN:g} and the second not)."
    )
    return told


# Half a point of the digits' 1437 images are seven of them.
MARGIN = 0.005

EXPERIMENT = Experiment(
    "degradation",
    "Degradation",
    {
        "digits": {"depths": [8, 20, 56], "seeds": 3},
        "cifar": {"depths": [20, 32, 44, 56]},
        "folder": {"depths": [18, 34]},
    },
    runs,
    draw,
    verdict,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
