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
    """Sums over all processes: rows, sum(g), un-normalised dgamma. `bn_grad` needs the same: processes with rows enough
    for moments and others understand each other."""

    rows: Tensor
    sg: Tensor
    dgamma: Tensor


# Vectors are computed in fp64 and rounded once: an error of theirs is the same in every row, so that sums over the rows
# add it up, where other errors cancel. Matrices stay in `accumulator_dtype`.


def table(stats: Stats, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Rows a, b, mean, rstd, unbiased variance; see `contract.Affine`."""
    rows = stats.rows
    least = max(rows - 1, 1) if isinstance(rows, int) else (rows - 1).clamp_min(1)
    M2 = stats.M2.double()
    return _rows(stats.mean, M2 / rows, M2 / least, gamma, beta, eps)


def frozen_table(mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    return _rows(mean, var.double(), var, gamma, beta, eps)


def _rows(mean: Tensor, var: Tensor, unbiased: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    rstd = torch.rsqrt(var + eps)
    # b belongs to the a and the mean that are stored: what is computed from them is then consistent.
    a = (gamma * rstd).to(gamma.dtype)
    b = beta - mean.double() * a.double()
    return torch.stack([a.double(), b, mean.double(), rstd, unbiased.double()]).to(gamma.dtype)


def product_stats(m: Moments, weight: Tensor) -> Stats:
    """Of c = h W^T from the moments of h. weight: (K, J)."""
    w = weight.to(m.M2.dtype)
    # Rounding can leave a variance of zero slightly negative. NaN stays.
    M2 = ((w @ m.M2).double() * w).sum(1).clamp_min(0)
    return Stats(m.rows, weight.double() @ m.mean.double(), M2)


def bn_grad(sums: tuple[Tensor, Tensor], rows: int | Tensor, affine: Affine) -> tuple[Tensor, Tensor, Tensor]:
    dbeta, dgamma, a, rstd = (t.double() for t in (*sums, affine.a, affine.rstd))
    be, const = -a * rstd * dgamma / rows, -a * dbeta / rows
    return affine.a, be.to(affine.a.dtype), const.to(affine.a.dtype)


def tail_dgamma(sg: Tensor, G: Tensor, centre: Tensor | None, weight: Tensor, affine: Affine) -> Tensor:
    """sum(g * xhat) of c = h W^T from sg = sum(g) and G = g^T (h - centre), in fp64."""
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
    """See `contract.Backend.finalize_tail_grad`.

    dweight = a (g^T h - m1 sum(h)^T) - q (c - mean)^T h, where g^T h = G + sg centre^T and
    (c - mean)^T h = W M2 + n (W mu - mean) mu^T: the last product and sg - n m1 vanish but in a group, where mu and M2
    are of this process's rows and mean is of all.
    """
    wide, n = G.dtype, m.rows
    w, w64, mu = weight.to(wide), weight.double(), m.mean.double()
    a, s = affine.a.double(), sg.double()
    dgamma = tail_dgamma(sg, G, centre, weight, affine)
    rows, s_all, dgamma_all = group or Group(torch.as_tensor(n), s, dgamma)
    m1, q = s_all / rows, a * affine.rstd.double() * dgamma_all / rows
    off = mu if centre is None else mu - centre.double()
    per_row = (-a * s)[:, None] * off
    if group is not None:
        apart = w64 @ mu - affine.mean
        per_row += (a * (s - n * m1))[:, None] * mu - (q * n * apart)[:, None] * mu
    dweight = (affine.a[:, None] * G).add_(per_row.to(wide)).sub_((w @ m.M2).mul_(q.to(wide)[:, None]))
    A, B = (a[:, None] * w64).to(weight.dtype), (-w.T @ (q.to(wide)[:, None] * w)).to(weight.dtype)
    # v from the rounded A and B: their rounding then cancels against the means.
    v = -(m1 @ A.double()) - off @ B.double()
    if group is not None:
        v -= (q * apart) @ w64
    return TailGrad(dweight, dgamma.to(wide), A, B, v.to(wide))
