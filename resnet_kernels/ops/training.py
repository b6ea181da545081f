"""The residual block with batch statistics as one op, and its gradient.

    h_0 = x;  c_i = conv(h_{i-1}, W_i);  h_i = relu(bn_i(c_i)) for i < n
    y = relu(bn_n(c_n) + shortcut(x))

    shortcut(x) = x  |  bn_s(conv(x, W_s))  |  x subsampled, zero channels appended  |  nothing

Each batch norm normalises by the statistics of its c (of this process or of a group's), or by known ones (frozen).

Kept for the gradient are x, c_1 .. c_{n-1}, where y > 0, and vectors per channel. h_i = relu(a_i c_i + b_i) is made
again wherever it is read. c_n, and the projection's c_s, are not stored either where the convolution is 1x1: their
statistics follow from the moments of their operands (`backends.algebra`), and so do their gradients. Where the matrix
of second moments would cost more than it saves (`pays_by_moments`) they are stored like the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import algebra, select
from ..backends.algebra import Group
from ..backends.contract import (
    Affine,
    Backend,
    Call,
    Epilogue,
    Geometry,
    Moments,
    Normalized,
    Operand,
    Product,
    Stats,
    TailGrad,
    wide,
)
from .block import LIBRARY, SHORTCUTS, check_chain, same_padding, total_stride, walk, zero_pad

POINTWISE = Geometry()


class Plan(NamedTuple):
    """What of a block is no tensor. One entry per convolution, the projection's last; `stored` of the chain's last
    convolution and of the projection: whether their outputs are. groups_of: names of process groups, "" for none."""

    strides: Sequence[int]
    dilations: Sequence[int]
    groups: Sequence[int]
    eps: Sequence[float]
    batch: Sequence[bool]
    groups_of: Sequence[str]
    shortcut: str
    relu: bool
    stored: Sequence[bool]

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
        """Of which convolutions the output is stored."""
        last = self.n - 1
        return [
            *range(last),
            *([last] if self.stored[0] else []),
            *([self.n] if self.projected and self.stored[1] else []),
        ]

    def moments(self) -> list[int]:
        """Of which convolutions the operand's moments are kept."""
        candidates = [(self.n - 1, self.stored[0])] + [(self.n, self.stored[1])] * self.projected
        return [i for i, stored in candidates if not stored and self.batch[i]]


class Kept(NamedTuple):
    """What the forward made: c, table and moments by convolution, as far as there are any. `mask`: see
    `Epilogue.reduce`; empty where the block ends without a ReLU, or y itself is the mask."""

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
        tables = [next(rest) for _ in plan.strides]
        return cls(flat[0], flat[1], c, tables, {i: (next(rest), next(rest)) for i in plan.moments()})


def pays_by_moments(rows: int, channels: int, outputs: int) -> bool:
    """Whether the second moments of `channels` cost less than storing as many rows of `outputs`: channels^2 operations
    per row and per output against a few bytes of each."""
    return rows >= 4 * channels and outputs >= 2 * channels


def stored_outputs(
    size: Sequence[int], weights: Sequence[Sequence[int]], plan: Plan, geometries: Sequence[Geometry]
) -> list[bool]:
    """`Plan.stored` for an input of `size` (N, C, H, W)."""
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


def call_of_training(
    device: torch.device,
    dtype: torch.dtype,
    weights: Sequence[Sequence[int]],
    geometries: Sequence[Geometry],
    size: Sequence[int],
) -> Call:
    shapes = tuple((tuple(w), g) for w, g in zip(weights, geometries, strict=True))
    return Call(device, dtype, frozenset({"training"}), shapes, tuple(size))


def _backend(x: Tensor, weights: Sequence[Tensor], geometries: Sequence[Geometry]) -> Backend:
    return select.choose(call_of_training(x.device, x.dtype, [w.shape for w in weights], geometries, x.shape))


# Statistics of a group of processes.


def _exchanged(rows: int | Tensor, *vectors: Tensor) -> Tensor:
    """What a process tells the others: the same whether its rows are many enough for moments or not."""
    return torch.cat([vectors[0].new_full((1,), float(rows), dtype=torch.float64), *(v.double() for v in vectors)])


def _merged(stats: Stats, name: str) -> Stats:
    """The statistics of all processes' rows by Chan's formula."""
    mine = _exchanged(stats.rows, stats.mean, stats.M2)
    group = dist.distributed_c10d._resolve_process_group(name)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    table = torch.stack(everyone)
    K = stats.mean.numel()
    rows, means, M2s = table[:, :1], table[:, 1 : K + 1], table[:, K + 1 :]
    # A process without rows has no mean.
    means, M2s = (torch.where(rows > 0, t, 0) for t in (means, M2s))
    total = rows.sum()
    mean = (rows * means).sum(0) / total
    M2 = (M2s + rows * (means - mean).square()).sum(0)
    return Stats(total, mean, M2)


def _summed(name: str, rows: int, dbeta: Tensor, dgamma: Tensor) -> Group:
    """The sums over all processes."""
    flat = _exchanged(rows, dbeta, dgamma)
    dist.all_reduce(flat, group=dist.distributed_c10d._resolve_process_group(name))
    return Group(*flat.split([1, dbeta.numel(), dgamma.numel()]))


class _Block:
    """A block under a plan: what forward and backward share."""

    def __init__(self, backend: Backend, x: Tensor, weights: Sequence[Tensor], plan: Plan) -> None:
        self.backend, self.plan, self.x = backend, plan, x
        self.weights = [w.to(x.dtype) for w in weights]
        self.geometries = plan.geometries(weights)
        self.wide = wide(x.dtype)
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


class _Forward(_Block):
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
        self.norms = [[t.to(self.wide) for t in row] for row in vectors]

    def frozen(self, i: int) -> Tensor:
        gamma, beta, mean, var = self.norms[i]
        return algebra.frozen_table(mean, var, gamma, beta, self.plan.eps[i])

    def from_stats(self, i: int, stats: Stats | None) -> Tensor:
        if stats is None:
            return self.frozen(i)
        gamma, beta, _, _ = self.norms[i]
        name = self.plan.groups_of[i]
        if name:
            return algebra.table(_merged(stats, name), gamma, beta, self.plan.eps[i])
        return self.backend.finalize_stats(stats, gamma, beta, self.plan.eps[i])

    def from_moments(self, i: int, operand: Operand, kept: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        """The table of a product of rows; its operand's moments into `kept`."""
        if not self.plan.batch[i]:
            return self.frozen(i)
        m = self.backend.moments(operand)
        kept[i] = m.mean, m.M2
        gamma, beta, _, _ = self.norms[i]
        name = self.plan.groups_of[i]
        if name:
            stats = _merged(algebra.product_stats(m, self.matrix(i)), name)
            return algebra.table(stats, gamma, beta, self.plan.eps[i])
        return self.backend.finalize_moments(m, self.matrix(i), gamma, beta, self.plan.eps[i])

    def run(self) -> Kept:
        plan, backend, n = self.plan, self.backend, self.plan.n
        c: dict[int, Tensor] = {}
        moments: dict[int, tuple[Tensor, Tensor]] = {}
        products: list[Product] = []
        shift: Tensor | None = None
        added: list[Operand] = []  # normalised outputs that are stored
        for i in range(n):
            w, g = self.weights[i], self.geometries[i]
            h = backend.settle(self.activation(i, c), w.shape[2])
            if i == n - 1 and self.is_product(i):
                self.tables.append(self.from_moments(i, h, moments))
                a = self.affine(i)
                products, shift = [Product(h, w, g, a.a)], a.b
                break
            c[i], stats = backend.conv([Product(h, w, g)], Epilogue(reduce="stats" if plan.batch[i] else None))
            self.tables.append(self.from_stats(i, stats))
        if not products:
            a = self.affine(n - 1)
            added.append(Operand(c[n - 1], (a.a, a.b)))
        if plan.projected and self.is_product(n):
            w, x = self.weights[n], self.shortcut_rows()
            self.tables.append(self.from_moments(n, x, moments))
            a = self.affine(n)
            products.append(Product(x, w, POINTWISE, a.a))
            shift = a.b if shift is None else shift + a.b
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
        reduce = "mask" if plan.relu else None
        first = None if products else added.pop(0)
        epilogue = Epilogue(shift, added[0] if added else None, plan.relu, reduce=reduce)
        y, mask = backend.conv(products, epilogue) if first is None else backend.bn_pass(first, epilogue)
        if mask is None or mask is y:
            mask = self.x.new_empty(0, dtype=torch.uint8)
        return Kept(y, mask, c, self.tables, moments)


class _Backward(_Block):
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
        self.dgammas: list[Tensor | None] = [None] * len(weights)
        self.dbetas: list[Tensor | None] = [None] * len(weights)

    def wanted_below(self, i: int) -> bool:
        """Whether anything that convolution i of the chain depends on through its operand wants a gradient."""
        return self.need_x or any(self.need_weights[:i]) or any(self.need_norms[:i])

    def through_norm(self, i: int, gh: Operand, sums: tuple[Tensor, Tensor], rows: int) -> Operand:
        """dc = al*gh + be*c + const, from sum(gh) and sum(gh * xhat)."""
        affine = self.affine(i)
        self.dbetas[i], self.dgammas[i] = sums
        if not self.plan.batch[i]:
            return dataclasses.replace(gh, affine=(affine.a, torch.zeros_like(affine.a)))
        name = self.plan.groups_of[i]
        if name:
            total, dbeta, dgamma = _summed(name, rows, *sums)
            al, be, const = algebra.bn_grad((dbeta, dgamma), total, affine)
        else:
            al, be, const = self.backend.finalize_bn_grad(sums, rows, affine)
        return dataclasses.replace(gh, affine=(al, const), second=(self.kept.c[i], be))

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
                h = self.backend.settle(h, w.shape[2])
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
        h = self.backend.settle(dataclasses.replace(h, centre=centre), 1)
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
        group = _summed(name, m.rows, sg, dgamma)
        return algebra.tail_grad(sg, G, centre, m, self.matrix(i), affine, group)

    def run(self, dy: Tensor) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
        plan, backend, n, kept = self.plan, self.backend, self.plan.n, self.kept
        self.dy, rows = dy, self.rows(kept.y)
        mask = (kept.mask if kept.mask.numel() else kept.y) if plan.relu else None
        g = backend.settle(Operand(dy, mask=mask), 1)
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
            gh, sums = backend.conv(products, Epilogue(shift, mask=operand, reduce=self.normalized(i)))
            dc = self.through_norm(i, Operand(gh), sums, self.rows(gh))
            products, shift = self.through_convolution(i, dc, self.activation(i, kept.c)), None
        dx = self.through_input(products, shift, g, shortcut) if self.need_x else None
        return dx, self.dweights, self.dgammas, self.dbetas

    def through_convolution(self, i: int, dc: Operand, h: Operand) -> list[Product]:
        """A convolution's own gradient into the list, its operand's as a product."""
        w, g = self.weights[i], self.geometries[i]
        dc = self.backend.settle(dc, w.shape[2])
        if self.need_weights[i]:
            h = self.backend.settle(h, w.shape[2])
            self.dweights[i], _ = self.backend.wgrad(dc, h, (w.shape[2], w.shape[3]), g)
        _, _, H, W = h.tensor.shape
        return [Product(dc, w, g, data_grad_size=(H, W))] if self.wanted_below(i) else []

    def through_projection(self, g: Operand, rows: int) -> Tensor | None:
        """The projection's own gradients into the lists; x's through it, at the positions that it reads."""
        i, h = self.plan.n, self.shortcut_rows()
        if self.is_product(i):
            products, shift = self.through_product(i, g, h, POINTWISE, rows, self.need_x)
        else:
            dc = self.backend.settle(self.through_norm(i, g, self.backend.reduce(g, self.normalized(i)), rows), 1)
            if self.need_weights[i]:
                self.dweights[i], _ = self.backend.wgrad(dc, h, (1, 1), POINTWISE)
            P, Q = g.tensor.shape[2:]
            products, shift = [Product(dc, self.weights[i], POINTWISE, data_grad_size=(P, Q))], None
        return self.backend.conv(products, Epilogue(shift))[0] if self.need_x else None

    def through_input(
        self, products: list[Product], shift: Tensor | None, g: Operand, shortcut: Tensor | None
    ) -> Tensor:
        plan, stride = self.plan, total_stride(self.geometries[: self.plan.n])
        residual, spread = None, 1
        if plan.projected:
            assert shortcut is not None
            residual, spread = Operand(shortcut), stride
        elif plan.shortcut == "identity":
            residual = g
        elif plan.shortcut == "zero_pad":
            value, _ = self.backend.bn_pass(g, Epilogue())
            residual, spread = Operand(value[:, : self.x.shape[1]]), stride
        # g is the caller's only where nothing was applied to it.
        ours = residual is g and g.plain and g.tensor is not self.dy
        return self.backend.conv(products, Epilogue(shift, residual, spread=spread, overwrite=ours))[0]


# The ops. Lists of numbers are a plan's fields, in their order.
PLAN = (
    "int[] strides, int[] dilations, int[] groups, float[] eps, bool[] batch, str[] groups_of, str shortcut, "
    "bool relu, bool[] stored"
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
    backend = _backend(x, weights, p.geometries(weights))
    # In the dtypes of the operands, whatever autocast says.
    with torch.autocast(x.device.type, enabled=False):
        return _Forward(backend, x, weights, gammas, betas, means, variances, p).run().flat()


def _nhwc(x: Tensor, sizes: Sequence[int]) -> Tensor:
    return x.new_empty(tuple(sizes), memory_format=torch.channels_last)


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
    outputs = [*maps[1:], maps[-1]]
    sizes = (x.shape[0], *maps[-1])
    mask = _backend(x, weights, geometries).mask_size(sizes) if p.relu else None
    w = wide(x.dtype)
    c = {i: _nhwc(x, (x.shape[0], *outputs[i])) for i in p.outputs()}
    tables = [x.new_empty(5, weight.shape[0], dtype=w) for weight in weights]
    moments = {
        i: (x.new_empty(operands[i][0], dtype=w), x.new_empty(operands[i][0], operands[i][0], dtype=w))
        for i in p.moments()
    }
    return Kept(_nhwc(x, sizes), x.new_empty(mask or 0, dtype=torch.uint8), c, tables, moments).flat()


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
    backend = _backend(x, weights, p.geometries(weights))
    with torch.autocast(x.device.type, enabled=False):
        block = _Backward(backend, x, weights, Kept.of(kept, p), p, need_x, need_weights, need_norms)
        dx, dweights, dgammas, dbetas = block.run(dy)
    nothing = x.new_empty(0)
    wanted = [dx if need_x else None]
    for grads, needs in ((dweights, need_weights), (dgammas, need_norms), (dbetas, need_norms)):
        wanted += [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    # An op's results are no views of each other, nor of its arguments.
    return [nothing.clone() if t is None else t for t in wanted]


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
    w = wide(x.dtype)
    grads = [_nhwc(x, x.shape) if need_x else x.new_empty(0)]
    for sizes, needs in (
        ([weight.shape for weight in weights], need_weights),
        ([weight.shape[:1] for weight in weights], need_norms),
        ([weight.shape[:1] for weight in weights], need_norms),
    ):
        grads += [
            x.new_empty(size, dtype=w) if need else x.new_empty(0) for size, need in zip(sizes, needs, strict=True)
        ]
    return grads


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, weights, gammas, betas, _, _, *plan = inputs
    ctx.save_for_backward(x, *weights, *output)
    ctx.plan, ctx.count = plan, len(weights)
    ctx.dtypes = [[t.dtype for t in tensors] for tensors in (weights, gammas, betas)]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple:
    x, *rest = ctx.saved_tensors
    count = ctx.count
    need_x, need_weights, need_gammas, need_betas = ctx.needs_input_grad[:4]
    lists: list[Any] = [None, [None] * count, [None] * count, [None] * count, [None] * count, [None] * count]
    if grads[0] is not None:
        need_norms = [g or b for g, b in zip(need_gammas, need_betas, strict=True)]
        op = torch.ops.resnet_kernels.residual_block_training_backward
        flat = op(grads[0], x, rest[:count], rest[count:], need_x, list(need_weights), need_norms, *ctx.plan)
        lists[0] = flat[0] if need_x else None
        needs = (need_weights, need_gammas, need_betas)
        for i, (need, dtypes) in enumerate(zip(needs, ctx.dtypes, strict=True)):
            part = flat[1 + i * count : 1 + (i + 1) * count]
            lists[1 + i] = [
                t.to(dtype) if wanted else None for t, wanted, dtype in zip(part, need, dtypes, strict=True)
            ]
    return (*lists, *[None] * len(ctx.plan))


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


class BatchNorm(NamedTuple):
    """A batch norm's tensors and numbers, as `torch.nn.functional.batch_norm` takes them.

    weight, bias: (K,) or None for ones and zeros. running_mean, running_var: (K,) or None. batch: normalise by the
    batch's statistics, and move the running ones, where there are any, towards them by `momentum` (None: their mean
    over num_batches_tracked batches, counted on the device); else by the running ones. group: name of the process
    group whose batch it is, "" for this process alone.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    batch: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    group: str = ""

    def vectors(self, like: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """weight, bias, mean and variance; empty ones where the batch's are used."""
        dtype = wide(like.dtype)
        weight = like.new_ones(channels, dtype=dtype) if self.weight is None else self.weight
        bias = like.new_zeros(channels, dtype=dtype) if self.bias is None else self.bias
        if self.batch:
            empty = like.new_empty(0, dtype=dtype)
            return weight, bias, empty, empty
        assert self.running_mean is not None and self.running_var is not None
        return weight, bias, self.running_mean, self.running_var


@torch.no_grad()
def update_running(norms: Sequence[BatchNorm], tables: Sequence[Tensor]) -> None:
    """running = (1 - momentum) * running + momentum * batch's, of all norms at once."""
    groups: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    counters = [n.num_batches_tracked for n in norms if n.batch and n.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    for norm, table in zip(norms, tables, strict=True):
        if not norm.batch or norm.running_mean is None or norm.running_var is None:
            continue
        _, _, mean, _, var = table.unbind()
        if norm.momentum is None:
            if norm.num_batches_tracked is None:
                continue
            factor = norm.num_batches_tracked.to(table.dtype).reciprocal()
            for running, new in ((norm.running_mean, mean), (norm.running_var, var)):
                running.copy_((1 - factor) * running + factor * new)
            continue
        if norm.running_mean.dtype != table.dtype:
            for running, new in ((norm.running_mean, mean), (norm.running_var, var)):
                running.copy_((1 - norm.momentum) * running.to(new.dtype) + norm.momentum * new)
            continue
        old, new_ones = groups.setdefault(norm.momentum, ([], []))
        old += [norm.running_mean, norm.running_var]
        new_ones += [mean, var]
    for momentum, (old, new_ones) in groups.items():
        torch._foreach_mul_(old, 1 - momentum)
        torch._foreach_add_(old, new_ones, alpha=momentum)


def run(
    x: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[BatchNorm],
    strides: Sequence[int],
    dilations: Sequence[int],
    groups: Sequence[int],
    shortcut: str,
    relu: bool,
) -> Kept:
    """The op's results; the running statistics are not moved."""
    geometries = [same_padding(w, *row) for w, *row in zip(weights, strides, dilations, groups, strict=True)]
    batch = [n.batch for n in norms]
    plan = Plan(
        list(strides), list(dilations), list(groups), [n.eps for n in norms], batch, [n.group for n in norms],
        shortcut, relu, [],
    )  # fmt: skip
    plan = plan._replace(stored=stored_outputs(x.shape, [w.shape for w in weights], plan, geometries))
    vectors = [norm.vectors(x, w.shape[0]) for norm, w in zip(norms, weights, strict=True)]
    gammas, betas, means, variances = ([row[i] for row in vectors] for i in range(4))
    op = torch.ops.resnet_kernels.residual_block_training
    return Kept.of(op(x, list(weights), gammas, betas, means, variances, *plan), plan)


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
    kept = run(x, weights, norms, strides, dilations, groups, shortcut, relu)
    update_running(norms, kept.tables)
    return kept.y


def check(
    x: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[BatchNorm],
    strides: Sequence[int],
    dilations: Sequence[int],
    groups: Sequence[int],
    shortcut: str,
) -> None:
    """Raises TypeError or ValueError unless the arguments of `residual_block_training` fit each other."""
    check_chain(x, weights, strides, dilations, groups, shortcut, (*SHORTCUTS, "none"), "norms", [norms])
    if shortcut == "projection" and (weights[-1].shape[2] != 1 or groups[-1] != 1):
        raise ValueError(
            f"weights[{len(weights) - 1}]: expected an ungrouped 1x1 projection in training, "
            f"got {tuple(weights[-1].shape)} with groups={groups[-1]}"
        )
    for i, (w, norm) in enumerate(zip(weights, norms, strict=True)):
        if w.dtype not in (x.dtype, wide(x.dtype)):
            raise TypeError(f"weights[{i}]: expected {x.dtype} or {wide(x.dtype)}, got {w.dtype}")
        if not norm.batch and (norm.running_mean is None or norm.running_var is None):
            raise ValueError(f"norms[{i}]: expected running statistics, as it does not use the batch's")
        for name, t in zip(norm._fields[:4], norm[:4], strict=True):
            if t is not None and (t.shape != w.shape[:1] or t.device != x.device):
                raise ValueError(
                    f"norms[{i}].{name}: expected ({w.shape[0]},) on {x.device}, got {tuple(t.shape)} on {t.device}"
                )
    shapes = [tuple(w.shape) for w in weights]
    rows = [same_padding(w, *row) for w, *row in zip(weights, strides, dilations, groups, strict=True)]
    _, maps = walk(x.shape[1:], shapes, rows, shortcut)
    for norm, (K, P, Q) in zip(norms, [*maps[1:], maps[-1]], strict=False):
        # A group's other processes have more.
        if norm.batch and not norm.group and x.shape[0] * P * Q < 2:
            sizes = torch.Size([x.shape[0], K, P, Q])
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {sizes}")
