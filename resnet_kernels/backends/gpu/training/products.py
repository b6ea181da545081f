"""Sums of one or two 1x1 products with all that training applies around them: forward convolutions and data gradients
of stride 1, and forward ones of any stride, as matrix products over rows (every GPU from sm_80).

One program owns BLOCK_M rows (output positions, counted through the images) of BLOCK_N channels. For each slice of
BLOCK_K channels it copies rows of the operand, and of what is applied to it (a second tensor, a packed mask),
asynchronously, makes the operand's value in registers and multiplies it from there; weights come in either layout. The
epilogue applies scale, shift, residual, ReLU and mask, rounds, and writes the result, with one partial sum per channel
and program or with packed bits. `merge` then adds the partial sums, in an order that the sizes alone decide.

Moves: each operand, its second tensor and mask once from device memory (again per tile of output channels, from L2);
the residual, its mask, and the tensor of mask and xhat once; the weights once per tile of rows, from L2; the result
once, and 8 bytes per tile of rows and channel, or a bit per element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...contract import Epilogue, Normalized, Operand, nhwc_strides
from .. import configs
from ..configs import Config
from ..device import affine, factor, relu, settled
from ..inference.gather import row_of
from ..launch import Launch, Work, arch_of, nbytes, precision, processors_of, submit

# Partial sums that a program of `merge` adds, and channels that it does so for.
MERGED, MERGED_CHANNELS = 128, 32


class Lazy(NamedTuple):
    """An `Operand` as the kernels take it; what it lacks is None.

    Rows of x, of `second` and of `masking` are pitch, second_pitch and masking_pitch elements apart. Those of the
    mask's bits follow each other, in bytes or, where channels fill them, in words. Another operand as mask: where not
    mask_a * masking + mask_b <= 0; without `masking` it is `second`. H x W is the map that STRIDE samples; with
    `winners`, the one that was pooled to P x Q, the map of x and of winners.
    """

    x: Any = None
    second: Any = None
    bits: Any = None
    a: Any = None
    b: Any = None
    a2: Any = None
    mean: Any = None
    centre: Any = None
    C: int = 0
    pitch: int = 0
    second_pitch: int = 0
    H: int = 0
    W: int = 0
    STRIDE: Any = tl.constexpr(1)
    RELU: Any = tl.constexpr(False)
    masking: Any = None
    masking_pitch: int = 0
    mask_a: Any = None
    mask_b: Any = None
    winners: Any = None
    P: int = 0
    Q: int = 0
    KERNEL: Any = None
    POOL_STRIDE: Any = None
    POOL_PADDING: Any = None


@triton.jit
def row_in(operand, m, P, Q):
    """The operand's row (64 bits: elements may be more than 2^31) for the m-th output position."""
    if operand.STRIDE == 1:
        row = m.to(tl.int64)
    else:
        n, p, q = row_of(m, P, Q)
        row = (n.to(tl.int64) * operand.H + p * operand.STRIDE) * operand.W + q * operand.STRIDE
    return row


@triton.jit
def kept(operand, rows, there, c0, BLOCK: tl.constexpr):
    """Whether the operand's mask keeps channels c0 to c0 + BLOCK. [BLOCK_M, BLOCK]"""
    WIDTH: tl.constexpr = operand.bits.dtype.element_ty.primitive_bitwidth
    word = c0 // WIDTH + tl.arange(0, BLOCK // WIDTH)
    words = tl.cdiv(operand.C, WIDTH)
    packed = tl.load(operand.bits + rows[:, None] * words + word[None, :], there[:, None] & (word < words)[None, :], 0)
    bits = packed[:, :, None] >> tl.arange(0, WIDTH).to(packed.dtype)[None, None, :]
    return (bits & 1).reshape(rows.shape[0], BLOCK) != 0


@triton.jit
def unpooled(operand, rows, inside, c):
    """At rows of the map that was pooled and channels c, the sum of x over the windows whose maximum stood there."""
    KERNEL: tl.constexpr = operand.KERNEL
    STRIDE: tl.constexpr = operand.POOL_STRIDE
    SIDE: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    # Positions fit 32 bits, elements may not.
    n, h, w = row_of(rows.to(tl.int32), operand.H, operand.W)
    h, w = h + operand.POOL_PADDING, w + operand.POOL_PADDING
    t = tl.zeros(inside.shape, tl.float32)
    # Windows that hold it begin less than KERNEL before it.
    for i in tl.static_range(SIDE):
        for j in tl.static_range(SIDE):
            p, q = h // STRIDE - i, w // STRIDE - j
            r, s = h - p * STRIDE, w - q * STRIDE
            holds = (p >= 0) & (p < operand.P) & (q >= 0) & (q < operand.Q) & (r < KERNEL) & (s < KERNEL)
            at = (((n.to(tl.int64) * operand.P + p) * operand.Q + q) * operand.C)[:, None] + c[None, :]
            there = inside & holds[:, None]
            element = tl.load(operand.winners + at, there, 255).to(tl.int32)
            won = element == (r * KERNEL + s)[:, None]
            t += tl.where(won, tl.load(operand.x + at, there, 0.0).to(tl.float32), 0.0)
    return t


@triton.jit
def value(operand, rows, there, c0, BLOCK: tl.constexpr):
    """What the operand stands for at channels c0 to c0 + BLOCK, [BLOCK_M, BLOCK]; 0 beyond its last channel, anything
    where there is no row."""
    c = c0 + tl.arange(0, BLOCK)
    known = c < operand.C
    inside = there[:, None] & known[None, :]
    if operand.winners is not None:
        t = unpooled(operand, rows, inside, c)
    else:
        t = tl.load(operand.x + rows[:, None] * operand.pitch + c[None, :], inside, 0.0).to(tl.float32)
    if operand.bits is not None:
        t = tl.where(kept(operand, rows, there, c0, BLOCK), t, 0.0)
    if operand.second is not None:
        s = tl.load(operand.second + rows[:, None] * operand.second_pitch + c[None, :], inside, 0.0).to(tl.float32)
    if operand.mask_a is not None:
        if operand.masking is not None:
            at = operand.masking + rows[:, None] * operand.masking_pitch + c[None, :]
            h = tl.load(at, inside, 0.0).to(tl.float32)
        else:
            h = s
        # Rounding can make it 0. A NaN keeps.
        h = affine(h, operand.mask_a, operand.mask_b, c, known, True, True).to(operand.x.dtype.element_ty)
        t = tl.where(h.to(tl.float32) <= 0, 0.0, t)
    if operand.a is not None:
        a, b = tl.load(operand.a + c, known, 0.0), tl.load(operand.b + c, known, 0.0)
        t = tl.fma(t, a[None, :].broadcast_to(t.shape), b[None, :].broadcast_to(t.shape))
    if operand.second is not None:
        a2, mean = tl.load(operand.a2 + c, known, 0.0), tl.load(operand.mean + c, known, 0.0)
        t = tl.fma(s - mean[None, :], a2[None, :].broadcast_to(t.shape), t)
    if operand.RELU:
        t = relu(t)
    if operand.centre is not None:
        t = t - tl.load(operand.centre + c, known, 0.0)[None, :]
    return t.to(operand.x.dtype.element_ty)


@triton.jit
def multiply(
    acc, operand, w_ptr, stride_wc, stride_wk, rows, there, k, K, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):
    """acc += operand @ w at rows where `there` and output channels k below K."""
    for c0 in range(0, operand.C, BLOCK_K):
        a = value(operand, rows, there, c0, BLOCK_K)
        c = c0 + tl.arange(0, BLOCK_K)
        at = c.to(tl.int64)[:, None] * stride_wc + k.to(tl.int64)[None, :] * stride_wk
        b = tl.load(w_ptr + at, (c < operand.C)[:, None] & (k < K)[None, :], 0.0)
        acc = settled(tl.dot(factor(a, PRECISION), factor(b, PRECISION), acc, input_precision=PRECISION), operand.C)
    return acc


@triton.jit
def _products_kernel(
    first,
    w_ptr,
    stride_wc,
    stride_wk,
    second,
    w2_ptr,
    stride_w2c,
    stride_w2k,
    scale_ptr,
    shift_ptr,
    residual,
    mask_ptr,
    mask_a_ptr,
    mask_b_ptr,
    xhat_ptr,
    mean_ptr,
    y_ptr,
    bits_ptr,
    parts_ptr,
    M,
    P,
    Q,
    K,
    k_tiles,
    m_tiles,
    mask_pitch,
    xhat_pitch,
    SECOND: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    RELU: tl.constexpr,
    MASK: tl.constexpr,
    MASK_AFFINE: tl.constexpr,
    REDUCE: tl.constexpr,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """REDUCE: "", "stats", "mask", or "xhat", whose tensor is the mask's if SHARED."""
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    tile = tl.program_id(0)
    k0, m_tile = tile % k_tiles * BLOCK_N, tile // k_tiles
    m, k = m_tile * BLOCK_M + tl.arange(0, BLOCK_M), k0 + tl.arange(0, BLOCK_N)
    there, known = m < M, k < K
    inside = there[:, None] & known[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = multiply(
        acc, first, w_ptr, stride_wc, stride_wk, row_in(first, m, P, Q), there, k, K, PRECISION, BLOCK_K,
    )  # fmt: skip
    acc = affine(acc, scale_ptr, shift_ptr, k, known, SCALE, SHIFT)
    if SECOND:
        acc = multiply(
            acc, second, w2_ptr, stride_w2c, stride_w2k, row_in(second, m, P, Q), there, k, K, PRECISION, BLOCK_K,
        )  # fmt: skip
    row = m.to(tl.int64)
    if RESIDUAL:
        if UPSAMPLE == 1:
            acc += value(residual, row, there, k0, BLOCK_N).to(tl.float32)
        else:
            n, p, q = row_of(m, P, Q)
            at = (n.to(tl.int64) * residual.H + p // UPSAMPLE) * residual.W + q // UPSAMPLE
            stands = there & (p % UPSAMPLE == 0) & (q % UPSAMPLE == 0)
            r = value(residual, at, stands, k0, BLOCK_N).to(tl.float32)
            acc += tl.where(stands[:, None], r, 0.0)
    if RELU:
        acc = relu(acc)
    if MASK:
        c = tl.load(mask_ptr + row[:, None] * mask_pitch + k[None, :], inside, 0.0).to(tl.float32)
        # Its ReLU changes nothing about what is above 0; rounding does. A NaN keeps.
        h = affine(c, mask_a_ptr, mask_b_ptr, k, known, MASK_AFFINE, MASK_AFFINE).to(DTYPE).to(tl.float32)
        acc = tl.where(h <= 0, 0.0, acc)
    y = acc.to(DTYPE)
    tl.store(y_ptr + row[:, None] * K + k[None, :], y, inside)
    t = tl.where(there[:, None], y.to(tl.float32), 0.0)
    if REDUCE == "stats":
        rows = tl.minimum(BLOCK_M, M - m_tile * BLOCK_M).to(tl.float32)
        mean = tl.sum(t, 0) / rows
        off = tl.where(there[:, None], t - mean[None, :], 0.0)
        tl.store(parts_ptr + m_tile.to(tl.int64) * K + k, mean, known)
        tl.store(parts_ptr + (m_tiles + m_tile).to(tl.int64) * K + k, tl.sum(off * off, 0), known)
    if REDUCE == "xhat":
        if not SHARED:
            c = tl.load(xhat_ptr + row[:, None] * xhat_pitch + k[None, :], inside, 0.0).to(tl.float32)
        off = c - tl.load(mean_ptr + k, known, 0.0)[None, :]
        tl.store(parts_ptr + m_tile.to(tl.int64) * K + k, tl.sum(t, 0), known)
        tl.store(parts_ptr + (m_tiles + m_tile).to(tl.int64) * K + k, tl.sum(t * off, 0), known)
    if REDUCE == "mask":
        bit = tl.where((t <= 0) | ~known[None, :], 0, 1).reshape(BLOCK_M, BLOCK_N // 8, 8)
        packed = tl.sum(bit << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)
        byte, pitch = k0 // 8 + tl.arange(0, BLOCK_N // 8), tl.cdiv(K, 8)
        tl.store(bits_ptr + row[:, None] * pitch + byte[None, :], packed, there[:, None] & (byte < pitch)[None, :])


@triton.jit
def _merge_kernel(
    parts_ptr,
    merged_ptr,
    rstd_ptr,
    T,
    G,
    C,
    M,
    span,
    STATS: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """merged (2, G, C) of parts (2, T, C), BLOCK_T at a time: means and sums of squared deviations by Chan's formula,
    the i-th of `span` rows from span*i on, of M in all; else sums, the second times rstd if SCALED."""
    c_tiles = tl.cdiv(C, BLOCK_C)
    group = tl.program_id(0) // c_tiles
    i = group * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(0) % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (i < T)[:, None] & (c < C)[None, :]
    first = tl.load(parts_ptr + i.to(tl.int64)[:, None] * C + c[None, :], inside, 0.0)
    other = tl.load(parts_ptr + (T + i).to(tl.int64)[:, None] * C + c[None, :], inside, 0.0)
    if STATS:
        rows = tl.minimum(tl.maximum(M - i.to(tl.int64) * span, 0), span).to(tl.float32)[:, None]
        total = tl.sum(rows, 0)
        mean = tl.sum(first * rows, 0) / total
        off = first - mean[None, :]
        a, b = mean, tl.sum(other + rows * off * off, 0)
    else:
        a, b = tl.sum(first, 0), tl.sum(other, 0)
        if SCALED:
            b = b * tl.load(rstd_ptr + c, c < C, 0.0)
    tl.store(merged_ptr + group.to(tl.int64) * C + c, a, c < C)
    tl.store(merged_ptr + (G + group).to(tl.int64) * C + c, b, c < C)


class Rows(NamedTuple):
    """A product of every stride-th row and column of the operand with w (K, C) of any strides; scale per result's
    channel."""

    operand: Operand
    w: Tensor
    stride: int
    scale: Tensor | None = None


def in_rows(t: Tensor) -> Tensor:
    """With channels next to each other and rows at one distance: itself if it is so."""
    n, h, w = nhwc_strides(t)
    line = (t.stride(1) == 1 or t.shape[1] == 1) and h == t.shape[3] * w and n == t.shape[2] * h
    return t if line else t.contiguous(memory_format=torch.channels_last)


def packed_bits(mask: Tensor) -> Tensor:
    """(M, ceil(K/8)) bytes of a mask (N, K, P, Q), or itself if it is that: bit j of byte b is channel 8b + j."""
    if mask.dtype == torch.uint8 and mask.dim() == 2:
        return mask
    keep = mask if mask.dtype == torch.bool else ~(mask <= 0)
    rows = F.pad(keep.permute(0, 2, 3, 1).flatten(0, 2), (0, -keep.shape[1] % 8)).unflatten(1, (-1, 8))
    return (rows << torch.arange(8, device=mask.device)).sum(2).to(torch.uint8)


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def lazy_of(o: Operand, stride: int = 1, block: int = 8) -> Lazy:
    """block: of how many channels a program takes a multiple at a time."""
    x = in_rows(o.tensor)
    _, C, P, Q = x.shape
    a, b = o.affine or (None, None)
    second, a2, mean = o.second or (None, None, None)
    second = None if second is None else in_rows(second)
    H, W = (P, Q) if o.pooled is None else o.pooled.size
    more: dict[str, Any] = {}
    if isinstance(o.mask, Operand):
        more = _masked_by(o.mask, o.second)
    elif o.mask is not None:
        bits = packed_bits(o.mask)
        # Bytes are too narrow for asynchronous copies.
        words = (C % 32, block % 32, bits.data_ptr() % 4) == (0, 0, 0)
        more = {"bits": bits.view(torch.int32) if words else bits}
    if o.pooled is not None:
        x = x.contiguous(memory_format=torch.channels_last)
        winners = o.pooled.winners.contiguous(memory_format=torch.channels_last)
        kernel, step, padding = map(tl.constexpr, o.pooled.pool)
        more |= dict(winners=winners, P=P, Q=Q, KERNEL=kernel, POOL_STRIDE=step, POOL_PADDING=padding)
    return Lazy(
        x=x,
        second=second,
        a=_vector(a),
        b=_vector(b),
        a2=_vector(a2),
        mean=_vector(mean),
        centre=_vector(o.centre),
        C=C,
        pitch=nhwc_strides(x)[2],
        second_pitch=0 if second is None else nhwc_strides(second)[2],
        H=H,
        W=W,
        STRIDE=tl.constexpr(stride),
        RELU=tl.constexpr(o.relu),
        **more,
    )


def _masked_by(mask: Operand, second: tuple[Tensor, Tensor, Tensor] | None) -> dict[str, Any]:
    """The fields of `Lazy` for a mask by another operand, which is nothing but affine and ReLU."""
    C = mask.tensor.shape[1]
    a, b = mask.affine or (mask.tensor.new_ones(C), mask.tensor.new_zeros(C))
    vectors = {"mask_a": _vector(a), "mask_b": _vector(b)}
    if second is not None and second[0] is mask.tensor:
        return vectors
    masking = in_rows(mask.tensor)
    return vectors | {"masking": masking, "masking_pitch": nhwc_strides(masking)[2]}


def bytes_of(o: Lazy, rows: int) -> int:
    """Of so many rows of what an operand consists of; of a pooled one, of all its rows."""
    tensors = [o.second, o.masking] if o.winners is not None else [o.x, o.second, o.masking]
    bits = 0 if o.bits is None else -(-o.C // 8)
    each = bits + sum(o.C * t.element_size() for t in tensors if t is not None)
    return rows * each + (0 if o.winners is None else nbytes(o.x, o.winners))


# Steps of a sum from which a tile of 128 channels pays: with fewer the epilogue takes most of the time, and more
# programs on a multiprocessor hide it.
LONG = 4


def config_of(M: int, K: int, C: int, itemsize: int, device: torch.device) -> Config:
    """For M rows of K channels, sums over C or less."""
    arch, processors = arch_of(device), processors_of(device)
    if itemsize == 4 and precision() == "ieee":
        return configs.BY_FMA
    in_shared = arch in configs.OPERANDS_IN_SHARED
    BLOCK_K = min((128 if in_shared else 64) // itemsize, max(16, configs.power_of_two(C)))
    wide = in_shared and itemsize == 2 and C >= LONG * BLOCK_K
    BLOCK_M, BLOCK_N = 128, min(128 if wide else 64, max(16, configs.power_of_two(K)))
    while BLOCK_M > 64 and -(-M // BLOCK_M) * -(-K // BLOCK_N) < processors:
        BLOCK_M //= 2
    # Of an operand of two tensors, three stages just spill for sm_80.
    return Config(BLOCK_M, BLOCK_N, BLOCK_K, 8 if BLOCK_M * BLOCK_N >= 128 * 64 else 4, 3 if in_shared else 4)


def merge(parts: Tensor, rows: int, span: int, stats: bool, rstd: Tensor | None = None) -> Tensor:
    """(2, C) of parts (2, T, C), the i-th of `span` rows: means and sums of squared deviations, or sums."""
    while True:
        _, T, C = parts.shape
        groups = -(-T // MERGED)
        merged = parts.new_empty(2, groups, C)
        arguments = dict(
            parts_ptr=parts,
            merged_ptr=merged,
            rstd_ptr=rstd if groups == 1 else None,
            T=T,
            G=groups,
            C=C,
            M=rows,
            span=span,
            STATS=stats,
            SCALED=rstd is not None and groups == 1,
            BLOCK_T=min(MERGED, max(16, configs.power_of_two(T))),
            BLOCK_C=MERGED_CHANNELS,
        )
        moved = nbytes(parts, merged)
        grid = groups * -(-C // MERGED_CHANNELS)
        what = f"merge {T} of {C}"
        submit(Launch(_merge_kernel, grid, arguments, {"num_warps": 4}, what, Work(moved, 0, moved, 0)))
        if groups == 1:
            return merged[:, 0]
        parts, span = merged, span * MERGED


def launch(
    products: Sequence[Rows], epilogue: Epilogue, config: Config, y: Tensor, reduced: Tensor | None = None
) -> Launch:
    """y: (N, K, P, Q) channels_last, to be written, and what is reduced: bits (M, ceil(K/8)) or parts (2, tiles of
    rows, K). Only the first product may have a scale. The epilogue's mask, if any, is an Operand of no more than affine
    and ReLU; its residual has stride 1."""
    N, K, P, Q = y.shape
    M = N * P * Q
    one, two = products[0], products[1] if len(products) > 1 else None
    residual, mask, by = epilogue.residual, epilogue.mask, epilogue.reduce
    assert mask is None or isinstance(mask, Operand)
    k_tiles, m_tiles = -(-K // config.BLOCK_N), -(-M // config.BLOCK_M)
    masked = None if mask is None else in_rows(mask.tensor)
    normalized = in_rows(by.tensor) if isinstance(by, Normalized) else None
    shared = mask is not None and isinstance(by, Normalized) and mask.tensor is by.tensor
    a, b = mask.affine if mask is not None and mask.affine is not None else (None, None)
    operands = [lazy_of(p.operand, p.stride, config.BLOCK_K) for p in products]
    added = None if residual is None else lazy_of(residual, 1, config.BLOCK_N)
    arguments = dict(
        first=operands[0],
        w_ptr=one.w,
        stride_wc=one.w.stride(1),
        stride_wk=one.w.stride(0),
        second=None if two is None else operands[1],
        w2_ptr=None if two is None else two.w,
        stride_w2c=0 if two is None else two.w.stride(1),
        stride_w2k=0 if two is None else two.w.stride(0),
        scale_ptr=_vector(one.scale),
        shift_ptr=_vector(epilogue.shift),
        residual=added,
        mask_ptr=masked,
        mask_a_ptr=_vector(a),
        mask_b_ptr=_vector(b),
        xhat_ptr=None if shared else normalized,
        mean_ptr=_vector(by.mean) if isinstance(by, Normalized) else None,
        y_ptr=y,
        bits_ptr=reduced if by == "mask" else None,
        parts_ptr=None if by == "mask" else reduced,
        M=M,
        P=P,
        Q=Q,
        K=K,
        k_tiles=k_tiles,
        m_tiles=m_tiles,
        mask_pitch=0 if masked is None else nhwc_strides(masked)[2],
        xhat_pitch=0 if normalized is None else nhwc_strides(normalized)[2],
        SECOND=two is not None,
        SCALE=one.scale is not None,
        SHIFT=epilogue.shift is not None,
        RESIDUAL=residual is not None,
        UPSAMPLE=epilogue.upsample,
        RELU=epilogue.relu,
        MASK=mask is not None,
        MASK_AFFINE=a is not None,
        REDUCE="xhat" if isinstance(by, Normalized) else by or "",
        SHARED=shared,
        PRECISION=precision(),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
    )
    tiles = k_tiles * m_tiles
    channels = [p.operand.tensor.shape[1] for p in products]
    around = nbytes(y, masked, None if shared else normalized, reduced) + (
        0 if added is None else bytes_of(added, added.x[:, 0].numel())
    )
    steps = sum(config.steps(1, C) for C in channels)
    weights = nbytes(*(p.w for p in products))
    read = sum(bytes_of(o, M) for o in operands)
    copied = read * k_tiles + weights * m_tiles + around
    issued = 2 * tiles * steps * config.BLOCK_M * config.BLOCK_N * config.BLOCK_K
    # What masks may be an operand too (h of a tail): a program reads its rows of it twice, one after the other.
    again = nbytes(masked) * (mask is not None and any(p.operand.tensor is mask.tensor for p in products))
    work = Work(read + weights + around - again, 2 * M * K * sum(channels), copied, issued)
    what = " + ".join(f"1x1 {C}->{K}" for C in channels) + f" {P}x{Q}"
    return Launch(_products_kernel, tiles, arguments, config.options, what, work)
