"""Inference: from the contract's calls to launches. For each problem, list the candidate kernels with their
configurations, take the first that can run, and launch it.

A candidate that a measured table names comes first; then the candidates of the heuristics (configs.py, hopper.py).
`gather` runs any problem, so there is always a candidate that can run.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ...contract import Epilogue, Geometry, Operand, Packed, PackedBlock, Pool, Product, check_conv, fold
from .. import configs
from ..configs import Config
from ..convolution import Convolution, channels_last_strides
from ..launch import (
    INTERPRETING,
    Launch,
    arch_of,
    expected_device,
    gpu_of,
    measured_choice,
    precision,
    processors_of,
    submit,
)
from . import boxes, conv_pool, gather, hopper, pooling, tail
from .hopper import WholeBottleneck
from .tail import Tail

__all__ = ["bn_pass", "conv", "pack", "pack_stem", "residual_blocks", "stem", "stem_channels", "why_not_here"]

# Names of candidates, as tables store them.
#
# A tail or a whole bottleneck as one kernel per convolution.
SEPARATE = "separate kernels"
# A tail as Triton's fused kernel (tail.py). Without the next block's 1x1, Triton 3.6 does not compile it for sm_90.
TRITON_TAIL = "conv3x3_conv1x1 with the next 1x1"
# A whole bottleneck in a run of consecutive blocks that are alike: each block's fused tail also computes the next
# block's first convolution. How the tail runs is the choice made for that tail.
CONSECUTIVE_TAILS = "consecutive fused tails"

# Input and output channels that joined groups have at least: the least that fills a matrix tile.
JOINED = 32


# A problem that one launch may compute. Each has `key` (in tables), `parts` (its convolutions) and `map`.
FusedProblem = Convolution | Tail | WholeBottleneck


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A kernel that may run a problem, with its configuration, and the reason why it cannot, or None.

    config: None if the candidate is several kernels, each with a configuration of its own.
    """

    kernel: str
    config: Config | None
    why_not: str | None = None


def _measured_first(rows: list[Candidate], device: torch.device, problem: FusedProblem) -> list[Candidate]:
    """Return the candidates, preceded by the one that the device's table names for the problem, if any."""
    found = measured_choice(device, problem)
    if found is None:
        return rows
    try:
        config = None if found["config"] is None else configs.parse(found["config"])
    except (KeyError, ValueError) as error:
        warnings.warn(f"a table's row for {problem.key} is ignored: {error!r}", stacklevel=2)
        return rows
    return [check_candidate(problem, found["kernel"], config), *rows]


def check_candidate(problem: FusedProblem, kernel: str, config: Config | None) -> Candidate:
    """Return the candidate, with the reason why it cannot run the problem, or None."""
    if isinstance(problem, WholeBottleneck):
        reason = _why_not_bottleneck(problem, kernel, config)
    elif isinstance(problem, Tail):
        reason = _why_not_tail(problem, kernel, config)
    else:
        reason = _why_not_convolution(problem, kernel, config)
    return Candidate(kernel, config, reason)


def _why_not_bottleneck(b: WholeBottleneck, kernel: str, config: Config | None) -> str | None:
    if (kernel, config) == (SEPARATE, None):
        return None
    if (kernel, config) == (CONSECUTIVE_TAILS, None):
        return None if b.last.second is None else "expected an identity shortcut: no tail has a projection"
    if (kernel, config) == (hopper.SM90_BOTTLENECK, hopper.SM90_BOTTLENECK_CONFIG):
        return hopper.why_not_bottleneck(b, arch_of(b.device))
    return f"unknown: {kernel}"


def _why_not_tail(t: Tail, kernel: str, config: Config | None) -> str | None:
    device = t.first.x.device
    if (kernel, config) == (SEPARATE, None):
        return None
    if (kernel, config) == (hopper.SM90_PAIR, None):
        return hopper.why_not_pair(t, arch_of(device))
    if kernel == hopper.SM90_TAIL and config is not None:
        if config != hopper.SM90_TAIL_CONFIG:
            return f"{kernel}: expected {hopper.SM90_TAIL_CONFIG}, got {config}"
        return hopper.why_not_tail(t, arch_of(device))
    if kernel == TRITON_TAIL and config is not None:
        reason = tail.why_not(t.first, t.last, arch_of(device), config, processors_of(device))
        return reason or tail.why_not_after(t.following)
    return f"unknown: {kernel}"


def _why_not_convolution(c: Convolution, kernel: str, config: Config | None) -> str | None:
    arch = arch_of(c.x.device)
    if config is None:
        return f"unknown: {kernel}"
    if kernel in hopper.KERNELS:
        if config != hopper.KERNELS[kernel]:
            return f"{kernel}: expected {hopper.KERNELS[kernel]}, got {config}"
        return hopper.why_not(c, arch)
    if kernel == "boxes":
        return boxes.why_not(c, arch, config)
    return gather.why_not(c, config) if kernel == "gather" else f"unknown: {kernel}"


def problem_size(c: Convolution) -> configs.ProblemSize:
    """Return the input of the heuristics in configs.py."""
    K, R, S, C = c.weight.shape
    itemsize, device = c.x.element_size(), c.x.device
    return configs.ProblemSize(
        M=c.rows,
        K=K,
        C=C,
        taps=R * S,
        group=K // c.geometry.groups,
        itemsize=itemsize,
        fma=itemsize == 4 and precision() == "ieee",
        residual=c.residual is not None,
        arch=arch_of(device),
        processors=processors_of(device),
    )


def convolution_candidates(c: Convolution) -> list[Candidate]:
    """Return the candidates for a convolution in order of preference: the measured one first, then the heuristics'."""
    size = problem_size(c)
    sm90 = hopper.preferred(size) if gpu_of(c.x.device) else None
    rows = [check_candidate(c, *sm90)] if sm90 else []
    rows.append(check_candidate(c, "boxes", configs.for_boxes(size)))
    rows.append(check_candidate(c, "gather", configs.for_gather(size)))
    return _measured_first(rows, c.x.device, c)


def tail_candidates(t: Tail) -> list[Candidate]:
    """Return the candidates for a tail in order of preference, the measured one first. The last, separate kernels, can
    always run."""
    first = t.first
    arch, processors = arch_of(first.x.device), processors_of(first.x.device)
    config = configs.for_tail(arch, first.x.element_size(), first.rows, first.weight.shape[0], processors)
    sm90 = hopper.preferred_tail(first, processors) if gpu_of(first.x.device) else []
    rows = [check_candidate(t, k, hopper.SM90_TAIL_CONFIG if k == hopper.SM90_TAIL else None) for k in sm90]
    rows += [check_candidate(t, TRITON_TAIL, config), check_candidate(t, SEPARATE, None)]
    return _measured_first(rows, first.x.device, t)


def bottleneck_candidates(b: WholeBottleneck) -> list[Candidate]:
    """Return the candidates for a whole bottleneck: separate kernels (with fused tails), unless a table says that a
    kernel for the whole block was measured to be faster on this device. No heuristic prefers that kernel."""
    return _measured_first([check_candidate(b, SEPARATE, None)], b.device, b)


def _consecutive_tail(b: WholeBottleneck) -> tuple[Tail, Candidate]:
    """Return the tail of a block that an equal block follows, and the candidate that runs it."""
    t = Tail(b.middle, b.last, _with_input(b.first, _placeholder(b.last)))
    return t, _first_runnable(tail_candidates(t))[0]


def candidates_to_measure(problem: FusedProblem) -> Iterator[Candidate]:
    """Yield the candidates that can run the problem and may be worth measuring. The one that would run without a
    measurement comes first."""
    more: list[tuple[str, Config | None]]
    if isinstance(problem, WholeBottleneck):
        rows = bottleneck_candidates(problem)
        more = [(hopper.SM90_BOTTLENECK, hopper.SM90_BOTTLENECK_CONFIG)]
        if problem.last.second is None and _consecutive_tail(problem)[1].kernel != SEPARATE:
            more.insert(0, (CONSECUTIVE_TAILS, None))
    elif isinstance(problem, Tail):
        first = problem.first
        rows = tail_candidates(problem)
        found = configs.tail_configs(arch_of(first.x.device), first.x.element_size(), first.weight.shape[0])
        more = [(hopper.SM90_TAIL, hopper.SM90_TAIL_CONFIG), (hopper.SM90_PAIR, None)]
        more += [(TRITON_TAIL, config) for config in found]
    else:
        rows, size = convolution_candidates(problem), problem_size(problem)
        more = [("boxes", config) for config in configs.box_configs(size)]
        more += [("gather", config) for config in configs.gather_configs(size)]
        more += hopper.KERNELS.items()
    listed = {(candidate.kernel, candidate.config) for candidate in rows}
    rows += [check_candidate(problem, *pair) for pair in dict.fromkeys(more) if pair not in listed]
    return (candidate for candidate in rows if candidate.why_not is None)


def _empty(c: Convolution, device: torch.device) -> Tensor:
    return torch.empty(c.output_sizes, dtype=c.x.dtype, device=device, memory_format=torch.channels_last)


def _first_runnable(rows: list[Candidate]) -> tuple[Candidate, dict[str, str]]:
    """Return the first candidate that can run, and {kernel: reason} of those before it."""
    refused: dict[str, str] = {}
    for candidate in rows:
        if candidate.why_not is None:
            return candidate, refused
        refused[candidate.kernel] = candidate.why_not
    raise AssertionError(f"no kernel: {refused}")  # gather runs every convolution whose weight `pack` made


def launch_of(
    problem: FusedProblem,
    candidate: Candidate,
    y: Tensor,
    ahead: Tensor | None = None,
    refused: dict[str, str] | None = None,
) -> Launch:
    """Return the launch of a candidate that is one kernel and can run the problem.

    y: the output to be written. ahead: for a tail, the next block's first activation, to be written too. refused: for
    the record, the candidates that were preferred but cannot run.
    """
    assert candidate.config is not None
    made: Launch
    if isinstance(problem, WholeBottleneck):
        made = hopper.bottleneck_launch(problem, y)
    elif isinstance(problem, Tail):
        assert ahead is not None
        if candidate.kernel == hopper.SM90_TAIL:
            made = hopper.tail_launch(problem, y, ahead)
        else:
            made = tail.launch(problem, candidate.config, y, ahead)
    elif candidate.kernel in hopper.KERNELS:
        made = hopper.launch(problem, candidate.kernel, y)
    else:
        made = (boxes if candidate.kernel == "boxes" else gather).launch(problem, candidate.config, y)
    return dataclasses.replace(made, problem=problem, refused=refused or {})


def convolve(c: Convolution, refused: dict[str, str] | None = None, within: FusedProblem | None = None) -> Tensor:
    """Return the convolution's output, computed by the first candidate that can run.

    refused: for the record, candidates of a larger problem that cannot run. within: for the record, the larger problem
    that this convolution begins.
    """
    y = _empty(c, c.x.device)
    if y.numel():
        candidate, others = _first_runnable(convolution_candidates(c))
        made = launch_of(c, candidate, y, None, (refused or {}) | others)
        submit(dataclasses.replace(made, within=within))
    return y


def launch_candidate(problem: FusedProblem, candidate: Candidate) -> Launch:
    """Return the launch of a candidate that is one kernel, with newly allocated outputs."""
    if not isinstance(problem, Tail):
        return launch_of(problem, candidate, _empty(problem.parts[-1], problem.parts[0].x.device))
    y, ahead = (_empty(c, problem.first.x.device) for c in problem.parts[1:])
    return launch_of(problem, candidate, y, ahead)


def run_candidate(problem: FusedProblem, candidate: Candidate) -> list[Tensor]:
    """Run the problem by the candidate and return its outputs in order. Separate kernels run by their own candidates.

    Consecutive fused tails start at the block's second convolution: the previous block's tail has computed the first,
    whose output must be `middle.x`.
    """
    if isinstance(problem, Tail):
        if candidate.kernel != SEPARATE:
            return list(_run_tail(problem, candidate, {}))
        y = convolve(_with_input(problem.last, convolve(problem.first)))
        return [y, convolve(_with_input(problem.following, y))]
    if isinstance(problem, WholeBottleneck) and candidate.kernel == CONSECUTIVE_TAILS:
        return [_run_tail(*_consecutive_tail(problem), {})[0]]
    if isinstance(problem, Convolution) or candidate.kernel != SEPARATE:
        y = _empty(problem.parts[-1], problem.parts[0].x.device)
        submit(launch_of(problem, candidate, y))
        return [y]
    h = convolve(_with_input(problem.middle, convolve(problem.first)))
    return [convolve(_with_input(problem.last, h))]


def join_groups(weight: Tensor, groups: int) -> Tensor:
    """Return the weight (K, R, S, C/groups) with groups joined until they have JOINED input and output channels, and
    zeros between the joined groups."""
    K, R, S, C = weight.shape
    enough = (
        d
        for d in range(1, groups + 1)
        if groups % d == 0 and d * min(C, K // groups) >= JOINED and d * (K // groups) % JOINED == 0
    )
    joined = next(enough, groups)
    if joined == 1:
        return weight
    dense = weight.new_zeros((groups // joined, joined, K // groups, R, S, joined, C))
    each = weight.reshape(groups // joined, joined, K // groups, R, S, C)
    for i in range(joined):
        dense[:, i, :, :, :, i] = each[:, i]
    return dense.reshape(K, R, S, joined * C)


def pack(weight: Tensor, scale: Tensor | None, geometry: Geometry, keep: bool) -> Packed:
    """Return the weight as (K, R, S, C/groups). keep: the packed weight serves many calls, so the scale is multiplied
    into it."""
    shape = tuple(weight.shape)
    if keep and scale is not None:
        weight, scale = fold(weight, scale, weight.dtype), None
    nhwc = weight.permute(0, 2, 3, 1).contiguous()
    if nhwc.data_ptr() % 16:  # a view into a flat buffer of parameters; tensor descriptors need it aligned
        nhwc = nhwc.clone()
    return Packed(join_groups(nhwc, geometry.groups), scale, shape)


def _per_channel(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _pair(affine: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    return None if affine is None else (affine[0].float().contiguous(), affine[1].float().contiguous())


def _view(operand: Operand) -> Tensor:
    """Return the operand's tensor, subsampled, with adjacent channels. Its affine and ReLU are not applied."""
    s = operand.stride
    t = operand.tensor[:, :, ::s, ::s]
    return t if channels_last_strides(t) else t.contiguous(memory_format=torch.channels_last)


def _value(operand: Operand) -> Tensor:
    """Return the operand's value, materialized by a pass if the operand is lazy."""
    if operand.affine is None and not operand.relu:
        return _view(operand)
    return bn_pass(operand, Epilogue(), None)[0]


def _packed(p: Product, keep: bool) -> Packed:
    if isinstance(p.weight, Packed):
        return p.weight
    return pack(p.weight, p.scale, p.geometry, keep)


def why_not_here(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot run on the device, or None."""
    expected = expected_device()
    if device.type != expected:
        hint = " (with TRITON_INTERPRET=1 it runs on CPUs, slowly)" if device.type == "cpu" else ""
        return f"expected tensors on {expected}, got {device}{hint}"
    if expected == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"expected a GPU from sm_80, got sm_{major}{minor}"
    if INTERPRETING and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return f"Triton's interpreter fails on numpy 2.4 and newer, got {np.__version__}"
    if INTERPRETING and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return None


def conv(products: Sequence[Product], epilogue: Epilogue) -> Tensor:
    """Return the epilogue of the sum of one or two products. See `contract.Backend.conv`."""
    check_conv(products, epilogue)
    if len(products) > 2:
        raise ValueError(f"conv: expected one or two products, got {len(products)}")
    first, second = products[0], products[1] if len(products) > 1 else None
    weight, scale, shape = _packed(first, keep=False)
    x = _view(first.operand)
    lazy = None
    if first.operand.affine is not None or first.operand.relu:
        ones = torch.ones(x.shape[1], device=x.device)
        lazy = (*(_pair(first.operand.affine) or (ones, torch.zeros_like(ones))), first.operand.relu)
    c = Convolution(
        x,
        weight,
        first.geometry._replace(groups=x.shape[1] // weight.shape[3]),
        _per_channel(scale),
        _per_channel(epilogue.shift),
        lazy,
        None if second is None else _second_product(second),
        None if epilogue.residual is None else _value(epilogue.residual),
        epilogue.relu,
        weight.shape[3] // shape[1],
    )
    return convolve(c)


def _second_product(p: Product) -> tuple[Tensor, Tensor]:
    """Return (operand, weight) of a 1x1 product: the operand subsampled, the weight with the scale multiplied in."""
    packed = _packed(p, keep=True)
    weight = packed.weight
    if packed.scale is not None:  # packed for few calls; but the sum of two products has one scale, the first product's
        weight = fold(weight, packed.scale, weight.dtype)
    s = p.geometry.stride
    return _value(p.operand)[:, :, ::s, ::s], weight


def residual_blocks(x: Tensor, blocks: Sequence[PackedBlock]) -> Tensor:
    """Return the output of consecutive blocks. A block's tail and the next block's first convolution share a kernel
    if they fit one."""
    x = _view(Operand(x))
    ahead = None
    chains = [_chain(block) for block in blocks]
    for i, (block, chain) in enumerate(zip(blocks, chains, strict=True)):
        following = None
        if i + 1 < len(blocks) and len(chains[i + 1]) > 1:
            if not _next_runs_whole(x, chain, blocks[i + 1], chains[i + 1]):
                following = chains[i + 1][0]
        x, ahead = _run_block(x, block, chain, ahead, following)
    return x


def _chain(block: PackedBlock) -> list[Convolution]:
    """Return the block's convolutions without the projection. Their x is an empty placeholder."""
    chain = []
    # The last weight may be the projection's, which has no shift: zip ends before it.
    for (weight, scale, shape), shift, geometry in zip(block.weights, block.shifts, block.geometries, strict=False):
        nothing = torch.empty((0, shape[1] * geometry.groups, 1, 1), device="meta")
        g = geometry._replace(groups=nothing.shape[1] // weight.shape[3])
        c = Convolution(nothing, weight, g, _per_channel(scale), _per_channel(shift), relu=True)
        chain.append(dataclasses.replace(c, joined=weight.shape[3] // shape[1]))
    return chain


def _with_input(c: Convolution, x: Tensor) -> Convolution:
    return dataclasses.replace(c, x=x)


def _placeholder(c: Convolution) -> Tensor:
    """Return a meta tensor with the sizes, dtype and layout of c's output."""
    return torch.empty(c.output_sizes, dtype=c.x.dtype, device="meta", memory_format=torch.channels_last)


def _last_with_shortcut(x: Tensor, block: PackedBlock, chain: list[Convolution]) -> Convolution:
    """Return the block's last convolution with the shortcut of x: a second product or a residual."""
    if block.shortcut == "projection":
        projection = Product(Operand(x), block.weights[-1], block.geometries[-1])
        return dataclasses.replace(chain[-1], second=_second_product(projection))
    s = math.prod([c.geometry.stride for c in chain])
    return dataclasses.replace(chain[-1], residual=x[:, :, ::s, ::s])


def _has_whole_kernel(block: PackedBlock) -> bool:
    """Whether a kernel for whole blocks exists for these weights, with their scales multiplied in."""
    shapes = tuple(tuple(w.shape) for w in block.weights)
    return shapes == hopper.BOTTLENECK_SHAPES.get(block.shortcut) and all(w.scale is None for w in block.weights)


def _whole_bottleneck(chain: list[Convolution], x: Tensor, last: Convolution) -> WholeBottleneck:
    first = _with_input(chain[0], x)
    middle = _with_input(chain[1], _placeholder(first))
    return WholeBottleneck(first, middle, _with_input(last, _placeholder(middle)))


def _next_runs_whole(x: Tensor, chain: list[Convolution], following: PackedBlock, its_chain: list[Convolution]) -> bool:
    """Whether the block that follows `chain` runs as one kernel. x: the input of `chain`."""
    if not _has_whole_kernel(following):
        return False
    for c in chain:
        x = _placeholder(_with_input(c, x))
    problem = _whole_bottleneck(its_chain, x, _last_with_shortcut(x, following, its_chain))
    return _first_runnable(bottleneck_candidates(problem))[0].kernel == hopper.SM90_BOTTLENECK


def _run_block(
    x: Tensor, block: PackedBlock, chain: list[Convolution], ahead: Tensor | None, following: Convolution | None
) -> tuple[Tensor, Tensor | None]:
    """Return (y, the next block's first activation if its convolution `following` ran in this block's tail, else None).

    ahead: the output of this block's first convolution, if the previous block's tail computed it.
    """
    last = _last_with_shortcut(x, block, chain)
    h = x
    refused: dict[str, str] = {}
    whole = _whole_bottleneck(chain, x, last) if ahead is None and _has_whole_kernel(block) else None
    if whole is not None:
        candidate, refused = _first_runnable(bottleneck_candidates(whole))
        if candidate.kernel == hopper.SM90_BOTTLENECK:
            y = _empty(whole.last, x.device)
            if y.numel():
                submit(launch_of(whole, candidate, y))
            return y, None
    within: FusedProblem | None = whole
    for i, c in enumerate(chain[:-1]):
        if i == 0 and ahead is not None:
            h = ahead
            continue
        c = _with_input(c, h)
        if i == len(chain) - 2 and i > 0 and following is not None:
            after = _with_input(last, _placeholder(c))
            t = Tail(c, after, _with_input(following, _placeholder(after)))
            candidate, refused = _first_runnable(tail_candidates(t))
            if candidate.kernel != SEPARATE:
                return _run_tail(t, candidate, refused)
            within = t
        h = convolve(c, refused, within)
        within = None
    return convolve(_with_input(last, h), refused), None


def _run_tail(t: Tail, candidate: Candidate, refused: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Run a fused tail and return (y, the next block's first activation)."""
    y, ahead = (_empty(c, t.first.x.device) for c in t.parts[1:])
    if candidate.kernel == hopper.SM90_PAIR:
        h = convolve(t.first, refused)
        if y.numel():
            submit(hopper.pair_launch(t, h, y, ahead))
    elif y.numel():
        submit(launch_of(t, candidate, y, ahead, refused))
    return y, ahead


def bn_pass(x: Operand, epilogue: Epilogue, pool: Pool | None) -> tuple[Tensor, Tensor | None]:
    """Return (the result, its `Pooled.winners` or None if they were not requested)."""
    t = _view(x)
    residual = None if epilogue.residual is None else _value(epilogue.residual)
    pool = pool or Pool(1, 1, 0)
    N, C, H, W = t.shape
    g = Geometry(pool.stride, pool.padding)
    y = torch.empty(
        (N, C, g.output_size(H, pool.kernel), g.output_size(W, pool.kernel)),
        dtype=t.dtype,
        device=t.device,
        memory_format=torch.channels_last,
    )
    winners = torch.empty_like(y, dtype=torch.uint8) if epilogue.reduce == "winners" else None
    if y.numel():
        pair, shift = _pair(x.affine), _per_channel(epilogue.shift)
        submit(pooling.launch(t, y, pair, x.relu, shift, residual, epilogue.relu, pool, winners))
    return y, winners


def stem_channels(weight: tuple[int, ...], geometry: Geometry, pool: Pool) -> int:
    """Return the channels that the stem's input must have: with the fused kernel, zeros follow the image's channels."""
    channels = weight[1] * geometry.groups
    return channels if conv_pool.why_not(weight, geometry, pool) else conv_pool.CHANNELS


def pack_stem(weight: Tensor, scale: Tensor, geometry: Geometry, pool: Pool) -> Packed:
    if conv_pool.why_not(tuple(weight.shape), geometry, pool):
        return pack(weight, scale, geometry, keep=True)
    return Packed(conv_pool.pack(fold(weight, scale, weight.dtype)), None, tuple(weight.shape))


def stem(x: Tensor, weight: Packed, shift: Tensor, geometry: Geometry, pool: Pool) -> Tensor:
    """Return max_pool(relu(conv(x, weight) + shift)), in one kernel if possible."""
    packed, scale, shape = weight
    if conv_pool.why_not(shape, geometry, pool):
        g = geometry._replace(groups=x.shape[1] // packed.shape[3])
        c = Convolution(_view(Operand(x)), packed, g, _per_channel(scale), _per_channel(shift))
        return bn_pass(Operand(convolve(c)), Epilogue(relu=True), pool)[0]
    K, _, R, S = shape
    pooled = Geometry(pool.stride, pool.padding)
    P, Q = (geometry.output_size(n, k) for n, k in ((x.shape[2], R), (x.shape[3], S)))
    sizes = (x.shape[0], K, pooled.output_size(P, pool.kernel), pooled.output_size(Q, pool.kernel))
    y = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel():
        shift = shift.float().contiguous()
        reason = hopper.why_not_stem(x, shape, geometry, arch_of(x.device))
        if reason is None:
            submit(hopper.stem_launch(x, packed, shift, y))
        else:
            made = conv_pool.launch(x, packed, shift, geometry, y, S)
            submit(dataclasses.replace(made, refused={"sm90.stem": reason}))
    return y
