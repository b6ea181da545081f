"""The events that a section's process writes while it works, one JSON object per line.

A section may be cut, hang, or crash with its process. What it wrote before is not lost:

    {"begin": row, "within": seconds}   the row's measurement begins. If the process hangs or crashes now, the row is to
                                        blame. null: nothing is being measured.
    {"row": row}                        a result
    {"done": group}                     all rows of the group (`Row.group`) are complete
    {"facts": {...}}                    facts of the machine, for `Results.facts`
    {"details": {...}}                  findings of the section, for `Section.details`
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from resnet_kernels.analysis.results import Row

# The provider of a "begin" event while a case itself is being prepared.
PREPARATION = "preparation"


def read(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Return the events from the offset on, and the offset after them. An unfinished last line is left for later."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], offset + len(whole)


class Log:
    """Writes a section's events, and knows those of an earlier process of the same section.

    budget: seconds that the section may take from now on.
    """

    def __init__(self, path: Path, budget: float) -> None:
        self.path, self.deadline = path, time.monotonic() + budget
        self.facts: dict[str, Any] = {}
        self._known: set[tuple] = set()
        self._done: set[tuple] = set()
        for event in read(path)[0]:
            self.facts |= event.get("facts", {})
            if "row" in event:
                row = Row(**event["row"])
                self._known.add((row.group, row.provider))
            if "done" in event:
                self._done.add(tuple(event["done"]))

    def left(self) -> float:
        """Return the seconds that are left of the budget."""
        return self.deadline - time.monotonic()

    def knows(self, row: Row) -> bool:
        """Return whether the log has a result of the row's provider and group, or the group is done."""
        return row.group in self._done or (row.group, row.provider) in self._known

    def _write(self, event: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def begin(self, row: Row | None, within: float | None = None) -> None:
        """Record that a row's measurement begins; None: that nothing is being measured.

        within: seconds without an event after which the suite regards the process as hung; None: its `--patience`.
        """
        self._write({"begin": None if row is None else dataclasses.asdict(row), "within": within})

    def row(self, row: Row) -> None:
        """Record a result."""
        self._write({"row": dataclasses.asdict(row)})

    def done(self, group: tuple) -> None:
        """Record that all rows of a group are complete."""
        self._write({"done": group})

    def add(self, kind: str, found: dict[str, Any]) -> None:
        """Record facts of the machine (kind "facts") or findings of the section (kind "details")."""
        self._write({kind: found})
