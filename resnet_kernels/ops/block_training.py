"""Training as torch ops: residual blocks and stems with batch statistics, differentiable once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import select
from ..backends.contract import Call, Geometry, accumulator_dtype
from .batch_norm import BatchNorm, update_running
from .block_inference import LIBRARY, check_chain
from .chain_backward import Backward
from .chain_training import Forward, Saved, stored_outputs
from .preactivation_training import PreactivationBackward, PreactivationForward
from .spec import BlockSpec, NormSpec, TrainingPlan, map_sizes, pooled_size


def call_of_training(
    device: torch.device,
    dtype: torch.dtype,
    weights: Sequence[Sequence[int]],
    geometries: Sequence[Sequence[int]],
    size: Sequence[int],
    pool: bool = False,
) -> Call:
    """Return what a backend must support to train the block or stem: the metadata on which `select` decides."""
    shapes = tuple((tuple(w), Geometry(*g)) for w, g in zip(weights, geometries, strict=True))
    return Call(device, dtype, frozenset({"training"} | ({"pool"} if pool else set())), shapes, tuple(size))


# A compiler takes the result as a constant: what is built, and which tables exist, is not part of its graph.
@torch.compiler.assume_constant_result
def _chosen(
    device: torch.device,
    dtype: torch.dtype,
    weights: list[tuple[int, ...]],
    geometries: list[tuple[int, ...]],
    size: tuple[int, ...],
    pool: bool,
) -> str:
    """Return the name of the backend that runs forward and backward of a call."""
    return select.choose(call_of_training(device, dtype, weights, geometries, size, pool)).NAME


# The largest kernel of a stem's pooling: an element of a larger window has no index in a byte.
MAX_POOL_KERNEL = 15


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    *fields: Any,
) -> list[Tensor]:
    plan = TrainingPlan.of(fields)
    x = x.contiguous(memory_format=torch.channels_last)
    kind = PreactivationForward if plan.spec.preactivation else Forward

    def run() -> list[Tensor]:
        backend = select.BY_NAME[plan.backend]
        return kind(backend, x, weights, gammas, betas, means, variances, plan).run().flat()

    return _recorded("forward", plan, (), [x, *weights, *gammas, *betas, *means, *variances], run)


def _recorded(
    what: str, plan: TrainingPlan, needs: tuple, tensors: Sequence[Tensor], function: Callable[[], list[Tensor]]
) -> list[Tensor]:
    """Return function() in the dtypes of its operands, whatever autocast says, replayed if the backend recorded it."""
    taped = getattr(select.BY_NAME[plan.backend], "taped", None)
    with torch.autocast(tensors[0].device.type, enabled=False):
        # The exchange of statistics between processes is no function of the tensors: it cannot be replayed.
        if taped is None or any(norm.group for norm in plan.norms):
            return function()
        return taped((what, plan, *needs), tensors, function)


def _nhwc(x: Tensor, sizes: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(tuple(sizes), dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)


def _forward_fake(
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    *fields: Any,
) -> list[Tensor]:
    plan = TrainingPlan.of(fields)
    spec = plan.spec
    sizes = map_sizes(x.shape[1:], [w.shape for w in weights], spec.geometries(weights), spec.shortcut)
    # What the batch norms normalise.
    normalized = sizes.maps[: spec.n] if spec.preactivation else sizes.outputs
    result = (x.shape[0], *sizes.maps[-1])
    mask = select.BY_NAME[plan.backend].mask_size(result) if spec.relu else None
    if spec.pool is not None:
        result = (*result[:2], *pooled_size(result[2:], spec.pool))
    dtype = accumulator_dtype(x.dtype)
    c = {i: _nhwc(x, (x.shape[0], *normalized[i])) for i in plan.stored_outputs()}
    tables = [x.new_empty(5, size[0], dtype=dtype) for size in normalized[: len(plan.norms)]]
    moments = {}
    for i in plan.saved_moments():
        J = sizes.operands[i][0]
        moments[i] = x.new_empty(J, dtype=dtype), x.new_empty(J, J, dtype=dtype)
    masking = x.new_empty(mask or 0, dtype=torch.uint8) if spec.pool is None else _nhwc(x, result, torch.uint8)
    return Saved(_nhwc(x, result), masking, c, tables, moments).flat()


def _backward(
    dy: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    need_x: bool,
    need_weights: Sequence[bool],
    need_norms: Sequence[bool],
    *fields: Any,
) -> list[Tensor]:
    plan = TrainingPlan.of(fields)
    x, dy = (t.to(x.dtype).contiguous(memory_format=torch.channels_last) for t in (x, dy))
    kind = PreactivationBackward if plan.spec.preactivation else Backward

    def run() -> list[Tensor]:
        backend = select.BY_NAME[plan.backend]
        found = kind(backend, x, weights, Saved.of(saved, plan), plan, need_x, need_weights, need_norms).run(dy)
        requested = [found.x if need_x else None]
        dweights = [g if g is None else _laid_out_as(w, g) for w, g in zip(weights, found.weights, strict=True)]
        for grads, needs in ((dweights, need_weights), (found.gammas, need_norms), (found.betas, need_norms)):
            requested += [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        # The results of an op are no views of each other, nor of its arguments.
        return [x.new_empty(0) if t is None else t for t in requested]

    needs = (need_x, *need_weights, *need_norms)
    return _recorded("backward", plan, needs, [dy, x, *weights, *saved], run)


def _laid_out_as(weight: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient in its weight's layout, as DDP's buckets, optimizers and compilers expect it."""
    grad = grad.view(weight.shape)
    if all(n == 1 or s == t for n, s, t in zip(weight.shape, weight.stride(), grad.stride(), strict=True)):
        return grad.as_strided(weight.shape, weight.stride())
    return torch.empty_like(weight, dtype=grad.dtype).copy_(grad)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    need_x: bool,
    need_weights: Sequence[bool],
    need_norms: Sequence[bool],
    *fields: Any,
) -> list[Tensor]:
    dtype = accumulator_dtype(x.dtype)
    channels = [t.shape[1:] for t in Saved.of(saved, TrainingPlan.of(fields)).tables]
    grads = [_nhwc(x, x.shape) if need_x else x.new_empty(0)]
    for weight, need in zip(weights, need_weights, strict=True):
        grads.append(torch.empty_like(weight, dtype=dtype) if need else x.new_empty(0))
    for size, need in zip([*channels, *channels], [*need_norms, *need_norms], strict=True):
        grads.append(x.new_empty(size, dtype=dtype) if need else x.new_empty(0))
    return grads


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, weights, gammas, betas, _, _, *fields = inputs
    y, mask, *rest = output
    spec = TrainingPlan.of(fields).spec
    # The backward reads y only if y is the mask of its own ReLU. Else it needs y's sizes, which dy has too.
    needed = spec.relu and spec.pool is None and mask.numel() == 0
    ctx.save_for_backward(x, *weights, y if needed else mask.new_empty(0), mask, *rest)
    ctx.plan, ctx.count = fields, len(weights)
    ctx.dtypes = [[t.dtype for t in tensors] for tensors in (weights, gammas, betas)]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple:
    x, *rest = ctx.saved_tensors
    weights, saved = rest[: ctx.count], rest[ctx.count :]
    need_x, *needs = ctx.needs_input_grad[:4]
    dx: Tensor | None = None
    lists: list[list[Tensor | None]] = [[None] * len(dtypes) for dtypes in ctx.dtypes]
    if grads[0] is not None:
        need_weights, need_gammas, need_betas = needs
        need_norms = [g or b for g, b in zip(need_gammas, need_betas, strict=True)]
        op = torch.ops.resnet_kernels.residual_block_training_backward
        flat = iter(op(grads[0], x, weights, saved, need_x, list(need_weights), need_norms, *ctx.plan))
        first = next(flat)
        dx = first if need_x else None
        for i, (need, dtypes) in enumerate(zip(needs, ctx.dtypes, strict=True)):
            found = [next(flat) for _ in dtypes]
            lists[i] = [t.to(d) if requested else None for t, requested, d in zip(found, need, dtypes, strict=True)]
    no_vectors: list[None] = [None] * len(ctx.dtypes[1])
    # An empty list counts as a list of tensors.
    return (dx, *lists, no_vectors, list(no_vectors), *([] if field == [] else None for field in ctx.plan))


def _no_second_derivative(ctx: Any, *grads: Any) -> tuple:
    raise RuntimeError(
        "resnet_kernels: a block with batch statistics has no second derivatives; "
        "for them run it as plain torch modules: resnet_kernels.use_backend('eager')"
    )


LIBRARY.define(
    "residual_block_training(Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas, Tensor[] means, "
    f"Tensor[] variances, {TrainingPlan.SCHEMA}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "residual_block_training_backward(Tensor dy, Tensor x, Tensor[] weights, Tensor[] saved, bool need_x, "
    f"bool[] need_weights, bool[] need_norms, {TrainingPlan.SCHEMA}) -> Tensor[]",
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
    x: Tensor, weights: Sequence[Tensor], norms: Sequence[BatchNorm], spec: BlockSpec
) -> tuple[list[list[Tensor]], TrainingPlan]:
    """Return what the op takes beside x and weights: the lists gammas, betas, means and variances, and the plan."""
    geometries = spec.geometries(weights)
    shapes = [tuple(w.shape) for w in weights]
    # A compiler's sizes may be symbols. The choice depends on them only through measured tables.
    size = () if torch.compiler.is_compiling() else tuple(x.shape)
    rows = [tuple(g) for g in geometries]
    backend = _chosen(x.device, x.dtype, shapes, rows, size, spec.pool is not None)
    norm_specs = tuple(NormSpec(n.eps, n.batch, n.group) for n in norms)
    batch = [n.batch for n in norms]
    plan = TrainingPlan(spec, norm_specs, stored_outputs(x.shape, shapes, spec, batch, geometries), backend)
    channels = [w.shape[0] for w in weights]
    if spec.preactivation:
        channels = [x.shape[1], *channels][: len(norms)]
    vectors = [norm.vectors(x, K) for norm, K in zip(norms, channels, strict=True)]
    return [[row[i] for row in vectors] for i in range(4)], plan


def residual_block_training(
    x: Tensor, weights: Sequence[Tensor], norms: Sequence[BatchNorm], spec: BlockSpec
) -> Tensor:
    """y = relu(bn_n(conv(... relu(bn_1(conv(x, W_1))) ..., W_n)) + shortcut(x)), with batch or known statistics.

    With spec.preactivation (He et al. 2016, arXiv 1603.05027):
        u_0 = x;  h_i = relu(bn_i(u_i));  u_{i+1} = conv(h_i, W_i);  y = u_n + shortcut, where the shortcut is x, or
        conv(h_0, W_s), or h_0 subsampled with zero channels appended, or 0 (DenseNet's layer, arXiv 1608.06993).
    With spec.pool (the stem of a ResNet): y = max_pool(relu(bn_1(conv(x, W_1)))).

    Args:
        x: (N, C, H, W) fp64|fp32|bf16|fp16, channels_last (converted if not). Under autocast converted to its dtype.
        weights: the chain's (K, C/groups, R, S), R = S odd, then with a projection its (K, C, 1, 1); in x's dtype or in
            fp32. The padding is dilation * (R // 2).
        norms: a batch norm for each weight; before a pre-activation one for each convolution of the chain. Running
            statistics and counters are updated in place.
        spec: strides, dilations, groups, shortcut, final ReLU, pre-activation, pooling.
    Returns:
        y: (N, K, P, Q) in x's dtype, channels_last.
    Raises:
        TypeError, ValueError: dtypes or shapes do not fit, or a batch norm sees one value per channel, before anything
            runs.
        BackendUnavailable: no backend trains the block here, or the one that was named does not.
    Numerics: accumulation, statistics, scale, shift and residual addition in fp32 (fp64 for fp64); c_i, h_i and y are
        rounded to x's dtype; weight gradients are rounded once, from fp32 to the weight's dtype. ReLU propagates NaN,
        and a NaN's gradient passes. Of several equal maxima in a pooling window the first gets the gradient, as in
        `torch.nn.functional.max_pool2d`. Deterministic if the engine of the 3x3 convolutions is. Asking for second
        derivatives raises RuntimeError.
    Saves for the backward: x, c_1 .. c_{n-1}, y or one bit for each of its elements, and vectors per channel. A 1x1
        convolution at the end of the chain, and a projection, save the second moments of their operand (channels^2
        values, fp32) instead of their output where that is smaller. A stem saves its convolution's output and one byte
        for each element of y.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    check(x, weights, norms, spec)
    vectors, plan = arguments(x, weights, norms, spec)
    op = torch.ops.resnet_kernels.residual_block_training
    saved = Saved.of(op(x, list(weights), *vectors, *plan.flat()), plan)
    update_running(norms, saved.tables)
    return saved.y


def check(x: Tensor, weights: Sequence[Tensor], norms: Sequence[BatchNorm], spec: BlockSpec) -> None:
    """Raise TypeError or ValueError unless the arguments of `residual_block_training` fit each other."""
    check_chain(x, weights, spec)
    expected = len(weights) - (spec.preactivation and spec.projected)
    if len(norms) != expected:
        raise ValueError(f"norms: expected {expected} for {len(weights)} convolutions, got {len(norms)}")
    if spec.projected and (weights[-1].shape[2] != 1 or spec.groups[-1] != 1):
        raise ValueError(
            f"weights[{len(weights) - 1}]: expected an ungrouped 1x1 projection in training, "
            f"got {tuple(weights[-1].shape)} with groups={spec.groups[-1]}"
        )
    for i, w in enumerate(weights):
        exact = accumulator_dtype(x.dtype)
        if w.dtype not in (x.dtype, exact):
            raise TypeError(f"weights[{i}]: expected {x.dtype} or {exact}, got {w.dtype}")
    sizes = map_sizes(x.shape[1:], [w.shape for w in weights], spec.geometries(weights), spec.shortcut)
    _check_pool(spec, sizes.maps[-1])
    normalized = sizes.maps[:-1] if spec.preactivation else sizes.outputs[: len(norms)]
    for i, (norm, size) in enumerate(zip(norms, normalized, strict=True)):
        _check_norm(f"norms[{i}]", norm, size, x)


def _check_pool(spec: BlockSpec, size: Sequence[int]) -> None:
    window = spec.pool
    if window is None:
        return
    if not (0 < window.kernel <= MAX_POOL_KERNEL and window.stride > 0 and 0 <= 2 * window.padding <= window.kernel):
        raise ValueError(
            f"pool: expected a kernel of 1 to {MAX_POOL_KERNEL}, a stride, at most half the kernel as padding, "
            f"got {window}"
        )
    if min(pooled_size(size[1:], window)) < 1:
        raise ValueError(f"pool: {window} does not fit a map of {size[1]}x{size[2]}")


def _check_norm(name: str, norm: BatchNorm, size: Sequence[int], x: Tensor) -> None:
    """Raise ValueError unless the batch norm fits an activation of `size` (K, P, Q)."""
    K, P, Q = size
    if not norm.batch and (norm.running_mean is None or norm.running_var is None):
        raise ValueError(f"{name}: expected running statistics, as it does not use the batch's")
    for field, t in zip(norm._fields[:4], norm[:4], strict=True):
        if t is not None and (t.shape != (K,) or t.device != x.device):
            raise ValueError(f"{name}.{field}: expected ({K},) on {x.device}, got {tuple(t.shape)} on {t.device}")
    if norm.batch and not norm.group and x.shape[0] * P * Q < 2:
        sizes = torch.Size([x.shape[0], K, P, Q])
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {sizes}")
