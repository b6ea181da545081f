"""Differentiable fused ops over the primitives of `backends.contract`."""

from .block import residual_block
from .training import BatchNorm, residual_block_training

__all__ = ["BatchNorm", "residual_block", "residual_block_training"]
