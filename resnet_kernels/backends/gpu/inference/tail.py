"""The fused tail: a bottleneck's 3x3 and last 1x1, and the next bottleneck's first 1x1, in one kernel (sm_90, sm_100).

    h = relu(scale * conv3x3(x, w) + shift), rounded
    y = relu(scale3 * (h w3^T) + shift3 + [residual]), rounded
    next = relu(scale1 * (y w1^T) + shift1)

J, K and J1 are the output channels of the three convolutions.

One program instance owns BOX_N x BOX_H x BOX_W = BLOCK_M output positions and all J channels of the 3x3, whose mainloop
is that of boxes.py. The rounded accumulator h is the operand of the 1x1 product, from registers. The kernel computes
the K channels of y in tiles of BLOCK_N. Each tile, as soon as it is stored, is an operand of the next block's 1x1,
which accumulates all J1 channels. The 3x3's output never exists in memory, and y is read again only as the next
residual.

Memory traffic: x once (once per tap from L2), the residual once, y and next once; the weights once per program instance
from L2. J is 64 or 128, and J1 is 64, 128 or 256, because both must fit accumulators.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from ...contract import Geometry, nhwc_strides
from ..configs import Config
from ..convolution import Convolution
from ..device import affine, relu
from ..launch import Launch, Work, nbytes, precision
from . import boxes
from .boxes import accumulate, box_of, box_origin, boxes_of, describe_map, describe_strided, describe_weight

# J, the 3x3's output channels. With 256, or with a projection, separate kernels were faster by far (H100).
WIDTHS = (64, 128)
# J1, the output channels of the next block's 1x1.
WIDTHS_AFTER = (64, 128, 256)


@triton.jit
def _conv3x3_conv1x1_kernel(
    x,
    w,
    w3,
    residual,
    y,
    w1,
    after,
    scale_ptr,
    shift_ptr,
    scale3_ptr,
    shift3_ptr,
    scale1_ptr,
    shift1_ptr,
    q_tiles,
    p_tiles,
    C,
    K,
    H,
    W,
    pixel,
    J: tl.constexpr,
    J1: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE3: tl.constexpr,
    SCALE1: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x, w, w3, residual, y, w1, after: tensor descriptors; `after` is the next block's first activation."""
    BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W
    n0, p0, q0 = box_origin(tl.program_id(0), q_tiles, p_tiles, BOX_N, BOX_H, BOX_W)
    h = tl.zeros((BLOCK_M, J), tl.float32)
    h = accumulate(
        h, x, w, n0, p0, q0, 0, 0, C, H, W, pixel, None, None, 3, 3, STRIDE, PADDING, DILATION,
        False, False, False, PRECISION, BOX_N, BOX_H, BOX_W, J, BLOCK_K,
    )  # fmt: skip
    j = tl.arange(0, J)
    h = relu(affine(h, scale_ptr, shift_ptr, j, j < J, SCALE, True)).to(y.dtype)
    ahead = tl.zeros((BLOCK_M, J1), tl.float32)
    # Two stages: with three, the buffers of weights and residuals would take the shared memory of a second CTA.
    for k0 in tl.range(0, K, BLOCK_N, num_stages=2):
        b = w3.load([k0, 0])
        acc = tl.dot(h, b.T, input_precision=PRECISION)
        k = k0 + tl.arange(0, BLOCK_N)
        acc = affine(acc, scale3_ptr, shift3_ptr, k, k < K, SCALE3, True)
        if RESIDUAL:
            acc += residual.load([n0, p0, q0, k0]).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
        t = relu(acc).to(y.dtype)
        y.store([n0, p0, q0, k0], t.reshape(BOX_N, BOX_H, BOX_W, BLOCK_N))
        b = w1.load([0, k0])
        ahead = tl.dot(t, b.T, ahead, input_precision=PRECISION)
    j1 = tl.arange(0, J1)
    ahead = relu(affine(ahead, scale1_ptr, shift1_ptr, j1, j1 < J1, SCALE1, True))
    after.store([n0, p0, q0, 0], ahead.to(y.dtype).reshape(BOX_N, BOX_H, BOX_W, J1))


@dataclasses.dataclass(frozen=True)
class Tail:
    """The problem of a fused tail: a 3x3 (`first`), the 1x1 after it (`last`), and the next block's first convolution
    (`following`). `last.x` and `following.x` are placeholders for the output of the convolution before them."""

    first: Convolution
    last: Convolution
    following: Convolution

    @property
    def key(self) -> str:
        return " > ".join(c.key for c in self.parts)

    @property
    def parts(self) -> tuple[Convolution, Convolution, Convolution]:
        return self.first, self.last, self.following

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Tail:
        return Tail(*(c.map(function) for c in self.parts))


def _is_product(c: Convolution) -> bool:
    """Whether the convolution is a 1x1 of stride 1: a matrix product whose rows are the positions."""
    return c.weight.shape[1:3] == (1, 1) and c.geometry == Geometry()


def why_not(first: Convolution, last: Convolution, arch: int, config: Config, processors: int) -> str | None:
    """Return why the 3x3 and the 1x1 after it cannot run in one kernel with this configuration, or None. `last.x` is a
    placeholder for the 3x3's output."""
    J, R, S, _ = first.weight.shape
    if (R, S) != (3, 3) or first.geometry.groups > 1 or not _is_product(last):
        return "expected an ungrouped 3x3 convolution and then a 1x1 of stride 1"
    if J not in WIDTHS:
        return f"expected {' or '.join(map(str, WIDTHS))} channels between the 3x3 and the 1x1, got {J}"
    if first.x.element_size() > 2:
        return f"expected a 16-bit dtype, got {first.x.dtype}: the accumulators of fp32 products do not fit"
    if not first.relu or first.shift is None or first.second or first.residual is not None or first.lazy:
        return "expected a shift and ReLU, and nothing else, between the 3x3 and the 1x1"
    if last.second:
        return "expected an identity shortcut, got a projection"
    if last.weight.shape[0] % config.BLOCK_N:
        return f"expected output channels in whole tiles of {config.BLOCK_N}, got {last.weight.shape[0]}"
    least = processors * config.BLOCK_M // 2
    if first.rows < least:
        return (
            f"expected at least {least} output positions, got {first.rows}: fewer leave most of {processors} "
            "multiprocessors idle"
        )
    return boxes.why_not(first, arch, config) or boxes.why_not(last, arch, config)


def why_not_after(after: Convolution) -> str | None:
    """Return why the next block's first convolution cannot run in the same kernel, or None."""
    J1 = after.weight.shape[0]
    if not _is_product(after) or not after.relu or after.shift is None:
        return "expected a 1x1 convolution of stride 1 with shift and ReLU"
    if J1 not in WIDTHS_AFTER:
        return f"expected {', '.join(map(str, WIDTHS_AFTER))} output channels of the next 1x1, got {J1}"
    return None


def launch(t: Tail, config: Config, y: Tensor, ahead: Tensor) -> Launch:
    """Return the launch that writes y (N, K, P, Q) and ahead (N, J1, P, Q), the next block's first activation, both
    channels_last. Call only if `why_not` and `why_not_after` returned None."""
    first, last, following = t.parts
    J = first.weight.shape[0]
    K = y.shape[1]
    shape = box_of(first, config.BLOCK_M)
    n_tiles, p_tiles, q_tiles = boxes_of(y, shape)
    g = first.geometry
    _, _, H, W = first.x.shape
    J1 = following.weight.shape[0]
    arguments = dict(
        x=describe_strided(first.x, g.stride, (*shape, config.BLOCK_K)),
        w=describe_weight(first.weight, (J, config.BLOCK_K)),
        w3=describe_weight(last.weight, (config.BLOCK_N, J)),
        residual=None if last.residual is None else describe_map(last.residual, (*shape, config.BLOCK_N)),
        y=describe_map(y, (*shape, config.BLOCK_N)),
        w1=describe_weight(following.weight, (J1, config.BLOCK_N)),
        after=describe_map(ahead, (*shape, J1)),
        scale_ptr=first.scale,
        shift_ptr=first.shift,
        scale3_ptr=last.scale,
        shift3_ptr=last.shift,
        scale1_ptr=following.scale,
        shift1_ptr=following.shift,
        q_tiles=q_tiles,
        p_tiles=p_tiles,
        C=first.weight.shape[3],
        K=K,
        H=H,
        W=W,
        pixel=nhwc_strides(first.x)[2],
        J=J,
        J1=J1,
        STRIDE=g.stride,
        PADDING=g.padding,
        DILATION=g.dilation,
        SCALE=first.scale is not None,
        SCALE3=last.scale is not None,
        SCALE1=following.scale is not None,
        RESIDUAL=last.residual is not None,
        PRECISION=precision(),
        BOX_N=shape[0],
        BOX_H=shape[1],
        BOX_W=shape[2],
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
    )
    programs = n_tiles * p_tiles * q_tiles
    what = f"{first} > {last} > {following}"
    return Launch(
        _conv3x3_conv1x1_kernel, programs, arguments, config.options, what, _work_of(t, config, programs, nbytes(y))
    )


def _work_of(t: Tail, config: Config, programs: int, y_bytes: int) -> Work:
    first, last, following = t.parts
    J, K, J1 = (c.weight.shape[0] for c in t.parts)
    tiles = programs * (K // config.BLOCK_N)
    work = first.work(dataclasses.replace(config, BLOCK_N=J), programs).plus(last.work(config, tiles))
    work = work.plus(following.work(dataclasses.replace(config, BLOCK_N=J1), programs))
    # The 3x3's result is not written, and the operands of the two 1x1 products do not come from memory.
    size = first.x.element_size()
    moved = work.bytes - 2 * first.rows * J * size - y_bytes
    copied = work.copied - (tiles * J + programs * K) * config.BLOCK_M * size
    return work._replace(bytes=moved, copied=copied)
