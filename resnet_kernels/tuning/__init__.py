"""Measured choices: the tuner, and beside it the tables it made that are shipped, one JSON file per GPU.

backends/measured.py reads and writes tables; tuner.py measures.
"""

from .tuner import CANDIDATES, TuningReport, tune

__all__ = ["CANDIDATES", "TuningReport", "tune"]
