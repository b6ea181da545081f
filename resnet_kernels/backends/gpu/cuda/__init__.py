"""The family `gpu:cuda`: NVIDIA GPUs from sm_80 without Triton. cuDNN runs the convolutions; CUDA C++ kernels
(csrc/cuda, docs/cuda.md) run everything between them.

    passes.py    an operand and an epilogue in one pass, with reductions
    outer.py     weight gradients of 1x1 convolutions, and moments, on tensor cores
    finalize.py  the per-channel algebra
    pooling.py   max pooling and its gradient
    calls.py     the kernels as a C library

cuDNN reads and writes plain tensors, so an operand is materialised before its convolution and the epilogue is a pass
after it. The weight stays exact: the scale multiplies the rounded result of the convolution, in fp32.

No GPU has run these kernels yet: tests run their sources on a CPU and read their machine code. The family runs only if
it is named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...contract import (
    Call,
    Epilogue,
    Geometry,
    Normalized,
    Operand,
    Packed,
    Pool,
    Product,
    check_conv,
    why_unsupported,
)
from ..glue import bit_mask_size, empty_nhwc, library_conv
from . import finalize, outer, passes
from .calls import TYPES, load
from .passes import computed
from .pooling import max_pool

NAME = "gpu:cuda"
SUPPORTS = frozenset(
    "conv wgrad moments bn_pass finalize residual two_products lazy two_tensors mask stats reduce data_grad pool"
    " training".split()
)
PACKS_FOR_SIZE = False

# Primitives that are functions of other modules as they stand.
finalize_stats, finalize_moments = finalize.finalize_stats, finalize.finalize_moments
finalize_bn_grad, finalize_tail_grad = finalize.finalize_bn_grad, finalize.finalize_tail_grad
wgrad, moments = outer.wgrad, outer.moments


def why_not(call: Call) -> str | None:
    library, reason = load()
    unsupported = why_unsupported(call, SUPPORTS, "cuda" if library is None else library.device, tuple(TYPES))
    return unsupported or reason or library.why_not(call.device)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype


def images_per_pass(image_bytes: int) -> int | None:
    return None


def pack(weight: Tensor, scale: Tensor, geometry: Geometry, size: Sequence[int], keep: bool = True) -> Packed:
    nhwc = weight.contiguous(memory_format=torch.channels_last)
    return Packed(nhwc, scale.float().contiguous(), tuple(weight.shape))


def mask_size(sizes: Sequence[int]) -> tuple[int, int]:
    return bit_mask_size(sizes)


def materialize(operand: Operand, kernel: int) -> Operand:
    return operand if operand.plain else Operand(computed(operand))


def conv(products: Sequence[Product], epilogue: Epilogue) -> tuple[Tensor, Any]:
    sizes = check_conv(products, epilogue)
    if 0 in sizes:
        nothing = Operand(empty_nhwc(products[0].operand.tensor, sizes))
        return bn_pass(nothing, Epilogue(reduce=epilogue.reduce))
    *before, last = products
    # The residual and each product are added to the next product.
    added, upsample = epilogue.residual, epilogue.upsample
    for p in before:
        t = _by_library(p)
        if added is not None or p.packed.scale is not None:
            t, _ = _stored(Operand(t), Epilogue(residual=added, upsample=upsample), p.packed.scale)
        added, upsample = Operand(t), 1
    t, scale = _by_library(last), last.packed.scale
    behind = dataclasses.replace(epilogue, residual=added, upsample=upsample, overwrite=False)
    by = epilogue.reduce
    if scale is None and by != "mask" and behind == Epilogue(reduce=by):
        return t, None if by is None else reduce(Operand(t), by)
    return _stored(Operand(t), behind, scale)


def _stored(x: Operand, epilogue: Epilogue, scale: Tensor | None = None) -> tuple[Tensor, Any]:
    t, reduced = passes.run(x, epilogue, True, scale)
    assert t is not None
    return t, reduced


def masked_conv(products: Sequence[Product], epilogue: Epilogue) -> tuple[Operand, tuple[Tensor, Tensor]]:
    """The mask is not applied in a pass of its own: the returned operand carries it, and its reader applies it."""
    plain = epilogue.shift is None and epilogue.residual is None and products[0].packed.scale is None
    if len(products) > 1 or not plain or not isinstance(epilogue.mask, Operand) or 0 in products[0].output_sizes():
        t, sums = conv(products, epilogue)
        return Operand(t), sums
    t = _by_library(products[0])
    return Operand(t, mask=epilogue.mask), passes.run(Operand(t), epilogue, False)[1]


def _by_library(p: Product) -> Tensor:
    """Return the product without its scale, rounded, in channels_last."""
    return library_conv(p, computed(p.operand), p.packed.weight, p.geometry)


def bn_pass(x: Operand, epilogue: Epilogue, pool: Pool | None = None) -> tuple[Tensor, Any]:
    if pool is None:
        return _stored(x, epilogue)
    # The maxima are of rounded values.
    t, _ = _stored(x, dataclasses.replace(epilogue, reduce=None))
    return max_pool(t, pool, epilogue.reduce == "winners")


def reduce(x: Operand, by: str | Normalized) -> Any:
    return passes.run(x, Epilogue(reduce=by), False)[1]
