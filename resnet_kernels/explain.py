"""explain: which backend runs each residual block of a call, and why each other candidate does not."""

from __future__ import annotations

import dataclasses
import itertools
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
from .ops import block_inference, residual_block

PLAIN = "plain torch modules"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The explanation of one block.

    chosen: the name of the backend, or "plain torch modules". why_plain: why it is the latter, or None. candidates: for
    every backend None if it may be chosen, else why not. copies: whether the input is converted to channels_last first.
    kernels: for the backend gpu, the launches with the bytes that they must move and their least time on an H200, and
    the kernels that were preferred to them but could not run.
    """

    name: str
    chosen: str
    why_plain: str | None
    candidates: dict[str, str | None]
    copies: bool
    kernels: tuple[str, ...] = ()

    @property
    def details(self) -> tuple[str, ...]:
        """The lines that follow the first when the explanation is printed."""
        lines = ["its input is converted to channels_last first"] if self.copies and not self.why_plain else []
        lines += [f"{name}: {reason or 'can run it'}" for name, reason in self.candidates.items()]
        return (*lines, *self.kernels)

    def __str__(self) -> str:
        first = f"{self.name}: {self.chosen}" + (f" ({self.why_plain})" if self.why_plain else "")
        return "\n".join([first, *(f"    {line}" for line in self.details)])


class Explanations(list[Explanation]):
    """The explanations in the order in which the blocks ran. Printing them says once what consecutive blocks share."""

    def __str__(self) -> str:
        if not self:
            return "no fused residual block ran"
        lines = []
        for (chosen, why_plain, details), same in itertools.groupby(self, lambda e: (e.chosen, e.why_plain, e.details)):
            names = [e.name for e in same]
            first = f"{', '.join(names)}: {chosen}" + (f" ({why_plain})" if why_plain else "")
            lines += [first, *(f"    {line}" for line in details)]
        return "\n".join(lines)


def _kernels(backend: str, module: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Return the launches of the backend gpu for a block or a frozen trunk."""
    if backend != gpu.NAME:
        return ()
    lines = []
    for launch in launches_of(module, x):
        floor = f"{launch.work.bytes / 1e6:.2f} MB, at least {1e6 * H200.floor(launch.work):.1f} us"
        not_taken = "".join(f"; not {name}: {reason}" for name, reason in launch.refused.items())
        lines.append(f"{launch.name}: {launch.what}: {floor}{not_taken}")
    return tuple(lines)


def _explain_call(name: str, call: Call, x: Tensor, reason: str | None, block: nn.Module | None = None) -> Explanation:
    # Intermediates of a block are always channels_last: only its input can have another layout.
    copies = not x.is_contiguous(memory_format=torch.channels_last)
    if reason is None and select.named() == select.EAGER:
        reason = "the backend 'eager' was named"
    chosen = PLAIN if reason else select.choose(call).NAME
    kernels = () if block is None else _kernels(chosen, block, x)
    candidates = select.reasons(call)
    if chosen not in (PLAIN, *candidates):  # a family of the backend gpu, which was named
        candidates = {chosen: None, **candidates}
    return Explanation(name, chosen, reason, candidates, copies, kernels)


def _explain_parts(
    name: str, p: fusable.Parts, x: Tensor, reason: str | None, block: nn.Module | None = None
) -> Explanation:
    if fusable.trains(p):
        return _explain_call(name, fusable.training_call(p, x), x, reason)
    size = tuple(x.shape)
    call = block_inference.call_of_block(x.device, x.dtype, p.shapes, p.geometries, p.shortcut, size)
    return _explain_call(name, call, x, reason, block)


def _explain_block(name: str, block: nn.Module, x: Tensor) -> Explanation:
    reason = fusable.why_plain(block, x)
    p = fusable.parts(block)
    if not isinstance(p, fusable.Parts) or fusable.why_unfused(block):
        return Explanation(name, PLAIN, reason, {}, False)
    return _explain_parts(name, p, x, reason, block)


def _explain_gated(name: str, block: gated.Gated, x: Tensor) -> Explanation:
    """Explain a gated block by its chain. The backend of the block's end is chosen separately."""
    reason, pieces = gated.why_plain(block, x), block.decompose()
    if isinstance(pieces, str):
        return Explanation(name, PLAIN, reason, {}, False)
    return _explain_parts(name, pieces.chain if pieces.whole is None else pieces.whole, x, reason)


def _explain_dense(name: str, layer: DenseLayer, x: Tensor | list[Tensor]) -> Explanation:
    reason = densenet.why_plain(layer, x)
    if densenet.why_unfused(layer):
        return Explanation(name, PLAIN, reason, {}, False)
    whole = densenet.concatenated(x)
    return _explain_call(name, fusable.training_call(densenet.parts(layer), whole), whole, reason)


def _explain_stem(name: str, model: resnet.ResNet, x: Tensor) -> list[Explanation]:
    """Explain the stem in training. In evaluation it always runs as plain torch modules."""
    p = fusable.stem(model)
    if not (model.training if isinstance(p, str) else fusable.trains(p)):
        return []
    if isinstance(p, str):
        return [Explanation(name, PLAIN, p, {}, False)]
    taken = stem_module.as_autocast(x)
    return [_explain_call(name, fusable.training_call(p, taken), taken, stem_module.why_plain(model, x))]


def _explain_trunk(name: str, trunk: FrozenTrunk, x: Tensor) -> list[Explanation]:
    """Explain each step. The first holds the kernels of all: one kernel may end a block and begin the next."""
    chosen = trunk.backends(x.shape)
    kernels = _kernels(chosen[0].NAME, trunk, x) if len({backend.NAME for backend in chosen}) == 1 else ()
    return [
        Explanation(f"{name}: {step.name}", backend.NAME, None, select.reasons(step.call), False, () if i else kernels)
        for i, (step, backend) in enumerate(zip(trunk.steps, chosen, strict=True))
    ]


def _explain_module(name: str, module: nn.Module, x: Any) -> list[Explanation]:
    shown = name or type(module).__name__
    if isinstance(module, FrozenResNet):
        return _explain_trunk(f"{name}.trunk".removeprefix("."), module.trunk, x)
    if isinstance(module, FrozenTrunk):
        return _explain_trunk(name, module, x)
    if isinstance(module, ResNet):
        return _explain_stem(f"{name}.stem".removeprefix("."), module, x)
    if isinstance(module, gated.Gated):
        return [_explain_gated(shown, module, x)]
    if isinstance(module, DenseLayer):
        return [_explain_dense(shown, module, x)]
    return [_explain_block(shown, module, x)]


def _explain_op(*inputs: Any, **keywords: Any) -> Explanation:
    block_inference.check(*inputs, **keywords)

    def read(x: Tensor, weights: list[Tensor], scales: Any, shifts: Any, spec: Any) -> Explanation:
        shapes = [tuple(w.shape) for w in weights]
        geometries, size = spec.geometries(weights), tuple(x.shape)
        call = block_inference.call_of_block(x.device, x.dtype, shapes, geometries, spec.shortcut, size)
        return _explain_call("residual_block", call, x, None)

    return read(*inputs, **keywords)


def explain(module_or_op: Any, *inputs: Any, **keywords: Any) -> Explanations:
    """Explain which backend runs every fused residual block of a call, and a stem in training, and why.

    A model is run without gradients; its buffers (running statistics) are restored afterwards. Of the op
    `ops.residual_block` only the arguments are read.

    Args:
        module_or_op: a model with replaced blocks, a block, a frozen model, or `ops.residual_block`.
        inputs, keywords: what it would be called with.
    Returns:
        Explanations, a list that prints as text.
    Raises:
        TypeError: it is neither a module nor the op, or no input was given.
    """
    found = Explanations()
    if module_or_op is residual_block:
        found.append(_explain_op(*inputs, **keywords))
        return found
    if not isinstance(module_or_op, nn.Module):
        raise TypeError(f"expected a module or ops.residual_block, got {type(module_or_op).__name__}")
    if not inputs and not keywords:
        raise TypeError("explain: expected the inputs of a call after the module, as in explain(model, images)")

    def before(name: str) -> Callable[[nn.Module, tuple], None]:
        def hook(module: nn.Module, args: tuple) -> None:
            # The hook is removed before the module is examined: it is not the user's.
            hooks.pop(name).remove()
            found.extend(_explain_module(name, module, args[0]))

        return hook

    kinds = (Fused, DenseLayer, ResNet, FrozenTrunk, FrozenResNet)
    # A frozen ResNet may run its trunk as part of a graph, without the trunk's hooks.
    inside = {id(m.trunk) for m in module_or_op.modules() if isinstance(m, FrozenResNet)}
    hooks = {
        name: m.register_forward_pre_hook(before(name))
        for name, m in module_or_op.named_modules()
        if isinstance(m, kinds) and id(m) not in inside
    }
    # In training mode the call would update the running statistics.
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
