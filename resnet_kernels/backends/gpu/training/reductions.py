"""Elementwise passes of training over a tensor, and their reductions (every GPU from sm_80).

    t = epilogue(x)     reduction: statistics of t  |  sum(t), sum(t * xhat)  |  the bits of not (t <= 0)

One program instance owns BLOCK_C channels of `span` rows, and walks through them BLOCK_M rows at a time. It accumulates
statistics or sums separately for each element of its BLOCK_M x BLOCK_C tile (statistics by Welford's update: a mean and
squared deviations from it), merges the tile's rows at the end, and writes one partial result per channel.
`products.merge` merges the parts in the order of their rows. Without statistics or sums, a program instance has one
step.

Memory traffic: the operand, its second tensor and mask, the residual and its mask, xhat's tensor and the epilogue's
mask once (the last two together once if they are the same tensor); the result once if it is requested; one bit per
element for the mask; 8 bytes per channel and part for statistics or sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...contract import Epilogue, Normalized, Operand, Stats, nhwc_strides
from ..configs import power_of_two
from ..device import affine, relu
from ..glue import reduction_of_no_rows
from ..inference.gather import row_of
from ..launch import Launch, Work, nbytes, processors_of, submit
from .products import (
    LazyOperand,
    lazy_operand,
    mask_bits,
    merge,
    operand_bytes,
    operand_row,
    operand_value,
    packed_bits,
    row_major,
)

# CTAs per multiprocessor if each CTA has many steps.
PROGRAMS = 8


@triton.jit
def pack(bit, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return booleans packed to bytes [BLOCK_M, BLOCK_C / 8]: bit j of byte b is channel 8b + j."""
    split = bit.to(tl.int32).reshape(BLOCK_M, BLOCK_C // 8, 8)
    return tl.sum(split << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def _pass_kernel(
    x,
    residual,
    mask,
    xhat_ptr,
    mean_ptr,
    shift_ptr,
    y_ptr,
    bits_ptr,
    parts_ptr,
    M,
    P,
    Q,
    span,
    parts,
    xhat_pitch,
    SHIFT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    RELU: tl.constexpr,
    MASK: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x, residual, mask: `LazyOperand`s; a mask without x has bits. UPSAMPLE: the residual's zero-insertion factor; it
    adds to every UPSAMPLE-th row and column. REDUCE: "", "stats", "xhat" or "mask". parts: parts of the grid along the
    rows."""
    DTYPE: tl.constexpr = x.x.dtype.element_ty
    c_tiles = tl.cdiv(x.C, BLOCK_C)
    c0, part = tl.program_id(0) % c_tiles * BLOCK_C, tl.program_id(0) // c_tiles
    c = c0 + tl.arange(0, BLOCK_C)
    channel_mask = c < x.C
    first = part * span
    last = tl.minimum(first + span, M)
    # The two reduced quantities per element of the tile: mean and squared deviations from it, or the sums of t and of
    # t * (c - mean).
    one = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    two = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if REDUCE == "xhat":
        mean = tl.load(mean_ptr + c, channel_mask, 0.0)
    for m0 in range(first, last, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        row_mask = m < last
        inside = row_mask[:, None] & channel_mask[None, :]
        row = m.to(tl.int64)
        t = operand_value(x, operand_row(x, m, P, Q), row_mask, c0, BLOCK_C).to(tl.float32)
        t = affine(t, None, shift_ptr, c, channel_mask, False, SHIFT)
        if RESIDUAL:
            if UPSAMPLE == 1:
                t += operand_value(residual, operand_row(residual, m, P, Q), row_mask, c0, BLOCK_C).to(tl.float32)
            else:
                n, p, q = row_of(m, P, Q)
                rows, columns = tl.cdiv(P, UPSAMPLE), tl.cdiv(Q, UPSAMPLE)
                at = operand_row(residual, (n * rows + p // UPSAMPLE) * columns + q // UPSAMPLE, rows, columns)
                residual_rows = row_mask & (p % UPSAMPLE == 0) & (q % UPSAMPLE == 0)
                r = operand_value(residual, at, residual_rows, c0, BLOCK_C).to(tl.float32)
                t += tl.where(residual_rows[:, None], r, 0.0)
        if RELU:
            t = relu(t)
        if MASK:
            if mask.x is None:
                keep = mask_bits(mask, row, row_mask, c0, BLOCK_C)
            else:
                # NaN passes the mask.
                keep = ~(operand_value(mask, operand_row(mask, m, P, Q), row_mask, c0, BLOCK_C) <= 0)
            t = tl.where(keep, t, 0.0)
        y = t.to(DTYPE)
        if y_ptr is not None:
            tl.store(y_ptr + row[:, None] * x.C + c[None, :], y, inside)
        t = y.to(tl.float32)
        if REDUCE == "stats":
            off = t - one
            moved = one + off / ((m0 - first) // BLOCK_M + 1)
            two = tl.where(inside, two + off * (t - moved), two)
            one = tl.where(inside, moved, one)
        if REDUCE == "xhat":
            h = tl.load(xhat_ptr + row[:, None] * xhat_pitch + c[None, :], inside, 0.0).to(tl.float32)
            one += tl.where(inside, t, 0.0)
            two += tl.where(inside, t * (h - mean[None, :]), 0.0)
        if REDUCE == "mask":
            byte, pitch = c0 // 8 + tl.arange(0, BLOCK_C // 8), tl.cdiv(x.C, 8)
            bits = pack(~(t <= 0) & channel_mask[None, :], BLOCK_M, BLOCK_C)
            tl.store(bits_ptr + row[:, None] * pitch + byte[None, :], bits, row_mask[:, None] & (byte < pitch)[None, :])
    if REDUCE == "stats":
        counts = ((last - first - tl.arange(0, BLOCK_M) + BLOCK_M - 1) // BLOCK_M).to(tl.float32)[:, None]
        mean_of_rows = tl.sum(one * counts, 0) / (last - first)
        off = one - mean_of_rows[None, :]
        two += counts * off * off
        a = mean_of_rows
    else:
        a = tl.sum(one, 0)
    if REDUCE == "stats" or REDUCE == "xhat":
        tl.store(parts_ptr + part.to(tl.int64) * x.C + c, a, channel_mask)
        tl.store(parts_ptr + (parts + part).to(tl.int64) * x.C + c, tl.sum(two, 0), channel_mask)


def _masking(mask: Tensor | Operand, C: int) -> LazyOperand:
    """Return the epilogue's mask as a kernel argument: a tensor as packed bits, without x."""
    if isinstance(mask, Operand):
        return lazy_operand(mask, mask.stride)
    return LazyOperand(bits=packed_bits(mask), C=C)


def _grid_of(x: Operand, reducing: bool) -> tuple[int, int, int, int]:
    """Return (BLOCK_M, BLOCK_C, rows of a program instance, parts along the rows)."""
    N, C, P, Q = x.sizes
    M = N * P * Q
    BLOCK_C = min(64, max(16, power_of_two(C)))
    # A pooled operand loads from all windows that contain a position before it adds: fewer elements per tile.
    BLOCK_M = (2048 if x.pooled is None else 1024) // BLOCK_C
    parts = -(-M // BLOCK_M)
    if reducing:
        parts = min(parts, max(1, PROGRAMS * processors_of(x.tensor.device) // -(-C // BLOCK_C)))
    span = -(-M // (parts * BLOCK_M)) * BLOCK_M
    return BLOCK_M, BLOCK_C, span, -(-M // span)


def _run(x: Operand, epilogue: Epilogue, store: bool) -> tuple[Tensor | None, Any]:
    """Return (t if `store` else None, the reduction)."""
    sizes = N, C, P, Q = x.sizes
    M, device, by = N * P * Q, x.tensor.device, epilogue.reduce
    y = torch.empty(sizes, dtype=x.tensor.dtype, device=device, memory_format=torch.channels_last) if store else None
    bits = torch.empty((M, -(-C // 8)), dtype=torch.uint8, device=device) if by == "mask" else None
    if not M:
        return y, reduction_of_no_rows(C, by, device) if bits is None else bits
    reducing = by is not None and bits is None
    BLOCK_M, BLOCK_C, span, parts = _grid_of(x, reducing)
    normalized = row_major(by.tensor) if isinstance(by, Normalized) else None
    residual = None if epilogue.residual is None else lazy_operand(epilogue.residual, epilogue.residual.stride)
    mask = None if epilogue.mask is None else _masking(epilogue.mask, C)
    partial = torch.empty((2, parts, C), dtype=torch.float32, device=device) if reducing else None
    operand = lazy_operand(x, x.stride)
    arguments = dict(
        x=operand,
        residual=residual,
        mask=mask,
        xhat_ptr=normalized,
        mean_ptr=by.mean.float().contiguous() if isinstance(by, Normalized) else None,
        shift_ptr=None if epilogue.shift is None else epilogue.shift.float().contiguous(),
        y_ptr=y,
        bits_ptr=bits,
        parts_ptr=partial,
        M=M,
        P=P,
        Q=Q,
        span=span,
        parts=parts,
        xhat_pitch=0 if normalized is None else nhwc_strides(normalized)[2],
        SHIFT=epilogue.shift is not None,
        RESIDUAL=residual is not None,
        UPSAMPLE=epilogue.upsample,
        RELU=epilogue.relu,
        MASK=mask is not None,
        REDUCE="xhat" if isinstance(by, Normalized) else by or "",
        BLOCK_M=BLOCK_M,
        BLOCK_C=BLOCK_C,
    )
    copied = operand_bytes(operand, M) + nbytes(normalized, y, bits, partial)
    copied += 0 if mask is None else operand_bytes(mask, M)
    if residual is not None:
        copied += operand_bytes(residual, N * -(-P // epilogue.upsample) * -(-Q // epilogue.upsample))
    # The mask's tensor may also be xhat's. A CTA reads its rows of it twice, in close succession.
    shared = isinstance(by, Normalized) and isinstance(epilogue.mask, Operand) and epilogue.mask.tensor is by.tensor
    moved = copied - nbytes(normalized) * shared
    what = f"pass {C} {P}x{Q}" + f" {arguments['REDUCE']}" * (by is not None)
    grid = parts * -(-C // BLOCK_C)
    submit(Launch(_pass_kernel, grid, arguments, {"num_warps": 4}, what, Work(moved, 0, copied, 0)))
    if partial is None:
        return y, bits
    rstd = by.rstd.float().contiguous() if isinstance(by, Normalized) else None
    a, b = merge(partial, M, span, by == "stats", rstd)
    return y, Stats(M, a, b) if by == "stats" else (a, b)


def bn_pass(x: Operand, epilogue: Epilogue) -> tuple[Tensor, Any]:
    """Return (t, reduction): t = epilogue(x), (N, K, P, Q); see `contract.Epilogue`. The reduction of reduce="mask" is
    uint8 (M, ceil(K/8)), M = N*P*Q: bit j of byte b is channel 8b + j, set where not (t <= 0)."""
    t, reduced = _run(x, epilogue, store=True)
    assert t is not None
    return t, reduced


def reduce(x: Operand, by: str | Normalized) -> Any:
    """Return the reduction of `bn_pass` of x by "stats" or `Normalized`, without storing its result."""
    return _run(x, Epilogue(reduce=by), store=False)[1]


def reduce_masked(t: Tensor, epilogue: Epilogue) -> Any:
    """Return the reduction of `bn_pass` of t with this epilogue, without storing its result."""
    return _run(Operand(t), epilogue, store=False)[1]


def materialize(x: Operand) -> Tensor:
    """Return the operand's value (N, C, P, Q), channels_last: its own tensor if it is plain."""
    return row_major(x.tensor) if x.plain else bn_pass(x, Epilogue())[0]
