"""Shortcuts: zero padding (A), a projection where the shape changes (B), or a projection always (C) (He et al. 2015,
arXiv 1512.03385, section 4.1 and table 3).

    python examples/experiments/shortcuts.py [--data CIFAR or IMAGENET]

The paper finds all three far better than the plain network, B slightly better than A, and C marginally better than B.

An interrupted run resumes when the same command is started again.
"""

from __future__ import annotations

import sys

from plots import Row, error_curves_by_kind, errors_by_kind, values_of
from shared import Experiment, main, networks_of

KINDS = ("plain", "A", "B", "C")


def verdict(rows: list[Row]) -> list[str]:
    sentences = []
    for depth in values_of(rows, "depth"):
        mean, of_kinds = errors_by_kind(rows, KINDS, depth)
        sentences += of_kinds
        better = max(mean[k] for k in "ABC") < mean["plain"]
        order = " < ".join(sorted("ABC", key=lambda k: mean[k]))
        difference = max(mean[k] for k in "ABC") - min(mean[k] for k in "ABC")
        sentences.append(
            f"{depth} layers: every shortcut is {'better' if better else 'NOT better'} than none, by the test error. "
            f"Order of the test errors: {order}, {100 * difference:.1f} points from first to last; the paper's order "
            "is C < B < A."
        )
    return sentences


EXPERIMENT = Experiment(
    "shortcuts",
    "Shortcuts",
    {
        "digits": {"depths": [32], "seeds": 3},
        "cifar": {"depths": [56]},
        "folder": {"depths": [34]},
    },
    networks_of(KINDS),
    error_curves_by_kind(KINDS, lambda kind: kind if kind == "plain" else f"shortcut {kind}"),
    verdict,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
