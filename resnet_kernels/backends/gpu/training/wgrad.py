"""Weight gradients of 1x1 convolutions, and the moments of an activation: sums over rows of outer products (every GPU
from sm_80). torch's library (cuDNN on a GPU) computes other weight gradients, from materialized operands.

    dweight (K, C) = sum over rows of g^T x        moments: mean = sum of h / M,  M2 = sum of (h - mean)^T (h - mean)

K, C: channels of g and x. M: rows, the output positions of all images. J: channels of h.

One program instance owns a BLOCK_K x BLOCK_C tile of the result and one part of the rows, `span` of them. It computes
the values of BLOCK_M rows of both operands at a time, and multiplies them. Tensor cores truncate as they accumulate, so
every FLUSH rows are summed from zero and then added to the accumulator in fp32. The sums of g over rows are a product
with ones (exact; fp32, which tensor cores would round, is added instead). A second launch adds the parts in the order
of their rows.

Moments of a part are centred about the part's own mean and merged by Chan's formula. In fp32, the mean of the first
image is subtracted before the product. M2 is symmetric: only tiles on and above the diagonal are computed.

Memory traffic: g and x once from device memory (again per tile of the other operand's channels, from L2); (parts, K, C)
fp32 written and read again, mostly in L2; the result once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...contract import Geometry, Moments, Operand
from .. import configs
from ..configs import Config
from ..device import product_operand
from ..glue import library_wgrad
from ..launch import Launch, Work, arch_of, nbytes, precision, processors_of, record_library, submit
from . import reductions
from .products import LazyOperand, lazy_operand, operand_bytes, operand_row, operand_value, packed_bits

# Rows that tensor cores sum before the sum is added to the fp32 accumulator, and the fewest rows that are worth a part.
FLUSH, LEAST_SPAN = 128, 512

# The launches that add parts: parts per step, and elements that one program instance owns.
PARTS, ELEMENTS = 32, 64


@triton.jit
def operand_rows(operand, m, row_mask, P, Q, c0, BLOCK: tl.constexpr):
    """Return the operand's value at output positions m and channels c0 to c0 + BLOCK, 0 where row_mask is not set."""
    v = operand_value(operand, operand_row(operand, m, P, Q), row_mask, c0, BLOCK)
    if operand.a is not None or operand.centre is not None:
        v = tl.where(row_mask[:, None], v, 0.0).to(v.dtype)
    return v


@triton.jit
def _wgrad_kernel(
    g,
    x,
    parts_ptr,
    sums_ptr,
    M,
    P,
    Q,
    span,
    k_tiles,
    c_tiles,
    SUMS: tl.constexpr,
    MOMENTS: tl.constexpr,
    SAME: tl.constexpr,
    PRECISION: tl.constexpr,
    DOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """g, x: `LazyOperand`s. SUMS: also sum g over rows. MOMENTS: x is g, and tiles below the diagonal are left out.
    SAME: the tile's channels of x are its channels of g. DOTS: products of BLOCK_M rows per FLUSH rows."""
    tile = tl.program_id(0) % (k_tiles * c_tiles)
    part = tl.program_id(0) // (k_tiles * c_tiles)
    k0, c0 = tile % k_tiles * BLOCK_K, tile // k_tiles * BLOCK_C
    if MOMENTS and k0 > c0:
        return
    DTYPE: tl.constexpr = g.x.dtype.element_ty
    first = part * span
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    ones = tl.full((BLOCK_M, 16), 1.0, DTYPE)
    if DTYPE == tl.float32:
        sums = tl.zeros((BLOCK_K,), tl.float32)
    else:
        sums = tl.zeros((BLOCK_K, 16), tl.float32)
    for m0 in range(first, tl.minimum(first + span, M), DOTS * BLOCK_M):
        # Sum from zero, by two products or more: the compiler would fuse a single one with the addition after it.
        chunk = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
        chunk_sums = tl.zeros_like(sums)
        for i in tl.static_range(DOTS):
            m = m0 + i * BLOCK_M + tl.arange(0, BLOCK_M)
            row_mask = m < M
            a = operand_rows(g, m, row_mask, P, Q, k0, BLOCK_K)
            if SAME:
                b = a
            else:
                b = operand_rows(x, m, row_mask, P, Q, c0, BLOCK_C)
            chunk = tl.dot(
                product_operand(a, PRECISION).T, product_operand(b, PRECISION), chunk, input_precision=PRECISION
            )
            if SUMS:
                if DTYPE == tl.float32:
                    chunk_sums += tl.sum(a, 0)
                else:
                    chunk_sums = tl.dot(a.T, ones, chunk_sums)
        acc += chunk
        sums += chunk_sums
    k, c = k0 + tl.arange(0, BLOCK_K), c0 + tl.arange(0, BLOCK_C)
    at = (part.to(tl.int64) * g.C + k)[:, None] * x.C + c[None, :]
    tl.store(parts_ptr + at, acc, (k < g.C)[:, None] & (c < x.C)[None, :])
    # Of all tiles with the same channels k, one stores their sums.
    if SUMS and (k0 == c0 if MOMENTS else c0 == 0):
        if DTYPE == tl.float32:
            tl.store(sums_ptr + part * g.C + k, sums, k < g.C)
        else:
            # The product with ones has 16 equal columns.
            tl.store(sums_ptr + part * g.C + k, tl.sum(sums, 1) * 0.0625, k < g.C)


@triton.jit
def add_parts(parts_ptr, result_ptr, parts, n, tile, PARTS: tl.constexpr, ELEMENTS: tl.constexpr):
    """Store result (n) = sum of parts (parts, n), at ELEMENTS elements from tile * ELEMENTS on."""
    e = tile * ELEMENTS + tl.arange(0, ELEMENTS)
    total = tl.zeros((PARTS, ELEMENTS), tl.float32)
    for i0 in range(0, parts, PARTS):
        i = i0 + tl.arange(0, PARTS)
        total += tl.load(
            parts_ptr + i.to(tl.int64)[:, None] * n + e[None, :], (i < parts)[:, None] & (e < n)[None, :], 0.0
        )
    tl.store(result_ptr + e, tl.sum(total, 0), e < n)


@triton.jit
def _add_parts_kernel(
    parts_ptr,
    dweight_ptr,
    sum_parts_ptr,
    sums_ptr,
    parts,
    n,
    K,
    tiles,
    SUMS: tl.constexpr,
    PARTS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """The first `tiles` program instances add parts of the weight gradient, the others parts of the sums."""
    tile = tl.program_id(0)
    if tile < tiles:
        add_parts(parts_ptr, dweight_ptr, parts, n, tile, PARTS, ELEMENTS)
    elif SUMS:
        add_parts(sum_parts_ptr, sums_ptr, parts, K, tile - tiles, PARTS, ELEMENTS)


@triton.jit
def _merge_moments_kernel(
    parts_ptr,
    sums_ptr,
    shift_ptr,
    mean_ptr,
    M2_ptr,
    parts,
    M,
    J,
    span,
    SHIFTED: tl.constexpr,
    PARTS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """One program instance owns M2[j, c] for one j and ELEMENTS channels c with c >= j, and stores the mirrored
    elements.

    parts (parts, J, J) and sums (parts, J) are of h - shift; each part covers `span` rows.
    """
    tiles = tl.cdiv(J, ELEMENTS)
    j = tl.program_id(0) // tiles
    c0 = tl.program_id(0) % tiles * ELEMENTS
    if c0 + ELEMENTS <= j:
        return
    c = c0 + tl.arange(0, ELEMENTS)
    channel_mask = c < J
    j_total = tl.zeros((PARTS,), tl.float32)
    c_total = tl.zeros((PARTS, ELEMENTS), tl.float32)
    for i0 in range(0, parts, PARTS):
        i = i0 + tl.arange(0, PARTS)
        inside = (i < parts)[:, None] & channel_mask[None, :]
        j_total += tl.load(sums_ptr + i * J + j, i < parts, 0.0)
        c_total += tl.load(sums_ptr + (i * J)[:, None] + c[None, :], inside, 0.0)
    j_mean, c_mean = tl.sum(j_total, 0) / M, tl.sum(c_total, 0) / M
    M2 = tl.zeros((PARTS, ELEMENTS), tl.float32)
    for i0 in range(0, parts, PARTS):
        i = i0 + tl.arange(0, PARTS)
        inside = (i < parts)[:, None] & channel_mask[None, :]
        rows = tl.where(i < parts, tl.minimum(M - i * span, span), 1).to(tl.float32)[:, None]
        j_own = tl.load(sums_ptr + i * J + j, i < parts, 0.0)[:, None] / rows
        c_own = tl.load(sums_ptr + (i * J)[:, None] + c[None, :], inside, 0.0) / rows
        product = tl.load(parts_ptr + (i.to(tl.int64) * J + j)[:, None] * J + c[None, :], inside, 0.0)
        # Chan's formula: the part's moment about its own mean, and the moment of that mean about the mean of all rows.
        own = product - rows * j_own * c_own
        M2 += tl.where(inside, own + rows * (j_own - j_mean) * (c_own - c_mean[None, :]), 0.0)
    total = tl.sum(M2, 0)
    tl.store(M2_ptr + j * J + c, total, channel_mask & (c >= j))
    tl.store(M2_ptr + c * J + j, total, channel_mask & (c > j))
    if j == 0:
        if SHIFTED:
            c_mean += tl.load(shift_ptr + c, channel_mask, 0.0)
        tl.store(mean_ptr + c, c_mean, channel_mask)


def config_of(K: int, C: int, itemsize: int, arch: int, fma: bool) -> Config:
    """Return the configuration: BLOCK_N tiles the C channels of x, BLOCK_K the K channels of g, BLOCK_M the rows."""
    if fma:
        return configs.FMA_CONFIG
    in_shared = arch in configs.OPERANDS_IN_SHARED and itemsize == 2
    # On sm_120 wider 16-bit tiles, and fewer warps, have no spare register: ptxas puts 8 bytes of each thread on the
    # stack.
    small = arch == 120 and itemsize == 2
    BLOCK_K = min(128 if itemsize == 2 and not small else 64, max(16, configs.power_of_two(K)))
    BLOCK_C = min(128 if in_shared else 64, max(16, configs.power_of_two(C)))
    num_warps = 8 if BLOCK_K * BLOCK_C >= (64 if small else 128) * 64 else 4
    # A stage holds the FLUSH rows of one iteration of the mainloop.
    return Config(64 if in_shared else 32, BLOCK_C, BLOCK_K, num_warps, 2)


def parts_of(M: int, tiles: int, programs: int) -> tuple[int, int]:
    """Return (parts, rows of each part but the last, a multiple of FLUSH). There are enough parts to occupy all
    `programs` CTAs that the GPU holds at once, if there are enough rows."""
    parts = max(1, min(programs // tiles, M // LEAST_SPAN))
    span = -(-M // (parts * FLUSH)) * FLUSH
    return -(-M // span), span


def _launch(
    g: LazyOperand, x: LazyOperand, sizes: tuple[int, int, int], sums: bool, moments: bool
) -> tuple[Launch, int, int]:
    """Return (launch, parts, span). The launch's arguments parts_ptr and sums_ptr are its results. sizes: (N, P, Q)."""
    N, P, Q = sizes
    M, K, C, device, size = N * P * Q, g.C, x.C, g.x.device, g.x.element_size()
    # The moments of fp32 determine a variance, so their operands are not rounded to tf32.
    product_precision = "ieee" if moments else precision()
    fma = size == 4 and product_precision == "ieee"
    config = config_of(K, C, size, arch_of(device), fma)
    BLOCK_K, BLOCK_C = (64, 64) if fma else (config.BLOCK_K, config.BLOCK_N)
    if moments:
        BLOCK_K = BLOCK_C = min(BLOCK_K, BLOCK_C)
    BLOCK_M = config.BLOCK_K if fma else config.BLOCK_M
    k_tiles, c_tiles = -(-K // BLOCK_K), -(-C // BLOCK_C)
    tiles = k_tiles * (k_tiles + 1) // 2 if moments else k_tiles * c_tiles
    # The accumulators and the sums that are added to them take over 128 registers per thread: a multiprocessor holds 8
    # warps at once.
    at_once = 2 if fma else 8 // config.num_warps
    parts, span = parts_of(M, tiles, processors_of(device) * at_once)

    partial = torch.empty((parts, K, C), dtype=torch.float32, device=device)
    totals = torch.empty((parts, K), dtype=torch.float32, device=device) if sums else None
    arguments = dict(
        g=g,
        x=x,
        parts_ptr=partial,
        sums_ptr=totals,
        M=M,
        P=P,
        Q=Q,
        span=span,
        k_tiles=k_tiles,
        c_tiles=c_tiles,
        SUMS=sums,
        MOMENTS=moments,
        SAME=moments and k_tiles == 1,
        PRECISION=product_precision,
        # FMA does not truncate, and an iteration with more products spills.
        DOTS=1 if fma else FLUSH // BLOCK_M,
        BLOCK_M=BLOCK_M,
        BLOCK_K=BLOCK_K,
        BLOCK_C=BLOCK_C,
    )
    what = f"moments of {K} {P}x{Q}" if moments else f"1x1 {C}->{K} {P}x{Q} dweight"
    read = [operand_bytes(g, M)] + [operand_bytes(x, M)] * (not moments)
    copied = read[0] * c_tiles + read[-1] * k_tiles * (not moments)
    flops = M * K * (K + 1) if moments else 2 * M * K * C
    issued = 2 * parts * tiles * span * BLOCK_K * BLOCK_C
    work = Work(sum(read) + nbytes(partial, totals), flops, copied, issued)
    return Launch(_wgrad_kernel, k_tiles * c_tiles * parts, arguments, config.options, what, work), parts, span


def _by_rows(kernel: tuple[int, int], geometry: Geometry) -> bool:
    """Return whether each row of the convolution's result depends on one row of its operand."""
    return tuple(kernel) == (1, 1) and (geometry.padding, geometry.groups) == (0, 1)


def wgrad(
    g: Operand, x: Operand, kernel: tuple[int, int], geometry: Geometry, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return (dL/dweight (K, C/groups, R, S), the sum of g per channel (K) or None unless `sums`), both fp32.

    g: dL/dconv (N, K, P, Q). x: the convolution's operand (N, C, H, W). kernel: (R, S). See `contract.Backend.wgrad`.
    """
    N, K, P, Q = g.sizes
    C = x.tensor.shape[1]
    if not N * P * Q:
        like = g.tensor.new_zeros(K, dtype=torch.float32)
        return like.new_zeros(K, C // geometry.groups, *kernel), like if sums else None
    if not _by_rows(kernel, geometry):
        return _by_library(g, x, kernel, geometry, sums)
    made, parts, _ = _launch(
        lazy_operand(g, g.stride), lazy_operand(x, x.stride * geometry.stride), (N, P, Q), sums, moments=False
    )
    submit(made)
    dweight, total = made.arguments["parts_ptr"], made.arguments["sums_ptr"]
    if parts > 1:
        dweight, total = _added(dweight, total)
    return dweight.view(K, C, 1, 1), None if total is None else total.view(K)


def _added(parts: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return (parts, sums), each summed over its first dimension."""
    n, K = parts[0].numel(), 0 if sums is None else sums.shape[1]
    dweight, total = torch.empty_like(parts[0]), None if sums is None else torch.empty_like(sums[0])
    tiles = -(-n // ELEMENTS)
    arguments = dict(
        parts_ptr=parts,
        dweight_ptr=dweight,
        sum_parts_ptr=sums,
        sums_ptr=total,
        parts=parts.shape[0],
        n=n,
        K=K,
        tiles=tiles,
        SUMS=sums is not None,
        PARTS=PARTS,
        ELEMENTS=ELEMENTS,
    )
    moved = nbytes(parts, dweight, sums, total)
    grid = tiles + -(-K // ELEMENTS)
    what = f"add {parts.shape[0]} of {n}"
    submit(Launch(_add_parts_kernel, grid, arguments, {"num_warps": 4}, what, Work(moved, 0, moved, 0)))
    return dweight, total


def _by_library(
    g: Operand, x: Operand, kernel: tuple[int, int], geometry: Geometry, sums: bool
) -> tuple[Tensor, Tensor | None]:
    gv, xv = reductions.materialize(g), reductions.materialize(x)
    dweight = library_wgrad(gv, xv, kernel, geometry)
    record_library(xv, dweight, gv, " dweight")
    total = None
    if sums:
        stats = reductions.reduce(Operand(gv), "stats")
        total = stats.mean * stats.rows
    return dweight.float(), total


def moments(h: Operand) -> Moments:
    """Return the moments of h (N, J, P, Q) over its M = N*P*Q rows: mean (J) and M2 (J, J), fp32. See
    `contract.Backend.moments`."""
    N, J, P, Q = h.sizes
    M = N * P * Q
    new: dict[str, Any] = dict(dtype=torch.float32, device=h.tensor.device)
    if not M:
        return Moments(0, torch.full((J,), float("nan"), **new), torch.zeros(J, J, **new))
    shift = None
    if h.tensor.dtype == torch.float32:
        shift = reductions.reduce(_first_image(h), "stats").mean
        h = dataclasses.replace(h, centre=shift)
    lazy = lazy_operand(h, h.stride)
    made, parts, span = _launch(lazy, lazy, (N, P, Q), sums=True, moments=True)
    submit(made)
    mean, M2 = torch.empty(J, **new), torch.empty(J, J, **new)
    arguments = dict(
        parts_ptr=made.arguments["parts_ptr"],
        sums_ptr=made.arguments["sums_ptr"],
        shift_ptr=shift,
        mean_ptr=mean,
        M2_ptr=M2,
        parts=parts,
        M=M,
        J=J,
        span=span,
        SHIFTED=shift is not None,
        PARTS=PARTS,
        ELEMENTS=ELEMENTS,
    )
    moved = nbytes(*(t for t in arguments.values() if isinstance(t, Tensor)))
    what = f"merge {parts} moments of {J}"
    grid = J * -(-J // ELEMENTS)
    submit(Launch(_merge_moments_kernel, grid, arguments, {"num_warps": 4}, what, Work(moved, 0, moved, 0)))
    return Moments(M, mean, M2)


def _first_image(h: Operand) -> Operand:
    """Return the operand restricted to its first image."""
    second = None if h.second is None else (h.second[0][:1], *h.second[1:])
    mask: Tensor | Operand | None = h.mask
    if isinstance(mask, Operand):
        mask = dataclasses.replace(mask, tensor=mask.tensor[:1])
    elif mask is not None:
        mask = packed_bits(mask)[: h.tensor[:1, 0].numel()]
    return dataclasses.replace(h, tensor=h.tensor[:1], second=second, mask=mask)
