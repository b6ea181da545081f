"""`resnet-kernels kernels`: what the Triton backend launches for a model, compiled for GPUs that need not be here."""

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
    a = launch.arguments
    if "BOX_N" in a:
        rows = f"{a['BOX_N']}x{a['BOX_H']}x{a['BOX_W']}"
    else:
        rows = str(a.get("BLOCK_M", a.get("BLOCK_Q")))
    return f"{rows} by {a['BLOCK_N']} by {a.get('BLOCK_K', a.get('BLOCK_E'))}"


def _row(count: int, launch: Launch, c: offline.Compiled, ceilings: Ceilings | None) -> str:
    kinds = [f"{n} {name}" for name, n in c.matrix.items()]
    kinds += [f"{c.bulk_copies} tensor copies"] * (c.bulk_copies > 0) + [f"{c.async_copies} cp.async"] * (
        c.async_copies > 0
    )
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
        ", ".join([*kinds, f"{c.nan_max} max.NaN"]),
        f"{w.bytes / 1e6:.0f}",
        f"{w.copied / 1e6:.0f}",
        f"{w.issued / w.flops:.2f}x",
    ]
    if ceilings is not None:
        cells += [f"{1e6 * seconds:.0f}" for seconds in (ceilings.floor(w), ceilings.predicted(w))]
    return " | ".join(map(str, cells))


def table(model: nn.Module, images: torch.Tensor, arch: int) -> Iterator[str]:
    """Markdown. Launches that follow each other and are the same share a row. Times where the ceilings are known."""
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
        "MB an image moved": sum(made.work.bytes for made in launches) / N / 1e6,
        "MB an image copied": sum(made.work.copied for made in launches) / N / 1e6,
        "GFLOP an image": sum(made.work.flops for made in launches) / N / 1e9,
        "GFLOP an image issued": sum(made.work.issued for made in launches) / N / 1e9,
    }
    yield ""
    yield f"{len(launches)} launches; " + ", ".join(f"{value:.1f} {name}" for name, value in total.items()) + "."
    if ceilings is None:
        return
    floor, predicted = (sum(f(made.work) for made in launches) for f in (ceilings.floor, ceilings.predicted))
    yield (
        f"At {ceilings.name}'s ceilings at least {1e6 * floor:.0f} us, {N / floor:,.0f} images/s; predicted "
        f"{1e6 * predicted:.0f} us, {N / predicted:,.0f} images/s."
    )
