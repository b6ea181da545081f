"""NVIDIA GPUs: cuDNN's convolution, then scale, shift, residual and ReLU in one pass (csrc/cuda/bn_pass.cuh).

The weight stays exact: the scale is applied to the accumulator's rounded result, in fp32. No GPU has run these kernels
yet, so they are chosen only by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import extension
from .contract import Call, Epilogue, Geometry, Operand, Packed, Pool, Product, beyond, check_conv

NAME = "cuda"
SUPPORTS = frozenset({"conv", "residual", "two_products", "bn_pass"})
PACKS_FOR_SIZE = False
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(call: Call) -> str | None:
    reason = beyond(call, SUPPORTS, "cuda", DTYPES)
    if reason:
        return reason
    module, reason = extension.load()
    if reason is None and module.build_info()["cuda"] is None:
        return "the extension was built without CUDA"
    return reason


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype


def images_per_pass(image_bytes: int) -> int | None:
    return None


def pack(weight: Tensor, scale: Tensor, geometry: Geometry, size: Sequence[int], keep: bool = True) -> Packed:
    nhwc = weight.contiguous(memory_format=torch.channels_last)
    return Packed(nhwc, scale.float().contiguous(), tuple(weight.shape))


def _pass(x: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    C, _ = extension.load()
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    per_channel = [None if t is None else t.float().contiguous() for t in (scale, shift)]
    return C.cuda_bn_pass(x, *per_channel, residual, relu)


def conv(products: Sequence[Product], epilogue: Epilogue) -> tuple[Tensor, Any]:
    check_conv(products, epilogue)
    y = None if epilogue.residual is None else epilogue.residual.tensor
    for i, p in enumerate(products):
        weight, scale, _ = p.packed
        last = i == len(products) - 1
        c = F.conv2d(p.operand.tensor, weight, None, *p.geometry)
        y = _pass(c, scale, epilogue.shift if last else None, y, epilogue.relu and last)
    assert y is not None
    return y, None


def bn_pass(x: Operand, epilogue: Epilogue, pool: Pool | None = None) -> tuple[Tensor, Any]:
    scale, shift = x.affine or (None, None)
    if epilogue.shift is not None:
        shift = epilogue.shift if shift is None else shift + epilogue.shift
    residual = None if epilogue.residual is None else epilogue.residual.tensor
    return _pass(x.tensor, scale, shift, residual, epilogue.relu), None
