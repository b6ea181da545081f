"""The tuner's view of the GPU backend's launches: the problems they compute, and each problem's candidate kernels.

A problem is what one launch computes (a convolution, a block's tail, or a whole block). A `Candidate` is a kernel, with
its tile configuration where it has one, that may compute it.
"""

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
from ..backends.gpu.inference.dispatch import (
    Candidate,
    FusedProblem,
    candidates_to_measure,
    launch_candidate,
    run_candidate,
)
from ..backends.gpu.inference.tail import Tail
from ..backends.gpu.launch import INTERPRETING, CudaLaunch, Launch, arch_of, processors_of, recording

__all__ = ["Pruned", "candidates_of", "materialize", "name", "plain", "problems_of", "prune", "row", "run_candidate"]


def problems_of(launches: Iterable[Launch]) -> list[FusedProblem]:
    """Return the problems to tune, in the order in which the tuner must measure them.

    These are the problems that the recorded launches compute, and the larger problems that a launch begins and one
    launch might compute. A fused problem is compared with separate kernels for its convolutions, so its convolutions
    come before it. Whole blocks are also compared with tails, so they come last.
    """
    found: list[FusedProblem] = []
    for launch in launches:
        for problem in (launch.problem, launch.within):
            if problem is not None and not isinstance(problem, Convolution):
                found += problem.parts
            # None: an elementwise pass or a stem, which has a single implementation and nothing to tune.
            if problem is not None:
                found.append(problem)
    return sorted(found, key=lambda problem: isinstance(problem, hopper.WholeBottleneck))


def materialize(problem: FusedProblem, device: torch.device) -> FusedProblem:
    """Return the problem with normally distributed values in tensors of the same sizes, strides and dtypes.

    The input of a whole block's middle convolution is the result of its first convolution, computed by torch.
    """

    def real(name: str, t: Tensor) -> Tensor:
        # The weights of a convolution: He initialization, so that results have the scale of the inputs.
        deviation = (2 / t[0].numel()) ** 0.5 if name.startswith("weight") else 1.0
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).normal_(0, deviation)

    made = problem.map(real)
    if isinstance(made, hopper.WholeBottleneck):
        a = _plain_conv(made.first, made.first.x.dtype).contiguous(memory_format=torch.channels_last)
        made = dataclasses.replace(made, middle=dataclasses.replace(made.middle, x=a))
    return made


def name(choice: Candidate) -> str:
    """Return the text that reports print for a choice: kernel, tile, warps and stages."""
    c = choice.config
    if c is None:
        return choice.kernel
    tile = f"{c.BLOCK_M}x{c.BLOCK_N}x{c.BLOCK_K}"
    return f"{choice.kernel} {tile}, {c.num_warps} warps, {c.num_stages} stages" + ", persistent" * c.persistent


def row(choice: Candidate) -> dict[str, Any]:
    """Return the choice as an entry of a tuning table."""
    return {"kernel": choice.kernel, "config": None if choice.config is None else dataclasses.asdict(choice.config)}


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The candidates of one problem before any is compiled.

    default: the choice made without tuning.
    separate: the choices that run several kernels. Such a choice has no configuration; each of its kernels has its own.
    made: for the other candidates, their launch on meta tensors: the default first, then those predicted fastest.
    """

    default: Candidate
    separate: list[Candidate]
    made: dict[Candidate, Launch]


def candidates_of(problem: FusedProblem, device: torch.device, most: int) -> Candidates:
    """Return the candidates of a problem.

    Args:
        problem: its tensors are on the meta device.
        device: the GPU that is to run it.
        most: how many Triton candidates are to be timed beside the default.
    """
    arch, processors = arch_of(device), processors_of(device)
    with recording(arch, device):
        default, *rest = candidates_to_measure(problem)
        made = {choice: launch_candidate(problem, choice) for choice in (default, *rest) if choice.config is not None}

    def predicted(choice: Candidate) -> float:
        # The last wave of tiles takes as long as a full one.
        tiles = made[choice].arguments.get("tiles", made[choice].grid)
        return H200.predicted(made[choice].work) * math.ceil(tiles / processors) * processors / tiles

    # Kernels of the compiled extension cost no compilation, so all of them are tried.
    best = [choice for choice in made if isinstance(made[choice], CudaLaunch) and choice != default]
    most += len(best)
    of_tile = collections.Counter[tuple]()
    for choice in sorted((c for c in made if c != default and not isinstance(made[c], CudaLaunch)), key=predicted):
        assert choice.config is not None
        tile = choice.kernel, choice.config.BLOCK_M, choice.config.BLOCK_N
        of_tile[tile] += 1
        if of_tile[tile] <= PER_TILE:
            best.append(choice)
    tried = [choice for choice in (default, *best[: most + SPARE]) if choice in made]
    separate = [choice for choice in (default, *rest) if choice.config is None]
    return Candidates(default, separate, {choice: made[choice] for choice in tried})


# Candidates tried per tile: the prediction depends on the tile, but not on the number of warps and stages.
PER_TILE = 3

# Candidates compiled beyond those to be timed. They replace the ones whose compiled code is unsound.
SPARE = 4


@dataclasses.dataclass(frozen=True)
class Pruned:
    """The candidates of one problem after compilation.

    default: the name of the choice made without tuning.
    choices: the candidates to time.
    out: the reason why a candidate's compiled code is unsound, by the candidate's name.
    """

    default: str
    choices: list[Candidate]
    out: dict[str, str]


def prune(problems: Sequence[FusedProblem], device: torch.device, most: int) -> dict[str, Pruned]:
    """Return the candidates to time, by the problem's key.

    All Triton candidates of all problems are compiled at once, on all cores. Per problem at most `most` of them are
    left, beside the default, the kernels of the compiled extension and the choices that run several kernels.
    """
    before = {problem.key: candidates_of(problem, device, most) for problem in problems}
    made = [launch for found in before.values() for launch in found.made.values() if not isinstance(launch, CudaLaunch)]
    compiled = iter(["interpreted"] * len(made) if INTERPRETING else ahead.compile_all(made, arch_of(device)))
    pruned = {}
    for key, found in before.items():
        sound, unsound = [], {}
        for choice, launch in found.made.items():
            if isinstance(launch, CudaLaunch):
                sound.append(choice)
                continue
            result = next(compiled)
            wrong = [] if INTERPRETING else [result] if isinstance(result, str) else result.wrong()
            if wrong:
                unsound[name(choice)] = "; ".join(wrong)
            else:
                sound.append(choice)
        natives = sum(isinstance(launch, CudaLaunch) for launch in found.made.values())
        pruned[key] = Pruned(name(found.default), [*sound[: most + natives + 1], *found.separate], unsound)
    return pruned


def _plain_conv(c: Convolution, dtype: torch.dtype) -> Tensor:
    """Return the convolution with its prologue and epilogue, computed by torch with operands rounded to dtype."""
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


def plain(problem: FusedProblem, dtype: torch.dtype) -> list[Tensor]:
    """Return the results of the problem, as torch's own functions compute them in dtype."""
    first, *rest = problem.parts
    results = [_plain_conv(first, dtype)]
    for c in rest:
        results.append(_plain_conv(dataclasses.replace(c, x=results[-1]), dtype))
    # A tail writes the results of its second and later convolutions; any other problem writes the last result only.
    return results[1:] if isinstance(problem, Tail) else results[-1:]
