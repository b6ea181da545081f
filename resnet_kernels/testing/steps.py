"""One training step of a block: by eager PyTorch, fused, and in fp64 under the ReLU masks of either.

All three return {name: tensor}: "y" is the result, "x" the gradient of the input, a parameter's name its gradient, and
a buffer's name its value after the step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.contract import BackendUnavailable
from ..backends.select import use_backend
from ..nn.fusable import why_plain
from ..ops.chain_training import Saved
from ..ops.spec import TrainingPlan
from ..replace import replace_blocks


class RecordedReLU(nn.Module):
    """A ReLU that records the mask of every call: True where it passes its input, NaN included."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor] = []

    def forward(self, z: Tensor) -> Tensor:
        self.masks.append(~(z <= 0))
        return torch.relu(z)


class GivenReLU(nn.Module):
    """A ReLU with given masks, one per call: the input where the mask is True, else zero."""

    def __init__(self, masks: Iterable[Tensor]) -> None:
        super().__init__()
        self.masks = iter(masks)

    def forward(self, z: Tensor) -> Tensor:
        return torch.where(next(self.masks).to(z.device), z, 0)


def results(block: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Return the results of a step of the block, which is changed: its parameters get gradients.

    x: (N, C, H, W). dy: the gradient of the block's result, of its sizes (N, K, P, Q).
    """
    x = x.clone().requires_grad_()
    return _backward(block, x, block(x), dy)


def _backward(block: nn.Module, x: Tensor, y: Tensor, dy: Tensor) -> dict[str, Tensor]:
    y.backward(dy)
    grads = {name: p.grad for name, p in (("x", x), *block.named_parameters()) if p.grad is not None}
    return {"y": y.detach()} | grads | dict(block.named_buffers())


def eager_results(block: nn.Module, x: Tensor, dy: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return (results, masks of the ReLUs) of a step of torchvision's block, by torch's modules."""
    block = copy.deepcopy(block)
    block.relu = relu = RecordedReLU()
    return results(block, x, dy), relu.masks


def fused_results(
    block: nn.Module, x: Tensor, dy: Tensor, backend: str | None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return (results, masks of the ReLUs) of a step of the fused block that replaces torchvision's.

    backend: the name of a backend, or None for the automatic choice.
    Raises BackendUnavailable if the block does not run fused.
    """
    block = copy.deepcopy(block)
    replace_blocks(block)
    x = x.clone().requires_grad_()
    with use_backend(backend):
        if reason := why_plain(block, x):
            raise BackendUnavailable(reason)
        y = block(x)
        node: Any = y.grad_fn
        plan = TrainingPlan.of(node.plan)
        saved = Saved.of(node.saved_tensors[1 + node.count :], plan)
        out = _backward(block, x, y, dy)
    # The kernels do not store the masks of the inner ReLUs. They follow from the saved convolution outputs c and batch
    # norms (a, b) as the kernels compute them: the sign of a*c + b, rounded to fp32.
    masks = []
    for i in range(plan.spec.n - 1):
        a, b = (t.double()[:, None, None] for t in saved.tables[i][:2])
        masks.append(~((a * saved.c[i].double() + b).float() <= 0))
    return out, [*masks, ~(out["y"] <= 0)]


def exact_results(block: nn.Module, x: Tensor, dy: Tensor, masks: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the results of a step in fp64, with the gradients under the given ReLU masks.

    The sign of a value near a ReLU's zero depends on rounding, and one flipped sign changes gradients by more than all
    rounding does. So gradients are compared under the masks of the implementation under test. "y" is that of the
    unmodified block.
    """
    block = copy.deepcopy(block).double()
    y = copy.deepcopy(block)(x.double()).detach()
    block.relu = GivenReLU(masks)
    return results(block, x.double(), dy.double()) | {"y": y}
