"""Selects rows of an experiment's results, states them in words, and draws them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

# A row of an experiment's CSV file, by column.
Row = dict[str, Any]
COLORS = ("#1f4e9c", "#c2410c", "#15803d", "#7e22ce", "#64748b", "#be123c")
LINES = ("-", "--", ":")


def select(rows: Iterable[Row], **values: Any) -> list[Row]:
    """Return the rows that have these values in these columns."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def values_of(rows: Iterable[Row], column: str) -> list[Any]:
    """Return the distinct values of a column, in order of appearance."""
    return list(dict.fromkeys(row[column] for row in rows))


def final(rows: list[Row], column: str, **values: Any) -> list[float]:
    """Return a column of the last epoch, one value per seed, from the rows that `select` returns."""
    chosen = select(rows, **values)
    return [row[column] for row in chosen if row["epoch"] == max(r["epoch"] for r in chosen)]


def spread(shares: Sequence[float]) -> str:
    """Return the mean in percent; with several seeds also the least, the greatest and the number of seeds."""
    text = f"{100 * statistics.fmean(shares):.1f}%"
    if len(shares) == 1:
        return text
    return f"{text} ({100 * min(shares):.1f} to {100 * max(shares):.1f}, {len(shares)} seeds)"


def errors_by_kind(rows: list[Row], kinds: Iterable[str], depth: int) -> tuple[dict[str, float], list[str]]:
    """Return (the mean test error of the last epoch by kind of network, a sentence for each kind)."""
    mean, sentences = {}, []
    for kind in kinds:
        train, test = (final(rows, column, net=kind, depth=depth) for column in ("train_error", "test_error"))
        mean[kind] = statistics.fmean(test)
        sentences.append(f"{kind}, {depth} layers: training error {spread(train)}, test error {spread(test)}")
    return mean, sentences


def whole_numbers(axes: Any) -> None:
    """Label the x axis at whole numbers only: there is no epoch 1.25."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def band(axes: Any, rows: list[Row], x: str, y: str, label: str, **style: Any) -> None:
    """Draw the mean of the seeds against x, and a band between the least and the greatest of them."""
    points = values_of(rows, x)
    found = [[row[y] for row in select(rows, **{x: p})] for p in points]
    (line,) = axes.plot(points, [statistics.fmean(v) for v in found], label=label, **style)
    if any(len(v) > 1 for v in found):
        low, high = [min(v) for v in found], [max(v) for v in found]
        axes.fill_between(points, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def style_of_plain_or_residual(kind: str, depth: int, depths: list[int]) -> Row:
    """Return a line's style: a color per depth, dashed for plain networks."""
    return {"color": COLORS[depths.index(depth)], "linestyle": "--" if kind == "plain" else "-"}


def error_curves(figure: Any, rows: list[Row], label: Callable[[Row], str], style: Callable[[Row], Row]) -> None:
    """Draw training and test error by epoch, side by side, with a line for each distinct label."""
    rows = [row | {"label": label(row)} for row in rows]
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, column, title in ((left, "train_error", "training"), (right, "test_error", "test")):
        for name in values_of(rows, "label"):
            chosen = select(rows, label=name)
            percent = [row | {column: 100 * row[column]} for row in chosen]
            band(axes, percent, "epoch", column, name, **style(chosen[0]))
        axes.set(xlabel="epoch", title=f"{title} error, %", ylim=(0, None))
        whole_numbers(axes)
    right.legend(frameon=False)


def error_curves_by_kind(kinds: Sequence[str], name: Callable[[str], str] = str) -> Callable[[Any, list[Row]], None]:
    """Return a function that draws `error_curves` with a color per kind of network and a line style per depth.

    name: returns the legend's text for a kind.
    """

    def draw(figure: Any, rows: list[Row]) -> None:
        depths = values_of(rows, "depth")

        def style(row: Row) -> Row:
            line = LINES[depths.index(row["depth"]) % len(LINES)]
            return {"color": COLORS[kinds.index(row["net"])], "linestyle": line}

        error_curves(figure, rows, lambda row: f"{name(row['net'])}, {row['depth']} layers", style)

    return draw
