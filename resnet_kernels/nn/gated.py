"""Residual blocks whose branch is gated, or interrupted by other modules: squeeze-and-excitation (Hu et al. 2018, arXiv
1709.01507), stochastic depth (Huang et al. 2016, 1603.09382), attention, drop_block, anti-aliased strides.

At every call such a block is decomposed into segments of its chain, which run as one op each, the modules between them,
which run as they are, and its end, y = relu(gate * z + shortcut), which is one op again. A block without any of these
is one op as a whole. `Anatomy` describes the modules of a family of blocks; `Anatomy.decompose` returns the `Pieces`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import StochasticDepth

from ..backends import select
from ..ops.gating import call_of_gated, gated_tail
from . import fusable
from .blocks import Fused, fused_forward
from .fusable import Parts
from .shortcuts import ZeroPadShortcut


class Layer(NamedTuple):
    """The names of the modules of one convolution of a block.

    The modules run in the order conv, norm, between, act, after; an empty name stands for no module.
    """

    conv: str
    norm: str
    act: str = ""
    between: str = ""
    after: str = ""


class Segment(NamedTuple):
    """A part of the chain that runs as one op, and the modules that run after it."""

    parts: Parts
    after: tuple[nn.Module, ...]


class Pieces(NamedTuple):
    """A decomposed block.

    whole: the block as one op, or None. segments: the chain. squeeze: the squeeze-and-excitation module whose gate ends
    the block. drop: for stochastic depth, the probability, and whether images that are not dropped are divided by the
    probability of not being dropped. shortcut: "identity", "zero_pad", the parts of a projection of `pool`'s result, or
    the module that computes it. chain: all convolutions and batch norms of the chain, and the projection's if there is
    one. bypassed: the modules whose own forward does not run, with their names. first: a module that runs before
    everything, the shortcut too.
    """

    whole: Parts | None
    segments: list[Segment]
    squeeze: nn.Module | None
    drop: tuple[float, bool] | None
    shortcut: str | Parts | nn.Module
    pool: nn.Module | None
    relu: bool
    chain: Parts
    bypassed: list[tuple[str, nn.Module]]
    first: nn.Module | None = None


class SqueezeExcite(nn.Module):
    """y = sigmoid(fc2(relu(fc1(mean of z over its map)))) * z

    z: (N, channels, P, Q). fc1 and fc2 are 1x1 convolutions with biases, to channels / reduction (rounded to a multiple
    of 8, as in timm) and back.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(8, (channels // reduction + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(hidden, channels, 1)
        self.gate = nn.Sigmoid()

    def excite(self, mean: Tensor) -> Tensor:
        """Return the gate (N, channels, 1, 1) from the means of the maps."""
        return self.gate(self.fc2(self.act(self.fc1(mean))))

    def forward(self, z: Tensor) -> Tensor:
        return z * self.excite(z.mean((2, 3), keepdim=True))


def mean_of(z: Tensor) -> Tensor:
    """Return the mean of z over its map, (N, K, 1, 1).

    It is a sum and a division: the gradient of a sum is a view, the gradient of a mean would be written to memory.
    """
    rows = max(1, z.shape[2] * z.shape[3])
    return (z.sum((2, 3), keepdim=True, dtype=torch.promote_types(z.dtype, torch.float32)) / rows).to(z.dtype)


def drop_gate(z: Tensor, probability: float, scaled: bool) -> Tensor:
    """Return the gate (N, 1) of stochastic depth: 0 for a dropped image.

    It draws random numbers as the modules do: (N, 1, 1, 1) in z's dtype.
    """
    remaining = 1 - probability
    mask = z.new_empty((z.shape[0], 1, 1, 1)).bernoulli_(remaining).flatten(1)
    return mask.to(torch.promote_types(z.dtype, torch.float32)) / (remaining if scaled and remaining > 0 else 1)


def is_absent(module: nn.Module | None) -> bool:
    return module is None or type(module) is nn.Identity


def why_not_relu(module: nn.Module) -> str | None:
    """Return why the activation is not one that the fused ops compute, or None."""
    return None if type(module) is nn.ReLU else f"expected ReLU, got {type(module).__name__}"


class Anatomy:
    """The modules of a family of blocks: a chain of layers, then attention `se`, stochastic depth `drop_path`, the
    shortcut `downsample` and a last activation.

    layers: the chain. last: the name of the last activation. A subclass overrides the methods for a library whose
    modules differ.
    """

    def __init__(self, layers: tuple[Layer, ...] = (), last: str = "") -> None:
        self.layers, self.last = layers, last

    def is_inactive(self, module: Any) -> bool:
        """Return whether an optional module of the chain does nothing."""
        return is_absent(module)

    def excitation(self, module: Any) -> Callable[[Tensor], Tensor] | None:
        """Return the gate of a squeeze-and-excitation module as a function of the means, None for another module."""
        return module.excite if type(module) is SqueezeExcite else None

    def drop(self, module: Any) -> tuple[float, bool] | None:
        """Return `Pieces.drop` of a stochastic depth module, None for another module."""
        if type(module) is not StochasticDepth or module.mode != "row":
            return None
        return cast(float, module.p) if module.training else 0.0, True

    def projection(self, block: Any) -> list[str] | None:
        """Return the names of the shortcut's pooling (which may be missing), convolution and batch norm, or None."""
        d = block.downsample
        return list(d._modules) if type(d) is nn.Sequential and len(d) in (2, 3) else None

    def decompose(self, block: nn.Module) -> Pieces | str:
        """Return the block's pieces as its modules are now, or why the block cannot be decomposed."""
        last = block.get_submodule(self.last)
        bypassed = [(self.last, last)]
        segments = self._segments(block, bypassed)
        if isinstance(segments, str):
            return segments
        reason = why_not_relu(last)
        if reason:
            return f"{self.last}: {reason}"
        squeeze, drop, after = self._gates(block, bypassed)
        segments[-1] = segments[-1]._replace(after=tuple(after))
        shortcut, pool = self._shortcut(block, bypassed)
        every = [segment.parts for segment in segments]
        chain = Parts([c for p in every for c in p.convs], [n for p in every for n in p.norms], "none")
        simple = len(segments) == 1 and not after and squeeze is None and drop is None and pool is None
        whole = None
        if isinstance(shortcut, Parts):
            chain = Parts([*chain.convs, *shortcut.convs], [*chain.norms, *shortcut.norms], "projection")
            # The training op takes only ungrouped 1x1 projections.
            if simple and shortcut.convs[0].kernel_size == (1, 1) and shortcut.convs[0].groups == 1:
                whole = chain
        elif isinstance(shortcut, str) and simple:
            whole = chain._replace(shortcut=shortcut)
            reason = fusable.why_shortcut_misfits(block, whole)
            if reason:
                return reason
        return Pieces(whole, segments, squeeze, drop, shortcut, pool, True, chain, bypassed)

    def _segments(self, block: nn.Module, bypassed: list[tuple[str, nn.Module]]) -> list[Segment] | str:
        """Return the segments of the chain, the last without the modules after it, or why there are none.

        Appends the modules that the segments bypass to `bypassed`.
        """
        found: list[Segment] = []
        parts = Parts([], [], "none")
        for layer in self.layers:
            conv, norm = block.get_submodule(layer.conv), block.get_submodule(layer.norm)
            bypassed += [(layer.conv, conv), (layer.norm, norm)]
            reason = fusable.why_not_convolution(conv)
            if reason:
                return f"{layer.conv}: {reason}"
            reason = fusable.why_not_batch_norm(norm)
            if reason:
                return f"{layer.norm}: {reason}"
            parts.convs.append(cast(nn.Conv2d, conv))
            parts.norms.append(norm)
            between, after = (
                [block.get_submodule(name)] if name and not self.is_inactive(getattr(block, name, None)) else []
                for name in (layer.between, layer.after)
            )
            if layer.act:
                act = block.get_submodule(layer.act)
                if not between:
                    bypassed.append((layer.act, act))
                    reason = why_not_relu(act)
                    if reason:
                        return f"{layer.act}: {reason}"
                after = [*between, act, *after] if between else after
            if after or not layer.act:
                found.append(Segment(parts._replace(relu=bool(layer.act) and not between), tuple(after)))
                parts = Parts([], [], "none")
        return found

    def _gates(
        self, block: Any, bypassed: list[tuple[str, nn.Module]]
    ) -> tuple[nn.Module | None, tuple[float, bool] | None, list[nn.Module]]:
        """Return `Pieces.squeeze`, `Pieces.drop`, and the modules that run as modules after the chain.

        The latter are those that are unknown or carry a hook, and those before them.
        """
        squeeze, drop, after = None, None, []
        attention, path = block.se, block.drop_path
        if not is_absent(attention):
            if self.excitation(attention) is None or fusable.why_it_must_run("se", attention):
                after.append(attention)
            else:
                squeeze = attention
        if not is_absent(path):
            drop = None if fusable.why_it_must_run("drop_path", path) else self.drop(path)
            if drop is None:
                after += [path] if squeeze is None else [squeeze, path]
                squeeze = None
            else:
                bypassed.append(("drop_path", path))
        return squeeze, drop if drop and drop[0] else None, after

    def _shortcut(
        self, block: Any, bypassed: list[tuple[str, nn.Module]]
    ) -> tuple[str | Parts | nn.Module, nn.Module | None]:
        """Return `Pieces.shortcut` and `Pieces.pool`. A shortcut that does not run fused is the module itself."""
        d = block.downsample
        if d is None:
            return "identity", None
        if type(d) is ZeroPadShortcut:
            bypassed.append(("downsample", d))
            return "zero_pad", None
        names = self.projection(block)
        if names is None:
            return d, None
        *first, conv, norm = (d.get_submodule(name) for name in names)
        if fusable.why_not_convolution(conv) or fusable.why_not_batch_norm(norm):
            return d, None
        inner = [("downsample", d), *((f"downsample.{n}", m) for n, m in zip(names[-2:], (conv, norm), strict=True))]
        if any(fusable.why_it_must_run(*row) for row in inner):
            return d, None
        bypassed += inner
        pool = None if not first or is_absent(first[0]) else first[0]
        return Parts([cast(nn.Conv2d, conv)], [norm], "none", relu=False), pool

    def why_unfused(self, block: nn.Module) -> str | None:
        """Return why the block runs as plain modules whatever its input, or None."""
        pieces = self.decompose(block)
        return pieces if isinstance(pieces, str) else _why_one_must_run(pieces)

    def why_not_decomposed(self, block: nn.Module) -> str | None:
        """Return why the block cannot be decomposed, or None."""
        pieces = self.decompose(block)
        return pieces if isinstance(pieces, str) else None


class Gated(Fused):
    """A block that is decomposed at every call as its `ANATOMY` says."""

    ANATOMY: ClassVar[Anatomy]
    downsample: nn.Module | None

    def decompose(self) -> Pieces | str:
        """Return the block's pieces as its modules are now, or why the block cannot be decomposed."""
        return self.ANATOMY.decompose(self)

    def why_plain(self, x: Tensor) -> str | None:
        return why_plain(self, x)

    def _fused(self, x: Tensor) -> Tensor:
        pieces = self.decompose()
        assert isinstance(pieces, Pieces)
        return run(self, pieces, x)


def _why_one_must_run(pieces: Pieces) -> str | None:
    reasons = (fusable.why_it_must_run(name, module) for name, module in pieces.bypassed)
    return next((reason for reason in reasons if reason), None)


def why_plain(block: Gated, x: Tensor) -> str | None:
    """Return why the block's forward runs as plain torch modules for this input, or None if it runs fused."""
    reason = fusable.why_context_is_plain(x)
    if reason:
        return reason
    pieces = block.decompose()
    if isinstance(pieces, str):
        return pieces
    reason = _why_one_must_run(pieces) or fusable.why_not_tensors(pieces.chain, x)
    if reason:
        return reason
    if pieces.whole is not None:
        return fusable.why_not_trained(pieces.whole, x)
    for p in ops_of(pieces):
        reason = fusable.why_not_trained(p, x)
        if reason:
            return reason
    return _why_no_tail(x.device, x.dtype, select.named())


def ops_of(pieces: Pieces) -> Iterator[Parts]:
    """Yield the parts that run as ops of their own, without the block's end."""
    yield from (segment.parts for segment in pieces.segments)
    if isinstance(pieces.shortcut, Parts):
        yield pieces.shortcut


@torch.compiler.assume_constant_result
def _why_no_tail(device: torch.device, dtype: torch.dtype, name: str | None) -> str | None:
    """Return why the named backend cannot run the block's end, or None."""
    return select.BY_NAME[name].why_not(call_of_gated(device, dtype)) if name and name != select.EAGER else None


def run(block: Gated, pieces: Pieces, x: Tensor) -> Tensor:
    """Return the block's result from its pieces. Call only if `why_plain` returned None."""
    if pieces.whole is not None:
        return fused_forward(pieces.whole, x)
    z = x = x if pieces.first is None else pieces.first(x)
    for segment in pieces.segments:
        z = fused_forward(segment.parts, z)
        for module in segment.after:
            z = module(z)
    # Under autocast a module may return another dtype; the sum has the branch's dtype.
    return gated_tail(z, _gate(block, pieces, z), _shortcut(block, pieces, x).to(z.dtype), pieces.relu)


def _gate(block: Gated, pieces: Pieces, z: Tensor) -> Tensor | None:
    gate = None
    if pieces.squeeze is not None:
        excite = block.ANATOMY.excitation(pieces.squeeze)
        assert excite is not None
        gate = excite(mean_of(z)).flatten(1)
    if pieces.drop is not None:
        dropped = drop_gate(z, *pieces.drop)
        gate = dropped if gate is None else gate.to(dropped.dtype) * dropped
    return gate


def _shortcut(block: Gated, pieces: Pieces, x: Tensor) -> Tensor:
    if pieces.shortcut == "identity":
        return x
    if isinstance(pieces.shortcut, Parts):
        return fused_forward(pieces.shortcut, x if pieces.pool is None else pieces.pool(x))
    assert block.downsample is not None
    return block.downsample(x)


class _Plain(nn.Module):
    """The plain chain of our gated blocks, made of a torchvision block's modules."""

    REDUCTION: ClassVar[int | None] = None
    expansion: int
    conv1: nn.Conv2d
    bn1: nn.Module
    conv2: nn.Conv2d
    bn2: nn.Module
    conv3: nn.Conv2d
    bn3: nn.Module
    relu: nn.Module
    downsample: nn.Module | None
    se: nn.Module | None
    drop_path: nn.Module | None

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        reduction: int | None = None,
        drop_path: float = 0.0,
    ) -> None:
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path: expected a probability below 1, got {drop_path}")
        super().__init__(inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer)
        reduction = reduction or self.REDUCTION
        self.se = SqueezeExcite(planes * self.expansion, reduction) if reduction else None
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        z = self.bn2(self.conv2(h))
        if hasattr(self, "conv3"):
            z = self.bn3(self.conv3(self.relu(z)))
        for module in (self.se, self.drop_path):
            z = z if module is None else module(z)
        return self.relu(z + (x if self.downsample is None else self.downsample(x)))


class GatedBasicBlock(Gated, _Plain, resnet.BasicBlock):
    """y = relu(gate * bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), both convolutions 3x3, stride on the first.

    The arguments and attributes of `torchvision.models.resnet.BasicBlock`, and
    reduction: the reduction of squeeze-and-excitation `se` (`SqueezeExcite`), or None for a block without it.
    drop_path: the probability with which an image's branch is dropped (zero) in training; other branches are divided by
        the probability of not being dropped (`torchvision.ops.StochasticDepth`).
    x: (N, inplanes, H, W) fp64|fp32|bf16|fp16 -> (N, planes, ceil(H/stride), ceil(W/stride)), channels_last if fused.
    Numerics: see `ops.conv_bn_act`, `ops.residual_block` and `ops.gated_tail`.
    """

    ANATOMY = Anatomy((Layer("conv1", "bn1", "relu"), Layer("conv2", "bn2")), "relu")


class GatedBottleneck(Gated, _Plain, resnet.Bottleneck):
    """y = relu(gate * bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x)): 1x1, 3x3 with the stride, 1x1.

    The arguments and attributes of `torchvision.models.resnet.Bottleneck`, and those of `GatedBasicBlock`.
    x: (N, inplanes, H, W) fp64|fp32|bf16|fp16 -> (N, 4*planes, ceil(H/stride), ceil(W/stride)), channels_last if fused.
    """

    ANATOMY = Anatomy((Layer("conv1", "bn1", "relu"), Layer("conv2", "bn2", "relu"), Layer("conv3", "bn3")), "relu")


class SEBasicBlock(GatedBasicBlock):
    """A `GatedBasicBlock` with squeeze-and-excitation, with reduction 16 by default."""

    REDUCTION = 16


class SEBottleneck(GatedBottleneck):
    """A `GatedBottleneck` with squeeze-and-excitation, with reduction 16 by default."""

    REDUCTION = 16
