"""The backward of a residual block with batch statistics, by the primitives. See `chain_training` for the forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import algebra
from ..backends.contract import Backend, Epilogue, Geometry, Moments, Normalized, Operand, Pooled, Product, TailGrad
from .batch_norm import summed
from .chain_training import POINTWISE, Chain, Saved
from .spec import TrainingPlan, total_stride


class Gradients(NamedTuple):
    """The gradients of a block; None where a gradient was not requested."""

    x: Tensor | None
    weights: list[Tensor | None]
    gammas: list[Tensor | None]
    betas: list[Tensor | None]


class Backward(Chain):
    """The backward of a block.

    need_x, need_weights, need_norms: whether the gradients of x, of each convolution's weight, and of each batch norm's
    gamma and beta are requested.
    """

    def __init__(
        self,
        backend: Backend,
        x: Tensor,
        weights: Sequence[Tensor],
        saved: Saved,
        plan: TrainingPlan,
        need_x: bool,
        need_weights: Sequence[bool],
        need_norms: Sequence[bool],
    ) -> None:
        super().__init__(backend, x, weights, plan)
        self.saved, self.tables = saved, saved.tables
        self.need_x, self.need_weights, self.need_norms = need_x, need_weights, need_norms
        self.dweights: list[Tensor | None] = [None] * len(weights)
        self.dgammas: list[Tensor | None] = [None] * len(plan.norms)
        self.dbetas: list[Tensor | None] = [None] * len(plan.norms)

    def requested_below(self, i: int) -> bool:
        """Return whether a gradient is requested of anything that convolution i reads through its operand."""
        return self.need_x or any(self.need_weights[:i]) or any(self.need_norms[:i])

    def before_relu(self, dy: Tensor) -> Operand:
        """Return the gradient in front of the block's last ReLU (and pooling)."""
        spec, saved = self.spec, self.saved
        if spec.pool is not None:
            H, W = saved.c[0].shape[2:]
            return Operand(dy, pooled=Pooled(saved.mask, spec.pool, (H, W)))
        mask = (saved.mask if saved.mask.numel() else saved.y) if spec.relu else None
        return self.backend.materialize(Operand(dy, mask=mask), 1)

    def through_norm(self, i: int, gh: Operand, sums: tuple[Tensor, Tensor], rows: int) -> Operand:
        """Return dc = al*gh + be*(c - mean) + const, from the sums of gh and of gh * xhat over the rows."""
        affine = self.affine(i)
        self.dbetas[i], self.dgammas[i] = sums
        if not self.plan.norms[i].batch:
            return dataclasses.replace(gh, affine=(affine.a, torch.zeros_like(affine.a)))
        name = self.plan.norms[i].group
        if name:
            total, dbeta, dgamma = summed(name, rows, *sums)
            al, be, const = algebra.bn_grad((dbeta, dgamma), total, affine)
        else:
            al, be, const = self.backend.finalize_bn_grad(sums, rows, affine)
        return dataclasses.replace(gh, affine=(al, const), second=(self.saved.c[i], be, affine.mean))

    def normalized(self, i: int) -> Normalized:
        affine = self.affine(i)
        return Normalized(self.saved.c[i], affine.mean, affine.rstd)

    def through_product(
        self, i: int, g: Operand, h: Operand, geometry: Geometry, rows: int, below: bool
    ) -> tuple[list[Product], Tensor | None]:
        """Return the gradient of the operand of a convolution whose output is not stored, as products and a shift.

        Puts the gradients of the convolution's weight and of its batch norm into the lists.
        """
        w, affine = self.weights[i], self.affine(i)
        H, W = (g if h.stride > 1 else h).tensor.shape[2:]
        if not self.plan.norms[i].batch:
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
        mean, M2 = self.saved.moments[i]
        centre = mean if self.centred else None
        h = self.backend.materialize(dataclasses.replace(h, centre=centre), 1)
        G, sg = self.backend.wgrad(g, h, (1, 1), POINTWISE, sums=True)
        assert sg is not None
        G = G.flatten(1)
        t = self.tail_grad(i, sg, G, centre, Moments(rows, mean, M2))
        self.dweights[i], self.dgammas[i], self.dbetas[i] = t.dweight.view(w.shape), t.dgamma, sg
        # dh = g A + (h - centre) B + v: a data gradient with the weight A, and a forward product with the weight B.
        return [
            Product(g, t.A[:, :, None, None], POINTWISE, data_grad_size=(H, W)),
            Product(h, t.B[:, :, None, None], POINTWISE),
        ], t.v

    def tail_grad(self, i: int, sg: Tensor, G: Tensor, centre: Tensor | None, m: Moments) -> TailGrad:
        affine, name = self.affine(i), self.plan.norms[i].group
        if not name:
            return self.backend.finalize_tail_grad(sg, G, centre, m, self.matrix(i), affine)
        dgamma = algebra.tail_dgamma(sg, G, centre, self.matrix(i), affine)
        group = summed(name, m.rows, sg, dgamma)
        return algebra.tail_grad(sg, G, centre, m, self.matrix(i), affine, group)

    def run(self, dy: Tensor) -> Gradients:
        spec, backend, n, saved = self.spec, self.backend, self.spec.n, self.saved
        self.dy, rows = dy, self.rows(saved.c[0] if spec.pool is not None else dy)
        g = self.before_relu(dy)
        shortcut = self.through_projection(g, rows) if spec.projected else None
        i = n - 1
        h = self.activation(i, saved.c)
        if self.is_product(i):
            products, shift = self.through_product(i, g, h, self.geometries[i], rows, self.requested_below(i))
        else:
            dc = self.through_norm(i, g, backend.reduce(g, self.normalized(i)), rows)
            products, shift = self.through_convolution(i, dc, h), None
        for i in range(n - 2, -1, -1):
            if not self.requested_below(i + 1):
                break
            operand = self.activation(i + 1, saved.c)
            gh, sums = backend.masked_conv(products, Epilogue(shift, mask=operand, reduce=self.normalized(i)))
            dc = self.through_norm(i, gh, sums, self.rows(gh.tensor))
            products, shift = self.through_convolution(i, dc, self.activation(i, saved.c)), None
        dx = self.through_input(products, shift, g, shortcut) if self.need_x else None
        return Gradients(dx, self.dweights, self.dgammas, self.dbetas)

    def through_convolution(self, i: int, dc: Operand, h: Operand) -> list[Product]:
        """Return the gradient of a convolution's operand as a product; put the weight's into the list."""
        w, g = self.weights[i], self.geometries[i]
        dc = self.backend.materialize(dc, w.shape[2])
        if self.need_weights[i]:
            h = self.backend.materialize(h, w.shape[2])
            self.dweights[i], _ = self.backend.wgrad(dc, h, (w.shape[2], w.shape[3]), g)
        _, _, H, W = h.tensor.shape
        return [Product(dc, w, g, data_grad_size=(H, W))] if self.requested_below(i) else []

    def through_projection(self, g: Operand, rows: int) -> Tensor | None:
        """Return x's gradient through the projection, at the positions that it reads; put its own into the lists."""
        i, h = self.spec.n, self.shortcut_rows()
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
        spec, stride = self.spec, total_stride(self.geometries[: self.spec.n])
        residual, upsample = None, 1
        if spec.projected:
            assert shortcut is not None
            residual, upsample = Operand(shortcut), stride
        elif spec.shortcut == "identity":
            residual = g
        elif spec.shortcut == "zero_pad":
            value, _ = self.backend.bn_pass(g, Epilogue())
            residual, upsample = Operand(value[:, : self.x.shape[1]]), stride
        # g is the caller's tensor if nothing was applied to it. Only a tensor of our own may be overwritten.
        ours = residual is g and g.plain and g.tensor is not self.dy
        return self.backend.conv(products, Epilogue(shift, residual, upsample=upsample, overwrite=ours))[0]
