"""Writing tables of measured choices."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

from ..analysis.results import write_atomically
from ..backends.tables import SCHEMA, Table, forget, read


def store(path: Path, holds_for: Mapping[str, str], measured: Table) -> None:
    """Add to the file, or begin it. Other processes may read and write it meanwhile; a file that is no table of these
    is replaced, with a warning."""
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
                warnings.warn(f"{error}; replaced", stacklevel=2)
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
