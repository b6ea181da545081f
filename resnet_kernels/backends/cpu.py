"""CPUs: fp32 convolutions of our own where there is AVX2 and no AVX-512, oneDNN's for the rest, and vectorised passes
(csrc/cpu).

A batch runs a few images at a time, so that their activations stay in cache (`images_per_pass`). That also keeps them
under the size from which malloc maps and zeroes fresh pages on every call: on 2 Zen 3 cores oneDNN's 64 -> 256 1x1
convolution on 56x56 runs at 166 GFLOP/s for 4 images at a time and at 37 for 16.

16-bit activations are computed in fp32 where the processor has no such instructions (and fp16 always): more accurate,
and far faster than emulation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import extension
from .contract import Block, Call, Epilogue, Geometry, Operand, Packed, Pool, Product, beyond, check_conv, wide

NAME = "cpu"
SUPPORTS = frozenset({"conv", "residual", "two_products", "bn_pass", "pool"})
PACKS_FOR_SIZE = True
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Bytes of activations to keep in flight. Between 12 and 24 MB speed is level (ResNet-18 and 50, 2 AVX-512 cores: within
# 3 %); with 24 a ResNet-18's peak passes half of eager's there.
PASS_BYTES = 16 * 2**20


def why_not(call: Call) -> str | None:
    reason = beyond(call, SUPPORTS, "cpu", DTYPES)
    if reason is None and not torch.backends.mkldnn.is_available():
        reason = "this torch was built without oneDNN"
    return reason or extension.load()[1]


@functools.cache
def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32


def images_per_pass(image_bytes: int) -> int | None:
    return max(1, PASS_BYTES // max(1, image_bytes))


def pack(weight: Tensor, scale: Tensor, geometry: Geometry, size: Sequence[int], keep: bool = True) -> Packed:
    C, _ = extension.load()
    weight = weight.to(compute_dtype(weight.dtype))
    conv = C.pack_conv(weight, scale.contiguous(), geometry, [max(1, size[0]), *size[1:]], "auto")
    return Packed(conv, None, tuple(weight.shape))


def _nhwc(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).contiguous(memory_format=torch.channels_last)


def conv(products: Sequence[Product], epilogue: Epilogue) -> tuple[Tensor, Any]:
    check_conv(products, epilogue)
    C, _ = extension.load()
    dtype = products[0].operand.tensor.dtype
    compute = compute_dtype(dtype)
    overwrite = epilogue.overwrite and compute == dtype
    y = None if epilogue.residual is None else _nhwc(epilogue.residual.tensor, compute)
    for i, p in enumerate(products):
        x = _nhwc(p.operand.tensor, compute)
        packed = p.packed
        if isinstance(packed.weight, Tensor):
            ones = torch.ones(packed.shape[0], dtype=torch.float32)
            packed = pack(packed.weight, ones if packed.scale is None else packed.scale, p.geometry, x.shape)
        shift = epilogue.shift.to(compute) if i == 0 and epilogue.shift is not None else None
        last = i == len(products) - 1
        y = C.conv(x, packed.weight, shift, y, overwrite or i > 0, epilogue.relu and last)
    assert y is not None
    return y.to(dtype), None


def residual_blocks(x: Tensor, blocks: Sequence[Block], overwrite: bool) -> Tensor:
    """Whole blocks, one call each; x in the compute dtype and channels_last."""
    C, _ = extension.load()
    for i, (weights, shifts, geometries, shortcut) in enumerate(blocks):
        del geometries  # the packed weights know theirs
        x = C.residual_block(
            x, [w.weight for w in weights], [b.to(x.dtype) for b in shifts], shortcut, overwrite or i > 0
        )
    return x


def bn_pass(x: Operand, epilogue: Epilogue, pool: Pool | None = None) -> tuple[Tensor, Any]:
    C, _ = extension.load()
    t, dtype = x.tensor, x.tensor.dtype
    half = dtype == torch.float16
    v = _nhwc(t, torch.float32 if half else dtype)
    residual = None if epilogue.residual is None else _nhwc(epilogue.residual.tensor, v.dtype)
    plain = x.affine is None and epilogue.shift is None and residual is None
    if pool is None or not (plain and epilogue.relu):
        scale, shift = x.affine or (None, None)
        if epilogue.shift is not None:
            shift = epilogue.shift if shift is None else shift + epilogue.shift
        to_wide = (None if s is None else s.to(wide(dtype)).contiguous() for s in (scale, shift))
        v = C.bn_pass(v, *to_wide, residual, epilogue.relu)
    if pool is not None:
        v = C.max_pool_relu(v, *pool) if epilogue.relu else torch.max_pool2d(v, *pool)
    return v.to(dtype), None
