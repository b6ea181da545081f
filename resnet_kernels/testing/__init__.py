"""Block shapes, inputs and the rule of comparison, shared by tests, benchmarks and `resnet-kernels verify`."""

from .cases import ODD_CASES, RESNET_CASES, RESNEXT_CASES, BlockCase
from .comparison import Errors, assert_matches, compare
from .parameters import calibrate_, randomize_
from .steps import GivenReLU, RecordedReLU, eager_results, exact_results, fused_results, results

__all__ = [
    "ODD_CASES",
    "RESNET_CASES",
    "RESNEXT_CASES",
    "BlockCase",
    "Errors",
    "GivenReLU",
    "RecordedReLU",
    "assert_matches",
    "calibrate_",
    "compare",
    "eager_results",
    "exact_results",
    "fused_results",
    "randomize_",
    "results",
]
