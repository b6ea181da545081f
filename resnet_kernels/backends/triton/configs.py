"""Launch configurations: data per architecture, and the rules that pick one. No GPU has timed any of these yet; a
measured table overrides them.
"""

from __future__ import annotations

import dataclasses
import math

# Bytes of shared memory a program may use.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

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

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def shared_memory(arch: int) -> int:
    """Of the architecture, or of the nearest older one that is known."""
    return SHARED_MEMORY[max((a for a in SHARED_MEMORY if a <= arch), default=80)]


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


def _stages(arch: int, stage_bytes: int, other_bytes: int, most: int) -> int:
    """As many as fit beside the epilogue."""
    return max(1, min(most, (shared_memory(arch) - other_bytes) // stage_bytes))


def _tile(M: int, K: int, group: int, itemsize: int, processors: int) -> tuple[int, int]:
    """BLOCK_M, BLOCK_N: large tiles read less again, small ones fill the GPU. Groups consist of whole tiles."""
    # fp32 accumulates by FMA unless tf32 is allowed: smaller tiles spare registers.
    wide = 128 if itemsize == 2 else 64
    BLOCK_N = min(wide, max(16, power_of_two(K)) if group == K else group & -group)
    BLOCK_M = 128
    while BLOCK_M > 64 and -(-M // BLOCK_M) * -(-K // BLOCK_N) < processors:
        BLOCK_M //= 2
    while BLOCK_N > 32 and -(-M // BLOCK_M) * -(-K // BLOCK_N) < processors:
        BLOCK_N //= 2
    return BLOCK_M, BLOCK_N


def for_boxes(arch: int, itemsize: int, M: int, K: int, C: int, taps: int, group: int, processors: int) -> Config:
    """A convolution by boxes over M positions, to K channels (`group` of them per group) from C per group."""
    BLOCK_M, BLOCK_N = _tile(M, K, group, itemsize, processors)
    BLOCK_K = min(128 // itemsize, max(32 // itemsize, power_of_two(C)))
    if taps == 1 and C <= BLOCK_K:
        # One step: nothing to pipeline, several programs on a multiprocessor overlap instead.
        return Config(BLOCK_M, BLOCK_N, BLOCK_K, 4, 1)
    stage = (BLOCK_M + BLOCK_N) * BLOCK_K * itemsize
    num_warps = 8 if BLOCK_M * BLOCK_N >= 128 * 128 else 4
    # Two programs on a multiprocessor: one multiplies while the other stores.
    half = shared_memory(arch) // 2 - 2048 - BLOCK_M * BLOCK_N * itemsize
    stages = max(2, min(4, half // stage))
    stages = min(stages, _stages(arch, stage, BLOCK_M * BLOCK_N * itemsize + 2048, 4))
    return Config(BLOCK_M, BLOCK_N, BLOCK_K, num_warps, stages)


def for_gather(arch: int, itemsize: int, M: int, K: int, C: int, taps: int, group: int, processors: int) -> Config:
    """The same by pointers."""
    BLOCK_M, BLOCK_N = _tile(M, K, group, itemsize, processors)
    BLOCK_K = min(64 if itemsize == 2 else 32, max(16, power_of_two(C)))
    num_warps = 8 if BLOCK_M * BLOCK_N >= 128 * 128 else 4
    stages = _stages(arch, (BLOCK_M + BLOCK_N) * BLOCK_K * itemsize, 2048, 3)
    return Config(BLOCK_M, BLOCK_N, BLOCK_K, num_warps, stages, cache=".ca" if taps > 1 else "")


def for_tail(arch: int, itemsize: int, M: int, J: int, processors: int) -> Config:
    """The 3x3 and the 1x1 behind it; BLOCK_N of the 1x1."""
    BLOCK_M = 128 if -(-M // 128) >= processors else 64
    stage = (BLOCK_M + J) * 128
    return Config(BLOCK_M, 64, 128 // itemsize, 8 if BLOCK_M * J >= 128 * 64 else 4, 3 if stage <= 32 << 10 else 2)
