"""The residual block with batch statistics by the primitives: its forward, and what forward and backward share.

    h_0 = x;  c_i = conv(h_{i-1}, W_i);  h_i = relu(bn_i(c_i)) for i < n
    y = relu(bn_n(c_n) + shortcut(x))

    shortcut(x) = x  |  bn_s(conv(x, W_s))  |  x subsampled, zero channels appended  |  0

or, for the stem of a network, y = max_pool(relu(bn_1(c_1))).

Each batch norm normalises by the statistics of its c (of this process or of a group), or by known ones (frozen).

Saved for the backward are x, c_1 .. c_{n-1}, where y > 0, and vectors per channel. h_i = relu(a_i c_i + b_i) is
computed again wherever it is read. If the last convolution is 1x1, c_n is not stored either, nor is the projection's
c_s: their statistics follow from the moments of their operands (`backends.algebra`), and so do their gradients. Where
the matrix of second moments would cost more than it saves (`moments_pay`) they are stored like the rest. A stem saves
c_1 and, for each maximum, which element of its window it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import algebra
from ..backends.contract import (
    Affine,
    Backend,
    Epilogue,
    Geometry,
    Operand,
    Product,
    Stats,
    accumulator_dtype,
    fold,
)
from .batch_norm import merged
from .block_inference import zero_pad
from .spec import BlockSpec, TrainingPlan, map_sizes, total_stride

POINTWISE = Geometry()


class Saved(NamedTuple):
    """The results of the forward, all but y saved for the backward.

    mask: see `Epilogue.reduce`; empty if the block ends without a ReLU or y itself is the mask. c, moments: by
    convolution, as far as they are stored. tables: one per batch norm, see `contract.Affine`.
    """

    y: Tensor
    mask: Tensor
    c: dict[int, Tensor]
    tables: list[Tensor]
    moments: dict[int, tuple[Tensor, Tensor]]

    def flat(self) -> list[Tensor]:
        return [self.y, self.mask, *self.c.values(), *self.tables, *(t for m in self.moments.values() for t in m)]

    @classmethod
    def of(cls, flat: Sequence[Tensor], plan: TrainingPlan) -> Saved:
        rest = iter(flat[2:])
        c = {i: next(rest) for i in plan.stored_outputs()}
        tables = [next(rest) for _ in plan.norms]
        return cls(flat[0], flat[1], c, tables, {i: (next(rest), next(rest)) for i in plan.saved_moments()})


def moments_pay(rows: int, channels: int, outputs: int) -> bool:
    """Return whether second moments of `channels` cost less than storing as many rows of `outputs` channels.

    They take channels^2 operations per row, against a few bytes per row and output.
    """
    return rows >= 4 * channels and outputs >= 2 * channels


def stored_outputs(
    size: Sequence[int],
    weights: Sequence[Sequence[int]],
    spec: BlockSpec,
    batch: Sequence[bool],
    geometries: Sequence[Geometry],
) -> tuple[bool, bool]:
    """Return `TrainingPlan.stored` for an input of `size` (N, C, H, W). batch: see `NormSpec`."""
    if spec.preactivation:
        return False, False
    if spec.pool is not None:
        return True, False
    _, P, Q = map_sizes(size[1:], weights, geometries, spec.shortcut).maps[-1]
    rows = size[0] * P * Q

    def stored(i: int, strided: bool) -> bool:
        if not batch[i]:
            return False
        K, C, R, S = weights[i]
        g = geometries[i]
        product = (R, S, g.groups) == (1, 1, 1) and (strided or g.stride == 1)
        return not (product and moments_pay(rows, C, K))

    return stored(spec.n - 1, False), spec.projected and stored(spec.n, True)


class Chain:
    """A block under a plan: what its forward and backward share.

    tables: one per batch norm, in the order in which the forward computes them.
    """

    def __init__(self, backend: Backend, x: Tensor, weights: Sequence[Tensor], plan: TrainingPlan) -> None:
        self.backend, self.plan, self.spec, self.x = backend, plan, plan.spec, x
        self.weights = [w.to(x.dtype) for w in weights]
        self.geometries = plan.spec.geometries(weights)
        self.accumulator_dtype = accumulator_dtype(x.dtype)
        # fp32 and fp64 operands are centred before they enter a product; 16-bit ones enter exactly as they are.
        self.centred = x.dtype in (torch.float32, torch.float64)
        self.tables: list[Tensor] = []

    def rows(self, y: Tensor) -> int:
        return y.shape[0] * y.shape[2] * y.shape[3]

    def affine(self, i: int) -> Affine:
        return Affine.of(self.tables[i])

    def matrix(self, i: int) -> Tensor:
        """Return the weight of a 1x1 convolution as a matrix (K, J): output channels, input channels."""
        return self.weights[i].flatten(1)

    def activation(self, i: int, c: dict[int, Tensor]) -> Operand:
        """Return the operand of convolution i of the chain: x, or h = relu(a*c + b)."""
        if i == 0:
            return Operand(self.x)
        affine = self.affine(i - 1)
        return Operand(c[i - 1], (affine.a, affine.b), relu=True)

    def shortcut_rows(self) -> Operand:
        """Return the positions of x that the projection reads, as the operand of a product of rows."""
        return Operand(self.x, stride=self.geometries[-1].stride)

    def is_product(self, i: int) -> bool:
        """Return whether the output of convolution i, the chain's last or the projection, is not stored."""
        return not self.plan.stored[i - self.spec.n + 1]


class Forward(Chain):
    """The forward of a block. norms: (gamma, beta, mean, variance) for each batch norm."""

    def __init__(
        self,
        backend: Backend,
        x: Tensor,
        weights: Sequence[Tensor],
        gammas: Sequence[Tensor],
        betas: Sequence[Tensor],
        means: Sequence[Tensor],
        variances: Sequence[Tensor],
        plan: TrainingPlan,
    ) -> None:
        super().__init__(backend, x, weights, plan)
        vectors = zip(gammas, betas, means, variances, strict=True)
        self.norms = [[t.to(self.accumulator_dtype) for t in row] for row in vectors]

    def frozen(self, i: int) -> Tensor:
        """Return the table of a batch norm with known statistics."""
        gamma, beta, mean, var = self.norms[i]
        return algebra.frozen_table(mean, var, gamma, beta, self.plan.norms[i].eps)

    def from_stats(self, i: int, stats: Stats | None) -> Tensor:
        """Return the table of a batch norm from the batch's statistics; None: from known ones."""
        if stats is None:
            return self.frozen(i)
        gamma, beta, _, _ = self.norms[i]
        name = self.plan.norms[i].group
        if name:
            return algebra.table(merged(stats, name), gamma, beta, self.plan.norms[i].eps)
        return self.backend.finalize_stats(stats, gamma, beta, self.plan.norms[i].eps)

    def by_moments(
        self, i: int, operand: Operand, geometry: Geometry, saved: dict[int, tuple[Tensor, Tensor]]
    ) -> tuple[Product, Tensor]:
        """Return the normalised product of a convolution whose output is not stored, and its shift.

        Appends the batch norm's table to `tables`, and puts the operand's moments into `saved`.
        """
        w, eps = self.weights[i], self.plan.norms[i].eps
        if not self.plan.norms[i].batch:
            self.tables.append(self.frozen(i))
            affine = self.affine(i)
            return Product(self.backend.materialize(operand, w.shape[2]), w, geometry, affine.a), affine.b
        m = self.backend.moments(operand)
        saved[i] = m.mean, m.M2
        gamma, beta, _, _ = self.norms[i]
        name = self.plan.norms[i].group
        if name:
            stats = merged(algebra.product_stats(m, self.matrix(i)), name)
            self.tables.append(algebra.table(stats, gamma, beta, eps))
        else:
            self.tables.append(self.backend.finalize_moments(m, self.matrix(i), gamma, beta, eps))
        affine = self.affine(i)
        if not self.centred and i == self.spec.n:
            # The chain's product shares the accumulator, so the scale is folded into the weight, and the shift follows
            # from the rounded weight.
            folded = fold(w, affine.a, w.dtype)
            mu, exact = m.mean.double(), self.matrix(i).double()
            shift = beta - affine.a * (affine.mean - exact @ mu) - folded.flatten(1).double() @ mu
            return Product(operand, folded, geometry), shift.to(beta.dtype)
        if not self.centred:
            return Product(operand, w, geometry, affine.a), affine.b
        # The operand is h - mu instead of h. With large means a product's rounding error is the same in every row.
        # PyTorch takes statistics of the rounded product, which removes that error again; ours do not see it.
        centred = m.centred or self.backend.materialize(dataclasses.replace(operand, centre=m.mean), 1)
        shift = beta
        if name:
            off = self.matrix(i).double() @ m.mean.double() - affine.mean
            shift = (beta + affine.a * off).to(beta.dtype)
        return Product(centred, w, geometry, affine.a), shift

    def run(self) -> Saved:
        spec, backend, n = self.spec, self.backend, self.spec.n
        c: dict[int, Tensor] = {}
        moments: dict[int, tuple[Tensor, Tensor]] = {}
        products: list[Product] = []
        shift: Tensor | None = None
        added: list[Operand] = []  # stored outputs, normalised, to be added
        for i in range(n):
            w, g = self.weights[i], self.geometries[i]
            h = self.activation(i, c)
            if i == n - 1 and self.is_product(i):
                product, shift = self.by_moments(i, h, g, moments)
                products.append(product)
                break
            h = backend.materialize(h, w.shape[2])
            c[i], stats = backend.conv(
                [Product(h, w, g)], Epilogue(reduce="stats" if self.plan.norms[i].batch else None)
            )
            self.tables.append(self.from_stats(i, stats))
        if not products:
            a = self.affine(n - 1)
            added.append(Operand(c[n - 1], (a.a, a.b)))
        if spec.projected and self.is_product(n):
            product, more = self.by_moments(n, self.shortcut_rows(), POINTWISE, moments)
            products.append(product)
            shift = more if shift is None else shift + more
        elif spec.projected:
            w, g = self.weights[n], self.geometries[n]
            c[n], stats = backend.conv([Product(Operand(self.x), w, g)], Epilogue(reduce="stats"))
            self.tables.append(self.from_stats(n, stats))
            a = self.affine(n)
            added.append(Operand(c[n], (a.a, a.b)))
        elif spec.shortcut == "zero_pad":
            padded = zero_pad(self.x, total_stride(self.geometries), self.weights[n - 1].shape[0])
            added.append(Operand(padded.contiguous(memory_format=torch.channels_last)))
        elif spec.shortcut == "identity":
            added.append(Operand(self.x))
        first = None if products else added.pop(0)
        if spec.pool is not None:
            assert first is not None
            y, winners = backend.bn_pass(first, Epilogue(relu=True, reduce="winners"), spec.pool)
            return Saved(y, winners, c, self.tables, moments)
        epilogue = Epilogue(shift, added[0] if added else None, spec.relu, reduce="mask" if spec.relu else None)
        y, mask = backend.conv(products, epilogue) if first is None else backend.bn_pass(first, epilogue)
        if mask is None or mask is y:
            mask = self.x.new_empty(0, dtype=torch.uint8)
        return Saved(y, mask, c, self.tables, moments)
