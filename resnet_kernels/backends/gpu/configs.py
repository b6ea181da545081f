"""Launch configurations: data per architecture, and the rules that pick one. Those of sm_90 follow what was measured on
an H200 for ResNet-50 at batch 256 (docs/triton.md); the others no GPU has timed. A measured table overrides them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

# Bytes of shared memory a program may use, beside those that the system keeps of it for each.
RESERVED = 1024
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

# Whose tensor cores read operands from shared memory. The others' operands take registers, and so many instructions
# and barriers that ptxas spills with the tensor copy engine (sm_120, Triton 3.6): they gather.
OPERANDS_IN_SHARED = (90, 100)

# The share of a tile's rows that must be output positions, else rows are gathered.
LEAST_FILLED = 0.8


@dataclasses.dataclass(frozen=True)
class Config:
    """A tile of BLOCK_M positions by BLOCK_N channels, summed BLOCK_K at a time.

    persistent: programs as many as fit the GPU, each taking tiles in turn. cache: of the gathered operand (".ca": L1).
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    persistent: bool = False
    cache: str = ""

    def steps(self, taps: int, channels: int) -> int:
        """Of the sum over taps and input channels."""
        return taps * -(-channels // self.BLOCK_K)

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def parse(fields: Any) -> Config:
    """From a table's row. Raises ValueError where it is no configuration."""
    kinds = {
        f.name: type(f.default) if f.default is not dataclasses.MISSING else int for f in dataclasses.fields(Config)
    }
    if not isinstance(fields, dict) or {n: type(v) for n, v in fields.items()} != kinds:
        raise ValueError(f"expected a configuration of {', '.join(kinds)}, got {fields!r}")
    return Config(**fields)


def known(arch: int) -> int:
    """The architecture whose configurations one takes: its own, or the nearest older one's."""
    return max((a for a in SHARED_MEMORY if a <= arch), default=min(SHARED_MEMORY))


def power_of_two(n: int) -> int:
    """The least that is not smaller."""
    return 1 << (n - 1).bit_length()


def box(N: int, P: int, Q: int, rows: int) -> tuple[int, int, int]:
    """The box of `rows` output positions (images, rows, columns; powers of two) that covers N x P x Q with the fewest,
    and of those the one that lies most together in memory."""
    sizes = [2**i for i in range(rows.bit_length())]
    shapes = [(rows // (h * w), h, w) for h in sizes for w in sizes if h * w <= rows]
    # A side of a box is at most 256 elements.
    shapes = [s for s in shapes if max(s) <= 256]
    return min(shapes, key=lambda s: (-(-N // s[0]) * -(-P // s[1]) * -(-Q // s[2]), -s[2], -s[1]))


def filled(N: int, P: int, Q: int, shape: tuple[int, int, int]) -> float:
    """The share of the boxes' rows that are output positions."""
    boxes = math.prod(-(-n // s) for n, s in zip((N, P, Q), shape, strict=True))
    return N * P * Q / (boxes * math.prod(shape))


# fp32 that may not be rounded to tf32 is multiplied by FMA, all operands in registers.
BY_FMA = Config(64, 64, 16, 8, 2)


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a convolution: M positions, C channels per group at `taps` taps, K channels in groups of `group`; operands of
    `itemsize` bytes, multiplied by FMA if `fma`; whether a residual is added; on a GPU of an architecture with so many
    multiprocessors."""

    M: int
    K: int
    C: int
    taps: int
    group: int
    itemsize: int
    fma: bool
    residual: bool
    arch: int
    processors: int

    def tiles(self, BLOCK_M: int, BLOCK_N: int) -> int:
        return -(-self.M // BLOCK_M) * -(-self.K // BLOCK_N)


# Steps of a sum from which a tile of 128 by 256 pays: it copies 1.3 times less from L2, and has a multiprocessor for
# itself, so that its start and its end are not hidden.
LONG = 16


def _wide(s: Size) -> bool:
    """Whether a tile of 128 by 256 by 64 pays."""
    fits = s.itemsize == 2 and s.arch in OPERANDS_IN_SHARED and not s.residual and s.group % 256 == 0
    return fits and s.taps * s.C >= LONG * 64 and s.tiles(128, 256) >= s.processors


def _tile(s: Size) -> tuple[int, int]:
    """BLOCK_M, BLOCK_N: large tiles read less again, small ones fill the GPU. Groups consist of whole tiles."""
    BLOCK_M, BLOCK_N = (BY_FMA.BLOCK_M, BY_FMA.BLOCK_N) if s.fma else (128, 128)
    if s.itemsize > 2 or s.arch == 120:
        BLOCK_N = min(BLOCK_N, 64)
    BLOCK_N = min(BLOCK_N, max(16, power_of_two(s.K)) if s.group == s.K else s.group & -s.group)
    while BLOCK_M > 64 and s.tiles(BLOCK_M, BLOCK_N) < s.processors:
        BLOCK_M //= 2
    while BLOCK_N > 32 and s.tiles(BLOCK_M, BLOCK_N) < s.processors:
        BLOCK_N //= 2
    return BLOCK_M, BLOCK_N


def _warps(s: Size, BLOCK_M: int, BLOCK_N: int) -> int:
    many = BLOCK_M * BLOCK_N >= (128 * 128 if s.arch in OPERANDS_IN_SHARED else 128 * 64)
    return 8 if many or s.fma else 4


def for_boxes(s: Size) -> Config:
    measured = s.arch == 90 and s.itemsize == 2
    if measured and s.taps > 1 and s.group % 128 == 0 and not s.residual and s.tiles(256, 128) >= s.processors:
        # Taps read x's tile nine times, the weights' once.
        return Config(256, 128, 64, 8, 3)
    BLOCK_M, BLOCK_N = (128, 256) if _wide(s) else _tile(s)
    most = BY_FMA.BLOCK_K if s.fma else 128 // s.itemsize
    BLOCK_K = min(most, max(16, power_of_two(s.C)))
    if s.taps == 1 and s.C <= BLOCK_K:
        # One step: nothing to pipeline, several programs on a multiprocessor overlap instead.
        warps = 4 if measured else _warps(s, BLOCK_M, BLOCK_N)
        rows = BLOCK_M // 2 if measured and s.residual and BLOCK_M == BLOCK_N == 128 else BLOCK_M
        return Config(rows, BLOCK_N, BLOCK_K, warps, 1)
    stage, result = (BLOCK_M + BLOCK_N) * BLOCK_K * s.itemsize, BLOCK_M * BLOCK_N * s.itemsize
    # Two programs on a multiprocessor: one multiplies while the other stores.
    programs = 1 if BLOCK_N == 256 else 2
    stages = max(2, min(4, (SHARED_MEMORY[s.arch] // programs - RESERVED - result) // stage))
    return Config(BLOCK_M, BLOCK_N, BLOCK_K, _warps(s, BLOCK_M, BLOCK_N), stages)


def for_gather(s: Size) -> Config:
    BLOCK_M, BLOCK_N = _tile(s)
    # Where operands take registers, so do the addresses of what is copied.
    most = BY_FMA.BLOCK_K if s.fma else 64 if s.itemsize == 2 and s.arch in OPERANDS_IN_SHARED else 32
    BLOCK_K = min(most, max(16, power_of_two(s.C)))
    num_warps = _warps(s, BLOCK_M, BLOCK_N)
    if s.C * s.itemsize % 16:
        # Too narrow for asynchronous copies: what is loaded waits in registers.
        BLOCK_N, BLOCK_K, num_warps = min(BLOCK_N, 64), min(BLOCK_K, 32), 8
    stage = (BLOCK_M + BLOCK_N) * BLOCK_K * s.itemsize
    stages = max(2, min(4, (SHARED_MEMORY[s.arch] // 2 - RESERVED) // stage))
    return Config(BLOCK_M, BLOCK_N, BLOCK_K, num_warps, stages, cache=".ca" if s.taps > 1 else "")


# Of fp32 accumulators a thread; with more ptxas spills.
MOST_ACCUMULATORS = 128


def _tilings(s: Size, ms: tuple[int, ...], ns: tuple[int, ...], k: int) -> Iterator[Config]:
    """Tiles, warps and stages that fit shared memory and registers, whole tiles to a group, none mostly padding."""
    if s.group < s.K:
        ns = tuple(n for n in ns if s.group % n == 0)
    else:
        ns = tuple(n for n in ns if n <= max(16, power_of_two(s.K)))
    most = BY_FMA.num_warps * 32 * 16 if s.fma else MOST_ACCUMULATORS * 32 * 8
    for m, n, warps, stages in itertools.product(ms, ns, (4, 8), (2, 3, 4)):
        accumulators = m * n / (warps * 32)
        buffers = stages * (m + n) * k * s.itemsize + m * n * s.itemsize
        small = m > 64 and s.M <= m // 2
        if m * n <= most and 4 <= accumulators <= MOST_ACCUMULATORS and buffers <= SHARED_MEMORY[s.arch] and not small:
            yield Config(m, n, k, warps, stages)


def box_candidates(s: Size) -> Iterator[Config]:
    """To be measured beside `for_boxes`."""
    k = for_boxes(s).BLOCK_K
    for config in _tilings(s, (64, 128, 256), (32, 64, 128, 256), k):
        if s.taps * s.C > k:
            yield config
            if s.tiles(config.BLOCK_M, config.BLOCK_N) > s.processors:
                yield dataclasses.replace(config, persistent=True)
        elif config.num_stages == 2:
            # One step: nothing to pipeline.
            yield dataclasses.replace(config, num_stages=1)


def gather_candidates(s: Size) -> Iterator[Config]:
    """To be measured beside `for_gather`."""
    chosen = for_gather(s)
    for config in _tilings(s, (64, 128), (32, 64, 128), chosen.BLOCK_K):
        yield dataclasses.replace(config, cache=chosen.cache)


def tail_candidates(arch: int, itemsize: int, J: int) -> Iterator[Config]:
    """To be measured beside `for_tail`."""
    for m, warps, stages in itertools.product((64, 128), (4, 8), (2, 3, 4)):
        buffers = stages * (m + J) * 128
        if m * J / (warps * 32) <= MOST_ACCUMULATORS and buffers <= SHARED_MEMORY[arch]:
            yield Config(m, 64, 128 // itemsize, warps, stages)


def for_tail(arch: int, itemsize: int, M: int, J: int, processors: int) -> Config:
    """The 3x3 and the 1x1 behind it; BLOCK_N of the 1x1."""
    if arch == 90:
        # Several programs on a multiprocessor: in each the products wait for each other.
        return Config(64, 64, 128 // itemsize, 4, 3 if J == 64 else 4)
    BLOCK_M = 128 if -(-M // 128) >= processors else 64
    stage = (BLOCK_M + J) * 128
    return Config(BLOCK_M, 64, 128 // itemsize, 8 if BLOCK_M * J >= 128 * 64 else 4, 3 if stage <= 32 << 10 else 2)


@dataclasses.dataclass(frozen=True)
class Stem:
    """rows: pooled rows that a program stores, one less than it computes. taps: rows of the filter at a time."""

    rows: int
    BLOCK_Q: int
    taps: int
    num_warps: int
    num_stages: int


def for_conv_pool(arch: int, itemsize: int, images: int, pooled_rows: int, processors: int) -> Stem:
    rows = next((r for r in (14, 8, 4, 2) if images * -(-pooled_rows // r) >= processors), 1)
    # wgmma and tcgen05 want 64 rows. Elsewhere the operands are in registers, too many for four sums of 64.
    BLOCK_Q = 64 if arch in OPERANDS_IN_SHARED else 32
    # Several rows of the filter at a time took twice as long (H200): Triton does not copy them asynchronously. `taps`
    # is 1 everywhere; it stays as long as the shipped table is of a kernel that has it.
    return Stem(rows, BLOCK_Q, 1, 4 if arch == 90 and itemsize == 2 else 8, 2)
