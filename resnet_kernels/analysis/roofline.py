"""What the launches of a frozen model, or of a training step, must move and do, and how long that takes at least."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from ..backends import select
from ..inference import FrozenTrunk, freeze
from ..nn import fusable
from ..ops.batch_norm import norm_of
from ..ops.block_training import arguments
from ..ops.chain_training import Backward, Forward
from . import traffic

if TYPE_CHECKING:
    from ..backends.gpu.launch import Launch, Work


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
    from ..backends.gpu.launch import arch_of, recording

    image = torch.empty_like(x, device="meta")
    with select.use_backend("gpu"), recording(arch or arch_of(x.device), None if arch else x.device) as launches:
        if isinstance(module, FrozenTrunk):
            on_meta(module)(image)
        else:
            freeze(_imagined(module).eval(), x.dtype)(image)
    return launches


def training_launches_of(module: nn.Module, x: Tensor, arch: int | None = None) -> list[Launch]:
    """What a training step of a torchvision ResNet whose blocks are replaced, or of one BasicBlock or Bottleneck,
    launches with the Triton backend: of the stem and of each block its forward and its backward, every gradient wanted
    but the image's. The convolutions that torch's library computes, and a ResNet's head, which stays torch's modules,
    are among the launches, named "library". Arguments, and where it is None what arch means, as of `launches_of`.

    Not counted: torch's conversions of weights and their gradients between dtypes and layouts; loss and optimizer.

    Raises BackendUnavailable where Triton is not installed; TypeError, ValueError for other modules or sizes that do
    not fit.
    """
    from ..backends.gpu.launch import Library, Work, arch_of, recording

    model = _imagined(module).train()
    sizes = traffic.block_sizes(model, x.shape)
    with select.use_backend("gpu"), recording(arch or arch_of(x.device), None if arch else x.device) as launches:
        if isinstance(model, resnet.ResNet):
            stem = fusable.stem(model)
            if isinstance(stem, str):
                raise ValueError(stem)
            _train(stem, torch.empty_like(x, device="meta", memory_format=torch.channels_last), need_x=False)
        for name, size in sizes.items():
            image = torch.empty(size, dtype=x.dtype, device="meta", memory_format=torch.channels_last)
            p = fusable.parts(model.get_submodule(name))
            if isinstance(p, str):
                raise ValueError(p)
            _train(p, image)
    if not isinstance(model, resnet.ResNet):
        return launches
    head = traffic.kernels(model, x.shape, x.element_size(), "eager")["head"]
    return [*launches, *(Library(None, 0, {}, {}, f"head, {k.what}", Work(*k.need, *k.need)) for k in head)]


@torch.no_grad()
def _train(p: fusable.Parts, x: Tensor, need_x: bool = True) -> None:
    """Forward and backward of a block or stem, as the ops run them."""
    weights = [conv.weight for conv in p.convs]
    geometries = [fusable.geometry(conv) for conv in p.convs]
    strides, dilations, groups = ([getattr(g, n) for g in geometries] for n in ("stride", "dilation", "groups"))
    norms = [norm_of(bn) for bn in p.norms]
    vectors, plan = arguments(x, weights, norms, strides, dilations, groups, p.shortcut, True, pool=p.pool)
    gammas, betas, means, variances = vectors
    backend, every = select.BY_NAME[plan.backend], [True] * len(weights)
    kept = Forward(backend, x, weights, gammas, betas, means, variances, plan).run()
    Backward(backend, x, weights, kept, plan, need_x, every, every).run(torch.empty_like(kept.y))


def _imagined(module: nn.Module) -> nn.Module:
    """A copy without memory."""
    # The memo says what stands for a tensor in a copy.
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(t): t.detach().to("meta") for t in tensors})


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
