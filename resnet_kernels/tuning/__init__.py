"""The tuner, and beside it the tables that it made and that are shipped: one JSON file per GPU.

backends/tables.py reads tables; store.py writes them; tuner.py measures; launches.py lists the candidate launches.
"""

from .tuner import CANDIDATES, TuningReport, tune

__all__ = ["CANDIDATES", "TuningReport", "tune"]
