"""Convolutions in training: which kernel runs each.

Inference's kernels run a convolution if its epilogue and operands need nothing beyond them. Otherwise products.py runs
convolutions whose output rows each depend on one row of the operand (1x1). torch's library (cuDNN on a GPU) runs the
rest: their operands are materialized first, and the epilogue is a pass after them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...contract import Epilogue, Geometry, Normalized, Operand, Packed, Product, Stats, call_of, check_conv, fold
from ..glue import bit_mask_size, empty_nhwc, library_conv
from ..inference import dispatch
from ..launch import record_library, submit
from . import reductions
from .products import RowProduct, config_of, launch, merge

# The features (`contract.call_of`) that inference's kernels support.
INFERENCE = frozenset({"conv", "residual", "two_products", "lazy"})


def mask_size(sizes: Sequence[int]) -> tuple[int, int]:
    return bit_mask_size(sizes)


def materialize(operand: Operand, kernel: int) -> Operand:
    """Return the operand as a convolution with a `kernel` x `kernel` filter reads it: unchanged for 1x1, whose kernels
    apply a lazy operand's affine, ReLU and mask while loading it, else materialized."""
    return operand if kernel == 1 or operand.plain else Operand(reductions.materialize(operand))


def conv(products: Sequence[Product], epilogue: Epilogue) -> tuple[Tensor, Any]:
    """Return (epilogue of the sum of the products, its reduction). See `contract.Backend.conv`."""
    sizes = check_conv(products, epilogue)
    if _runs_by_inference(products, epilogue):
        return dispatch.conv(products, epilogue), None
    if 0 in sizes:
        nothing = Operand(empty_nhwc(products[0].operand.tensor, sizes))
        return reductions.bn_pass(nothing, Epilogue(reduce=epilogue.reduce))
    if len(products) <= 2 and all(map(_is_row_product, products)):
        return _by_row_products(products, epilogue, sizes)
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
    """Return (the masked convolution as an operand, its sums). See `contract.Backend.masked_conv`.

    After a convolution by the library, a pass only to write the masked result does not pay off. The result stays
    unmasked, and the returned operand carries the mask for its readers, which read the mask's tensor as `second`
    anyway.
    """
    plain = epilogue.shift is None and epilogue.residual is None
    if len(products) > 1 or _is_row_product(products[0]) or not plain or not isinstance(epilogue.mask, Operand):
        t, sums = conv(products, epilogue)
        return Operand(t), sums
    t = reductions.materialize(_by_library(products[0]))
    return Operand(t, mask=epilogue.mask), reductions.reduce_masked(t, epilogue)


def _runs_by_inference(products: Sequence[Product], epilogue: Epilogue) -> bool:
    """Whether inference's kernels run the convolution without materializing an operand first."""
    others = [p.operand for p in products[1:]] + ([epilogue.residual] if epilogue.residual else [])
    lazy = any(o.affine is not None or o.relu for o in others) or any(p.operand.centre is not None for p in products)
    return call_of(products, epilogue).needs <= INFERENCE and epilogue.upsample == 1 and not lazy


def _unpacked(p: Product) -> tuple[Tensor, Geometry]:
    """Return the weight as (K, C/groups, R, S), and the geometry with its number of groups: `pack` may have joined
    some."""
    if not isinstance(p.weight, Packed):
        return p.weight, p.geometry
    weight, _, shape = p.weight
    return weight.permute(0, 3, 1, 2), p.geometry._replace(groups=shape[1] * p.geometry.groups // weight.shape[3])


def _is_row_product(p: Product) -> bool:
    """Whether each row of the result depends on one row of the operand, so that products.py can run the product."""
    _, _, R, S = p.packed.shape
    g = p.geometry
    return (R, S, g.padding, g.groups) == (1, 1, 0, 1) and (g.stride == 1 or p.data_grad_size is None)


def _by_library(p: Product) -> Operand:
    """Return the product by torch's library, rounded, as an operand that applies the product's scale."""
    x = reductions.materialize(p.operand)
    weight, g = _unpacked(p)
    t = library_conv(p, x, weight, g)
    if p.data_grad_size is None:
        record_library(x, weight, t)
    else:
        record_library(t, weight, x, " dx")
    scale = p.packed.scale
    return Operand(t) if scale is None else Operand(t, (scale, torch.zeros_like(scale)))


def _matrix(p: Product) -> Tensor:
    """Return a view of the weight as (channels of the result, channels of the operand)."""
    w = _unpacked(p)[0][:, :, 0, 0]
    return w if p.data_grad_size is None else w.T


def _masking(mask: Tensor | Operand, dtype: torch.dtype) -> Operand:
    """Return the mask as an operand with no more than affine and ReLU, the only kind that products.py takes."""
    if isinstance(mask, Tensor):
        return Operand((mask if mask.dtype == torch.bool else ~(mask <= 0)).to(dtype))
    more = mask.stride > 1 or any(v is not None for v in (mask.second, mask.mask, mask.centre))
    return Operand(reductions.materialize(mask)) if more else mask


def _by_row_products(
    products: Sequence[Product], epilogue: Epilogue, sizes: tuple[int, int, int, int]
) -> tuple[Tensor, Any]:
    x = products[0].operand.tensor
    made: list[RowProduct] = []
    for p in products:
        w, scale = _matrix(p), p.packed.scale
        if made and scale is not None:
            # Both products share an accumulator. The first product's scale multiplies it before the second is added, so
            # the second product's scale goes into its weight.
            w, scale = fold(w[:, :, None, None], scale, w.dtype)[:, :, 0, 0], None
        made.append(RowProduct(p.operand, w, p.operand.stride * p.geometry.stride, scale))
    residual, by = epilogue.residual, epilogue.reduce
    if residual is not None and residual.stride > 1:
        residual = Operand(reductions.materialize(residual))
    mask = None if epilogue.mask is None else _masking(epilogue.mask, x.dtype)
    epilogue = dataclasses.replace(epilogue, residual=residual, mask=mask)
    N, K, P, Q = sizes
    M = N * P * Q
    y = empty_nhwc(x, sizes)
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
