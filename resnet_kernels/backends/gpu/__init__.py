"""The backend `gpu`: NVIDIA GPUs from sm_80. Triton kernels that fuse a convolution with everything around it, and
Hopper's CUDA kernels among them where they were measured to be faster.

    inference/boxes.py      convolutions whose operands TMA loads (sm_90, sm_100); 1x1 convolutions as matrix products
    inference/gather.py     convolutions by pointers: any filter, stride, dilation, groups, channels and map size
    inference/tail.py       a bottleneck's 3x3, its last 1x1 and the next block's first 1x1 in one kernel
    inference/conv_pool.py  convolution, ReLU and max pooling of a stem in one kernel
    inference/pooling.py    batch norm, residual, ReLU and max pooling as one pass
    inference/hopper.py     launches of the CUDA kernels in csrc/cuda/sm90
    inference/dispatch.py   the choice among these

    training/convolutions.py  which kernel runs a convolution of training, or cuDNN
    training/products.py      sums of 1x1 products with the operands and epilogues of training
    training/reductions.py    passes with statistics, sums and masks
    training/wgrad.py         weight gradients and moments
    training/finalize.py      the per-channel algebra
    training/gates.py         the end of a block whose branch is gated, and its gradient
    training/tape.py          a recorded training step, replayed without deciding it again

    cuda/, sm90/  two families of CUDA C++ kernels as backends of their own: `gpu:cuda` and `gpu:sm90`
    configs.py    tiles, warps and stages by architecture
    launch.py     a launch as data: run, or recorded
    offline.py    compiles recorded launches without a GPU and reads the result
    glue.py       what the families share

The backend is chosen if it is named, or where a measured table says so; docs/triton.md has what GPUs measured. With
TRITON_INTERPRET=1 the Triton kernels run on CPUs, slowly.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..contract import (
    Affine,
    Call,
    Epilogue,
    Geometry,
    Moments,
    Normalized,
    Operand,
    Packed,
    PackedBlock,
    Pool,
    Product,
    Stats,
    TailGrad,
    why_unsupported,
)

NAME = "gpu"
SUPPORTS = frozenset(
    "conv wgrad moments bn_pass finalize residual two_products lazy two_tensors mask stats reduce data_grad pool gated"
    " training".split()
)
PACKS_FOR_SIZE = False
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _kernels() -> tuple[Any, str | None]:
    """(the module that runs them, None), or (None, why there is none)."""
    try:
        return importlib.import_module(".inference.dispatch", __name__), None
    except ImportError as error:
        return None, f"triton does not load: {error}"


@functools.cache
def _training(name: str) -> Any:
    """A module of training's kernels."""
    return importlib.import_module(f".training.{name}", __name__)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter."""
    run, reason = _kernels()
    return reason is None and run.INTERPRETING


def why_not(call: Call) -> str | None:
    run, reason = _kernels()
    if reason:
        return reason
    reason = why_unsupported(call, SUPPORTS, None, DTYPES) or run.why_not_here(call.device, call.dtype)
    if reason:
        return reason
    if "two_products" in call.needs and call.weights:
        (_, _, R, S), geometry = call.weights[-1]
        if (R, S, geometry.padding, geometry.groups) != (1, 1, 0, 1):
            return f"expected a second product that is an ungrouped 1x1, got {R}x{S} with {geometry}"
    return None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype


def images_per_pass(image_bytes: int) -> int | None:
    return None


def pack(weight: Tensor, scale: Tensor, geometry: Geometry, size: Sequence[int], keep: bool = True) -> Packed:
    return _kernels()[0].pack(weight, scale, geometry, keep)


def mask_size(sizes: Sequence[int]) -> tuple[int, ...] | None:
    return _training("convolutions").mask_size(sizes)


def materialize(operand: Operand, kernel: int) -> Operand:
    return _training("convolutions").materialize(operand, kernel)


def conv(products: Sequence[Product], epilogue: Epilogue) -> tuple[Tensor, Any]:
    return _training("convolutions").conv(products, epilogue)


def masked_conv(products: Sequence[Product], epilogue: Epilogue) -> tuple[Operand, tuple[Tensor, Tensor]]:
    return _training("convolutions").masked_conv(products, epilogue)


def wgrad(
    g: Operand, x: Operand, kernel: tuple[int, int], geometry: Geometry, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    return _training("wgrad").wgrad(g, x, kernel, geometry, sums)


def moments(h: Operand) -> Moments:
    return _training("wgrad").moments(h)


def bn_pass(x: Operand, epilogue: Epilogue, pool: Pool | None = None) -> tuple[Tensor, Any]:
    if pool is not None:
        return _kernels()[0].bn_pass(x, epilogue, pool)
    return _training("reductions").bn_pass(x, epilogue)


def gated(z: Tensor, gate: Tensor | None, shortcut: Tensor | None, relu: bool) -> Tensor:
    return _training("gates").gated(z, gate, shortcut, relu)


def gated_grad(
    dy: Tensor, y: Tensor | None, z: Tensor | None, gate: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return _training("gates").gated_grad(dy, y, z, gate, wanted)


def reduce(x: Operand, by: str | Normalized) -> Any:
    return _training("reductions").reduce(x, by)


def finalize_stats(stats: Stats, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    return _training("finalize").finalize_stats(stats, gamma, beta, eps)


def finalize_moments(m: Moments, weight: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    return _training("finalize").finalize_moments(m, weight, gamma, beta, eps)


def finalize_bn_grad(sums: tuple[Tensor, Tensor], rows: int | Tensor, affine: Affine) -> tuple[Tensor, ...]:
    return _training("finalize").finalize_bn_grad(sums, rows, affine)


def finalize_tail_grad(
    sg: Tensor, G: Tensor, centre: Tensor | None, m: Moments, weight: Tensor, affine: Affine
) -> TailGrad:
    return _training("finalize").finalize_tail_grad(sg, G, centre, m, weight, affine)


def taped(key: Hashable, tensors: Sequence[Tensor], function: Callable[[], list[Tensor]]) -> list[Tensor]:
    return _training("tape").taped(key, tensors, function)


def residual_blocks(x: Tensor, blocks: Sequence[PackedBlock], overwrite: bool) -> Tensor:
    """Whole blocks: a bottleneck's 3x3, its last 1x1 and the next block's first in one kernel where they fit."""
    return _kernels()[0].residual_blocks(x, blocks)


def stem_channels(weight: tuple[int, ...], geometry: Geometry, pool: Pool) -> int:
    return _kernels()[0].stem_channels(weight, geometry, pool)


def pack_stem(weight: Tensor, scale: Tensor, geometry: Geometry, pool: Pool) -> Packed:
    return _kernels()[0].pack_stem(weight, scale, geometry, pool)


def stem(x: Tensor, weight: Packed, shift: Tensor, geometry: Geometry, pool: Pool) -> Tensor:
    """The stem in one kernel where that is possible."""
    return _kernels()[0].stem(x, weight, shift, geometry, pool)
