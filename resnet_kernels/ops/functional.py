"""The blocks as functions, by the names of their modules. All are `residual_block_training` or `preactivation_block`,
which tell dtypes, errors and numerics."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .batch_norm import BatchNorm
from .block_training import preactivation_block, residual_block_training


def _shortcut(chain: int, weights: Sequence[Tensor], shortcut: str | None) -> str:
    if len(weights) not in (chain, chain + 1):
        raise ValueError(f"weights: expected {chain}, or {chain + 1} with a projection's, got {len(weights)}")
    return shortcut or ("identity" if len(weights) == chain else "projection")


def _per_conv(chain: int, where: int, value: int, other: int, projection: int, weights: Sequence[Tensor]) -> list[int]:
    """`value` at convolution `where` of the chain, `other` at the rest of it, and what a projection has."""
    return [value if i == where else other for i in range(chain)] + [projection] * (len(weights) - chain)


def bottleneck(
    x: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[BatchNorm],
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    shortcut: str | None = None,
) -> Tensor:
    """y = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))

    weights: (J, C, 1, 1), (J, J/groups, 3, 3), (K, J, 1, 1), and of a projection (K, C, 1, 1). norms: as many. stride,
    dilation and groups are conv2's. shortcut: "identity" or "projection" by the number of weights, or "zero_pad".
    x: (N, C, H, W) -> (N, K, ceil(H/stride), ceil(W/stride)).
    """
    strides = _per_conv(3, 1, stride, 1, stride, weights)
    dilations, per_conv = _per_conv(3, 1, dilation, 1, 1, weights), _per_conv(3, 1, groups, 1, 1, weights)
    return residual_block_training(x, weights, norms, strides, dilations, per_conv, _shortcut(3, weights, shortcut))


def basic_block(
    x: Tensor, weights: Sequence[Tensor], norms: Sequence[BatchNorm], stride: int = 1, shortcut: str | None = None
) -> Tensor:
    """y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))

    weights: (K, C, 3, 3), (K, K, 3, 3), and of a projection (K, C, 1, 1). norms: as many. stride is conv1's. shortcut:
    "identity" or "projection" by the number of weights, or "zero_pad".
    x: (N, C, H, W) -> (N, K, ceil(H/stride), ceil(W/stride)).
    """
    strides, ones = _per_conv(2, 0, stride, 1, stride, weights), [1] * len(weights)
    return residual_block_training(x, weights, norms, strides, ones, ones, _shortcut(2, weights, shortcut))


def preactivation_bottleneck(
    x: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[BatchNorm],
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    shortcut: str | None = None,
) -> Tensor:
    """h = relu(bn1(x));  y = conv3(relu(bn3(conv2(relu(bn2(conv1(h))))))) + shortcut

    weights as of `bottleneck`; norms of C, J and J channels. shortcut: x, or by a projection or "zero_pad" of h.
    """
    strides = _per_conv(3, 1, stride, 1, stride, weights)
    dilations, per_conv = _per_conv(3, 1, dilation, 1, 1, weights), _per_conv(3, 1, groups, 1, 1, weights)
    return preactivation_block(x, weights, norms, strides, dilations, per_conv, _shortcut(3, weights, shortcut))


def preactivation_basic_block(
    x: Tensor, weights: Sequence[Tensor], norms: Sequence[BatchNorm], stride: int = 1, shortcut: str | None = None
) -> Tensor:
    """h = relu(bn1(x));  y = conv2(relu(bn2(conv1(h)))) + shortcut

    weights as of `basic_block`; norms of C and K channels. shortcut: x, or by a projection or "zero_pad" of h.
    """
    strides, ones = _per_conv(2, 0, stride, 1, stride, weights), [1] * len(weights)
    return preactivation_block(x, weights, norms, strides, ones, ones, _shortcut(2, weights, shortcut))


def conv_bn_act(
    x: Tensor, weight: Tensor, norm: BatchNorm, stride: int = 1, dilation: int = 1, groups: int = 1, relu: bool = True
) -> Tensor:
    """y = relu(bn(conv(x, weight))), without the ReLU if not `relu`.

    weight: (K, C/groups, R, R), R odd, padding dilation * (R // 2). x: (N, C, H, W) -> (N, K, ceil(H/stride), ...).
    """
    return residual_block_training(x, [weight], [norm], [stride], [dilation], [groups], "none", relu)
