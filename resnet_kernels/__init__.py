"""Fused residual blocks for PyTorch: torchvision's ResNets, same weights, same results, fewer trips through memory."""

from . import models, nn, ops
from .backends.contract import BackendUnavailable
from .backends.select import use_backend
from .explain import explain
from .inference import FrozenModel, freeze
from .replace import ReplacementReport, replace_blocks, restore_blocks
from .tuning import TuningReport, tune

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "FrozenModel",
    "ReplacementReport",
    "TuningReport",
    "explain",
    "freeze",
    "models",
    "nn",
    "ops",
    "replace_blocks",
    "restore_blocks",
    "tune",
    "use_backend",
]
