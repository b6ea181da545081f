"""The end of a block whose branch is gated per image and channel, and its gradient (every GPU from sm_80).

    y = relu(gate * z + shortcut)     dz = g * gate,  dgate = sum of g * z over the map,  g = dy where not (y <= 0)

One program instance owns BLOCK_C channels of BLOCK_M rows. In the gradient, it owns BLOCK_C channels of up to SPAN rows
of one map, and writes their partial sum of dgate; the parts are added in the order of their rows.

Memory traffic: z, shortcut and y once; in the gradient dy, y, z, dz and g once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import power_of_two
from ..device import relu
from ..launch import Launch, Work, nbytes, submit

# Rows of a map over which one program instance sums g * z.
SPAN = 1024


@triton.jit
def _gated_kernel(
    z_ptr, gate_ptr, shortcut_ptr, y_ptr, M, PQ, C, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """gate_ptr (N, C) and shortcut_ptr may be None. M: rows of all maps. PQ: rows of one map."""
    c_tiles = tl.cdiv(C, BLOCK_C)
    m = tl.program_id(0) // c_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (m < M)[:, None] & (c < C)[None, :]
    at = m.to(tl.int64)[:, None] * C + c[None, :]
    t = tl.load(z_ptr + at, inside, 0.0).to(tl.float32)
    if gate_ptr is not None:
        t *= tl.load(gate_ptr + (m // PQ)[:, None] * C + c[None, :], inside, 0.0)
    if shortcut_ptr is not None:
        t += tl.load(shortcut_ptr + at, inside, 0.0).to(tl.float32)
    if RELU:
        t = relu(t)
    tl.store(y_ptr + at, t.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _gated_grad_kernel(
    dy_ptr,
    y_ptr,
    z_ptr,
    gate_ptr,
    dz_ptr,
    parts_ptr,
    g_ptr,
    PQ,
    C,
    parts,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y_ptr: None without ReLU. dz_ptr, parts_ptr (N, parts, C), g_ptr: None if not requested."""
    c_tiles = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = c < C
    segment = tl.program_id(0) // c_tiles
    n, part = segment // parts, segment % parts
    first = part * SPAN
    last = tl.minimum(first + SPAN, PQ)
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    if dz_ptr is not None:
        gate = tl.load(gate_ptr + n * C + c, channel_mask, 0.0)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for m0 in range(first, last, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        inside = (m < last)[:, None] & channel_mask[None, :]
        at = (n.to(tl.int64) * PQ + m)[:, None] * C + c[None, :]
        g = tl.load(dy_ptr + at, inside, 0.0).to(tl.float32)
        if y_ptr is not None:
            # NaN passes the mask.
            g = tl.where(tl.load(y_ptr + at, inside, 0.0).to(tl.float32) <= 0, 0.0, g)
        if g_ptr is not None:
            tl.store(g_ptr + at, g.to(DTYPE), inside)
        if dz_ptr is not None:
            tl.store(dz_ptr + at, (g * gate[None, :]).to(DTYPE), inside)
        if parts_ptr is not None:
            total += g * tl.load(z_ptr + at, inside, 0.0).to(tl.float32)
    if parts_ptr is not None:
        tl.store(parts_ptr + segment.to(tl.int64) * C + c, tl.sum(total, 0), channel_mask)


def _tile(rows: int, C: int) -> tuple[int, int]:
    """Return (BLOCK_M, BLOCK_C), at most 2048 elements."""
    BLOCK_C = min(64, power_of_two(C))
    return min(2048 // BLOCK_C, power_of_two(rows)), BLOCK_C


def gated(z: Tensor, gate: Tensor | None, shortcut: Tensor | None, relu: bool) -> Tensor:
    """Return y = [relu](gate * z + shortcut). z, shortcut (N, C, P, Q) channels_last; gate (N, C) fp32."""
    N, C, P, Q = z.shape
    y = torch.empty_like(z)
    M = N * P * Q
    if z.numel() == 0:
        return y
    BLOCK_M, BLOCK_C = _tile(M, C)
    arguments = dict(
        z_ptr=z, gate_ptr=gate, shortcut_ptr=shortcut, y_ptr=y, M=M, PQ=P * Q, C=C, RELU=relu, BLOCK_M=BLOCK_M,
        BLOCK_C=BLOCK_C,
    )  # fmt: skip
    moved = nbytes(z, gate, shortcut, y)
    grid = -(-M // BLOCK_M) * -(-C // BLOCK_C)
    submit(Launch(_gated_kernel, grid, arguments, {"num_warps": 4}, f"{C} of {P}x{Q}", Work(moved, 0, moved, 0)))
    return y


def gated_grad(
    dy: Tensor, y: Tensor | None, z: Tensor | None, gate: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dz, dgate (N, C) fp32, g), each None unless `wanted` in that order. y: None without ReLU."""
    N, C, P, Q = dy.shape
    want_z, want_gate, want_g = wanted
    dz, g = (torch.empty_like(dy) if want else None for want in (want_z, want_g))
    parts = -(-P * Q // SPAN)
    sums = dy.new_empty((N, parts, C), dtype=torch.float32) if want_gate else None
    if dy.numel():
        BLOCK_M, BLOCK_C = _tile(P * Q, C)
        read = (dy, y, z if want_gate else None, gate if want_z else None)
        arguments = dict(
            zip(("dy_ptr", "y_ptr", "z_ptr", "gate_ptr"), read, strict=True),
            dz_ptr=dz, parts_ptr=sums, g_ptr=g, PQ=P * Q, C=C, parts=parts, SPAN=SPAN, BLOCK_M=BLOCK_M, BLOCK_C=BLOCK_C,
        )  # fmt: skip
        moved = nbytes(*read, dz, sums, g)
        grid = N * parts * -(-C // BLOCK_C)
        work = Work(moved, 0, moved, 0)
        submit(Launch(_gated_grad_kernel, grid, arguments, {"num_warps": 4}, f"{C} of {P}x{Q}", work))
    return dz, None if sums is None else sums.sum(1), g
