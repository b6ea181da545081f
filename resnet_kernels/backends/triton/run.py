"""From the contract's calls to launches: which kernel, with which configuration, on what."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import Epilogue, Geometry, Operand, Packed, Pool, Product, check_conv, fold
from . import boxes, configs, gather, passes, tail
from . import stem as stem_kernel
from .configs import Config
from .convolution import Convolution, channels_last_strides
from .launch import INTERPRETING, Launch, arch_of, processors_of, submit

__all__ = ["INTERPRETING", "arch_of", "bn_pass", "conv", "pack", "residual_block", "stem"]

# Channels that groups are joined to, input and output: the least that fills a matrix tile.
JOINED = 32


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel that may run a convolution, with its configuration, or why not."""

    kernel: str
    config: Config
    why_not: str | None


def choices(c: Convolution) -> list[Choice]:
    """In order of preference."""
    arch, processors = arch_of(c.x.device), processors_of(c.x.device)
    K, R, S, C = c.weight.shape
    sizes = (arch, c.x.element_size(), c.rows, K, C, R * S, K // c.geometry.groups, processors)
    by_boxes, by_gather = configs.for_boxes(*sizes), configs.for_gather(*sizes)
    return [
        Choice("boxes", by_boxes, boxes.why_not(c, arch, by_boxes)),
        Choice("gather", by_gather, gather.why_not(c, by_gather)),
    ]


def _empty(c: Convolution) -> Tensor:
    return torch.empty(c.output_sizes, dtype=c.x.dtype, device=c.x.device, memory_format=torch.channels_last)


def plan(c: Convolution, y: Tensor) -> Launch:
    """The launch of the first kernel that may run."""
    for choice in choices(c):
        if choice.why_not is None:
            return (boxes if choice.kernel == "boxes" else gather).launch(c, choice.config, y)
    raise AssertionError(f"no kernel for {c}")  # gather refuses nothing that `pack` made


def convolve(c: Convolution) -> Tensor:
    y = _empty(c)
    if y.numel():
        submit(plan(c, y))
    return y


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
    return Packed(join_groups(nhwc, geometry.groups), scale, shape)


def _per_channel(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _view(operand: Operand) -> Tensor:
    """The operand's tensor, subsampled, with its channels next to each other."""
    s = operand.stride
    t = operand.tensor[:, :, ::s, ::s]
    return t if channels_last_strides(t) else t.contiguous(memory_format=torch.channels_last)


def _value(operand: Operand) -> Tensor:
    """What the operand stands for, written to memory if it is lazy."""
    if operand.affine is None and not operand.relu:
        return _view(operand)
    return bn_pass(dataclasses.replace(operand, relu=False), Epilogue(relu=operand.relu), None)


def _packed(p: Product, keep: bool) -> Packed:
    if isinstance(p.weight, Packed):
        # A second product's scale goes into its weight even if it was packed without.
        return p.weight
    return pack(p.weight, p.scale, p.geometry, keep)


def conv(products: Sequence[Product], epilogue: Epilogue) -> Tensor:
    check_conv(products, epilogue)
    if len(products) > 2:
        raise ValueError(f"conv: expected one or two products, got {len(products)}")
    first, second = products[0], products[1] if len(products) > 1 else None
    weight, scale, _ = _packed(first, keep=False)
    x = _view(first.operand)
    lazy = None
    if first.operand.affine is not None or first.operand.relu:
        ones = torch.ones(x.shape[1], device=x.device)
        a, b = first.operand.affine or (ones, torch.zeros_like(ones))
        lazy = (_per_channel(a), _per_channel(b), first.operand.relu)
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
    )
    return convolve(c)


def _second(p: Product) -> tuple[Tensor, Tensor]:
    """A 1x1 product's operand as it is sampled, and its weight with the scale multiplied in."""
    packed = _packed(p, keep=True)
    weight = packed.weight
    if packed.scale is not None:
        weight = fold(weight, packed.scale, weight.dtype)
    s = p.geometry.stride
    return _value(p.operand)[:, :, ::s, ::s], weight


def residual_block(
    x: Tensor, weights: Sequence[Packed], shifts: Sequence[Tensor], geometries: Sequence[Geometry], shortcut: str
) -> Tensor:
    x = _view(Operand(x))
    last = len(weights) - (2 if shortcut == "projection" else 1)
    chain: list[Convolution] = []
    h = x
    for i in range(last + 1):
        weight, scale, _ = weights[i]
        geometry = geometries[i]._replace(groups=h.shape[1] // weight.shape[3])
        c = Convolution(h, weight, geometry, _per_channel(scale), _per_channel(shifts[i]), relu=True)
        chain.append(c)
        # What the next one reads: known by its sizes until it is clear that it must exist.
        h = torch.empty(c.output_sizes, dtype=x.dtype, device="meta", memory_format=torch.channels_last)
    if shortcut == "projection":
        projection = Product(Operand(x), weights[-1], geometries[-1])
        shift = _per_channel(shifts[last] + shifts[-1])
        chain[-1] = dataclasses.replace(chain[-1], second=_second(projection), shift=shift)
    else:
        stride = 1
        for g in geometries:
            stride *= g.stride
        chain[-1] = dataclasses.replace(chain[-1], residual=x[:, :, ::stride, ::stride])
    y = x
    for i, c in enumerate(chain):
        c = dataclasses.replace(c, x=y) if i else c
        if i == last - 1 and last >= 2:
            fused = _tail(c, chain[last])
            if fused is not None:
                return fused
        y = convolve(c)
    return y


def tail_choice(first: Convolution, last: Convolution) -> Choice:
    J = first.weight.shape[0]
    arch = arch_of(first.x.device)
    config = configs.for_tail(arch, first.x.element_size(), first.rows, J, processors_of(first.x.device))
    return Choice("conv3x3_conv1x1", config, tail.why_not(first, last, arch, config))


def _tail(first: Convolution, last: Convolution) -> Tensor | None:
    """Both convolutions by one kernel, or None where that is not possible."""
    choice = tail_choice(first, last)
    if choice.why_not is not None:
        return None
    y = torch.empty(last.output_sizes, dtype=first.x.dtype, device=first.x.device, memory_format=torch.channels_last)
    if y.numel():
        submit(tail.launch(first, last, choice.config, y))
    return y


def bn_pass(x: Operand, epilogue: Epilogue, pool: Pool | None) -> Tensor:
    t = _view(x)
    scale, shift = (_per_channel(p) for p in x.affine or (None, None))
    if epilogue.shift is not None:
        shift = epilogue.shift.float() if shift is None else shift + epilogue.shift.float()
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
    if y.numel():
        submit(passes.launch(t, y, scale, shift, residual, epilogue.relu, pool))
    return y


def stem(x: Tensor, weight: Packed, shift: Tensor, geometry: Geometry, pool: Pool) -> Tensor:
    K, _, R, S = weight.shape
    nhwc, scale, _ = weight
    reason = stem_kernel.why_not(nhwc.permute(0, 3, 1, 2), geometry, pool)
    if reason:
        c = Convolution(_view(Operand(x)), nhwc, geometry, _per_channel(scale), _per_channel(shift))
        return bn_pass(Operand(convolve(c)), Epilogue(relu=True), pool)
    x = stem_kernel.pad_channels(x)
    P, Q = geometry.output_size(x.shape[2], R), geometry.output_size(x.shape[3], S)
    pooled = Geometry(pool.stride, pool.padding)
    sizes = (x.shape[0], K, pooled.output_size(P, pool.kernel), pooled.output_size(Q, pool.kernel))
    y = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel():
        packed = stem_kernel.pack(nhwc.permute(0, 3, 1, 2))
        submit(stem_kernel.launch(x, packed, _per_channel(scale), _per_channel(shift), geometry, y, S))
    return y
