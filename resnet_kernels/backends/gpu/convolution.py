"""The description of a fused convolution: the problem that the inference kernels and their heuristics take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..contract import Geometry, nhwc_strides
from .configs import Config
from .launch import Work, nbytes, precision


@dataclasses.dataclass(frozen=True)
class Convolution:
    """y = [relu](scale * conv([lazy] x, weight) + shift + conv1x1(x2, weight2) + residual)

    A problem description, not a module: it holds the operands and their metadata, and computes nothing.

    x: (N, C, H, W), any strides with adjacent channels. weight: (K, R, S, C/groups), contiguous.
    lazy: (a, b, relu); the operand is relu(a*x + b), computed while x is loaded. second: the second product
    (x2 (N, C2, P, Q), weight2 (K, 1, 1, C2)). residual: (N, up to K, P, Q), any strides with adjacent channels; the
    channels that are missing count as zero. joined: the number of the layer's groups that the weight stores as one,
    with zeros between them (`dispatch.join_groups`).
    """

    x: Tensor
    weight: Tensor
    geometry: Geometry
    scale: Tensor | None = None
    shift: Tensor | None = None
    lazy: tuple[Tensor, Tensor, bool] | None = None
    second: tuple[Tensor, Tensor] | None = None
    residual: Tensor | None = None
    relu: bool = False
    joined: int = 1

    @property
    def key(self) -> str:
        """The key in measured tables. Two convolutions with equal keys can use the same measured configuration."""
        N, C, H, W = self.x.shape
        g = self.geometry
        present = {"scale": self.scale, "shift": self.shift, "relu": self.relu or None}
        parts = [str(self.x.dtype).removeprefix("torch."), f"{N}: {self}", f"padding {g.padding}"]
        parts += [name for name, value in present.items() if value is not None]
        maps = {"x": self.x, "x2": self.second and self.second[0], "residual": self.residual}
        for name, t in maps.items():
            if t is not None and nhwc_strides(t) != (
                t.shape[2] * t.shape[3] * t.shape[1],
                t.shape[3] * t.shape[1],
                t.shape[1],
            ):
                parts.append(f"{name} by {'x'.join(map(str, nhwc_strides(t)))}")
        if self.residual is not None and self.residual.shape[1] != self.weight.shape[0]:
            parts.append(f"residual of {self.residual.shape[1]}")
        parts += [precision()] * (self.x.element_size() == 4)
        return " ".join(parts)

    @property
    def parts(self) -> tuple[Convolution, ...]:
        """The convolutions that this problem consists of: itself."""
        return (self,)

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Convolution:
        """Return a copy with function(name, tensor) in place of each tensor. Names are those in the formula; the lazy
        operand's vectors are named a and b."""

        def each(name: str, value: Any) -> Any:
            return function(name, value) if isinstance(value, Tensor) else value

        fields = {f.name: each(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)}
        for name, inner in {"second": ("x2", "weight2"), "lazy": ("a", "b", "relu")}.items():
            if fields[name] is not None:
                fields[name] = tuple(each(*pair) for pair in zip(inner, fields[name], strict=True))
        return Convolution(**fields)

    @property
    def output_sizes(self) -> tuple[int, int, int, int]:
        K, R, S, _ = self.weight.shape
        N, _, H, W = self.x.shape
        return N, K, self.geometry.output_size(H, R), self.geometry.output_size(W, S)

    @property
    def rows(self) -> int:
        N, _, P, Q = self.output_sizes
        return N * P * Q

    @property
    def bytes(self) -> int:
        """The bytes of every operand and of the result, each once."""
        x2, w2 = self.second or (None, None)
        result = self.rows * self.weight.shape[0] * self.x.element_size()
        return nbytes(self.x, self.weight, x2, w2, self.residual) + result

    @property
    def flops(self) -> int:
        """The operations of the formula, without a tile's padding or the zeros between joined groups."""
        K, R, S, C = self.weight.shape
        terms = R * S * C // self.joined + (self.second[0].shape[1] if self.second else 0)
        return 2 * self.rows * K * terms

    def work(self, config: Config, tiles: int) -> Work:
        """Return the work of a launch with `tiles` tiles of BLOCK_M positions and BLOCK_N channels."""
        _, R, S, C = self.weight.shape
        steps = config.steps(R * S, C) + (config.steps(1, self.second[0].shape[1]) if self.second else 0)
        size = self.x.element_size()
        step = (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K * size
        issued = 2 * tiles * steps * config.BLOCK_M * config.BLOCK_N * config.BLOCK_K
        copied = tiles * steps * step + nbytes(self.residual)
        return Work(self.bytes, self.flops, copied, issued)

    def __str__(self) -> str:
        K, R, S, C = self.weight.shape
        N, _, H, W = self.x.shape
        g = self.geometry
        parts = [f"{R}x{S} {self.x.shape[1]}->{K} {H}x{W}"]
        parts += [f"/{g.stride}"] * (g.stride > 1) + [f"dilation {g.dilation}"] * (g.dilation > 1)
        parts += [f"groups {g.groups}"] * (g.groups > 1) + ["lazy"] * (self.lazy is not None)
        parts += [f"+ 1x1 {self.second[0].shape[1]}->{K}"] if self.second else []
        parts += ["+ residual"] * (self.residual is not None)
        return " ".join(parts)


def channels_last_strides(t: Tensor) -> bool:
    """Whether channels are adjacent in memory; the other strides are arbitrary."""
    return t.shape[1] == 1 or t.stride(1) == 1
