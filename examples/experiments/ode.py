"""The ODE view: one residual block, its weights shared by all steps, is Euler's method for dx/dt = F(x) (Chen et al.
2018, arXiv 1806.07366, section 1). Trained with a few steps, it is iterated with more and smaller ones, and compared
with SciPy's adaptive solver of the same learned field.

    python examples/experiments/ode.py [--data CIFAR] [--depths 4 16]

    Euler               x <- x + h F(x)                                       error O(h)
    Runge-Kutta 4       by four evaluations of the same block a step          error O(h^4) where F is smooth

depths: the steps it is trained with, to the time 1, powers of 2. F = conv2(relu(bn2(conv1(relu(bn1(x)))))) of a fused
pre-activation block whose batch norms are frozen, so that F is the same function at each step. Errors are in fp64.
Killed and started again with the same command, it goes on.
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

Field = Callable[[Tensor], Tensor]
IMAGES = 4  # whose errors are told
STEPS = {"Euler": [2**i for i in range(11)], "Runge-Kutta 4": [2**i for i in range(7)]}


def euler(field: Field, x: Tensor, h: float) -> Tensor:
    return x + h * field(x)


def runge_kutta(field: Field, x: Tensor, h: float) -> Tensor:
    k1 = field(x)
    k2 = field(x + h / 2 * k1)
    k3 = field(x + h / 2 * k2)
    k4 = field(x + h * k3)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


METHODS = {"Euler": euler, "Runge-Kutta 4": runge_kutta}


def integrate(method: str, field: Field, x: Tensor, steps: int) -> Tensor:
    """x(1) from x(0) = x."""
    for _ in range(steps):
        x = METHODS[method](field, x, 1 / steps)
    return x


class OdeNet(nn.Module):
    """y = fc(avgpool(relu(bn(x(1))))), dx/dt = block(x) - x, x(0) = bn(conv(image))."""

    def __init__(self, steps: int, width: int, channels: int, classes: int) -> None:
        super().__init__()
        self.method, self.steps = "Euler", steps
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.block = rk.nn.PreactivationBasicBlock(width, width)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)

    def train(self, mode: bool = True) -> OdeNet:
        super().train(mode)
        # Their statistics stay 0 and 1: batch norms of scale and shift alone, the same at each step.
        self.block.bn1.eval()
        self.block.bn2.eval()
        return self

    def field(self, x: Tensor) -> Tensor:
        return self.block(x) - x

    def forward(self, x: Tensor) -> Tensor:
        x = integrate(self.method, self.field, self.stem(x), self.steps)
        return self.fc(torch.relu(self.bn(x)).mean((2, 3)))


def solved(field: Field, x: Tensor) -> Tensor:
    """x(1) by SciPy's adaptive Runge-Kutta of order 5, far more exactly than what is compared with it."""
    from scipy.integrate import solve_ivp

    def right_side(_: float, flat: Any) -> Any:
        return field(torch.from_numpy(flat).view(x.shape)).flatten().numpy()

    found = solve_ivp(right_side, (0, 1), x.flatten().numpy(), method="RK45", rtol=1e-10, atol=1e-11)
    if not found.success:
        raise ValueError(f"expected a field that can be integrated, got: {found.message}")
    return torch.from_numpy(found.y[:, -1].copy()).view(x.shape)


@torch.no_grad()
def errors(model: nn.Module, images: Images, epoch: int) -> list[Row]:
    """A row for each method and number of steps: the RMS error of x(1), relative, and the test error of the network
    that takes so many steps."""
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
            told = {"method": method, "steps": steps, "error": error.item()}
            rows.append({"epoch": epoch, **told, "test_error": test_error(model, images, device)})
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
    """Between each number of steps and the next, twice as many: log2 of the ratio of errors."""
    found = sorted(rows, key=lambda row: row["steps"])
    return [math.log2(a["error"] / b["error"]) for a, b in zip(found, found[1:], strict=False)]


def draw(figure: Any, rows: list[Row]) -> None:
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
    told, finest = [], STEPS["Euler"][-1]
    for depth in values_of(rows, "depth"):
        for seed in values_of(rows, "seed"):
            chosen = select(rows, depth=depth, seed=seed)
            found = {method: orders(select(chosen, method=method)) for method in STEPS}
            last = found["Euler"][-1]
            tested = {n: select(chosen, method="Euler", steps=n)[0]["test_error"] for n in (depth, finest)}
            name = f"Trained with {depth} steps, seed {seed}"
            told += [f"{name}: {m}: orders {', '.join(f'{o:.2f}' for o in numbers)}" for m, numbers in found.items()]
            told.append(
                f"{name}: test error {100 * tested[depth]:.1f}%, with {finest} steps {100 * tested[finest]:.1f}%. "
                f"Euler's error falls with the order {last:.2f} at the smallest steps: 1 is "
                f"{'' if abs(last - 1) < 0.1 else 'NOT '}confirmed. Runge-Kutta's is at most "
                f"{max(found['Runge-Kutta 4']):.2f}: ReLU has kinks, 4 needs a smooth F."
            )
    return told


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
