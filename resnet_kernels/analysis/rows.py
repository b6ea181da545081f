"""How rows of a results file are named, grouped and written as text: what tables and plots share."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from .results import STATUSES, Row

K = TypeVar("K", bound=Hashable)
NONE = "–"
MODELS = ("inference", "training")
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float | None, scale: float = 1.0) -> str:
    """Scaled, with three digits that count, without an exponent."""
    if value is None:
        return NONE
    value *= scale
    # 9.996 is 10.0: what it rounds to says how many decimals.
    decimals = 2 - math.floor(math.log10(abs(float(f"{value:.3g}")))) if value else 0
    return f"{value:,.{max(0, decimals)}f}"


def unit(largest: float) -> tuple[float, str]:
    """The prefix in which values up to the largest read best: its size, its letter."""
    return next((p for p in PREFIXES if largest >= p[0]), (1.0, ""))


def quantity(value: float, of: str) -> str:
    size, prefix = unit(value)
    return f"{number(value, 1 / size)} {prefix}{of}"


def label(row: Row) -> str:
    return row.provider if row.peer else f"ours, {row.provider}"


def label_with_mode(row: Row) -> str:
    return label(row) + (" (graph)" if row.mode == "graph" else "")


def peers_first(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda r: not r.peer)


def by(rows: Iterable[Row], key: Callable[[Row], K]) -> dict[K, list[Row]]:
    """Rows with the same key, in the order they came."""
    found: dict[K, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def faster_modes(rows: Iterable[Row]) -> dict[str, Row]:
    """By label, the row of the provider's faster mode; the first in the order of STATUSES where none has a time."""
    return {
        name: min(same, key=lambda r: (STATUSES.index(r.status), r.seconds or math.inf))
        for name, same in by(peers_first(rows), label).items()
    }


def describe(rows: Sequence[Row]) -> str:
    """What the rows have in common: model or block, dtype, batch and size."""
    first = rows[0]
    parts = {r.part for r in rows}
    names = [first.case, *(p for p in parts if p and len(parts) == 1), first.dtype, f"batch {first.batch}"]
    return ", ".join(names + [f"{first.size} x {first.size}"] * (first.size > 0))


def best_of_ours(rows: Iterable[Row]) -> Row | None:
    return min((r for r in rows if not r.peer and r.seconds), key=lambda r: r.seconds or 0.0, default=None)
