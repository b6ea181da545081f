"""Differentiable fused ops over the primitives of `backends.contract`."""

from .block import residual_block

__all__ = ["residual_block"]
