"""Pre-activation: batch norm and ReLU in front of the convolutions, so that the shortcuts are the identity from the
first block to the last, against the original order, at 110 layers (He et al. 2016, arXiv 1603.05027, section 4).

    python examples/experiments/preactivation.py [--data CIFAR] [--depths 110 164]

The paper finds lower errors in the deepest networks, of easier optimisation and of regularisation. Killed and started
again with the same command, it goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from typing import Any

from data import Images
from plots import COLORS, Row, error_curves, final, select, spread, values_of
from shared import SMALL_IMAGES, Experiment, Run, grid, main, network

KINDS = ("residual", "pre-activation")


def runs(args: argparse.Namespace, images: Images) -> Iterable[Run]:
    return grid(args, KINDS, lambda kind, depth: network(kind, depth, args, images))


def draw(figure: Any, rows: list[Row]) -> None:
    depths = values_of(rows, "depth")

    def style(row: Row) -> Row:
        return {"color": COLORS[KINDS.index(row["net"])], "linestyle": ("-", "--", ":")[depths.index(row["depth"]) % 3]}

    def label(row: Row) -> str:
        return f"{'original' if row['net'] == 'residual' else row['net']}, {row['depth']} layers"

    error_curves(figure, rows, label, style)


def verdict(rows: list[Row]) -> list[str]:
    told = []
    for depth in values_of(rows, "depth"):
        area, test = {}, {}
        for kind in KINDS:
            chosen = select(rows, net=kind, depth=depth)
            area[kind] = statistics.fmean(row["train_error"] for row in chosen)
            train, tested = (final(chosen, column) for column in ("train_error", "test_error"))
            test[kind] = statistics.fmean(tested)
            told.append(
                f"{'original' if kind == 'residual' else kind}, {depth} layers: training error {100 * area[kind]:.1f}% "
                f"in the mean of all epochs, {spread(train)} in the last, test error {spread(tested)}"
            )
        sooner, better = (m["pre-activation"] < m["residual"] for m in (area, test))
        told.append(
            f"{depth} layers: pre-activation learns {'sooner' if sooner else 'NOT sooner'} (mean training error), and "
            f"its last test error is {'lower' if better else 'NOT lower'}; the paper finds both."
        )
    return told


EXPERIMENT = Experiment(
    "preactivation",
    "Pre-activation",
    {
        "digits": {"depths": [110], "seeds": 2},
        "cifar": {"depths": [110]},
        "folder": SMALL_IMAGES | {"depths": [110]},
    },
    runs,
    draw,
    verdict,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
