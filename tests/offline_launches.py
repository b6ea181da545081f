"""What a GPU would run, recorded, compiled and read: shared by the tests of compiled kernels and of machine code.

Each kernel is compiled once in a process; Triton's cache on disk serves the others.
"""

import dataclasses
import functools

import pytest
import torch
import torchvision
import triton
from torch import nn

from resnet_kernels.analysis.roofline import launches_of
from resnet_kernels.backends import gpu
from resnet_kernels.backends.contract import Affine, Epilogue, Geometry, Normalized, Operand, Pool, Pooled
from resnet_kernels.backends.gpu import launch, offline
from resnet_kernels.backends.gpu.inference import dispatch
from resnet_kernels.backends.gpu.training import finalize, gates, reductions, wgrad
from resnet_kernels.ops import chain_training
from resnet_kernels.ops.chain_backward import Backward
from resnet_kernels.ops.spec import BlockSpec, NormSpec, TrainingPlan

NHWC = torch.channels_last
# The unit of matrix products of each architecture, as PTX names its instructions.
MATRIX_UNIT = {80: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}

# Counts of instructions, registers, spills and digests are of what one compiler makes.
TRITON = "3.6.0"
of_one_triton = pytest.mark.skipif(
    triton.__version__ != TRITON,
    reason=f"machine code as Triton {TRITON} makes it, which the kernels are tuned for; here is {triton.__version__}",
)

_read = {}


def read(launches, arch):
    """Every distinct kernel of the launches: [(a launch, what came out)]."""
    found = {}
    for made in launches:
        # Kernels of two modules may have one name.
        found.setdefault((id(made.kernel), offline.specialize(made, arch)[0]), made)
    for key, made in found.items():
        if (key, arch) not in _read:
            _read[key, arch] = offline.read(made, arch)
    return [(made, _read[key, arch]) for key, made in found.items()]


# Inference


MODELS = (("resnet50", 256), ("resnet18", 256), ("resnext50_32x4d", 256), ("resnet50", 1))


def model_and_input(name, batch, dtype, size=224):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None).eval().to(dtype)
        return model, torch.empty(batch, 3, size, size, dtype=dtype)


@functools.cache
def launches_of_models(arch, dtype, *models):
    return [made for name, batch in models for made in launches_of(*model_and_input(name, batch, dtype), arch)]


def compiled(arch, dtype, *models):
    """Every distinct kernel that the models would launch: [(launch, what came out)]."""
    return read(launches_of_models(arch, dtype, *models), arch)


# Training


def large(*cases):
    return [dataclasses.replace(c, N=256) for c in cases]


def launches_of_block_training(case, dtype, arch):
    """Every launch of a block's forward and backward pass."""
    convs = [m for m in case.make().modules() if isinstance(m, nn.Conv2d)]
    shortcut = "projection" if len(convs) == (3 if case.basic else 4) else "identity"
    with launch.recording(arch) as launches, torch.device("meta"):
        x = torch.empty(case.N, case.inplanes, case.H, case.W, dtype=dtype).to(memory_format=NHWC)
        weights = [torch.empty(c.weight.shape, dtype=dtype) for c in convs]
        vectors = [torch.empty(w.shape[0]) for w in weights]
        unused = [torch.empty(0) for _ in weights]
        n = len(convs)
        fields = zip(*((c.stride[0], c.dilation[0], c.groups) for c in convs), strict=True)
        spec, batch = BlockSpec(*fields, shortcut), [True] * n
        shapes = [w.shape for w in weights]
        stored = chain_training.stored_outputs(x.shape, shapes, spec, batch, spec.geometries(weights))
        plan = TrainingPlan(spec, (NormSpec(1e-5, True, ""),) * n, stored, "gpu")
        kept = chain_training.Forward(gpu, x, weights, vectors, vectors, unused, unused, plan).run()
        every = [True] * n
        Backward(gpu, x, weights, kept, plan, True, every, every).run(torch.empty_like(kept.y))
    return launches


def operand_shapes(K, J, H, dtype):
    """What training makes of a block's tail and of its first convolution, on meta tensors: g, lazy h, dc, x."""

    def activation(channels, size=H):
        return torch.empty(256, channels, size, size, dtype=dtype).contiguous(memory_format=NHWC)

    bits = torch.empty(256 * H * H, K // 8, dtype=torch.uint8)
    j = torch.empty(J)
    g = Operand(activation(K), mask=bits)
    h = Operand(activation(J), (j, j), relu=True)
    dc = Operand(activation(J), (j, j), (activation(J), j, j))
    return g, h, dc, Operand(activation(K)), Operand(activation(K // 2, 2 * H), stride=2)


def launches_of_reductions(dtype, arch):
    """Every kernel of training that is no convolution, as the four stages of a ResNet-50 launch them."""
    with launch.recording(arch) as launches, torch.device("meta"):
        for J, H in ((64, 56), (128, 28), (256, 14), (512, 7)):
            K = 4 * J
            g, h, dc, x, strided = operand_shapes(K, J, H, dtype)
            k, j = torch.empty(K), torch.empty(J)
            if dtype == torch.float32:
                h = dataclasses.replace(h, centre=j)
            for x_of in (h, Operand(h.tensor), strided):
                G, sg = wgrad.wgrad(g, x_of, (1, 1), Geometry(), sums=True)
            wgrad.wgrad(dc, x, (1, 1), Geometry())
            m = wgrad.moments(dataclasses.replace(h, centre=None))
            wgrad.moments(strided)
            reductions.bn_pass(Operand(x.tensor, (k, k)), Epilogue(residual=x, relu=True, reduce="mask"))
            reductions.bn_pass(x, Epilogue(residual=Operand(x.tensor, (k, k)), relu=True))
            reductions.reduce(g, Normalized(x.tensor, k, k))
            _, stats = reductions.bn_pass(Operand(h.tensor), Epilogue(reduce="stats"))
            lazy = dataclasses.replace(h, centre=None)
            reductions.bn_pass(Operand(h.tensor), Epilogue(mask=lazy, reduce=Normalized(h.tensor, j, j)))
            reductions.bn_pass(dc, Epilogue())
            finalize.finalize_stats(stats, j, j, 1e-5)
            finalize.finalize_bn_grad((j, j), 256 * H * H, Affine(j, j, j, j, j))
            weight = torch.empty(K, J, dtype=dtype)
            affine = Affine.of(finalize.finalize_moments(m, weight, k, k, 1e-5))
            centre = j if dtype == torch.float32 else None
            finalize.finalize_tail_grad(sg, torch.empty(K, J), centre, m, weight, affine)
        c, j, pool = (
            torch.empty(256, 64, 112, 112, dtype=dtype).contiguous(memory_format=NHWC),
            torch.empty(64),
            Pool(3, 2, 1),
        )
        y, winners = dispatch.bn_pass(Operand(c, (j, j)), Epilogue(relu=True, reduce="winners"), pool)
        g = Operand(y, pooled=Pooled(winners, pool, (112, 112)))
        reductions.reduce(g, Normalized(c, j, j))
        reductions.bn_pass(dataclasses.replace(g, affine=(j, j), second=(c, j, j)), Epilogue())
    return launches


def launches_of_gates(dtype, arch):
    with launch.recording(arch) as launches:
        for K, P in ((256, 56), (21, 5)):
            z = torch.empty(2, K, P, P, dtype=dtype, device="meta").contiguous(memory_format=NHWC)
            gate = torch.empty(2, K, device="meta")
            gates.gated(z, gate, z, True)
            gates.gated_grad(z, z, z, gate, (True, True, True))
    return launches
