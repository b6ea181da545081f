"""The pre-activation residual block (He et al. 2016, arXiv 1603.05027) by the primitives, and its gradient.

    u_0 = x;  h_i = relu(bn_i(u_i));  u_{i+1} = conv(h_i, W_i)
    y = u_n + shortcut        shortcut = x  |  conv(h_0, W_s)  |  h_0 subsampled, zero channels appended  |  nothing

Every convolution reads the lazy form h = relu(a*u + b), so all u but the last are stored. The last convolution's
epilogue adds the residual.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..backends.contract import Epilogue, Operand, Product
from .block_inference import zero_pad
from .chain_backward import Backward, Gradients
from .chain_training import POINTWISE, Forward, Saved
from .spec import total_stride


def _activation(block: Forward | Backward, i: int, u: dict[int, Tensor]) -> Operand:
    affine = block.affine(i)
    return Operand(u[i], (affine.a, affine.b), relu=True)


class PreactivationForward(Forward):
    """The forward of a pre-activation block."""

    def run(self) -> Saved:
        spec, backend, n = self.spec, self.backend, self.spec.n
        u = {0: self.x}
        stats = backend.reduce(Operand(self.x), "stats") if self.plan.norms[0].batch else None
        self.tables.append(self.from_stats(0, stats))
        for i in range(n - 1):
            w, g = self.weights[i], self.geometries[i]
            h = backend.materialize(_activation(self, i, u), w.shape[2])
            reduce = "stats" if self.plan.norms[i + 1].batch else None
            u[i + 1], stats = backend.conv([Product(h, w, g)], Epilogue(reduce=reduce))
            self.tables.append(self.from_stats(i + 1, stats))
        w, g = self.weights[n - 1], self.geometries[n - 1]
        products = [Product(backend.materialize(_activation(self, n - 1, u), w.shape[2]), w, g)]
        residual = None
        first = _activation(self, 0, u)
        if spec.projected:
            rows = dataclasses.replace(first, stride=self.geometries[n].stride)
            products.append(Product(rows, self.weights[n], POINTWISE))
        elif spec.shortcut == "zero_pad":
            h0, _ = backend.bn_pass(first, Epilogue())
            padded = zero_pad(h0, total_stride(self.geometries), self.weights[n - 1].shape[0])
            residual = Operand(padded.contiguous(memory_format=torch.channels_last))
        elif spec.shortcut == "identity":
            residual = Operand(self.x)
        y, _ = backend.conv(products, Epilogue(residual=residual))
        del u[0]
        return Saved(y, self.x.new_empty(0, dtype=torch.uint8), u, self.tables, {})


class PreactivationBackward(Backward):
    """The backward of a pre-activation block."""

    def requested_below(self, i: int) -> bool:
        return self.need_x or any(self.need_weights[:i]) or any(self.need_norms[: i + 1])

    def run(self, dy: Tensor) -> Gradients:
        spec, backend, n = self.spec, self.backend, self.spec.n
        u = self.saved.c
        u[0] = self.x
        g, dc = Operand(dy), Operand(dy)
        stride = total_stride(self.geometries[:n])
        for i in range(n - 1, -1, -1):
            h = _activation(self, i, u)
            products = self.through_convolution(i, dc, h)
            residual, upsample = None, 1
            if i == 0 and spec.projected:
                residual, upsample = self.through_shortcut(g, h), stride
            elif i == 0 and spec.shortcut == "zero_pad":
                residual, upsample = Operand(dy[:, : self.x.shape[1]]), stride
            if not self.requested_below(i):
                break
            epilogue = Epilogue(residual=residual, upsample=upsample, mask=h, reduce=self.normalized(i))
            gh, sums = backend.masked_conv(products, epilogue)
            dc = self.through_norm(i, gh, sums, self.rows(gh.tensor))
        if not self.need_x:
            return Gradients(None, self.dweights, self.dgammas, self.dbetas)
        dx, _ = backend.bn_pass(dc, Epilogue(residual=g if spec.shortcut == "identity" else None))
        return Gradients(dx, self.dweights, self.dgammas, self.dbetas)

    def through_shortcut(self, g: Operand, h: Operand) -> Operand | None:
        """Return h_0's gradient through the projection; put the projection's own into the list."""
        n, w = self.spec.n, self.weights[self.spec.n]
        if self.need_weights[n]:
            rows = dataclasses.replace(h, stride=self.geometries[n].stride)
            self.dweights[n], _ = self.backend.wgrad(g, rows, (1, 1), POINTWISE)
        if not self.requested_below(0):
            return None
        P, Q = g.tensor.shape[2:]
        return Operand(self.backend.conv([Product(g, w, POINTWISE, data_grad_size=(P, Q))], Epilogue())[0])
