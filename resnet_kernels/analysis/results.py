"""Results files: their content, and how they are written and read.

A results file is JSON: {"schema": 1, "facts": {...}, "sections": [...], "rows": [...]}. `Results`, `Section` and `Row`
describe the fields. A file is always replaced as a whole, so that an interrupted run leaves a valid one.
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

# Of a row. ok: the result is right, and was timed. wrong: the result breaks the rule of `testing.compare`, so it was
# not timed. unavailable: it cannot run on this machine, for the given reason. failed: it raised, crashed or hung. cut:
# the budget ended before it was measured.
STATUSES = ("ok", "wrong", "unavailable", "failed", "cut")
SECTION_STATUSES = ("ok", "failed", "skipped", "cut", "running", "waiting")


@dataclasses.dataclass
class Row:
    """The result of one provider (an implementation of PyTorch, of a peer library or of this package) on one case.

    section: "primitives", "blocks", "layers", "inference", "training", "accuracy" or "profile".
    case: what is computed: the name of a model, a block or a convolution.
    provider: the implementation that computes it.
    status: one of STATUSES; the reason says why it is not "ok".
    peer: True for implementations other than this package's, with which it is compared.
    part: in "layers" and "profile" the part of the model that the row measures; in "accuracy" the kind of data.
    mode: "call" (launched from Python, as users do) or "graph" (one captured CUDA graph, replayed).
    dtype: "fp32", "bf16" or "fp16". batch: images. size: height of the images or feature maps.
    seconds: the median time of one call; p20 and p80 are the percentiles. All three are over `rounds` rounds.
    bytes, flops: the least that must move through memory, and the operations that must be done.
    floor: seconds that bytes and flops take at the machine's measured ceilings.
    peak_bytes: the highest memory use during a call, above the use before it.
    errors: RMS and maximum of the error against fp64, those of eager PyTorch, and the allowed ones; in "accuracy" the
        relative error of each tensor, over as many seeds as `rounds`.
    metrics: numbers read by a profiler, by name.
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
        """The key that rows share if they compute the same thing and may be compared."""
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
    """A section of the measurement suite.

    status: how it ended, one of SECTION_STATUSES, with the reason. budget: seconds that it might take. seconds: those
    it took. details: findings that are no rows.
    """

    name: str
    status: str = "waiting"
    reason: str = ""
    budget: float = 0.0
    seconds: float = 0.0
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Results:
    """The content of a results file.

    facts: strings and numbers that describe the machine: at least "device" ("cpu" or "cuda"), "processor", "date",
    "commit" and "versions" (by package). Once measured also "memory" (bytes/s read and written by a copy), "matrix"
    (operations/s of matrix products, by dtype) and "l2" (size of the L2 cache in bytes).
    """

    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    sections: list[Section] = dataclasses.field(default_factory=list)
    rows: list[Row] = dataclasses.field(default_factory=list)

    def section(self, name: str) -> Section:
        """Return the section of this name, which is added if it does not exist."""
        found = next((s for s in self.sections if s.name == name), None)
        if found is None:
            found = Section(name)
            self.sections.append(found)
        return found

    def groups(self) -> dict[tuple, list[Row]]:
        """Return the rows by `Row.group`; the rows of a group may be compared. Order of appearance is preserved."""
        found: dict[tuple, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return found

    def save(self, path: Path) -> None:
        """Write the file. Readers find the old content or the new one, never a part."""
        content = {
            "schema": SCHEMA,
            "facts": self.facts,
            "sections": [dataclasses.asdict(s) for s in self.sections],
            "rows": [_sparse(r) for r in self.rows],
        }
        write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _sparse(row: Row) -> dict[str, Any]:
    """Return the row's fields, without those that have their default value."""
    defaults = {f.name: f.default for f in dataclasses.fields(Row)}
    return {n: v for n, v in dataclasses.asdict(row).items() if v != defaults[n] and v != {}}


def write_atomically(path: Path, text: str) -> None:
    """Replace the file's content. A reader, at any time, finds the whole old text or the whole new one."""
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
    """Return the fastest correct row among the peers, in either mode; None if no peer was timed."""
    peers = [r for r in rows if r.peer and r.status == "ok" and r.seconds]
    return min(peers, key=lambda r: r.seconds or 0.0, default=None)


KINDS: dict[str, Any] = {"str": str, "bool": bool, "int": int, "float": (int, float), "dict": dict}


def _typed(kind: type, fields: Any, where: str) -> Any:
    """Return an instance of the dataclass `kind` from its JSON. Raises ValueError for fields that do not fit it."""
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
    """Return the results in a file's decoded JSON. Raises ValueError for the first thing that breaks the schema."""
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
            raise ValueError(
                f"rows[{i}]: expected one row per provider and mode, got a second one beside rows[{first}]"
            )
        if r.status not in STATUSES:
            raise ValueError(f"rows[{i}]: expected a status of {', '.join(STATUSES)}, got {r.status!r}")
        if r.seconds is not None and r.status != "ok":
            raise ValueError(f"rows[{i}]: expected no time beside status {r.status!r}, got {r.seconds}")
    return Results(facts, sections, rows)


def load(path: Path) -> Results:
    """Return the results in a file. Raises ValueError, with the path, if it cannot be read or is no results file."""
    try:
        return parse(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
