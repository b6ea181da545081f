"""Naming, grouping and formatting of the rows of results files: what tables and plots share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .results import STATUSES, Results, Row, best_peer, load

K = TypeVar("K", bound=Hashable)
NONE = "–"
MODELS = ("inference", "training")
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float | None, scale: float = 1.0) -> str:
    """The value times `scale` with three significant digits and without an exponent; "–" for None."""
    if value is None:
        return NONE
    value *= scale
    # The rounded value decides how many decimals there are: 9.996 is written 10.0.
    decimals = 2 - math.floor(math.log10(abs(float(f"{value:.3g}")))) if value else 0
    return f"{value:,.{max(0, decimals)}f}"


def unit(largest: float) -> tuple[float, str]:
    """The (size, letter) of the decimal prefix that suits values up to `largest`."""
    return next((p for p in PREFIXES if largest >= p[0]), (1.0, ""))


def quantity(value: float, of: str) -> str:
    """The value with the decimal prefix that suits it, in the unit `of`: 4.26e12 and "B/s" give "4.26 TB/s"."""
    size, prefix = unit(value)
    return f"{number(value, 1 / size)} {prefix}{of}"


def label(row: Row) -> str:
    """The name of a row's provider in tables and plots."""
    return row.provider if row.peer else f"ours, {row.provider}"


def label_with_mode(row: Row) -> str:
    """Return `label`, with " (graph)" where the row times the replay of a CUDA graph."""
    return label(row) + (" (graph)" if row.mode == "graph" else "")


def peers_first(rows: Iterable[Row]) -> list[Row]:
    """The rows in their order, but all of the peers' before all of ours."""
    return sorted(rows, key=lambda r: not r.peer)


def by(rows: Iterable[Row], key: Callable[[Row], K]) -> dict[K, list[Row]]:
    """The rows grouped by a key. Groups, and the rows within one, stay in the order of the argument."""
    found: dict[K, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def faster_modes(rows: Iterable[Row]) -> dict[str, Row]:
    """The row of each provider's faster mode, by label. A provider without a time has its row of the best status."""
    return {
        name: min(same, key=lambda r: (STATUSES.index(r.status), r.seconds or math.inf))
        for name, same in by(peers_first(rows), label).items()
    }


def distinct(results: Results, rows: Sequence[Row]) -> list[Row]:
    """The rows without the ones that repeat a measurement of the same implementation.

    On a CPU the backend `cpu` is the first candidate. Where "frozen cpu" ran, "frozen" ran the same code, and one of
    the two is enough.
    """
    if results.facts.get("device") != "cpu":
        return list(rows)
    automatic = {(r.group, r.provider) for r in rows if not r.peer and r.status == "ok"}

    def repeats(row: Row) -> bool:
        name = row.provider.removesuffix(" cpu")
        return not row.peer and row.status == "ok" and name != row.provider and (row.group, name) in automatic

    return [row for row in rows if not repeats(row)]


def describe(rows: Sequence[Row]) -> str:
    """The properties that the rows share: model or block, dtype, batch and size."""
    first = rows[0]
    parts = {r.part for r in rows}
    names = [first.case, *(p for p in parts if p and len(parts) == 1), first.dtype, f"batch {first.batch}"]
    return ", ".join(names + [f"{first.size} x {first.size}"] * (first.size > 0))


def best_of_ours(rows: Iterable[Row]) -> Row | None:
    """Our fastest row that has a time, in either mode."""
    return min((r for r in rows if not r.peer and r.seconds), key=lambda r: r.seconds or 0.0, default=None)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Our fastest row of a model, beside every peer of the same machine that is at least as accurate.

    source: name of the results file that holds `ours`. facts: the facts of that file.
    """

    source: str
    facts: dict[str, Any]
    ours: Row
    best: Row
    peers: tuple[Row, ...]

    @property
    def factor(self) -> float:
        """Our speed over the best peer's; below 1 is a loss."""
        return (self.best.seconds or 0.0) / (self.ours.seconds or 1.0)

    @property
    def machine(self) -> str:
        """The machine as the facts name it."""
        words = [str(self.facts["processor"])]
        if self.facts["device"] == "cpu":
            words += [f"{self.facts.get('capability', '')}, {self.facts.get('threads', '?')} threads"]
        return " ".join(words)


def is_clean(results: Results) -> bool:
    """Return whether the file was measured from a commit, without local changes."""
    return not str(results.facts["commit"]).endswith("-dirty")


def comparisons(folder: Path) -> list[Comparison]:
    """Our fastest row of every measured model, against the best peer a user of that machine could have run.

    Peers are those of the same dtype and those of fp32, which is at least as accurate as any other; they may come from
    another run on the same machine. Files of commits with local changes ("-dirty") are left out. Gains and losses alike
    are returned.

    Args:
        folder: a folder of results files, such as benchmarks/results.
    """
    files = [(path.stem, load(path)) for path in sorted(folder.glob("*.json"))]
    files = [(stem, results) for stem, results in files if is_clean(results)]
    rows: dict[tuple, list[Row]] = {}
    for _, results in files:
        for row in results.rows:
            if row.section in MODELS and row.peer and row.status == "ok" and row.seconds:
                rows.setdefault(_problem(results.facts, row), []).append(row)
    found = []
    for stem, results in files:
        for same in results.groups().values():
            ours = best_of_ours(same)
            if ours is None or ours.section not in MODELS or ours.part:
                continue
            peers = [r for r in rows.get(_problem(results.facts, ours), []) if r.dtype in (ours.dtype, "fp32")]
            best = best_peer(peers)
            if best is not None:
                found.append(Comparison(stem, results.facts, ours, best, tuple(peers)))
    return found


def _problem(facts: dict[str, Any], row: Row) -> tuple:
    """Equal for rows of one model, batch and size on one machine, whatever the dtype and the run."""
    host = () if facts["device"] == "cuda" else (facts.get("capability"), facts.get("threads"))
    return facts["processor"], host, row.section, row.case, row.part, row.batch, row.size
