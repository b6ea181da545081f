"""Rows of results: which ones, what they say in words, and how they are drawn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]
COLORS = ("#1f4e9c", "#c2410c", "#15803d", "#7e22ce", "#64748b", "#be123c")


def select(rows: Iterable[Row], **values: Any) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def values_of(rows: Iterable[Row], column: str) -> list[Any]:
    """The different ones, in order."""
    return list(dict.fromkeys(row[column] for row in rows))


def final(rows: list[Row], column: str, **values: Any) -> list[float]:
    """Of the last epoch, a number for each seed."""
    chosen = select(rows, **values)
    return [row[column] for row in chosen if row["epoch"] == max(r["epoch"] for r in chosen)]


def spread(shares: Sequence[float]) -> str:
    """Their mean in percent, and the least and greatest where there are several."""
    text = f"{100 * statistics.fmean(shares):.1f}%"
    if len(shares) == 1:
        return text
    return f"{text} ({100 * min(shares):.1f} to {100 * max(shares):.1f}, {len(shares)} seeds)"


def band(axes: Any, rows: list[Row], x: str, y: str, label: str, **style: Any) -> None:
    """The mean of the seeds against x, and between the least and the greatest a band."""
    points = values_of(rows, x)
    found = [[row[y] for row in select(rows, **{x: p})] for p in points]
    (line,) = axes.plot(points, [statistics.fmean(v) for v in found], label=label, **style)
    if any(len(v) > 1 for v in found):
        low, high = [min(v) for v in found], [max(v) for v in found]
        axes.fill_between(points, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def error_curves(figure: Any, rows: list[Row], label: Callable[[Row], str], style: Callable[[Row], Row]) -> None:
    """Training and test error by epoch, side by side, a line for each different label."""
    rows = [row | {"label": label(row)} for row in rows]
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, column, title in ((left, "train_error", "training"), (right, "test_error", "test")):
        for name in values_of(rows, "label"):
            chosen = select(rows, label=name)
            percent = [row | {column: 100 * row[column]} for row in chosen]
            band(axes, percent, "epoch", column, name, **style(chosen[0]))
        axes.set(xlabel="epoch", title=f"{title} error, %", ylim=(0, None))
    right.legend(frameon=False)
