"""Draw docs/figures/headline.png and write its numbers beside it, from the files in benchmarks/results.

    python -m benchmarks.headline [--out docs/figures]

`make readme` runs it. A test holds the numbers to the results files.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from resnet_kernels.analysis import plots
from resnet_kernels.analysis.results import write_atomically
from resnet_kernels.analysis.rows import Comparison, comparisons, label_with_mode

RESULTS = Path(__file__).parent / "results"
HEADINGS = "machine,section,model,dtype,batch,ours,images/s,best peer,images/s of the peer,factor"


def ordered(found: Sequence[Comparison]) -> list[Comparison]:
    """GPUs first, then by machine; inference before training, large batches before small ones."""
    return sorted(found, key=lambda c: (c.facts["device"] == "cpu", c.machine, c.ours.section, -c.ours.batch))


def table(found: Sequence[Comparison]) -> str:
    """The numbers of the figure as CSV."""
    lines = [HEADINGS]
    for c in ordered(found):
        ours, best = c.ours, c.best
        cells = [c.machine.replace(",", ""), ours.section, ours.case, ours.dtype, ours.batch, label_with_mode(ours)]
        cells[-1] = str(cells[-1]).replace(",", "")
        cells += [f"{ours.images_per_second:.6g}", label_with_mode(best), f"{best.images_per_second:.6g}"]
        lines.append(",".join(map(str, [*cells, f"{c.factor:.2f}"])))
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="folder (default: docs/figures)")
    out = parser.parse_args(argv).out
    found = comparisons(RESULTS)
    write_atomically(out / "headline.csv", table(found))
    plots.headline(ordered(found)).savefig(out / "headline.png", dpi=120, metadata={"Software": None})
    print(out / "headline.png")


if __name__ == "__main__":
    main()
