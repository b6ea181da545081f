"""The stem of a ResNet in inference: y = max_pool(relu(a * conv(x, W) + b))."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.contract import Backend, Call, Epilogue, Geometry, Operand, Packed, Pool, Product


def call_of_stem(device: torch.device, dtype: torch.dtype, weight: tuple[int, ...], geometry: Geometry) -> Call:
    """Return what a backend must support to run the stem. weight: (K, C, R, S)."""
    return Call(device, dtype, frozenset({"conv", "bn_pass", "pool"}), ((weight, geometry),))


def run(backend: Backend, x: Tensor, weight: Packed, shift: Tensor, geometry: Geometry, pool: Pool) -> Tensor:
    """Return the stem's result by a backend's primitives.

    The ReLU is applied in the pooling pass: that saves one pass over the largest map of the network.
    """
    whole = getattr(backend, "stem", None)
    if whole is not None:
        return whole(x, weight, shift, geometry, pool)
    c, _ = backend.conv([Product(Operand(x), weight, geometry)], Epilogue(shift))
    y, _ = backend.bn_pass(Operand(c), Epilogue(relu=True), pool)
    return y
