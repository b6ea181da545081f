"""The per-channel algebra of batch norm between convolutions, in plain torch.

With c = h W^T over M rows, mean3 = W mu and var3[k] = W[k] Cov W[k]^T: the statistics of a 1x1 convolution's output
follow from the first and second moments of its operand, so that c need not exist. The same holds backward.
tests/test_training.py holds it against autograd.

With `group` the statistics are those of several processes, each of which has rows of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .contract import Affine, Moments, Stats, TailGrad


class Group(NamedTuple):
    """Sums over all processes: rows, sum(g), un-normalised dgamma; and the mean of h over all rows."""

    rows: Tensor
    sg: Tensor
    dgamma: Tensor
    mean: Tensor


def table(stats: Stats, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Rows a, b, mean, rstd, unbiased variance; see `contract.Affine`."""
    rows = stats.rows
    rstd = torch.rsqrt(stats.M2 / rows + eps)
    a = gamma * rstd
    least = rows - 1 if isinstance(rows, int) else (rows - 1).clamp_min(1)
    # fma: the shift is what a*mean leaves of beta, rounded once.
    return torch.stack([a, torch.addcmul(beta, stats.mean, a, value=-1), stats.mean, rstd, stats.M2 / least])


def frozen_table(mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    rstd = torch.rsqrt(var + eps)
    a = gamma * rstd
    return torch.stack([a, torch.addcmul(beta, mean, a, value=-1), mean, rstd, var])


def product_stats(m: Moments, weight: Tensor) -> Stats:
    """Of c = h W^T from the moments of h. weight: (K, J)."""
    w = weight.to(m.mean.dtype)
    # Rounding can leave a variance of zero slightly negative. NaN stays.
    return Stats(m.rows, w @ m.mean, ((w @ m.M2) * w).sum(1).clamp_min(0))


def bn_grad(sums: tuple[Tensor, Tensor], rows: int | Tensor, affine: Affine) -> tuple[Tensor, Tensor, Tensor]:
    dbeta, dgamma = sums
    be = -affine.a * affine.rstd * dgamma / rows
    return affine.a, be, -affine.a * dbeta / rows - be * affine.mean


def tail_dgamma(sg: Tensor, G: Tensor, centre: Tensor | None, weight: Tensor, affine: Affine) -> Tensor:
    """sum(g * xhat) of c = h W^T from sg = sum(g) and G = g^T (h - centre)."""
    w = weight.to(sg.dtype)
    mean = affine.mean if centre is None else affine.mean - w @ centre
    return affine.rstd * ((G * w).sum(1) - sg * mean)


def tail_grad(
    sg: Tensor,
    G: Tensor,
    centre: Tensor | None,
    m: Moments,
    weight: Tensor,
    affine: Affine,
    group: Group | None = None,
) -> TailGrad:
    """See `contract.Backend.finalize_tail_grad`.

    dweight = a (g^T h - m1 sum(h)^T) - q (c - mean)^T h, where g^T h = G + sg centre^T and
    (c - mean)^T h = W M2 + n (W mu - mean) mu^T: the last product and sg - n m1 vanish but in a group.
    """
    w, n = weight.to(sg.dtype), m.rows
    a = affine.a[:, None]
    dgamma = tail_dgamma(sg, G, centre, weight, affine)
    rows, sg_all, dgamma_all, mean = group or Group(torch.as_tensor(n), sg, dgamma, m.mean)
    m1, q = sg_all / rows, (affine.a * affine.rstd * dgamma_all / rows)[:, None]
    dweight = a * (G if centre is None else G + torch.outer(sg, centre - m.mean)) - q * (w @ m.M2)
    if centre is None:
        dweight -= a * torch.outer(sg, m.mean)
    if group is not None:
        dweight += a * torch.outer(sg - n * m1, m.mean) - q * torch.outer(n * (w @ m.mean - affine.mean), m.mean)
    A, B = (a * w).to(weight.dtype), (-w.T @ (q * w)).to(weight.dtype)
    # v from the rounded A and B: their rounding then cancels against the means.
    off = mean if centre is None else mean - centre
    v = -(m1 @ A.to(w.dtype)) - off @ B.to(w.dtype)
    return TailGrad(dweight, dgamma, A, B, v)
