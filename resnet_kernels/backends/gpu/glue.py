"""Code that the kernel families of this backend share: convolutions by PyTorch's own engine (cuDNN), and small
helpers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import Geometry, Normalized, Product, Stats


def empty_nhwc(like: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return an uninitialised channels_last tensor (N, C, H, W) with the dtype and device of `like`."""
    return torch.empty(tuple(sizes), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def bit_mask_size(sizes: Sequence[int]) -> tuple[int, int]:
    """Return the size (N*P*Q, ceil(K/8)) of a bit mask of a result (N, K, P, Q): bit j of byte b is channel 8b + j."""
    N, K, P, Q = sizes
    return N * P * Q, -(-K // 8)


def reduction_of_no_rows(C: int, by: str | Normalized | None, device: torch.device) -> Any:
    """Return what `Epilogue.reduce` gives for a tensor of C channels without any position."""
    zeros = torch.zeros(C, device=device)
    if by == "stats":
        return Stats(0, torch.full_like(zeros, float("nan")), zeros)
    return None if by is None else (zeros, zeros.clone())


def krsc(weight: Tensor) -> Tensor:
    """Return a weight (K, C, R, S) as contiguous (K, R, S, C) that begins at a multiple of 16 bytes."""
    t = weight.permute(0, 2, 3, 1).contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _pairs(g: Geometry) -> list[list[int]]:
    return [[g.stride] * 2, [g.padding] * 2, [g.dilation] * 2]


def library_conv(p: Product, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return the product p without its scale, by PyTorch's convolution or data gradient.

    x: the materialised operand. weight: (K, C/groups, R, S). Returns channels_last, rounded to x's dtype.
    """
    if p.data_grad_size is None:
        t = F.conv2d(x, weight, None, *geometry)
    else:
        like = empty_nhwc(x, p.output_sizes())
        backward = torch.ops.aten.convolution_backward
        wanted = [True, False, False]
        t, _, _ = backward(x, like, weight, None, *_pairs(geometry), False, [0, 0], geometry.groups, wanted)
    return t.contiguous(memory_format=torch.channels_last)


def library_wgrad(g: Tensor, x: Tensor, kernel: Sequence[int], geometry: Geometry) -> Tensor:
    """Return the weight gradient (K, C/groups, R, S) of a convolution by PyTorch's engine, in the dtype of g.

    g: dL/dconv (N, K, P, Q). x: the convolution's operand (N, C, H, W).
    """
    # PyTorch reads nothing of this weight but its sizes and memory format.
    weight = g.new_empty(g.shape[1], x.shape[1] // geometry.groups, *kernel)
    weight = weight.contiguous(memory_format=torch.channels_last)
    backward = torch.ops.aten.convolution_backward
    wanted = [False, True, False]
    _, dweight, _ = backward(g, x, weight, None, *_pairs(geometry), False, [0, 0], geometry.groups, wanted)
    return dweight


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
