"""Pre-activation blocks against the original ones, at 110 layers (He et al. 2016, arXiv 1603.05027, section 4).

    python examples/experiments/preactivation.py [--data CIFAR] [--depths 110 164]

With pre-activation, batch norm and ReLU come before each convolution and not after it, so that the shortcuts are the
identity from the first block to the last. The paper finds lower errors in the deepest networks, and attributes them to
easier optimisation and to regularisation.

An interrupted run resumes when the same command is started again.
"""

from __future__ import annotations

import statistics
import sys

from plots import Row, error_curves_by_kind, final, select, spread, values_of
from shared import SMALL_IMAGES, Experiment, main, networks_of

KINDS = ("residual", "pre-activation")


def name_of(kind: str) -> str:
    return "original" if kind == "residual" else kind


def verdict(rows: list[Row]) -> list[str]:
    sentences = []
    for depth in values_of(rows, "depth"):
        area, test = {}, {}
        for kind in KINDS:
            chosen = select(rows, net=kind, depth=depth)
            area[kind] = statistics.fmean(row["train_error"] for row in chosen)
            train, tested = (final(chosen, column) for column in ("train_error", "test_error"))
            test[kind] = statistics.fmean(tested)
            sentences.append(
                f"{name_of(kind)}, {depth} layers: training error {100 * area[kind]:.1f}% in the mean of all epochs, "
                f"{spread(train)} in the last, test error {spread(tested)}"
            )
        sooner, better = (m["pre-activation"] < m["residual"] for m in (area, test))
        sentences.append(
            f"{depth} layers: pre-activation learns {'sooner' if sooner else 'NOT sooner'} (by the mean training "
            f"error), and its last test error is {'lower' if better else 'NOT lower'}; the paper finds both."
        )
    return sentences


EXPERIMENT = Experiment(
    "preactivation",
    "Pre-activation",
    {
        "digits": {"depths": [110], "seeds": 2},
        "cifar": {"depths": [110]},
        "folder": SMALL_IMAGES | {"depths": [110]},
    },
    networks_of(KINDS),
    error_curves_by_kind(KINDS, name_of),
    verdict,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
