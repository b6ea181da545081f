"""The end of a bottleneck in one kernel: 3x3 convolution, ReLU, 1x1 convolution, shortcut, ReLU (sm_90 and up).

    h = relu(scale * conv(x, w) + shift), rounded;   y = relu(scale3 * (h w3^T) + [x2 w2^T] + shift3 + [residual])

One program owns BOX_N x BOX_H x BOX_W = BLOCK_M output positions and all J channels of the 3x3, which runs by boxes
(boxes.py). Its accumulator becomes the operand of the second product in registers, and the K output channels are made
BLOCK_N at a time. The 3x3's output never exists in memory.

Moves: x once (once per tap from L2), the projection's operand or the residual once, y once; w and w3 once per program
from L2. J is 64, 128 or 256: it must fit one accumulator.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import boxes
from .boxes import accumulate, box_of, describe_map, describe_strided, describe_weight
from .configs import Config
from .convolution import Convolution
from .device import affine, relu
from .launch import Launch, precision

WIDTHS = (64, 128, 256)


@triton.jit
def _conv3x3_conv1x1_kernel(
    x,
    w,
    w3,
    x2,
    w2,
    residual,
    y,
    scale_ptr,
    shift_ptr,
    scale3_ptr,
    shift3_ptr,
    q_tiles,
    p_tiles,
    K,
    H,
    W,
    pixel,
    C2,
    J: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE3: tl.constexpr,
    SECOND: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W
    box = tl.program_id(0)
    q0 = box % q_tiles * BOX_W
    p0 = box // q_tiles % p_tiles * BOX_H
    n0 = box // q_tiles // p_tiles * BOX_N
    h = tl.zeros((BLOCK_M, J), tl.float32)
    h = accumulate(
        h, x, w, n0, p0, q0, 0, 0, J, H, W, pixel, None, None, 3, 3, STRIDE, PADDING, DILATION,
        False, False, PRECISION, BOX_N, BOX_H, BOX_W, J, BLOCK_K,
    )  # fmt: skip
    j = tl.arange(0, J)
    h = relu(affine(h, scale_ptr, shift_ptr, j, j < J, SCALE, True)).to(y.dtype)
    for k0 in range(0, K, BLOCK_N):
        b = w3.load([k0, 0, 0]).reshape(BLOCK_N, J)
        acc = tl.dot(h, b.T, input_precision=PRECISION)
        k = k0 + tl.arange(0, BLOCK_N)
        acc = affine(acc, scale3_ptr, shift3_ptr, k, k < K, SCALE3, True)
        if SECOND:
            acc = accumulate(
                acc, x2, w2, n0, p0, q0, k0, 0, C2, 0, 0, 0, None, None, 1, 1, 1, 0, 1,
                False, False, PRECISION, BOX_N, BOX_H, BOX_W, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if RESIDUAL:
            acc += residual.load([n0, p0, q0, k0]).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
        y.store([n0, p0, q0, k0], relu(acc).to(y.dtype).reshape(BOX_N, BOX_H, BOX_W, BLOCK_N))


def why_not(first: Convolution, last: Convolution, arch: int, config: Config) -> str | None:
    """Why the 3x3 and the 1x1 behind it cannot run as one so, or None. last.x stands for what first would write."""
    J, R, S, _ = first.weight.shape
    if (R, S) != (3, 3) or last.weight.shape[1:3] != (1, 1) or first.geometry.groups > 1:
        return "expected an ungrouped 3x3 convolution and a 1x1 behind it"
    if J not in WIDTHS:
        return f"expected {', '.join(map(str, WIDTHS))} channels between them, got {J}"
    if not first.relu or first.shift is None or first.second or first.residual is not None or first.lazy:
        return "expected shift and ReLU between them"
    if last.weight.shape[0] % config.BLOCK_N:
        return f"{last.weight.shape[0]} channels are no whole tiles of {config.BLOCK_N}"
    return boxes.why_not(first, arch, config) or boxes.why_not(last, arch, config)


def launch(first: Convolution, last: Convolution, config: Config, y: Tensor) -> Launch:
    """y: (N, K, P, Q) channels_last, to be written. Only where `why_not` is None."""
    J = first.weight.shape[0]
    N, K, P, Q = y.shape
    shape = box_of(first, config.BLOCK_M)
    n_tiles, p_tiles, q_tiles = (-(-n // s) for n, s in zip((N, P, Q), shape, strict=True))
    x2, w2 = last.second or (None, None)
    g = first.geometry
    _, _, H, W = first.x.shape
    arguments = dict(
        x=describe_strided(first.x, g.stride, (*shape, config.BLOCK_K)),
        w=describe_weight(first.weight, (J, config.BLOCK_K)),
        w3=describe_weight(last.weight, (config.BLOCK_N, J)),
        x2=None if x2 is None else describe_strided(x2, 1, (*shape, config.BLOCK_K)),
        w2=None if w2 is None else describe_weight(w2, (config.BLOCK_N, config.BLOCK_K)),
        residual=None if last.residual is None else describe_map(last.residual, (*shape, config.BLOCK_N)),
        y=describe_map(y, (*shape, config.BLOCK_N)),
        scale_ptr=first.scale,
        shift_ptr=first.shift,
        scale3_ptr=last.scale,
        shift3_ptr=last.shift,
        q_tiles=q_tiles,
        p_tiles=p_tiles,
        K=K,
        H=H,
        W=W,
        pixel=first.x.stride(3),
        C2=0 if x2 is None else x2.shape[1],
        J=J,
        STRIDE=g.stride,
        PADDING=g.padding,
        DILATION=g.dilation,
        SCALE=first.scale is not None,
        SCALE3=last.scale is not None,
        SECOND=x2 is not None,
        RESIDUAL=last.residual is not None,
        PRECISION=precision(),
        BOX_N=shape[0],
        BOX_H=shape[1],
        BOX_W=shape[2],
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
    )
    # Neither the 3x3's result nor the 1x1's operand touches memory.
    moved = first.bytes + last.bytes - 2 * first.rows * J * first.x.element_size()
    flops = first.flops + last.flops
    grid = n_tiles * p_tiles * q_tiles
    return Launch(_conv3x3_conv1x1_kernel, grid, arguments, config.options, moved, flops, f"{first} > {last}")
