"""The per-channel algebra between the kernels of a block (every GPU from sm_80). `algebra` defines it in torch, and
computes it where several processes share the statistics.

    kernel           computes                                                          a program instance owns
    table            a, b, mean, rstd, unbiased variance from mean and M2              BLOCK channels
    bn_grad          be = -a rstd dgamma / M,  const = -a dbeta / M                    BLOCK channels
    times_moments    T = W M2                                                          a TILE x TILE tile
    products_table   mean = W mu, M2 = rowsum(T * W), and their table                  BLOCK_K channels
    tail_grad        dgamma = rstd (rowsum(G * W) - sg * (mean - W centre)),           BLOCK_K channels
                     q = a rstd dgamma / M,  A = a W,
                     dweight = a (G + sg (centre - mu)^T) - q T
    square           B = -W^T (q W)                                                    a SQUARE x SQUARE tile
    shift            v = -m1 A - (mu - centre) B, from the rounded A and B             NARROW columns

W (K, J) is the weight, M the number of rows, mu and M2 the moments of h (J), sg = sum(g), m1 = sg / M,
G = g^T (h - centre).

Memory traffic: every matrix once from device memory, and again per program instance from L2, which holds them all.

Numerics: matrix products are as exact as fp32, whatever torch's flags say. T runs on tensor cores, from the three
leading pairs of tf32 parts (tf32x3). B runs by FMA, because the elements that it sums over are not adjacent in memory.
Vectors are computed in fp64 and rounded once, as in `algebra`: an error in a vector would repeat in every row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import algebra
from ...contract import Affine, Moments, Stats, TailGrad
from ..device import wait_for_sum
from ..launch import Launch, Work, nbytes, submit

# Channels per program instance of the elementwise kernels. Rows per program instance, and columns per step, of the
# kernels that walk whole rows of (K, J) matrices.
BLOCK, BLOCK_K, BLOCK_J = 128, 8, 128
# Sides of the tiles of T and of B, and the length of their steps.
TILE, SQUARE, STEP = 64, 32, 32
# Rows per step and columns per program instance of v. Few columns, so that enough CTAs wait for memory at once.
LONG, NARROW = 128, 16


@triton.jit
def vector(ptr, k, K):
    """Return ptr (K) at k in fp64, 0 beyond K."""
    return tl.load(ptr + k, k < K, 0.0).to(tl.float64)


@triton.jit
def store_table(table_ptr, gamma_ptr, beta_ptr, mean, M2, k, K, rows, least, eps):
    """Store the table's rows a, b, mean, rstd and unbiased variance at channels k, from mean and M2 in fp64.

    least: max(rows - 1, 1), the divisor of the unbiased variance.
    """
    channel_mask = k < K
    rstd = 1.0 / tl.sqrt(M2 / rows + eps)
    a = (vector(gamma_ptr, k, K) * rstd).to(tl.float32)
    # b from the rounded a, which is the one that is stored.
    b = vector(beta_ptr, k, K) - mean * a
    tl.store(table_ptr + k, a, channel_mask)
    tl.store(table_ptr + K + k, b.to(tl.float32), channel_mask)
    tl.store(table_ptr + 2 * K + k, mean.to(tl.float32), channel_mask)
    tl.store(table_ptr + 3 * K + k, rstd.to(tl.float32), channel_mask)
    tl.store(table_ptr + 4 * K + k, (M2 / least).to(tl.float32), channel_mask)


@triton.jit
def _table_kernel(mean_ptr, M2_ptr, gamma_ptr, beta_ptr, table_ptr, K, rows, least, eps, BLOCK: tl.constexpr):
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mean, M2 = vector(mean_ptr, k, K), vector(M2_ptr, k, K)
    store_table(table_ptr, gamma_ptr, beta_ptr, mean, M2, k, K, rows, least, eps)


@triton.jit
def matrix(ptr, rows, columns, height, width):
    """Return ptr (height, width) at rows and columns in fp32, 0 outside."""
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    return tl.load(ptr + rows[:, None] * width + columns[None, :], inside, 0.0).to(tl.float32)


@triton.jit
def _times_moments_kernel(w_ptr, M2_ptr, T_ptr, K, J, TILE: tl.constexpr, STEP: tl.constexpr):
    tiles = tl.cdiv(J, TILE)
    k = tl.program_id(0) // tiles * TILE + tl.arange(0, TILE)
    j = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    acc = tl.zeros((TILE, TILE), tl.float32)
    for i0 in range(0, J, STEP):
        i = i0 + tl.arange(0, STEP)
        # M2 is symmetric. Read transposed, both operands have the summed dimension adjacent in memory.
        moments = matrix(M2_ptr, j, i, J, J).T
        acc = wait_for_sum(tl.dot(matrix(w_ptr, k, i, K, J), moments, acc, input_precision="tf32x3"), J)
    tl.store(T_ptr + k[:, None] * J + j[None, :], acc, (k < K)[:, None] & (j < J)[None, :])


@triton.jit
def _products_table_kernel(
    mu_ptr,
    T_ptr,
    w_ptr,
    gamma_ptr,
    beta_ptr,
    table_ptr,
    K,
    J,
    rows,
    least,
    eps,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mean = tl.zeros((BLOCK_K,), tl.float64)
    M2 = tl.zeros((BLOCK_K,), tl.float64)
    for j0 in range(0, J, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        w = matrix(w_ptr, k, j, K, J)
        product = matrix(T_ptr, k, j, K, J)
        mean += tl.sum(w.to(tl.float64) * vector(mu_ptr, j, J)[None, :], 1)
        M2 += tl.sum(product.to(tl.float64) * w, 1)
    # Rounding can leave a variance of zero slightly negative. NaN stays NaN.
    M2 = tl.where(M2 < 0, 0.0, M2)
    store_table(table_ptr, gamma_ptr, beta_ptr, mean, M2, k, K, rows, least, eps)


@triton.jit
def _bn_grad_kernel(dbeta_ptr, dgamma_ptr, a_ptr, rstd_ptr, be_ptr, const_ptr, K, rows, BLOCK: tl.constexpr):
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, rstd = vector(a_ptr, k, K), vector(rstd_ptr, k, K)
    be = -a * rstd * vector(dgamma_ptr, k, K) / rows
    const = -a * vector(dbeta_ptr, k, K) / rows
    tl.store(be_ptr + k, be.to(tl.float32), k < K)
    tl.store(const_ptr + k, const.to(tl.float32), k < K)


@triton.jit
def _tail_grad_kernel(
    sg_ptr,
    G_ptr,
    centre_ptr,
    mu_ptr,
    T_ptr,
    w_ptr,
    a_ptr,
    mean_ptr,
    rstd_ptr,
    dweight_ptr,
    dgamma_ptr,
    q_ptr,
    A_ptr,
    K,
    J,
    rows,
    CENTRED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    channel_mask = k < K
    sg, mean = vector(sg_ptr, k, K), vector(mean_ptr, k, K)
    a, rstd = vector(a_ptr, k, K), vector(rstd_ptr, k, K)
    row_sum = tl.zeros((BLOCK_K,), tl.float64)
    for j0 in range(0, J, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        w = matrix(w_ptr, k, j, K, J).to(tl.float64)
        row_sum += tl.sum(matrix(G_ptr, k, j, K, J) * w, 1)
        if CENTRED:
            mean -= tl.sum(w * vector(centre_ptr, j, J)[None, :], 1)
    dgamma = rstd * (row_sum - sg * mean)
    q = (a * rstd * dgamma / rows).to(tl.float32)
    tl.store(dgamma_ptr + k, dgamma.to(tl.float32), channel_mask)
    tl.store(q_ptr + k, q, channel_mask)
    a32 = a.to(tl.float32)[:, None]
    for j0 in range(0, J, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        off = vector(mu_ptr, j, J)
        if CENTRED:
            off -= vector(centre_ptr, j, J)
        per_row = (-a * sg)[:, None] * off[None, :]
        product = matrix(T_ptr, k, j, K, J)
        dweight = a32 * matrix(G_ptr, k, j, K, J) + per_row.to(tl.float32) - q[:, None] * product
        at = k[:, None] * J + j[None, :]
        inside = channel_mask[:, None] & (j < J)[None, :]
        tl.store(dweight_ptr + at, dweight, inside)
        A = a32 * matrix(w_ptr, k, j, K, J)
        tl.store(A_ptr + at, A.to(A_ptr.dtype.element_ty), inside)


@triton.jit
def _square_kernel(w_ptr, q_ptr, B_ptr, K, J, SQUARE: tl.constexpr, STEP: tl.constexpr):
    tiles = tl.cdiv(J, SQUARE)
    i = tl.program_id(0) // tiles * SQUARE + tl.arange(0, SQUARE)
    j = tl.program_id(0) % tiles * SQUARE + tl.arange(0, SQUARE)
    acc = tl.zeros((SQUARE, SQUARE), tl.float32)
    for k0 in range(0, K, STEP):
        k = k0 + tl.arange(0, STEP)
        q = tl.load(q_ptr + k, k < K, 0.0)[:, None]
        acc = tl.dot(matrix(w_ptr, k, i, K, J).T, q * matrix(w_ptr, k, j, K, J), acc, input_precision="ieee")
    inside = (i < J)[:, None] & (j < J)[None, :]
    tl.store(B_ptr + i[:, None] * J + j[None, :], (-acc).to(B_ptr.dtype.element_ty), inside)


@triton.jit
def _shift_kernel(
    sg_ptr,
    centre_ptr,
    mu_ptr,
    A_ptr,
    B_ptr,
    v_ptr,
    K,
    J,
    rows,
    CENTRED: tl.constexpr,
    LONG: tl.constexpr,
    NARROW: tl.constexpr,
):
    j = tl.program_id(0) * NARROW + tl.arange(0, NARROW)
    v = tl.zeros((LONG, NARROW), tl.float64)
    for k0 in range(0, K, LONG):
        k = k0 + tl.arange(0, LONG)
        v -= (vector(sg_ptr, k, K) / rows)[:, None] * matrix(A_ptr, k, j, K, J)
    for i0 in range(0, J, LONG):
        i = i0 + tl.arange(0, LONG)
        off = vector(mu_ptr, i, J)
        if CENTRED:
            off -= vector(centre_ptr, i, J)
        v -= off[:, None] * matrix(B_ptr, i, j, J, J)
    tl.store(v_ptr + j, tl.sum(v, 0).to(tl.float32), j < J)


def _submit(kernel: Any, grid: int, what: str, flops: int, **arguments: Any) -> None:
    moved = nbytes(*(t for t in arguments.values() if isinstance(t, Tensor)))
    submit(Launch(kernel, grid, arguments, {"num_warps": 4}, what, Work(moved, flops, moved, flops)))


def _times_moments(w: Tensor, M2: Tensor) -> Tensor:
    """Return T = W M2 (K, J), fp32."""
    K, J = w.shape
    T = M2.new_empty(K, J)
    _submit(
        _times_moments_kernel, -(-K // TILE) * -(-J // TILE), f"moments times {J}->{K}", 2 * K * J * J, w_ptr=w,
        M2_ptr=M2, T_ptr=T, K=K, J=J, TILE=TILE, STEP=STEP,
    )  # fmt: skip
    return T


def _plain(*tensors: Tensor) -> list[Tensor]:
    return [t.float().contiguous() for t in tensors]


def finalize_stats(stats: Stats, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Return the table of `Affine`, (5, K) fp32: a = gamma*rstd, b = beta - mean*a, mean, rstd, unbiased variance."""
    if isinstance(stats.rows, Tensor):
        return algebra.table(stats, gamma, beta, eps)
    mean, M2, gamma, beta = _plain(stats.mean, stats.M2, gamma, beta)
    K = mean.numel()
    table = mean.new_empty(5, K)
    _submit(
        _table_kernel, -(-K // BLOCK), f"table of {K}", 0, mean_ptr=mean, M2_ptr=M2, gamma_ptr=gamma, beta_ptr=beta,
        table_ptr=table, K=K, rows=float(stats.rows), least=max(stats.rows - 1.0, 1.0), eps=eps, BLOCK=BLOCK,
    )  # fmt: skip
    return table


def finalize_moments(m: Moments, weight: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Return the table of `finalize_stats` for c = h W^T, weight (K, J), from the moments m of h: mean = W mu,
    var = diag(W Cov W^T)."""
    if isinstance(m.rows, Tensor):
        return algebra.table(algebra.product_stats(m, weight), gamma, beta, eps)
    mu, M2, gamma, beta = _plain(m.mean, m.M2, gamma, beta)
    w = weight.contiguous()
    K, J = w.shape
    table, T = mu.new_empty(5, K), _times_moments(w, M2)
    _submit(
        _products_table_kernel, -(-K // BLOCK_K), f"table of {J}->{K}", 0, mu_ptr=mu, T_ptr=T, w_ptr=w,
        gamma_ptr=gamma, beta_ptr=beta, table_ptr=table, K=K, J=J, rows=float(m.rows), least=max(m.rows - 1.0, 1.0),
        eps=eps, BLOCK_K=BLOCK_K, BLOCK_J=BLOCK_J,
    )  # fmt: skip
    return table


def finalize_bn_grad(sums: tuple[Tensor, Tensor], rows: int | Tensor, affine: Affine) -> tuple[Tensor, ...]:
    """Return (al, be, const), each (K), with dL/dc = al*g + be*(c - mean) + const. sums: (sum(g), sum(g*xhat))."""
    if isinstance(rows, Tensor):
        return algebra.bn_grad(sums, rows, affine)
    dbeta, dgamma, a, rstd = _plain(*sums, affine.a, affine.rstd)
    K = a.numel()
    be, const = torch.empty_like(a), torch.empty_like(a)
    _submit(
        _bn_grad_kernel, -(-K // BLOCK), f"gradient of {K}", 0, dbeta_ptr=dbeta, dgamma_ptr=dgamma, a_ptr=a,
        rstd_ptr=rstd, be_ptr=be, const_ptr=const, K=K, rows=float(rows), BLOCK=BLOCK,
    )  # fmt: skip
    return a, be, const


def finalize_tail_grad(
    sg: Tensor, G: Tensor, centre: Tensor | None, m: Moments, weight: Tensor, affine: Affine
) -> TailGrad:
    """Return the gradients of a tail c = h W^T whose statistics came from the moments m of h.

    sg = sum(g) (K). G = g^T (h - centre) (K, J).

    Numerics: A and B are rounded to the weight's dtype, and v is computed from the rounded matrices. In fp16, entries
    of B below 6e-8 become zero. Entries of B have the size of W^2 a rstd dgamma / M, so this needs gradients that no
    loss scale has raised.
    """
    if isinstance(m.rows, Tensor):
        return algebra.tail_grad(sg, G, centre, m, weight, affine)
    sg, G, mu, M2, a, mean, rstd = _plain(sg, G, m.mean, m.M2, affine.a, affine.mean, affine.rstd)
    w = weight.contiguous()
    centre32 = None if centre is None else _plain(centre)[0]
    K, J = w.shape
    dweight, dgamma, q, v = (mu.new_empty(sizes) for sizes in ((K, J), (K,), (K,), (J,)))
    A, B, T = torch.empty_like(w), w.new_empty(J, J), _times_moments(w, M2)
    _submit(
        _tail_grad_kernel, -(-K // BLOCK_K), f"tail {J}->{K}", 0, sg_ptr=sg, G_ptr=G, centre_ptr=centre32, mu_ptr=mu,
        T_ptr=T, w_ptr=w, a_ptr=a, mean_ptr=mean, rstd_ptr=rstd, dweight_ptr=dweight, dgamma_ptr=dgamma,
        q_ptr=q, A_ptr=A, K=K, J=J, rows=float(m.rows), CENTRED=centre is not None, BLOCK_K=BLOCK_K, BLOCK_J=BLOCK_J,
    )  # fmt: skip
    _submit(
        _square_kernel, (-(-J // SQUARE)) ** 2, f"tail's square {J}->{K}", 2 * K * J * J, w_ptr=w, q_ptr=q, B_ptr=B,
        K=K, J=J, SQUARE=SQUARE, STEP=STEP,
    )  # fmt: skip
    _submit(
        _shift_kernel, -(-J // NARROW), f"tail's shift {J}->{K}", 2 * (K + J) * J, sg_ptr=sg, centre_ptr=centre32,
        mu_ptr=mu, A_ptr=A, B_ptr=B, v_ptr=v, K=K, J=J, rows=float(m.rows), CENTRED=centre is not None, LONG=LONG,
        NARROW=NARROW,
    )  # fmt: skip
    return TailGrad(dweight, dgamma, A, B, v)
