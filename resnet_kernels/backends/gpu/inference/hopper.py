"""Launches of the CUDA C++ kernels for Hopper (`sm90`), as candidates beside Triton's kernels.

    conv_act     one fused convolution
    pair         a tail's last 1x1 and the next block's first 1x1, after a 3x3 in a kernel of its own
    tail         a bottleneck's 3x3 and last 1x1, and the next block's first 1x1
    bottleneck   a whole bottleneck
    stem         the stem with its max pooling

For each there is a `why_not...` (the reason it cannot run a problem, or None) and a `..._launch`, which may be called
only if that reason is None.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...contract import Geometry, nhwc_strides
from ..configs import Config, ProblemSize, for_boxes
from ..convolution import Convolution
from ..launch import CudaLaunch, Work, active_tape, gpu_of, nbytes
from ..scope import cuda_kernels_excluded
from ..sm90 import launchers as sm90
from .tail import Tail

# Warps of a CTA: one warp group is the producer, two are consumers.
WARPS = 12

# Names of conv_act's tiles in candidates and tables, with their configurations.
KERNELS = {
    f"conv_act {name}": Config(tile.positions, tile.channels, 64, WARPS, tile.stages, persistent=True)
    for name, tile in sm90.TILES.items()
}

# Names of the other kernels in candidates and tables, with the one configuration each is built for (SM90_PAIR runs
# after a 3x3 with a configuration of its own, so the candidate as a whole has none).
SM90_PAIR = "conv3x3, then sm90 pair"
SM90_TAIL = "sm90 tail"
SM90_TAIL_CONFIG = Config(128, 64, 64, WARPS, 1, persistent=True)
SM90_BOTTLENECK = "sm90 bottleneck"
SM90_BOTTLENECK_CONFIG = Config(128, 64, 64, WARPS, 1, persistent=True)

# {shortcut: the weights' sizes (K, C, R, S)} of the blocks that the bottleneck kernel is built for.
BOTTLENECK_SHAPES = sm90.BOTTLENECKS


def _why_not_here(t: Tensor, arch: int) -> str | None:
    if arch != 90:
        return f"expected sm_90, got sm_{arch}"
    gpu = gpu_of(t.device)
    if gpu is None:
        return "for a GPU that is not present, only Triton's kernels are planned"
    if cuda_kernels_excluded():
        return "the family gpu:triton was named"
    if active_tape.get() is not None:
        return "a recorded training step launches Triton's kernels only"
    return sm90.why_not_here(gpu, t.dtype)


def _contiguous(t: Tensor) -> bool:
    """Whether (N, C, H, W) is contiguous in channels_last."""
    N, C, H, W = t.shape
    return nhwc_strides(t) == (H * W * C, W * C, C)


def why_not(c: Convolution, arch: int) -> str | None:
    """Return why conv_act cannot run the convolution, or None."""
    reason = _why_not_here(c.x, arch)
    if reason:
        return reason
    K, R, S, C = c.weight.shape
    if c.lazy is not None:
        return "expected an operand in memory, got a lazy one"
    if c.second is not None and c.scale is not None:
        return "expected the scales of two products multiplied into their weights"
    if c.residual is not None and (c.residual.shape[1] != K or not _contiguous(c.residual)):
        return f"expected a contiguous residual of {K} channels"
    maps = [c.x, *([c.second[0]] if c.second else []), *([] if c.residual is None else [c.residual])]
    if not all(map(sm90.aligned, maps)):
        return "expected addresses and strides of x, x2 and residual in multiples of 16 bytes"
    if c.second is not None and c.second[0].shape[1] % 8:
        return f"expected channels of x2 in multiples of 8, got {c.second[0].shape[1]}"
    if c.rows > sm90.MOST_POSITIONS:
        return f"expected at most {sm90.MOST_POSITIONS} output positions, got {c.rows}"
    return sm90.why_not_weight((K, C, R, S), c.geometry)


# Elements of Triton's widest tile, for a long K extent, and the share of multiprocessors that must have such a tile in
# the last wave: from that share on, Triton's wide tiles are faster than conv_act.
WIDE, FULL_WAVE = 128 * 256, 0.85


def preferred(s: ProblemSize) -> tuple[str, Config] | None:
    """Return the conv_act tile that should run a convolution, with its configuration, or None if Triton's kernel
    should.

    The rule follows what was fastest on an H200 for ResNet-50 at batch 256 (docs/hopper.md). The tile must fill the
    GPU.
    """
    kernel = f"conv_act {sm90.tile_for(s.K)}"
    config = KERNELS[kernel]
    if s.arch != 90 or s.itemsize != 2 or s.tiles(config.BLOCK_M, config.BLOCK_N) < s.processors:
        return None
    boxes = for_boxes(s)
    if boxes.BLOCK_M * boxes.BLOCK_N == WIDE:
        tiles = s.tiles(boxes.BLOCK_M, boxes.BLOCK_N)
        if tiles / (math.ceil(tiles / s.processors) * s.processors) >= FULL_WAVE:
            return None
    return kernel, config


def launch(c: Convolution, kernel: str, y: Tensor) -> CudaLaunch:
    """Return conv_act's launch that writes y (N, K, P, Q), channels_last. Call only if `why_not` returned None."""
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
    return CudaLaunch(sm90.conv_act, tiles, arguments, config.options, str(c), c.work(config, tiles))


# Output channels of the 3x3 for which a GPU has shown sm90's tail to be right and fast. With other channels it runs
# only if a measured table says so.
PROVED_TAILS = (64,)


def preferred_tail(first: Convolution, processors: int) -> list[str]:
    """Return the candidates for a tail that are preferred to Triton's, best first. first: the tail's 3x3."""
    if first.rows < 128 * processors:
        return []
    return [SM90_TAIL, SM90_PAIR] if first.weight.shape[0] in PROVED_TAILS else [SM90_PAIR]


def why_not_pair(t: Tail, arch: int) -> str | None:
    """Return why sm90's pair cannot run a tail's last two convolutions, or None."""
    _, last, following = t.parts
    reason = _why_not_here(t.first.x, arch)
    if reason:
        return reason
    K, R, S, J = last.weight.shape
    J1 = following.weight.shape[0]
    if (J, J1) not in sm90.PAIRS or K % 64:
        return (
            f"expected (input channels, output channels) of the pair among {sm90.PAIRS} and channels between them in "
            f"multiples of 64, got {(J, J1)} and {K}"
        )
    return _why_not_products((last, following), last)


def _why_not_products(products: Sequence[Convolution], last: Convolution) -> str | None:
    """Return why the consecutive convolutions are not 1x1 products that pair and tail can run, or None. last: the
    convolution that adds the residual."""
    if any(c.weight.shape[1:3] != (1, 1) or c.geometry != Geometry() for c in products):
        return "expected 1x1 convolutions of stride 1"
    if not all(c.relu and c.shift is not None and c.scale is None for c in products):
        return "expected ReLU, shifts, and scales multiplied into the weights"
    if last.second or last.residual is None or last.residual.shape[1] != last.weight.shape[0]:
        return f"expected a residual of {last.weight.shape[0]} channels, and no projection"
    if not _contiguous(last.residual) or not sm90.aligned(last.residual):
        return "expected a contiguous residual at a multiple of 16 bytes"
    return None


def pair_launch(t: Tail, h: Tensor, y: Tensor, ahead: Tensor) -> CudaLaunch:
    """Return the pair's launch, which reads the 3x3's output h and writes y and ahead (the next block's first
    activation). Call only if `why_not_pair` returned None."""
    _, last, following = t.parts
    weights, shifts = (last.weight, following.weight), (last.shift, following.shift)
    arguments = dict(x=h, weights=weights, shifts=shifts, residual=last.residual, y=y, ahead=ahead)
    tiles = math.ceil(last.rows / 128)
    moved = nbytes(h, *weights, last.residual, y, ahead)
    flops = last.flops + following.flops
    copied = nbytes(h, last.residual) + nbytes(*weights) * tiles
    work = Work(moved, flops, copied, flops * tiles * 128 // last.rows)
    return CudaLaunch(sm90.pair, tiles, arguments, {"num_warps": WARPS}, f"{last} > {following}", work, problem=t)


def why_not_tail(t: Tail, arch: int) -> str | None:
    """Return why sm90's tail cannot run the tail, or None."""
    first, last, following = t.parts
    reason = _why_not_here(first.x, arch)
    if reason:
        return reason
    J, R, S, C = first.weight.shape
    if (R, S, C) != (3, 3, J):
        return f"expected an ungrouped 3x3 with {J} input channels, got {R}x{S} with {C}"
    reason = sm90.why_not_tail(J, last.weight.shape[0], following.weight.shape[0], first.x.shape[3])
    if reason:
        return reason
    if first.geometry != Geometry(padding=1) or first.shift is None or first.scale is not None or not first.relu:
        return "expected a 3x3 of stride 1 and padding 1 with shift and ReLU, and its scale multiplied into the weight"
    if first.lazy or first.second or first.residual is not None:
        return "expected a 3x3 without lazy operand, second product or residual"
    if not (_contiguous(first.x) and sm90.aligned(first.x)):
        return "expected a contiguous x at a multiple of 16 bytes"
    return _why_not_products((last, following), last)


def tail_launch(t: Tail, y: Tensor, ahead: Tensor) -> CudaLaunch:
    """Return the tail's launch, which writes y and ahead (the next block's first activation), both channels_last. Call
    only if `why_not_tail` returned None."""
    first, last, _ = t.parts
    N, J, H, W = first.x.shape
    rows = sm90.tail_rows(J, W)
    tiles = N * math.ceil(H / rows)
    weights, shifts = tuple(c.weight for c in t.parts), tuple(c.shift for c in t.parts)
    arguments = dict(x=first.x, weights=weights, shifts=shifts, residual=last.residual, y=y, ahead=ahead)
    maps = nbytes(last.residual, y, ahead)
    moved = nbytes(first.x, *weights) + maps
    streams = sm90.TAILS[J].streams
    # Each tile reads its rows of x and a halo of one row on either side, and computes 128 positions.
    copied = nbytes(first.x) * (rows + 2) // rows + nbytes(*weights) * (tiles if streams else 1) + maps
    flops = sum(c.flops for c in t.parts)
    work = Work(moved, flops, copied, flops * 128 * tiles // first.rows)
    # If the weights are streamed, each of a CTA's two consumer warp groups has a tile of its own.
    grid = math.ceil(tiles / 2) if streams else tiles
    return CudaLaunch(sm90.tail, grid, arguments, SM90_TAIL_CONFIG.options, " > ".join(map(str, t.parts)), work)


@dataclasses.dataclass(frozen=True)
class WholeBottleneck:
    """The problem of a whole bottleneck: its three convolutions.

    `middle.x` and `last.x` are placeholders for the output of the convolution before them. `first.x` is also the
    residual of `last`, or the operand of its projection.
    """

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
        """The device the block runs on: the weights', because x may still be a placeholder."""
        return self.first.weight.device

    @property
    def weights(self) -> list[Tensor]:
        """The weights (K, R, S, C) in the order that `sm90.why_not_bottleneck` and `sm90.bottleneck` expect."""
        return [c.weight for c in self.parts] + ([self.last.second[1]] if self.last.second else [])

    def map(self, function: Callable[[str, Tensor], Tensor]) -> WholeBottleneck:
        first, middle, last = (c.map(function) for c in self.parts)
        if last.second is not None:
            return WholeBottleneck(first, middle, dataclasses.replace(last, second=(first.x, last.second[1])))
        return WholeBottleneck(first, middle, dataclasses.replace(last, residual=first.x))


def why_not_bottleneck(b: WholeBottleneck, arch: int) -> str | None:
    """Return why sm90's bottleneck cannot run the block, or None."""
    first, last = b.first, b.last
    reason = _why_not_here(first.weight, arch)
    if reason:
        return reason
    geometries = [c.geometry for c in b.parts] + ([Geometry()] if last.second else [])
    shapes = [(K, C, R, S) for K, R, S, C in (t.shape for t in b.weights)]
    shortcut = "projection" if last.second else "identity"
    reason = sm90.why_not_bottleneck(shapes, geometries, shortcut, first.x.shape[3])
    if reason:
        return reason
    if not all(c.relu and c.shift is not None and c.scale is None and c.lazy is None for c in b.parts):
        return "expected ReLU, shifts, and scales multiplied into the weights"
    if not (_contiguous(first.x) and sm90.aligned(first.x)):
        return "expected a contiguous x at a multiple of 16 bytes"
    return None


def bottleneck_launch(b: WholeBottleneck, y: Tensor) -> CudaLaunch:
    """Return the bottleneck's launch, which writes y (N, 256, H, W), channels_last. Call only if `why_not_bottleneck`
    returned None."""
    x, weights = b.first.x, b.weights
    N, _, H, W = x.shape
    tiles = N * math.ceil(H / 2)
    arguments = dict(x=x, weights=weights, shifts=tuple(c.shift for c in b.parts), y=y)
    moved, flops = nbytes(x, y, *weights), sum(c.flops for c in b.parts)
    # A tile is two rows, each padded to 64 positions. x is copied a second time, as the residual.
    issued = flops * 64 * 2 * math.ceil(H / 2) // (W * H)
    work = Work(moved, flops, moved + nbytes(x), issued)
    what = " > ".join(map(str, b.parts))
    return CudaLaunch(sm90.bottleneck, tiles, arguments, SM90_BOTTLENECK_CONFIG.options, what, work)


def why_not_stem(x: Tensor, shape: tuple[int, ...], geometry: Geometry, arch: int) -> str | None:
    """Return why sm90's stem cannot run for a weight of sizes (K, C, R, S), or None."""
    return _why_not_here(x, arch) or sm90.why_not_stem(shape, geometry, x.shape[3])


def stem_launch(x: Tensor, packed: Tensor, shift: Tensor, y: Tensor) -> CudaLaunch:
    """Return the stem's launch; the arguments are those of `sm90.stem`. Call only if `why_not_stem` returned None."""
    N, _, H, W = x.shape
    flops = 2 * N * math.ceil(H / 2) * math.ceil(W / 2) * 64 * 147
    moved = nbytes(x, packed, y)
    # The products have 7 filter rows of 8 pixels of 4 channels instead of 7x7 pixels of 3. A strip of 14 pooled rows
    # computes 29 convolution rows instead of 28, and reads 64 rows of x instead of 56.
    issued = int(flops * (7 * 32) / 147 * 29 / 28)
    copied = int(nbytes(x) * 64 / 56) + nbytes(packed)
    arguments = dict(x=x, packed=packed, shift=shift, y=y)
    what = f"stem 7x7 3->64 {H}x{W}, max pool 3/2"
    return CudaLaunch(sm90.stem, N, arguments, {"num_warps": WARPS}, what, Work(moved, flops, copied, issued))
