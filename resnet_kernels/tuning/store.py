"""Writes the tables of measured choices that `backends/tables.py` reads."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

from ..analysis.results import write_atomically
from ..backends.tables import SCHEMA, Table, forget, read


def store(path: Path, holds_for: Mapping[str, str], measured: Table) -> None:
    """Add the measured choices to the table in the file, which is created if it does not exist.

    Other processes may read and write the file at the same time. A file that is no table, or the table of another
    machine, is replaced, with a warning.

    Args:
        path: the table's file.
        holds_for: the identity of the machine and versions that the measurements hold for.
        measured: the choices to add; they replace earlier choices for the same calls and launches.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        merged = Table({}, {})
        if path.exists():
            try:
                found, merged = read(path)
                if found != dict(holds_for):
                    raise ValueError(f"{path}: expected a table for {dict(holds_for)}, got one for {found}")
            except ValueError as error:
                warnings.warn(f"{error}; the file is replaced", stacklevel=2)
                merged = Table({}, {})
        merged.calls.update(measured.calls)
        merged.launches.update(measured.launches)
        content = {
            "schema": SCHEMA,
            "identity": dict(holds_for),
            "calls": list(merged.calls.values()),
            "launches": list(merged.launches.values()),
        }
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    forget()
