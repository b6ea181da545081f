"""The end of a block whose branch is gated: y = relu(gate * z + shortcut), differentiable.

The gate is per image and channel (squeeze-and-excitation, Hu et al. 2018, arXiv 1709.01507), per image (stochastic
depth, Huang et al. 2016, 1603.09382), or absent (a branch or shortcut that ends with another module).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import select
from ..backends.contract import Call, accumulator_dtype
from .block_inference import LIBRARY

NEEDS = frozenset({"gated"})


def call_of_gated(device: torch.device, dtype: torch.dtype) -> Call:
    """Return what a backend must support to run the block's end."""
    return Call(device, dtype, NEEDS)


# A compiler takes the result as a constant: what is built is not part of its graph.
@torch.compiler.assume_constant_result
def _chosen(device: torch.device, dtype: torch.dtype) -> str:
    return select.choose(call_of_gated(device, dtype)).NAME


def _nhwc(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _forward(z: Tensor, gate: Tensor | None, shortcut: Tensor | None, relu: bool, backend: str) -> Tensor:
    gate = None if gate is None else gate.contiguous()
    shortcut = None if shortcut is None else _nhwc(shortcut)
    return select.BY_NAME[backend].gated(_nhwc(z), gate, shortcut, relu)


def _fake(z: Tensor, gate: Tensor | None, shortcut: Tensor | None, relu: bool, backend: str) -> Tensor:
    return torch.empty_like(z, memory_format=torch.channels_last)


def _backward(
    dy: Tensor, y: Tensor | None, z: Tensor | None, gate: Tensor | None, wanted: Sequence[bool], backend: str
) -> list[Tensor]:
    y, z = (None if t is None else _nhwc(t) for t in (y, z))
    gate = None if gate is None else gate.contiguous()
    found = select.BY_NAME[backend].gated_grad(_nhwc(dy), y, z, gate, wanted)
    # The results of an op are no views of each other, nor of its arguments.
    return [dy.new_empty(0) if t is None else t.clone() if t is dy else t for t in found]


def _backward_fake(
    dy: Tensor, y: Tensor | None, z: Tensor | None, gate: Tensor | None, wanted: Sequence[bool], backend: str
) -> list[Tensor]:
    like = torch.empty_like(dy, memory_format=torch.channels_last)
    sizes = dy.shape[:2]
    sums = dy.new_empty(sizes, dtype=accumulator_dtype(dy.dtype)) if wanted[1] else dy.new_empty(0)
    return [like if wanted[0] else dy.new_empty(0), sums, like.clone() if wanted[2] else dy.new_empty(0)]


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    z, gate, shortcut, ctx.relu, ctx.backend = inputs
    ctx.save_for_backward(output if ctx.relu else None, z if ctx.needs_input_grad[1] else None, gate)


def _gradients(ctx: Any, dy: Tensor) -> tuple:
    y, z, gate = ctx.saved_tensors
    need_z, need_gate, need_shortcut = ctx.needs_input_grad[:3]
    # Without a gate z's gradient equals the shortcut's; without a ReLU that is dy itself.
    same = need_shortcut or (need_z and gate is None)
    wanted = [need_z and gate is not None, need_gate, same and ctx.relu]
    dz, dgate, g = None, None, dy if same else None
    if any(wanted):
        dy = dy if y is None else dy.to(y.dtype)
        found = torch.ops.resnet_kernels.gated_tail_backward(dy, y, z, gate, wanted, ctx.backend)
        dz, dgate = (t if want else None for t, want in zip(found, wanted[:2], strict=False))
        g = found[2] if wanted[2] else g
    return g if need_z and gate is None else dz, dgate, g if need_shortcut else None, None, None


def _setup_second(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    dy, y, z, gate, _, _ = inputs
    ctx.save_for_backward(dy, y, z, gate)
    ctx.set_materialize_grads(False)


def _second(ctx: Any, grads: Sequence[Tensor | None]) -> tuple:
    """Return the gradients of dz = g * gate, dgate = sum(g * z) and g, all linear in dy, in differentiable torch
    ops."""
    dy, y, z, gate = ctx.saved_tensors
    to_z, to_gate, to_g = (None if t is None or not t.numel() else t for t in grads)

    def masked(t: Tensor) -> Tensor:
        return t if y is None else torch.where(y <= 0, 0, t)

    parts, dz, dgate = [], None, None
    if to_g is not None:
        parts.append(to_g)
    if to_z is not None:
        parts.append(to_z * gate[:, :, None, None])
        dgate = (masked(dy).to(gate.dtype) * to_z).sum((2, 3))
    if to_gate is not None:
        parts.append(to_gate[:, :, None, None] * z)
        dz = (masked(dy) * to_gate[:, :, None, None]).to(z.dtype)
    # mypy: the sum of an empty list would be 0 and no tensor, but parts is not empty here.
    return masked(sum(parts)).to(dy.dtype) if parts else None, None, dz, dgate, None, None  # type: ignore[arg-type]


LIBRARY.define(
    "gated_tail(Tensor z, Tensor? gate, Tensor? shortcut, bool relu, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "gated_tail_backward(Tensor dy, Tensor? y, Tensor? z, Tensor? gate, bool[] wanted, str backend) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _name, _run, _of_fakes, _grads, _setup in (
    ("gated_tail", _forward, _fake, _gradients, _setup_context),
    ("gated_tail_backward", _backward, _backward_fake, _second, _setup_second),
):
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resnet_kernels::{_name}", _of_fakes, lib=LIBRARY)
    torch.library.register_autograd(f"resnet_kernels::{_name}", _grads, setup_context=_setup, lib=LIBRARY)


def gated_tail(z: Tensor, gate: Tensor | None = None, shortcut: Tensor | None = None, relu: bool = True) -> Tensor:
    """y = relu(gate * z + shortcut), without the ReLU if `relu` is False.

    Args:
        z: (N, K, P, Q) fp64|fp32|bf16|fp16, channels_last (converted if not).
        gate: (N, K), or (N, 1) for one per image, in any floating dtype; None for ones.
        shortcut: as z; None for zero.
    Returns:
        y: (N, K, P, Q) in z's dtype, channels_last.
    Raises:
        TypeError, ValueError: dtypes, devices or shapes do not fit, before anything runs.
        BackendUnavailable: the backend that was named cannot run it.
    Numerics: computed in fp32 (fp64 for fp64) and rounded once. ReLU propagates NaN, and a NaN's gradient passes. The
        gate's gradient is summed in fp32 without atomics, in an order that depends on the sizes alone. Second
        derivatives are supported.
    Saves for the backward: y if there is a ReLU, the gate, and z if a gradient of the gate is requested.
    """
    if z.dim() != 4:
        raise ValueError(f"z: expected (N, K, P, Q), got {tuple(z.shape)}")
    if not z.dtype.is_floating_point:
        raise TypeError(f"z: expected a floating dtype, got {z.dtype}")
    if shortcut is not None and (shortcut.dtype != z.dtype or shortcut.device != z.device):
        raise TypeError(f"shortcut: expected {z.dtype} on {z.device}, got {shortcut.dtype} on {shortcut.device}")
    if shortcut is not None and shortcut.shape != z.shape:
        raise ValueError(f"shortcut: expected {tuple(z.shape)}, as z, got {tuple(shortcut.shape)}")
    if gate is not None:
        N, K = z.shape[:2]
        if gate.shape not in ((N, K), (N, 1)):
            raise ValueError(f"gate: expected {(N, K)} or {(N, 1)}, got {tuple(gate.shape)}")
        if not gate.dtype.is_floating_point or gate.device != z.device:
            raise TypeError(f"gate: expected a floating dtype on {z.device}, got {gate.dtype} on {gate.device}")
        gate = gate.to(accumulator_dtype(z.dtype)).expand(N, K)
    return torch.ops.resnet_kernels.gated_tail(z, gate, shortcut, relu, _chosen(z.device, z.dtype))
