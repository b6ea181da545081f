"""The blocks as functions, named as their modules. All are `residual_block_training`, whose docstring has dtypes,
errors and numerics."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..backends.contract import Pool
from .batch_norm import BatchNorm
from .block_training import residual_block_training
from .spec import BlockSpec


def _spec(
    chain: int,
    where: int,
    weights: Sequence[Tensor],
    shortcut: str | None,
    stride: int,
    dilation: int = 1,
    groups: int = 1,
    preactivation: bool = False,
) -> BlockSpec:
    """Return the spec of a block of `chain` convolutions.

    The convolution of index `where` has stride, dilation and groups; a projection has the stride too. shortcut: None
    for "identity" or "projection" by the number of weights.
    """
    if len(weights) not in (chain, chain + 1):
        raise ValueError(f"weights: expected {chain}, or {chain + 1} with a projection's, got {len(weights)}")

    def per_convolution(value: int, projection: int) -> tuple[int, ...]:
        values = [value if i == where else 1 for i in range(chain)]
        return (*values, *[projection] * (len(weights) - chain))

    return BlockSpec(
        per_convolution(stride, stride),
        per_convolution(dilation, 1),
        per_convolution(groups, 1),
        shortcut or ("identity" if len(weights) == chain else "projection"),
        relu=not preactivation,
        preactivation=preactivation,
    )


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

    Args:
        x: (N, C, H, W).
        weights: with J inner and K output channels (J, C, 1, 1), (J, J/groups, 3, 3), (K, J, 1, 1), and for a
            projection (K, C, 1, 1).
        norms: one per weight.
        stride, dilation, groups: of conv2. A projection has the stride too.
        shortcut: None for "identity" or "projection" by the number of weights, or "zero_pad".
    Returns:
        y: (N, K, ceil(H/stride), ceil(W/stride)).
    """
    return residual_block_training(x, weights, norms, _spec(3, 1, weights, shortcut, stride, dilation, groups))


def basic_block(
    x: Tensor, weights: Sequence[Tensor], norms: Sequence[BatchNorm], stride: int = 1, shortcut: str | None = None
) -> Tensor:
    """y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))

    Args:
        x: (N, C, H, W).
        weights: with K output channels (K, C, 3, 3), (K, K, 3, 3), and for a projection (K, C, 1, 1).
        norms: one per weight.
        stride: of conv1 and of a projection.
        shortcut: None for "identity" or "projection" by the number of weights, or "zero_pad".
    Returns:
        y: (N, K, ceil(H/stride), ceil(W/stride)).
    """
    return residual_block_training(x, weights, norms, _spec(2, 0, weights, shortcut, stride))


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

    weights: as of `bottleneck`. norms: three, of C, J and J channels. The shortcut is x, or a projection or zero
    padding of h.
    """
    spec = _spec(3, 1, weights, shortcut, stride, dilation, groups, preactivation=True)
    return residual_block_training(x, weights, norms, spec)


def preactivation_basic_block(
    x: Tensor, weights: Sequence[Tensor], norms: Sequence[BatchNorm], stride: int = 1, shortcut: str | None = None
) -> Tensor:
    """h = relu(bn1(x));  y = conv2(relu(bn2(conv1(h)))) + shortcut

    weights: as of `basic_block`. norms: two, of C and K channels. The shortcut is x, or a projection or zero padding of
    h.
    """
    return residual_block_training(x, weights, norms, _spec(2, 0, weights, shortcut, stride, preactivation=True))


def conv_bn_act(
    x: Tensor, weight: Tensor, norm: BatchNorm, stride: int = 1, dilation: int = 1, groups: int = 1, relu: bool = True
) -> Tensor:
    """y = relu(bn(conv(x, weight))), without the ReLU if `relu` is False.

    weight: (K, C/groups, R, R), R odd, padding dilation * (R // 2). x: (N, C, H, W) -> (N, K, ceil(H/stride), ...).
    """
    return residual_block_training(x, [weight], [norm], BlockSpec((stride,), (dilation,), (groups,), "none", relu))


def stem(
    x: Tensor,
    weight: Tensor,
    norm: BatchNorm,
    stride: int = 2,
    dilation: int = 1,
    groups: int = 1,
    pool: Sequence[int] = (3, 2, 1),
) -> Tensor:
    """y = max_pool(relu(bn(conv(x, weight))))

    weight: (K, C/groups, R, R), R odd, padding dilation * (R // 2). pool: kernel, stride and padding of the pooling;
    the padding is below every value.
    """
    spec = BlockSpec((stride,), (dilation,), (groups,), "none", pool=Pool(*pool))
    return residual_block_training(x, [weight], [norm], spec)
