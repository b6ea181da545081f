"""The backend `library`: PyTorch's own engine for the device (cuDNN, oneDNN, native). It is right everywhere.

The scale of a product is folded into its weight. Then convolution with bias, addition and ReLU run as torch's own
calls, the latter two in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .contract import (
    Call,
    Epilogue,
    Geometry,
    Operand,
    Packed,
    Pool,
    Product,
    accumulator_dtype,
    check_conv,
    fold,
    why_unsupported,
)

NAME = "library"
SUPPORTS = frozenset({"conv", "residual", "two_products", "bn_pass", "pool", "gated"})
PACKS_FOR_SIZE = False

gated, gated_grad = reference.gated, reference.gated_grad


def why_not(call: Call) -> str | None:
    return why_unsupported(call, SUPPORTS, None, None)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype


def images_per_pass(image_bytes: int) -> int | None:
    return None


def pack(weight: Tensor, scale: Tensor, geometry: Geometry, size: Sequence[int], keep: bool = True) -> Packed:
    folded = fold(weight, scale, weight.dtype).contiguous(memory_format=torch.channels_last)
    return Packed(folded, None, tuple(weight.shape))


def conv(products: Sequence[Product], epilogue: Epilogue) -> tuple[Tensor, Any]:
    check_conv(products, epilogue)
    y: Tensor | None = None
    for p in products:
        weight, scale, _ = p.packed
        if scale is not None:
            weight = fold(weight, scale, weight.dtype)
        shift = epilogue.shift.to(weight.dtype) if y is None and epilogue.shift is not None else None
        t = F.conv2d(p.operand.tensor, weight, shift, *p.geometry)
        y = t if y is None else y.add_(t)
    assert y is not None
    if epilogue.residual is not None:
        y.add_(epilogue.residual.tensor)
    return y.relu_() if epilogue.relu else y, None


def bn_pass(x: Operand, epilogue: Epilogue, pool: Pool | None = None) -> tuple[Tensor, Any]:
    dtype = x.tensor.dtype
    t = x.tensor.to(accumulator_dtype(dtype))
    if x.affine is not None:
        t = torch.addcmul(x.affine[1][:, None, None], x.affine[0][:, None, None], t)
    if epilogue.shift is not None:
        t = t + epilogue.shift[:, None, None]
    if epilogue.residual is not None:
        t = t + epilogue.residual.tensor
    t = (torch.relu(t) if epilogue.relu else t).to(dtype)
    return F.max_pool2d(t, *pool) if pool else t, None
