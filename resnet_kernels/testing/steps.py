"""One training step of a block, eager, fused and in fp64, with gradients under the same ReLU masks."""

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
    """ReLU that tells where it let through."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor] = []

    def forward(self, z: Tensor) -> Tensor:
        self.masks.append(~(z <= 0))
        return torch.relu(z)


class GivenReLU(nn.Module):
    """Zero where the masks, one after the other, say so."""

    def __init__(self, masks: Iterable[Tensor]) -> None:
        super().__init__()
        self.masks = iter(masks)

    def forward(self, z: Tensor) -> Tensor:
        return torch.where(next(self.masks).to(z.device), z, 0)


def results(block: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Of a step: y, the gradients of x and of the parameters that want one, by name, and the buffers afterwards."""
    x = x.clone().requires_grad_()
    return _backward(block, x, block(x), dy)


def _backward(block: nn.Module, x: Tensor, y: Tensor, dy: Tensor) -> dict[str, Tensor]:
    y.backward(dy)
    grads = {name: p.grad for name, p in (("x", x), *block.named_parameters()) if p.grad is not None}
    return {"y": y.detach()} | grads | dict(block.named_buffers())


def eager_results(block: nn.Module, x: Tensor, dy: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """(results, masks of the ReLUs) of a step of torchvision's block."""
    block = copy.deepcopy(block)
    block.relu = relu = RecordedReLU()
    return results(block, x, dy), relu.masks


def fused_results(
    block: nn.Module, x: Tensor, dy: Tensor, backend: str | None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """(results, masks of the ReLUs) of a step of torchvision's block, replaced. Raises BackendUnavailable where it does
    not run fused."""
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
    masks = []
    for i in range(plan.spec.n - 1):
        a, b = (t.double()[:, None, None] for t in saved.tables[i][:2])
        masks.append(~((a * saved.c[i].double() + b).float() <= 0))
    return out, [*masks, ~(out["y"] <= 0)]


def exact_results(block: nn.Module, x: Tensor, dy: Tensor, masks: Iterable[Tensor]) -> dict[str, Tensor]:
    """Results of a step in fp64, the gradients under these masks: of a value near a ReLU's zero the sign is chance, and
    one that flips moves gradients by more than all rounding does."""
    block = copy.deepcopy(block).double()
    y = copy.deepcopy(block)(x.double()).detach()
    block.relu = GivenReLU(masks)
    return results(block, x.double(), dy.double()) | {"y": y}
