"""Memory-bound passes: affine, residual, ReLU, and max pooling (every GPU from sm_80).

One program instance owns a tile of BLOCK_M output positions by BLOCK_C channels.

Memory traffic: x once (overlapping pooling windows reread it from L1 and L2), the residual once, y once. If the winners
are requested, one byte per element of y.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...contract import Pool, nhwc_strides
from ..configs import power_of_two
from ..device import affine, relu
from ..launch import Launch, Work, nbytes
from .gather import row_of


@triton.jit
def _bn_pass_kernel(
    x_ptr,
    residual_ptr,
    y_ptr,
    winners_ptr,
    a_ptr,
    b_ptr,
    shift_ptr,
    M,
    H,
    W,
    P,
    Q,
    C,
    stride_xn,
    stride_xh,
    stride_xw,
    stride_rn,
    stride_rh,
    stride_rw,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    AFFINE: tl.constexpr,
    OPERAND_RELU: tl.constexpr,
    SHIFT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = max over the window of relu(operand + shift + residual), rounded before the maximum; NaN wins.
    operand = relu(a * x + b), rounded.

    winners: for each y, the index within its window, row by row, of the first maximum (of the last NaN, as in torch);
    `contract.NO_WINNER` where y <= 0. winners_ptr may be None. Without pooling the window is 1x1.
    """
    c_tiles = tl.cdiv(C, BLOCK_C)
    m = tl.program_id(0) // c_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    row_mask, channel_mask = m < M, c < C
    n, p, q = row_of(m, P, Q)
    h0, s0 = p * STRIDE - PADDING, q * STRIDE - PADDING
    rows = n.to(tl.int64) * stride_xn + h0.to(tl.int64) * stride_xh + s0 * stride_xw
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), DTYPE)
    if winners_ptr is not None:
        where = tl.zeros((BLOCK_M, BLOCK_C), tl.int32)
    for tap in tl.static_range(R * R):
        r, s = tap // R, tap % R
        inside = row_mask & (h0 + r >= 0) & (h0 + r < H) & (s0 + s >= 0) & (s0 + s < W)
        mask = inside[:, None] & channel_mask[None, :]
        t = tl.load(x_ptr + (rows + r * stride_xh + s * stride_xw)[:, None] + c[None, :], mask, 0.0).to(tl.float32)
        t = affine(t, a_ptr, b_ptr, c, channel_mask, AFFINE, AFFINE)
        if OPERAND_RELU:
            t = relu(t).to(DTYPE).to(tl.float32)
        t = affine(t, None, shift_ptr, c, channel_mask, False, SHIFT)
        if RESIDUAL:
            at = residual_ptr + n.to(tl.int64) * stride_rn + (h0 + r).to(tl.int64) * stride_rh + (s0 + s) * stride_rw
            t += tl.load(at[:, None] + c[None, :], mask, 0.0).to(tl.float32)
        if RELU:
            t = relu(t)
        t = tl.where(mask, t.to(DTYPE), float("-inf"))
        if winners_ptr is not None:
            where = tl.where((t > best) | (t != t), tap, where)
        best = tl.maximum(best, t, propagate_nan=tl.PropagateNan.ALL)
    at, inside = m.to(tl.int64)[:, None] * C + c[None, :], row_mask[:, None] & channel_mask[None, :]
    tl.store(y_ptr + at, best, inside)
    if winners_ptr is not None:
        tl.store(winners_ptr + at, tl.where(best <= 0, 255, where).to(tl.uint8), inside)


def launch(
    x: Tensor,
    y: Tensor,
    operand: tuple[Tensor, Tensor] | None,
    operand_relu: bool,
    shift: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    pool: Pool,
    winners: Tensor | None = None,
) -> Launch:
    """Return the launch that writes y and, if given, winners.

    x, residual: (N, C, H, W), adjacent channels. operand: (a, b), per channel, of the affine that x is read through.
    y, winners (`Pooled.winners`): (N, C, P, Q), channels_last.
    """
    N, C, P, Q = y.shape
    BLOCK_C = min(64, power_of_two(C))
    # With winners, the loaded elements of all taps of a window may wait in registers: fewer elements per tile.
    elements = 4096 if winners is None else 4096 // x.element_size()
    BLOCK_M = min(128, elements // BLOCK_C)
    a, b = operand or (None, None)
    arguments = dict(
        x_ptr=x,
        residual_ptr=residual,
        y_ptr=y,
        winners_ptr=winners,
        a_ptr=a,
        b_ptr=b,
        shift_ptr=shift,
        M=N * P * Q,
        H=x.shape[2],
        W=x.shape[3],
        P=P,
        Q=Q,
        C=C,
        R=pool.kernel,
        STRIDE=pool.stride,
        PADDING=pool.padding,
        AFFINE=operand is not None,
        OPERAND_RELU=operand_relu,
        SHIFT=shift is not None,
        RESIDUAL=residual is not None,
        RELU=relu,
        BLOCK_M=BLOCK_M,
        BLOCK_C=BLOCK_C,
    )
    for name, t in {"x": x, "r": residual}.items():
        n, h, w = (0, 0, 0) if t is None else nhwc_strides(t)
        arguments |= {f"stride_{name}n": n, f"stride_{name}h": h, f"stride_{name}w": w}
    grid = -(-N * P * Q // BLOCK_M) * -(-C // BLOCK_C)
    what = f"pass {C} of {x.shape[2]}x{x.shape[3]}" + (f", max pool {pool.kernel}/{pool.stride}" * (pool.kernel > 1))
    moved = nbytes(x, residual, y, winners)
    return Launch(_bn_pass_kernel, grid, arguments, {"num_warps": 4}, what, Work(moved, 0, moved, 0))
