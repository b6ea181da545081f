"""The residual block with batch statistics by the primitives, and its gradient.

    h_0 = x;  c_i = conv(h_{i-1}, W_i);  h_i = relu(bn_i(c_i)) for i < n
    y = relu(bn_n(c_n) + shortcut(x))

    shortcut(x) = x  |  bn_s(conv(x, W_s))  |  x subsampled, zero channels appended  |  nothing

or, of a network's stem, y = max_pool(relu(bn_1(c_1))).

Each batch norm normalises by the statistics of its c (of this process or of a group's), or by known ones (frozen).

Kept for the gradient are x, c_1 .. c_{n-1}, where y > 0, and vectors per channel. h_i = relu(a_i c_i + b_i) is made
again wherever it is read. c_n, and the projection's c_s, are not stored either where the convolution is 1x1: their
statistics follow from the moments of their operands (`backends.algebra`), and so do their gradients. Where the matrix
of second moments would cost more than it saves (`pays_by_moments`) they are stored like the rest. Of a stem c_1 is
kept, and which element of its window each maximum was.
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
    Moments,
    Normalized,
    Operand,
    Pool,
    Pooled,
    Product,
    Stats,
    TailGrad,
    accumulator_dtype,
    fold,
)
from .batch_norm import merged, summed
from .block_inference import same_padding, total_stride, walk, zero_pad

POINTWISE = Geometry()


class Plan(NamedTuple):
    """What of a block is no tensor. strides, dilations, groups: one per convolution, the projection's last. eps, batch,
    groups_of (names of process groups, "" for none): one per batch norm; with `preactivation` (ops/preactivation.py)
    the projection has none. stored: whether the outputs of the chain's last convolution and of the projection are.
    pool: kernel, stride and padding of what ends a stem, else nothing. backend: the name of the one that runs forward
    and backward."""

    strides: Sequence[int]
    dilations: Sequence[int]
    groups: Sequence[int]
    eps: Sequence[float]
    batch: Sequence[bool]
    groups_of: Sequence[str]
    shortcut: str
    relu: bool
    preactivation: bool
    stored: Sequence[bool]
    pool: Sequence[int]
    backend: str

    @property
    def projected(self) -> bool:
        return self.shortcut == "projection"

    @property
    def n(self) -> int:
        """Convolutions of the chain."""
        return len(self.strides) - self.projected

    def geometries(self, weights: Sequence[Tensor]) -> list[Geometry]:
        rows = zip(weights, self.strides, self.dilations, self.groups, strict=True)
        return [same_padding(w, *row) for w, *row in rows]

    def outputs(self) -> list[int]:
        """The outputs that are stored, by convolution; before a pre-activation, by the batch norm that reads them."""
        if self.preactivation:
            return list(range(1, self.n))
        last = self.n - 1
        return [
            *range(last),
            *([last] if self.stored[0] else []),
            *([self.n] if self.projected and self.stored[1] else []),
        ]

    def moments(self) -> list[int]:
        """Of which convolutions the operand's moments are kept."""
        if self.preactivation:
            return []
        candidates = [(self.n - 1, self.stored[0])] + [(self.n, self.stored[1])] * self.projected
        return [i for i, stored in candidates if not stored and self.batch[i]]


class Kept(NamedTuple):
    """What the forward made: c and moments by convolution, as far as there are any, and a table per batch norm. `mask`:
    see `Epilogue.reduce`; empty where the block ends without a ReLU, or y itself is the mask."""

    y: Tensor
    mask: Tensor
    c: dict[int, Tensor]
    tables: list[Tensor]
    moments: dict[int, tuple[Tensor, Tensor]]

    def flat(self) -> list[Tensor]:
        return [self.y, self.mask, *self.c.values(), *self.tables, *(t for m in self.moments.values() for t in m)]

    @classmethod
    def of(cls, flat: Sequence[Tensor], plan: Plan) -> Kept:
        rest = iter(flat[2:])
        c = {i: next(rest) for i in plan.outputs()}
        tables = [next(rest) for _ in plan.batch]
        return cls(flat[0], flat[1], c, tables, {i: (next(rest), next(rest)) for i in plan.moments()})


def pays_by_moments(rows: int, channels: int, outputs: int) -> bool:
    """Whether the second moments of `channels` cost less than storing as many rows of `outputs`: channels^2 operations
    per row and per output against a few bytes of each."""
    return rows >= 4 * channels and outputs >= 2 * channels


def stored_outputs(
    size: Sequence[int], weights: Sequence[Sequence[int]], plan: Plan, geometries: Sequence[Geometry]
) -> list[bool]:
    """`Plan.stored` for an input of `size` (N, C, H, W)."""
    if plan.pool:
        return [True, False]
    _, maps = walk(size[1:], weights, geometries, plan.shortcut)
    rows = size[0] * maps[-1][1] * maps[-1][2]

    def stored(i: int, strided: bool) -> bool:
        if not plan.batch[i]:
            return False
        K, C, R, S = weights[i]
        g = geometries[i]
        product = (R, S, g.groups) == (1, 1, 1) and (strided or g.stride == 1)
        return not (product and pays_by_moments(rows, C, K))

    return [stored(plan.n - 1, False), plan.projected and stored(plan.n, True)]


class Block:
    """A block under a plan: what forward and backward share."""

    def __init__(self, backend: Backend, x: Tensor, weights: Sequence[Tensor], plan: Plan) -> None:
        self.backend, self.plan, self.x = backend, plan, x
        self.weights = [w.to(x.dtype) for w in weights]
        self.geometries = plan.geometries(weights)
        self.accumulator_dtype = accumulator_dtype(x.dtype)
        self.centred = x.dtype in (torch.float32, torch.float64)
        self.tables: list[Tensor] = []

    def rows(self, y: Tensor) -> int:
        return y.shape[0] * y.shape[2] * y.shape[3]

    def affine(self, i: int) -> Affine:
        return Affine.of(self.tables[i])

    def matrix(self, i: int) -> Tensor:
        """The weight of a 1x1 convolution, (K, J)."""
        return self.weights[i].flatten(1)

    def activation(self, i: int, c: dict[int, Tensor]) -> Operand:
        """The operand of convolution i of the chain: x, or h = relu(a*c + b)."""
        if i == 0:
            return Operand(self.x)
        affine = self.affine(i - 1)
        return Operand(c[i - 1], (affine.a, affine.b), relu=True)

    def shortcut_rows(self) -> Operand:
        """The part of x that the projection reads, where that is a product of rows."""
        return Operand(self.x, stride=self.geometries[-1].stride)

    def is_product(self, i: int) -> bool:
        """Whether the convolution's output is not stored."""
        return not self.plan.stored[i - self.plan.n + 1]


class Forward(Block):
    def __init__(
        self,
        backend: Backend,
        x: Tensor,
        weights: Sequence[Tensor],
        gammas: Sequence[Tensor],
        betas: Sequence[Tensor],
        means: Sequence[Tensor],
        variances: Sequence[Tensor],
        plan: Plan,
    ) -> None:
        super().__init__(backend, x, weights, plan)
        vectors = zip(gammas, betas, means, variances, strict=True)
        self.norms = [[t.to(self.accumulator_dtype) for t in row] for row in vectors]

    def frozen(self, i: int) -> Tensor:
        gamma, beta, mean, var = self.norms[i]
        return algebra.frozen_table(mean, var, gamma, beta, self.plan.eps[i])

    def from_stats(self, i: int, stats: Stats | None) -> Tensor:
        if stats is None:
            return self.frozen(i)
        gamma, beta, _, _ = self.norms[i]
        name = self.plan.groups_of[i]
        if name:
            return algebra.table(merged(stats, name), gamma, beta, self.plan.eps[i])
        return self.backend.finalize_stats(stats, gamma, beta, self.plan.eps[i])

    def by_moments(
        self, i: int, operand: Operand, geometry: Geometry, kept: dict[int, tuple[Tensor, Tensor]]
    ) -> tuple[Product, Tensor]:
        """The normalised product of a convolution whose output is not stored, and its shift; the table onto the list,
        the operand's moments into `kept`."""
        w, eps = self.weights[i], self.plan.eps[i]
        if not self.plan.batch[i]:
            self.tables.append(self.frozen(i))
            affine = self.affine(i)
            return Product(self.backend.materialize(operand, w.shape[2]), w, geometry, affine.a), affine.b
        m = self.backend.moments(operand)
        kept[i] = m.mean, m.M2
        gamma, beta, _, _ = self.norms[i]
        name = self.plan.groups_of[i]
        if name:
            stats = merged(algebra.product_stats(m, self.matrix(i)), name)
            self.tables.append(algebra.table(stats, gamma, beta, eps))
        else:
            self.tables.append(self.backend.finalize_moments(m, self.matrix(i), gamma, beta, eps))
        affine = self.affine(i)
        if not self.centred and i == self.plan.n:
            # Beside the chain's product there is one accumulator: the scale goes into the weight, and the shift follows
            # from what rounding left of it.
            folded = fold(w, affine.a, w.dtype)
            mu, exact = m.mean.double(), self.matrix(i).double()
            shift = beta - affine.a * (affine.mean - exact @ mu) - folded.flatten(1).double() @ mu
            return Product(operand, folded, geometry), shift.to(beta.dtype)
        if not self.centred:
            return Product(operand, w, geometry, affine.a), affine.b
        # h - mu in place of h: rounding in a product of large means would be the same in every row, where PyTorch's
        # statistics, taken of its result, would take it out again.
        centred = m.centred or self.backend.materialize(dataclasses.replace(operand, centre=m.mean), 1)
        shift = beta
        if name:
            off = self.matrix(i).double() @ m.mean.double() - affine.mean
            shift = (beta + affine.a * off).to(beta.dtype)
        return Product(centred, w, geometry, affine.a), shift

    def run(self) -> Kept:
        plan, backend, n = self.plan, self.backend, self.plan.n
        c: dict[int, Tensor] = {}
        moments: dict[int, tuple[Tensor, Tensor]] = {}
        products: list[Product] = []
        shift: Tensor | None = None
        added: list[Operand] = []  # normalised outputs that are stored
        for i in range(n):
            w, g = self.weights[i], self.geometries[i]
            h = self.activation(i, c)
            if i == n - 1 and self.is_product(i):
                product, shift = self.by_moments(i, h, g, moments)
                products.append(product)
                break
            h = backend.materialize(h, w.shape[2])
            c[i], stats = backend.conv([Product(h, w, g)], Epilogue(reduce="stats" if plan.batch[i] else None))
            self.tables.append(self.from_stats(i, stats))
        if not products:
            a = self.affine(n - 1)
            added.append(Operand(c[n - 1], (a.a, a.b)))
        if plan.projected and self.is_product(n):
            product, more = self.by_moments(n, self.shortcut_rows(), POINTWISE, moments)
            products.append(product)
            shift = more if shift is None else shift + more
        elif plan.projected:
            w, g = self.weights[n], self.geometries[n]
            c[n], stats = backend.conv([Product(Operand(self.x), w, g)], Epilogue(reduce="stats"))
            self.tables.append(self.from_stats(n, stats))
            a = self.affine(n)
            added.append(Operand(c[n], (a.a, a.b)))
        elif plan.shortcut == "zero_pad":
            padded = zero_pad(self.x, total_stride(self.geometries), self.weights[n - 1].shape[0])
            added.append(Operand(padded.contiguous(memory_format=torch.channels_last)))
        elif plan.shortcut == "identity":
            added.append(Operand(self.x))
        first = None if products else added.pop(0)
        if plan.pool:
            assert first is not None
            y, winners = backend.bn_pass(first, Epilogue(relu=True, reduce="winners"), Pool(*plan.pool))
            return Kept(y, winners, c, self.tables, moments)
        epilogue = Epilogue(shift, added[0] if added else None, plan.relu, reduce="mask" if plan.relu else None)
        y, mask = backend.conv(products, epilogue) if first is None else backend.bn_pass(first, epilogue)
        if mask is None or mask is y:
            mask = self.x.new_empty(0, dtype=torch.uint8)
        return Kept(y, mask, c, self.tables, moments)


class Gradients(NamedTuple):
    """None where nobody asked for one."""

    x: Tensor | None
    weights: list[Tensor | None]
    gammas: list[Tensor | None]
    betas: list[Tensor | None]


class Backward(Block):
    """needs: of x, and of each convolution's weight, gamma and beta, whether the gradient is wanted."""

    def __init__(
        self,
        backend: Backend,
        x: Tensor,
        weights: Sequence[Tensor],
        kept: Kept,
        plan: Plan,
        need_x: bool,
        need_weights: Sequence[bool],
        need_norms: Sequence[bool],
    ) -> None:
        super().__init__(backend, x, weights, plan)
        self.kept, self.tables = kept, kept.tables
        self.need_x, self.need_weights, self.need_norms = need_x, need_weights, need_norms
        self.dweights: list[Tensor | None] = [None] * len(weights)
        self.dgammas: list[Tensor | None] = [None] * len(plan.batch)
        self.dbetas: list[Tensor | None] = [None] * len(plan.batch)

    def wanted_below(self, i: int) -> bool:
        """Whether anything that convolution i of the chain depends on through its operand wants a gradient."""
        return self.need_x or any(self.need_weights[:i]) or any(self.need_norms[:i])

    def before_relu(self, dy: Tensor) -> Operand:
        """The gradient of what the block's last ReLU takes."""
        plan, kept = self.plan, self.kept
        if plan.pool:
            H, W = kept.c[0].shape[2:]
            return Operand(dy, pooled=Pooled(kept.mask, Pool(*plan.pool), (H, W)))
        mask = (kept.mask if kept.mask.numel() else kept.y) if plan.relu else None
        return self.backend.materialize(Operand(dy, mask=mask), 1)

    def through_norm(self, i: int, gh: Operand, sums: tuple[Tensor, Tensor], rows: int) -> Operand:
        """dc = al*gh + be*(c - mean) + const, from sum(gh) and sum(gh * xhat)."""
        affine = self.affine(i)
        self.dbetas[i], self.dgammas[i] = sums
        if not self.plan.batch[i]:
            return dataclasses.replace(gh, affine=(affine.a, torch.zeros_like(affine.a)))
        name = self.plan.groups_of[i]
        if name:
            total, dbeta, dgamma = summed(name, rows, *sums)
            al, be, const = algebra.bn_grad((dbeta, dgamma), total, affine)
        else:
            al, be, const = self.backend.finalize_bn_grad(sums, rows, affine)
        return dataclasses.replace(gh, affine=(al, const), second=(self.kept.c[i], be, affine.mean))

    def normalized(self, i: int) -> Normalized:
        affine = self.affine(i)
        return Normalized(self.kept.c[i], affine.mean, affine.rstd)

    def through_product(
        self, i: int, g: Operand, h: Operand, geometry: Geometry, rows: int, below: bool
    ) -> tuple[list[Product], Tensor | None]:
        """Gradients of a convolution whose output is not stored: its own into the lists, its operand's as products and
        a shift."""
        w, affine = self.weights[i], self.affine(i)
        H, W = (g if h.stride > 1 else h).tensor.shape[2:]
        if not self.plan.batch[i]:
            if self.need_weights[i] or self.need_norms[i]:
                h = self.backend.materialize(h, w.shape[2])
                G, sg = self.backend.wgrad(g, h, (w.shape[2], w.shape[3]), geometry, sums=True)
                assert sg is not None
                self.dweights[i] = affine.a[:, None, None, None] * G
                # sum(g * c) = <G, W>: c is not needed for it.
                self.dgammas[i] = affine.rstd * ((G * w).flatten(1).sum(1) - sg * affine.mean)
                self.dbetas[i] = sg
            folded = (affine.a[:, None, None, None] * w).to(w.dtype).contiguous(memory_format=torch.channels_last)
            return [Product(g, folded, geometry, data_grad_size=(H, W))] if below else [], None
        mean, M2 = self.kept.moments[i]
        centre = mean if self.centred else None
        h = self.backend.materialize(dataclasses.replace(h, centre=centre), 1)
        G, sg = self.backend.wgrad(g, h, (1, 1), POINTWISE, sums=True)
        assert sg is not None
        G = G.flatten(1)
        t = self.tail_grad(i, sg, G, centre, Moments(rows, mean, M2))
        self.dweights[i], self.dgammas[i], self.dbetas[i] = t.dweight.view(w.shape), t.dgamma, sg
        # dh = g A + (h - centre) B + v; A as the weight whose data gradient that is, B as one of its own.
        return [
            Product(g, t.A[:, :, None, None], POINTWISE, data_grad_size=(H, W)),
            Product(h, t.B[:, :, None, None], POINTWISE),
        ], t.v

    def tail_grad(self, i: int, sg: Tensor, G: Tensor, centre: Tensor | None, m: Moments) -> TailGrad:
        affine, name = self.affine(i), self.plan.groups_of[i]
        if not name:
            return self.backend.finalize_tail_grad(sg, G, centre, m, self.matrix(i), affine)
        dgamma = algebra.tail_dgamma(sg, G, centre, self.matrix(i), affine)
        group = summed(name, m.rows, sg, dgamma)
        return algebra.tail_grad(sg, G, centre, m, self.matrix(i), affine, group)

    def run(self, dy: Tensor) -> Gradients:
        plan, backend, n, kept = self.plan, self.backend, self.plan.n, self.kept
        self.dy, rows = dy, self.rows(kept.c[0] if plan.pool else dy)
        g = self.before_relu(dy)
        shortcut = self.through_projection(g, rows) if plan.projected else None
        i = n - 1
        h = self.activation(i, kept.c)
        if self.is_product(i):
            products, shift = self.through_product(i, g, h, self.geometries[i], rows, self.wanted_below(i))
        else:
            dc = self.through_norm(i, g, backend.reduce(g, self.normalized(i)), rows)
            products, shift = self.through_convolution(i, dc, h), None
        for i in range(n - 2, -1, -1):
            if not self.wanted_below(i + 1):
                break
            operand = self.activation(i + 1, kept.c)
            gh, sums = backend.masked_conv(products, Epilogue(shift, mask=operand, reduce=self.normalized(i)))
            dc = self.through_norm(i, gh, sums, self.rows(gh.tensor))
            products, shift = self.through_convolution(i, dc, self.activation(i, kept.c)), None
        dx = self.through_input(products, shift, g, shortcut) if self.need_x else None
        return Gradients(dx, self.dweights, self.dgammas, self.dbetas)

    def through_convolution(self, i: int, dc: Operand, h: Operand) -> list[Product]:
        """A convolution's own gradient into the list, its operand's as a product."""
        w, g = self.weights[i], self.geometries[i]
        dc = self.backend.materialize(dc, w.shape[2])
        if self.need_weights[i]:
            h = self.backend.materialize(h, w.shape[2])
            self.dweights[i], _ = self.backend.wgrad(dc, h, (w.shape[2], w.shape[3]), g)
        _, _, H, W = h.tensor.shape
        return [Product(dc, w, g, data_grad_size=(H, W))] if self.wanted_below(i) else []

    def through_projection(self, g: Operand, rows: int) -> Tensor | None:
        """The projection's own gradients into the lists; x's through it, at the positions that it reads."""
        i, h = self.plan.n, self.shortcut_rows()
        if self.is_product(i):
            products, shift = self.through_product(i, g, h, POINTWISE, rows, self.need_x)
        else:
            dc = self.backend.materialize(self.through_norm(i, g, self.backend.reduce(g, self.normalized(i)), rows), 1)
            if self.need_weights[i]:
                self.dweights[i], _ = self.backend.wgrad(dc, h, (1, 1), POINTWISE)
            P, Q = g.tensor.shape[2:]
            products, shift = [Product(dc, self.weights[i], POINTWISE, data_grad_size=(P, Q))], None
        return self.backend.conv(products, Epilogue(shift))[0] if self.need_x else None

    def through_input(
        self, products: list[Product], shift: Tensor | None, g: Operand, shortcut: Tensor | None
    ) -> Tensor:
        plan, stride = self.plan, total_stride(self.geometries[: self.plan.n])
        residual, upsample = None, 1
        if plan.projected:
            assert shortcut is not None
            residual, upsample = Operand(shortcut), stride
        elif plan.shortcut == "identity":
            residual = g
        elif plan.shortcut == "zero_pad":
            value, _ = self.backend.bn_pass(g, Epilogue())
            residual, upsample = Operand(value[:, : self.x.shape[1]]), stride
        # g is the caller's only where nothing was applied to it.
        ours = residual is g and g.plain and g.tensor is not self.dy
        return self.backend.conv(products, Epilogue(shift, residual, upsample=upsample, overwrite=ours))[0]
