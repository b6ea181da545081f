"""Convolution by pointers: an implicit GEMM that gathers its rows. It takes any filter, stride, dilation, groups and
channel count, and any strides with adjacent channels, on every GPU from sm_80.

One program instance owns a tile of BLOCK_M output positions by BLOCK_N channels within one group. Positions are
numbered through all images, so no map size wastes rows. For each slice of BLOCK_K input channels and each tap, it
gathers the channels of its rows by asynchronous copies; rows whose tap is outside the map are masked to zero. Taps are
the inner loop: neighbouring taps read the same rows, from L1 if the copies are cached there (CACHE ".ca").

A group with few channels does not fill a matrix tile. `dispatch.pack` joins groups until they fill one, with zeros
between them (a dense block-diagonal weight). The zeros cost operations, of which grouped convolutions have some to
spare, and no traffic.

Memory traffic: x once from device memory (again per tile of output channels, from L2), the weights once per tile of
rows from L2, the residual once, y once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...contract import nhwc_strides
from ..configs import Config
from ..convolution import Convolution
from ..device import affine, lazy_value, product_operand, relu
from ..launch import Launch, precision


@triton.jit
def row_of(m, P, Q):
    """Return (image, output row, output column) of the m-th output position."""
    return m // Q // P, m // Q % P, m % Q


@triton.jit
def accumulate_gathered(
    acc,
    x_ptr,
    w_ptr,
    n,
    p,
    q,
    row_mask,
    k,
    K,
    c_first,
    C,
    H,
    W,
    stride_xn,
    stride_xh,
    stride_xw,
    a_ptr,
    b_ptr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    LAZY: tl.constexpr,
    LAZY_RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    CACHE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Mainloop: return acc + conv(x, w) at output positions (n, p, q) where `row_mask` is set, output channels k below
    K, and input channels c_first to c_first + C. acc [BLOCK_M, BLOCK_N]; w (K, R, S, C)."""
    h0, s0 = p * STRIDE - PADDING, q * STRIDE - PADDING
    # 64 bits: an activation, even one image of it, may have more than 2^31 elements.
    rows = x_ptr + (n.to(tl.int64) * stride_xn + h0.to(tl.int64) * stride_xh + s0 * stride_xw)
    columns = w_ptr + k.to(tl.int64) * (R * S * C)
    for step in range(R * S * tl.cdiv(C, BLOCK_K)):
        tap = step % (R * S)
        r, s = tap // S * DILATION, tap % S * DILATION
        c = step // (R * S) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = row_mask
        if PADDING > 0:
            inside = row_mask & (h0 + r >= 0) & (h0 + r < H) & (s0 + s >= 0) & (s0 + s < W)
        channel_mask = c < C
        a = tl.load(
            (rows + r * stride_xh + s * stride_xw)[:, None] + (c_first + c)[None, :],
            inside[:, None] & channel_mask[None, :],
            0.0,
            cache_modifier=CACHE,
        )
        if LAZY:
            a = lazy_value(a, a_ptr, b_ptr, (c_first + c, channel_mask), inside, LAZY_RELU)
        b = tl.load(columns[:, None] + (tap * C + c)[None, :], (k < K)[:, None] & channel_mask[None, :], 0.0)
        acc = tl.dot(product_operand(a, PRECISION), product_operand(b, PRECISION).T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _conv_gather_kernel(
    x_ptr,
    w_ptr,
    x2_ptr,
    w2_ptr,
    residual_ptr,
    y_ptr,
    scale_ptr,
    shift_ptr,
    a_ptr,
    b_ptr,
    M,
    H,
    W,
    P,
    Q,
    C,
    K,
    k_tiles,
    k_group,
    stride_xn,
    stride_xh,
    stride_xw,
    C2,
    stride_x2n,
    stride_x2h,
    stride_x2w,
    residual_channels,
    stride_rn,
    stride_rh,
    stride_rw,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    SECOND: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    LAZY: tl.constexpr,
    LAZY_RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    CACHE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """M: output positions. k_group: output channels per group. C2: input channels of the second product, a 1x1.
    residual_channels: channels of the residual; the others count as zero."""
    tile = tl.program_id(0)
    k0 = tile % k_tiles * BLOCK_N
    m = tile // k_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    k = k0 + tl.arange(0, BLOCK_N)
    row_mask = m < M
    n, p, q = row_of(m, P, Q)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = accumulate_gathered(
        acc, x_ptr, w_ptr, n, p, q, row_mask, k, K, k0 // k_group * C, C, H, W, stride_xn, stride_xh, stride_xw,
        a_ptr, b_ptr, R, S, STRIDE, PADDING, DILATION, LAZY, LAZY_RELU, PRECISION, CACHE, BLOCK_K,
    )  # fmt: skip
    acc = affine(acc, scale_ptr, shift_ptr, k, k < K, SCALE, SHIFT)
    if SECOND:
        acc = accumulate_gathered(
            acc, x2_ptr, w2_ptr, n, p, q, row_mask, k, K, 0, C2, 0, 0, stride_x2n, stride_x2h, stride_x2w,
            a_ptr, b_ptr, 1, 1, 1, 0, 1, False, False, PRECISION, CACHE, BLOCK_K,
        )  # fmt: skip
    if RESIDUAL:
        rows = residual_ptr + (n.to(tl.int64) * stride_rn + p.to(tl.int64) * stride_rh + q * stride_rw)
        residual_mask = row_mask[:, None] & (k < residual_channels)[None, :]
        acc += tl.load(rows[:, None] + k[None, :], residual_mask, 0.0).to(tl.float32)
    if RELU:
        acc = relu(acc)
    y = y_ptr + m.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), row_mask[:, None] & (k < K)[None, :])


def why_not(c: Convolution, config: Config) -> str | None:
    """Return why the convolution cannot run by pointers with this configuration, or None."""
    K, groups = c.weight.shape[0], c.geometry.groups
    if groups > 1 and K // groups % config.BLOCK_N:
        return f"expected output channels per group in whole tiles of {config.BLOCK_N}, got {K // groups}"
    return None


def launch(c: Convolution, config: Config, y: Tensor) -> Launch:
    """Return the launch that writes y (N, K, P, Q), channels_last. Call only if `why_not` returned None."""
    K, R, S, C = c.weight.shape
    N, _, P, Q = c.output_sizes
    _, _, H, W = c.x.shape
    g = c.geometry
    k_tiles = -(-K // config.BLOCK_N)
    x2, w2 = c.second or (None, None)
    a, b, lazy_relu = c.lazy or (None, None, False)
    strides = {"x": c.x, "x2": x2, "r": c.residual}
    arguments = dict(
        x_ptr=c.x,
        w_ptr=c.weight,
        x2_ptr=x2,
        w2_ptr=w2,
        residual_ptr=c.residual,
        y_ptr=y,
        scale_ptr=c.scale,
        shift_ptr=c.shift,
        a_ptr=a,
        b_ptr=b,
        M=c.rows,
        H=H,
        W=W,
        P=P,
        Q=Q,
        C=C,
        K=K,
        k_tiles=k_tiles,
        k_group=K // g.groups,
        C2=0 if x2 is None else x2.shape[1],
        residual_channels=0 if c.residual is None else c.residual.shape[1],
        R=R,
        S=S,
        STRIDE=g.stride,
        PADDING=g.padding,
        DILATION=g.dilation,
        SCALE=c.scale is not None,
        SHIFT=c.shift is not None,
        SECOND=x2 is not None,
        RESIDUAL=c.residual is not None,
        RELU=c.relu,
        LAZY=c.lazy is not None,
        LAZY_RELU=lazy_relu,
        PRECISION=precision(),
        CACHE=config.cache,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
    )
    for name, t in strides.items():
        n, h, w = (0, 0, 0) if t is None else nhwc_strides(t)
        arguments |= {f"stride_{name}n": n, f"stride_{name}h": h, f"stride_{name}w": w}
    grid = -(-c.rows // config.BLOCK_M) * k_tiles
    return Launch(_conv_gather_kernel, grid, arguments, config.options, str(c), c.work(config, grid))
