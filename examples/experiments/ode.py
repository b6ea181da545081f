"""A residual block as an ODE: a run of blocks with shared weights is Euler's method for dx/dt = F(x) (Chen et al. 2018,
arXiv 1806.07366, section 1).

    python examples/experiments/ode.py [--data CIFAR] [--depths 4 16]

A network of one block is trained with a few steps from time 0 to time 1. Then the same block is iterated with more and
smaller steps h, and x(1) is compared with that of SciPy's adaptive solver for the same F.

    Euler               x <- x + h F(x)                                       error O(h)
    Runge-Kutta 4       four evaluations of the same block per step           error O(h^4) where F is smooth

F(x) = conv2(relu(bn2(conv1(relu(bn1(x)))))) of a fused pre-activation block. Its batch norms are frozen, so that F is
the same function at each step. --depths are the numbers of steps to train with, powers of 2. Errors are in fp64.

An interrupted run resumes when the same command is started again.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from data import Images
from plots import COLORS, Row, band, select, values_of
from shared import SMALL_IMAGES, Experiment, Run, grid, main, test_error
from torch import Tensor, nn

import resnet_kernels as rk

Field = Callable[[Tensor], Tensor]  # F
IMAGES = 4  # images whose x(1) is compared with the solver's
# Numbers of steps to compare, by method.
STEPS = {"Euler": [2**i for i in range(11)], "Runge-Kutta 4": [2**i for i in range(7)]}


def euler(field: Field, x: Tensor, h: float) -> Tensor:
    """Return x after a step of length h."""
    return x + h * field(x)


def runge_kutta(field: Field, x: Tensor, h: float) -> Tensor:
    """Return x after a step of length h, by the classical method of order 4."""
    k1 = field(x)
    k2 = field(x + h / 2 * k1)
    k3 = field(x + h / 2 * k2)
    k4 = field(x + h * k3)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


METHODS = {"Euler": euler, "Runge-Kutta 4": runge_kutta}


def integrate(method: str, field: Field, x: Tensor, steps: int) -> Tensor:
    """Return x(1) for x(0) = x, in `steps` equal steps of a method of METHODS."""
    for _ in range(steps):
        x = METHODS[method](field, x, 1 / steps)
    return x


class OdeNet(nn.Module):
    """y = fc(avgpool(relu(bn(x(1))))), where dx/dt = block(x) - x and x(0) = bn(conv(image)).

    Args:
        steps: Euler steps from time 0 to 1.
        width: channels of x.
        channels: channels of the images.
        classes: outputs of the classifier.
    x: (N, channels, H, W) -> (N, classes): images, channels, height, width.
    """

    def __init__(self, steps: int, width: int, channels: int, classes: int) -> None:
        super().__init__()
        self.method, self.steps = "Euler", steps
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.block = rk.nn.PreactivationBasicBlock(width, width)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)

    def train(self, mode: bool = True) -> OdeNet:
        super().train(mode)
        # The block's batch norms stay in evaluation mode. Their statistics stay 0 and 1, so that they are a scale and a
        # shift, the same at each step.
        self.block.bn1.eval()
        self.block.bn2.eval()
        return self

    def field(self, x: Tensor) -> Tensor:
        """Return F(x): what the block adds to x."""
        return self.block(x) - x

    def forward(self, x: Tensor) -> Tensor:
        x = integrate(self.method, self.field, self.stem(x), self.steps)
        return self.fc(torch.relu(self.bn(x)).mean((2, 3)))


def solved(field: Field, x: Tensor) -> Tensor:
    """Return x(1) by SciPy's adaptive Runge-Kutta method of order 5, far more exact than the compared methods."""
    from scipy.integrate import solve_ivp

    def right_side(_: float, flat: Any) -> Any:
        return field(torch.from_numpy(flat).view(x.shape)).flatten().numpy()

    found = solve_ivp(right_side, (0, 1), x.flatten().numpy(), method="RK45", rtol=1e-10, atol=1e-11)
    if not found.success:
        raise ValueError(f"expected a field that SciPy can integrate, got: {found.message}")
    return torch.from_numpy(found.y[:, -1].copy()).view(x.shape)


@torch.no_grad()
def errors(model: nn.Module, images: Images, epoch: int) -> list[Row]:
    """Return a row for each method and number of steps: the relative error of x(1), and the network's test error."""
    if epoch == 0:
        return []
    device = next(model.parameters()).device.type
    exact = copy.deepcopy(model).double().cpu().eval()
    start = exact.stem(next(images.test())[0][:IMAGES].double()).contiguous()
    want = solved(exact.field, start)
    rows, trained = [], (model.method, model.steps)
    for method, numbers in STEPS.items():
        for steps in numbers:
            error = (integrate(method, exact.field, start, steps) - want).norm() / want.norm()
            model.method, model.steps = method, steps
            row = {"epoch": epoch, "method": method, "steps": steps, "error": error.item()}
            rows.append(row | {"test_error": test_error(model, images, device)})
    model.method, model.steps = trained
    return rows


def runs(args: argparse.Namespace, images: Images) -> Iterable[Run]:
    other = [n for n in args.depths if n not in STEPS["Euler"]]
    if other:
        raise ValueError(f"depths: expected numbers of steps, powers of 2 up to {STEPS['Euler'][-1]}, got {other[0]}")

    def make(_: str, steps: int) -> nn.Module:
        return OdeNet(steps, args.width, images.channels, images.classes)

    return grid(args, ["shared block"], make, errors)


def orders(rows: list[Row]) -> list[float]:
    """Return the observed order of convergence between each number of steps and the next, which is twice as large.

    This is log2 of the ratio of the two errors.
    """
    found = sorted(rows, key=lambda row: row["steps"])
    return [math.log2(a["error"] / b["error"]) for a, b in zip(found, found[1:], strict=False)]


def draw(figure: Any, rows: list[Row]) -> None:
    """Draw the error of x(1) and the test error against the number of steps, with a line of order 1."""
    left, right = figure.subplots(1, 2)
    rows = [row | {"percent": 100 * row["test_error"]} for row in rows]
    for color, method in zip(COLORS, STEPS, strict=False):
        for depth, line in zip(values_of(rows, "depth"), ("-", "--", ":"), strict=False):
            chosen = select(rows, method=method, depth=depth)
            label = f"{method}, trained with {depth} steps"
            band(left, chosen, "steps", "error", label, color=color, marker=".", linestyle=line)
            band(right, chosen, "steps", "percent", label, color=color, marker=".", linestyle=line)
    at, last = STEPS["Euler"], select(rows, method="Euler")[-1]
    order = [last["error"] * last["steps"] / n for n in at]
    left.plot(at, order, color="#94a3b8", linewidth=1, linestyle="-.", label="order 1")
    left.set(
        xscale="log",
        yscale="log",
        ylim=(1e-9, 3),
        xlabel="steps, 1 / h",
        title="relative error of x(1) against the solver",
    )
    right.set(xscale="log", xlabel="steps, 1 / h", title="test error, %", ylim=(0, None))
    left.legend(frameon=False, loc="lower left")


def verdict(rows: list[Row]) -> list[str]:
    sentences, finest = [], STEPS["Euler"][-1]
    for depth in values_of(rows, "depth"):
        for seed in values_of(rows, "seed"):
            chosen = select(rows, depth=depth, seed=seed)
            found = {method: orders(select(chosen, method=method)) for method in STEPS}
            last = found["Euler"][-1]
            tested = {n: select(chosen, method="Euler", steps=n)[0]["test_error"] for n in (depth, finest)}
            name = f"Trained with {depth} steps, seed {seed}"
            for method, numbers in found.items():
                sentences.append(f"{name}: {method}: orders {', '.join(f'{order:.2f}' for order in numbers)}")
            sentences.append(
                f"{name}: test error {100 * tested[depth]:.1f}%, and {100 * tested[finest]:.1f}% with {finest} steps. "
                f"At the smallest steps Euler's error falls with order {last:.2f}: order 1 is "
                f"{'' if abs(last - 1) < 0.1 else 'NOT '}confirmed. The order of Runge-Kutta 4 is at most "
                f"{max(found['Runge-Kutta 4']):.2f}; order 4 needs a smooth F, and ReLU has kinks."
            )
    return sentences


EXPERIMENT = Experiment(
    "ode",
    "One block as an ODE",
    {
        "digits": {"depths": [4, 16], "epochs": 24, "lr": 0.1},
        "cifar": {"depths": [4, 16], "epochs": 30},
        "folder": SMALL_IMAGES | {"depths": [4, 16], "epochs": 10},
    },
    runs,
    draw,
    verdict,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
