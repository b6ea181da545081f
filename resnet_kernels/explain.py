"""explain: what runs each residual block of a call, and why nothing else does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from .analysis.roofline import H200, launches_of
from .backends import gpu, select
from .backends.contract import Call
from .inference import FrozenModel, FrozenResNet, FrozenTrunk
from .nn import DenseLayer, ResNet, densenet, fusable, gated
from .nn import stem as stem_module
from .nn.blocks import Fused
from .ops import block_inference as block_op
from .ops import residual_block

PLAIN = "plain torch modules"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """One block's: what runs it (a backend's name, or the plain chain), and for every candidate None or why not.

    copies: whether the input is converted to channels_last first. kernels: where the backend tells, what it launches,
    with the bytes that must move, the least time on an H200, and what was preferred and could not be taken.
    """

    name: str
    chosen: str
    why_plain: str | None
    candidates: dict[str, str | None]
    copies: bool
    kernels: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.chosen}" + (f" ({self.why_plain})" if self.why_plain else "")]
        if self.copies and not self.why_plain:
            lines.append("    its input is converted to channels_last first")
        for name, reason in self.candidates.items():
            lines.append(f"    {name}: {reason or 'can run it'}")
        lines += [f"    {kernel}" for kernel in self.kernels]
        return "\n".join(lines)


class Explanations(list[Explanation]):
    """In the order the blocks ran. Prints one after the other."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) if self else "no fused residual block ran"


def _kernels(backend: str, module: nn.Module, x: Tensor) -> tuple[str, ...]:
    """What the Triton backend launches for a block or a frozen trunk."""
    if backend != gpu.NAME:
        return ()
    lines = []
    for launch in launches_of(module, x):
        floor = f"{launch.work.bytes / 1e6:.2f} MB, at least {1e6 * H200.floor(launch.work):.1f} us"
        not_taken = "".join(f"; not {name}: {reason}" for name, reason in launch.refused.items())
        lines.append(f"{launch.name}: {launch.what}: {floor}{not_taken}")
    return tuple(lines)


def _explain_call(name: str, call: Call, x: Tensor, reason: str | None, block: nn.Module | None = None) -> Explanation:
    # All of a block's intermediates are ours, so channels_last: only its input can come otherwise.
    copies = not x.is_contiguous(memory_format=torch.channels_last)
    if reason is None and select.named() == select.EAGER:
        reason = "the backend 'eager' was named"
    chosen = PLAIN if reason else select.choose(call).NAME
    kernels = () if block is None else _kernels(chosen, block, x)
    return Explanation(name, chosen, reason, select.reasons(call), copies, kernels)


def _explain_block(name: str, block: nn.Module, x: Tensor) -> Explanation:
    reason = fusable.why_plain(block, x)
    p = fusable.parts(block)
    if not isinstance(p, fusable.Parts) or not all(isinstance(c, nn.Conv2d) for c in p.convs):
        return Explanation(name, PLAIN, reason, {}, False)
    if fusable.structure(block) is None and fusable.trains(p):
        return _explain_call(name, fusable.training_call(p, x), x, reason)
    weights = [tuple(c.weight.shape) for c in p.convs]
    geometries = [fusable.geometry(c) for c in p.convs]
    call = block_op.call_of_block(x.device, x.dtype, weights, geometries, p.shortcut, tuple(x.shape))
    return _explain_call(name, call, x, reason, block)


def _explain_gated(name: str, block: gated.Gated, x: Tensor) -> Explanation:
    """By its chain: the backend of the block's end is chosen by itself."""
    reason, pieces = gated.why_plain(block, x), block._pieces()
    if isinstance(pieces, str):
        return Explanation(name, PLAIN, reason, {}, False)
    p = pieces.chain if pieces.whole is None else pieces.whole
    if fusable.trains(p):
        return _explain_call(name, fusable.training_call(p, x), x, reason)
    weights, geometries = [tuple(c.weight.shape) for c in p.convs], [fusable.geometry(c) for c in p.convs]
    call = block_op.call_of_block(x.device, x.dtype, weights, geometries, p.shortcut, tuple(x.shape))
    return _explain_call(name, call, x, reason)


def _explain_dense(name: str, layer: DenseLayer, x: Tensor | list[Tensor]) -> Explanation:
    reason = densenet.why_plain(layer, x)
    if densenet.structure(layer):
        return Explanation(name, PLAIN, reason, {}, False)
    whole = densenet.concatenated(x)
    return _explain_call(name, fusable.training_call(densenet.parts(layer), whole), whole, reason)


def _explain_stem(name: str, model: resnet.ResNet, x: Tensor) -> list[Explanation]:
    """In training; in evaluation it is torch's modules."""
    p = fusable.stem(model)
    if not (model.training if isinstance(p, str) else fusable.trains(p)):
        return []
    if isinstance(p, str):
        return [Explanation(name, PLAIN, p, {}, False)]
    taken = stem_module.as_autocast(x)
    return [_explain_call(name, fusable.training_call(p, taken), taken, stem_module.why_plain(model, x))]


def _explain_trunk(name: str, trunk: FrozenTrunk, x: Tensor) -> list[Explanation]:
    """Per step. The kernels stand with the first: one may end a block and begin the next."""
    chosen = trunk.backends(x.shape)
    kernels = _kernels(chosen[0].NAME, trunk, x) if len({backend.NAME for backend in chosen}) == 1 else ()
    return [
        Explanation(f"{name}: {step.name}", backend.NAME, None, select.reasons(step.call), False, () if i else kernels)
        for i, (step, backend) in enumerate(zip(trunk.steps, chosen, strict=True))
    ]


def explain(module_or_op: Any, *inputs: Any, **keywords: Any) -> Explanations:
    """Run the model (without gradients) or look at the op's arguments, and tell for every residual block of ours, and
    for a stem in training, which backend runs it, why each other candidate does not, and what its input's layout costs.

    Args:
        module_or_op: a model with replaced blocks, a block, a frozen model, or `ops.residual_block`.
        inputs, keywords: what it would be called with.
    Returns:
        Explanations, a list that prints well.
    """
    found = Explanations()
    if module_or_op is residual_block:
        block_op.check(*inputs, **keywords)
        x, weights, _, _, strides, dilations, groups = inputs[:7]
        shortcut = keywords.get("shortcut", inputs[7] if len(inputs) > 7 else "identity")
        geometries = [block_op.same_padding(*row) for row in zip(weights, strides, dilations, groups, strict=True)]
        shapes = [tuple(w.shape) for w in weights]
        call = block_op.call_of_block(x.device, x.dtype, shapes, geometries, shortcut, tuple(x.shape))
        found.append(_explain_call("residual_block", call, x, None))
        return found
    if not isinstance(module_or_op, nn.Module):
        raise TypeError(f"expected a module or ops.residual_block, got {type(module_or_op).__name__}")

    def before(name: str) -> Callable[[nn.Module, tuple], None]:
        def hook(module: nn.Module, args: tuple) -> None:
            # Once, and gone before the module is looked at: it is no hook of the user's.
            hooks.pop(name).remove()
            if isinstance(module, FrozenResNet):
                found.extend(_explain_trunk(f"{name}.trunk".removeprefix("."), module.trunk, args[0]))
            elif isinstance(module, FrozenTrunk):
                found.extend(_explain_trunk(name, module, args[0]))
            elif isinstance(module, ResNet):
                found.extend(_explain_stem(f"{name}.stem".removeprefix("."), module, args[0]))
            elif isinstance(module, gated.Gated):
                found.append(_explain_gated(name or type(module).__name__, module, args[0]))
            elif isinstance(module, DenseLayer):
                found.append(_explain_dense(name or type(module).__name__, module, args[0]))
            else:
                found.append(_explain_block(name or type(module).__name__, module, args[0]))

        return hook

    kinds = (Fused, DenseLayer, ResNet, FrozenTrunk, FrozenResNet)
    # A frozen ResNet may run its trunk as part of a graph, past the trunk's hooks.
    inside = {id(m.trunk) for m in module_or_op.modules() if isinstance(m, FrozenResNet)}
    hooks = {
        name: m.register_forward_pre_hook(before(name))
        for name, m in module_or_op.named_modules()
        if isinstance(m, kinds) and id(m) not in inside
    }
    # In training mode the batch norms would take the call for a step.
    training = any(m.training for m in module_or_op.modules())
    buffers = [(b, b.clone()) for b in module_or_op.buffers()] if training else []
    try:
        with torch.no_grad():
            module_or_op(*inputs, **keywords)
    finally:
        with torch.no_grad():
            for buffer, before_call in buffers:
                buffer.copy_(before_call)
        for hook in hooks.values():
            hook.remove()
    if isinstance(module_or_op, FrozenModel):
        found.extend(Explanation(name, PLAIN, reason, {}, False) for name, reason in module_or_op.left.items())
    return found
