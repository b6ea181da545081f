"""What a frozen model's launches must move and do, and how long that takes at least."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .backends import select
from .inference import FrozenTrunk, freeze

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


def launches_of(module: nn.Module, x: Tensor, arch: int | None = None) -> list[Launch]:
    """What `freeze(module)(x)`, or a frozen trunk, launches with the Triton backend on a GPU of the architecture (90 is
    sm_90), before anything was measured; or, if None, on x's device, with what was measured there. Needs no GPU: only
    the sizes and dtype of module and x matter.

    Raises BackendUnavailable where Triton is not installed.
    """
    from .backends.triton.launch import arch_of, recording

    image = torch.empty_like(x, device="meta")
    with select.use_backend("triton"), recording(arch or arch_of(x.device), None if arch else x.device) as launches:
        if isinstance(module, FrozenTrunk):
            on_meta(module)(image)
        else:
            # The memo says what stands for a tensor in a copy: no memory is taken for weights.
            tensors = [*module.parameters(), *module.buffers()]
            imagined = copy.deepcopy(module, {id(t): t.detach().to("meta") for t in tensors})
            freeze(imagined.eval(), x.dtype)(image)
    return launches


def on_meta(trunk: FrozenTrunk) -> FrozenTrunk:
    """The trunk without its numbers, by whatever backend is named."""

    def imagined(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(t.to("meta") for t in tensors)

    steps = [
        dataclasses.replace(
            step,
            call=dataclasses.replace(step.call, device=torch.device("meta")),
            named=select.named(),
            weights=imagined(step.weights),
            scales=imagined(step.scales),
            shifts=imagined(step.shifts),
        )
        for step in trunk.steps
    ]
    return FrozenTrunk(steps, trunk.dtype, graphs=False)
