"""The per-channel algebra between convolutions: csrc/cuda/finalize.cuh. The module `algebra` defines the results, and
computes those of a process group."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import algebra
from ...contract import Affine, Moments, Stats, TailGrad
from .calls import TYPES, BnGrad, ProductOf, ProductTable, Table, TailGradCall, library, vector


def _least(rows: int) -> float:
    return max(rows - 1.0, 1.0)


def finalize_stats(stats: Stats, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Return the table of `Affine`, (5, K) fp32: a = gamma*rstd, b = beta - mean*a, mean, rstd, unbiased variance."""
    if isinstance(stats.rows, Tensor) or not stats.rows:
        return algebra.table(stats, gamma, beta, eps)
    K, device = stats.mean.numel(), stats.mean.device
    named = {"mean": stats.mean, "M2": stats.M2, "gamma": gamma, "beta": beta}
    vectors = {name: vector(t, K, device, name) for name, t in named.items()}
    table = torch.empty(5, K, device=device)
    pointers = {name: t.data_ptr() for name, t in vectors.items()}
    call = Table(**pointers, table=table.data_ptr(), rows=stats.rows, least=_least(stats.rows), eps=eps, K=K)
    library().run("table", call, device)
    return table


def finalize_bn_grad(sums: tuple[Tensor, Tensor], rows: int | Tensor, affine: Affine) -> tuple[Tensor, ...]:
    """Return (al, be, const), (K) each, with dL/dc = al*g + be*(c - mean) + const. sums: of g and of g*xhat, (K)."""
    if isinstance(rows, Tensor) or not rows:
        return algebra.bn_grad(sums, rows, affine)
    K, device = affine.a.numel(), affine.a.device
    named = {"dbeta": sums[0], "dgamma": sums[1], "a": affine.a, "rstd": affine.rstd}
    vectors = {name: vector(t, K, device, name) for name, t in named.items()}
    be, shift = torch.empty(2, K, device=device).unbind()
    pointers = {name: t.data_ptr() for name, t in vectors.items()}
    library().run("bn_grad", BnGrad(**pointers, be=be.data_ptr(), shift=shift.data_ptr(), rows=rows, K=K), device)
    return affine.a, be, shift


def _product(m: Moments, weight: Tensor) -> tuple[ProductOf, list[Tensor]]:
    """Return the C structure of h's moments and the weight (K, J), and the tensors whose memory it points to."""
    K, J = weight.shape
    mu, w = vector(m.mean, J, weight.device, "mean"), weight.contiguous()
    M2 = vector(m.M2.flatten(), J * J, weight.device, "M2")
    if w.dtype not in TYPES:
        raise TypeError(f"weight: expected float32, float16 or bfloat16, got {w.dtype}")
    product = torch.empty(K, J, device=w.device)
    held = [w, mu, M2, product]
    return ProductOf(*(t.data_ptr() for t in held), m.rows, K, J, TYPES[w.dtype]), held


def finalize_moments(m: Moments, weight: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Return the table of `Affine` for c = h W^T from h's moments: mean = W mu, var = diag(W Cov W^T). weight: (K,
    J)."""
    if isinstance(m.rows, Tensor) or not m.rows:
        return algebra.table(algebra.product_stats(m, weight), gamma, beta, eps)
    of, held = _product(m, weight)
    vectors = [vector(t, of.K, weight.device, name) for name, t in (("gamma", gamma), ("beta", beta))]
    table = torch.empty(5, of.K, device=weight.device)
    pointers = [t.data_ptr() for t in (*vectors, table)]
    library().run("product_table", ProductTable(of, *pointers, _least(m.rows), eps), weight.device)
    return table


def finalize_tail_grad(
    sg: Tensor, G: Tensor, centre: Tensor | None, m: Moments, weight: Tensor, affine: Affine
) -> TailGrad:
    """Return the gradients of c = h W^T, whose statistics came from the moments m. See `contract.TailGrad`.

    sg: sum of g over the rows, (K). G: g^T (h - centre), (K, J).
    Numerics: A and B are rounded to the weight's dtype; v is computed from the rounded matrices. In fp16 entries of B
        below 6e-8 become zero. B has the size of W^2 a rstd dgamma / M, so this happens only without a loss scale.
    """
    if isinstance(m.rows, Tensor) or not m.rows:
        return algebra.tail_grad(sg, G, centre, m, weight, affine)
    of, held = _product(m, weight)
    K, J, device = of.K, of.J, weight.device
    named = {"sg": sg, "a": affine.a, "mean": affine.mean, "rstd": affine.rstd}
    vectors = {name: vector(t, K, device, name) for name, t in named.items()}
    vectors["G"] = vector(G.flatten(), K * J, device, "G")
    if centre is not None:
        vectors["centre"] = vector(centre, J, device, "centre")
    sizes = {"dweight": (K, J), "dgamma": (K,), "q": (K,), "v": (J,)}
    made = {name: torch.empty(size, device=device) for name, size in sizes.items()}
    made |= {"A": weight.new_empty(K, J), "B": weight.new_empty(J, J)}
    pointers = {name: t.data_ptr() for name, t in (vectors | made).items()}
    library().run("tail_grad", TailGradCall(of, **pointers), device)
    return TailGrad(made["dweight"], made["dgamma"], made["A"], made["B"], made["v"])
