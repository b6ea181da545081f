"""The time of each part of a model's forward: stem, blocks and head are timed while the whole model runs."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchvision.models import resnet

import resnet_kernels as rk
from resnet_kernels.analysis import traffic
from resnet_kernels.analysis.timing import sample, synchronize

from .cases import DTYPES, Case, Prepared
from .events import Log

BLOCKS = (resnet.BasicBlock, resnet.Bottleneck)


def _eager(prepared: Prepared) -> nn.Module:
    return copy.deepcopy(prepared.module).to(memory_format=torch.channels_last)


def _replaced(prepared: Prepared) -> nn.Module:
    module = _eager(prepared)
    rk.replace_blocks(module)
    return module


def _frozen(prepared: Prepared) -> nn.Module:
    """Return the model with every block frozen by itself. A frozen model has no modules that could be timed."""
    module = _eager(prepared)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BLOCKS):
                setattr(parent, name, rk.freeze(child, cuda_graphs=False))
    return module


# By provider: whether it is a peer, and what makes its model.
PROVIDERS: dict[str, tuple[bool, Callable[[Prepared], nn.Module]]] = {
    "eager channels_last": (True, _eager),
    "replaced": (False, _replaced),
    "frozen by block": (False, _frozen),
}


class _Marks:
    """Records when the parts of a model begin and end, by hooks. On a GPU these are events, which are read later."""

    def __init__(self, module: nn.Module, blocks: list[str], device: torch.device) -> None:
        self.device, self.marks = device, []
        inner = {name: module.get_submodule(name) for name in blocks}
        ends = {"stem": (module.conv1, module.maxpool), "head": (module.avgpool, module.fc)}
        parts = {name: (m, m) for name, m in inner.items()}
        for name, (first, last) in ({"stem": ends["stem"]} | parts | {"head": ends["head"]}).items():
            first.register_forward_pre_hook(lambda *_, name=name: self._mark(name))
            last.register_forward_hook(lambda *_, name=name: self._mark(name))

    def _mark(self, name: str) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def take(self) -> dict[str, float]:
        """Return the seconds of each part since the last call."""
        synchronize(self.device)
        found: dict[str, float] = {}
        begun: dict[str, Any] = {}
        for name, at in self.marks:
            if name not in begun:
                begun[name] = at
            else:
                start = begun.pop(name)
                found[name] = at - start if self.device.type != "cuda" else start.elapsed_time(at) / 1e3
        self.marks = []
        return found


@torch.no_grad()
def measure(case: Case, device: torch.device, log: Log, rounds: int) -> None:
    """Log one row of section "layers" per provider and part of a model.

    Args:
        case: a model's inference.
        rounds: forwards of each model.
    """
    if log.knows(dataclasses.replace(case.row("", "ok"), section="layers", part="head")):
        return
    prepared = case.prepare(device, references=False)
    torch.backends.cudnn.benchmark = True
    blocks = [name for name, m in prepared.module.named_modules() if isinstance(m, BLOCKS)]
    models = {}
    for name, (peer, make) in PROVIDERS.items():
        try:
            models[name] = make(prepared)
            models[name](*prepared.inputs[0])
        except Exception as error:  # the failure of one provider must not end the others
            row = dataclasses.replace(case.row(name, "failed", peer=peer), section="layers")
            log.row(dataclasses.replace(row, reason=f"{type(error).__name__}: {error}"[:300]))
            models.pop(name, None)
    marks = {name: _Marks(module, blocks, device) for name, module in models.items()}
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    for i in range(rounds):
        for name, module in models.items():
            if i and log.left() <= 0:
                break
            module(*prepared.inputs[i % len(prepared.inputs)])
            for part, s in marks[name].take().items():
                seconds[name].setdefault(part, []).append(s)
    x_sizes = (case.batch, 3, case.size, case.size)
    with torch.device("meta"):
        needs = traffic.parts(copy.deepcopy(prepared.module).to("meta"), x_sizes, DTYPES[case.dtype].itemsize, "block")
    for name, parts in seconds.items():
        for part, values in parts.items():
            need, s = needs[part], sample(values)
            part_case = dataclasses.replace(case, section="layers", needs=(need,))
            row = part_case.row(name, "ok", peer=PROVIDERS[name][0], part=part, floor=part_case.floor(log.facts))
            row.seconds, row.p20, row.p80, row.rounds = s
            log.row(row)
    log.done(dataclasses.replace(case.row("", "ok"), section="layers", part="head").group)
