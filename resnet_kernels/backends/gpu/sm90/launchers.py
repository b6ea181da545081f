"""The kernels of csrc/cuda/sm90: their argument structures, their limits, and their launches.

The library has a C interface and is loaded by ctypes, so one build serves every Python.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...contract import Geometry, Stats, nhwc_strides
from .. import glue
from ..c_library import CLibrary

DTYPES = (torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile of conv_act: output positions and channels of a CTA, and pipeline stages of 64 input channels."""

    positions: int
    channels: int
    stages: int


# In the order of csrc/cuda/sm90/conv_act_tiles.h. "turn": the two consumer warp groups take turns with a tile each, one
# multiplies while the other stores (ping-pong). "both": they share a tile (cooperative).
TILES = {
    "turn128x128": Tile(128, 128, 5),
    "turn128x64": Tile(128, 64, 8),
    "both64x256": Tile(128, 256, 3),
}
# Tiles whose epilogue also computes the statistics of the result.
STATISTICS_TILES = {"stats128x128": Tile(128, 128, 4), "stats128x64": Tile(128, 64, 7)}
# The tile whose epilogue masks the result and computes the two sums of a batch norm's gradient.
SUMS_TILES = {"sums128x64": Tile(128, 64, 7)}
NUMBERS = {name: i for i, name in enumerate([*TILES, *STATISTICS_TILES, *SUMS_TILES])}


class _Conv(ctypes.Structure):
    C_NAME = "ResnetKernelsConv"

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "x w x2 w2 residual y scale shift masks parts".split()),
        *((name, ctypes.c_int64 * 3) for name in ("x_strides", "x2_strides")),
        *(
            (name, ctypes.c_int32)
            for name in "N H W C K R S stride padding dilation C2 relu half tile multiprocessors".split()
        ),
    ]


class _Stem(ctypes.Structure):
    C_NAME = "ResnetKernelsStem"

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "x w y shift".split()),
        *((name, ctypes.c_int32) for name in "N H W half multiprocessors".split()),
    ]


class _Tail(ctypes.Structure):
    C_NAME = "ResnetKernelsTail"

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "x w w3 w1 residual y ahead shift shift3 shift1".split()),
        *((name, ctypes.c_int32) for name in "N H W J K ahead_channels half multiprocessors".split()),
    ]


class _Bottleneck(ctypes.Structure):
    C_NAME = "ResnetKernelsBottleneck"

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "x w1 w w3 wp y shift1 shift shift3".split()),
        *((name, ctypes.c_int32) for name in "N H W half multiprocessors".split()),
    ]


class _Pair(ctypes.Structure):
    C_NAME = "ResnetKernelsPair"

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "x w3 w1 residual y ahead shift3 shift1".split()),
        *((name, ctypes.c_int32) for name in "M J K ahead_channels half multiprocessors".split()),
    ]


class _Wgrad(ctypes.Structure):
    C_NAME = "ResnetKernelsWgrad"

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "g x parts sums".split()),
        *((name, ctypes.c_int64 * 3) for name in ("g_strides", "x_strides")),
        *(
            (name, ctypes.c_int32)
            for name in "N H W C K R S stride padding dilation span columns upper half multiprocessors".split()
        ),
    ]


@functools.cache
def load() -> tuple[CLibrary | None, str | None]:
    """Return (the library, None), or (None, why there is none)."""
    built = sorted(Path(__file__).parents[3].glob("_sm90*.so"))
    if not built:
        return (
            None,
            "the kernels for sm_90a were not built (they need nvcc, CUTLASS's headers and the arch 9.0a)",
        )
    try:
        return declared(ctypes.CDLL(str(built[0]))), None
    except OSError as error:
        return None, f"the kernels for sm_90a do not load: {error}"


CALLS = {
    "conv_act": _Conv,
    "bottleneck": _Bottleneck,
    "pair": _Pair,
    "tail": _Tail,
    "stem": _Stem,
    "wgrad": _Wgrad,
}


def declared(functions: Any) -> CLibrary:
    """Return the opened library with its functions' types declared. Raises OSError: built from other sources."""
    library = CLibrary(functions, "resnet_kernels_sm90", CALLS)
    functions.resnet_kernels_sm90_tiles.restype = ctypes.c_char_p
    return library


@functools.cache
def why_not_here(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why these kernels do not run on the device, or None."""
    if dtype not in DTYPES:
        return f"expected bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    if device.type != "cuda":
        return f"expected tensors on cuda, got {device}"
    reason = load()[1]
    if reason is None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) != (9, 0):
            return f"the kernels are built for sm_90a only, this GPU is sm_{major}{minor}"
    return reason


def why_not_weight(shape: Sequence[int], geometry: Geometry) -> str | None:
    """Return why conv_act cannot convolve by a weight (K, C, R, S), or None."""
    K, C, R, S = shape
    if geometry.groups > 1:
        return f"expected one group, got {geometry.groups}"
    if C % 8 or K % 8:
        return f"expected channels in multiples of 8, got {C} and {K}"
    reach = geometry.dilation * (max(R, S) - 1)
    # The limits of TMA's im2col mode.
    if geometry.stride > 8 or geometry.padding > 127 or reach > 127:
        return f"expected stride up to 8, padding and reach of the filter up to 127, got {geometry} with {R}x{S}"
    return None


def why_not_turned(shape: Sequence[int], geometry: Geometry) -> str | None:
    """Return why conv_act cannot run the data gradient by a weight (K, C, R, S) as a convolution, or None."""
    _, _, R, S = shape
    if geometry.stride > 1 or R != S or geometry.padding > geometry.dilation * (R - 1):
        return f"expected stride 1 and a square filter that reaches beyond its padding, got {R}x{S} with {geometry}"
    return None


def turned(weight: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """Return the convolution that equals the data gradient by a weight (K, R, S, C): its weight (C, R, S, K), its
    geometry. The filter is turned by 180 degrees."""
    _, p, d, _ = geometry
    return weight.flip(1, 2).permute(3, 1, 2, 0).contiguous(), Geometry(1, d * (weight.shape[1] - 1) - p, d)


# The largest number of output positions: the kernel counts them in 32 bits.
MOST_POSITIONS = 2**31 - 2**16


def aligned(t: Tensor) -> bool:
    """Return whether TMA can read the map: contiguous channels, other strides and the address multiples of 16 bytes."""
    strides = (s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1)
    return (
        (t.shape[1] == 1 or t.stride(1) == 1) and t.data_ptr() % 16 == 0 and all(s % 8 == 0 or s == 1 for s in strides)
    )


def _run(name: str, call: ctypes.Structure, device: torch.device) -> None:
    library, reason = load()
    if library is None:
        raise RuntimeError(f"gpu:sm90 {name}: {reason}")
    library.run(name, call, device)


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def conv_act(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    geometry: Geometry,
    tile: str,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    second: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    parts: Tensor | None = None,
    masks: Tensor | None = None,
) -> None:
    """y = [relu](scale * conv(x, weight) + conv1x1(x2, weight2) + shift + residual), the sums in fp32, rounded once.

    x: (N, C, H, W), `aligned`. weight: (K, R, S, C), contiguous. y: (N, K, P, Q) channels_last, to be written. scale,
    shift: fp32, contiguous, one per output channel. second: (x2 (N, C2, P, Q), weight2 (K, 1, 1, C2)), likewise.
    residual: as y. All of one dtype, bf16 or fp16, on one device. parts: (2, tiles of 128 output positions, K), fp32,
    contiguous, to be written by a tile of `STATISTICS_TILES`: of each, of y's rounded values, mean and sum of squared
    deviations, without atomics. Launches on torch's current stream.

    With masks, of a tile of `SUMS_TILES`: residual is z, y = conv(x, weight) + conv1x1(x2, weight2) + shift where not
    (relu(a * z + b), rounded, <= 0), else 0; masks (K, 4): shift, a, b, centre; parts: sums of y and y * (z - centre).

    Raises RuntimeError if the library is missing or the launch fails. The caller checks `why_not_here`,
    `why_not_weight` and `aligned` before.
    """
    N, C, H, W = x.shape
    K, R, S, _ = weight.shape
    x2, weight2 = second or (None, None)
    tensors = {"x": x, "w": weight, "x2": x2, "w2": weight2, "residual": residual, "y": y}
    tensors |= {"scale": scale, "shift": shift, "masks": masks, "parts": parts}
    call = _Conv(
        **{name: _pointer(t) for name, t in tensors.items()},
        x_strides=nhwc_strides(x),
        N=N,
        H=H,
        W=W,
        C=C,
        K=K,
        R=R,
        S=S,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        relu=relu,
        half=x.dtype == torch.float16,
        tile=NUMBERS[tile],
        multiprocessors=glue.multiprocessors(x.device),
    )
    if x2 is not None:
        call.x2_strides, call.C2 = nhwc_strides(x2), x2.shape[1]
    _run("conv_act", call, x.device)


# The channels that `pair` is built for: inner channels J, and output channels of the next block's first convolution.
# The outer channels K are a multiple of 64.
PAIRS = ((128, 128), (128, 256), (256, 256))


def pair(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    shifts: tuple[Tensor, Tensor],
    residual: Tensor,
    y: Tensor,
    ahead: Tensor,
) -> None:
    """y = relu(x w3^T + shift3 + residual), ahead = relu(y w1^T + shift1); sums in fp32, y and ahead rounded.

    x: (N, J, H, W). weights: w3 (K, 1, 1, J), w1 (J1, 1, 1, K), contiguous, (J, J1) in `PAIRS`. shifts: fp32. residual,
    y: (N, K, H, W); ahead: (N, J1, H, W). Maps channels_last. y and ahead are to be written.
    """
    N, J, H, W = x.shape
    call = _Pair(
        x=_pointer(x),
        residual=_pointer(residual),
        y=_pointer(y),
        ahead=_pointer(ahead),
        M=N * H * W,
        J=J,
        K=y.shape[1],
        ahead_channels=ahead.shape[1],
        half=x.dtype == torch.float16,
        multiprocessors=glue.multiprocessors(x.device),
    )
    call.w3, call.w1 = map(_pointer, weights)
    call.shift3, call.shift1 = map(_pointer, shifts)
    _run("pair", call, x.device)


class TailShape(NamedTuple):
    """The shapes that `tail` is built for.

    outside: the outer channels K, or with `streams` what they are a multiple of. ahead: output channels of the next
    block's first convolution. columns: the largest width of a map. streams: the weights do not stay in shared memory,
    and each of a CTA's two consumer warp groups has a tile of its own.
    """

    outside: int
    ahead: tuple[int, ...]
    columns: int
    streams: bool


# By inner channels J.
TAILS = {64: TailShape(256, (64, 128), 56, streams=False), 128: TailShape(64, (128,), 28, streams=True)}


def why_not_tail(J: int, K: int, ahead: int, columns: int) -> str | None:
    """Return why `tail` is not built for J inner and K outer channels, `ahead` channels of the next block's first
    convolution and a map of so many columns, or None."""
    shape = TAILS.get(J)
    if shape is None:
        return f"expected {', '.join(map(str, TAILS))} inner channels, got {J}"
    if K % shape.outside if shape.streams else K != shape.outside:
        return f"expected {'multiples of ' * shape.streams}{shape.outside} outer channels, got {K}"
    if ahead not in shape.ahead:
        return f"expected {', '.join(map(str, shape.ahead))} output channels of the next convolution, got {ahead}"
    if columns > shape.columns:
        return f"expected a map of at most {shape.columns} columns, got {columns}"
    return None


def tail_rows(J: int, columns: int) -> int:
    """Return the output rows of a tile."""
    return 2 * (64 // (columns + 2)) if TAILS[J].streams else 2


def tail(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    shifts: tuple[Tensor, Tensor, Tensor],
    residual: Tensor,
    y: Tensor,
    ahead: Tensor,
) -> None:
    """h = relu(conv3x3(x, w) + shift), y = relu(h w3^T + shift3 + residual), ahead = relu(y w1^T + shift1); sums in
    fp32, h, y and ahead rounded.

    x: (N, J, H, W). weights: w (J, 3, 3, J), w3 (K, 1, 1, J), w1 (J1, 1, 1, K), contiguous, as `why_not_tail` wants
    them. shifts: fp32. residual, y: (N, K, H, W); ahead: (N, J1, H, W). Maps channels_last. y and ahead are to be
    written.
    """
    N, J, H, W = x.shape
    call = _Tail(
        x=_pointer(x),
        residual=_pointer(residual),
        y=_pointer(y),
        ahead=_pointer(ahead),
        N=N,
        H=H,
        W=W,
        J=J,
        K=y.shape[1],
        ahead_channels=ahead.shape[1],
        half=x.dtype == torch.float16,
        multiprocessors=glue.multiprocessors(x.device),
    )
    call.w, call.w3, call.w1 = map(_pointer, weights)
    call.shift, call.shift3, call.shift1 = map(_pointer, shifts)
    _run("tail", call, x.device)


# The weights (K, C, R, S) of the convolutions that `bottleneck` is built for, by shortcut, and the largest width of a
# map.
BOTTLENECKS = {
    "identity": ((64, 256, 1, 1), (64, 64, 3, 3), (256, 64, 1, 1)),
    "projection": ((64, 64, 1, 1), (64, 64, 3, 3), (256, 64, 1, 1), (256, 64, 1, 1)),
}
MOST_BOTTLENECK_COLUMNS = 56


def why_not_bottleneck(
    shapes: Sequence[Sequence[int]], geometries: Sequence[Geometry], shortcut: str, columns: int
) -> str | None:
    """Return why `bottleneck` is not built for a block of these weights (K, C, R, S) and this map width, or None."""
    found = tuple(map(tuple, shapes))
    if found != BOTTLENECKS.get(shortcut):
        return f"expected weights and shortcut of {BOTTLENECKS}, got {found} and {shortcut}"
    if list(geometries) != [Geometry(padding=shape[2] // 2) for shape in found]:
        return f"expected strides, dilations and groups of 1, got {list(geometries)}"
    if columns > MOST_BOTTLENECK_COLUMNS:
        return f"expected a map of at most {MOST_BOTTLENECK_COLUMNS} columns, got {columns}"
    return None


def bottleneck(x: Tensor, weights: Sequence[Tensor], shifts: Sequence[Tensor], y: Tensor) -> None:
    """a = relu(x w1^T + shift1), h = relu(conv3x3(a, w) + shift), y = relu(h w3^T + shift3 + s) with s = x, or x wp^T;
    sums in fp32, a, h and y rounded.

    x: (N, C, H, W) channels_last, W at most 56. weights: w1 (64, 1, 1, C), w (64, 3, 3, 64), w3 (256, 1, 1, 64), and
    where C is 64 and not 256 wp (256, 1, 1, 64), contiguous. shifts: fp32. y: (N, 256, H, W) channels_last, to be
    written, and not x.
    """
    N, _, H, W = x.shape
    call = _Bottleneck(
        x=_pointer(x),
        y=_pointer(y),
        N=N,
        H=H,
        W=W,
        half=x.dtype == torch.float16,
        multiprocessors=glue.multiprocessors(x.device),
    )
    call.w1, call.w, call.w3, call.wp = map(_pointer, (*weights, None)[:4])
    call.shift1, call.shift, call.shift3 = map(_pointer, shifts)
    _run("bottleneck", call, x.device)


# The largest image width that `stem` is built for.
MOST_STEM_COLUMNS = 224


def why_not_stem(shape: Sequence[int], geometry: Geometry, width: int) -> str | None:
    """Return why `stem` cannot run for a weight (K, C, R, S) and images of this width, or None."""
    K, C, R, S = shape
    if (K, R, S) != (64, 7, 7) or C > 3 or geometry != Geometry(2, 3):
        return f"expected a 7x7 convolution of stride 2 from 3 channels to 64, got {tuple(shape)} with {geometry}"
    if width % 2 or width > MOST_STEM_COLUMNS:
        return f"expected an even image width up to {MOST_STEM_COLUMNS}, got {width}"
    return None


def stem(x: Tensor, packed: Tensor, shift: Tensor, y: Tensor) -> None:
    """y = max_pool3x3/2(relu(conv7x7/2(x, w) + shift)), the sums in fp32, rounded once.

    x: (N, 4, H, W) channels_last, zero channels after the image's. packed: (64, 7, 32): for each filter row 7 pixels of
    4 channels, then 4 ignored values. shift: fp32. y: (N, 64, P, Q) channels_last, written. A NaN or an infinity in the
    image may make y NaN in one column more than it should: the column to the right of those that read it.
    """
    N, _, H, W = x.shape
    call = _Stem(
        x=_pointer(x),
        w=_pointer(packed),
        y=_pointer(y),
        shift=_pointer(shift),
        N=N,
        H=H,
        W=W,
        half=x.dtype == torch.float16,
        multiprocessors=glue.multiprocessors(x.device),
    )
    _run("stem", call, x.device)


# A tile of wgrad: WGRAD_ROWS channels of g by WGRAD_COLUMNS slices of 64 channels of x (of one tap or more). A pipeline
# step has WGRAD_STEP output positions. Tensor cores sum FLUSH positions before the sum is promoted to another
# accumulator; a partial sum covers a multiple of FLUSH, and at least LEAST_SPAN positions.
WGRAD_ROWS, WGRAD_COLUMNS, WGRAD_STEP, FLUSH, LEAST_SPAN = 128, (2, 3), 64, 128, 512
# Estimates: the time of a step limited by L2, and the rate at which partial sums are written and read again.
STEP_US, PART_BYTES_PER_US = 0.5, 4e6


def wgrad_columns(C: int, taps: int) -> int:
    """Return the slices in a tile: three if they divide evenly, which reads less again from L2, else two."""
    return 3 if -(-C // 64) * taps % 3 == 0 else 2


def wgrad_tiles(K: int, C: int, taps: int, columns: int, upper: bool = False) -> int:
    rows = -(-K // WGRAD_ROWS)
    return rows * (rows + 1) // 2 if upper else rows * -(-(-(-C // 64) * taps) // columns)


@functools.cache
def wgrad_span(M: int, tiles: int, elements: int, multiprocessors: int) -> int:
    """Return how many of M positions a partial sum covers.

    CTAs take units of work (tile, partial sum) in turn. There should be enough units that the last round is nearly
    full, and few enough that adding the partial sums, of `elements` each, is cheap.
    """

    def span_of(parts: int) -> int:
        return -(-M // (parts * FLUSH)) * FLUSH

    def time(parts: int) -> float:
        rounds = -(-tiles * parts // multiprocessors)
        return rounds * span_of(parts) / WGRAD_STEP * STEP_US + parts * elements * 8 / PART_BYTES_PER_US

    return span_of(min(range(1, max(1, min(M // LEAST_SPAN, 4 * multiprocessors)) + 1), key=time))


def wgrad_parts(
    g: Tensor,
    x: Tensor,
    kernel: tuple[int, int],
    geometry: Geometry,
    span: int,
    columns: int,
    parts: Tensor,
    sums: Tensor | None = None,
    upper: bool = False,
) -> None:
    """parts[i, k, r, s, c] = sum over positions m of part i of g[m, k] * x[what tap (r, s) sees from m, c].

    g: (N, K, P, Q), x: (N, C, H, W), `aligned`, bf16 or fp16. Part i: positions from i * span on, counted over columns,
    rows, images; span a multiple of 128. parts: fp32, contiguous, to be written; sums (parts, K): those of g. upper: g
    is x, kernel (1, 1): of tiles of 128 x 128 those below the diagonal are not written. columns: of `WGRAD_COLUMNS`.
    Sums in fp32, every 128 positions apart, without atomics. Launches on torch's current stream.
    """
    N, C, H, W = x.shape
    call = _Wgrad(
        g=_pointer(g),
        x=_pointer(x),
        parts=_pointer(parts),
        sums=_pointer(sums),
        g_strides=nhwc_strides(g),
        x_strides=nhwc_strides(x),
        N=N,
        H=H,
        W=W,
        C=C,
        K=g.shape[1],
        R=kernel[0],
        S=kernel[1],
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        span=span,
        columns=columns,
        upper=upper,
        half=x.dtype == torch.float16,
        multiprocessors=glue.multiprocessors(x.device),
    )
    _run("wgrad", call, x.device)


def tile_for(K: int) -> str:
    """Return the tile that was fastest, or nearly so, on an H200 for most convolutions of ResNets."""
    return "turn128x64" if K <= 64 else "turn128x128"


def statistics_of(parts: Tensor, rows: int) -> Stats:
    """Return the statistics from the partial ones of `conv_act`, merged by the formula of Chan, Golub and LeVeque in
    fp64."""
    means, M2 = parts.double()
    counts = torch.full((len(means), 1), 128.0, dtype=torch.float64, device=parts.device)
    counts[-1] = rows - 128 * (len(means) - 1)
    mean = (counts * means).sum(0) / rows
    return Stats(rows, mean.float(), (M2 + counts * (means - mean).square()).sum(0).float())
