"""The launches of a frozen model or of a training step, recorded without a GPU, and the least time they can take."""

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
from ..ops.chain_backward import Backward
from ..ops.chain_training import Forward
from . import traffic

if TYPE_CHECKING:
    from ..backends.gpu.launch import Launch, Work


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The rates that bound a GPU's kernels.

    memory: bytes/s of a copy in device memory. l2: bytes/s read from the L2 cache. matrix: operations/s of 16-bit
    matrix products.
    """

    name: str
    memory: float
    l2: float
    matrix: float

    def floor(self, work: Work) -> float:
        """Return the least seconds that the work takes: by device memory or by arithmetic, whichever takes longer."""
        return max(work.bytes / self.memory, work.flops / self.matrix)

    def predicted(self, work: Work) -> float:
        """Return the seconds that one launch is expected to take.

        This is the longest of device memory traffic, L2 reads and issued operations (tile padding included), plus the
        launch's start and end.
        """
        return max(work.bytes / self.memory, work.copied / self.l2, work.issued / self.matrix) + LAUNCH


# The memory and matrix rates were measured with this package. The L2 rate was measured by others on the same chip.
H200 = Ceilings("NVIDIA H200", 4.3e12, 5.5e12, 790e12)
# Seconds from the end of a kernel's last program instance to the start of the next kernel of a CUDA graph.
LAUNCH = 2e-6


def launches_of(module: nn.Module, x: Tensor, arch: int | None = None) -> list[Launch]:
    """Return the launches of the GPU backend in `freeze(module)(x)`, or in a frozen trunk.

    Args:
        module: a model or block to freeze, or a FrozenTrunk. Only its structure, sizes and dtype matter.
        x: the input. Only its sizes and dtype matter, and its device if arch is None.
        arch: the GPU architecture, 90 for sm_90; no GPU is needed, and no tuning table is read. None: the architecture
            of x's device, with the tuning tables of that device.
    Raises:
        BackendUnavailable: Triton is not installed.
    """
    from ..backends.gpu.launch import arch_of, recording

    image = torch.empty_like(x, device="meta")
    with select.use_backend("gpu"), recording(arch or arch_of(x.device), None if arch else x.device) as launches:
        if isinstance(module, FrozenTrunk):
            on_meta(module)(image)
        else:
            freeze(_copy_on_meta(module).eval(), x.dtype)(image)
    return launches


def training_launches_of(module: nn.Module, x: Tensor, arch: int | None = None) -> list[Launch]:
    """Return the launches of the GPU backend in one training step.

    The launches are the forward and then the backward of the stem and of each block, with every gradient but that of
    the images. Convolutions that torch's library computes are among them, named "library"; so is a ResNet's head, which
    stays torch's modules.

    Not counted: torch's conversions of weights and their gradients between dtypes and layouts; loss and optimizer.

    Args:
        module: a torchvision ResNet, whose blocks are counted as replaced ones, or one BasicBlock or Bottleneck.
        x, arch: as for `launches_of`.
    Raises:
        BackendUnavailable: Triton is not installed.
        TypeError, ValueError: another module, or sizes that do not fit.
    """
    from ..backends.gpu.launch import Library, Work, arch_of, recording

    model = _copy_on_meta(module).train()
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
    """Run the forward and backward of a block or stem, as the differentiable ops do."""
    weights = [conv.weight for conv in p.convs]
    vectors, plan = arguments(x, weights, [norm_of(bn) for bn in p.norms], p.spec)
    gammas, betas, means, variances = vectors
    backend, every = select.BY_NAME[plan.backend], [True] * len(weights)
    saved = Forward(backend, x, weights, gammas, betas, means, variances, plan).run()
    Backward(backend, x, weights, saved, plan, need_x, every, every).run(torch.empty_like(saved.y))


def _copy_on_meta(module: nn.Module) -> nn.Module:
    """Return a copy of the module whose tensors are on the meta device, and so take no memory."""
    # deepcopy takes an object's copy from the memo if it is there: here each tensor's copy is its meta tensor.
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(t): t.detach().to("meta") for t in tensors})


def on_meta(trunk: FrozenTrunk) -> FrozenTrunk:
    """Return a copy of the trunk on the meta device. It runs by the backend that `use_backend` names at this call."""

    def to_meta(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(t.to("meta") for t in tensors)

    steps = [
        dataclasses.replace(
            step,
            call=dataclasses.replace(step.call, device=torch.device("meta")),
            named=select.named(),
            weights=to_meta(step.weights),
            scales=to_meta(step.scales),
            shifts=to_meta(step.shifts),
        )
        for step in trunk.steps
    ]
    return FrozenTrunk(steps, trunk.dtype, graphs=False)
