"""The residual block with known statistics as one op, and its gradient.

    h_0 = x;  h_i = relu(a_i * conv(h_{i-1}, W_i) + b_i)  for i < n
    y = relu(a_n * conv(h_{n-1}, W_n) + b_n + shortcut(x))
    shortcut(x) = x  |  a_s * conv(x, W_s) + b_s  |  x subsampled, zero channels appended  |  0

A chain without a shortcut may also end without its ReLU. A bottleneck has n = 3, a basic block n = 2. The scales a and
shifts b come from batch norms with running statistics (`batch_norm.affine_of`); autograd derives the gradients of
these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import select
from ..backends.contract import Backend, Call, Epilogue, Geometry, Operand, PackedBlock, Product, accumulator_dtype
from .spec import SHORTCUTS, BlockSpec, MapSize, map_sizes, same_padding, total_stride


def zero_pad(x: Tensor, stride: int, channels: int) -> Tensor:
    """Return option A's shortcut: every stride-th row and column, zero channels appended up to `channels`."""
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, channels - x.shape[1]))


def call_of_block(
    device: torch.device,
    dtype: torch.dtype,
    weights: Sequence[tuple[int, ...]],
    geometries: Sequence[Geometry],
    shortcut: str,
    size: tuple[int, ...] = (),
) -> Call:
    """Return what a backend must support to run the block: the metadata on which `select` decides."""
    further = {"projection": {"two_products"}, "none": set[str]()}.get(shortcut, {"residual"})
    return Call(device, dtype, frozenset({"conv"} | further), tuple(zip(weights, geometries, strict=True)), size)


def chain_shifts(shifts: Sequence[Tensor], shortcut: str) -> list[Tensor]:
    """Return the chain's shifts. The last includes the projection's: both products are summed in one accumulator."""
    return [*shifts[:-2], shifts[-2] + shifts[-1]] if shortcut == "projection" else list(shifts)


def run(backend: Backend, x: Tensor, blocks: Sequence[PackedBlock], overwrite: bool = False) -> Tensor:
    """Return the result of consecutive blocks by a backend's primitives. overwrite: it may take x's memory."""
    consecutive = getattr(backend, "residual_blocks", None)
    if consecutive is not None and all(block.shortcut != "none" for block in blocks):
        return consecutive(x, blocks, overwrite)
    whole = getattr(backend, "residual_block", None)
    for i, block in enumerate(blocks):
        y = None if whole is None else whole(x, block)
        x = _run_by_convolutions(backend, x, block, overwrite or i > 0) if y is None else y
    return x


def _run_by_convolutions(backend: Backend, x: Tensor, block: PackedBlock, overwrite: bool) -> Tensor:
    weights, shifts, geometries, shortcut, relu = block
    last = len(weights) - (2 if shortcut == "projection" else 1)
    h = x
    for i in range(last):
        h, _ = backend.conv([Product(Operand(h), weights[i], geometries[i])], Epilogue(shifts[i], relu=True))
    products = [Product(Operand(h), weights[last], geometries[last])]
    shift, residual = shifts[last], None
    if shortcut == "projection":
        products.append(Product(Operand(x), weights[-1], geometries[-1]))
    elif shortcut == "zero_pad":
        residual = Operand(zero_pad(x, total_stride(geometries), shift.shape[0]))
    elif shortcut == "identity":
        residual = Operand(x)
    y, _ = backend.conv(products, Epilogue(shift, residual, relu=relu, overwrite=overwrite))
    return y


def pass_size(images: int, limit: int | None) -> int:
    """Return how many images to run at a time: at most `limit`, in passes of equal size."""
    if limit is None or images <= limit:
        return images
    passes = -(-images // limit)
    return -(-images // passes)


def in_passes(x: Tensor, size: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return function(x), computed for `size` images at a time.

    All passes have the same size, since weights are packed for it. If the batch does not divide, the last pass overlaps
    the one before.
    """
    N = x.shape[0]
    if size >= N:
        return function(x)
    y = None
    for n in range(0, N, size):
        n = min(n, N - size)
        part = function(x[n : n + size])
        if y is None:
            y = torch.empty(
                (N, *part.shape[1:]), dtype=part.dtype, device=part.device, memory_format=torch.channels_last
            )
        y[n : n + size].copy_(part)
    assert y is not None
    return y


def largest_pair(sizes: Sequence[MapSize]) -> int:
    """Return the most elements that an activation and its successor have together, for one image."""
    counts = [C * H * W for C, H, W in sizes]
    return max(a + b for a, b in zip(counts, counts[1:], strict=False))


def _forward(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], shifts: Sequence[Tensor], *fields: Any
) -> Tensor:
    spec = BlockSpec.of(fields)
    geometries = spec.geometries(weights)
    shapes = [tuple(w.shape) for w in weights]
    backend = select.choose(call_of_block(x.device, x.dtype, shapes, geometries, spec.shortcut, tuple(x.shape)))
    dtype = backend.compute_dtype(x.dtype)
    operands, maps = map_sizes(x.shape[1:], shapes, geometries, spec.shortcut)
    size = pass_size(x.shape[0], backend.images_per_pass(dtype.itemsize * largest_pair(maps)))
    with torch.autocast(x.device.type, enabled=False):
        packed = [
            backend.pack(w, a, g, (size, *operand), keep=False)
            for w, a, g, operand in zip(weights, scales, geometries, operands, strict=True)
        ]
        added = chain_shifts([b.to(accumulator_dtype(dtype)) for b in shifts], spec.shortcut)

        def block(part: Tensor) -> Tensor:
            part = part.to(dtype).contiguous(memory_format=torch.channels_last)
            return run(backend, part, [PackedBlock(packed, added, geometries, spec.shortcut, spec.relu)])

        return in_passes(x, size, block).to(x.dtype, memory_format=torch.channels_last)


def _fake(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], shifts: Sequence[Tensor], *fields: Any
) -> Tensor:
    spec = BlockSpec.of(fields)
    sizes = map_sizes(x.shape[1:], [w.shape for w in weights], spec.geometries(weights), spec.shortcut)
    return x.new_empty((x.shape[0], *sizes.maps[-1])).to(memory_format=torch.channels_last)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weights, scales, shifts, *fields = inputs
    ctx.fields, ctx.count = fields, len(weights)
    ctx.save_for_backward(x, output if BlockSpec.of(fields).relu else None, *weights, *scales, *shifts)


def _unfolded_weight_grad(dz: Tensor, h: Tensor, shape: Sequence[int], g: Geometry) -> Tensor:
    """Return the weight gradient as a product with the unfolded h. For small maps."""
    rows = F.unfold(h, tuple(shape[2:]), g.dilation, g.padding, g.stride)
    rows, dz = (t.flatten(2).unflatten(1, (g.groups, -1)) for t in (rows, dz))
    return torch.einsum("ngkl,ngcl->gkc", dz, rows).reshape(shape)


def _conv_grad(
    dz: Tensor, h: Tensor, w: Tensor, a: Tensor, g: Geometry, c: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return dh and (dw, da, db) of z = a * c + b with c = conv(h, w)."""
    folded = (w.to(a.dtype) * a[:, None, None, None]).to(w.dtype)
    # oneDNN's bf16 weight gradient on processors with AMX leaves garbage in a tap that sees only padding.
    padding_alone = dz.is_cpu and (min(dz.shape[2:]) - 1) * g.stride < g.padding
    dh, G, _ = torch.ops.aten.convolution_backward(
        dz.contiguous(memory_format=torch.channels_last),
        h,
        folded,
        None,
        [g.stride] * 2,
        [g.padding] * 2,
        [g.dilation] * 2,
        False,
        [0, 0],
        g.groups,
        [True, not padding_alone, False],
    )
    if padding_alone:
        G = _unfolded_weight_grad(dz.to(a.dtype), h.to(a.dtype), w.shape, g)
    dw = (G.to(a.dtype) * a[:, None, None, None]).to(w.dtype)
    exact_dz = dz.to(a.dtype)
    return dh, (dw, (exact_dz * c).sum((0, 2, 3)), exact_dz.sum((0, 2, 3)))


def _backward(ctx: Any, dy: Tensor) -> tuple:
    # The dtypes are those of the forward, whatever autocast is set to by now.
    with torch.autocast(dy.device.type, enabled=False):
        return _chain_rule(ctx, dy)


def _chain_rule(ctx: Any, dy: Tensor) -> tuple:
    """Return the gradients of the op's arguments in differentiable torch ops.

    Only x and y are saved: the chain is computed again from x.
    """
    spec, count = BlockSpec.of(ctx.fields), ctx.count
    x, y, *rest = ctx.saved_tensors
    weights, scales, shifts = rest[:count], rest[count : 2 * count], rest[2 * count :]
    geometries, n = spec.geometries(weights), spec.n
    hs, cs = [x], []
    for w, a, b, g in list(zip(weights, scales, shifts, geometries, strict=True))[:n]:
        cs.append(F.conv2d(hs[-1], w, None, *g))
        hs.append(torch.relu(torch.addcmul(b[:, None, None], a[:, None, None], cs[-1].to(a.dtype))).to(x.dtype))
    d = dy if y is None else torch.where(y <= 0, 0, dy)  # a NaN's gradient passes, as through torch's relu
    grads, dx = [], None
    if spec.projected:
        c = F.conv2d(x, weights[-1], None, *geometries[-1])
        dx, grad = _conv_grad(d, x, weights[-1], scales[-1], geometries[-1], c)
        grads.append(grad)
    elif spec.shortcut == "zero_pad":
        dx = torch.zeros_like(x)
        s = total_stride(geometries)
        dx[:, :, ::s, ::s] = d[:, : x.shape[1]]
    elif spec.shortcut == "identity":
        dx = d
    for i in range(n - 1, -1, -1):
        d, grad = _conv_grad(d, hs[i], weights[i], scales[i], geometries[i], cs[i])
        grads.insert(0, grad)
        d = torch.where(hs[i] <= 0, 0, d) if i else d
    dweights, dscales, dshifts = (list(t) for t in zip(*grads, strict=True))
    # An empty list counts as a list of tensors.
    rest = [[] if field == [] else None for field in ctx.fields]
    return d if dx is None else dx + d, dweights, dscales, dshifts, *rest


LIBRARY = torch.library.Library("resnet_kernels", "DEF")
LIBRARY.define(
    f"residual_block(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] shifts, {BlockSpec.SCHEMA}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("residual_block", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("resnet_kernels::residual_block", _fake, lib=LIBRARY)
torch.library.register_autograd("resnet_kernels::residual_block", _backward, setup_context=_setup_context, lib=LIBRARY)


def residual_block(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], shifts: Sequence[Tensor], spec: BlockSpec
) -> Tensor:
    """y = relu(a_n * conv(... relu(a_1 * conv(x, W_1) + b_1) ..., W_n) + b_n + shortcut(x))

    Args:
        x: (N, C, H, W) fp64|fp32|bf16|fp16, channels_last (converted if not).
        weights: the chain's (K, C/groups, R, S), R = S odd, in x's dtype; with a projection its (K, C, 1, 1) last.
            The padding is dilation * (R // 2).
        scales, shifts: for each weight a (K,) pair in fp32 (fp64 for fp64 x). For a batch norm they are
            weight / sqrt(running_var + eps) and bias - running_mean * scale.
        spec: strides, dilations, groups, shortcut and final ReLU. Only a block without a shortcut may end without a
            ReLU; `preactivation` and `pool` are for `residual_block_training`.
    Returns:
        y: (N, K, P, Q) in x's dtype, channels_last.
    Raises:
        TypeError, ValueError: dtypes or shapes do not fit, before anything runs.
        BackendUnavailable: the backend that was named cannot run the block.
    Numerics: accumulation, scale, shift and residual addition in fp32; intermediates are rounded to x's dtype (CPUs
        without 16-bit arithmetic keep them in fp32). The backends library and cpu fold the scale into the weight. ReLU
        propagates NaN. The backward computes the chain again from x, in differentiable torch ops.
    """
    check(x, weights, scales, shifts, spec)
    return torch.ops.resnet_kernels.residual_block(x, list(weights), list(scales), list(shifts), *spec.flat())


def check(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], shifts: Sequence[Tensor], spec: BlockSpec
) -> None:
    """Raise TypeError or ValueError unless the arguments of `residual_block` fit each other."""
    check_chain(x, weights, spec)
    if spec.preactivation or spec.pool is not None:
        raise ValueError(f"spec: expected no preactivation and no pool with known statistics, got {spec}")
    if not spec.relu and spec.shortcut != "none":
        raise ValueError(f"relu: expected True with shortcut {spec.shortcut!r}; without one it may be False")
    if not len(weights) == len(scales) == len(shifts):
        raise ValueError(f"expected {len(weights)} scales and shifts, got {len(scales)} and {len(shifts)}")
    vector_dtype = accumulator_dtype(x.dtype)
    for i, (w, a, b) in enumerate(zip(weights, scales, shifts, strict=True)):
        for name, t, dtype in (
            (f"weights[{i}]", w, x.dtype),
            (f"scales[{i}]", a, vector_dtype),
            (f"shifts[{i}]", b, vector_dtype),
        ):
            if t.dtype != dtype:
                raise TypeError(f"{name}: expected {dtype} beside x in {x.dtype}, got {t.dtype}")
            if t.device != x.device:
                raise ValueError(f"{name}: expected it on {x.device}, as x, got {t.device}")
        if a.shape != w.shape[:1] or b.shape != w.shape[:1]:
            raise ValueError(
                f"scales[{i}], shifts[{i}]: expected ({w.shape[0]},), got {tuple(a.shape)}, {tuple(b.shape)}"
            )


def check_chain(x: Tensor, weights: Sequence[Tensor], spec: BlockSpec) -> None:
    """Raise TypeError or ValueError unless the weights and the spec describe a block over x."""
    if spec.shortcut not in SHORTCUTS:
        raise ValueError(f"shortcut: expected one of {', '.join(SHORTCUTS)}, got {spec.shortcut!r}")
    sequences = (weights, spec.strides, spec.dilations, spec.groups)
    least = 2 if spec.projected else 1
    if len({len(v) for v in sequences}) != 1 or len(weights) < least:
        raise ValueError(
            f"expected one weight, stride, dilation and groups per convolution, "
            f"at least {least}, got {[len(v) for v in sequences]}"
        )
    if x.dim() != 4:
        raise ValueError(f"x: expected (N, C, H, W), got {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
    sizes = tuple(x.shape)
    for i, w in enumerate(weights):
        projection = spec.projected and i == len(weights) - 1
        out = _checked_output(i, w, x, x.shape if projection else sizes, spec)
        if projection and out != sizes:
            raise ValueError(f"shortcut: expected a projection to {sizes}, got {out}")
        sizes = out
    if spec.shortcut == "identity" and sizes != tuple(x.shape):
        raise ValueError(f"shortcut: identity needs y of x's sizes {tuple(x.shape)}, got {sizes}")
    if spec.shortcut == "zero_pad" and sizes[1] < x.shape[1]:
        raise ValueError(f"shortcut: zero_pad needs at least x's {x.shape[1]} channels in y, got {sizes[1]}")


def _checked_output(i: int, w: Tensor, x: Tensor, sizes: Sequence[int], spec: BlockSpec) -> tuple[int, ...]:
    """Return the sizes of convolution i's output for an operand of `sizes`; raise ValueError if it does not fit."""
    if w.dim() != 4 or w.shape[2] != w.shape[3] or w.shape[2] % 2 == 0:
        raise ValueError(f"weights[{i}]: expected (K, C, R, R) with R odd, got {tuple(w.shape)}")
    if w.device != x.device:
        raise ValueError(f"weights[{i}]: expected it on {x.device}, as x, got {w.device}")
    _, C, H, W = sizes
    groups = spec.groups[i]
    if C != w.shape[1] * groups or w.shape[0] % groups:
        raise ValueError(f"weights[{i}]: {tuple(w.shape)} with groups={groups} does not fit {C} channels")
    g = same_padding(w, spec.strides[i], spec.dilations[i], groups)
    return x.shape[0], w.shape[0], g.output_size(H, w.shape[2]), g.output_size(W, w.shape[3])
