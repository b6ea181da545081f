"""Measurements as data: what a results file holds, how it is written so that a cut leaves a valid one, and how read.

A file is JSON: {"schema": 1, "facts": {...}, "sections": [...], "rows": [...]}. `Row` and `Section` tell the fields.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCHEMA = 1

# ok: right, and timed. wrong: outside the rule of `testing.compare`, so not timed. unavailable: cannot run here, for
# the reason given. failed: raised, crashed or hung. cut: the budget ended before it.
STATUSES = ("ok", "wrong", "unavailable", "failed", "cut")
SECTION_STATUSES = ("ok", "failed", "skipped", "cut", "running", "waiting")


@dataclasses.dataclass
class Row:
    """One provider on one case.

    section: "primitives", "blocks", "layers", "inference", "training", "accuracy" or "profile".
    case: what is computed: a model, a block or a convolution. part: of a model, where the row is one part of it; of
    "accuracy" the kind of data.
    provider: who computes it; peer: whether that is somebody else's way, to be compared with.
    mode: "call" (launched from Python as users do) or "graph" (one captured CUDA graph replayed).
    dtype: fp32, bf16 or fp16. batch: images. size: height of the images or maps.
    seconds: median of one call, with p20 and p80, over `rounds`.
    bytes, flops: what must move through memory, and be computed, at least. floor: seconds those take at the ceilings.
    peak_bytes: memory above what is there before the call, at most.
    errors: rms and max of the error against fp64, eager's, and what is allowed; of "accuracy" each tensor's relative
    error, over as many seeds as `rounds`.
    metrics: what a profiler read, by its name for it.
    """

    section: str
    case: str
    provider: str
    status: str
    peer: bool = False
    part: str = ""
    mode: str = "call"
    dtype: str = "fp32"
    batch: int = 1
    size: int = 0
    reason: str = ""
    seconds: float | None = None
    p20: float | None = None
    p80: float | None = None
    rounds: int = 0
    bytes: int = 0
    flops: int = 0
    floor: float | None = None
    peak_bytes: int | None = None
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def group(self) -> tuple[str, str, str, str, int, int]:
        """Equal for rows that compute the same and may be compared."""
        return self.section, self.case, self.part, self.dtype, self.batch, self.size

    @property
    def share_of_floor(self) -> float | None:
        return None if self.floor is None or not self.seconds else self.floor / self.seconds

    @property
    def images_per_second(self) -> float | None:
        return self.batch / self.seconds if self.seconds else None

    @property
    def bytes_per_second(self) -> float | None:
        return self.bytes / self.seconds if self.seconds and self.bytes else None

    @property
    def flops_per_second(self) -> float | None:
        return self.flops / self.seconds if self.seconds and self.flops else None


@dataclasses.dataclass
class Section:
    """A part of the suite: how it ended, after how many seconds of how many it might take. details: its findings."""

    name: str
    status: str = "waiting"
    reason: str = ""
    budget: float = 0.0
    seconds: float = 0.0
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Results:
    """facts: strings and numbers by name, at least "device" ("cpu" or "cuda"), "processor", "date", "commit" and
    "versions" (by package); once measured "memory" (bytes/s copied), "matrix" (operations/s by dtype), "l2" (bytes)."""

    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    sections: list[Section] = dataclasses.field(default_factory=list)
    rows: list[Row] = dataclasses.field(default_factory=list)

    def section(self, name: str) -> Section:
        found = next((s for s in self.sections if s.name == name), None)
        if found is None:
            found = Section(name)
            self.sections.append(found)
        return found

    def groups(self) -> dict[tuple, list[Row]]:
        """Rows that may be compared with each other, in the order they came."""
        found: dict[tuple, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return found

    def save(self, path: Path) -> None:
        """Replaces the file as a whole, so that there is a valid one at any time."""
        content = {
            "schema": SCHEMA,
            "facts": self.facts,
            "sections": [dataclasses.asdict(s) for s in self.sections],
            "rows": [_sparse(r) for r in self.rows],
        }
        write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _sparse(row: Row) -> dict[str, Any]:
    """Without what is as it is by default."""
    defaults = {f.name: f.default for f in dataclasses.fields(Row)}
    return {n: v for n, v in dataclasses.asdict(row).items() if v != defaults[n] and v != {}}


def write_atomically(path: Path, text: str) -> None:
    """Whoever reads the file, at any time, finds the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def best_peer(rows: Sequence[Row]) -> Row | None:
    """The fastest of somebody else's that is right, in whichever mode."""
    peers = [r for r in rows if r.peer and r.status == "ok" and r.seconds]
    return min(peers, key=lambda r: r.seconds or 0.0, default=None)


KINDS: dict[str, Any] = {"str": str, "bool": bool, "int": int, "float": (int, float), "dict": dict}


def _typed(kind: type, fields: Any, where: str) -> Any:
    """An instance from its JSON. Raises ValueError naming what was expected."""
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected an object, got {type(fields).__name__}")
    known = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(fields) - set(known))
    required = {n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(fields))
    if unknown or missing:
        raise ValueError(f"{where}: unknown fields {unknown}, missing fields {missing}")
    for name, value in fields.items():
        base = str(known[name].type).split("[")[0].split(" |")[0]
        expected = KINDS[base]
        optional = "None" in str(known[name].type) and value is None
        if not optional and (not isinstance(value, expected) or (isinstance(value, bool) and base != "bool")):
            raise ValueError(f"{where}: expected {name} as {known[name].type}, got {value!r}")
    return kind(**fields)


def parse(content: Any) -> Results:
    """From a file's JSON. Raises ValueError naming the first thing that is no results file's."""
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        got = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"expected a results file of schema {SCHEMA}, got {got!r}")
    facts = content.get("facts")
    wanted = {"device": str, "processor": str, "date": str, "commit": str, "versions": dict}
    if not isinstance(facts, dict) or any(not isinstance(facts.get(name), kind) for name, kind in wanted.items()):
        raise ValueError(f"facts: expected at least {', '.join(wanted)}, got {facts!r}")
    sections = [_typed(Section, s, f"sections[{i}]") for i, s in enumerate(content.get("sections", []))]
    rows = [_typed(Row, r, f"rows[{i}]") for i, r in enumerate(content.get("rows", []))]
    for s in sections:
        if s.status not in SECTION_STATUSES:
            raise ValueError(f"section {s.name}: expected a status of {', '.join(SECTION_STATUSES)}, got {s.status!r}")
    seen: dict[tuple, int] = {}
    for i, r in enumerate(rows):
        first = seen.setdefault((r.group, r.provider, r.mode), i)
        if first != i:
            raise ValueError(f"rows[{i}]: expected one row a provider and mode, got another than rows[{first}]")
        if r.status not in STATUSES:
            raise ValueError(f"rows[{i}]: expected a status of {', '.join(STATUSES)}, got {r.status!r}")
        if r.seconds is not None and r.status != "ok":
            raise ValueError(f"rows[{i}]: expected no time beside status {r.status!r}, got {r.seconds}")
    return Results(facts, sections, rows)


def load(path: Path) -> Results:
    """Raises ValueError, with the path, where it is no results file."""
    try:
        return parse(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
