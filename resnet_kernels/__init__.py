"""Fused residual blocks for PyTorch: torchvision's ResNets, the same weights and results, fewer trips through memory."""

from . import nn, ops
from .backends.contract import BackendUnavailable
from .backends.select import use_backend

__all__ = ["BackendUnavailable", "nn", "ops", "use_backend"]
