"""Differentiable fused ops over the primitives of `backends.contract`."""

from .batch_norm import BatchNorm
from .block_inference import residual_block
from .block_training import preactivation_block, residual_block_training, stem
from .functional import basic_block, bottleneck, conv_bn_act, preactivation_basic_block, preactivation_bottleneck
from .gating import gated_tail

__all__ = [
    "BatchNorm",
    "basic_block",
    "bottleneck",
    "conv_bn_act",
    "gated_tail",
    "preactivation_basic_block",
    "preactivation_block",
    "preactivation_bottleneck",
    "residual_block",
    "residual_block_training",
    "stem",
]
