"""Residual blocks whose branch is gated, or interrupted by other modules: squeeze-and-excitation (Hu et al. 2018, arXiv
1709.01507), stochastic depth (Huang et al. 2016, 1603.09382), attention, dropped regions, blurred strides.

Such a block is taken apart, at every call, into segments of its chain that run as one op each, the modules between
them, which run as they are, and its end, y = relu(gate * z + shortcut), which is one op again. A block without any of
these is one op as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple, cast

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
    """Names of a block's modules: convolution, batch norm, what may stand between that and the activation, the
    activation, and what may stand behind it."""

    conv: str
    norm: str
    act: str = ""
    between: str = ""
    after: str = ""


class Segment(NamedTuple):
    """A part of the chain that runs as one op, and the modules that run behind it."""

    parts: Parts
    after: tuple[nn.Module, ...]


class Pieces(NamedTuple):
    """A block taken apart.

    whole: the block as one op, or None. segments: the chain. squeeze: squeeze-and-excitation, whose gate ends the
    block. drop: the probability of stochastic depth, and whether what is kept is divided by that of being kept.
    shortcut: "identity", "zero_pad", a projection of `pool`'s result, or the module that computes it. chain: all of the
    chain's convolutions and batch norms, and the projection's if there is one. inside: what is bypassed, by name.
    first: a module that runs before all, the shortcut too.
    """

    whole: Parts | None
    segments: list[Segment]
    squeeze: nn.Module | None
    drop: tuple[float, bool] | None
    shortcut: str | Parts | nn.Module
    pool: nn.Module | None
    relu: bool
    chain: Parts
    inside: list[tuple[str, nn.Module]]
    first: nn.Module | None = None


class SqueezeExcite(nn.Module):
    """y = sigmoid(fc2(relu(fc1(mean of z over its map)))) * z

    z: (N, channels, P, Q). fc1, fc2: 1x1 convolutions with biases to channels / reduction, as the nearest multiple of
    8, and back, as timm has them.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(8, (channels // reduction + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(hidden, channels, 1)
        self.gate = nn.Sigmoid()

    def excite(self, mean: Tensor) -> Tensor:
        """The gate (N, channels, 1, 1) of the maps' means."""
        return self.gate(self.fc2(self.act(self.fc1(mean))))

    def forward(self, z: Tensor) -> Tensor:
        return z * self.excite(z.mean((2, 3), keepdim=True))


def mean_of(z: Tensor) -> Tensor:
    """Over the map, (N, K, 1, 1). The gradient of a sum is a view, that of a mean would be written out."""
    rows = max(1, z.shape[2] * z.shape[3])
    return (z.sum((2, 3), keepdim=True, dtype=torch.promote_types(z.dtype, torch.float32)) / rows).to(z.dtype)


def kept_images(z: Tensor, probability: float, scaled: bool) -> Tensor:
    """Stochastic depth's gate (N, 1). It draws as the modules do: (N, 1, 1, 1) in z's dtype."""
    kept = 1 - probability
    mask = z.new_empty((z.shape[0], 1, 1, 1)).bernoulli_(kept).flatten(1)
    return mask.to(torch.promote_types(z.dtype, torch.float32)) / (kept if scaled and kept > 0 else 1)


def no_module(module: nn.Module | None) -> bool:
    return module is None or type(module) is nn.Identity


class Gated(Fused):
    """A block with a chain of `LAYERS`, then attention `se`, stochastic depth `drop_path`, the shortcut `downsample`
    and the activation `LAST`. What a subclass of other modules knows of them is in the methods below."""

    LAYERS: ClassVar[tuple[Layer, ...]]
    LAST: ClassVar[str]
    se: nn.Module | None
    drop_path: nn.Module | None
    downsample: nn.Module | None

    def _inactive(self, module: nn.Module | None) -> bool:
        """Whether an optional module of the chain does nothing."""
        return no_module(module)

    @staticmethod
    def _excite(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """Of squeeze-and-excitation, the gate as a function of the means, else None."""
        return module.excite if type(module) is SqueezeExcite else None

    @staticmethod
    def _drop(module: nn.Module) -> tuple[float, bool] | None:
        """Of stochastic depth, `Pieces.drop`; None for another module."""
        if type(module) is not StochasticDepth or module.mode != "row":
            return None
        return cast(float, module.p) if module.training else 0.0, True

    def _projection(self) -> list[str] | None:
        """Names of the pooling (which may be missing), convolution and batch norm in the shortcut, or None."""
        d = self.downsample
        return list(d._modules) if type(d) is nn.Sequential and len(d) in (2, 3) else None

    def _pieces(self) -> Pieces | str:
        """The block taken apart as its modules are now, or why it cannot be."""
        return take_apart(self)

    def _why_plain(self, x: Tensor) -> str | None:
        return why_plain(self, x)

    def _fused(self, x: Tensor) -> Tensor:
        pieces = self._pieces()
        assert isinstance(pieces, Pieces)
        return run(self, pieces, x)


def relu(module: nn.Module) -> str | None:
    """Why the activation is not one that is computed here, or None."""
    return None if type(module) is nn.ReLU else f"expected ReLU, got {type(module).__name__}"


def chain_of(block: Gated, inside: list[tuple[str, nn.Module]]) -> list[Segment] | str:
    """The block's segments, the last without what ends it, or why it has none. What they bypass goes to `inside`."""
    found: list[Segment] = []
    parts = Parts([], [], "none")
    for layer in block.LAYERS:
        conv, norm = block.get_submodule(layer.conv), block.get_submodule(layer.norm)
        inside += [(layer.conv, conv), (layer.norm, norm)]
        reason = fusable.convolution(conv)
        if reason:
            return f"{layer.conv}: {reason}"
        reason = fusable.batch_norm(norm)
        if reason:
            return f"{layer.norm}: {reason}"
        parts.convs.append(cast(nn.Conv2d, conv))
        parts.norms.append(norm)
        between, after = (
            [block.get_submodule(name) for name in names if name and not block._inactive(getattr(block, name, None))]
            for names in ([layer.between], [layer.after])
        )
        if layer.act:
            act = block.get_submodule(layer.act)
            if not between:
                inside.append((layer.act, act))
                reason = relu(act)
                if reason:
                    return f"{layer.act}: {reason}"
            after = [*between, act, *after] if between else after
        if after or not layer.act:
            found.append(Segment(parts._replace(relu=bool(layer.act) and not between), tuple(after)))
            parts = Parts([], [], "none")
    return found


def take_apart(block: Gated) -> Pieces | str:
    """The pieces of a block whose convolutions stand in front of their batch norms."""
    last = block.get_submodule(block.LAST)
    inside = [(block.LAST, last)]
    segments = chain_of(block, inside)
    if isinstance(segments, str):
        return segments
    reason = relu(last)
    if reason:
        return f"{block.LAST}: {reason}"
    squeeze, drop, behind = _gates(block, inside)
    segments[-1] = segments[-1]._replace(after=tuple(behind))
    shortcut, pool = _shortcut_of(block, inside)
    every = [segment.parts for segment in segments]
    chain = Parts([c for p in every for c in p.convs], [n for p in every for n in p.norms], "none")
    simple = len(segments) == 1 and not behind and squeeze is None and drop is None and pool is None
    whole = None
    if isinstance(shortcut, Parts):
        chain = Parts([*chain.convs, *shortcut.convs], [*chain.norms, *shortcut.norms], "projection")
        # Others do not train as a part of the op.
        if simple and shortcut.convs[0].kernel_size == (1, 1) and shortcut.convs[0].groups == 1:
            whole = chain
    elif isinstance(shortcut, str) and simple:
        whole = chain._replace(shortcut=shortcut)
        reason = fusable.misfit(block, whole)
        if reason:
            return reason
    return Pieces(whole, segments, squeeze, drop, shortcut, pool, True, chain, inside)


def _gates(
    block: Gated, inside: list[tuple[str, nn.Module]]
) -> tuple[nn.Module | None, tuple[float, bool] | None, list[nn.Module]]:
    """`Pieces.squeeze` and `Pieces.drop`, and what runs as modules behind the chain: what is unknown or has a hook, and
    what stands in front of that."""
    squeeze, drop, behind = None, None, []
    attention, path = block.se, block.drop_path
    if attention is not None and not no_module(attention):
        if block._excite(attention) is None or fusable.seen_inside("se", attention):
            behind.append(attention)
        else:
            squeeze = attention
    if path is not None and not no_module(path):
        drop = None if fusable.seen_inside("drop_path", path) else block._drop(path)
        if drop is None:
            behind += [path] if squeeze is None else [squeeze, path]
            squeeze = None
        else:
            inside.append(("drop_path", path))
    return squeeze, drop if drop and drop[0] else None, behind


def _shortcut_of(block: Gated, inside: list[tuple[str, nn.Module]]) -> tuple[str | Parts | nn.Module, nn.Module | None]:
    """`Pieces.shortcut` and `Pieces.pool`. What does not run fused is the module itself."""
    d = block.downsample
    if d is None:
        return "identity", None
    if type(d) is ZeroPadShortcut:
        inside.append(("downsample", d))
        return "zero_pad", None
    names = block._projection()
    if names is None:
        return d, None
    *first, conv, norm = (d.get_submodule(name) for name in names)
    if fusable.convolution(conv) or fusable.batch_norm(norm):
        return d, None
    bypassed = [("downsample", d), *((f"downsample.{n}", m) for n, m in zip(names[-2:], (conv, norm), strict=True))]
    if any(fusable.seen_inside(*row) for row in bypassed):
        return d, None
    inside += bypassed
    pool = None if not first or no_module(first[0]) else first[0]
    return Parts([cast(nn.Conv2d, conv)], [norm], "none", relu=False), pool


def _seen(pieces: Pieces) -> str | None:
    reasons = (fusable.seen_inside(name, module) for name, module in pieces.inside)
    return next((reason for reason in reasons if reason), None)


def structure(block: Gated) -> str | None:
    """Why the block cannot be fused whatever its input, or None."""
    pieces = block._pieces()
    return pieces if isinstance(pieces, str) else _seen(pieces)


def refused(block: Gated) -> str | None:
    """Why the block could not be fused whatever its input and whoever looked inside, or None."""
    pieces = block._pieces()
    return pieces if isinstance(pieces, str) else None


def why_plain(block: Gated, x: Tensor) -> str | None:
    """Why the block's forward runs as the plain chain of torch modules for this input, or None if it runs fused."""
    reason = fusable.context(x)
    if reason:
        return reason
    pieces = block._pieces()
    if isinstance(pieces, str):
        return pieces
    reason = _seen(pieces) or fusable.tensors(pieces.chain, x)
    if reason:
        return reason
    if pieces.whole is not None:
        return fusable.training(pieces.whole, x)
    for p in ops_of(pieces):
        reason = fusable.training(p, x)
        if reason:
            return reason
    return _untailed(x.device, x.dtype, select.named())


def ops_of(pieces: Pieces) -> Iterator[Parts]:
    """What runs as an op of its own, but the end."""
    yield from (segment.parts for segment in pieces.segments)
    if isinstance(pieces.shortcut, Parts):
        yield pieces.shortcut


@torch.compiler.assume_constant_result
def _untailed(device: torch.device, dtype: torch.dtype, name: str | None) -> str | None:
    """Why the named backend cannot end the block, or None."""
    return select.BY_NAME[name].why_not(call_of_gated(device, dtype)) if name and name != select.EAGER else None


def run(block: Gated, pieces: Pieces, x: Tensor) -> Tensor:
    """The block of these pieces. Only where nothing speaks for plain modules."""
    if pieces.whole is not None:
        return fused_forward(pieces.whole, x)
    z = x = x if pieces.first is None else pieces.first(x)
    for segment in pieces.segments:
        z = fused_forward(segment.parts, z)
        for module in segment.after:
            z = module(z)
    # Under autocast a module may give another dtype; the sum has the branch's.
    return gated_tail(z, gate_of(block, pieces, z), shortcut_of(block, pieces, x).to(z.dtype), pieces.relu)


def gate_of(block: Gated, pieces: Pieces, z: Tensor) -> Tensor | None:
    gate = None
    if pieces.squeeze is not None:
        excite = block._excite(pieces.squeeze)
        assert excite is not None
        gate = excite(mean_of(z)).flatten(1)
    if pieces.drop is not None:
        kept = kept_images(z, *pieces.drop)
        gate = kept if gate is None else gate.to(kept.dtype) * kept
    return gate


def shortcut_of(block: Gated, pieces: Pieces, x: Tensor) -> Tensor:
    if pieces.shortcut == "identity":
        return x
    if isinstance(pieces.shortcut, Parts):
        return fused_forward(pieces.shortcut, x if pieces.pool is None else pieces.pool(x))
    assert block.downsample is not None
    return block.downsample(x)


class _Plain(nn.Module):
    """The plain chain of our gated blocks, of a torchvision block's modules."""

    REDUCTION: ClassVar[int | None] = None
    LAST = "relu"
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
    reduction: of squeeze-and-excitation `se` (`SqueezeExcite`), or None.
    drop_path: the probability with which the branch of an image is zero in training; else it is divided by that of its
        being kept (`torchvision.ops.StochasticDepth`).
    x: (N, inplanes, H, W) fp64|fp32|bf16|fp16 -> (N, planes, ceil(H/stride), ceil(W/stride)), channels_last if fused.
    Numerics: see `ops.conv_bn_act`, `ops.residual_block` and `ops.gated_tail`.
    """

    LAYERS = (Layer("conv1", "bn1", "relu"), Layer("conv2", "bn2"))


class GatedBottleneck(Gated, _Plain, resnet.Bottleneck):
    """y = relu(gate * bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x)): 1x1, 3x3 with the stride, 1x1.

    The arguments and attributes of `torchvision.models.resnet.Bottleneck`, and those of `GatedBasicBlock`.
    x: (N, inplanes, H, W) fp64|fp32|bf16|fp16 -> (N, 4*planes, ceil(H/stride), ceil(W/stride)), channels_last if fused.
    """

    LAYERS = (Layer("conv1", "bn1", "relu"), Layer("conv2", "bn2", "relu"), Layer("conv3", "bn3"))


class SEBasicBlock(GatedBasicBlock):
    """A `GatedBasicBlock` with squeeze-and-excitation, its reduction 16 if not given."""

    REDUCTION = 16


class SEBottleneck(GatedBottleneck):
    """A `GatedBottleneck` with squeeze-and-excitation, its reduction 16 if not given."""

    REDUCTION = 16
