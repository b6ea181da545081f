"""Where the time of a forward goes: a model's stem, blocks and head, each timed as the model runs."""

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
    """Block by block, so that each can be timed; a whole frozen model has no such seams."""
    module = _eager(prepared)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BLOCKS):
                setattr(parent, name, rk.freeze(child, cuda_graphs=False))
    return module


WAYS: dict[str, tuple[bool, Callable[[Prepared], nn.Module]]] = {
    "eager channels_last": (True, _eager),
    "replaced": (False, _replaced),
    "frozen by block": (False, _frozen),
}


class _Marks:
    """Times at which parts begin and end, from hooks. On a GPU events, read afterwards."""

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
        """Seconds of each part since the last time."""
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
    """case: a model's inference. Rows of section "layers", a part each."""
    if log.knows(dataclasses.replace(case.row("", "ok"), section="layers", part="head")):
        return
    prepared = case.prepare(device, references=False)
    torch.backends.cudnn.benchmark = True
    blocks = [name for name, m in prepared.module.named_modules() if isinstance(m, BLOCKS)]
    ways = {}
    for name, (peer, make) in WAYS.items():
        try:
            ways[name] = make(prepared)
            ways[name](*prepared.inputs[0])
        except Exception as error:  # whatever it was, the others have nothing to do with it
            row = dataclasses.replace(case.row(name, "failed", peer=peer), section="layers")
            log.row(dataclasses.replace(row, reason=f"{type(error).__name__}: {error}"[:300]))
            ways.pop(name, None)
    marks = {name: _Marks(module, blocks, device) for name, module in ways.items()}
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
    for i in range(rounds):
        for name, module in ways.items():
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
            row = part_case.row(name, "ok", peer=WAYS[name][0], part=part, floor=part_case.floor(log.facts))
            row.seconds, row.p20, row.p80, row.rounds = s
            log.row(row)
    log.done(dataclasses.replace(case.row("", "ok"), section="layers", part="head").group)
