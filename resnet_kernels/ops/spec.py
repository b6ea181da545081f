"""The static (non-tensor) configuration of a residual block, and its form in the schemas of the ops."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ..backends.contract import Geometry, Pool

SHORTCUTS = ("identity", "projection", "zero_pad", "none")

# (C, H, W) of an activation of one image.
MapSize = tuple[int, int, int]


def same_padding(weight: Tensor, stride: int, dilation: int, groups: int) -> Geometry:
    """Return the geometry of a block's convolution: an odd filter, padded so that stride 1 keeps the size of the
    map."""
    return Geometry(stride, dilation * (weight.shape[2] // 2), dilation, groups)


def total_stride(geometries: Sequence[Geometry]) -> int:
    stride = 1
    for g in geometries:
        stride *= g.stride
    return stride


def pooled_size(size: Sequence[int], pool: Pool) -> tuple[int, int]:
    """Return (P, Q) of the max pooling of a map of `size` (H, W)."""
    g = Geometry(pool.stride, pool.padding)
    return g.output_size(size[0], pool.kernel), g.output_size(size[1], pool.kernel)


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """The static (non-tensor) configuration of a block: a chain of convolutions with a shortcut.

    strides, dilations, groups: one int per convolution: the chain's in order, then the projection's if there is one.
    shortcut: "identity", "projection", "zero_pad" (option A: the input subsampled, zero channels appended) or "none".
    relu: whether the block ends with a ReLU.
    preactivation: whether batch norm and ReLU stand before each convolution. Then the projection has no batch norm.
    pool: the max pooling that ends a stem, or None.
    """

    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: tuple[int, ...]
    shortcut: str = "identity"
    relu: bool = True
    preactivation: bool = False
    pool: Pool | None = None

    # The fields in the schema of an op, in the order of `flat`.
    SCHEMA: ClassVar[str] = (
        "int[] strides, int[] dilations, int[] groups, str shortcut, bool relu, bool preactivation, int[] pool"
    )

    def flat(self) -> list[Any]:
        """Return the fields as an op takes them; `of` is the inverse."""
        lists = [list(self.strides), list(self.dilations), list(self.groups)]
        return [*lists, self.shortcut, self.relu, self.preactivation, [] if self.pool is None else list(self.pool)]

    @classmethod
    def of(cls, fields: Sequence[Any]) -> BlockSpec:
        strides, dilations, groups, shortcut, relu, preactivation, pool = fields
        window = Pool(*pool) if pool else None
        return cls(tuple(strides), tuple(dilations), tuple(groups), shortcut, relu, preactivation, window)

    @property
    def projected(self) -> bool:
        """Whether the shortcut is a projection."""
        return self.shortcut == "projection"

    @property
    def n(self) -> int:
        """The number of convolutions in the chain."""
        return len(self.strides) - self.projected

    def geometries(self, weights: Sequence[Tensor]) -> list[Geometry]:
        rows = zip(weights, self.strides, self.dilations, self.groups, strict=True)
        return [same_padding(w, *row) for w, *row in rows]


class MapSizes(NamedTuple):
    """Sizes (C, H, W) of a block's activations for one image.

    operands: what each convolution reads, the projection's last. maps: the activations in order, from the block's input
    to its result, without the projection.
    """

    operands: list[MapSize]
    maps: list[MapSize]

    @property
    def outputs(self) -> list[MapSize]:
        """What each convolution writes, the projection's last."""
        return [*self.maps[1:], self.maps[-1]][: len(self.operands)]


def map_sizes(
    size: Sequence[int], weights: Sequence[Sequence[int]], geometries: Sequence[Geometry], shortcut: str | None
) -> MapSizes:
    """Return the sizes of all activations of a block, for an input of `size` (C, H, W) and weights (K, C, R, S)."""
    C, H, W = size
    maps = [(C, H, W)]
    n = len(weights) - (shortcut == "projection")
    for w, g in zip(weights[:n], geometries[:n], strict=True):
        _, H, W = maps[-1]
        maps.append((w[0], g.output_size(H, w[2]), g.output_size(W, w[3])))
    return MapSizes(maps[:n] + [maps[0]] * (len(weights) - n), maps)


class NormSpec(NamedTuple):
    """The static configuration of a batch norm in training.

    batch: whether the batch's statistics normalise (else known ones). group: the name of the process group whose batch
    counts, "" for this process alone.
    """

    eps: float
    batch: bool
    group: str


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """The static configuration of a block in training: what the forward decided and the backward follows.

    norms: one per batch norm. stored: whether the outputs of the chain's last convolution and of the projection are
    stored; else their statistics and gradients follow from the moments of their operands. backend: the name of the
    backend that runs forward and backward.
    """

    spec: BlockSpec
    norms: tuple[NormSpec, ...]
    stored: tuple[bool, ...]
    backend: str

    # The fields in the schema of an op, in the order of `flat`.
    SCHEMA: ClassVar[str] = (
        f"{BlockSpec.SCHEMA}, float[] eps, bool[] batch, str[] norm_groups, bool[] stored, str backend"
    )

    def flat(self) -> list[Any]:
        """Return the fields as an op takes them; `of` is the inverse."""
        eps, batch, group = ([norm[i] for norm in self.norms] for i in range(3))
        return [*self.spec.flat(), eps, batch, group, list(self.stored), self.backend]

    @classmethod
    def of(cls, fields: Sequence[Any]) -> TrainingPlan:
        *spec, eps, batch, groups, stored, backend = fields
        norms = tuple(NormSpec(*row) for row in zip(eps, batch, groups, strict=True))
        return cls(BlockSpec.of(spec), norms, tuple(stored), backend)

    def stored_outputs(self) -> list[int]:
        """Return the convolutions whose outputs are stored; in a pre-activation block, the batch norms that read
        them."""
        n, projected = self.spec.n, self.spec.projected
        if self.spec.preactivation:
            return list(range(1, n))
        last, shortcut = self.stored
        return [*range(n - 1), *([n - 1] if last else []), *([n] if projected and shortcut else [])]

    def saved_moments(self) -> list[int]:
        """Return the convolutions whose operand's moments are saved for the backward."""
        if self.spec.preactivation:
            return []
        n = self.spec.n
        candidates = [(n - 1, self.stored[0]), *([(n, self.stored[1])] if self.spec.projected else [])]
        return [i for i, stored in candidates if not stored and self.norms[i].batch]
