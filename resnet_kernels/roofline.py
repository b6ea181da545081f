"""What a frozen model's launches must move and do, and how long that takes at least."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .backends import select
from .inference import freeze

if TYPE_CHECKING:
    from .backends.triton.launch import Launch, Work


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Of a GPU: device memory copied, L2 read (bytes/s), and 16-bit matrix products (operations/s)."""

    name: str
    memory: float
    l2: float
    matrix: float

    def floor(self, work: Work) -> float:
        """Seconds that the work takes at least."""
        return max(work.bytes / self.memory, work.flops / self.matrix)

    def predicted(self, work: Work) -> float:
        """Seconds we expect: the slowest of memory, L2 and what the tiles issue, and a launch's start and end."""
        return max(work.bytes / self.memory, work.copied / self.l2, work.issued / self.matrix) + LAUNCH


# Memory and matrix rate measured; L2 is what others measured on the same chip.
H200 = Ceilings("NVIDIA H200", 4.3e12, 5.5e12, 790e12)
# A graph's next kernel starts this much after the last program of the one before would have let it.
LAUNCH = 2e-6


def launches_of(model: nn.Module, x: Tensor, arch: int) -> list[Launch]:
    """What `freeze(model)(x)` would launch on a GPU of the architecture with the Triton backend. Needs no GPU: only
    the sizes and dtype of model and x matter.

    Raises BackendUnavailable where Triton is not installed.
    """
    from .backends.triton.launch import recording

    with select.use_backend("triton"), recording(arch) as launches:
        freeze(copy.deepcopy(model).to("meta"), x.dtype)(torch.empty_like(x, device="meta"))
    return launches
