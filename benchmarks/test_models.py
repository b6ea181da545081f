"""Whole models at 224 x 224, batch 16 on a CPU and 256 on a GPU."""

import copy

import pytest
import torch
import torchvision

from resnet_kernels.testing import randomize_

from .providers import BASELINES, OURS

# Operations of a forward at 224 x 224, an image: two for each multiply-add of the convolutions and the classifier.
GFLOP = {"resnet18": 3.63, "resnet50": 8.18}


@pytest.mark.parametrize("provider", BASELINES + OURS)
@pytest.mark.parametrize("name", GFLOP)
def test_model(name, provider, device, check_then_time, benchmark):
    benchmark.group = f"{name} {device}"
    torch.manual_seed(0)
    batch, dtype = (256, torch.bfloat16) if device == "cuda" else (16, torch.float32)
    model = randomize_(torchvision.models.get_model(name)).eval().to(device, dtype)
    x = torch.randn(batch, 3, 224, 224, device=device).to(dtype)
    with torch.no_grad():
        want = model(x)
        exact = torch.cat([copy.deepcopy(model).double()(part.double()) for part in x.split(16)])
    check_then_time(provider, model, x, GFLOP[name] * 1e9 * batch, 2048, want, exact, rounds=5)
