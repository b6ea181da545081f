"""Launches of CUDA C++ kernels (`sm90`) beside Triton's own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...contract import Geometry, nhwc_strides
from ..configs import Config, Size, for_boxes
from ..convolution import Convolution
from ..launch import Native, Work, gpu_of, listening, nbytes
from ..sm90 import launchers as sm90
from .tail import Tail

# Warps of a block: one warp group moves, two multiply.
WARPS = 12

# What `Choice` and tables call a tile of conv_act's, with its configuration.
KERNELS = {
    f"conv_act {name}": Config(tile.positions, tile.channels, 64, WARPS, tile.stages, persistent=True)
    for name, tile in sm90.TILES.items()
}


def _why_not_here(t: Tensor, arch: int) -> str | None:
    if arch != 90:
        return f"expected sm_90, got sm_{arch}"
    gpu = gpu_of(t.device)
    if gpu is None:
        return "for a GPU that is imagined only Triton's kernels are planned"
    if listening.tape is not None:
        return "a recorded step launches Triton's kernels alone"
    return sm90.why_not_here(gpu, t.dtype)


def why_not(c: Convolution, arch: int) -> str | None:
    """Why conv_act cannot run the convolution, or None."""
    reason = _why_not_here(c.x, arch)
    if reason:
        return reason
    K, R, S, C = c.weight.shape
    if c.lazy is not None:
        return "expected an operand that is there"
    if c.second is not None and c.scale is not None:
        return "expected weights with their scales in them, of two products"
    if c.residual is not None and (c.residual.shape[1] != K or not _dense(c.residual)):
        return "expected a contiguous residual of as many channels"
    maps = [c.x, *([c.second[0]] if c.second else []), *([] if c.residual is None else [c.residual])]
    if not all(map(sm90.aligned, maps)):
        return "expected maps by multiples of 16 bytes"
    if c.second is not None and c.second[0].shape[1] % 8:
        return f"expected channels in multiples of 8, got {c.second[0].shape[1]}"
    if c.rows > sm90.MOST_POSITIONS:
        return f"expected at most {sm90.MOST_POSITIONS} output positions, got {c.rows}"
    return sm90.why_not_weight((K, C, R, S), c.geometry)


def _dense(t: Tensor) -> bool:
    N, C, H, W = t.shape
    return nhwc_strides(t) == (H * W * C, W * C, C)


# Triton's widest tiles, for long sums, and the share of the multiprocessors that must have one in the last round: then
# they are faster.
WIDE, FULL_ROUND = 128 * 256, 0.85


def preferred(s: Size) -> tuple[str, Config] | None:
    """The tile of conv_act that a convolution should run by, if one: what was fastest on an H200 for ResNet-50 at batch
    256 (docs/hopper.md), and fills the GPU."""
    kernel = f"conv_act {sm90.tile_for(s.K)}"
    config = KERNELS[kernel]
    if s.arch != 90 or s.itemsize != 2 or s.tiles(config.BLOCK_M, config.BLOCK_N) < s.processors:
        return None
    boxes = for_boxes(s)
    if boxes.BLOCK_M * boxes.BLOCK_N == WIDE:
        tiles = s.tiles(boxes.BLOCK_M, boxes.BLOCK_N)
        if tiles / (math.ceil(tiles / s.processors) * s.processors) >= FULL_ROUND:
            return None
    return kernel, config


# Channels inside; sm90's tail of others no GPU has proved: it runs where a measured table says so.
PROVED_TAILS = (64,)


def preferred_tail(first: Convolution, processors: int) -> list[str]:
    """Ways of a tail to be preferred to Triton's, likewise."""
    if first.rows < 128 * processors:
        return []
    return [TAIL, PAIR] if first.weight.shape[0] in PROVED_TAILS else [PAIR]


def launch(c: Convolution, kernel: str, y: Tensor) -> Native:
    """y: (N, K, P, Q) channels_last, to be written. Only where `why_not` is None."""
    config = KERNELS[kernel]
    tiles = math.ceil(c.rows / config.BLOCK_M) * math.ceil(c.weight.shape[0] / config.BLOCK_N)
    arguments = dict(
        x=c.x,
        weight=c.weight,
        y=y,
        geometry=c.geometry,
        tile=kernel.removeprefix("conv_act "),
        scale=c.scale,
        shift=c.shift,
        second=c.second,
        residual=c.residual,
        relu=c.relu,
    )
    return Native(sm90.conv_act, tiles, arguments, config.options, str(c), c.work(config, tiles))


PAIR = "conv3x3, then sm90 pair"


def why_not_pair(t: Tail, arch: int) -> str | None:
    """Why sm90's pair cannot run a tail's last two convolutions, or None."""
    _, last, following = t.parts
    reason = _why_not_here(t.first.x, arch)
    if reason:
        return reason
    K, R, S, J = last.weight.shape
    J1 = following.weight.shape[0]
    if (J, J1) not in sm90.PAIRS or K % 64:
        return f"expected channels {sm90.PAIRS} and multiples of 64 between, got {(J, J1)} and {K}"
    return _why_not_links((last, following), last)


def _why_not_links(products: Sequence[Convolution], last: Convolution) -> str | None:
    """What 1x1 convolutions behind each other have in common. last: the one with the residual."""
    if any(c.weight.shape[1:3] != (1, 1) or c.geometry != Geometry() for c in products):
        return "expected 1x1 convolutions of stride 1"
    if not all(c.relu and c.shift is not None and c.scale is None for c in products):
        return "expected ReLU, shifts, and scales in the weights"
    if last.second or last.residual is None or last.residual.shape[1] != last.weight.shape[0]:
        return "expected a residual of as many channels, and no projection"
    if not _dense(last.residual) or not sm90.aligned(last.residual):
        return "expected a contiguous residual"
    return None


def pair_launch(t: Tail, h: Tensor, y: Tensor, ahead: Tensor) -> Native:
    """h: what the 3x3 made; y and ahead are to be written. Only where `why_not_pair` is None."""
    _, last, following = t.parts
    weights, shifts = (last.weight, following.weight), (last.shift, following.shift)
    arguments = dict(x=h, weights=weights, shifts=shifts, residual=last.residual, y=y, ahead=ahead)
    tiles = math.ceil(last.rows / 128)
    moved = nbytes(h, *weights, last.residual, y, ahead)
    flops = last.flops + following.flops
    copied = nbytes(h, last.residual) + nbytes(*weights) * tiles
    work = Work(moved, flops, copied, flops * tiles * 128 // last.rows)
    return Native(sm90.pair, tiles, arguments, {"num_warps": WARPS}, f"{last} > {following}", work, problem=t)


TAIL = "sm90 tail"
TAIL_CONFIG = Config(128, 64, 64, WARPS, 1, persistent=True)


def why_not_tail(t: Tail, arch: int) -> str | None:
    """Why sm90's tail cannot run it, or None."""
    first, last, following = t.parts
    reason = _why_not_here(first.x, arch)
    if reason:
        return reason
    J, R, S, C = first.weight.shape
    if (R, S, C) != (3, 3, J):
        return f"expected an ungrouped 3x3 from {J} channels, got {R}x{S} from {C}"
    reason = sm90.why_not_tail(J, last.weight.shape[0], following.weight.shape[0], first.x.shape[3])
    if reason:
        return reason
    if first.geometry != Geometry(padding=1) or first.shift is None or first.scale is not None or not first.relu:
        return "expected a 3x3 of stride 1 with shift and ReLU, and its scale in the weight"
    if first.lazy or first.second or first.residual is not None:
        return "expected a plain 3x3"
    if not (_dense(first.x) and sm90.aligned(first.x)):
        return "expected a contiguous map"
    return _why_not_links((last, following), last)


def tail_launch(t: Tail, y: Tensor, ahead: Tensor) -> Native:
    """y and ahead, channels_last, are to be written. Only where `why_not_tail` is None."""
    first, last, _ = t.parts
    N, J, H, W = first.x.shape
    rows = sm90.tail_rows(J, W)
    tiles = N * math.ceil(H / rows)
    weights, shifts = tuple(c.weight for c in t.parts), tuple(c.shift for c in t.parts)
    arguments = dict(x=first.x, weights=weights, shifts=shifts, residual=last.residual, y=y, ahead=ahead)
    maps = nbytes(last.residual, y, ahead)
    moved = nbytes(first.x, *weights) + maps
    streams = sm90.TAILS[J].streams
    # A tile's rows of x and those around them; 128 positions of each tile.
    copied = nbytes(first.x) * (rows + 2) // rows + nbytes(*weights) * (tiles if streams else 1) + maps
    flops = sum(c.flops for c in t.parts)
    work = Work(moved, flops, copied, flops * 128 * tiles // first.rows)
    # A block has two tiles at a time where each of its warp groups has one.
    grid = math.ceil(tiles / 2) if streams else tiles
    return Native(sm90.tail, grid, arguments, TAIL_CONFIG.options, " > ".join(map(str, t.parts)), work)


@dataclasses.dataclass(frozen=True)
class Whole:
    """A bottleneck's three convolutions. x of the second and the last stand for what the one before would write; the
    first's is also what the last adds, or projects."""

    first: Convolution
    middle: Convolution
    last: Convolution

    @property
    def key(self) -> str:
        return " > ".join(c.key for c in self.parts)

    @property
    def parts(self) -> tuple[Convolution, Convolution, Convolution]:
        return self.first, self.middle, self.last

    @property
    def device(self) -> torch.device:
        """Where it runs: x may not be there yet."""
        return self.first.weight.device

    @property
    def weights(self) -> list[Tensor]:
        """As `why_not_bottleneck` and `bottleneck` order them, (K, R, S, C)."""
        return [c.weight for c in self.parts] + ([self.last.second[1]] if self.last.second else [])

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Whole:
        first, middle, last = (c.map(function) for c in self.parts)
        if last.second is not None:
            return Whole(first, middle, dataclasses.replace(last, second=(first.x, last.second[1])))
        return Whole(first, middle, dataclasses.replace(last, residual=first.x))


# By the shortcut weights (K, C, R, S) of blocks that have one.
WHOLES = sm90.BOTTLENECKS
WHOLE = "sm90 bottleneck"
WHOLE_CONFIG = Config(128, 64, 64, WARPS, 1, persistent=True)


def why_not_whole(w: Whole, arch: int) -> str | None:
    """Why sm90's bottleneck cannot run the block, or None."""
    first, last = w.first, w.last
    reason = _why_not_here(first.weight, arch)
    if reason:
        return reason
    geometries = [c.geometry for c in w.parts] + ([Geometry()] if last.second else [])
    shapes = [(K, C, R, S) for K, R, S, C in (t.shape for t in w.weights)]
    shortcut = "projection" if last.second else "identity"
    reason = sm90.why_not_bottleneck(shapes, geometries, shortcut, first.x.shape[3])
    if reason:
        return reason
    if not all(c.relu and c.shift is not None and c.scale is None and c.lazy is None for c in w.parts):
        return "expected ReLU, shifts, and scales in the weights"
    if not (_dense(first.x) and sm90.aligned(first.x)):
        return "expected a contiguous map"
    return None


def whole_launch(w: Whole, y: Tensor) -> Native:
    """y: (N, 256, H, W) channels_last, to be written. Only where `why_not_whole` is None."""
    x, weights = w.first.x, w.weights
    N, _, H, W = x.shape
    arguments = dict(x=x, weights=weights, shifts=tuple(c.shift for c in w.parts), y=y)
    moved, flops = nbytes(x, y, *weights), sum(c.flops for c in w.parts)
    # x again as what is added; 64 positions of each row, two rows at a time.
    issued = flops * 64 * 2 * math.ceil(H / 2) // (W * H)
    work = Work(moved, flops, moved + nbytes(x), issued)
    return Native(
        sm90.bottleneck, N * math.ceil(H / 2), arguments, WHOLE_CONFIG.options, " > ".join(map(str, w.parts)), work
    )


def why_not_stem(x: Tensor, shape: tuple[int, ...], geometry: Geometry, arch: int) -> str | None:
    """Why sm90's stem cannot run for a weight (K, C, R, S), or None."""
    return _why_not_here(x, arch) or sm90.why_not_stem(shape, geometry, x.shape[3])


def stem_launch(x: Tensor, packed: Tensor, shift: Tensor, y: Tensor) -> Native:
    """x, packed, shift and y as `sm90.stem` takes them."""
    N, _, H, W = x.shape
    flops = 2 * N * math.ceil(H / 2) * math.ceil(W / 2) * 64 * 147
    moved = nbytes(x, packed, y)
    # 7 filter rows of 8 pixels of 4 channels for what are 7x7 pixels of 3; rows of a strip of 14 twice.
    issued = int(flops * (7 * 32) / 147 * 29 / 28)
    copied = int(nbytes(x) * 64 / 56) + nbytes(packed)
    arguments = dict(x=x, packed=packed, shift=shift, y=y)
    what = f"stem 7x7 3->64 {H}x{W}, max pool 3/2"
    return Native(sm90.stem, N, arguments, {"num_warps": WARPS}, what, Work(moved, flops, copied, issued))
