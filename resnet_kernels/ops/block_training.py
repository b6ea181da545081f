"""Training as torch ops: residual blocks and stems with batch statistics, differentiable once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import select
from ..backends.contract import Call, Geometry, Pool, accumulator_dtype
from .batch_norm import BatchNorm, update_running
from .block_inference import LIBRARY, check_chain, same_padding, walk
from .chain_training import Backward, Forward, Kept, Plan, stored_outputs
from .preactivation_training import PreactivationBackward, PreactivationForward


def call_of_training(
    device: torch.device,
    dtype: torch.dtype,
    weights: Sequence[Sequence[int]],
    geometries: Sequence[Sequence[int]],
    size: Sequence[int],
    pool: bool = False,
) -> Call:
    shapes = tuple((tuple(w), Geometry(*g)) for w, g in zip(weights, geometries, strict=True))
    return Call(device, dtype, frozenset({"training"} | ({"pool"} if pool else set())), shapes, tuple(size))


# A compiler takes what it says for granted: what is built, and which tables there are, is no part of its graph.
@torch.compiler.assume_constant_result
def _chosen(
    device: torch.device,
    dtype: torch.dtype,
    weights: list[tuple[int, ...]],
    geometries: list[tuple[int, ...]],
    size: tuple[int, ...],
    pool: bool,
) -> str:
    """The name of the backend that runs a call, forward and backward."""
    return select.choose(call_of_training(device, dtype, weights, geometries, size, pool)).NAME


# Kernel of a stem's pooling: more elements have no index in a byte.
MOST_POOLED = 15

# The ops. Lists of numbers are a plan's fields, in their order.
PLAN = (
    "int[] strides, int[] dilations, int[] groups, float[] eps, bool[] batch, str[] groups_of, str shortcut, "
    "bool relu, bool preactivation, bool[] stored, int[] pool, str backend"
)


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    *plan: Any,
) -> list[Tensor]:
    p = Plan(*plan)
    x = x.contiguous(memory_format=torch.channels_last)
    kind = PreactivationForward if p.preactivation else Forward

    def run() -> list[Tensor]:
        return kind(select.BY_NAME[p.backend], x, weights, gammas, betas, means, variances, p).run().flat()

    return _by_plan("forward", p, (), [x, *weights, *gammas, *betas, *means, *variances], run)


def _by_plan(
    what: str, plan: Plan, needs: tuple, tensors: Sequence[Tensor], function: Callable[[], list[Tensor]]
) -> list[Tensor]:
    """function(), in the dtypes of its operands whatever autocast says, by the backend's shortcut if it has one."""
    taped = getattr(select.BY_NAME[plan.backend], "taped", None)
    with torch.autocast(tensors[0].device.type, enabled=False):
        # What processes tell each other is no function of tensors.
        if taped is None or any(plan.groups_of):
            return function()
        fields = (tuple(field) if isinstance(field, (list, tuple)) else field for field in plan)
        return taped((what, *fields, *needs), tensors, function)


def _nhwc(x: Tensor, sizes: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(tuple(sizes), dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)


def pooled_size(size: Sequence[int], pool: Pool) -> tuple[int, int]:
    """Of the result of max pooling a map of `size` (H, W)."""
    g = Geometry(pool.stride, pool.padding)
    return g.output_size(size[0], pool.kernel), g.output_size(size[1], pool.kernel)


def _forward_fake(
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    *plan: Any,
) -> list[Tensor]:
    p = Plan(*plan)
    geometries = p.geometries(weights)
    operands, maps = walk(x.shape[1:], [w.shape for w in weights], geometries, p.shortcut)
    # What the batch norms are of, and what is stored, by their index.
    outputs = maps[: p.n] if p.preactivation else [*maps[1:], maps[-1]]
    result = (x.shape[0], *maps[-1])
    mask = select.BY_NAME[p.backend].mask_size(result) if p.relu else None
    if p.pool:
        result = (*result[:2], *pooled_size(result[2:], Pool(*p.pool)))
    w = accumulator_dtype(x.dtype)
    c = {i: _nhwc(x, (x.shape[0], *outputs[i])) for i in p.outputs()}
    tables = [x.new_empty(5, sizes[0], dtype=w) for sizes in outputs[: len(p.batch)]]
    moments = {
        i: (x.new_empty(operands[i][0], dtype=w), x.new_empty(operands[i][0], operands[i][0], dtype=w))
        for i in p.moments()
    }
    masking = _nhwc(x, result, torch.uint8) if p.pool else x.new_empty(mask or 0, dtype=torch.uint8)
    return Kept(_nhwc(x, result), masking, c, tables, moments).flat()


def _backward(
    dy: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    kept: Sequence[Tensor],
    need_x: bool,
    need_weights: Sequence[bool],
    need_norms: Sequence[bool],
    *plan: Any,
) -> list[Tensor]:
    p = Plan(*plan)
    x, dy = (t.to(x.dtype).contiguous(memory_format=torch.channels_last) for t in (x, dy))
    kind = PreactivationBackward if p.preactivation else Backward

    def run() -> list[Tensor]:
        backend = select.BY_NAME[p.backend]
        found = kind(backend, x, weights, Kept.of(kept, p), p, need_x, need_weights, need_norms).run(dy)
        nothing = x.new_empty(0)
        wanted = [found.x if need_x else None]
        dweights = [g if g is None else _laid_out_as(w, g) for w, g in zip(weights, found.weights, strict=True)]
        for grads, needs in ((dweights, need_weights), (found.gammas, need_norms), (found.betas, need_norms)):
            wanted += [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        # An op's results are no views of each other, nor of its arguments.
        return [nothing.clone() if t is None else t for t in wanted]

    needs = (need_x, *need_weights, *need_norms)
    return _by_plan("backward", p, needs, [dy, x, *weights, *kept], run)


def _laid_out_as(weight: Tensor, grad: Tensor) -> Tensor:
    """The gradient in its weight's layout, as DDP's buckets, optimizers and compilers expect it."""
    grad = grad.view(weight.shape)
    if all(n == 1 or s == t for n, s, t in zip(weight.shape, weight.stride(), grad.stride(), strict=True)):
        return grad.as_strided(weight.shape, weight.stride())
    return torch.empty_like(weight, dtype=grad.dtype).copy_(grad)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    kept: Sequence[Tensor],
    need_x: bool,
    need_weights: Sequence[bool],
    need_norms: Sequence[bool],
    *plan: Any,
) -> list[Tensor]:
    w = accumulator_dtype(x.dtype)
    channels = [t.shape[1:] for t in Kept.of(kept, Plan(*plan)).tables]
    grads = [_nhwc(x, x.shape) if need_x else x.new_empty(0)]
    for weight, need in zip(weights, need_weights, strict=True):
        grads.append(torch.empty_like(weight, dtype=w) if need else x.new_empty(0))
    for size, need in zip([*channels, *channels], [*need_norms, *need_norms], strict=True):
        grads.append(x.new_empty(size, dtype=w) if need else x.new_empty(0))
    return grads


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, weights, gammas, betas, _, _, *plan = inputs
    y, mask, *rest = output
    # y is read where it is the mask of its own ReLU; else only sizes are, which dy has too.
    needed = Plan(*plan).relu and not Plan(*plan).pool and mask.numel() == 0
    ctx.save_for_backward(x, *weights, y if needed else mask.new_empty(0), mask, *rest)
    ctx.plan, ctx.count = plan, len(weights)
    ctx.dtypes = [[t.dtype for t in tensors] for tensors in (weights, gammas, betas)]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple:
    x, *rest = ctx.saved_tensors
    weights, kept = rest[: ctx.count], rest[ctx.count :]
    need_x, *needs = ctx.needs_input_grad[:4]
    dx: Tensor | None = None
    lists: list[list[Tensor | None]] = [[None] * len(dtypes) for dtypes in ctx.dtypes]
    if grads[0] is not None:
        need_weights, need_gammas, need_betas = needs
        need_norms = [g or b for g, b in zip(need_gammas, need_betas, strict=True)]
        op = torch.ops.resnet_kernels.residual_block_training_backward
        flat = iter(op(grads[0], x, weights, kept, need_x, list(need_weights), need_norms, *ctx.plan))
        first = next(flat)
        dx = first if need_x else None
        for i, (need, dtypes) in enumerate(zip(needs, ctx.dtypes, strict=True)):
            found = [next(flat) for _ in dtypes]
            lists[i] = [t.to(d) if wanted else None for t, wanted, d in zip(found, need, dtypes, strict=True)]
    no_vectors: list[None] = [None] * len(ctx.dtypes[1])
    # An empty list is taken for one of tensors.
    return (dx, *lists, no_vectors, list(no_vectors), *([] if field == [] else None for field in ctx.plan))


def _no_second_derivative(ctx: Any, *grads: Any) -> tuple:
    raise RuntimeError(
        "resnet_kernels: a block with batch statistics has no second derivatives; "
        "for them run it as plain torch modules: resnet_kernels.use_backend('eager')"
    )


LIBRARY.define(
    "residual_block_training(Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas, Tensor[] means, "
    f"Tensor[] variances, {PLAN}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "residual_block_training_backward(Tensor dy, Tensor x, Tensor[] weights, Tensor[] kept, bool need_x, "
    f"bool[] need_weights, bool[] need_norms, {PLAN}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _name, _run, _fake in (
    ("residual_block_training", _forward, _forward_fake),
    ("residual_block_training_backward", _backward, _backward_fake),
):
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resnet_kernels::{_name}", _fake, lib=LIBRARY)
torch.library.register_autograd(
    "resnet_kernels::residual_block_training", _gradients, setup_context=_setup_context, lib=LIBRARY
)
torch.library.register_autograd("resnet_kernels::residual_block_training_backward", _no_second_derivative, lib=LIBRARY)


def arguments(
    x: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[BatchNorm],
    strides: Sequence[int],
    dilations: Sequence[int],
    groups: Sequence[int],
    shortcut: str,
    relu: bool,
    preactivation: bool = False,
    pool: Pool | None = None,
) -> tuple[list[list[Tensor]], Plan]:
    """What the op takes beside x and weights: gammas, betas, means and variances; its plan."""
    geometries = [same_padding(w, *row) for w, *row in zip(weights, strides, dilations, groups, strict=True)]
    shapes = [tuple(w.shape) for w in weights]
    # A compiler's sizes may be symbols; only what was measured depends on them.
    size = () if torch.compiler.is_compiling() else tuple(x.shape)
    plan = Plan(
        list(strides), list(dilations), list(groups), [n.eps for n in norms], [n.batch for n in norms],
        [n.group for n in norms], shortcut, relu, preactivation, [False, False], list(pool or ()),
        _chosen(x.device, x.dtype, shapes, [tuple(g) for g in geometries], size, pool is not None),
    )  # fmt: skip
    if not preactivation:
        plan = plan._replace(stored=stored_outputs(x.shape, shapes, plan, geometries))
    channels = [w.shape[0] for w in weights]
    if preactivation:
        channels = [x.shape[1], *channels][: len(norms)]
    vectors = [norm.vectors(x, K) for norm, K in zip(norms, channels, strict=True)]
    return [[row[i] for row in vectors] for i in range(4)], plan


def run(x: Tensor, weights: Sequence[Tensor], vectors: Sequence[list[Tensor]], plan: Plan) -> Kept:
    """The op's results; the running statistics are not moved."""
    op = torch.ops.resnet_kernels.residual_block_training
    return Kept.of(op(x, list(weights), *vectors, *plan), plan)


def residual_block_training(
    x: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[BatchNorm],
    strides: Sequence[int],
    dilations: Sequence[int],
    groups: Sequence[int],
    shortcut: str = "identity",
    relu: bool = True,
) -> Tensor:
    """y = relu(bn_n(conv(... relu(bn_1(conv(x, W_1))) ..., W_n)) + shortcut(x))

    Args:
        x: (N, C, H, W) fp64|fp32|bf16|fp16, channels_last (converted if not). Under autocast, in its dtype (converted).
        weights: the chain's (K, C/groups, R, S), odd R = S, then with shortcut "projection" the projection's
            (K, C, 1, 1); in x's dtype or in fp32. Padding is dilation * (R // 2).
        norms: per weight its batch norm. Running statistics and counters are moved in place.
        strides, dilations, groups: one int per weight.
        shortcut: "identity", "projection", "zero_pad" (option A: x subsampled, zero channels appended) or "none".
        relu: whether y ends with a ReLU.
    Returns:
        y: (N, K, P, Q) in x's dtype, channels_last.
    Raises:
        TypeError, ValueError: dtypes or shapes do not fit, or a batch norm sees one value per channel, before anything
            runs.
        BackendUnavailable: no backend trains it here, or the one that was named does not.
    Numerics: accumulation, statistics, scale, shift and residual add in fp32 (fp64 for fp64); c_i, h_i and y rounded to
        x's dtype; the weights' gradients are rounded once, from fp32 to the weight's dtype. ReLU propagates NaN, and a
        NaN's gradient passes. Deterministic where the engine of the 3x3 convolutions is. No second derivatives: asking
        for them raises RuntimeError.
    Keeps for the gradient: x, c_1 .. c_{n-1}, y or a bit for each of its elements, vectors per channel, and for a 1x1
        at the end or a projection the second moments of its operand (channels^2, fp32) in place of its output.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    check(x, weights, norms, strides, dilations, groups, shortcut)
    vectors, plan = arguments(x, weights, norms, strides, dilations, groups, shortcut, relu)
    kept = run(x, weights, vectors, plan)
    update_running(norms, kept.tables)
    return kept.y


def preactivation_block(
    x: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[BatchNorm],
    strides: Sequence[int],
    dilations: Sequence[int],
    groups: Sequence[int],
    shortcut: str = "identity",
) -> Tensor:
    """u_0 = x;  h_i = relu(bn_i(u_i));  u_{i+1} = conv(h_i, W_i);  y = u_n + shortcut

    The block of He et al. 2016 (arXiv 1603.05027), with batch or known statistics. Arguments, errors and numerics as in
    `residual_block_training`, but:

    Args:
        norms: one per convolution of the chain, in front of it.
        shortcut: "identity" x, "projection" conv(h_0, W_s), "zero_pad" h_0 subsampled, zero channels appended, or
            "none" (DenseNet's layer, arXiv 1608.06993).
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    check(x, weights, norms, strides, dilations, groups, shortcut, preactivation=True)
    vectors, plan = arguments(x, weights, norms, strides, dilations, groups, shortcut, False, preactivation=True)
    kept = run(x, weights, vectors, plan)
    update_running(norms, kept.tables)
    return kept.y


def stem(
    x: Tensor,
    weight: Tensor,
    norm: BatchNorm,
    stride: int = 2,
    dilation: int = 1,
    groups: int = 1,
    pool: Sequence[int] = (3, 2, 1),
) -> Tensor:
    """y = max_pool(relu(bn(conv(x, weight))))

    Args:
        weight: (K, C/groups, R, R), R odd, padding dilation * (R // 2).
        norm: batch or known statistics.
        pool: kernel, stride and padding of the pooling; padding is below everything. Of several maxima the first gets
            the gradient, as in `torch.nn.functional.max_pool2d`.
        The others, errors and numerics as in `residual_block_training`.
    Returns:
        y: (N, K, P, Q) in x's dtype, channels_last.
    Keeps for the gradient: x, the convolution's output, a byte for each element of y, vectors per channel.
    """
    window = Pool(*pool)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    geometry = [stride], [dilation], [groups]
    check(x, [weight], [norm], *geometry, "none")
    if not (0 < window.kernel <= MOST_POOLED and window.stride > 0 and 0 <= 2 * window.padding <= window.kernel):
        raise ValueError(
            f"pool: expected a kernel of 1 to {MOST_POOLED}, a stride, at most half the kernel as padding, got {window}"
        )
    g = same_padding(weight, stride, dilation, groups)
    _, (_, mapped) = walk(x.shape[1:], [weight.shape], [g], "none")
    if min(pooled_size(mapped[1:], window)) < 1:
        raise ValueError(f"pool: {window} does not fit a map of {mapped[1]}x{mapped[2]}")
    vectors, plan = arguments(x, [weight], [norm], *geometry, "none", True, pool=window)
    kept = run(x, [weight], vectors, plan)
    update_running([norm], kept.tables)
    return kept.y


def check(
    x: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[BatchNorm],
    strides: Sequence[int],
    dilations: Sequence[int],
    groups: Sequence[int],
    shortcut: str,
    preactivation: bool = False,
) -> None:
    """Raises TypeError or ValueError unless the arguments of a block fit each other."""
    check_chain(x, weights, strides, dilations, groups, shortcut)
    projected = shortcut == "projection"
    expected = len(weights) - (preactivation and projected)
    if len(norms) != expected:
        raise ValueError(f"norms: expected {expected} for {len(weights)} convolutions, got {len(norms)}")
    if projected and (weights[-1].shape[2] != 1 or groups[-1] != 1):
        raise ValueError(
            f"weights[{len(weights) - 1}]: expected an ungrouped 1x1 projection in training, "
            f"got {tuple(weights[-1].shape)} with groups={groups[-1]}"
        )
    for i, w in enumerate(weights):
        if w.dtype not in (x.dtype, accumulator_dtype(x.dtype)):
            raise TypeError(f"weights[{i}]: expected {x.dtype} or {accumulator_dtype(x.dtype)}, got {w.dtype}")
    rows = [same_padding(w, *row) for w, *row in zip(weights, strides, dilations, groups, strict=True)]
    _, maps = walk(x.shape[1:], [w.shape for w in weights], rows, shortcut)
    seen = maps[:-1] if preactivation else [*maps[1:], maps[-1]][: len(norms)]
    for i, (norm, (K, P, Q)) in enumerate(zip(norms, seen, strict=True)):
        if not norm.batch and (norm.running_mean is None or norm.running_var is None):
            raise ValueError(f"norms[{i}]: expected running statistics, as it does not use the batch's")
        for name, t in zip(norm._fields[:4], norm[:4], strict=True):
            if t is not None and (t.shape != (K,) or t.device != x.device):
                raise ValueError(
                    f"norms[{i}].{name}: expected ({K},) on {x.device}, got {tuple(t.shape)} on {t.device}"
                )
        if norm.batch and not norm.group and x.shape[0] * P * Q < 2:
            sizes = torch.Size([x.shape[0], K, P, Q])
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {sizes}")
