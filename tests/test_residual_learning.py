"""The formulas of docs/residual-learning.md, in fp64."""

import copy
import itertools
import math
import re
from functools import reduce
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_kernels as rk
from resnet_kernels.backends import algebra
from resnet_kernels.backends.contract import Moments

ROOT = Path(__file__).parents[1]
DOC = ROOT / "docs" / "residual-learning.md"
EPS = 1e-5
in_the_repository = pytest.mark.skipif(not DOC.is_file(), reason="the documents are in the repository only")


def close(got, want, **tolerance):
    torch.testing.assert_close(got, want, **{"rtol": 1e-10, "atol": 1e-11, **tolerance})


@pytest.fixture
def tail():
    """Return h (M, J), W (K, J), gamma (K,), beta (K,) and g (M, K), the gradient of the batch norm's result.

    M: rows (positions). J: inner channels of a bottleneck. K: output channels.
    """
    M, J, K = 200, 12, 20
    h = torch.relu(torch.randn(M, J, dtype=torch.float64) + torch.rand(J, dtype=torch.float64))
    weight, g = torch.randn(K, J, dtype=torch.float64), torch.randn(M, K, dtype=torch.float64) + 0.2
    return h, weight, torch.rand(K, dtype=torch.float64) + 0.5, torch.randn(K, dtype=torch.float64), g


def moments(h):
    """Return the mean (J,) of the rows and the second moments about it (J, J), not divided by their number."""
    mu = h.mean(0)
    return mu, (h - mu).T @ (h - mu)


def test_mean_and_variance_of_a_product_follow_from_the_moments_of_its_operand(tail):
    h, weight, *_ = tail
    mu, M2 = moments(h)
    c = h @ weight.T
    close(weight @ mu, c.mean(0))
    close(((weight @ M2) * weight).sum(1) / len(h), c.var(0, unbiased=False))
    stats = algebra.product_stats(Moments(len(h), mu, M2), weight)
    close(stats.mean, c.mean(0))
    close(stats.M2 / len(h), c.var(0, unbiased=False))


def test_the_gradient_through_a_batch_norm_by_moments_needs_no_product(tail):
    """Every line of the document's derivation is compared with autograd."""
    h, weight, gamma, beta, g = tail
    leaves = [t.clone().requires_grad_() for t in (h, weight, gamma, beta)]
    z = F.batch_norm(leaves[0] @ leaves[1].T, None, None, *leaves[2:], training=True, eps=EPS)
    z.backward(g)
    dh, dweight, dgamma, dbeta = (t.grad for t in leaves)

    M = len(h)
    mu, M2 = moments(h)
    mean = weight @ mu
    rstd = torch.rsqrt(((weight @ M2) * weight).sum(1) / M + EPS)
    a = gamma * rstd
    sg, G = g.sum(0), g.T @ h
    close(sg, dbeta)
    our_dgamma = rstd * ((G * weight).sum(1) - sg * mean)
    close(our_dgamma, dgamma)
    q = a * rstd * our_dgamma / M
    close(a[:, None] * (G - torch.outer(sg, mu)) - q[:, None] * (weight @ M2), dweight)
    A, B = a[:, None] * weight, -weight.T @ (q[:, None] * weight)
    close(g @ A + (h - mu) @ B - sg / M @ A, dh)
    c = (h @ weight.T).requires_grad_()
    z = F.batch_norm(c, None, None, gamma, beta, training=True, eps=EPS)
    close(a * (g - sg / M) - q * (c - mean), torch.autograd.grad(z, c, g)[0])


def residuals(blocks, x):
    """Return the result of the blocks and what each block adds, recorded by a hook on its last convolution."""
    found = []
    hooks = [b.conv2.register_forward_hook(lambda _, __, y: found.append(y)) for b in blocks]
    y = blocks(x)
    for hook in hooks:
        hook.remove()
    return y, found


@pytest.fixture
def chain():
    blocks = nn.Sequential(*[rk.nn.PreactivationBasicBlock(4, 4) for _ in range(5)]).double()
    return blocks, torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("training", [True, False])
def test_preactivation_networks_are_sums(training, chain):
    """x_L = x_l + sum of F(x_i), with x_L from the fused blocks and F(x_i) from torch's modules."""
    blocks, x = chain
    blocks.train(training)
    _, added = residuals(copy.deepcopy(blocks), x)
    assert len(added) == len(blocks)
    with rk.use_backend("reference"):
        y = blocks(x)
    close(y, x + sum(added))


def test_gradients_of_preactivation_networks_are_sums(chain):
    """dE/dx_l = dE/dx_L + (d/dx_l sum F)^T dE/dx_L."""
    blocks, x = chain
    g = torch.randn_like(x)
    _, added = residuals(copy.deepcopy(blocks), x)
    through_sum = torch.autograd.grad(sum(added), x, g)[0]
    with rk.use_backend("reference"):
        whole = torch.autograd.grad(blocks(x), x, g)[0]
    close(whole, g + through_sum)
    assert through_sum.abs().max() > 0.1


def test_original_blocks_are_not_sums():
    """The ReLU after the addition removes negative values, so that with F = 0 the result is relu(x) and not x."""
    block = rk.nn.BasicBlock(4, 4).double().eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    nn.init.zeros_(block.conv2.weight)
    close(block(x), x.relu())


def test_a_scaled_shortcut_scales_by_its_power():
    """With shortcuts scaled by lambda, x_L = lambda^L x_0 + ...; with F = 0 the gradient is lambda^L."""
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    y = x
    for _ in range(10):
        y = 0.5 * y
    close(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 0.5**10))


def test_a_product_of_sums_is_a_sum_over_all_paths(chain):
    """The network's Jacobian (I + J_n) ... (I + J_1) is a sum over the 2^n subsets of blocks.

    J_i is the Jacobian of what block i adds. Deleting a block leaves the half of the terms that do not contain it.
    """
    blocks, x = chain
    x = x.detach()[:1, :, :3, :3].contiguous()
    blocks = blocks[:3].eval()
    jacobians, h = [], x
    for block in blocks:
        jacobians.append(jacobian_of(lambda t, block=block: block(t) - t, h))
        h = block(h)
    size, n = x.numel(), len(blocks)
    terms = {
        chosen: reduce(lambda total, i: jacobians[i] @ total, chosen, torch.eye(size, dtype=torch.float64))
        for k in range(n + 1)
        for chosen in itertools.combinations(range(n), k)
    }
    assert len(terms) == 2**n
    close(jacobian_of(blocks, x), sum(terms.values()))
    without = [term for chosen, term in terms.items() if 1 not in chosen]
    assert len(without) == 2 ** (n - 1)
    eye = torch.eye(size, dtype=torch.float64)
    close((eye + jacobians[2]) @ (eye + jacobians[0]), sum(without))


def jacobian_of(function, x):
    """Return the Jacobian as a matrix, computed through torch's modules."""
    with rk.use_backend("eager"):
        return torch.autograd.functional.jacobian(function, x).reshape(x.numel(), x.numel())


def test_a_bottleneck_has_about_as_many_weights_as_two_narrow_layers():
    def weights(block):
        return sum(p.numel() for p in block.parameters() if p.dim() == 4)

    assert weights(rk.nn.Bottleneck(256, 64)) == 69_632 == 2 * 256 * 64 + 9 * 64**2
    assert weights(rk.nn.BasicBlock(64, 64)) == 73_728 == 2 * 9 * 64**2


@pytest.fixture
def ode(monkeypatch):
    pytest.importorskip("scipy")
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "experiments"))
    import importlib
    import sys

    yield importlib.import_module("ode")
    for name in ("data", "ode", "plots", "shared"):
        sys.modules.pop(name, None)


@in_the_repository
@pytest.mark.parametrize("method, order, steps", [("Euler", 1, (64, 128, 256)), ("Runge-Kutta 4", 4, (8, 16, 32))])
def test_the_orders_of_the_methods(method, order, steps, ode):
    """The observed orders for dx/dt = A x and dx/dt = tanh(A x).

    For the first x(1) is exp(A) x, for the second it is computed by SciPy's solver. The steps are small enough to show
    the order, and the errors are far above the solver's.
    """
    matrix = torch.randn(6, 6, dtype=torch.float64) / 6**0.5
    x = torch.randn(6, dtype=torch.float64)
    linear, smooth = (lambda t: matrix @ t), (lambda t: torch.tanh(matrix @ t))
    for field, want in ((linear, torch.linalg.matrix_exp(matrix) @ x), (smooth, ode.solved(smooth, x))):
        errors = [{"steps": n, "error": (ode.integrate(method, field, x, n) - want).norm()} for n in steps]
        assert ode.orders(errors) == pytest.approx([order, order], abs=0.2)


@in_the_repository
def test_eulers_error_is_below_its_bound(ode):
    """The error is below h/2 max |x''| (e^L - 1) / L, with L the Lipschitz constant."""
    matrix = torch.randn(6, 6, dtype=torch.float64) / 6**0.5
    x = torch.randn(6, dtype=torch.float64)
    L = torch.linalg.matrix_norm(matrix, 2).item()
    along = [torch.linalg.matrix_exp(t * matrix) @ x for t in torch.linspace(0, 1, 101, dtype=torch.float64)]
    second = max((matrix @ matrix @ y).norm().item() for y in along)
    for steps in (4, 64):
        error = (ode.integrate("Euler", lambda t: matrix @ t, x, steps) - along[-1]).norm().item()
        bound = second / (2 * steps) * (math.exp(L) - 1) / L
        assert bound / 1000 < error < bound


@in_the_repository
def test_links_figures_and_names_in_the_document_exist():
    """Its links, figures and names of this package exist."""
    text = DOC.read_text()
    linked = re.findall(r"\]\(([^)#]+)", text)
    assert len(linked) > 20
    for link in linked:
        assert link.startswith("https://") or (DOC.parent / link).exists(), link
    figures = [f for f in (DOC.parent / "figures").iterdir() if f.stem != "headline"]  # the README's
    for figure in figures:
        assert f"figures/{figure.name}" in text, f"{figure.name} is not shown"
        assert figure.stat().st_size < 150_000
    named = re.findall(r"`rk\.([\w.]+)", text)
    assert len(named) > 10
    for name in named:
        reduce(getattr, name.split("."), rk)
