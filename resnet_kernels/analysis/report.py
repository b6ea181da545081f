"""`resnet-kernels report`: a results file as tables and plots, a comparison of two, and the tables of the documents.

A report is a list of `Part`s, which is rendered as Markdown and as HTML, so that both hold the same numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from rich.console import Console

from .results import Results, Row, Section, best_peer, load, write_atomically
from .rows import (
    MODELS,
    NONE,
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

T = TypeVar("T")

# Medians of two runs of the same code on a shared machine differ by up to this share.
TOLERANCE = 0.05
# Headings of the columns that hold words. All others hold numbers and are aligned to the right.
WORDS = {"case", "part", "dtype", "provider", "mode", "section", "note", "fact", "value", "status", "reason", "flag"}
WORDS |= {"finding", "old", "new", "best peer", "best of ours"}
IDENTITY = ("section", "case", "part", "dtype", "batch", "size", "provider", "mode")
UNITS = {"memory": "B/s", "matrix": "FLOP/s", "l2": "B"}
MEANING = (
    "Times are medians with p20–p80. x best peer: the time of the fastest correct peer, in either mode, over the time "
    "of the row; below 1 is a loss. Floor: the time that the least bytes and operations take at the machine's measured "
    "ceilings; rates count these bytes and operations. Peak memory is the highest use during a call above the use "
    "before it; on a CPU the pool of activations counts as unused before the call, whichever implementation "
    "filled it, so that peers "
    "measured after ours have it added and the rows of a file cannot be compared."
)


@dataclasses.dataclass
class Part:
    """A part of a report: a heading, a text, a table, and images as data URIs by name, which only HTML shows."""

    title: str
    level: int = 2
    text: str = ""
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    images: dict[str, str] = dataclasses.field(default_factory=dict)

    def is_number(self, column: int) -> bool:
        """Return whether the column holds numbers."""
        return column > 0 and self.headings[column] not in WORDS


def _time(row: Row, scale: float) -> str:
    if row.seconds is None:
        return row.status
    spread = f" ({number(row.p20, scale)}–{number(row.p80, scale)})" if row.p20 and row.p80 else ""
    return number(row.seconds, scale) + spread


def _factor(row: Row, best: Row | None) -> str:
    return f"{best.seconds / row.seconds:.2f}x" if best and best.seconds and row.seconds else NONE


def _note(row: Row) -> str:
    errors = ", ".join(f"{n} {e:.1e}" for n, e in row.errors.items()) if row.status == "wrong" else ""
    return textwrap.shorten("; ".join(filter(None, (row.reason, errors))), 300, placeholder=" …")


def _fact(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{n} {_fact(name, v)}" for n, v in value.items())
    if name in UNITS and isinstance(value, int | float):
        return quantity(value, UNITS[name])
    if isinstance(value, float):
        return number(value)
    return value if isinstance(value, str) else json.dumps(value)


def _table(
    title: str, columns: dict[str, Callable[[T], str]], rows: Sequence[T], level: int = 2, text: str = ""
) -> Part:
    """A table with a line per row. A column that is empty in every row is left out."""
    cells = {heading: [cell(row) for row in rows] for heading, cell in columns.items()}
    used = {heading: column for heading, column in cells.items() if set(column) - {NONE, ""}}
    return Part(title, level, text, list(used), list(zip(*used.values(), strict=True)))


def _columns(results: Results, rows: Sequence[Row], *without: str) -> dict[str, Callable[[Row], str]]:
    """The columns that a table of rows may have: by heading, the function from a row to its cell."""
    best = {group: best_peer(same) for group, same in results.groups().items()}
    size, prefix = unit(max((r.flops_per_second or 0.0 for r in rows), default=0.0))
    columns: dict[str, Callable[[Row], str]] = {
        "section": lambda r: r.section,
        "case": lambda r: r.case,
        "part": lambda r: r.part,
        "dtype": lambda r: r.dtype,
        "batch": lambda r: str(r.batch),
        "size": lambda r: str(r.size or ""),
        "provider": label,
        "mode": lambda r: r.mode,
        "ms": lambda r: _time(r, 1e3),
        "us": lambda r: _time(r, 1e6),
        "images/s": lambda r: number(r.images_per_second),
        "x best peer": lambda r: _factor(r, best[r.group]),
        "floor us": lambda r: number(r.floor, 1e6),
        "gap us": lambda r: number(_gap(r), 1e6),
        "of floor": lambda r: NONE if r.share_of_floor is None else f"{100 * r.share_of_floor:.1f} %",
        "GB/s": lambda r: number(r.bytes_per_second, 1e-9),
        f"{prefix}FLOP/s": lambda r: number(r.flops_per_second, 1 / size),
        "peak MB": lambda r: number(r.peak_bytes, 1e-6),
        "note": _note,
    }
    return {heading: cell for heading, cell in columns.items() if heading not in without}


def _model_tables(results: Results, rows: list[Row]) -> list[Part]:
    without = ("section", "case", "part", "dtype", "batch", "size", "us", "floor us", "gap us")
    return [
        _table(describe(same), _columns(results, same, *without), peers_first(same), 3)
        for same in by(rows, lambda r: r.group).values()
    ]


def _layer_tables(results: Results, rows: list[Row]) -> list[Part]:
    """Tables of microseconds, a line per part and a column per provider; the text lists the rows without a time."""
    tables = []
    for same in by(rows, lambda r: (r.case, r.dtype, r.batch, r.size)).values():
        found = {(r.part, label_with_mode(r)): r for r in same}
        parts = list(by(same, lambda r: r.part))
        names = list(by(peers_first(same), label_with_mode))
        floors = {r.part: r.floor for r in same if r.floor is not None}
        lines = [
            [part, number(floors.get(part), 1e6)]
            + [_time(found[part, n], 1e6).split(" ")[0] if (part, n) in found else NONE for n in names]
            for part in parts
        ]
        # The sum of a provider that lacks a part would look fast, so there is none.
        sums: list[list[float | None]] = [[floors.get(p) for p in parts]]
        sums += [[found[p, n].seconds if (p, n) in found else None for p in parts] for n in names]
        lines.append(["sum", *(number(None if None in s else sum(filter(None, s)), 1e6) for s in sums)])
        untimed = [f"{r.part}, {label_with_mode(r)}: {r.status}. {_note(r)}" for r in same if r.seconds is None]
        text = " ".join(["Microseconds.", *untimed])
        tables.append(Part(describe(same), 3, text, ["part", "floor", *names], lines))
    return tables


ACCURACY = (
    "RMS of the error against fp64 over the RMS of the exact values, over several seeds. Gradients (d) are compared "
    f"with fp64 under the implementation's own ReLU masks. {NONE}: the exact value is 0."
)


def _error(row: Row, tensor: str) -> str:
    return f"{row.errors[tensor]:.1e}" if tensor in row.errors else NONE if row.status == "ok" else row.status


def _accuracy_tables(results: Results, rows: list[Row]) -> list[Part]:
    """Tables of relative errors, a line per tensor and a column per dtype, kind of data and provider."""
    tables = []
    for (case, batch, size), same in by(rows, lambda r: (r.case, r.batch, r.size)).items():
        headings = [f"{r.dtype} {r.part}, {'eager' if r.peer else 'ours'}" for r in same]
        lines = [
            [name, *(_error(r, name) for r in same)] for name in dict.fromkeys(name for r in same for name in r.errors)
        ]
        reasons = [f"{heading}: {r.reason}." for heading, r in zip(headings, same, strict=True) if r.reason]
        title = f"{case}, batch {batch}, {size} x {size}"
        tables.append(Part(title, 3, " ".join([ACCURACY, *reasons]), ["relative error", *headings], lines))
    return tables


def _wide_tables(results: Results, rows: list[Row]) -> list[Part]:
    """One table of all cases, with a column for every metric that a profiler read."""
    columns = _columns(results, rows, "section", "ms", "images/s", "gap us")
    note = columns.pop("note")
    for name in dict.fromkeys(name for r in rows for name in r.metrics):
        # The default binds the name of this iteration. mypy takes it for a second argument of the lambda.
        columns[name] = lambda r, name=name: number(r.metrics.get(name))  # type: ignore[misc]
    ordered = [r for same in by(rows, lambda r: r.group).values() for r in peers_first(same)]
    return [_table("", columns | {"note": note}, ordered, 3)]


def _facts(results: Results) -> Part:
    return Part("Facts", headings=["fact", "value"], rows=[[n, _fact(n, v)] for n, v in results.facts.items()])


def _sections(results: Results) -> Part:
    columns: dict[str, Callable[[Section], str]] = {
        "section": lambda s: s.name,
        "status": lambda s: s.status,
        "seconds of budget": lambda s: f"{s.seconds:.0f} of {s.budget:.0f}",
        "rows": lambda s: str(sum(r.section == s.name for r in results.rows)),
        "reason": lambda s: s.reason,
    }
    unfinished = [s.name for s in results.sections if s.status in ("waiting", "running", "cut")]
    text = f"Not the whole suite: {', '.join(unfinished)} did not run to the end." if unfinished else ""
    return _table("Sections", columns, results.sections, 2, text)


def _glance(results: Results) -> Part:
    """A table of our best provider beside the best peer, a line per model."""
    lines = []
    for group, rows in results.groups().items():
        if group[0] in MODELS:
            ours, best = best_of_ours(rows), best_peer(rows)
            pair = [f"{label_with_mode(r)}: {number(r.images_per_second)}" if r else NONE for r in (best, ours)]
            lines.append([group[0], describe(rows), *pair, _factor(ours, best) if ours else NONE])
    text = "Images per second of the fastest correct providers." if lines else "No whole model was measured."
    return Part("At a glance", 2, text, ["section", "case", "best peer", "best of ours", "x best peer"], lines)


def _gap(row: Row) -> float:
    return (row.seconds or 0.0) - (row.floor or 0.0)


def _gaps(results: Results, most: int = 3) -> Part:
    timed = [r for r in results.rows if not r.peer and r.seconds is not None and r.floor is not None]
    sections = by(timed, lambda r: r.section).values()
    rows = [r for same in sections for r in sorted(same, key=_gap, reverse=True)[:most]]
    columns = _columns(results, rows, "ms", "images/s", "GB/s", "peak MB", "note")
    text = f"Our {most} rows of each section with the largest difference between time and floor."
    return _table("Largest gaps to the floor", columns, rows, 2, text if rows else "No row of ours has time and floor.")


def single(results: Results) -> list[Part]:
    """Return the report of one file."""
    parts = [Part("Measurements", 1, MEANING), _facts(results), _sections(results), _glance(results)]
    rows = by(results.rows, lambda r: r.section)
    tables = dict.fromkeys(MODELS, _model_tables) | {"layers": _layer_tables, "accuracy": _accuracy_tables}
    for name in dict.fromkeys([*(s.name for s in results.sections), *rows]):
        details = next((s.details for s in results.sections if s.name == name), {})
        if details or name in rows:
            lines = [[n, _fact(n, v)] for n, v in details.items()]
            parts.append(Part(name.capitalize(), 2, "", ["finding", "value"], lines))
        parts += tables.get(name, _wide_tables)(results, rows[name]) if name in rows else []
    return [*parts, _gaps(results)]


@dataclasses.dataclass
class Change:
    """A pair of rows: the same provider and case in the old file and in the new one."""

    old: Row
    new: Row

    @property
    def ratio(self) -> float | None:
        """The new time over the old one, or None if either file has no time."""
        return self.new.seconds / self.old.seconds if self.new.seconds and self.old.seconds else None

    @property
    def flag(self) -> str:
        """The change of status, "regression" or "improvement"; "" if the difference is within the noise."""
        if self.old.status != self.new.status:
            return f"{self.old.status} -> {self.new.status}"
        if self.ratio is None or abs(self.ratio - 1) <= TOLERANCE:
            return ""
        slower, faster = (self.new, self.old) if self.ratio > 1 else (self.old, self.new)
        if slower.p20 is None or faster.p80 is None:
            return "no p20–p80 to judge by"
        return "" if slower.p20 <= faster.p80 else "regression" if self.ratio > 1 else "improvement"

    @property
    def fails(self) -> bool:
        """Return whether ours became slower, or wrong. A slower peer is not our regression."""
        lost = self.old.status == "ok" and self.new.status != "ok"
        return not self.new.peer and (lost or self.flag == "regression")


def changes(old: Results, new: Results) -> list[Change]:
    """Return the rows of both files in pairs: changes of status first, then regressions, improvements and the rest."""
    before, after = ({(r.group, r.provider, r.mode): r for r in results.rows} for results in (old, new))
    found = [Change(before[key], row) for key, row in after.items() if key in before]
    ranks = {"regression": 1, "improvement": 2, "": 4}
    return sorted(found, key=lambda c: 0 if "->" in c.flag else ranks.get(c.flag, 3))


def comparison(old: Results, new: Results) -> list[Part]:
    """Return the report that compares two files."""
    found = changes(old, new)
    flags = [c.flag for c in found]
    peers = [c.ratio for c in found if c.new.peer and c.ratio]
    ours = sum(c.flag == "regression" and not c.new.peer for c in found)
    sentences = [
        f"{len(found)} rows in both files, {len(old.rows) - len(found)} only in the old, {len(new.rows) - len(found)} "
        f"only in the new.",
        f"Status changed: {sum('->' in f for f in flags)}. Regressions: {flags.count('regression')}, of ours {ours}. "
        f"Improvements: {flags.count('improvement')}.",
        f"A row is flagged if its times differ by more than {TOLERANCE:.0%} and its p20–p80 intervals do not overlap.",
    ]
    if peers:
        sentences.append(f"The peers' times changed by {statistics.median(peers):.2f}x (median).")
    if old.facts["processor"] != new.facts["processor"]:
        sentences.append("The processors differ: the ratios compare machines too.")
    facts = [
        [name, *(_fact(name, f[name]) if name in f else NONE for f in (old.facts, new.facts))]
        for name in dict.fromkeys([*old.facts, *new.facts])
    ]
    columns: dict[str, Callable[[Change], str]] = {"flag": lambda c: c.flag}
    every = _columns(new, new.rows)
    for name in IDENTITY:
        # As in _wide_tables, the default binds the cell of this iteration.
        columns[name] = lambda c, cell=every[name]: cell(c.new)  # type: ignore[misc]
    columns |= {
        "old ms": lambda c: _time(c.old, 1e3),
        "new ms": lambda c: _time(c.new, 1e3),
        "new / old": lambda c: f"{c.ratio:.2f}x" if c.ratio else NONE,
        "note": lambda c: _note(c.new) or _note(c.old),
    }
    return [
        Part("Comparison", 1, " ".join(sentences)),
        Part("Facts", 2, "", ["fact", "old", "new"], facts),
        _table("Rows", columns, found),
    ]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def markdown_table(part: Part) -> str:
    """Return the table of a part as Markdown, columns of numbers aligned to the right."""
    rule = ["---:" if part.is_number(i) else "---" for i in range(len(part.headings))]
    lines = [part.headings, *part.rows]
    cells = [[_cell(text) for text in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [cells[0], rule, *cells[1:]])


def markdown(parts: Iterable[Part]) -> str:
    """Return the parts as Markdown, without their images."""
    blocks = []
    for part in parts:
        blocks += [f"{'#' * part.level} {_cell(part.title)}"] if part.title else []
        blocks += [_cell(part.text)] if part.text else []
        blocks += [markdown_table(part)] if part.rows else []
    return "\n\n".join(blocks) + "\n"


def html(parts: Sequence[Part]) -> str:
    """Return the parts as one HTML page that needs no other file."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.jinja").render(parts=parts)


START = re.compile(r"^<!-- results ", re.M)
BLOCK = re.compile(r"^(<!-- results ([^:\n]+): ([^\n]*?) -->\n)(.*?)^(<!-- end of results -->)$", re.M | re.S)
SPEC = re.compile(r"(inference|training)(?: batch=(\d+))?|accuracy (\S+)")


def readme_tables(text: str, root: Path) -> str:
    """Return the text with every table between `<!-- results FILE [FILE...]: SPEC -->` and `<!-- end of results -->`
    generated again from the files.

    SPEC is "inference" or "training", with "batch=N" to show that batch only, or "accuracy CASE".

    Args:
        text: a Markdown document.
        root: the folder that the FILEs are relative to.

    Raises:
        ValueError: a file is missing or is not a results file, a SPEC is unknown, or a block has no rows or no end.
    """
    blocks = BLOCK.findall(text)
    if len(START.findall(text)) != len(blocks) or any(START.search(content) for *_, content, _ in blocks):
        raise ValueError("expected '<!-- end of results -->' after each '<!-- results FILE: SPEC -->', got another")
    return BLOCK.sub(lambda m: f"{m[1]}\n{_readme_table(m[2].split(), m[3], root)}\n\n{m[5]}", text)


def _readme_table(files: Sequence[str], spec: str, root: Path) -> str:
    wanted = SPEC.fullmatch(spec)
    if wanted is None:
        raise ValueError(
            f"results {' '.join(files)}: expected 'inference' or 'training [batch=N]' or 'accuracy CASE', got {spec!r}"
        )
    section, batch, case = wanted[1] or "accuracy", wanted[2], wanted[3]
    read = [load(root / name) for name in files]
    groups = [
        (results, distinct(results, rows))
        for results in read
        for rows in results.groups().values()
        if rows[0].section == section and batch in (None, str(rows[0].batch)) and case in (None, rows[0].case)
    ]
    if not groups:
        raise ValueError(f"results {' '.join(files)}: expected rows of {spec!r}, got none")
    batches = list(dict.fromkeys(rows[0].batch for _, rows in groups))
    if case:
        blocks = []
        for results in read:
            tables = _accuracy_tables(results, [r for of, rows in groups if of is results for r in rows])
            blocks += [*map(markdown_table, tables), _provenance(results.facts, batches)]
        return "\n\n".join(blocks)
    properties = [
        (f"{r.case} {r.dtype}", f"batch {r.batch}", f"{r.size} x {r.size}", results.facts["processor"])
        for results, (r, *_) in groups
    ]
    # A heading holds the properties in which the columns differ.
    varies = [i == 0 or len(set(values)) > 1 for i, values in enumerate(zip(*properties, strict=True))]
    headings = ["images/s (x best peer)", *(", ".join(itertools.compress(names, varies)) for names in properties)]
    columns = [(faster_modes(rows), best_peer(rows)) for _, rows in groups]
    names = by(peers_first(r for _, rows in groups for r in rows), label)
    lines = [[name, *(_readme_cell(rows.get(name), best) for rows, best in columns)] for name in names]
    facts = dict.fromkeys(_provenance(results.facts, batches) for results, _ in groups)
    return f"{markdown_table(Part('', headings=headings, rows=lines))}\n\n{' '.join(facts)}"


def _readme_cell(row: Row | None, best: Row | None) -> str:
    if row is None or row.seconds is None:
        return row.status if row else NONE
    factor = f" ({_factor(row, best)})" if best else ""
    return number(row.images_per_second) + factor + (" (graph)" if row.mode == "graph" else "")


def _provenance(facts: dict[str, Any], batches: Sequence[int]) -> str:
    said = [
        " ".join(str(facts[n]) for n in ("processor", "capability") if n in facts),
        f"torch {facts['versions'].get('torch', NONE)}",
    ]
    said[1:1] = [f"{facts['threads']} threads"] if "threads" in facts else []
    said += [f"batch {batches[0]}"] * (len(batches) == 1) + [f"commit {facts['commit']}", facts["date"]]
    return ", ".join(said) + "."


def _images(results: Results, out: Path, png: bool) -> list[Part]:
    try:
        from . import plots
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"plots need matplotlib: pip install 'resnet_kernels[demo]'; without them there is {out / 'report.md'}"
        ) from error
    parts = []
    for gallery in plots.galleries(results):
        if png:
            for name, figure in gallery.figures.items():
                figure.savefig(out / f"{name}.png", dpi=120)
        uris = {name: plots.data_uri(figure) for name, figure in gallery.figures.items()}
        parts.append(Part(gallery.title, 2, gallery.text, images=uris))
    return parts


def report(console: Console, files: Sequence[Path], out: Path, png: bool, fail_on_regression: bool) -> int:
    """Write report.md and report.html into the folder `out`. Returns the exit code."""
    if len(files) not in (1, 2):
        raise ValueError(f"expected one results file, or two to compare, got {' '.join(map(str, files)) or 'none'}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, got {out}, which is a file")
    read = [load(path) for path in files]
    parts = single(*read) if len(read) == 1 else comparison(*read)
    write_atomically(out / "report.md", markdown(parts))
    if len(read) == 1:
        glance = 1 + next(i for i, part in enumerate(parts) if part.title == "At a glance")
        parts[glance:glance] = _images(read[0], out, png)
    write_atomically(out / "report.html", html(parts))
    console.print(f"{out / 'report.md'}, {out / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    if len(read) == 1:
        return 0
    console.print(parts[0].text, markup=False, highlight=False)
    return int(fail_on_regression and any(change.fails for change in changes(*read)))


def readme(console: Console, path: Path, check: bool) -> int:
    """Generate the tables of a document again, in place; with `check` only compare, and return 1 if one differs."""
    if not path.is_file():
        raise ValueError(f"readme: expected a file, got {path}, which is none")
    old = path.read_text()
    new = readme_tables(old, path.resolve().parent)
    same = "up to date" if old == new else "out of date" if check else "written"
    console.print(f"{path}: tables {same}", markup=False, highlight=False)
    if not check and old != new:
        write_atomically(path, new)
    return int(check and old != new)
