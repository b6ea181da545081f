"""Runs a small case of every GPU kernel and checks its result. compute-sanitizer runs this program."""

from __future__ import annotations

import copy

import torch
from torchvision.models import resnet

import resnet_kernels as rk
from resnet_kernels.backends import extension, gpu
from resnet_kernels.backends.contract import Epilogue, Operand, Pool
from resnet_kernels.testing import BlockCase, assert_matches, randomize_

CASES = (
    BlockCase("boxes and tail", False, 256, 64, 56, 56, N=2),
    BlockCase("projection", False, 256, 128, 56, 56, 2, N=2),
    BlockCase("gather", False, 20, 5, 9, 7),
    BlockCase("groups", False, 64, 32, 11, 10, 2, groups=4, base_width=8),
    BlockCase("basic", True, 64, 64, 14, 14),
)


@torch.no_grad()
def main() -> None:
    """Run all cases. Raises AssertionError for a wrong result."""
    dtype = torch.bfloat16
    backends = ["gpu"] + ["gpu:cuda"] * (extension.load()[0] is not None)
    for backend in backends:
        for case in CASES:
            # The references run on the CPU, because the sanitizer slows down every kernel on the GPU.
            block, x = case.make().to(dtype), case.input(dtype)
            want, exact = block(x), copy.deepcopy(block).double()(x.double())
            ours = copy.deepcopy(block).cuda()
            rk.replace_blocks(ours)
            with rk.use_backend(backend):
                assert_matches(ours(x.cuda()), want, exact, 9 * 256, f"{case} by {backend}")
    model = randomize_(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])).eval().to(dtype)
    x = torch.randn(2, 3, 64, 64).to(dtype)
    want, exact = model(x), copy.deepcopy(model).double()(x.double())
    with rk.use_backend("gpu"):
        frozen = rk.freeze(model.cuda(), cuda_graphs=False)
    assert_matches(frozen(x.cuda()), want, exact, 9 * 512, "a network with its stem")
    x = torch.randn(2, 16, 9, 9, device="cuda").to(dtype, memory_format=torch.channels_last)
    pooled, _ = gpu.bn_pass(Operand(x), Epilogue(relu=True), Pool(3, 2, 1))
    assert torch.equal(pooled, torch.nn.functional.max_pool2d(torch.relu(x), 3, 2, 1))
    torch.cuda.synchronize()
    print(f"{len(CASES)} blocks by {', '.join(backends)}, a network and pooling: all results are right")


if __name__ == "__main__":
    main()
