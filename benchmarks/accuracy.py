"""Accuracy of a training step of a residual block, for the fused blocks and for eager PyTorch.

Compared with fp64 are the block's result, its gradients and its running statistics.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from resnet_kernels.analysis.results import Row
from resnet_kernels.backends.contract import BackendUnavailable
from resnet_kernels.testing import RESNET_CASES, BlockCase, eager_results, exact_results, fused_results

from .cases import DTYPES
from .events import Log

# The blocks: one with an identity shortcut, one with a projection.
NAMES = ("r50-layer1", "r50-layer2-down")
# The kinds of data, with what is added to the biases of the first two batch norms.
DATA = {"ordinary": 0.0, "large mean": 30.0}
# A training step of a block on (x, dy): ({name: tensor}, masks of the ReLUs), as in `resnet_kernels.testing.steps`.
Step = Callable[[nn.Module, Tensor, Tensor], tuple[dict[str, Tensor], list[Tensor]]]


def cases(batch: int) -> list[BlockCase]:
    """Return the blocks of NAMES on maps of 28 x 28, a quarter of the positions that they have in the network."""
    return [dataclasses.replace(c, N=batch, H=28, W=28) for c in RESNET_CASES if c.name in NAMES]


def errors(
    step: Step, case: BlockCase, dtype: torch.dtype, mean: float, device: torch.device, seeds: int
) -> dict[str, float]:
    """Return each tensor's relative error by name: the RMS of its error over the RMS of the exact values.

    The mean square is taken over all seeds. Gradients are compared under the step's own ReLU masks. Gradients that are
    0 but for rounding in fp64, such as that of a bias before a batch norm, are left out.

    Args:
        step: the step under test.
        case, dtype: the block.
        mean: added to the biases of the first two batch norms.
        seeds: number of random blocks and inputs.
    """
    squares: dict[str, float] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        block = case.make().train()
        for name in ("bn1.bias", "bn2.bias"):
            block.get_parameter(name).data += mean
        block = block.to(device, dtype, memory_format=torch.channels_last)
        x = case.input().to(device, dtype)
        dy = torch.randn_like(copy.deepcopy(block)(x)).detach()
        found, masks = step(block, x, dy)
        for name, exact in exact_results(block, x, dy, masks).items():
            if exact.is_floating_point() and exact.norm() > 1e-10 * dy.norm():
                square = float((found[name].double() - exact).square().sum() / exact.square().sum())
                tensor = name if name == "y" or "running" in name else f"d {name}"
                squares[tensor] = squares.get(tensor, 0.0) + square / seeds
    return {name: math.sqrt(square) for name, square in squares.items()}


def measure(case: BlockCase, dtype: str, data: str, device: torch.device, log: Log, seeds: int) -> None:
    """Log a row for eager PyTorch and one for the fused block.

    On a GPU the fused block runs by the named backend, on a CPU by the backend that is chosen automatically.

    Args:
        case, dtype: the block; dtype is a key of DTYPES.
        data: a key of DATA.
        seeds: number of random blocks and inputs.
    """
    backend = "gpu" if device.type == "cuda" else None
    steps: dict[str, Step] = {
        "eager channels_last": eager_results,
        f"replaced {backend}" if backend else "replaced": lambda *args: fused_results(*args, backend),
    }
    for i, (provider, step) in enumerate(steps.items()):
        row = Row("accuracy", case.name, provider, "ok", i == 0, data, dtype=dtype, batch=case.N, size=case.H)
        if log.knows(row):
            continue
        if log.left() <= 0:
            log.row(dataclasses.replace(row, status="cut", reason="the budget ended before it was begun"))
            continue
        log.begin(row)
        try:
            row.errors, row.rounds = errors(step, case, DTYPES[dtype], DATA[data], device, seeds), seeds
        except BackendUnavailable as error:
            row.status, row.reason = "unavailable", str(error)
        except Exception as error:  # a provider's failure is its result, and must not end the section
            row.status, row.reason = "failed", f"{type(error).__name__}: {error}"[:300]
        log.row(row)
        log.begin(None)
