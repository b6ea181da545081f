"""Differentiable fused ops over the primitives of `backends.contract`."""

from .batch_norm import BatchNorm
from .block_inference import residual_block
from .block_training import residual_block_training
from .functional import (
    basic_block,
    bottleneck,
    conv_bn_act,
    preactivation_basic_block,
    preactivation_bottleneck,
    stem,
)
from .gating import gated_tail
from .spec import BlockSpec

__all__ = [
    "BatchNorm",
    "BlockSpec",
    "basic_block",
    "bottleneck",
    "conv_bn_act",
    "gated_tail",
    "preactivation_basic_block",
    "preactivation_bottleneck",
    "residual_block",
    "residual_block_training",
    "stem",
]
