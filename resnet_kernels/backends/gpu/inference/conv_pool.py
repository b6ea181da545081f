"""The stem in one kernel: convolution with few input channels, affine, ReLU, 3x3 max pooling of stride 2 (from sm_80).

x has CHANNELS = 4 elements per pixel in memory (the image's three and a zero). One filter row then reads a contiguous
run of 4*S elements, which becomes BLOCK_E columns of the matrix product.

One program instance owns a strip of ROWS pooled rows of one image, BLOCK_Q - 1 pooled columns and BLOCK_N channels, and
walks down the rows. Pooled row p needs convolution rows 2p - 1, 2p and 2p + 1. Row 2p - 1 is carried over from the
previous pooled row, so a program instance computes one pooled row more than it stores. Columns work alike: even and odd
convolution columns are two products, and the odd ones shifted by one (a gather inside the tile) complete the window.

Memory traffic: x once, y once. The convolution's own output, four times as large as y, never exists.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...contract import Geometry, Pool
from ..configs import for_conv_pool, power_of_two
from ..device import affine, product_operand, relu
from ..launch import Launch, Work, arch_of, nbytes, precision, processors_of

CHANNELS = 4


@triton.jit
def _pool_row(even, odd, h, q, P, Q, shift_ptr, k, K, DTYPE: tl.constexpr):
    """Return the maximum over convolution columns 2q - 1, 2q and 2q + 1 of row h, [BLOCK_Q, BLOCK_N], rounded to DTYPE.
    Positions outside the map of P x Q count as -inf.

    even, odd [BLOCK_Q, BLOCK_N]: the products at columns 2q and 2q + 1. The tile's first q lacks column 2q - 1, so its
    maximum is incomplete.
    """
    row = (h >= 0) & (h < P)
    even = relu(affine(even, None, shift_ptr, k, k < K, False, True)).to(DTYPE)
    odd = relu(affine(odd, None, shift_ptr, k, k < K, False, True)).to(DTYPE)
    even = tl.where((row & (q >= 0) & (2 * q < Q))[:, None], even, float("-inf")).to(DTYPE)
    odd = tl.where((row & (q >= 0) & (2 * q + 1 < Q))[:, None], odd, float("-inf")).to(DTYPE)
    i = tl.arange(0, even.shape[0])
    before = tl.gather(odd, tl.maximum(i - 1, 0)[:, None].broadcast_to(odd.shape), 0)
    best = tl.maximum(even, odd, propagate_nan=tl.PropagateNan.ALL)
    # tl.maximum returns fp32 for bf16.
    return tl.maximum(best, before, propagate_nan=tl.PropagateNan.ALL).to(DTYPE)


@triton.jit
def _conv_pool_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    shift_ptr,
    H,
    W,
    P,
    Q,
    POOLED_P,
    POOLED_Q,
    K,
    strips,
    q_tiles,
    k_tiles,
    stride_xn,
    stride_xh,
    R: tl.constexpr,
    S: tl.constexpr,
    CHANNELS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """w (K, R, BLOCK_E): the 4*S elements of a filter row, then zeros. TAPS: filter rows that one product covers."""
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    tile = tl.program_id(0)
    k = tile % k_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tile // k_tiles
    q = tile % q_tiles * (BLOCK_Q - 1) - 1 + tl.arange(0, BLOCK_Q)
    tile = tile // q_tiles
    p0 = tile % strips * ROWS
    n = (tile // strips).to(tl.int64)
    i = tl.arange(0, TAPS * BLOCK_E)
    r, e = i // BLOCK_E, i % BLOCK_E
    s = 2 * q * STRIDE - PADDING
    w_columns = w_ptr + k[:, None] * (R * BLOCK_E) + i[None, :]
    image = x_ptr + n * stride_xn + (r * stride_xh)[None, :] + s[:, None] * CHANNELS + e[None, :]
    # The elements of a filter row that lie inside the map, for even convolution columns and for the odd ones beside
    # them.
    column = s[:, None] + (e // CHANNELS)[None, :]
    element_mask = (e < S * CHANNELS)[None, :]
    even_mask = element_mask & (column >= 0) & (column < W)
    odd_mask = element_mask & (column + STRIDE >= 0) & (column + STRIDE < W)
    carried = tl.full((BLOCK_Q, BLOCK_N), float("-inf"), DTYPE)
    for p in range(p0 - 1, min(p0 + ROWS, POOLED_P)):
        even0 = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
        odd0 = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
        even1 = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
        odd1 = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
        for r0 in range(0, R, TAPS):
            h0 = 2 * p * STRIDE - PADDING + r0
            h1 = h0 + STRIDE
            row0, row1 = image + h0 * stride_xh, image + h1 * stride_xh
            taps = r0 + r < R
            in0 = (taps & (h0 + r >= 0) & (h0 + r < H))[None, :]
            in1 = (taps & (h1 + r >= 0) & (h1 + r < H))[None, :]
            b = product_operand(tl.load(w_columns + r0 * BLOCK_E, (k < K)[:, None] & taps[None, :], 0.0), PRECISION)
            a = product_operand(tl.load(row0, in0 & even_mask, 0.0), PRECISION)
            even0 = tl.dot(a, b.T, even0, input_precision=PRECISION)
            a = product_operand(tl.load(row0 + STRIDE * CHANNELS, in0 & odd_mask, 0.0), PRECISION)
            odd0 = tl.dot(a, b.T, odd0, input_precision=PRECISION)
            a = product_operand(tl.load(row1, in1 & even_mask, 0.0), PRECISION)
            even1 = tl.dot(a, b.T, even1, input_precision=PRECISION)
            a = product_operand(tl.load(row1 + STRIDE * CHANNELS, in1 & odd_mask, 0.0), PRECISION)
            odd1 = tl.dot(a, b.T, odd1, input_precision=PRECISION)
        upper = _pool_row(even0, odd0, 2 * p, q, P, Q, shift_ptr, k, K, DTYPE)
        lower = _pool_row(even1, odd1, 2 * p + 1, q, P, Q, shift_ptr, k, K, DTYPE)
        best = tl.maximum(carried, upper, propagate_nan=tl.PropagateNan.ALL)
        best = tl.maximum(best, lower, propagate_nan=tl.PropagateNan.ALL)
        # The windows of the tile's first column and of the strip's first row are incomplete: neighbours store them.
        complete = (p >= p0) & (tl.arange(0, BLOCK_Q) > 0) & (q < POOLED_Q)
        y = y_ptr + ((n * POOLED_P + p) * POOLED_Q + q)[:, None] * K + k[None, :]
        tl.store(y, best, complete[:, None] & (k < K)[None, :])
        carried = lower


def why_not(weight: tuple[int, ...], geometry: Geometry, pool: Pool) -> str | None:
    """Return why the stem with a weight of sizes (K, C, R, S) cannot run as one kernel, or None."""
    if pool != Pool(3, 2, 1):
        return f"expected 3x3 max pooling of stride 2 and padding 1, got {pool}"
    if weight[1] > CHANNELS or geometry.groups > 1 or geometry.dilation > 1:
        return (
            f"expected at most {CHANNELS} input channels, one group and no dilation, got {weight[1]} channels and "
            f"{geometry}"
        )
    return None


def pack(weight: Tensor) -> Tensor:
    """Return (K, C, R, S) as (K, R, BLOCK_E): for each filter row, 4 channels of each of its S taps, then zeros."""
    K, C, R, S = weight.shape
    packed = weight.new_zeros((K, R, max(16, power_of_two(S * CHANNELS))))
    taps = packed[:, :, : S * CHANNELS].view(K, R, S, CHANNELS)
    taps[..., :C] = weight.permute(0, 2, 3, 1)
    return packed


def launch(x: Tensor, packed: Tensor, shift: Tensor, geometry: Geometry, y: Tensor, S: int) -> Launch:
    """Return the launch that writes y.

    x: (N, 4, H, W) channels_last; the channels after the image's are zeros. packed: the scaled weight, as `pack`
    returns it. shift: (K,) fp32. y: (N, K, pooled P, pooled Q) channels_last. S: columns of the filter.
    """
    N, _, H, W = x.shape
    K, R, BLOCK_E = packed.shape
    P, Q = geometry.output_size(H, R), geometry.output_size(W, S)
    POOLED_P, POOLED_Q = y.shape[2:]
    config = for_conv_pool(arch_of(x.device), x.element_size(), N, POOLED_P, processors_of(x.device))
    ROWS, BLOCK_Q, TAPS = config.rows, config.BLOCK_Q, config.taps
    BLOCK_N = min(64, max(16, power_of_two(K)))
    strips, q_tiles, k_tiles = -(-POOLED_P // ROWS), -(-POOLED_Q // (BLOCK_Q - 1)), -(-K // BLOCK_N)
    arguments = dict(
        x_ptr=x,
        w_ptr=packed,
        y_ptr=y,
        shift_ptr=shift,
        H=H,
        W=W,
        P=P,
        Q=Q,
        POOLED_P=POOLED_P,
        POOLED_Q=POOLED_Q,
        K=K,
        strips=strips,
        q_tiles=q_tiles,
        k_tiles=k_tiles,
        stride_xn=x.stride(0),
        stride_xh=x.stride(2),
        R=R,
        S=S,
        CHANNELS=CHANNELS,
        STRIDE=geometry.stride,
        PADDING=geometry.padding,
        PRECISION=precision(),
        ROWS=ROWS,
        TAPS=TAPS,
        BLOCK_Q=BLOCK_Q,
        BLOCK_N=BLOCK_N,
        BLOCK_E=BLOCK_E,
    )
    grid = N * strips * q_tiles * k_tiles
    flops = 2 * N * P * Q * K * R * S * 3
    # Each pooled row takes two convolution rows of even and of odd columns; each strip computes one row more.
    steps = grid * (ROWS + 1) * -(-R // TAPS) * TAPS * 4 * BLOCK_E
    copied = steps * BLOCK_Q * x.element_size() + nbytes(packed)
    work = Work(nbytes(x, packed, y), flops, copied, 2 * steps * BLOCK_Q * BLOCK_N)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    what = f"stem {R}x{S} 3->{K} {H}x{W}, max pool 3/2"
    return Launch(_conv_pool_kernel, grid, arguments, options, what, work)
