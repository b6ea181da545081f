"""What a section's process tells while it works, one JSON object a line, so that nothing is lost when it is cut, hangs
or takes its process with it:

    {"begin": row, "within": seconds}   from here on whatever ends the process is the row's doing (null: nobody's)
    {"row": row}         a result
    {"done": group}      everything there is to know of a group
    {"facts": {...}}     of the machine
    {"details": {...}}   of the section
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from resnet_kernels.analysis.results import Row

# Stands for a provider where a case itself is being prepared.
PREPARATION = "preparation"


def read(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """What is told from the offset on, and the offset behind it. Whole lines only: the last may be cut."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], offset + len(whole)


class Log:
    """Writes a section's events, and knows what an earlier process of the same section left behind."""

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
        """Seconds of the budget."""
        return self.deadline - time.monotonic()

    def knows(self, row: Row) -> bool:
        """Whether there is a result of the row's provider, or its group is done."""
        return row.group in self._done or (row.group, row.provider) in self._known

    def _write(self, event: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def begin(self, row: Row | None, within: float | None = None) -> None:
        """within: seconds after which it hangs; None: the suite's patience."""
        self._write({"begin": None if row is None else dataclasses.asdict(row), "within": within})

    def row(self, row: Row) -> None:
        self._write({"row": dataclasses.asdict(row)})

    def done(self, group: tuple) -> None:
        self._write({"done": group})

    def tell(self, kind: str, found: dict[str, Any]) -> None:
        """kind: "facts" or "details"."""
        self._write({kind: found})
