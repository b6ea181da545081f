"""Shortcuts: zero padding (A), projection where the shape changes (B), projection always (C) (He et al. 2015, arXiv
1512.03385, section 4.1 and table 3).

    python examples/experiments/shortcuts.py [--data CIFAR or IMAGENET]

The paper finds all three far better than the plain network, B slightly better than A, and C marginally better than B.
Killed and started again with the same command, it goes on.
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

KINDS = ("plain", "A", "B", "C")


def runs(args: argparse.Namespace, images: Images) -> Iterable[Run]:
    return grid(args, KINDS, lambda kind, depth: network(kind, depth, args, images))


def draw(figure: Any, rows: list[Row]) -> None:
    depths = values_of(rows, "depth")

    def style(row: Row) -> Row:
        return {"color": COLORS[KINDS.index(row["net"])], "linestyle": ("-", "--", ":")[depths.index(row["depth"]) % 3]}

    def label(row: Row) -> str:
        return f"{row['net'] if row['net'] == 'plain' else 'shortcut ' + row['net']}, {row['depth']} layers"

    error_curves(figure, rows, label, style)


def verdict(rows: list[Row]) -> list[str]:
    told = []
    for depth in values_of(rows, "depth"):
        mean = {}
        for kind in KINDS:
            train, test = (final(rows, column, net=kind, depth=depth) for column in ("train_error", "test_error"))
            mean[kind] = statistics.fmean(test)
            told.append(f"{kind}, {depth} layers: training error {spread(train)}, test error {spread(test)}")
        better = max(mean[k] for k in "ABC") < mean["plain"]
        order = " < ".join(sorted("ABC", key=lambda k: mean[k]))
        apart = max(mean[k] for k in "ABC") - min(mean[k] for k in "ABC")
        told.append(
            f"{depth} layers: every shortcut is {'better' if better else 'NOT better'} than none in the test. Order of "
            f"the test errors: {order}, {100 * apart:.1f} points from first to last; the paper's is C < B < A."
        )
    return told


EXPERIMENT = Experiment(
    "shortcuts",
    "Shortcuts",
    {
        "digits": {"depths": [32], "seeds": 3},
        "cifar": {"depths": [56]},
        "folder": {"depths": [34]},
    },
    runs,
    draw,
    verdict,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
