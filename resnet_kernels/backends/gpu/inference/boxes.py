"""Convolution by boxes: an implicit GEMM whose operands arrive by the bulk tensor copy engine (sm_90, sm_100).

One program instance owns a tile of BOX_N x BOX_H x BOX_W = BLOCK_M output positions by BLOCK_N channels; a persistent
one takes several tiles in turn. For each slice of BLOCK_K input channels and each tap of the filter, it copies the box
of x that the tap sees: the tile's box, shifted. Positions outside the map arrive as zeros, which is the padding. Taps
are the inner loop.

A stride s needs no gather either. x (N, H, W, C) is described as [N, H/s, s, W/s, s*C]: row s*i + u is (i, u), column
s*j + v is (j, v*C), so each tap is a dense box of one (u, v). A 1x1 convolution of stride 1 is a plain matrix product,
and all positions are described as one line: [1, 1, 1, N*H*W, C].

A second product (a projection shortcut) runs the same mainloop over its own operand, into the same accumulator.

wgmma reads operands from shared memory, where the copy engine puts them. But a box with several images, rows or columns
must be reshaped to rows of a matrix. Triton 3.6 can do that in shared memory for the second operand only; a reshaped
first operand would go through registers. For such boxes the kernel computes the transposed product, weights first
(TURNED), and transposes the accumulator at the end.

Memory traffic: x once from device memory (again per tap and per tile of output channels, from L2), the weights once per
tile of positions from L2, the residual once, y once. Consecutive tiles share a box and differ in their output channels,
so x is still in L2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...contract import nhwc_strides
from ..configs import LEAST_FILLED, OPERANDS_IN_SHARED, Config, box_shape, filled_share
from ..convolution import Convolution
from ..device import affine, lazy_value, product_operand, relu, wait_for_sum
from ..launch import Launch, descriptor, precision, processors_of


@triton.jit
def tap_origin(tap, S: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr):
    """Return (i, u, j, v): where a tap's box begins in the described x, for the output box at the origin."""
    # A multiple of the stride keeps the dividend positive: division of negative numbers truncates.
    u = (tap // S) * DILATION - PADDING + STRIDE * PADDING
    v = (tap % S) * DILATION - PADDING + STRIDE * PADDING
    return u // STRIDE - PADDING, u % STRIDE, v // STRIDE - PADDING, v % STRIDE


@triton.jit
def box_origin(box, q_tiles, p_tiles, BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr):
    """Return (image, output row, output column) where a box begins. Consecutive boxes advance along columns first."""
    return box // q_tiles // p_tiles * BOX_N, box // q_tiles % p_tiles * BOX_H, box % q_tiles * BOX_W


@triton.jit
def accumulate(
    acc,
    x,
    w,
    n0,
    p0,
    q0,
    k0,
    c_first,
    C,
    H,
    W,
    pixel,
    a_ptr,
    b_ptr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    LAZY: tl.constexpr,
    LAZY_RELU: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Mainloop: return acc + conv(x, w) for the box at output position (n0, p0, q0), output channels from k0, and input
    channels c_first to c_first + C.

    acc [BLOCK_M, BLOCK_N], or [BLOCK_N, BLOCK_M] if TURNED. pixel: elements between adjacent columns of x.
    """
    BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W
    for step in range(R * S * tl.cdiv(C, BLOCK_K)):
        tap = step % (R * S)
        c = step // (R * S) * BLOCK_K
        i, u, j, v = tap_origin(tap, S, STRIDE, PADDING, DILATION)
        a = x.load([n0, p0 + i, u, q0 + j, v * pixel + c_first + c]).reshape(BLOCK_M, BLOCK_K)
        if LAZY:
            row = tl.arange(0, BLOCK_M)
            h = (p0 + i + row // BOX_W % BOX_H) * STRIDE + u
            s = (q0 + j + row % BOX_W) * STRIDE + v
            channel = c + tl.arange(0, BLOCK_K)
            inside = (h >= 0) & (h < H) & (s >= 0) & (s < W)
            a = lazy_value(a, a_ptr, b_ptr, (c_first + channel, channel < C), inside, LAZY_RELU)
        b = w.load([k0, tap * C + c])
        if TURNED:
            acc = tl.dot(product_operand(b, PRECISION), product_operand(a, PRECISION).T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(product_operand(a, PRECISION), product_operand(b, PRECISION).T, acc, input_precision=PRECISION)
            if LAZY or not (BOX_N == 1 and BOX_H == 1):
                acc = wait_for_sum(acc, C)
    return acc


@triton.jit
def _conv_box_kernel(
    x,
    w,
    x2,
    w2,
    residual,
    y,
    scale_ptr,
    shift_ptr,
    a_ptr,
    b_ptr,
    tiles,
    k_tiles,
    q_tiles,
    p_tiles,
    C,
    K,
    H,
    W,
    pixel,
    k_group,
    C2,
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
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x, w, x2, w2, residual, y: tensor descriptors. tiles: all tiles of the grid; k_tiles, q_tiles, p_tiles: tiles
    along output channels, columns and rows. k_group: output channels per group."""
    first = tl.program_id(0)
    if PERSISTENT:
        last = tiles
    else:
        last = first + 1
    for tile in tl.range(first, last, tl.num_programs(0), flatten=PERSISTENT):
        k0 = tile % k_tiles * BLOCK_N
        n0, p0, q0 = box_origin(tile // k_tiles, q_tiles, p_tiles, BOX_N, BOX_H, BOX_W)
        BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W
        if TURNED:
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = accumulate(
            acc, x, w, n0, p0, q0, k0, k0 // k_group * C, C, H, W, pixel, a_ptr, b_ptr, R, S, STRIDE, PADDING, DILATION,
            LAZY, LAZY_RELU, TURNED, PRECISION, BOX_N, BOX_H, BOX_W, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        channels = k0 + tl.arange(0, BLOCK_N)
        if SECOND and SCALE:
            scale = tl.load(scale_ptr + channels, channels < K, 0.0)
            acc = acc * (scale[:, None] if TURNED else scale[None, :])
        if SECOND:
            acc = accumulate(
                acc, x2, w2, n0, p0, q0, k0, 0, C2, 0, 0, 0, a_ptr, b_ptr, 1, 1, 1, 0, 1,
                False, False, TURNED, PRECISION, BOX_N, BOX_H, BOX_W, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if TURNED:
            acc = acc.T
        acc = affine(acc, scale_ptr, shift_ptr, channels, channels < K, SCALE and not SECOND, SHIFT)
        if RESIDUAL:
            acc += residual.load([n0, p0, q0, k0]).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
        if RELU:
            acc = relu(acc)
        y.store([n0, p0, q0, k0], acc.to(y.dtype).reshape(BOX_N, BOX_H, BOX_W, BLOCK_N))


def _line(t: Tensor) -> bool:
    """Whether the positions of all images have one common pitch, so that the whole batch is one line."""
    n, h, w = nhwc_strides(t)
    return h == t.shape[3] * w and n == t.shape[2] * h


def _aligned(t: Tensor) -> bool:
    size = t.element_size()
    return t.data_ptr() % 16 == 0 and all(s > 0 and s * size % 16 == 0 for s in nhwc_strides(t))


def in_line(c: Convolution) -> bool:
    """Whether the convolution is a plain matrix product, whose box is a run of matrix rows."""
    K, R, S, _ = c.weight.shape
    maps = [c.x] + ([c.second[0]] if c.second else []) + ([c.residual] if c.residual is not None else [])
    return (R, S, c.geometry.stride, c.geometry.padding) == (1, 1, 1, 0) and all(map(_line, maps))


def box_of(c: Convolution, rows: int) -> tuple[int, int, int]:
    """Return the shape (images, rows, columns) of the convolution's boxes of `rows` output positions."""
    N, _, P, Q = c.output_sizes
    return (1, 1, rows) if in_line(c) else box_shape(N, P, Q, rows)


def turned(shape: tuple[int, int, int], BLOCK_N: int) -> bool:
    """Whether the kernel computes the transposed product for boxes of this shape. The output channels are then the rows
    of the product, and wgmma wants 64 rows or more."""
    return shape[:2] != (1, 1) and BLOCK_N >= 64


def boxes_of(y: Tensor, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return how many boxes cover the result (N, K, P, Q) along images, rows and columns."""
    N, _, P, Q = y.shape
    return -(-N // shape[0]), -(-P // shape[1]), -(-Q // shape[2])


def why_not(c: Convolution, arch: int, config: Config) -> str | None:
    """Return why the convolution cannot run by boxes with this configuration, or None. Depends on metadata and
    addresses only, not on values."""
    if arch not in OPERANDS_IN_SHARED:
        return f"expected sm_90 or sm_100, got sm_{arch}"
    K, R, S, C = c.weight.shape
    size = c.x.element_size()
    _, _, H, W = c.x.shape
    for name, t in (("x", c.x), ("x2", c.second and c.second[0]), ("residual", c.residual)):
        if t is not None and not _aligned(t):
            return f"expected {name} with an address and strides in multiples of 16 bytes"
    if C * size % 16 or K * size % 16 or (c.second and c.second[0].shape[1] * size % 16):
        return f"expected channels in multiples of {16 // size}"
    if c.residual is not None and c.residual.shape[1] != K:
        return f"expected a residual of {K} channels, got {c.residual.shape[1]}"
    if c.geometry.groups > 1 and K // c.geometry.groups % config.BLOCK_N:
        return f"expected output channels per group in whole tiles of {config.BLOCK_N}, got {K // c.geometry.groups}"
    if c.geometry.groups > 1 and C % config.BLOCK_K:
        # A slice would reach into the next group. Its weights there are zeros, but NaN times zero is NaN.
        return f"expected input channels per group in whole slices of {config.BLOCK_K}, got {C}"
    stride = c.geometry.stride
    if stride > 1 and (H % stride or W % stride or C % config.BLOCK_K):
        return (
            f"expected a map that stride {stride} divides and channels in whole slices of {config.BLOCK_K}, "
            f"got {C} channels of {H}x{W}"
        )
    N, _, P, Q = c.output_sizes
    share = 1.0 if in_line(c) else filled_share(N, P, Q, box_of(c, config.BLOCK_M))
    if share < LEAST_FILLED:
        return (
            f"expected boxes at least {LEAST_FILLED:.0%} full, got boxes of {config.BLOCK_M} positions {share:.0%} full"
        )
    return None


def describe_map(t: Tensor, block: tuple[int, int, int, int]) -> TensorDescriptor:
    """Describe (N, K, P, Q) as [N, P, Q, K]."""
    N, K, P, Q = t.shape
    return descriptor(t, (N, P, Q, K), (*nhwc_strides(t), 1), block)


def describe_strided(t: Tensor, stride: int, block: tuple[int, int, int, int]) -> TensorDescriptor:
    """Describe (N, C, H, W) as [N, H/s, s, W/s, s*C] for a stride s."""
    N, C, H, W = t.shape
    n, h, w = nhwc_strides(t)
    shape = (N, H // stride, stride, W // stride, (stride - 1) * w + C)
    bn, bh, bw, bc = block
    return descriptor(t, shape, (n, stride * h, h, stride * w, 1), (bn, bh, 1, bw, bc))


def describe_weight(weight: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """Describe (K, R, S, C) as [K, R*S*C]. A slice may reach beyond a tap's last channel; x is zero there."""
    K, R, S, C = weight.shape
    return descriptor(weight, (K, R * S * C), (R * S * C, 1), block)


def as_line(t: Tensor) -> Tensor:
    """Return (N, C, H, W) viewed as (1, C, 1, N*H*W)."""
    N, C, H, W = t.shape
    w = nhwc_strides(t)[2]
    return t.as_strided((1, C, 1, N * H * W), (N * H * W * w, 1, N * H * W * w, w))


def launch(c: Convolution, config: Config, y: Tensor) -> Launch:
    """Return the launch that writes y (N, K, P, Q), channels_last. Call only if `why_not` returned None."""
    K, R, S, C = c.weight.shape
    g = c.geometry
    BLOCK_M, BLOCK_N, BLOCK_K = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    shape = box_of(c, BLOCK_M)
    x, residual, out = c.x, c.residual, y
    x2, w2 = c.second or (None, None)
    if in_line(c):
        x, out = as_line(x), as_line(y)
        x2, residual = (None if t is None else as_line(t) for t in (x2, residual))
    n_tiles, p_tiles, q_tiles = boxes_of(out, shape)
    k_tiles = -(-K // BLOCK_N)
    tiles = n_tiles * p_tiles * q_tiles * k_tiles
    a, b, lazy_relu = c.lazy or (None, None, False)
    arguments = dict(
        x=describe_strided(x, g.stride, (*shape, BLOCK_K)),
        w=describe_weight(c.weight, (BLOCK_N, BLOCK_K)),
        x2=None if x2 is None else describe_strided(x2, 1, (*shape, BLOCK_K)),
        w2=None if w2 is None else describe_weight(w2, (BLOCK_N, BLOCK_K)),
        residual=None if residual is None else describe_map(residual, (*shape, BLOCK_N)),
        y=describe_map(out, (*shape, BLOCK_N)),
        scale_ptr=c.scale,
        shift_ptr=c.shift,
        a_ptr=a,
        b_ptr=b,
        tiles=tiles,
        k_tiles=k_tiles,
        q_tiles=q_tiles,
        p_tiles=p_tiles,
        C=C,
        K=K,
        H=x.shape[2],
        W=x.shape[3],
        pixel=nhwc_strides(x)[2],
        k_group=K // g.groups,
        C2=0 if x2 is None else x2.shape[1],
        R=R,
        S=S,
        STRIDE=g.stride,
        PADDING=g.padding,
        DILATION=g.dilation,
        SCALE=c.scale is not None,
        SHIFT=c.shift is not None,
        SECOND=x2 is not None,
        RESIDUAL=residual is not None,
        RELU=c.relu,
        LAZY=c.lazy is not None,
        LAZY_RELU=lazy_relu,
        TURNED=c.lazy is None and turned(shape, BLOCK_N),
        PRECISION=precision(),
        PERSISTENT=config.persistent,
        BOX_N=shape[0],
        BOX_H=shape[1],
        BOX_W=shape[2],
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
    )
    grid = min(tiles, processors_of(c.x.device)) if config.persistent else tiles
    return Launch(_conv_box_kernel, grid, arguments, config.options, str(c), c.work(config, tiles))
