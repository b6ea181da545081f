"""Figures of results files: roofline, speed against each peer, memory, time by part, and the headline of all files.

A provider has the same colour in every figure of a file: ours are blue, variants of eager PyTorch grey, other peers
orange. Losses are written in red.
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
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .results import Results, Row
from .rows import (
    MODELS,
    Comparison,
    best_of_ours,
    by,
    describe,
    distinct,
    faster_modes,
    label,
    label_with_mode,
    number,
    peers_first,
    quantity,
    unit,
)

INK, QUIET, GRID, LOSS, GAIN = "#1f2937", "#6b7280", "#e5e7eb", "#b91c1c", "#2f7be5"
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
    """The figures of one kind, by name, and a text: what they show, or why there are none."""

    title: str
    text: str
    figures: dict[str, Figure]


def galleries(results: Results) -> list[Gallery]:
    """All figures that the rows and facts of a file allow."""
    with rc_context(STYLE):
        return [f(results) for f in (rooflines, speedups, memory, waterfalls)]


def data_uri(figure: Figure) -> str:
    """The figure as SVG inside a URI."""
    file = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def colours(results: Results) -> dict[str, str]:
    """The colour of each provider, by label."""
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
    """A figure with one panel per name, at most `across` of them side by side."""
    across = min(across, len(names))
    lines = math.ceil(len(names) / across)
    figure = Figure(figsize=(WIDTH, 0.7 + lines * height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    grid = list(figure.subplots(lines, across, squeeze=False, sharex=sharex, sharey=True).flat)
    for axes, name in zip(grid, names, strict=False):
        axes.set_title("\n".join(textwrap.fill(line, 120 // across) for line in name.split("\n")))
        # matplotlib numbers a shared axis in the lowest line of panels only.
        axes.tick_params(axis="x", labelbottom=True)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    return figure, grid[: len(names)]


def _stem(*words: object) -> str:
    return "-".join("".join(c if c.isalnum() or c in "_." else "-" for c in str(w)) for w in words)


@dataclasses.dataclass
class Bar:
    """A horizontal bar and the text on its right. value: None draws the text only."""

    name: str
    value: float | None
    text: str
    colour: str = QUIET
    ink: str = INK


def _bars(axes: Axes, bars: Sequence[Bar], names: Sequence[str], xlabel: str, start: float = 0.0) -> None:
    """Draw each bar from `start` in the line of its name."""
    for bar in bars:
        line, end = names.index(bar.name), start if bar.value is None else bar.value
        axes.barh(line, end - start, left=start, color=bar.colour, height=0.72)
        _write(axes, bar.text, max(start, end), line, bar.ink)
    _lines(axes, names, xlabel)


def _write(axes: Axes, text: str, x: float, line: int, ink: str) -> None:
    axes.annotate(text, (x, line), (4, 0), textcoords="offset points", va="center", color=ink, fontsize=8)


def _lines(axes: Axes, names: Sequence[str], xlabel: str) -> None:
    """Write the names down the left side, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(xlabel)
    axes.tick_params(axis="y", length=0)


def _log_ticks(axis: Axis, least: float, most: float) -> None:
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if most / least < 500 else (1,), numticks=20))


def _apart(places: Sequence[float], gap: float, highest: float) -> list[float]:
    """Places for labels, in the order of `places`: at least `gap` apart, at most `highest`, and as near as that
    allows."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    # A cluster is (middle, how many labels); two that overlap become one around their common middle.
    clusters: list[tuple[float, int]] = []
    for i in order:
        middle, count = places[i], 1
        while True:
            middle = min(middle, highest - (count - 1) / 2 * gap)
            if not clusters or middle - clusters[-1][0] >= (count + clusters[-1][1]) / 2 * gap:
                break
            other, more = clusters.pop()
            middle, count = (middle * count + other * more) / (count + more), count + more
        clusters.append((middle, count))
    spread = [middle + (k - (count - 1) / 2) * gap for middle, count in clusters for k in range(count)]
    moved = dict(zip(order, spread, strict=True))
    return [moved[i] for i in range(len(places))]


def rooflines(results: Results) -> Gallery:
    """A figure per section and dtype, with a panel per model and batch; blocks and primitives share one panel."""
    memory, matrix = results.facts.get("memory"), results.facts.get("matrix") or {}
    rows = [r for r in distinct(results, results.rows) if r.flops_per_second and r.bytes_per_second]
    bare = sorted({r.dtype for r in rows} - set(matrix)) if memory else []
    figures = {
        _stem("roofline", section, dtype): _roofline(results, same, memory, matrix[dtype])
        for (section, dtype), same in by(rows, lambda r: (r.section, r.dtype)).items()
        if memory and dtype in matrix
    }
    text = (
        "Each point is a provider's faster mode: the operations of its case over the least bytes the case must move, "
        "and the rate it reached. Providers of one case stand exactly above each other. Both axes are logarithmic. On "
        "the line, only less work would be faster; a provider above the line does fewer operations than are counted "
        '(Winograd) or keeps data in a cache. "(+2)" behind a case counts further cases of the same intensity.'
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
    named = all(len({r.group for r in same}) > 1 for same in panels.values())
    height = 2.9 if across > 1 else 4.7 if named else 4.0
    figure, grid = _panels(_title(f"Roofline: {section}", rows, results), list(panels), across, height)
    for i, (axes, same) in enumerate(zip(grid, panels.values(), strict=True)):
        axes.loglog([left, ridge, right], [memory * left / size, matrix / size, matrix / size], color=INK, lw=1.2)
        axes.set(xlim=(left, right), ylim=(low / size, high / size), xlabel="FLOP per byte (logarithmic)")
        axes.set_ylabel(f"{prefix}FLOP/s (logarithmic)" if i % across == 0 else "")
        groups = by(same, lambda r: r.group)
        _points(axes, groups, shades, size)
        if len(groups) == 1:
            _name_points(axes, same, size)
        else:
            _name_cases(axes, list(groups.values()))
        _log_ticks(axes.xaxis, *axes.get_xlim())
        _log_ticks(axes.yaxis, *axes.get_ylim())
        axes.grid(color=GRID, lw=0.6)
    ceilings = f"{quantity(memory, 'B/s')}, {quantity(matrix, 'FLOP/s')}"
    handles = [Line2D([], [], color=INK, label=ceilings)]
    handles += [
        Line2D([], [], marker=MARKS[name.startswith("ours, ")], ls="", mfc=shades[name], mec="white", label=name)
        for name in names
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=5, frameon=False)
    return figure


# Circles for peers, diamonds for ours: points of one case may cover each other.
MARKS = {False: "o", True: "D"}


def _points(axes: Axes, groups: dict[tuple, list[Row]], shades: dict[str, str], size: float) -> None:
    """A point per provider, at the intensity of its case."""
    for group in groups.values():
        for name, row in faster_modes(group).items():
            x, y = row.flops / row.bytes, (row.flops_per_second or 0.0) / size
            axes.plot(x, y, MARKS[not row.peer], color=shades[name], ms=6, mec="white", mew=0.6)


def _name_points(axes: Axes, group: Sequence[Row], size: float) -> None:
    """Write each provider's name beside its point; names move up or down to stay apart, points do not."""
    found = faster_modes(group)
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    ys = [math.log((r.flops_per_second or low * size) / size / low) / math.log(high / low) for r in found.values()]
    x = math.log(group[0].flops / group[0].bytes / left) / math.log(right / left)
    aside, side = (0.04, "left") if x < 0.7 else (-0.04, "right")
    for name, y, moved in zip(found, ys, _apart(ys, 0.062, 0.97), strict=True):
        axes.annotate(
            name, (x, y), (x + aside, moved), "axes fraction", "axes fraction", ha=side, va="center", fontsize=8,
            arrowprops={"arrowstyle": "-", "color": QUIET, "lw": 0.5, "shrinkB": 3, "relpos": (float(x >= 0.7), 0.5)},
        )  # fmt: skip


def _name_cases(axes: Axes, groups: Sequence[Sequence[Row]]) -> None:
    """Write the names of the cases that share an intensity along the top, with a line down to their points."""
    cases = by([rows[0] for rows in groups], lambda r: f"{r.flops / r.bytes:.3g}")
    texts, places = [], []
    left, right = axes.get_xlim()
    for same in cases.values():
        names = [r.part or r.case for r in same]
        texts.append(names[0] + f" (+{len(names) - 1})" * (len(names) > 1))
        places.append(math.log(same[0].flops / same[0].bytes / left) / math.log(right / left))
    for text, place, moved in zip(texts, places, _apart(places, 0.022, 0.99), strict=True):
        axes.axvline(left * (right / left) ** place, color=GRID, lw=0.8, zorder=0)
        axes.annotate(
            text, (place, 1.0), (moved, 1.05), "axes fraction", "axes fraction", rotation=45, ha="left", va="bottom",
            rotation_mode="anchor", fontsize=7.5, arrowprops={"arrowstyle": "-", "color": QUIET, "lw": 0.5},
        )  # fmt: skip
    # The panel's title stands above the names of its cases.
    longest = max(map(len, texts))
    axes.set_title(axes.get_title(loc="left"), pad=20 + 3.0 * longest)


def _by_model(results: Results, rows: Iterable[Row], kind: str, draw: Callable[..., Figure]) -> dict[str, Figure]:
    """A figure for each section, model, dtype and size."""
    groups = by(rows, lambda r: (r.section, r.case, r.part, r.dtype, r.size))
    return {_stem(kind, *filter(None, key)): draw(results, same) for key, same in groups.items()}


def speedups(results: Results) -> Gallery:
    """The speed of our best provider over each peer's, a panel per batch."""
    groups = [rows for g, rows in results.groups().items() if g[0] in MODELS and any(r.peer for r in rows)]
    figures = _by_model(results, (r for rows in groups if best_of_ours(rows) for r in rows), "speed", _speedup)
    text = (
        "The speed of our fastest correct provider over each peer's faster mode, on a logarithmic axis. A bar to the "
        "left of the line, with a red number, is a loss: the peer is faster."
    )
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
        _bars(axes, bars, names, "times the peer's speed (logarithmic)", start=1.0)
        axes.axvline(1.0, color=INK, lw=1.0)
        ratios += [bar.value for bar in bars if bar.value]
    least, most = 0.9 * min(ratios), max(ratios)
    for axes in grid:
        # A third of the width is for the texts.
        axes.set_xlim(least, most * (most / least) ** 0.5)
        _log_ticks(axes.xaxis, *axes.get_xlim())
    return figure


def memory(results: Results) -> Gallery:
    """The peak bytes of each provider, a panel per batch; for GPUs only."""
    rows = [r for r in results.rows if r.peak_bytes is not None]
    if not rows:
        return Gallery("Memory", "No row has its peak memory.", {})
    if results.facts["device"] == "cpu":
        # benchmarks/measure.py subtracts the pool from the memory before the call, whichever implementation filled it.
        text = (
            "No plot. On a CPU the peak memory of a row counts the pool of activations that our providers have filled "
            "in the same process before, in the peers' rows too: the rows of a file cannot be compared with each other."
        )
        return Gallery("Memory", text, {})
    text = "Peak memory that PyTorch's allocator handed out during a call, above what was allocated before the call."
    return Gallery("Memory", text, _by_model(results, rows, "memory", _memory))


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
    """The parts of a model in the order they run, a panel per provider."""
    rows = [r for r in distinct(results, results.rows) if r.section == "layers"]
    layers = by(rows, lambda r: (r.case, r.dtype, r.batch, r.size))
    figures = {
        _stem("layers", case, dtype, batch, size): _waterfall(results, same)
        for (case, dtype, batch, size), same in layers.items()
        if any(r.seconds for r in same)
    }
    text = (
        "Each bar is the time of one part and starts where the bar before it ended. The black bar is the floor: the "
        "least time for the counted bytes and operations. A floor longer than the time means fewer operations than "
        "are counted (Winograd) or data that stayed in a cache."
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


def headline(found: Sequence[Comparison]) -> Figure:
    """Our speed over the best peer's for every model measured, gains and losses on one linear axis.

    Args:
        found: what `rows.comparisons` returned, in the order of the lines from top to bottom.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.5 + 0.36 * len(found)), layout="constrained")
        figure.suptitle(
            "Our speed over the fastest other implementation measured on the same machine", x=0.01, ha="left"
        )
        axes = figure.subplots()
        for line, c in enumerate(found):
            colour = GAIN if c.factor >= 1 else LOSS
            axes.barh(line, c.factor - 1, left=1.0, color=colour, height=0.62)
            for peer in faster_modes(c.peers).values():
                # The peer's speed in the same unit: the best one stands at 1.
                speed = (c.best.seconds or 0.0) / (peer.seconds or 1.0)
                axes.plot(speed, line, "|", color=QUIET, ms=9, mew=1.4)
            text = f"{c.factor:.2f}x {name_of(c.best)}" + " (a loss)" * (c.factor < 1)
            _write(axes, text, max(1.0, c.factor), line, INK if c.factor >= 1 else LOSS)
        axes.axvline(1.0, color=INK, lw=1.0)
        _lines(axes, [line_of(c) for c in found], "images per second; 1 = the fastest other implementation")
        axes.set_xlim(0, 1.35 * max(c.factor for c in found))
        axes.grid(axis="x", color=GRID, lw=0.6)
        axes.set_axisbelow(True)
        handles = [
            Patch(color=GAIN, label="ours, faster"),
            Patch(color=LOSS, label="ours, slower"),
            Line2D([], [], marker="|", ls="", color=QUIET, ms=9, mew=1.4, label="each other implementation"),
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False)
    return figure


def name_of(row: Row) -> str:
    """The provider's name for readers who do not know ours of the benchmarks."""
    known = {"inductor": "torch.compile", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    return known.get(row.provider, f"PyTorch {row.provider}" if row.provider.startswith("eager") else row.provider)


def line_of(c: Comparison) -> str:
    """Return what was measured: machine, model, section, dtype and batch."""
    model = c.ours.case.replace("resnet", "ResNet-")
    return f"{c.machine}: {model} {c.ours.section}, {c.ours.dtype}, batch {c.ours.batch}"
