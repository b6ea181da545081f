"""Lesions: blocks of a trained network are deleted or exchanged, and the network is tested without further training
(Veit et al. 2016, arXiv 1605.06431, sections 4.1 to 4.3).

    python examples/experiments/lesions.py [--data CIFAR]

A residual network of n blocks is a sum over 2^n paths. A deleted block takes half of them, and the error grows
smoothly. A plain network has a single path, which a deleted block interrupts.

An interrupted run resumes when the same command is started again.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Iterable
from typing import Any

from data import Images
from plots import COLORS, Row, band, select, whole_numbers
from shared import SMALL_IMAGES, Experiment, Run, grid, main, network, test_error
from torch import nn

KINDS = ("plain", "residual")
DRAWS = 5  # random choices of blocks, for each number of blocks

# (stage, index) of a block that preserves the shape of its input. To delete it, an identity is put in its place.
Place = tuple[nn.Sequential, int]


def places(model: nn.Module) -> list[Place]:
    """Return the places of all blocks that preserve the shape of their input."""
    stages = [model.layer1, model.layer2, model.layer3]
    return [(s, i) for s in stages for i, b in enumerate(s) if b.conv1.in_channels == b.conv2.out_channels]


def put(blocks: dict[Place, nn.Module]) -> dict[Place, nn.Module]:
    """Put each block in its place, and return the blocks that were there."""
    before = {(stage, i): stage[i] for stage, i in blocks}
    for (stage, i), block in blocks.items():
        stage[i] = block
    return before


def lesions(model: nn.Module, images: Images, epoch: int) -> list[Row]:
    """Return a row for each lesion of the trained model: its test error. The model is the same afterwards."""
    if epoch == 0:
        return []
    device = next(model.parameters()).device.type
    rows, found, chance = [], places(model), random.Random(0)

    def test(study: str, amount: int, draw: int, blocks: dict[Place, nn.Module]) -> None:
        """Add the row of the model with these blocks in these places."""
        before = put(blocks)
        error = test_error(model, images, device)
        put(before)
        rows.append({"epoch": epoch, "study": study, "amount": amount, "draw": draw, "test_error": error})

    test("none", 0, 0, {})
    for number, place in enumerate(found, 1):
        test("delete the block", number, 0, {place: nn.Identity()})
    for amount in range(1, len(found) + 1, max(1, len(found) // 8)):
        for draw in range(DRAWS):
            test("delete so many", amount, draw, {p: nn.Identity() for p in chance.sample(found, amount)})
            test("swap so many", amount, draw, swapped(found, amount, chance))
    return rows


def swapped(found: list[Place], amount: int, chance: random.Random) -> dict[Place, nn.Module]:
    """Return the blocks by place after `amount` random exchanges of two blocks of the same stage."""
    blocks = {(stage, i): stage[i] for stage, i in found}
    for _ in range(amount):
        stage, i = chance.choice(found)
        others = [place for place in found if place[0] is stage and place[1] != i]
        if others:
            other = chance.choice(others)
            blocks[stage, i], blocks[other] = blocks[other], blocks[stage, i]
    return blocks


def runs(args: argparse.Namespace, images: Images) -> Iterable[Run]:
    shallow = [d for d in args.depths if d in (18, 34)]
    if shallow:
        raise ValueError(f"depths: expected networks for small images, 6n + 2 layers, got {shallow[0]}")
    return grid(args, KINDS, lambda kind, depth: network(kind, depth, args, images), lesions)


def draw(figure: Any, rows: list[Row]) -> None:
    studies = ("delete the block", "delete so many", "swap so many")
    labels = ("number of the block deleted", "blocks deleted", "exchanges of two blocks")
    rows = [row | {"test_error": 100 * row["test_error"]} for row in rows]
    for axes, study, label in zip(figure.subplots(1, 3, sharey=True), studies, labels, strict=True):
        for color, kind in zip(COLORS, KINDS, strict=False):
            chosen = select(rows, net=kind, study=study)
            band(axes, chosen, "amount", "test_error", kind, color=color, marker=".")
            whole = statistics.fmean(row["test_error"] for row in select(rows, net=kind, study="none"))
            axes.axhline(whole, color=color, linestyle=":", linewidth=1)
        axes.set(xlabel=label, ylim=(0, 100))
        whole_numbers(axes)
    figure.axes[0].set_ylabel("test error, % (dotted: whole network)")
    figure.axes[0].legend(frameon=False)


def verdict(rows: list[Row]) -> list[str]:
    sentences, lost = [], {}
    for kind in KINDS:
        whole, one = (
            statistics.fmean(row["test_error"] for row in select(rows, net=kind, study=study))
            for study in ("none", "delete the block")
        )
        lost[kind] = one - whole
        worst = max(row["test_error"] for row in select(rows, net=kind, study="delete the block"))
        sentences.append(
            f"{kind}: test error {100 * whole:.1f}% of the whole network; with one block deleted {100 * one:.1f}% in "
            f"the mean over the blocks and {100 * worst:.1f}% at worst"
        )
    shown = lost["residual"] < lost["plain"] / 2
    sentences.append(
        f"A deleted block costs {100 * lost['plain']:.1f} points of test error without shortcuts and "
        f"{100 * lost['residual']:.1f} points with them: the paper's effect is {'shown' if shown else 'NOT shown'}. It "
        "counts as shown if the second number is below half of the first."
    )
    return sentences


EXPERIMENT = Experiment(
    "lesions",
    "Lesions",
    {
        "digits": {"depths": [32]},
        "cifar": {"depths": [56]},
        "folder": SMALL_IMAGES | {"depths": [56]},
    },
    runs,
    draw,
    verdict,
    (10, 3.6),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
