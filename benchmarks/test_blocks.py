"""Every distinct block of ResNet-18 and ResNet-50, batch 4 on a CPU and 64 on a GPU."""

import copy
import dataclasses

import pytest
import torch

from resnet_kernels.testing import RESNET_CASES

from .providers import BASELINES, OURS


@pytest.mark.parametrize("provider", BASELINES + OURS)
@pytest.mark.parametrize("case", RESNET_CASES, ids=str)
def test_block(case, provider, device, check_then_time, benchmark):
    benchmark.group = f"{case} {device}"
    torch.manual_seed(0)
    case = dataclasses.replace(case, N=64 if device == "cuda" else 4)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    block, x = case.make().to(device, dtype), case.input(dtype, device)
    with torch.no_grad():
        want, exact = block(x), copy.deepcopy(block).double()(x.double())
    check_then_time(provider, block, x, case.flops(), 9 * 512, want, exact, rounds=10)
