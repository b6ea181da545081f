"""The rule of comparison: an error against fp64 may be at most twice PyTorch's own in the same dtype."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Errors:
    """The errors of a result and of eager PyTorch's in the same dtype, both against fp64, and the allowed errors.

    rms, max: of the result. eager_rms, eager_max: of eager PyTorch's. scale: RMS of the exact values. worst: the index
    of the largest error. misplaced: number of elements whose NaN or Inf is missing or should not be there.
    """

    rms: float
    max: float
    eager_rms: float
    eager_max: float
    allowed_rms: float
    allowed_max: float
    scale: float
    worst: tuple[int, ...]
    misplaced: int

    @property
    def ok(self) -> bool:
        """Whether the result is within the rule, by RMS and by maximum."""
        return self.misplaced == 0 and self.rms <= self.allowed_rms and self.max <= self.allowed_max

    def __str__(self) -> str:
        text = (
            f"rms {self.rms:.2e} (eager {self.eager_rms:.2e}, allowed {self.allowed_rms:.2e}), "
            f"max {self.max:.2e} at {self.worst} (eager {self.eager_max:.2e}, allowed {self.allowed_max:.2e}), "
            f"values of rms {self.scale:.2e}"
        )
        return text + (f", {self.misplaced} NaN or Inf missing or misplaced" if self.misplaced else "")


def compare(out: Tensor, eager: Tensor, exact: Tensor, reduction: int = 1) -> Errors:
    """Return the errors of a result under the rule of comparison.

    The rule: the error against fp64 is at most twice that of eager PyTorch on the same inputs in the same dtype, as RMS
    and as maximum, plus a floor. The floor is eps / 4 of the dtype (the error of rounding once) plus
    sqrt(reduction) * eps / 8 of the accumulator, both relative to the exact values' RMS or maximum. NaN and Inf are
    where fp64 has them, except where the result or eager PyTorch overflows.

    Args:
        out, eager: results of one shape in the dtype under test.
        exact: the result in fp64. The comparison runs on its device.
        reduction: the number of terms in the longest sum.
    Raises:
        AssertionError: shapes or dtypes differ.
    """
    assert out.shape == exact.shape == eager.shape, f"shape: expected {exact.shape} ({eager.shape}), got {out.shape}"
    assert out.dtype == eager.dtype, f"dtype: expected {eager.dtype}, got {out.dtype}"
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    # If the result is fp64 too, the reference errs as much as the result: then the floor is eight times as large.
    terms = torch.finfo(wide).eps * math.sqrt(reduction) / (1 if wide == torch.float64 else 8)
    unit = torch.finfo(out.dtype).eps / 4 + terms
    o, e, x = (t.detach().to(exact.device).double() for t in (out, eager, exact))
    overflow = (x.abs() > torch.finfo(out.dtype).max / 2) & x.isfinite() | (~e.isfinite() & x.isfinite())
    same = (o == x) | (o.isnan() & x.isnan()) | (o.isfinite() & x.isfinite())
    misplaced = int((~same & ~overflow).sum())
    finite = o.isfinite() & e.isfinite() & x.isfinite()
    if not finite.any():
        return Errors(0, 0, 0, 0, 0, 0, 0, (), misplaced)
    zero = x.new_zeros(())
    do, de, v = (torch.where(finite, t, zero) for t in ((o - x).abs(), (e - x).abs(), x.abs()))
    n = int(finite.sum())

    def rms(t: Tensor) -> float:
        return math.sqrt(float(t.square().sum()) / n)

    worst = tuple(int(i) for i in torch.unravel_index(do.argmax(), do.shape))
    return Errors(
        rms(do),
        float(do.max()),
        rms(de),
        float(de.max()),
        2 * rms(de) + unit * rms(v),
        2 * float(de.max()) + unit * float(v.max()),
        rms(v),
        worst,
        misplaced,
    )


def assert_matches(
    out: Tensor, eager: Tensor, exact: Tensor, reduction: int = 1, name: str = "result", maximum: bool = True
) -> None:
    """Assert that a result is within the rule of `compare`, which also describes the arguments.

    Args:
        name: the result's name, for the message.
        maximum: if False, the error is compared by RMS alone.
    Raises:
        AssertionError: with the errors, if they exceed the rule.
    """
    errors = compare(out, eager, exact, reduction)
    ok = errors.ok if maximum else errors.misplaced == 0 and errors.rms <= errors.allowed_rms
    assert ok, f"{name}: {errors}"
