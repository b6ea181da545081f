"""What the tuner needs to know of the Triton backend's launches: which there are, and their candidates."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..analysis.roofline import H200
from ..backends.contract import Geometry, accumulator_dtype
from ..backends.gpu import ahead
from ..backends.gpu.convolution import Convolution
from ..backends.gpu.inference import hopper
from ..backends.gpu.inference.dispatch import Choice, Problem, candidates, launch_so, run_so
from ..backends.gpu.inference.tail import Tail
from ..backends.gpu.launch import INTERPRETING, Launch, Native, arch_of, processors_of, recording

__all__ = ["Pruned", "field", "materialize", "name", "plain", "problems_of", "prune", "row", "run_so"]


def problems_of(launches: Iterable[Launch]) -> list[Problem]:
    """What the recorded launches compute, or might compute together; before several convolutions in one each by itself,
    which they are compared with, and whole blocks last, which are compared with tails too."""
    found: list[Problem] = []
    for launch in launches:
        for problem in (launch.problem, launch.within):
            if problem is not None and not isinstance(problem, Convolution):
                found += problem.parts
            if problem is not None:  # a pass and a stem have one way only
                found.append(problem)
    return sorted(found, key=lambda problem: isinstance(problem, hopper.Whole))


def materialize(problem: Problem, device: torch.device) -> Problem:
    """The problem with normal numbers, in tensors of the same sizes, strides and dtypes; of a whole block with what its
    first convolution makes of them."""

    def real(name: str, t: Tensor) -> Tensor:
        deviation = (2 / t[0].numel()) ** 0.5 if name.startswith("weight") else 1.0
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).normal_(0, deviation)

    made = problem.map(real)
    if isinstance(made, hopper.Whole):
        a = _plain_conv(made.first, made.first.x.dtype).contiguous(memory_format=torch.channels_last)
        made = dataclasses.replace(made, middle=dataclasses.replace(made.middle, x=a))
    return made


def name(choice: Choice) -> str:
    c = choice.config
    if c is None:
        return choice.kernel
    tile = f"{c.BLOCK_M}x{c.BLOCK_N}x{c.BLOCK_K}"
    return f"{choice.kernel} {tile}, {c.num_warps} warps, {c.num_stages} stages" + ", persistent" * c.persistent


def row(choice: Choice) -> dict[str, Any]:
    """The choice in a table."""
    return {"kernel": choice.kernel, "config": None if choice.config is None else dataclasses.asdict(choice.config)}


@dataclasses.dataclass(frozen=True)
class Field:
    """Of one problem. default: what is chosen now. separate: the choice of separate kernels, if that is one. made: what
    the others would launch, on meta tensors: the default, then the best predicted."""

    default: Choice
    separate: list[Choice]
    made: dict[Choice, Launch]


def field(problem: Problem, device: torch.device, most: int) -> Field:
    """problem: on meta tensors, to run on the device."""
    arch, processors = arch_of(device), processors_of(device)
    with recording(arch, device):
        default, *rest = candidates(problem)
        made = {choice: launch_so(problem, choice) for choice in (default, *rest) if choice.config is not None}

    def predicted(choice: Choice) -> float:
        # The last wave of tiles takes as long as a full one.
        tiles = made[choice].arguments.get("tiles", made[choice].grid)
        return H200.predicted(made[choice].work) * math.ceil(tiles / processors) * processors / tiles

    # Those that are compiled already are all tried.
    best = [choice for choice in made if isinstance(made[choice], Native) and choice != default]
    most += len(best)
    of_tile = collections.Counter[tuple]()
    for choice in sorted((c for c in made if c != default and not isinstance(made[c], Native)), key=predicted):
        assert choice.config is not None
        tile = choice.kernel, choice.config.BLOCK_M, choice.config.BLOCK_N
        of_tile[tile] += 1
        if of_tile[tile] <= PER_TILE:
            best.append(choice)
    tried = [choice for choice in (default, *best[: most + SPARE]) if choice in made]
    separate = [choice for choice in (default, *rest) if choice.config is None]
    return Field(default, separate, {choice: made[choice] for choice in tried})


# The prediction knows tiles, not warps and stages: of these so many are tried.
PER_TILE = 3

# Candidates compiled beyond those to be timed, for those that are not sound.
SPARE = 4


@dataclasses.dataclass(frozen=True)
class Pruned:
    """Of one problem: the name of what is chosen now, the candidates to time, and those that are not sound with why."""

    default: str
    choices: list[Choice]
    out: dict[str, str]


def prune(problems: Sequence[Problem], device: torch.device, most: int) -> dict[str, Pruned]:
    """By the problem's key. All of Triton's is compiled at once, on all cores; `most` are left beside the default, what
    is compiled already and the separate kernels."""
    fields = {problem.key: field(problem, device, most) for problem in problems}
    made = [launch for f in fields.values() for launch in f.made.values() if not isinstance(launch, Native)]
    compiled = iter(["interpreted"] * len(made) if INTERPRETING else ahead.compile_all(made, arch_of(device)))
    found = {}
    for key, f in fields.items():
        sound, out = [], {}
        for choice, launch in f.made.items():
            if isinstance(launch, Native):
                sound.append(choice)
                continue
            result = next(compiled)
            wrong = [] if INTERPRETING else [result] if isinstance(result, str) else result.wrong()
            if wrong:
                out[name(choice)] = "; ".join(wrong)
            else:
                sound.append(choice)
        natives = sum(isinstance(launch, Native) for launch in f.made.values())
        found[key] = Pruned(name(f.default), [*sound[: most + natives + 1], *f.separate], out)
    return found


def _plain_conv(c: Convolution, dtype: torch.dtype) -> Tensor:
    w = accumulator_dtype(dtype)

    def conv(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        return F.conv2d(x.to(dtype), weight.to(dtype).permute(0, 3, 1, 2), None, *geometry).to(w)

    def per_channel(t: Tensor) -> Tensor:
        return t.to(w)[:, None, None]

    h = c.x.to(dtype)
    if c.lazy is not None:
        a, b, relu = c.lazy
        t = torch.addcmul(per_channel(b), per_channel(a), h.to(w))
        h = (torch.relu(t) if relu else t).to(dtype)
    t = conv(h, c.weight, c.geometry)
    if c.scale is not None:
        t = t * per_channel(c.scale)
    if c.shift is not None:
        t = t + per_channel(c.shift)
    if c.second is not None:
        t = t + conv(*c.second, Geometry())
    if c.residual is not None:
        t[:, : c.residual.shape[1]] += c.residual.to(w)
    return (torch.relu(t) if c.relu else t).to(dtype)


def plain(problem: Problem, dtype: torch.dtype) -> list[Tensor]:
    """The problem's results, as torch's own functions compute them in dtype."""
    first, *rest = problem.parts
    results = [_plain_conv(first, dtype)]
    for c in rest:
        results.append(_plain_conv(dataclasses.replace(c, x=results[-1]), dtype))
    # Of a tail what its last two convolutions make, of others what the last.
    return results[1:] if isinstance(problem, Tail) else results[-1:]
