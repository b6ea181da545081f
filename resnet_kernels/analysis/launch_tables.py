"""The table that `resnet-kernels kernels` prints: the launches of a frozen model, compiled for a GPU architecture.

No GPU is needed. Columns of the table:

    n                       consecutive launches that are the same
    kernel, computes        the kernel, and the convolution or pass it computes
    tile                    rows by columns by terms of the reduction that a program instance computes at a time
    registers, shared KB    per thread; per program instance
    a multiprocessor holds  program instances that fit on one multiprocessor
    instructions            matrix products, bulk and asynchronous copies, and maxima that propagate NaN
    MB moved                device memory that must be read and written
    MB copied               read by all program instances together, mostly from L2
    issued                  operations that the tiles execute, padding included, over those that are needed
    floor, predicted us     of one launch, where the GPU's ceilings are known
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import nn

from ..backends.gpu import offline
from ..backends.gpu.launch import Launch
from .roofline import H200, Ceilings, launches_of

HEADER = (
    "n | kernel | computes | tile | warps, stages | registers | shared KB | a multiprocessor holds | instructions | "
    "MB moved | MB copied | issued"
)
TIMES = " | floor us | predicted us"


def _tile(launch: Launch) -> str:
    """Return the tile's rows (M, or images x height x width), columns (N) and depth (K)."""
    a = launch.arguments
    if "BOX_N" in a:
        rows = f"{a['BOX_N']}x{a['BOX_H']}x{a['BOX_W']}"
    else:
        rows = str(a.get("BLOCK_M", a.get("BLOCK_Q")))
    return f"{rows} by {a['BLOCK_N']} by {a.get('BLOCK_K', a.get('BLOCK_E'))}"


def _row(count: int, launch: Launch, c: offline.Compiled, ceilings: Ceilings | None) -> str:
    instructions = [f"{n} {name}" for name, n in c.matrix.items()]
    if c.bulk_copies:
        instructions.append(f"{c.bulk_copies} tensor copies")
    if c.async_copies:
        instructions.append(f"{c.async_copies} cp.async")
    instructions.append(f"{c.nan_max} max.NaN")
    w = launch.work
    cells = [
        count,
        launch.name,
        launch.what,
        _tile(launch),
        f"{launch.options['num_warps']}, {launch.options.get('num_stages', 1)}",
        c.registers,
        f"{c.shared / 1024:.0f}",
        c.programs,
        ", ".join(instructions),
        f"{w.bytes / 1e6:.0f}",
        f"{w.copied / 1e6:.0f}",
        f"{w.issued / w.flops:.2f}x",
    ]
    if ceilings is not None:
        cells += [f"{1e6 * seconds:.0f}" for seconds in (ceilings.floor(w), ceilings.predicted(w))]
    return " | ".join(map(str, cells))


def table(model: nn.Module, images: torch.Tensor, arch: int) -> Iterator[str]:
    """Yield the lines of the Markdown table of `freeze(model)(images)` and its totals.

    Consecutive launches that are the same share a row. Times are given where the architecture's ceilings are known,
    which is sm_90 (measured on an H200).

    Args:
        model, images: only their sizes and dtype matter.
        arch: 90 is sm_90.
    Raises:
        RuntimeError: the compiled code of a launch is unsound.
    """
    launches = launches_of(model, images, arch)
    ceilings = H200 if arch == 90 else None
    header = HEADER + (TIMES if ceilings else "")
    yield f"| {header} |"
    yield "|" + " --- |" * (header.count("|") + 1)
    for (_, what), same in itertools.groupby(launches, lambda made: (offline.specialize(made, arch)[0], made.what)):
        rows = list(same)
        c = offline.read(rows[0], arch)
        if c.wrong():
            raise RuntimeError(f"{what} for sm_{arch}: {'; '.join(c.wrong())}")
        yield f"| {_row(len(rows), rows[0], c, ceilings)} |"
    N = images.shape[0]
    total = {
        "MB moved": sum(made.work.bytes for made in launches) / N / 1e6,
        "MB copied": sum(made.work.copied for made in launches) / N / 1e6,
        "GFLOP needed": sum(made.work.flops for made in launches) / N / 1e9,
        "GFLOP issued": sum(made.work.issued for made in launches) / N / 1e9,
    }
    yield ""
    totals = ", ".join(f"{value:.1f} {name}" for name, value in total.items())
    yield f"{len(launches)} launches; per image {totals}."
    if ceilings is None:
        return
    floor, predicted = (sum(f(made.work) for made in launches) for f in (ceilings.floor, ceilings.predicted))
    yield (
        f"At the ceilings of an {ceilings.name} the launches take at least {1e6 * floor:.0f} us "
        f"({N / floor:,.0f} images/s); predicted are {1e6 * predicted:.0f} us ({N / predicted:,.0f} images/s)."
    )
