"""Degradation: training and test error of plain and residual networks by depth (He et al. 2015, arXiv 1512.03385,
figures 1 and 6).

    python examples/experiments/degradation.py
    python examples/experiments/degradation.py --data CIFAR --epochs 164
    python examples/experiments/degradation.py --data IMAGENET --depths 18 34

A deeper plain network has a higher training error than a shallower one, although it could copy the shallower one's
layers and make the others identities. A deeper residual network does not have a higher training error.

An interrupted run resumes when the same command is started again.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

from plots import Row, error_curves, final, spread, style_of_plain_or_residual, values_of
from shared import Experiment, main, networks_of

KINDS = ("plain", "residual")


def draw(figure: Any, rows: list[Row]) -> None:
    depths = values_of(rows, "depth")
    error_curves(
        figure,
        rows,
        lambda row: f"{row['net']}, {row['depth']} layers",
        lambda row: style_of_plain_or_residual(row["net"], row["depth"], depths),
    )


def verdict(rows: list[Row]) -> list[str]:
    """Compare the least and the greatest depth, by the mean of the seeds."""
    depths = sorted(values_of(rows, "depth"))
    sentences, degraded = [], {}
    for kind in KINDS:
        shallow, deep = (final(rows, "train_error", net=kind, depth=d) for d in (depths[0], depths[-1]))
        degraded[kind] = statistics.fmean(deep) - statistics.fmean(shallow)
        errors = ", ".join(f"{d} layers {spread(final(rows, 'train_error', net=kind, depth=d))}" for d in depths)
        sentences.append(f"{kind}, training error of the last epoch: {errors}")
    shown = degraded["plain"] > MARGIN >= degraded["residual"]
    sentences.append(
        f"From {depths[0]} to {depths[-1]} layers the training error changes by {100 * degraded['plain']:+.1f} points "
        f"without shortcuts and by {100 * degraded['residual']:+.1f} points with them: the paper's effect is "
        f"{'shown' if shown else 'NOT shown'}. It counts as shown if only the first change is above "
        f"{100 * MARGIN:g} points."
    )
    return sentences


# Half a percentage point; of the digits' 1437 training images this is seven.
MARGIN = 0.005

EXPERIMENT = Experiment(
    "degradation",
    "Degradation",
    {
        "digits": {"depths": [8, 20, 56], "seeds": 3},
        "cifar": {"depths": [20, 32, 44, 56]},
        "folder": {"depths": [18, 34]},
    },
    networks_of(KINDS),
    draw,
    verdict,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
