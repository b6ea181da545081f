"""Convolutions with what training asks for beyond inference: by the kernel of products.py where they are products of
rows, else by torch's library (cuDNN on a GPU), their operands computed before and the epilogue a pass behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...contract import Epilogue, Geometry, Normalized, Operand, Packed, Product, Stats, call_of, check_conv, fold
from ..inference import dispatch
from ..launch import note_library, submit
from . import reductions
from .products import Rows, config_of, launch, merge

# What a convolution may ask for and still be inference's.
INFERENCE = frozenset({"conv", "residual", "two_products", "lazy"})


def mask_size(sizes: Sequence[int]) -> tuple[int, int]:
    """(N*P*Q, ceil(K/8)): bit j of byte b tells of channel 8b + j whether not (result <= 0)."""
    N, K, P, Q = sizes
    return N * P * Q, -(-K // 8)


def materialize(operand: Operand, kernel: int) -> Operand:
    """Products of rows apply what an operand holds while loading it."""
    return operand if kernel == 1 or operand.plain else Operand(reductions.computed(operand))


def conv(products: Sequence[Product], epilogue: Epilogue) -> tuple[Tensor, Any]:
    sizes = check_conv(products, epilogue)
    if _of_inference(products, epilogue):
        return dispatch.conv(products, epilogue), None
    if 0 in sizes:
        nothing = Operand(_empty(products[0].operand.tensor, sizes))
        return reductions.bn_pass(nothing, Epilogue(reduce=epilogue.reduce))
    if len(products) <= 2 and all(map(_of_rows, products)):
        return _by_rows(products, epilogue, sizes)
    terms = [_by_library(p) for p in products]
    if epilogue.residual is not None:
        terms.append(epilogue.residual)
    t, *more = terms
    if not more and t.plain and epilogue == Epilogue(reduce=epilogue.reduce) and epilogue.reduce != "mask":
        return t.tensor, None if epilogue.reduce is None else reductions.reduce(t, epilogue.reduce)
    for term in more[:-1]:
        t = Operand(reductions.bn_pass(t, Epilogue(residual=term))[0])
    return reductions.bn_pass(t, dataclasses.replace(epilogue, residual=more[-1] if more else None))


def masked_conv(products: Sequence[Product], epilogue: Epilogue) -> tuple[Operand, tuple[Tensor, Tensor]]:
    """Behind a convolution of the library's the mask is not worth a pass that writes: whoever reads the result reads
    what masks it too, in `second`."""
    plain = epilogue.shift is None and epilogue.residual is None
    if len(products) > 1 or _of_rows(products[0]) or not plain or not isinstance(epilogue.mask, Operand):
        t, sums = conv(products, epilogue)
        return Operand(t), sums
    t = reductions.computed(_by_library(products[0]))
    return Operand(t, mask=epilogue.mask), reductions.reduce_masked(t, epilogue)


def _of_inference(products: Sequence[Product], epilogue: Epilogue) -> bool:
    """Whether inference's kernels compute it without making an operand in memory before."""
    beside = [p.operand for p in products[1:]] + ([epilogue.residual] if epilogue.residual else [])
    lazy = any(o.affine is not None or o.relu for o in beside) or any(p.operand.centre is not None for p in products)
    return call_of(products, epilogue).needs <= INFERENCE and epilogue.upsample == 1 and not lazy


def _empty(x: Tensor, sizes: Sequence[int]) -> Tensor:
    return torch.empty(tuple(sizes), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _unpacked(p: Product) -> tuple[Tensor, Geometry]:
    """The weight as (K, C/groups, R, S), and its geometry: `pack` joins groups."""
    if not isinstance(p.weight, Packed):
        return p.weight, p.geometry
    weight, _, shape = p.weight
    return weight.permute(0, 3, 1, 2), p.geometry._replace(groups=shape[1] * p.geometry.groups // weight.shape[3])


def _of_rows(p: Product) -> bool:
    """Whether each row of the result is made of one row of the operand."""
    _, _, R, S = p.packed.shape
    g = p.geometry
    return (R, S, g.padding, g.groups) == (1, 1, 0, 1) and (g.stride == 1 or p.data_grad_size is None)


def _by_library(p: Product) -> Operand:
    """The product, rounded, its scale still to be applied."""
    x = reductions.computed(p.operand)
    weight, g = _unpacked(p)
    if p.data_grad_size is None:
        t = F.conv2d(x, weight, None, *g)
        note_library(x, weight, t)
    else:
        like = _empty(x, p.output_sizes())
        pairs = [[g.stride] * 2, [g.padding] * 2, [g.dilation] * 2]
        wanted = [True, False, False]
        backward = torch.ops.aten.convolution_backward
        t, _, _ = backward(x, like, weight, None, *pairs, False, [0, 0], g.groups, wanted)
        note_library(t, weight, x, " dx")
    t = t.contiguous(memory_format=torch.channels_last)
    scale = p.packed.scale
    return Operand(t) if scale is None else Operand(t, (scale, torch.zeros_like(scale)))


def _matrix(p: Product) -> Tensor:
    """The weight (result's channels, operand's channels), a view."""
    w = _unpacked(p)[0][:, :, 0, 0]
    return w if p.data_grad_size is None else w.T


def _masking(mask: Tensor | Operand, dtype: torch.dtype) -> Operand:
    """A mask as an operand of no more than affine and ReLU."""
    if isinstance(mask, Tensor):
        return Operand((mask if mask.dtype == torch.bool else ~(mask <= 0)).to(dtype))
    more = mask.stride > 1 or any(v is not None for v in (mask.second, mask.mask, mask.centre))
    return Operand(reductions.computed(mask)) if more else mask


def _by_rows(products: Sequence[Product], epilogue: Epilogue, sizes: tuple[int, int, int, int]) -> tuple[Tensor, Any]:
    x = products[0].operand.tensor
    made: list[Rows] = []
    for p in products:
        w, scale = _matrix(p), p.packed.scale
        if made and scale is not None:
            # The sum has one accumulator: the first product's scale multiplies it before the second is added.
            w, scale = fold(w[:, :, None, None], scale, w.dtype)[:, :, 0, 0], None
        made.append(Rows(p.operand, w, p.operand.stride * p.geometry.stride, scale))
    residual, by = epilogue.residual, epilogue.reduce
    if residual is not None and residual.stride > 1:
        residual = Operand(reductions.computed(residual))
    mask = None if epilogue.mask is None else _masking(epilogue.mask, x.dtype)
    epilogue = dataclasses.replace(epilogue, residual=residual, mask=mask)
    N, K, P, Q = sizes
    M = N * P * Q
    y = _empty(x, sizes)
    config = config_of(M, K, max(r.w.shape[1] for r in made), x.element_size(), x.device)
    if by is None:
        submit(launch(made, epilogue, config, y))
        return y, None
    if by == "mask":
        bits = x.new_empty(mask_size(sizes), dtype=torch.uint8)
        submit(launch(made, epilogue, config, y, bits))
        return y, bits
    parts = x.new_empty((2, -(-M // config.BLOCK_M), K), dtype=torch.float32)
    submit(launch(made, epilogue, config, y, parts))
    if isinstance(by, Normalized):
        dbeta, dgamma = merge(parts, M, config.BLOCK_M, False, by.rstd.float().contiguous())
        return y, (dbeta, dgamma)
    return y, Stats(M, *merge(parts, M, config.BLOCK_M, True))
