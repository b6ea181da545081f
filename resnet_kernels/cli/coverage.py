"""A table of what `replace_blocks` replaces in torchvision's and timm's models, for the command and for the documents.

The models are built on the meta device, where weights take no memory. One of each distinct replaced block is run on the
CPU, in evaluation and in training, and `explain` reports whether it runs fused.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from rich.console import Console
from torch import nn

from ..analysis.report import Part, markdown_table
from ..analysis.results import Row, write_atomically
from ..analysis.rows import NONE, comparisons
from ..explain import explain
from ..replace import ReplacementReport, replace_blocks


class Family(NamedTuple):
    """Models of a library that share one row of the table."""

    library: str
    title: str
    names: tuple[str, ...]


FAMILIES = (
    Family("torchvision", "ResNet", ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")),
    Family("torchvision", "ResNeXt", ("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d")),
    Family("torchvision", "Wide ResNet", ("wide_resnet50_2", "wide_resnet101_2")),
    Family("torchvision", "DenseNet", ("densenet121", "densenet161", "densenet169", "densenet201")),
    Family("torchvision", "FCN", ("fcn_resnet50", "fcn_resnet101")),
    Family("torchvision", "DeepLabV3", ("deeplabv3_resnet50", "deeplabv3_resnet101")),
    Family("torchvision", "Faster R-CNN", ("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2")),
    Family("torchvision", "Mask R-CNN", ("maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2")),
    Family("torchvision", "Keypoint R-CNN", ("keypointrcnn_resnet50_fpn",)),
    Family("torchvision", "RetinaNet", ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2")),
    Family("timm", "ResNet", ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")),
    Family("timm", "ResNet-D", ("resnet18d", "resnet50d")),
    Family("timm", "ResNeXt", ("resnext50_32x4d", "resnext101_32x8d")),
    Family("timm", "Wide ResNet", ("wide_resnet50_2",)),
    Family("timm", "SE-ResNet", ("seresnet50", "seresnext50_32x4d")),
    Family("timm", "ECA-ResNet", ("ecaresnet50d",)),
    Family("timm", "ResNet with anti-aliasing", ("resnetblur50", "resnetaa50")),
    Family("timm", "ResNetV2", ("resnetv2_50", "resnetv2_50d")),
    Family("timm", "ResNetV2 with group norm (BiT)", ("resnetv2_50x1_bit",)),
    Family("timm", "DenseNet", ("densenet121",)),
)
HEADINGS = ["", "blocks replaced", "left alone", "in evaluation", "in training", "measured: ours / best peer"]


def make(library: str, name: str) -> nn.Module:
    """Return the model on the meta device."""
    with torch.device("meta"):
        if library == "timm":
            return importlib.import_module(library).create_model(name)
        options = inspect.signature(torchvision.models.get_model_builder(name)).parameters
        without = {key: None for key in ("weights", "weights_backbone") if key in options}
        return torchvision.models.get_model(name, **without)


def _why_plain(block: nn.Module, training: bool) -> str | None:
    """Return why a replaced block runs as plain modules on a CPU, or None if it runs fused."""
    block = copy.deepcopy(block).to_empty(device="cpu").train(training)
    with torch.no_grad():
        for t in (*block.parameters(), *block.buffers()):
            t.zero_()
    channels = next(m.in_channels for m in block.modules() if isinstance(m, nn.Conv2d))
    found = explain(block, torch.zeros(2, channels, 8, 8))
    return found[0].why_plain if found else "explain does not know this kind of block"


def _runs(model: nn.Module, names: Iterable[str], training: bool) -> Counter[str | None]:
    """Count the blocks by the reason why they run as plain modules; the key None counts those that run fused."""
    reasons: dict[str, str | None] = {}
    found: Counter[str | None] = Counter()
    for name in names:
        block = model.get_submodule(name)
        # Blocks that print alike have the same parts and sizes.
        key = f"{type(block)} {block}"
        if key not in reasons:
            reasons[key] = _why_plain(block, training)
        found[reasons[key]] += 1
    return found


def _described(reasons: Counter[str | None]) -> str:
    fused = reasons.pop(None, 0)
    if not reasons:
        return "fused" if fused else NONE
    return "; ".join([*([f"{fused} fused"] if fused else []), *(f"{n} plain: {why}" for why, n in reasons.items())])


def _without_names(reason: str) -> str:
    """Strip the modules from class names: the row names the library."""
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", reason)


def line(family: Family, rows: Sequence[tuple[str, Row, Row]] = ()) -> list[str]:
    """Return the family's row of the table. rows: the result of `measured`."""
    counts, runs = [], {False: Counter[str | None](), True: Counter[str | None]()}
    left: Counter[str] = Counter()
    stems = True
    for name in family.names:
        model = make(family.library, name)
        report: ReplacementReport = replace_blocks(model)
        counts.append(f"{name} {len(report.replaced)}")
        left.update(map(_without_names, report.skipped.values()))
        if not report.replaced and not report.skipped:
            left["no block of a known kind"] += 1
        stems = stems and bool(report.stems)
        for training, found in runs.items():
            found.update(_runs(model, report.replaced, training))
    in_training = _described(runs[True]) + (", the stem too" if stems else "")
    alone = "; ".join(f"{n}: {why}" for why, n in left.items()) or NONE
    heading = f"{family.library} {family.title}"
    return [heading, ", ".join(counts), alone, _described(runs[False]), in_training, _speed(family, rows)]


def _speed(family: Family, rows: Sequence[tuple[str, Row, Row]]) -> str:
    if family.library != "torchvision":
        return NONE
    runs: dict[tuple[str, str, str], list[str]] = {}
    for where, ours, peer in rows:
        if ours.case in family.names:
            factor = (peer.seconds or 0) / (ours.seconds or 1)
            runs.setdefault((ours.section, ours.dtype, where), []).append(f"{ours.case} {factor:.2f}x")
    factors = [f"{section} {', '.join(cases)} ({dtype}, {where})" for (section, dtype, where), cases in runs.items()]
    return "; ".join(factors) or NONE


def measured(folder: Path) -> list[tuple[str, Row, Row]]:
    """Return (name of the file, our fastest row, the best peer's row) for every model in the folder's results files.

    See `comparisons`: files of commits with local changes do not count.
    """
    return [(c.source, c.ours, c.best) for c in comparisons(folder)]


def missing(families: Sequence[Family]) -> list[str]:
    """Return the families' libraries that are not installed."""
    libraries = dict.fromkeys(family.library for family in families)
    return [name for name in libraries if importlib.util.find_spec(name) is None]


def table(results: Path, families: Sequence[Family] | None = None) -> str:
    """Return Markdown: a row per family, and notes on missing libraries and missing results.

    Args:
        results: folder of results files; without any, the last column is empty, and a note says so.
        families: `FAMILIES` by default.
    """
    families = FAMILIES if families is None else families
    absent, rows = missing(families), measured(results)
    lines = [line(family, rows) for family in families if family.library not in absent]
    notes = [f"{name} is not installed: its models are not listed." for name in absent]
    if not any(results.glob("*.json")):
        notes.append(f"{results} holds no results files, so the last column is empty; --results names their folder.")
    # Columns of words are aligned to the left.
    words = markdown_table(Part("", headings=HEADINGS, rows=lines)).replace("---:", "---")
    return "\n\n".join([words, *notes])


BLOCK = re.compile(r"^(<!-- coverage -->\n)(.*?)^(<!-- end of coverage -->)$", re.M | re.S)


def readme(path: Path, text: str) -> None:
    """Write the table between `<!-- coverage -->` and `<!-- end of coverage -->`. Raises ValueError without these."""
    if not path.is_file():
        raise ValueError(f"readme: expected a file, got {path}, which is not a file")
    old = path.read_text()
    if len(BLOCK.findall(old)) != 1:
        raise ValueError(f"{path}: expected one '<!-- coverage -->' followed by '<!-- end of coverage -->'")
    write_atomically(path, BLOCK.sub(lambda m: f"{m[1]}\n{text}\n\n{m[3]}", old))


def coverage(console: Console, results: Path | None, path: Path | None) -> int:
    """Print the table, or write it into the file at `path`. Returns the exit code."""
    folder = results or (path.resolve().parent if path else Path()) / "benchmarks" / "results"
    text = table(folder)
    if path is None:
        print(text)
        return 0
    readme(path, text)
    console.print(f"{path}: table of replaced blocks written", markup=False, highlight=False)
    return 0
