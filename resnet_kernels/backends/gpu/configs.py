"""Launch configurations: data per architecture, and the heuristics that pick one.

The heuristics for sm_90 follow measurements on an H200 of ResNet-50 at batch 256 (docs/triton.md). No GPU has timed the
ones for other architectures. A measured table overrides a heuristic for the problems and the device it was measured on.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

# Bytes of shared memory that the system reserves for each CTA, and bytes that one CTA may use, by architecture.
RESERVED_SHARED = 1024
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

# Architectures whose tensor cores read operands from shared memory. On the others, operands take registers. With the
# tensor copy engine that leaves so many instructions and barriers that ptxas spills (sm_120, Triton 3.6): they gather.
OPERANDS_IN_SHARED = (90, 100)

# The least share of a tile's rows that must be output positions. Below it, the gathering kernel runs instead of boxes.
LEAST_FILLED = 0.8


@dataclasses.dataclass(frozen=True)
class Config:
    """A tile of BLOCK_M output positions by BLOCK_N output channels, accumulated over slices of BLOCK_K.

    persistent: the grid has as many CTAs as the GPU has multiprocessors, and each CTA takes tiles in turn.
    cache: cache modifier for loads of the gathered operand (".ca" caches them in L1).
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    persistent: bool = False
    cache: str = ""

    def steps(self, taps: int, channels: int) -> int:
        """Return the mainloop steps over the K extent of the implicit GEMM: taps x input channels."""
        return taps * -(-channels // self.BLOCK_K)

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def parse(fields: Any) -> Config:
    """Return the configuration in a table's row. Raises ValueError if the fields or their types are not Config's."""
    kinds = {
        f.name: type(f.default) if f.default is not dataclasses.MISSING else int for f in dataclasses.fields(Config)
    }
    if not isinstance(fields, dict) or {n: type(v) for n, v in fields.items()} != kinds:
        raise ValueError(f"expected a configuration of {', '.join(kinds)}, got {fields!r}")
    return Config(**fields)


def nearest_arch(arch: int) -> int:
    """Return the architecture whose configurations `arch` uses: itself, or the nearest older one listed here."""
    return max((a for a in SHARED_MEMORY if a <= arch), default=min(SHARED_MEMORY))


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def box_shape(N: int, P: int, Q: int, rows: int) -> tuple[int, int, int]:
    """Return the shape (images, rows, columns; powers of two) of the boxes of `rows` output positions that cover
    N x P x Q with the fewest boxes. Among equals, prefer the shape with the longest contiguous runs in memory."""
    sizes = [2**i for i in range(rows.bit_length())]
    shapes = [(rows // (h * w), h, w) for h in sizes for w in sizes if h * w <= rows]
    # The tensor copy engine limits each side of a box to 256 elements.
    shapes = [s for s in shapes if max(s) <= 256]
    return min(shapes, key=lambda s: (-(-N // s[0]) * -(-P // s[1]) * -(-Q // s[2]), -s[2], -s[1]))


def filled_share(N: int, P: int, Q: int, shape: tuple[int, int, int]) -> float:
    """Return the share of the boxes' rows that are output positions; the other rows are padding."""
    boxes = math.prod(-(-n // s) for n, s in zip((N, P, Q), shape, strict=True))
    return N * P * Q / (boxes * math.prod(shape))


# fp32 that must not be rounded to tf32 is multiplied by FMA, with all operands in registers.
FMA_CONFIG = Config(64, 64, 16, 8, 2)


@dataclasses.dataclass(frozen=True)
class ProblemSize:
    """The size of a convolution and of the GPU that runs it: the input of the heuristics below.

    M: output positions. K: output channels, in groups of `group`. C: input channels per group. taps: filter positions.
    itemsize: bytes per element. fma: whether the products run by FMA instead of tensor cores. residual: whether the
    epilogue adds one. processors: multiprocessors of the GPU.
    """

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


# Mainloop steps of 64 from which a 128 x 256 tile pays off. Such a tile copies 1.3 times less from L2, but it occupies
# a multiprocessor alone, so no other CTA hides its prologue and epilogue.
WIDE_TILE_STEPS = 16


def _wide(s: ProblemSize) -> bool:
    """Whether a tile of 128 x 256 x 64 pays off."""
    fits = s.itemsize == 2 and s.arch in OPERANDS_IN_SHARED and not s.residual and s.group % 256 == 0
    return fits and s.taps * s.C >= WIDE_TILE_STEPS * 64 and s.tiles(128, 256) >= s.processors


def _tile(s: ProblemSize) -> tuple[int, int]:
    """Return (BLOCK_M, BLOCK_N): large tiles reread less, small ones fill the GPU. Groups consist of whole tiles."""
    BLOCK_M, BLOCK_N = (FMA_CONFIG.BLOCK_M, FMA_CONFIG.BLOCK_N) if s.fma else (128, 128)
    if s.itemsize > 2 or s.arch == 120:
        BLOCK_N = min(BLOCK_N, 64)
    BLOCK_N = min(BLOCK_N, max(16, power_of_two(s.K)) if s.group == s.K else s.group & -s.group)
    while BLOCK_M > 64 and s.tiles(BLOCK_M, BLOCK_N) < s.processors:
        BLOCK_M //= 2
    while BLOCK_N > 32 and s.tiles(BLOCK_M, BLOCK_N) < s.processors:
        BLOCK_N //= 2
    return BLOCK_M, BLOCK_N


def _warps(s: ProblemSize, BLOCK_M: int, BLOCK_N: int) -> int:
    many = BLOCK_M * BLOCK_N >= (128 * 128 if s.arch in OPERANDS_IN_SHARED else 128 * 64)
    return 8 if many or s.fma else 4


def for_boxes(s: ProblemSize) -> Config:
    """Return the configuration of a convolution by boxes (boxes.py)."""
    measured = s.arch == 90 and s.itemsize == 2
    if measured and s.taps > 1 and s.group % 128 == 0 and not s.residual and s.tiles(256, 128) >= s.processors:
        # The nine taps of a 3x3 read x's tile nine times, but each weight once: more rows reuse the weights.
        return Config(256, 128, 64, 8, 3)
    BLOCK_M, BLOCK_N = (128, 256) if _wide(s) else _tile(s)
    most = FMA_CONFIG.BLOCK_K if s.fma else 128 // s.itemsize
    BLOCK_K = min(most, max(16, power_of_two(s.C)))
    if s.taps == 1 and s.C <= BLOCK_K:
        # One step: there is nothing to pipeline, so several CTAs on a multiprocessor overlap instead.
        warps = 4 if measured else _warps(s, BLOCK_M, BLOCK_N)
        rows = BLOCK_M // 2 if measured and s.residual and BLOCK_M == BLOCK_N == 128 else BLOCK_M
        return Config(rows, BLOCK_N, BLOCK_K, warps, 1)
    stage, result = (BLOCK_M + BLOCK_N) * BLOCK_K * s.itemsize, BLOCK_M * BLOCK_N * s.itemsize
    # Two CTAs on a multiprocessor: one multiplies while the other stores.
    programs = 1 if BLOCK_N == 256 else 2
    stages = max(2, min(4, (SHARED_MEMORY[s.arch] // programs - RESERVED_SHARED - result) // stage))
    return Config(BLOCK_M, BLOCK_N, BLOCK_K, _warps(s, BLOCK_M, BLOCK_N), stages)


def for_gather(s: ProblemSize) -> Config:
    """Return the configuration of a convolution that gathers its rows by pointers (gather.py)."""
    BLOCK_M, BLOCK_N = _tile(s)
    # Where operands take registers, the addresses of the asynchronous copies take registers too: a narrower slice.
    most = FMA_CONFIG.BLOCK_K if s.fma else 64 if s.itemsize == 2 and s.arch in OPERANDS_IN_SHARED else 32
    BLOCK_K = min(most, max(16, power_of_two(s.C)))
    num_warps = _warps(s, BLOCK_M, BLOCK_N)
    if s.C * s.itemsize % 16:
        # Rows too narrow for asynchronous copies: loaded values wait in registers.
        BLOCK_N, BLOCK_K, num_warps = min(BLOCK_N, 64), min(BLOCK_K, 32), 8
    stage = (BLOCK_M + BLOCK_N) * BLOCK_K * s.itemsize
    stages = max(2, min(4, (SHARED_MEMORY[s.arch] // 2 - RESERVED_SHARED) // stage))
    return Config(BLOCK_M, BLOCK_N, BLOCK_K, num_warps, stages, cache=".ca" if s.taps > 1 else "")


# fp32 accumulators per thread; with more, ptxas spills.
MAX_ACCUMULATORS = 128


def _tilings(s: ProblemSize, ms: tuple[int, ...], ns: tuple[int, ...], k: int) -> Iterator[Config]:
    """Yield tiles, warps and stages that fit shared memory and registers. Groups consist of whole tiles, and no tile is
    mostly padding."""
    if s.group < s.K:
        ns = tuple(n for n in ns if s.group % n == 0)
    else:
        ns = tuple(n for n in ns if n <= max(16, power_of_two(s.K)))
    most = FMA_CONFIG.num_warps * 32 * 16 if s.fma else MAX_ACCUMULATORS * 32 * 8
    for m, n, warps, stages in itertools.product(ms, ns, (4, 8), (2, 3, 4)):
        accumulators = m * n / (warps * 32)
        buffers = stages * (m + n) * k * s.itemsize + m * n * s.itemsize
        small = m > 64 and s.M <= m // 2
        if m * n <= most and 4 <= accumulators <= MAX_ACCUMULATORS and buffers <= SHARED_MEMORY[s.arch] and not small:
            yield Config(m, n, k, warps, stages)


def box_configs(s: ProblemSize) -> Iterator[Config]:
    """Yield configurations to be measured beside `for_boxes`."""
    k = for_boxes(s).BLOCK_K
    for config in _tilings(s, (64, 128, 256), (32, 64, 128, 256), k):
        if s.taps * s.C > k:
            yield config
            if s.tiles(config.BLOCK_M, config.BLOCK_N) > s.processors:
                yield dataclasses.replace(config, persistent=True)
        elif config.num_stages == 2:
            # One step: nothing to pipeline.
            yield dataclasses.replace(config, num_stages=1)


def gather_configs(s: ProblemSize) -> Iterator[Config]:
    """Yield configurations to be measured beside `for_gather`."""
    default = for_gather(s)
    for config in _tilings(s, (64, 128), (32, 64, 128), default.BLOCK_K):
        yield dataclasses.replace(config, cache=default.cache)


def tail_configs(arch: int, itemsize: int, J: int) -> Iterator[Config]:
    """Yield configurations to be measured beside `for_tail`. J: output channels of the 3x3."""
    for m, warps, stages in itertools.product((64, 128), (4, 8), (2, 3, 4)):
        buffers = stages * (m + J) * 128
        if m * J / (warps * 32) <= MAX_ACCUMULATORS and buffers <= SHARED_MEMORY[arch]:
            yield Config(m, 64, 128 // itemsize, warps, stages)


def for_tail(arch: int, itemsize: int, M: int, J: int, processors: int) -> Config:
    """Return the configuration of a fused tail (tail.py): M output positions, J output channels of the 3x3. BLOCK_N
    tiles the output channels of the 1x1 after it; the 3x3's J channels are one tile."""
    if arch == 90:
        # Small tiles, several CTAs on a multiprocessor: within one CTA each product waits for the one before.
        return Config(64, 64, 128 // itemsize, 4, 3 if J == 64 else 4)
    BLOCK_M = 128 if -(-M // 128) >= processors else 64
    stage = (BLOCK_M + J) * 128
    return Config(BLOCK_M, 64, 128 // itemsize, 8 if BLOCK_M * J >= 128 * 64 else 4, 3 if stage <= 32 << 10 else 2)


@dataclasses.dataclass(frozen=True)
class StemConfig:
    """The configuration of the stem (conv_pool.py).

    rows: pooled rows that a CTA stores; it computes one more. BLOCK_Q: pooled columns that a CTA computes; it stores
    one less. taps: filter rows that one product covers.
    """

    rows: int
    BLOCK_Q: int
    taps: int
    num_warps: int
    num_stages: int


def for_conv_pool(arch: int, itemsize: int, images: int, pooled_rows: int, processors: int) -> StemConfig:
    """Return the configuration of the stem for a batch of `images` whose pooled maps have `pooled_rows` rows."""
    rows = next((r for r in (14, 8, 4, 2) if images * -(-pooled_rows // r) >= processors), 1)
    # wgmma and tcgen05 want 64 rows. Elsewhere the operands are in registers, too many for four accumulators of 64.
    BLOCK_Q = 64 if arch in OPERANDS_IN_SHARED else 32
    # Several filter rows per product took twice as long (H200): Triton does not copy them asynchronously. `taps` is 1
    # everywhere; it stays as long as the shipped table holds measurements of the kernel that has it.
    return StemConfig(rows, BLOCK_Q, 1, 4 if arch == 90 and itemsize == 2 else 8, 2)
