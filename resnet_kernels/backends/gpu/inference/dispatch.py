"""From the contract's calls to launches: which kernel, with which configuration, on what."""

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
from .tail import Tail

__all__ = ["bn_pass", "conv", "pack", "pack_stem", "residual_blocks", "stem", "stem_channels", "why_not_here"]

# The ways of a tail: as kernels of its own, and as one, with the next block's first convolution. Alone, without that,
# Triton 3.6 does not compile it for sm_90.
SEPARATE, TAIL = "separate kernels", "conv3x3_conv1x1 with the next 1x1"

# Of a whole block: in a row of such, each one's end with the next one's beginning, by its tail's own choice.
IN_A_ROW = "a tail a block"

# Channels that groups are joined to, input and output: the least that fills a matrix tile.
JOINED = 32


Problem = Convolution | Tail | hopper.Whole


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way that may run a problem, with its configuration (None: of several kernels), or why not."""

    kernel: str
    config: Config | None
    why_not: str | None = None


def _measured_first(rows: list[Choice], device: torch.device, problem: Problem) -> list[Choice]:
    found = measured_choice(device, problem)
    if found is None:
        return rows
    try:
        config = None if found["config"] is None else configs.parse(found["config"])
    except (KeyError, ValueError) as error:
        warnings.warn(f"a table's choice for {problem.key} is ignored: {error!r}", stacklevel=2)
        return rows
    return [judge(problem, found["kernel"], config), *rows]


def judge(problem: Problem, kernel: str, config: Config | None) -> Choice:
    """Whether the kernel may run the problem so."""
    if config is None and kernel == hopper.PAIR and isinstance(problem, Tail):
        return Choice(kernel, config, hopper.why_not_pair(problem, arch_of(problem.first.x.device)))
    if config is None and kernel == IN_A_ROW and isinstance(problem, hopper.Whole):
        projects = problem.last.second is not None
        return Choice(kernel, config, "expected the identity: no tail has a projection" if projects else None)
    if config is None:
        known = kernel == SEPARATE and not isinstance(problem, Convolution)
        return Choice(kernel, config, None if known else f"unknown: {kernel}")
    if isinstance(problem, hopper.Whole):
        if (kernel, config) != (hopper.WHOLE, hopper.WHOLE_CONFIG):
            return Choice(kernel, config, f"unknown: {kernel}")
        return Choice(kernel, config, hopper.why_not_whole(problem, arch_of(problem.device)))
    if isinstance(problem, Tail):
        first, last, following = problem.first, problem.last, problem.following
        if kernel == hopper.TAIL:
            known = config == hopper.TAIL_CONFIG
            reason = hopper.why_not_tail(problem, arch_of(first.x.device)) if known else f"not as {kernel} is built"
            return Choice(kernel, config, reason)
        if kernel != TAIL:
            return Choice(kernel, config, f"unknown: {kernel}")
        arch, processors = arch_of(first.x.device), processors_of(first.x.device)
        reason = tail.why_not(first, last, arch, config, processors)
        reason = reason or tail.why_not_after(following)
        return Choice(kernel, config, reason)
    if kernel in hopper.KERNELS:
        known = config == hopper.KERNELS[kernel]
        reason = hopper.why_not(problem, arch_of(problem.x.device)) if known else f"not as {kernel} is built"
        return Choice(kernel, config, reason)
    if kernel == "boxes":
        return Choice(kernel, config, boxes.why_not(problem, arch_of(problem.x.device), config))
    return Choice(kernel, config, gather.why_not(problem, config) if kernel == "gather" else f"unknown: {kernel}")


def size_of(c: Convolution) -> configs.Size:
    """What the rules of configs.py look at."""
    K, R, S, C = c.weight.shape
    itemsize, device = c.x.element_size(), c.x.device
    return configs.Size(
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


def choices(c: Convolution) -> list[Choice]:
    """In order of preference; what was measured on this device first."""
    size = size_of(c)
    native_way = hopper.preferred(size) if gpu_of(c.x.device) else None
    rows = [judge(c, *native_way)] if native_way else []
    rows += [judge(c, "boxes", configs.for_boxes(size)), judge(c, "gather", configs.for_gather(size))]
    return _measured_first(rows, c.x.device, c)


def tail_choices(t: Tail) -> list[Choice]:
    """In order of preference; what was measured on this device first. The last is always possible."""
    first = t.first
    arch, processors = arch_of(first.x.device), processors_of(first.x.device)
    config = configs.for_tail(arch, first.x.element_size(), first.rows, first.weight.shape[0], processors)
    ways = hopper.preferred_tail(first, processors) if gpu_of(first.x.device) else []
    rows = [judge(t, way, hopper.TAIL_CONFIG if way == hopper.TAIL else None) for way in ways]
    rows += [judge(t, TAIL, config), judge(t, SEPARATE, None)]
    return _measured_first(rows, first.x.device, t)


def whole_choices(w: hopper.Whole) -> list[Choice]:
    """Separate kernels and tails, unless the whole one was measured to be faster here: no GPU has proved it."""
    return _measured_first([judge(w, SEPARATE, None)], w.device, w)


def _in_a_row(w: hopper.Whole) -> tuple[Tail, Choice]:
    """Its tail with what follows as the block itself begins, and how that would run."""
    t = Tail(w.middle, w.last, _given(w.first, _later(w.last)))
    return t, _first_possible(tail_choices(t))[0]


def candidates(problem: Problem) -> Iterator[Choice]:
    """Ways to run the problem that may be worth measuring, those chosen without a measurement first."""
    more: list[tuple[str, Config | None]]
    if isinstance(problem, hopper.Whole):
        rows, more = whole_choices(problem), [(hopper.WHOLE, hopper.WHOLE_CONFIG)]
        if problem.last.second is None and _in_a_row(problem)[1].kernel != SEPARATE:
            more.insert(0, (IN_A_ROW, None))
    elif isinstance(problem, Tail):
        first = problem.first
        rows = tail_choices(problem)
        found = configs.tail_candidates(arch_of(first.x.device), first.x.element_size(), first.weight.shape[0])
        more = [(hopper.TAIL, hopper.TAIL_CONFIG), (hopper.PAIR, None), *((TAIL, config) for config in found)]
    else:
        rows, size = choices(problem), size_of(problem)
        more = [("boxes", config) for config in configs.box_candidates(size)]
        more += [("gather", config) for config in configs.gather_candidates(size)]
        more += hopper.KERNELS.items()
    known = {(choice.kernel, choice.config) for choice in rows}
    rows += [judge(problem, *way) for way in dict.fromkeys(more) if way not in known]
    return (choice for choice in rows if choice.why_not is None)


def _empty(c: Convolution, device: torch.device) -> Tensor:
    return torch.empty(c.output_sizes, dtype=c.x.dtype, device=device, memory_format=torch.channels_last)


def _first_possible(rows: list[Choice]) -> tuple[Choice, dict[str, str]]:
    """The first way that may run, and why those before it may not."""
    refused: dict[str, str] = {}
    for choice in rows:
        if choice.why_not is None:
            return choice, refused
        refused[choice.kernel] = choice.why_not
    raise AssertionError(f"no kernel: {refused}")  # gather refuses nothing that `pack` made


def launch_of(
    problem: Problem,
    choice: Choice,
    y: Tensor,
    ahead: Tensor | None = None,
    refused: dict[str, str] | None = None,
) -> Launch:
    """One way's. y and, for what follows a tail, ahead are to be written. Only where `choice.why_not` is None."""
    assert choice.config is not None
    made: Launch
    if isinstance(problem, hopper.Whole):
        made = hopper.whole_launch(problem, y)
    elif isinstance(problem, Tail):
        assert ahead is not None
        if choice.kernel == hopper.TAIL:
            made = hopper.tail_launch(problem, y, ahead)
        else:
            made = tail.launch(problem, choice.config, y, ahead)
    elif choice.kernel in hopper.KERNELS:
        made = hopper.launch(problem, choice.kernel, y)
    else:
        made = (boxes if choice.kernel == "boxes" else gather).launch(problem, choice.config, y)
    return dataclasses.replace(made, problem=problem, refused=refused or {})


def convolve(c: Convolution, refused: dict[str, str] | None = None, within: Problem | None = None) -> Tensor:
    """refused: what was considered instead, and within: what it begins, for the record."""
    y = _empty(c, c.x.device)
    if y.numel():
        choice, others = _first_possible(choices(c))
        made = launch_of(c, choice, y, None, (refused or {}) | others)
        submit(dataclasses.replace(made, within=within))
    return y


def launch_so(problem: Problem, choice: Choice) -> Launch:
    """What the choice, which is no separate kernels', launches."""
    if not isinstance(problem, Tail):
        return launch_of(problem, choice, _empty(problem.parts[-1], problem.parts[0].x.device))
    y, ahead = (_empty(c, problem.first.x.device) for c in problem.parts[1:])
    return launch_of(problem, choice, y, ahead)


def run_so(problem: Problem, choice: Choice) -> list[Tensor]:
    """The problem's results, one after the other, by the choice; kernels beside it as they are chosen. In a row what a
    whole block's first convolution makes is there, as x of its second."""
    if isinstance(problem, Tail):
        if choice.kernel != SEPARATE:
            return list(_tail(problem, choice, {}))
        y = convolve(_given(problem.last, convolve(problem.first)))
        return [y, convolve(_given(problem.following, y))]
    if isinstance(problem, hopper.Whole) and choice.kernel == IN_A_ROW:
        return [_tail(*_in_a_row(problem), {})[0]]
    if isinstance(problem, Convolution) or choice.kernel != SEPARATE:
        y = _empty(problem.parts[-1], problem.parts[0].x.device)
        submit(launch_of(problem, choice, y))
        return [y]
    h = convolve(_given(problem.middle, convolve(problem.first)))
    return [convolve(_given(problem.last, h))]


def join_groups(weight: Tensor, groups: int) -> Tensor:
    """(K, R, S, C/groups) with groups joined until they have JOINED channels, zeros between them."""
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
    """The weight as (K, R, S, C/groups). keep: it will be used often, so the scale is multiplied in."""
    shape = tuple(weight.shape)
    if keep and scale is not None:
        weight, scale = fold(weight, scale, weight.dtype), None
    nhwc = weight.permute(0, 2, 3, 1).contiguous()
    if nhwc.data_ptr() % 16:  # a view into a flat buffer of parameters; descriptors want it aligned
        nhwc = nhwc.clone()
    return Packed(join_groups(nhwc, geometry.groups), scale, shape)


def _per_channel(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _pair(affine: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    return None if affine is None else (affine[0].float().contiguous(), affine[1].float().contiguous())


def _view(operand: Operand) -> Tensor:
    """The operand's tensor, subsampled, with its channels next to each other."""
    s = operand.stride
    t = operand.tensor[:, :, ::s, ::s]
    return t if channels_last_strides(t) else t.contiguous(memory_format=torch.channels_last)


def _value(operand: Operand) -> Tensor:
    """What the operand stands for, written to memory if it is lazy."""
    if operand.affine is None and not operand.relu:
        return _view(operand)
    return bn_pass(operand, Epilogue(), None)[0]


def _packed(p: Product, keep: bool) -> Packed:
    if isinstance(p.weight, Packed):
        return p.weight
    return pack(p.weight, p.scale, p.geometry, keep)


def why_not_here(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels cannot run on the device, or None."""
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
        None if second is None else _second(second),
        None if epilogue.residual is None else _value(epilogue.residual),
        epilogue.relu,
        weight.shape[3] // shape[1],
    )
    return convolve(c)


def _second(p: Product) -> tuple[Tensor, Tensor]:
    """A 1x1 product's operand as it is sampled, and its weight with the scale multiplied in."""
    packed = _packed(p, keep=True)
    weight = packed.weight
    if packed.scale is not None:  # packed for few calls: the sum of two products has one scale only
        weight = fold(weight, packed.scale, weight.dtype)
    s = p.geometry.stride
    return _value(p.operand)[:, :, ::s, ::s], weight


def residual_blocks(x: Tensor, blocks: Sequence[PackedBlock]) -> Tensor:
    """Blocks one after the other. Where the end of one and the first convolution of the next fit a kernel, they share
    it."""
    x = _view(Operand(x))
    ahead = None
    chains = [_chain(block) for block in blocks]
    for i, (block, chain) in enumerate(zip(blocks, chains, strict=True)):
        following = None
        if i + 1 < len(blocks) and len(chains[i + 1]) > 1:
            if not _runs_whole(x, chain, blocks[i + 1], chains[i + 1]):
                following = chains[i + 1][0]
        x, ahead = _run_block(x, block, chain, ahead, following)
    return x


def _chain(block: PackedBlock) -> list[Convolution]:
    """The chain's convolutions, of operands that are not there yet."""
    chain = []
    # There are no shifts for the projection.
    for (weight, scale, shape), shift, geometry in zip(block.weights, block.shifts, block.geometries, strict=False):
        nothing = torch.empty((0, shape[1] * geometry.groups, 1, 1), device="meta")
        g = geometry._replace(groups=nothing.shape[1] // weight.shape[3])
        c = Convolution(nothing, weight, g, _per_channel(scale), _per_channel(shift), relu=True)
        chain.append(dataclasses.replace(c, joined=weight.shape[3] // shape[1]))
    return chain


def _given(c: Convolution, x: Tensor) -> Convolution:
    return dataclasses.replace(c, x=x)


def _later(c: Convolution) -> Tensor:
    """What c would write, known by its sizes."""
    return torch.empty(c.output_sizes, dtype=c.x.dtype, device="meta", memory_format=torch.channels_last)


def _last(x: Tensor, block: PackedBlock, chain: list[Convolution]) -> Convolution:
    """The chain's last convolution with what is added to it."""
    if block.shortcut == "projection":
        projection = Product(Operand(x), block.weights[-1], block.geometries[-1])
        return dataclasses.replace(chain[-1], second=_second(projection))
    s = math.prod([c.geometry.stride for c in chain])
    return dataclasses.replace(chain[-1], residual=x[:, :, ::s, ::s])


def _has_whole(block: PackedBlock) -> bool:
    """Whether there is a kernel for blocks of such weights, their scales multiplied in."""
    shapes = tuple(tuple(w.shape) for w in block.weights)
    return shapes == hopper.WHOLES.get(block.shortcut) and all(w.scale is None for w in block.weights)


def _whole(chain: list[Convolution], x: Tensor, last: Convolution) -> hopper.Whole:
    first = _given(chain[0], x)
    middle = _given(chain[1], _later(first))
    return hopper.Whole(first, middle, _given(last, _later(middle)))


def _runs_whole(x: Tensor, before: list[Convolution], block: PackedBlock, chain: list[Convolution]) -> bool:
    """Whether the block runs as one kernel behind one that makes its x of this."""
    if not _has_whole(block):
        return False
    for c in before:
        x = _later(_given(c, x))
    return _first_possible(whole_choices(_whole(chain, x, _last(x, block, chain))))[0].kernel == hopper.WHOLE


def _run_block(
    x: Tensor, block: PackedBlock, chain: list[Convolution], ahead: Tensor | None, following: Convolution | None
) -> tuple[Tensor, Tensor | None]:
    """(y, what `following` makes of y or None). ahead: what the first convolution makes of x, if that is there."""
    last = _last(x, block, chain)
    h = x
    refused: dict[str, str] = {}
    whole = _whole(chain, x, last) if ahead is None and _has_whole(block) else None
    if whole is not None:
        choice, refused = _first_possible(whole_choices(whole))
        if choice.kernel == hopper.WHOLE:
            y = _empty(whole.last, x.device)
            if y.numel():
                submit(launch_of(whole, choice, y))
            return y, None
    within: Problem | None = whole
    for i, c in enumerate(chain[:-1]):
        if i == 0 and ahead is not None:
            h = ahead
            continue
        c = _given(c, h)
        if i == len(chain) - 2 and i > 0 and following is not None:
            behind = _given(last, _later(c))
            t = Tail(c, behind, _given(following, _later(behind)))
            choice, refused = _first_possible(tail_choices(t))
            if choice.kernel != SEPARATE:
                return _tail(t, choice, refused)
            within = t
        h = convolve(c, refused, within)
        within = None
    return convolve(_given(last, h), refused), None


def _tail(t: Tail, choice: Choice, refused: dict[str, str]) -> tuple[Tensor, Tensor]:
    y, ahead = (_empty(c, t.first.x.device) for c in t.parts[1:])
    if choice.kernel == hopper.PAIR:
        h = convolve(t.first, refused)
        if y.numel():
            submit(hopper.pair_launch(t, h, y, ahead))
    elif y.numel():
        submit(launch_of(t, choice, y, ahead, refused))
    return y, ahead


def bn_pass(x: Operand, epilogue: Epilogue, pool: Pool | None) -> tuple[Tensor, Tensor | None]:
    """(the result, its `Pooled.winners` if that was asked for)."""
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
    channels = weight[1] * geometry.groups
    return channels if conv_pool.why_not(weight, geometry, pool) else conv_pool.CHANNELS


def pack_stem(weight: Tensor, scale: Tensor, geometry: Geometry, pool: Pool) -> Packed:
    if conv_pool.why_not(tuple(weight.shape), geometry, pool):
        return pack(weight, scale, geometry, keep=True)
    return Packed(conv_pool.pack(fold(weight, scale, weight.dtype)), None, tuple(weight.shape))


def stem(x: Tensor, weight: Packed, shift: Tensor, geometry: Geometry, pool: Pool) -> Tensor:
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
