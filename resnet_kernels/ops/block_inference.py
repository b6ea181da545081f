"""The residual block with known statistics as one op, and its gradient.

    h_0 = x;  h_i = relu(a_i * conv(h_{i-1}, W_i) + b_i)  for i < n
    y = relu(a_n * conv(h_{n-1}, W_n) + b_n + shortcut(x))
    shortcut(x) = x  |  a_s * conv(x, W_s) + b_s  |  x subsampled, zero channels appended  |  nothing

A chain without a shortcut may also end without its ReLU. Bottleneck and basic block are this with n = 3 and n = 2.
Scales and shifts come from batch norms with running statistics (`batch_norm.affine_of`), whose own gradients autograd
derives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import select
from ..backends.contract import Backend, Call, Epilogue, Geometry, Operand, PackedBlock, Product, accumulator_dtype

SHORTCUTS = ("identity", "projection", "zero_pad", "none")


def same_padding(weight: Tensor, stride: int, dilation: int, groups: int) -> Geometry:
    """The geometry of a block's convolution: an odd filter, padded so that stride 1 keeps the map's size."""
    return Geometry(stride, dilation * (weight.shape[2] // 2), dilation, groups)


def zero_pad(x: Tensor, stride: int, channels: int) -> Tensor:
    """Option A: every stride-th row and column, zero channels appended up to `channels`."""
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, channels - x.shape[1]))


def total_stride(geometries: Sequence[Geometry]) -> int:
    stride = 1
    for g in geometries:
        stride *= g.stride
    return stride


def call_of_block(
    device: torch.device,
    dtype: torch.dtype,
    weights: Sequence[tuple[int, ...]],
    geometries: Sequence[Geometry],
    shortcut: str,
    size: tuple[int, ...] = (),
) -> Call:
    """What a backend must be able to do to run the block; metadata for `select`."""
    further = {"projection": {"two_products"}, "none": set[str]()}.get(shortcut, {"residual"})
    return Call(device, dtype, frozenset({"conv"} | further), tuple(zip(weights, geometries, strict=True)), size)


def chain_shifts(shifts: Sequence[Tensor], shortcut: str) -> list[Tensor]:
    """The chain's shifts, the last with the projection's added: they meet in one sum."""
    return [*shifts[:-2], shifts[-2] + shifts[-1]] if shortcut == "projection" else list(shifts)


def run(backend: Backend, x: Tensor, blocks: Sequence[PackedBlock], overwrite: bool = False) -> Tensor:
    """Blocks, one after the other, by a backend's primitives. `overwrite`: the result may take x's memory."""
    whole = getattr(backend, "residual_blocks", None)
    if whole is not None and all(block.shortcut != "none" for block in blocks):
        return whole(x, blocks, overwrite)
    one = getattr(backend, "residual_block", None)
    for i, block in enumerate(blocks):
        y = None if one is None else one(x, block)
        x = _run(backend, x, block, overwrite or i > 0) if y is None else y
    return x


def _run(backend: Backend, x: Tensor, block: PackedBlock, overwrite: bool) -> Tensor:
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
    """How many images to run at a time: at most `limit`, in passes of one size."""
    if limit is None or images <= limit:
        return images
    passes = -(-images // limit)
    return -(-images // passes)


def in_passes(x: Tensor, size: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(x), `size` images at a time. All passes have one size, as weights are packed for it: the last overlaps
    the one before where the batch does not divide."""
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


def walk(
    size: Sequence[int], weights: Sequence[Sequence[int]], geometries: Sequence[Geometry], shortcut: str | None
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """For an input of `size` = (C, H, W): the sizes of every convolution's operand, and of the activations that follow
    each other, from the input to the result. They differ by the projection, whose operand is the input again."""
    C, H, W = size
    maps = [(C, H, W)]
    n = len(weights) - (shortcut == "projection")
    for w, g in zip(weights[:n], geometries[:n], strict=True):
        _, H, W = maps[-1]
        maps.append((w[0], g.output_size(H, w[2]), g.output_size(W, w[3])))
    return maps[:n] + [maps[0]] * (len(weights) - n), maps


def largest_pair(sizes: Sequence[tuple[int, int, int]]) -> int:
    """Elements of the largest activation beside its successor, of one image going through these sizes."""
    counts = [C * H * W for C, H, W in sizes]
    return max(a + b for a, b in zip(counts, counts[1:], strict=False))


def _geometries(
    weights: Sequence[Tensor], strides: Sequence[int], dilations: Sequence[int], groups: Sequence[int]
) -> list[Geometry]:
    return [same_padding(w, *sdg) for w, *sdg in zip(weights, strides, dilations, groups, strict=True)]


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    strides: Sequence[int],
    dilations: Sequence[int],
    groups: Sequence[int],
    shortcut: str,
    relu: bool,
) -> Tensor:
    geometries = _geometries(weights, strides, dilations, groups)
    shapes = [tuple(w.shape) for w in weights]
    backend = select.choose(call_of_block(x.device, x.dtype, shapes, geometries, shortcut, tuple(x.shape)))
    dtype = backend.compute_dtype(x.dtype)
    operands, maps = walk(x.shape[1:], shapes, geometries, shortcut)
    size = pass_size(x.shape[0], backend.images_per_pass(dtype.itemsize * largest_pair(maps)))
    with torch.autocast(x.device.type, enabled=False):
        packed = [
            backend.pack(w, a, g, (size, *operand), keep=False)
            for w, a, g, operand in zip(weights, scales, geometries, operands, strict=True)
        ]
        added = chain_shifts([b.to(accumulator_dtype(dtype)) for b in shifts], shortcut)

        def block(part: Tensor) -> Tensor:
            part = part.to(dtype).contiguous(memory_format=torch.channels_last)
            return run(backend, part, [PackedBlock(packed, added, geometries, shortcut, relu)])

        return in_passes(x, size, block).to(x.dtype, memory_format=torch.channels_last)


def _fake(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    strides: Sequence[int],
    dilations: Sequence[int],
    groups: Sequence[int],
    shortcut: str,
    relu: bool,
) -> Tensor:
    geometries = _geometries(weights, strides, dilations, groups)
    _, maps = walk(x.shape[1:], [w.shape for w in weights], geometries, shortcut)
    return x.new_empty((x.shape[0], *maps[-1])).to(memory_format=torch.channels_last)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weights, scales, shifts, strides, dilations, groups, shortcut, relu = inputs
    ctx.save_for_backward(x, output if relu else None, *weights, *scales, *shifts)
    ctx.meta = len(weights), strides, dilations, groups, shortcut


def _weight_grad(dz: Tensor, h: Tensor, shape: Sequence[int], g: Geometry) -> Tensor:
    """By a product with the unfolded h: for small maps."""
    rows = F.unfold(h, tuple(shape[2:]), g.dilation, g.padding, g.stride)
    rows, dz = (t.flatten(2).unflatten(1, (g.groups, -1)) for t in (rows, dz))
    return torch.einsum("ngkl,ngcl->gkc", dz, rows).reshape(shape)


def _conv_grad(
    dz: Tensor, h: Tensor, w: Tensor, a: Tensor, g: Geometry, c: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Of z = a * c + b, c = conv(h, w): dh and (dw, da, db)."""
    folded = (w.to(a.dtype) * a[:, None, None, None]).to(w.dtype)
    # The first tap sees nothing but padding.
    bare = dz.is_cpu and (min(dz.shape[2:]) - 1) * g.stride < g.padding
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
        [True, not bare, False],
    )
    if bare:
        # oneDNN's bf16 gradient on processors with AMX holds for such a tap what memory held before.
        G = _weight_grad(dz.to(a.dtype), h.to(a.dtype), w.shape, g)
    dw = (G.to(a.dtype) * a[:, None, None, None]).to(w.dtype)
    wide_dz = dz.to(a.dtype)
    return dh, (dw, (wide_dz * c).sum((0, 2, 3)), wide_dz.sum((0, 2, 3)))


def _backward(ctx: Any, dy: Tensor) -> tuple:
    # In the dtypes of the forward, whatever autocast says by now.
    with torch.autocast(dy.device.type, enabled=False):
        return _chain_rule(ctx, dy)


def _chain_rule(ctx: Any, dy: Tensor) -> tuple:
    """Recomputes the chain from x (only x and y are kept), then the chain rule, in differentiable torch ops."""
    count, strides, dilations, groups, shortcut = ctx.meta
    x, y, *rest = ctx.saved_tensors
    weights, scales, shifts = rest[:count], rest[count : 2 * count], rest[2 * count :]
    geometries = _geometries(weights, strides, dilations, groups)
    n = count - (shortcut == "projection")
    hs, cs = [x], []
    for w, a, b, g in list(zip(weights, scales, shifts, geometries, strict=True))[:n]:
        cs.append(F.conv2d(hs[-1], w, None, *g))
        hs.append(torch.relu(torch.addcmul(b[:, None, None], a[:, None, None], cs[-1].to(a.dtype))).to(x.dtype))
    d = dy if y is None else torch.where(y <= 0, 0, dy)  # a NaN's gradient passes, as through torch's relu
    grads, dx = [], None
    if shortcut == "projection":
        c = F.conv2d(x, weights[-1], None, *geometries[-1])
        dx, grad = _conv_grad(d, x, weights[-1], scales[-1], geometries[-1], c)
        grads.append(grad)
    elif shortcut == "zero_pad":
        dx = torch.zeros_like(x)
        s = total_stride(geometries)
        dx[:, :, ::s, ::s] = d[:, : x.shape[1]]
    elif shortcut == "identity":
        dx = d
    for i in range(n - 1, -1, -1):
        d, grad = _conv_grad(d, hs[i], weights[i], scales[i], geometries[i], cs[i])
        grads.insert(0, grad)
        d = torch.where(hs[i] <= 0, 0, d) if i else d
    dweights, dscales, dshifts = (list(t) for t in zip(*grads, strict=True))
    return d if dx is None else dx + d, dweights, dscales, dshifts, None, None, None, None, None


LIBRARY = torch.library.Library("resnet_kernels", "DEF")
LIBRARY.define(
    "residual_block(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] shifts, int[] strides, int[] dilations, "
    "int[] groups, str shortcut, bool relu) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("residual_block", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("resnet_kernels::residual_block", _fake, lib=LIBRARY)
torch.library.register_autograd("resnet_kernels::residual_block", _backward, setup_context=_setup_context, lib=LIBRARY)


def residual_block(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    strides: Sequence[int],
    dilations: Sequence[int],
    groups: Sequence[int],
    shortcut: str = "identity",
    relu: bool = True,
) -> Tensor:
    """y = relu(a_n * conv(... relu(a_1 * conv(x, W_1) + b_1) ..., W_n) + b_n + shortcut(x))

    Args:
        x: (N, C, H, W) fp64|fp32|bf16|fp16, channels_last (converted if not).
        weights: the chain's (K, C/groups, R, S), odd R = S, in x's dtype; with shortcut "projection" the
            projection's (K, C, 1, 1) last. Padding is dilation * (R // 2).
        scales, shifts: per weight a (K,) pair in fp32 (fp64 for fp64 x): of a batch norm, weight / sqrt(var + eps)
            and bias - mean * scale.
        strides, dilations, groups: one int per weight.
        shortcut: "identity", "projection", "zero_pad" (option A: x subsampled, zero channels appended) or "none".
        relu: whether y ends with a ReLU; always, unless the shortcut is "none".
    Returns:
        y: (N, K, P, Q) in x's dtype, channels_last.
    Raises:
        TypeError, ValueError: dtypes or shapes do not fit, before anything runs.
        BackendUnavailable: the backend that was named cannot run it.
    Numerics: accumulation, scale, shift and residual add in fp32, intermediates rounded to x's dtype (kept in fp32 by
        CPUs without 16-bit arithmetic). The backends library and cpu fold the scale into the weight. ReLU propagates
        NaN. The backward recomputes the chain from x; it is made of differentiable torch ops.
    """
    check(x, weights, scales, shifts, strides, dilations, groups, shortcut, relu)
    op = torch.ops.resnet_kernels.residual_block
    return op(x, weights, scales, shifts, strides, dilations, groups, shortcut, relu)


def check(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    strides: Sequence[int],
    dilations: Sequence[int],
    groups: Sequence[int],
    shortcut: str = "identity",
    relu: bool = True,
) -> None:
    """Raises TypeError or ValueError unless the arguments of `residual_block` fit each other."""
    check_chain(x, weights, strides, dilations, groups, shortcut)
    if not relu and shortcut != "none":
        raise ValueError(f"relu: expected True with shortcut {shortcut!r}; without one it may be False")
    if not len(weights) == len(scales) == len(shifts):
        raise ValueError(f"expected {len(weights)} scales and shifts, got {len(scales)} and {len(shifts)}")
    for i, (w, a, b) in enumerate(zip(weights, scales, shifts, strict=True)):
        for name, t, dtype in (
            (f"weights[{i}]", w, x.dtype),
            (f"scales[{i}]", a, accumulator_dtype(x.dtype)),
            (f"shifts[{i}]", b, accumulator_dtype(x.dtype)),
        ):
            if t.dtype != dtype:
                raise TypeError(f"{name}: expected {dtype} beside x in {x.dtype}, got {t.dtype}")
            if t.device != x.device:
                raise ValueError(f"{name}: expected it on {x.device}, as x, got {t.device}")
        if a.shape != w.shape[:1] or b.shape != w.shape[:1]:
            raise ValueError(
                f"scales[{i}], shifts[{i}]: expected ({w.shape[0]},), got {tuple(a.shape)}, {tuple(b.shape)}"
            )


def check_chain(
    x: Tensor,
    weights: Sequence[Tensor],
    strides: Sequence[int],
    dilations: Sequence[int],
    groups: Sequence[int],
    shortcut: str,
) -> None:
    """Raises TypeError or ValueError unless weights, geometries and shortcut make a block over x."""
    if shortcut not in SHORTCUTS:
        raise ValueError(f"shortcut: expected one of {', '.join(SHORTCUTS)}, got {shortcut!r}")
    sequences = (weights, strides, dilations, groups)
    least = 2 if shortcut == "projection" else 1
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
        projection = shortcut == "projection" and i == len(weights) - 1
        if w.dim() != 4 or w.shape[2] != w.shape[3] or w.shape[2] % 2 == 0:
            raise ValueError(f"weights[{i}]: expected (K, C, R, R) with R odd, got {tuple(w.shape)}")
        if w.device != x.device:
            raise ValueError(f"weights[{i}]: expected it on {x.device}, as x, got {w.device}")
        C, H, W = (x.shape if projection else sizes)[1:]
        if C != w.shape[1] * groups[i] or w.shape[0] % groups[i]:
            raise ValueError(f"weights[{i}]: {tuple(w.shape)} with groups={groups[i]} does not fit {C} channels")
        g = same_padding(w, strides[i], dilations[i], groups[i])
        out = (x.shape[0], w.shape[0], g.output_size(H, w.shape[2]), g.output_size(W, w.shape[3]))
        if projection and out != sizes:
            raise ValueError(f"shortcut: expected a projection to {sizes}, got {out}")
        sizes = out
    if shortcut == "identity" and sizes != tuple(x.shape):
        raise ValueError(f"shortcut: identity needs y of x's sizes {tuple(x.shape)}, got {sizes}")
    if shortcut == "zero_pad" and sizes[1] < x.shape[1]:
        raise ValueError(f"shortcut: zero_pad needs at least x's {x.shape[1]} channels in y, got {sizes[1]}")
