"""Figures of a results file: roofline, speed against each peer, memory, and where the time of a forward goes.

A provider has one colour in all of them: ours are blue, eager ways of PyTorch grey, other peers orange.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence

from matplotlib import RcParams, rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .results import Results, Row
from .rows import (
    MODELS,
    best_of_ours,
    by,
    describe,
    faster_modes,
    label,
    label_with_mode,
    number,
    peers_first,
    quantity,
    unit,
)

INK, QUIET, LOSS = "#1f2937", "#6b7280", "#b91c1c"
FAMILIES = {
    "ours": ("#0b2f7a", "#2f7be5", "#7dd3fc"),
    "eager": ("#4b5563", "#b9c0ca"),
    "other": ("#7c2d12", "#ea580c", "#fcd34d"),
}
WIDTH = 11.0
STYLE = RcParams(
    {
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.edgecolor": QUIET,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.titlesize": 11,
        "figure.facecolor": "white",
        # The same file gives the same bytes.
        "svg.hashsalt": "resnet_kernels",
    }
)


@dataclasses.dataclass
class Gallery:
    """Figures of one kind by name, and what they show, or why there are none."""

    title: str
    text: str
    figures: dict[str, Figure]


def galleries(results: Results) -> list[Gallery]:
    """All that the rows and facts allow."""
    with rc_context(STYLE):
        return [f(results) for f in (rooflines, speedups, memory, waterfalls)]


def data_uri(figure: Figure) -> str:
    """The figure as SVG inside a URI."""
    file = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def colours(results: Results) -> dict[str, str]:
    """By label of a provider."""
    families: dict[str, list[str]] = {name: [] for name in FAMILIES}
    for name, rows in by(results.rows, label).items():
        kind = "ours" if not rows[0].peer else "eager" if rows[0].provider.startswith("eager") else "other"
        families[kind].append(name)
    return {
        name: to_hex(LinearSegmentedColormap.from_list(kind, FAMILIES[kind])(i / max(1, len(names) - 1)))
        for kind, names in families.items()
        for i, name in enumerate(names)
    }


def _title(what: str, rows: Sequence[Row], results: Results) -> str:
    cases = list(dict.fromkeys(r.case for r in rows))
    batches = sorted({r.batch for r in rows})
    names = ", ".join(cases) if len(cases) <= 3 else f"{len(cases)} cases"
    batch = f"batch{'es' * (len(batches) > 1)} {', '.join(map(str, batches))}"
    return f"{what}\n{names}; {rows[0].dtype}; {batch}; {results.facts['processor']}"


def _panels(
    title: str, names: Sequence[str], across: int, height: float, sharex: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each name, in lines of so many."""
    across = min(across, len(names))
    lines = math.ceil(len(names) / across)
    figure = Figure(figsize=(WIDTH, 0.7 + lines * height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    grid = list(figure.subplots(lines, across, squeeze=False, sharex=sharex, sharey=True).flat)
    for axes, name in zip(grid, names, strict=False):
        axes.set_title("\n".join(textwrap.fill(line, 120 // across) for line in name.split("\n")))
        # Panels of a line above others would have no numbers.
        axes.tick_params(axis="x", labelbottom=True)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    return figure, grid[: len(names)]


def _stem(*words: object) -> str:
    return "-".join("".join(c if c.isalnum() or c in "_." else "-" for c in str(w)) for w in words)


@dataclasses.dataclass
class Bar:
    """value: None where there is only the text."""

    name: str
    value: float | None
    text: str
    colour: str = QUIET
    ink: str = INK


def _bars(axes: Axes, bars: Sequence[Bar], names: Sequence[str], xlabel: str, start: float = 0.0) -> None:
    """Horizontal ones, each in the line of its name, with its text on the right."""
    for bar in bars:
        line, end = names.index(bar.name), start if bar.value is None else bar.value
        axes.barh(line, end - start, left=start, color=bar.colour, height=0.72)
        _write(axes, bar.text, max(start, end), line, bar.ink)
    _lines(axes, names, xlabel)


def _write(axes: Axes, text: str, x: float, line: int, ink: str) -> None:
    axes.annotate(text, (x, line), (4, 0), textcoords="offset points", va="center", color=ink, fontsize=8)


def _lines(axes: Axes, names: Sequence[str], xlabel: str) -> None:
    """The names down the left side, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(xlabel)
    axes.tick_params(axis="y", length=0)


def _log_ticks(axis: Axis, least: float, most: float) -> None:
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if most / least < 500 else (1,), numticks=20))


def rooflines(results: Results) -> Gallery:
    """For each section and dtype, a panel for each model and batch; blocks and primitives share one."""
    memory, matrix = results.facts.get("memory"), results.facts.get("matrix") or {}
    rows = [r for r in results.rows if r.flops_per_second and r.bytes_per_second]
    bare = sorted({r.dtype for r in rows} - set(matrix)) if memory else []
    figures = {
        _stem("roofline", section, dtype): _roofline(results, same, memory, matrix[dtype])
        for (section, dtype), same in by(rows, lambda r: (r.section, r.dtype)).items()
        if memory and dtype in matrix
    }
    text = (
        "Operations over the bytes that must move at least, and the rate reached by each provider's faster mode. On "
        "the line only less work would be faster; above it is who does fewer operations than are counted (Winograd), "
        "or keeps data in a cache. Providers share the FLOP per byte of their case: drawn around it."
    )
    if bare or not memory:
        lacking = f"matrix ceiling of {', '.join(bare)}" if memory else "memory ceiling"
        text = f"{text if figures else 'No roofline.'} The file lacks the {lacking}."
    elif not figures:
        text = "No row has time, bytes and operations."
    return Gallery("Roofline", text, figures)


def _roofline(results: Results, rows: list[Row], memory: float, matrix: float) -> Figure:
    shades = colours(results)
    section = rows[0].section
    panels = by(rows, lambda r: ", ".join([r.case] * (section in (*MODELS, "layers")) + [f"batch {r.batch}"]))
    names = list(by(peers_first(rows), label))
    size, prefix = unit(matrix)
    ridge = matrix / memory
    xs = [ridge, *(r.flops / r.bytes for r in rows)]
    left, right = min(xs) / 2, max(xs) * 2
    rates = [r.flops_per_second or matrix for r in rows]
    low, high = min(matrix / 4, *rates) / 1.5, max(matrix, *rates) * 1.5
    across = min(3, len({r.batch for r in rows})) if section in MODELS else 1
    height = 2.9 if across > 1 else 4.0
    figure, grid = _panels(_title(f"Roofline: {section}", rows, results), list(panels), across, height)
    for i, (axes, same) in enumerate(zip(grid, panels.values(), strict=True)):
        axes.loglog([left, ridge, right], [memory * left / size, matrix / size, matrix / size], color=INK, lw=1.2)
        groups = by(same, lambda r: r.group)
        step = 0.006 if len(groups) == 1 else 0.002
        for group in groups.values():
            for name, row in faster_modes(group).items():
                aside = step * (names.index(name) - (len(names) - 1) / 2)
                x, y = row.flops / row.bytes * (right / left) ** aside, (row.flops_per_second or 0.0) / size
                axes.plot(x, y, "o", color=shades[name], ms=5 if row.peer else 7, mec="white", mew=0.6)
        axes.set(xlim=(left, right), ylim=(low / size, high / size), xlabel="FLOP per byte")
        axes.set_ylabel(f"{prefix}FLOP/s" if i % across == 0 else "")
        _log_ticks(axes.xaxis, *axes.get_xlim())
        _log_ticks(axes.yaxis, *axes.get_ylim())
        axes.grid(color="#e5e7eb", lw=0.6)
    ceilings = f"{quantity(memory, 'B/s')}, {quantity(matrix, 'FLOP/s')}"
    handles = [Line2D([], [], color=INK, label=ceilings)]
    handles += [Line2D([], [], marker="o", ls="", color=shades[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower left", ncols=5, frameon=False)
    return figure


def _by_model(results: Results, rows: Iterable[Row], kind: str, draw: Callable[..., Figure]) -> dict[str, Figure]:
    """A figure for each section, model, dtype and size."""
    groups = by(rows, lambda r: (r.section, r.case, r.part, r.dtype, r.size))
    return {_stem(kind, *filter(None, key)): draw(results, same) for key, same in groups.items()}


def speedups(results: Results) -> Gallery:
    """Our best provider's speed over each peer's, a panel for each batch."""
    groups = [rows for g, rows in results.groups().items() if g[0] in MODELS and any(r.peer for r in rows)]
    figures = _by_model(results, (r for rows in groups if best_of_ours(rows) for r in rows), "speed", _speedup)
    text = "The speed of our fastest right provider over each peer's faster mode. Left of the line the peer is faster."
    untimed = [f"{rows[0].section} of {describe(rows)}" for rows in groups if not best_of_ours(rows)]
    if untimed:
        text += f" Ours has no time: {'; '.join(untimed)}."
    return Gallery("Speed against each peer", text if groups else "No group has both ours and a peer.", figures)


def _speedup(results: Results, rows: list[Row]) -> Figure:
    shades = colours(results)
    batches = by(sorted(rows, key=lambda r: r.batch), lambda r: r.batch)
    names = list(by((r for r in rows if r.peer), label))
    titles = [f"batch {b}: {label_with_mode(best)}" for b, same in batches.items() if (best := best_of_ours(same))]
    title = _title(f"{rows[0].section.capitalize()}: speed of our best over each peer's", rows, results)
    figure, grid = _panels(title, titles, 3, 0.9 + 0.27 * len(names))
    ratios = [0.8, 1.5]
    for axes, same in zip(grid, batches.values(), strict=True):
        best = best_of_ours(same)
        bars = []
        for name, peer in faster_modes(r for r in same if r.peer).items():
            ratio = peer.seconds / best.seconds if best and best.seconds and peer.seconds else None
            text = f"{ratio:.2f}x" + " (graph)" * (peer.mode == "graph") if ratio else peer.status
            bars.append(Bar(name, ratio, text, shades[name], LOSS if ratio and ratio < 1 or not ratio else INK))
        axes.set_xscale("log")
        _bars(axes, bars, names, "times the peer's speed", start=1.0)
        axes.axvline(1.0, color=INK, lw=1.0)
        ratios += [bar.value for bar in bars if bar.value]
    least, most = 0.9 * min(ratios), max(ratios)
    for axes in grid:
        # A third of the width is for the texts.
        axes.set_xlim(least, most * (most / least) ** 0.5)
        _log_ticks(axes.xaxis, *axes.get_xlim())
    return figure


def memory(results: Results) -> Gallery:
    """Peak bytes of each provider, a panel for each batch."""
    figures = _by_model(results, (r for r in results.rows if r.peak_bytes is not None), "memory", _memory)
    text = "Peak memory of a call, above what was there before it." if figures else "No row has its peak memory."
    return Gallery("Memory", text, figures)


def _memory(results: Results, rows: list[Row]) -> Figure:
    shades = colours(results)
    batches = by(sorted(rows, key=lambda r: r.batch), lambda r: r.batch)
    names = list(by(peers_first(rows), label_with_mode))
    title = _title(f"{rows[0].section.capitalize()}: peak memory of a call", rows, results)
    figure, grid = _panels(title, [f"batch {b}" for b in batches], 3, 0.9 + 0.27 * len(names), sharex=False)
    for axes, same in zip(grid, batches.values(), strict=True):
        size, prefix = unit(max(r.peak_bytes or 0 for r in same))
        values = [(r, (r.peak_bytes or 0) / size) for r in same]
        bars = [Bar(label_with_mode(r), value, number(value), shades[label(r)]) for r, value in values]
        _bars(axes, bars, names, f"{prefix}B")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlim(0, 1.3 * max(1.0, *(value for _, value in values)))
    return figure


def waterfalls(results: Results) -> Gallery:
    """The parts of a model, one after the other, a panel for each provider."""
    layers = by((r for r in results.rows if r.section == "layers"), lambda r: (r.case, r.dtype, r.batch, r.size))
    figures = {
        _stem("layers", case, dtype, batch, size): _waterfall(results, rows)
        for (case, dtype, batch, size), rows in layers.items()
        if any(r.seconds for r in rows)
    }
    text = (
        "A bar is the time of a part and starts where the one before ended; black is the least time that it needs."
        if figures
        else "No layer was timed."
    )
    return Gallery("Where the time of a forward goes", text, figures)


def _waterfall(results: Results, rows: list[Row]) -> Figure:
    shades = colours(results)
    parts = list(by(rows, lambda r: r.part))
    columns = by(peers_first(rows), label_with_mode)
    longest = max(r.seconds or 0.0 for r in rows)
    scale, second = (1e6, "us") if longest < 1e-3 else (1e3, "ms") if longest < 1.0 else (1.0, "s")
    sums = {name: sum(r.seconds or 0.0 for r in same) for name, same in columns.items()}
    timed = {name: sum(r.seconds is not None for r in same) for name, same in columns.items()}
    titles = [
        f"{name}\n{number(sums[name], scale)} {second}" + f" ({n} of {len(parts)} parts)" * (n < len(parts))
        for name, n in timed.items()
    ]
    title = _title("Time of a forward, part by part", rows, results)
    figure, grid = _panels(title, titles, 4, 0.9 + 0.17 * len(parts))
    for axes, same in zip(grid, columns.values(), strict=True):
        found = {r.part: r for r in same}
        start = 0.0
        for line, part in enumerate(parts):
            row = found.get(part)
            seconds, floor = ((row.seconds or 0.0) * scale, (row.floor or 0.0) * scale) if row else (0.0, 0.0)
            if row and seconds:
                axes.barh(line, seconds, left=start, height=0.8, color=shades[label(row)])
                axes.barh(line, floor, left=start, height=0.25, color="black")
            text = number(seconds) if seconds else row.status if row else "no row"
            _write(axes, text, start + max(seconds, floor), line, INK if seconds else LOSS)
            start += seconds
        _lines(axes, parts, second)
    grid[0].set_xlim(0, 1.25 * max(sums.values()) * scale)
    return figure
