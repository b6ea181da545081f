"""How far from fp64 a step of a residual block is: output, gradients, running statistics; ours and eager's."""

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

NAMES = ("r50-layer1", "r50-layer2-down")
# By the name of the data: what is added to the first two batch norms' biases.
DATA = {"ordinary": 0.0, "large mean": 30.0}
Step = Callable[[nn.Module, Tensor, Tensor], tuple[dict[str, Tensor], list[Tensor]]]


def cases(batch: int) -> list[BlockCase]:
    """A block with an identity and one with a projection, on a quarter of the map."""
    return [dataclasses.replace(c, N=batch, H=28, W=28) for c in RESNET_CASES if c.name in NAMES]


def errors(
    step: Step, case: BlockCase, dtype: torch.dtype, mean: float, device: torch.device, seeds: int
) -> dict[str, float]:
    """By tensor: the RMS of its error over that of the exact values, over all seeds. Gradients are compared under the
    step's own ReLU masks; what is 0 but for fp64's own rounding (as a bias before a batch norm has it) is left out."""
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
    """A row of eager's, and one of ours: of the backend that is chosen, on a GPU of the one that is named."""
    backend = "gpu" if device.type == "cuda" else None
    ways: dict[str, Step] = {
        "eager channels_last": eager_results,
        f"replaced {backend}" if backend else "replaced": lambda *args: fused_results(*args, backend),
    }
    for i, (provider, step) in enumerate(ways.items()):
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
        except Exception as error:  # whatever it was, it is this provider's
            row.status, row.reason = "failed", f"{type(error).__name__}: {error}"[:300]
        log.row(row)
        log.begin(None)
