"""NVIDIA GPUs from sm_80 without Triton: cuDNN's convolutions, and all that stands between them in CUDA C++ (csrc/cuda,
docs/cuda.md).

    passes.py    an operand and an epilogue in one pass, with its reductions
    outer.py     weight gradients and moments by tensor cores
    finalize.py  the algebra per channel
    pooling.py   max pooling and its gradient
    library.py   the kernels as a C library

A convolution's operands are computed before it and its epilogue is a pass behind: cuDNN reads and writes plain tensors.
The weight stays exact: a scale is applied to the accumulator's rounded result, in fp32.

No GPU has run these kernels yet: tests run their source on a CPU, and read their machine code. They are chosen only by
name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
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
from . import passes
from .calls import TYPES, empty, load
from .finalize import finalize_bn_grad, finalize_moments, finalize_stats, finalize_tail_grad
from .outer import moments, wgrad
from .passes import computed, mask_size
from .pooling import max_pool

NAME = "cuda"
SUPPORTS = frozenset(
    "conv wgrad moments bn_pass finalize residual two_products lazy two_tensors mask stats reduce data_grad pool"
    " training".split()
)
PACKS_FOR_SIZE = False

__all__ = [
    "NAME",
    "PACKS_FOR_SIZE",
    "SUPPORTS",
    "bn_pass",
    "compute_dtype",
    "conv",
    "finalize_bn_grad",
    "finalize_moments",
    "finalize_stats",
    "finalize_tail_grad",
    "images_per_pass",
    "mask_size",
    "masked_conv",
    "materialize",
    "moments",
    "pack",
    "reduce",
    "wgrad",
    "why_not",
]


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


def materialize(operand: Operand, kernel: int) -> Operand:
    return operand if operand.plain else Operand(computed(operand))


def conv(products: Sequence[Product], epilogue: Epilogue) -> tuple[Tensor, Any]:
    sizes = check_conv(products, epilogue)
    if 0 in sizes:
        nothing = Operand(empty(products[0].operand.tensor, sizes))
        return bn_pass(nothing, Epilogue(reduce=epilogue.reduce))
    *before, last = products
    # The residual, and every product but the last, are added to the next.
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
    """The mask is not worth a pass that writes: whoever reads the result reads what masks it too, in `second`."""
    plain = epilogue.shift is None and epilogue.residual is None and products[0].packed.scale is None
    if len(products) > 1 or not plain or not isinstance(epilogue.mask, Operand) or 0 in products[0].output_sizes():
        t, sums = conv(products, epilogue)
        return Operand(t), sums
    t = _by_library(products[0])
    return Operand(t, mask=epilogue.mask), passes.run(Operand(t), epilogue, False)[1]


def _by_library(p: Product) -> Tensor:
    """The product without its scale, rounded, channels_last."""
    x, weight, g = computed(p.operand), p.packed.weight, p.geometry
    if p.data_grad_size is None:
        t = F.conv2d(x, weight, None, *g)
    else:
        like = empty(x, p.output_sizes())
        pairs = [[g.stride] * 2, [g.padding] * 2, [g.dilation] * 2]
        backward = torch.ops.aten.convolution_backward
        t, _, _ = backward(x, like, weight, None, *pairs, False, [0, 0], g.groups, [True, False, False])
    return t.contiguous(memory_format=torch.channels_last)


def bn_pass(x: Operand, epilogue: Epilogue, pool: Pool | None = None) -> tuple[Tensor, Any]:
    if pool is None:
        return _stored(x, epilogue)
    # The maxima are those of the rounded pass.
    t, _ = _stored(x, dataclasses.replace(epilogue, reduce=None))
    return max_pool(t, pool, epilogue.reduce == "winners")


def reduce(x: Operand, by: str | Normalized) -> Any:
    return passes.run(x, Epilogue(reduce=by), False)[1]
