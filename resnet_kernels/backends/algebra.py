"""The per-channel algebra of batch norm between convolutions, in plain torch.

A 1x1 convolution is c = h W^T over M rows, with W (K, J). The statistics of its output follow from the moments of its
operand: mean(c) = W mu and var(c)[k] = W[k] Cov W[k]^T, where mu and Cov are the mean and covariance of h. So c need
not be stored. The same holds for the gradients. tests/test_training.py compares this file with autograd.

A `group` argument means synchronized batch norm: the statistics are those of all processes, and each process holds its
own rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .contract import Affine, Moments, Stats, TailGrad


class Group(NamedTuple):
    """Sums over all processes that `tail_grad` needs.

    rows: (1), the total of rows. sg: (K), sum(g). dgamma: (K), sum(g * xhat). `bn_grad` needs the same three, so that a
    process with enough rows to use moments and one without can exchange them.
    """

    rows: Tensor
    sg: Tensor
    dgamma: Tensor


# Per-channel vectors are computed in fp64, rounded once. Their rounding error is the same in every row, so a sum over
# rows adds it up M times; rounding errors of single elements cancel instead. Matrices stay in `accumulator_dtype`.


def table(stats: Stats, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Return the (5, K) table of `contract.Affine` from batch statistics; see `contract.Backend.finalize_stats`."""
    rows = stats.rows
    degrees_of_freedom = max(rows - 1, 1) if isinstance(rows, int) else (rows - 1).clamp_min(1)
    M2 = stats.M2.double()
    return _table(stats.mean, M2 / rows, M2 / degrees_of_freedom, gamma, beta, eps)


def frozen_table(mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Return the (5, K) table of `contract.Affine` from running statistics, in evaluation mode."""
    return _table(mean, var.double(), var, gamma, beta, eps)


def _table(mean: Tensor, var: Tensor, unbiased: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    rstd = torch.rsqrt(var + eps)
    # b is computed from the rounded a and mean that are stored, so that later uses of a, b and mean agree.
    a = (gamma * rstd).to(gamma.dtype)
    b = beta - mean.double() * a.double()
    return torch.stack([a.double(), b, mean.double(), rstd, unbiased.double()]).to(gamma.dtype)


def product_stats(m: Moments, weight: Tensor) -> Stats:
    """Return the statistics of c = h W^T from the moments of h: mean = W mu, M2 = diag(W M2(h) W^T). weight: (K, J)."""
    w = weight.to(m.M2.dtype)
    # Rounding can leave a variance of zero slightly negative. NaN stays.
    M2 = ((w @ m.M2).double() * w).sum(1).clamp_min(0)
    return Stats(m.rows, weight.double() @ m.mean.double(), M2)


def bn_grad(sums: tuple[Tensor, Tensor], rows: int | Tensor, affine: Affine) -> tuple[Tensor, Tensor, Tensor]:
    """Return (al, be, const) of dL/dc = al*g + be*(c - mean) + const; see `contract.Backend.finalize_bn_grad`."""
    dbeta, dgamma, a, rstd = (t.double() for t in (*sums, affine.a, affine.rstd))
    be, const = -a * rstd * dgamma / rows, -a * dbeta / rows
    return affine.a, be.to(affine.a.dtype), const.to(affine.a.dtype)


def tail_dgamma(sg: Tensor, G: Tensor, centre: Tensor | None, weight: Tensor, affine: Affine) -> Tensor:
    """Return sum(g * xhat) for c = h W^T from sg = sum(g) and G = g^T (h - centre), (K) in fp64.

    sg: (K). G, weight: (K, J). centre: (J), or None for zero.
    """
    w = weight.double()
    mean = affine.mean.double() if centre is None else affine.mean.double() - w @ centre.double()
    return affine.rstd.double() * ((G * w).sum(1) - sg.double() * mean)


def tail_grad(
    sg: Tensor,
    G: Tensor,
    centre: Tensor | None,
    m: Moments,
    weight: Tensor,
    affine: Affine,
    group: Group | None = None,
) -> TailGrad:
    """Return the gradients of a tail c = h W^T and its batch norm; see `contract.Backend.finalize_tail_grad`.

    dweight = a (g^T h - m1 sum(h)^T) - q (c - mean)^T h, with m1 = sum(g)/rows and q = a rstd dgamma/rows, where

        g^T h          = G + sg centre^T
        (c - mean)^T h = W M2 + n (W mu - mean) mu^T

    n, mu and M2 belong to this process's n rows, and mean to the rows of all processes. Without a group W mu = mean and
    sg = n m1, so their differences vanish and are left out.
    """
    dtype, n = G.dtype, m.rows
    w, w64, mu = weight.to(dtype), weight.double(), m.mean.double()
    a, s = affine.a.double(), sg.double()
    dgamma = tail_dgamma(sg, G, centre, weight, affine)
    rows, s_all, dgamma_all = group or Group(torch.as_tensor(n), s, dgamma)
    m1, q = s_all / rows, a * affine.rstd.double() * dgamma_all / rows
    mu_off_centre = mu if centre is None else mu - centre.double()
    rank_one = (-a * s)[:, None] * mu_off_centre
    if group is not None:
        mean_difference = w64 @ mu - affine.mean  # of this process's rows from the mean of all
        rank_one += (a * (s - n * m1))[:, None] * mu - (q * n * mean_difference)[:, None] * mu
    dweight = (affine.a[:, None] * G).add_(rank_one.to(dtype)).sub_((w @ m.M2).mul_(q.to(dtype)[:, None]))
    A, B = (a[:, None] * w64).to(weight.dtype), (-w.T @ (q.to(dtype)[:, None] * w)).to(weight.dtype)
    # v uses the rounded A and B, so that their rounding does not shift the mean of dL/dh.
    v = -(m1 @ A.double()) - mu_off_centre @ B.double()
    if group is not None:
        v -= (q * mean_difference) @ w64
    return TailGrad(dweight, dgamma.to(dtype), A, B, v.to(dtype))
