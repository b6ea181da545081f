"""What the tuner needs to know of the Triton backend's launches: which there are, and their candidates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.contract import Geometry, wide
from ..backends.triton import ahead
from ..backends.triton.convolution import Convolution
from ..backends.triton.launch import INTERPRETING, arch_of, processors_of, recording
from ..backends.triton.run import Choice, candidates, launch_so, run_so
from ..backends.triton.tail import Tail
from ..inference import FrozenTrunk
from ..roofline import H200, launches_of

__all__ = ["materialize", "name", "plain", "problems_of", "prune", "row", "run_so"]

Problem = Convolution | Tail


def problems_of(trunk: FrozenTrunk, x: Tensor) -> Iterator[Problem]:
    """Of trunk(x), on meta tensors; a tail's convolutions by themselves before it, as it is compared with them."""
    for launch in launches_of(trunk, x):
        if isinstance(launch.problem, Tail):
            yield from launch.problem.parts
        if launch.problem is not None:  # a pass and a stem have one way only
            yield launch.problem


def materialize(problem: Problem, device: torch.device) -> Problem:
    """The problem with normal numbers, in tensors of the same sizes, strides and dtypes."""

    def real(name: str, t: Tensor) -> Tensor:
        deviation = (2 / t[0].numel()) ** 0.5 if name.startswith("weight") else 1.0
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).normal_(0, deviation)

    return problem.map(real)


def name(choice: Choice) -> str:
    c = choice.config
    if c is None:
        return choice.kernel
    tile = f"{c.BLOCK_M}x{c.BLOCK_N}x{c.BLOCK_K}"
    return f"{choice.kernel} {tile}, {c.num_warps} warps, {c.num_stages} stages" + ", persistent" * c.persistent


def row(choice: Choice) -> dict[str, Any]:
    """The choice in a table."""
    return {"kernel": choice.kernel, "config": None if choice.config is None else dataclasses.asdict(choice.config)}


def prune(problem: Problem, most: int) -> tuple[str, list[Choice], dict[str, str]]:
    """(the name of what is chosen now, the candidates to time, those that compile to nothing sound and why). Beside
    the one chosen now, and separate kernels, they are the `most` best predicted."""
    device = problem.parts[0].x.device
    arch, processors = arch_of(device), processors_of(device)
    meta = problem.map(lambda _, t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"))
    with recording(arch, device):
        choices = list(candidates(meta))
        made = {choice: launch_so(meta, choice) for choice in choices if choice.config is not None}
    chosen, separate = choices[0], [choice for choice in choices if choice.config is None]

    def predicted(choice: Choice) -> float:
        # The last wave of programs takes as long as a full one.
        grid = made[choice].grid
        return H200.predicted(made[choice].work) * math.ceil(grid / processors) * processors / grid

    others = sorted((choice for choice in made if choice != chosen), key=predicted)
    if INTERPRETING:
        return name(chosen), list(dict.fromkeys([chosen, *separate, *others[:most]])), {}
    tried = [choice for choice in (chosen, *others[: 3 * most]) if choice in made]
    out, sound = {}, []
    for choice, found in zip(tried, ahead.compile_all([made[c] for c in tried], arch), strict=True):
        wrong = [found] if isinstance(found, str) else found.wrong()
        if wrong:
            out[name(choice)] = "; ".join(wrong)
        else:
            sound.append(choice)
    return name(chosen), list(dict.fromkeys([*sound[: most + 1], *separate])), out


def _plain_conv(c: Convolution, dtype: torch.dtype) -> Tensor:
    w = wide(dtype)

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
    return results[1:] or results
