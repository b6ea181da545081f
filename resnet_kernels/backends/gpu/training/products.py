"""Sums of one or two 1x1 products with everything that training fuses around them, as matrix products over rows (every
GPU from sm_80): forward convolutions of any stride, and data gradients of stride 1.

One program instance owns a tile of BLOCK_M rows by BLOCK_N output channels. A row is an output position; rows are
numbered through all images. For each slice of BLOCK_K channels, it copies rows of the operand, of the operand's second
tensor and of its packed mask asynchronously, computes the operand's value in registers, and multiplies it from there.
Weights may have either layout. The epilogue applies scale, shift, residual, ReLU and mask, rounds, and writes the
result, and either one partial sum per channel or the packed mask bits. `merge` then adds the partial sums in an order
that depends on the sizes only.

Memory traffic: each operand, its second tensor and its mask once from device memory (again per tile of output channels,
from L2); the residual, its mask, and the tensors of the epilogue's mask and of xhat once; the weights once per tile of
rows, from L2; the result once, and 8 bytes per tile of rows and channel, or one bit per element.
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
from ..device import affine, product_operand, relu, wait_for_sum
from ..inference.gather import row_of
from ..launch import Launch, Work, arch_of, nbytes, precision, processors_of, submit

# Partial sums that one program instance of `merge` adds, and the channels that it owns.
MERGED, MERGED_CHANNELS = 128, 32


class LazyOperand(NamedTuple):
    """A `contract.Operand` as a Triton tuple, for kernel arguments. Absent parts are None.

    The value is [relu](a * x + b + a2 * (second - mean)) - centre, where the mask zeroes x.
    pitch, second_pitch, masking_pitch: elements between rows of x, `second` and `masking`.
    bits: the packed mask, without padding between rows; int32 words if the channels fill them, else bytes.
    mask_a, mask_b, masking: the mask is another operand, set where not (mask_a * masking + mask_b <= 0). If `masking`
    is None, `second` is that operand's tensor.
    H, W: the map that STRIDE samples. winners: x is the gradient of a max pooling of an H x W map to P x Q, and x and
    winners have P x Q.
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
def operand_row(operand, m, P, Q):
    """Return the operand's row for the m-th output position, in 64 bits: an operand may exceed 2^31 elements."""
    if operand.STRIDE == 1:
        row = m.to(tl.int64)
    else:
        n, p, q = row_of(m, P, Q)
        row = (n.to(tl.int64) * operand.H + p * operand.STRIDE) * operand.W + q * operand.STRIDE
    return row


@triton.jit
def mask_bits(operand, rows, row_mask, c0, BLOCK: tl.constexpr):
    """Return the operand's packed mask at channels c0 to c0 + BLOCK as booleans, [BLOCK_M, BLOCK]."""
    WIDTH: tl.constexpr = operand.bits.dtype.element_ty.primitive_bitwidth
    word = c0 // WIDTH + tl.arange(0, BLOCK // WIDTH)
    words = tl.cdiv(operand.C, WIDTH)
    packed = tl.load(
        operand.bits + rows[:, None] * words + word[None, :], row_mask[:, None] & (word < words)[None, :], 0
    )
    bits = packed[:, :, None] >> tl.arange(0, WIDTH).to(packed.dtype)[None, None, :]
    return (bits & 1).reshape(rows.shape[0], BLOCK) != 0


@triton.jit
def unpool(operand, rows, inside, c):
    """Return the gradient of max pooling at rows of the unpooled map and channels c: the sum of x over the windows
    whose maximum is at that position. [BLOCK_M, BLOCK]; inside: the mask of rows and channels."""
    KERNEL: tl.constexpr = operand.KERNEL
    STRIDE: tl.constexpr = operand.POOL_STRIDE
    SIDE: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    # Positions fit 32 bits; element offsets may not.
    n, h, w = row_of(rows.to(tl.int32), operand.H, operand.W)
    h, w = h + operand.POOL_PADDING, w + operand.POOL_PADDING
    t = tl.zeros(inside.shape, tl.float32)
    # The windows that contain a position begin less than KERNEL before it: SIDE of them along each side.
    for i in tl.static_range(SIDE):
        for j in tl.static_range(SIDE):
            p, q = h // STRIDE - i, w // STRIDE - j
            r, s = h - p * STRIDE, w - q * STRIDE
            contains = (p >= 0) & (p < operand.P) & (q >= 0) & (q < operand.Q) & (r < KERNEL) & (s < KERNEL)
            at = (((n.to(tl.int64) * operand.P + p) * operand.Q + q) * operand.C)[:, None] + c[None, :]
            window_mask = inside & contains[:, None]
            element = tl.load(operand.winners + at, window_mask, 255).to(tl.int32)
            won = element == (r * KERNEL + s)[:, None]
            t += tl.where(won, tl.load(operand.x + at, window_mask, 0.0).to(tl.float32), 0.0)
    return t


@triton.jit
def operand_value(operand, rows, row_mask, c0, BLOCK: tl.constexpr):
    """Return the operand's value at channels c0 to c0 + BLOCK, [BLOCK_M, BLOCK]: 0 beyond the last channel, unspecified
    where row_mask is not set."""
    c = c0 + tl.arange(0, BLOCK)
    channel_mask = c < operand.C
    inside = row_mask[:, None] & channel_mask[None, :]
    if operand.winners is not None:
        t = unpool(operand, rows, inside, c)
    else:
        t = tl.load(operand.x + rows[:, None] * operand.pitch + c[None, :], inside, 0.0).to(tl.float32)
    if operand.bits is not None:
        t = tl.where(mask_bits(operand, rows, row_mask, c0, BLOCK), t, 0.0)
    if operand.second is not None:
        s = tl.load(operand.second + rows[:, None] * operand.second_pitch + c[None, :], inside, 0.0).to(tl.float32)
    if operand.mask_a is not None:
        if operand.masking is not None:
            at = operand.masking + rows[:, None] * operand.masking_pitch + c[None, :]
            h = tl.load(at, inside, 0.0).to(tl.float32)
        else:
            h = s
        # The mask compares the rounded value, which may be 0 where the exact one is not. NaN passes the mask.
        h = affine(h, operand.mask_a, operand.mask_b, c, channel_mask, True, True).to(operand.x.dtype.element_ty)
        t = tl.where(h.to(tl.float32) <= 0, 0.0, t)
    if operand.a is not None:
        a, b = tl.load(operand.a + c, channel_mask, 0.0), tl.load(operand.b + c, channel_mask, 0.0)
        t = tl.fma(t, a[None, :].broadcast_to(t.shape), b[None, :].broadcast_to(t.shape))
    if operand.second is not None:
        a2, mean = tl.load(operand.a2 + c, channel_mask, 0.0), tl.load(operand.mean + c, channel_mask, 0.0)
        t = tl.fma(s - mean[None, :], a2[None, :].broadcast_to(t.shape), t)
    if operand.RELU:
        t = relu(t)
    if operand.centre is not None:
        t = t - tl.load(operand.centre + c, channel_mask, 0.0)[None, :]
    return t.to(operand.x.dtype.element_ty)


@triton.jit
def accumulate_product(
    acc, operand, w_ptr, stride_wc, stride_wk, rows, row_mask, k, K, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Mainloop: return acc + operand @ w at rows where `row_mask` is set and output channels k below K."""
    for c0 in range(0, operand.C, BLOCK_K):
        a = operand_value(operand, rows, row_mask, c0, BLOCK_K)
        c = c0 + tl.arange(0, BLOCK_K)
        at = c.to(tl.int64)[:, None] * stride_wc + k.to(tl.int64)[None, :] * stride_wk
        b = tl.load(w_ptr + at, (c < operand.C)[:, None] & (k < K)[None, :], 0.0)
        acc = tl.dot(product_operand(a, PRECISION), product_operand(b, PRECISION), acc, input_precision=PRECISION)
        acc = wait_for_sum(acc, operand.C)
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
    """first, second, residual: `LazyOperand`s. UPSAMPLE: the residual's zero-insertion factor; it adds to every
    UPSAMPLE-th row and column of the result. MASK: zero the result where mask_a * mask + mask_b, rounded, is <= 0.

    REDUCE: "" | "stats" (mean and sum of squared deviations per tile) | "xhat" (sum(y), sum(y * (c - mean)) per tile) |
    "mask" (bits of not (y <= 0)). SHARED: c, the tensor of "xhat", is the mask's tensor.
    """
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    tile = tl.program_id(0)
    k0, m_tile = tile % k_tiles * BLOCK_N, tile // k_tiles
    m, k = m_tile * BLOCK_M + tl.arange(0, BLOCK_M), k0 + tl.arange(0, BLOCK_N)
    row_mask, channel_mask = m < M, k < K
    inside = row_mask[:, None] & channel_mask[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = accumulate_product(
        acc, first, w_ptr, stride_wc, stride_wk, operand_row(first, m, P, Q), row_mask, k, K, PRECISION, BLOCK_K,
    )  # fmt: skip
    acc = affine(acc, scale_ptr, shift_ptr, k, channel_mask, SCALE, SHIFT)
    if SECOND:
        acc = accumulate_product(
            acc, second, w2_ptr, stride_w2c, stride_w2k, operand_row(second, m, P, Q), row_mask, k, K, PRECISION,
            BLOCK_K,
        )  # fmt: skip
    row = m.to(tl.int64)
    if RESIDUAL:
        if UPSAMPLE == 1:
            acc += operand_value(residual, row, row_mask, k0, BLOCK_N).to(tl.float32)
        else:
            n, p, q = row_of(m, P, Q)
            at = (n.to(tl.int64) * residual.H + p // UPSAMPLE) * residual.W + q // UPSAMPLE
            residual_rows = row_mask & (p % UPSAMPLE == 0) & (q % UPSAMPLE == 0)
            r = operand_value(residual, at, residual_rows, k0, BLOCK_N).to(tl.float32)
            acc += tl.where(residual_rows[:, None], r, 0.0)
    if RELU:
        acc = relu(acc)
    if MASK:
        c = tl.load(mask_ptr + row[:, None] * mask_pitch + k[None, :], inside, 0.0).to(tl.float32)
        # The mask's ReLU does not change which values are above 0, but rounding does. NaN passes the mask.
        h = affine(c, mask_a_ptr, mask_b_ptr, k, channel_mask, MASK_AFFINE, MASK_AFFINE).to(DTYPE).to(tl.float32)
        acc = tl.where(h <= 0, 0.0, acc)
    y = acc.to(DTYPE)
    tl.store(y_ptr + row[:, None] * K + k[None, :], y, inside)
    t = tl.where(row_mask[:, None], y.to(tl.float32), 0.0)
    if REDUCE == "stats":
        rows = tl.minimum(BLOCK_M, M - m_tile * BLOCK_M).to(tl.float32)
        mean = tl.sum(t, 0) / rows
        off = tl.where(row_mask[:, None], t - mean[None, :], 0.0)
        tl.store(parts_ptr + m_tile.to(tl.int64) * K + k, mean, channel_mask)
        tl.store(parts_ptr + (m_tiles + m_tile).to(tl.int64) * K + k, tl.sum(off * off, 0), channel_mask)
    if REDUCE == "xhat":
        if not SHARED:
            c = tl.load(xhat_ptr + row[:, None] * xhat_pitch + k[None, :], inside, 0.0).to(tl.float32)
        off = c - tl.load(mean_ptr + k, channel_mask, 0.0)[None, :]
        tl.store(parts_ptr + m_tile.to(tl.int64) * K + k, tl.sum(t, 0), channel_mask)
        tl.store(parts_ptr + (m_tiles + m_tile).to(tl.int64) * K + k, tl.sum(t * off, 0), channel_mask)
    if REDUCE == "mask":
        bit = tl.where((t <= 0) | ~channel_mask[None, :], 0, 1).reshape(BLOCK_M, BLOCK_N // 8, 8)
        packed = tl.sum(bit << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)
        byte, pitch = k0 // 8 + tl.arange(0, BLOCK_N // 8), tl.cdiv(K, 8)
        tl.store(bits_ptr + row[:, None] * pitch + byte[None, :], packed, row_mask[:, None] & (byte < pitch)[None, :])


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
    """Merge parts (2, T, C) into merged (2, G, C), BLOCK_T parts each.

    STATS: parts are means and sums of squared deviations, merged by Chan's formula; part i covers `span` rows from
    span * i on, of M in all. Otherwise parts are sums, and the second is multiplied by rstd if SCALED.
    """
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


class RowProduct(NamedTuple):
    """A product of every stride-th row and column of the operand with w (K, C). w may have any strides. scale: (K,), or
    None."""

    operand: Operand
    w: Tensor
    stride: int
    scale: Tensor | None = None


def row_major(t: Tensor) -> Tensor:
    """Return t with adjacent channels and one pitch between all rows: t itself if it has that layout, else a copy."""
    n, h, w = nhwc_strides(t)
    line = (t.stride(1) == 1 or t.shape[1] == 1) and h == t.shape[3] * w and n == t.shape[2] * h
    return t if line else t.contiguous(memory_format=torch.channels_last)


def packed_bits(mask: Tensor) -> Tensor:
    """Return a mask (N, K, P, Q) packed to bytes (M, ceil(K/8)), M = N*P*Q: bit j of byte b is channel 8b + j. A packed
    mask is returned as it is. A mask that is not boolean is set where not (mask <= 0)."""
    if mask.dtype == torch.uint8 and mask.dim() == 2:
        return mask
    keep = mask if mask.dtype == torch.bool else ~(mask <= 0)
    rows = F.pad(keep.permute(0, 2, 3, 1).flatten(0, 2), (0, -keep.shape[1] % 8)).unflatten(1, (-1, 8))
    return (rows << torch.arange(8, device=mask.device)).sum(2).to(torch.uint8)


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def lazy_operand(o: Operand, stride: int = 1, block: int = 8) -> LazyOperand:
    """Return the operand as a kernel argument. block: the kernel reads channels in multiples of this number."""
    x = row_major(o.tensor)
    _, C, P, Q = x.shape
    a, b = o.affine or (None, None)
    second, a2, mean = o.second or (None, None, None)
    second = None if second is None else row_major(second)
    H, W = (P, Q) if o.pooled is None else o.pooled.size
    more: dict[str, Any] = {}
    if isinstance(o.mask, Operand):
        more = _masked_by(o.mask, o.second)
    elif o.mask is not None:
        bits = packed_bits(o.mask)
        # Single bytes are too narrow for asynchronous copies; words are not.
        words = (C % 32, block % 32, bits.data_ptr() % 4) == (0, 0, 0)
        more = {"bits": bits.view(torch.int32) if words else bits}
    if o.pooled is not None:
        x = x.contiguous(memory_format=torch.channels_last)
        winners = o.pooled.winners.contiguous(memory_format=torch.channels_last)
        kernel, step, padding = map(tl.constexpr, o.pooled.pool)
        more |= dict(winners=winners, P=P, Q=Q, KERNEL=kernel, POOL_STRIDE=step, POOL_PADDING=padding)
    return LazyOperand(
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
    """Return the fields of `LazyOperand` for a mask that is another operand with no more than affine and ReLU."""
    C = mask.tensor.shape[1]
    a, b = mask.affine or (mask.tensor.new_ones(C), mask.tensor.new_zeros(C))
    vectors = {"mask_a": _vector(a), "mask_b": _vector(b)}
    if second is not None and second[0] is mask.tensor:
        return vectors
    masking = row_major(mask.tensor)
    return vectors | {"masking": masking, "masking_pitch": nhwc_strides(masking)[2]}


def operand_bytes(o: LazyOperand, rows: int) -> int:
    """Return the bytes of `rows` rows of the operand's tensors. A pooled operand's x and winners count whole."""
    tensors = [o.second, o.masking] if o.winners is not None else [o.x, o.second, o.masking]
    bits = 0 if o.bits is None else -(-o.C // 8)
    each = bits + sum(o.C * t.element_size() for t in tensors if t is not None)
    return rows * each + (0 if o.winners is None else nbytes(o.x, o.winners))


# Mainloop steps from which a tile of 128 output channels pays off. With fewer, the epilogue takes most of the time, and
# several CTAs on a multiprocessor hide it.
WIDE_STEPS = 4


def config_of(M: int, K: int, C: int, itemsize: int, device: torch.device) -> Config:
    """Return the configuration for M rows, K output channels and at most C input channels."""
    arch, processors = arch_of(device), processors_of(device)
    if itemsize == 4 and precision() == "ieee":
        return configs.FMA_CONFIG
    in_shared = arch in configs.OPERANDS_IN_SHARED
    BLOCK_K = min((128 if in_shared else 64) // itemsize, max(16, configs.power_of_two(C)))
    wide = in_shared and itemsize == 2 and C >= WIDE_STEPS * BLOCK_K
    BLOCK_M, BLOCK_N = 128, min(128 if wide else 64, max(16, configs.power_of_two(K)))
    while BLOCK_M > 64 and -(-M // BLOCK_M) * -(-K // BLOCK_N) < processors:
        BLOCK_M //= 2
    # On sm_80, 3 stages just spill if an operand has two tensors; 4 do not.
    return Config(BLOCK_M, BLOCK_N, BLOCK_K, 8 if BLOCK_M * BLOCK_N >= 128 * 64 else 4, 3 if in_shared else 4)


def merge(parts: Tensor, rows: int, span: int, stats: bool, rstd: Tensor | None = None) -> Tensor:
    """Return parts (2, T, C) merged over T, as (2, C), by as many launches as it takes.

    rows: rows of all parts. span: rows of each part but the last. stats: parts are (means, sums of squared deviations),
    else sums. rstd: (C,), multiplies the second of the merged sums.
    """
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


def _mask_and_reduction(
    mask: Operand | None, by: str | Normalized | None, reduced: Tensor | None
) -> tuple[dict[str, Any], int]:
    """Return (the kernel's arguments for the epilogue's mask and reduction, the bytes of their tensors)."""
    mask_tensor = None if mask is None else row_major(mask.tensor)
    a, b = mask.affine if mask is not None and mask.affine is not None else (None, None)
    normalized = row_major(by.tensor) if isinstance(by, Normalized) else None
    shared = mask is not None and isinstance(by, Normalized) and mask.tensor is by.tensor
    xhat = None if shared else normalized
    arguments = dict(
        mask_ptr=mask_tensor,
        mask_a_ptr=_vector(a),
        mask_b_ptr=_vector(b),
        xhat_ptr=xhat,
        mean_ptr=_vector(by.mean) if isinstance(by, Normalized) else None,
        bits_ptr=reduced if by == "mask" else None,
        parts_ptr=None if by == "mask" else reduced,
        mask_pitch=0 if mask_tensor is None else nhwc_strides(mask_tensor)[2],
        xhat_pitch=0 if normalized is None else nhwc_strides(normalized)[2],
        MASK=mask is not None,
        MASK_AFFINE=a is not None,
        REDUCE="xhat" if isinstance(by, Normalized) else by or "",
        SHARED=shared,
    )
    return arguments, nbytes(mask_tensor, xhat, reduced)


def launch(
    products: Sequence[RowProduct], epilogue: Epilogue, config: Config, y: Tensor, reduced: Tensor | None = None
) -> Launch:
    """Return the launch that writes y (N, K, P, Q), channels_last, and the reduction: bits (M, ceil(K/8)) or partial
    sums (2, tiles of rows, K).

    Only the first product may have a scale. The epilogue's mask, if any, is an Operand with no more than affine and
    ReLU. The epilogue's residual has stride 1.
    """
    N, K, P, Q = y.shape
    M = N * P * Q
    one, two = products[0], products[1] if len(products) > 1 else None
    residual, mask = epilogue.residual, epilogue.mask
    assert mask is None or isinstance(mask, Operand)
    k_tiles, m_tiles = -(-K // config.BLOCK_N), -(-M // config.BLOCK_M)
    operands = [lazy_operand(p.operand, p.stride, config.BLOCK_K) for p in products]
    added = None if residual is None else lazy_operand(residual, 1, config.BLOCK_N)
    mask_and_reduction, epilogue_bytes = _mask_and_reduction(mask, epilogue.reduce, reduced)
    arguments = mask_and_reduction | dict(
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
        y_ptr=y,
        M=M,
        P=P,
        Q=Q,
        K=K,
        k_tiles=k_tiles,
        m_tiles=m_tiles,
        SECOND=two is not None,
        SCALE=one.scale is not None,
        SHIFT=epilogue.shift is not None,
        RESIDUAL=residual is not None,
        UPSAMPLE=epilogue.upsample,
        RELU=epilogue.relu,
        PRECISION=precision(),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
    )
    epilogue_bytes += nbytes(y) + (0 if added is None else operand_bytes(added, added.x[:, 0].numel()))
    # The mask's tensor may also be an operand (h of a tail). A CTA reads its rows of it twice, in close succession.
    masks_itself = mask is not None and any(p.operand.tensor is mask.tensor for p in products)
    reread = nbytes(arguments["mask_ptr"]) if masks_itself else 0
    work = _work_of(products, sum(operand_bytes(o, M) for o in operands), epilogue_bytes, reread, config, M)
    what = " + ".join(f"1x1 {p.operand.tensor.shape[1]}->{K}" for p in products) + f" {P}x{Q}"
    return Launch(_products_kernel, k_tiles * m_tiles, arguments, config.options, what, work)


def _work_of(products: Sequence[RowProduct], operands: int, epilogue: int, reread: int, config: Config, M: int) -> Work:
    """Return the work of a launch. operands, epilogue: bytes of the operands and of the epilogue's tensors. reread:
    bytes that count in both, but come from device memory once. M: rows."""
    K = products[0].w.shape[0]
    channels = [p.operand.tensor.shape[1] for p in products]
    k_tiles, m_tiles = -(-K // config.BLOCK_N), -(-M // config.BLOCK_M)
    weights = nbytes(*(p.w for p in products))
    steps = sum(config.steps(1, C) for C in channels)
    issued = 2 * k_tiles * m_tiles * steps * config.BLOCK_M * config.BLOCK_N * config.BLOCK_K
    copied = operands * k_tiles + weights * m_tiles + epilogue
    return Work(operands + weights + epilogue - reread, 2 * M * K * sum(channels), copied, issued)
