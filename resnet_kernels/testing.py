"""What tests, benchmarks and `resnet-kernels verify` share: block shapes, input makers, and the rule of comparison."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from .backends.select import BackendUnavailable, use_backend
from .nn import make_shortcut
from .nn.fusable import why_plain
from .ops.training import Kept, Plan
from .replace import replace_blocks


@dataclasses.dataclass(frozen=True)
class BlockCase:
    """A residual block and its input. basic: BasicBlock, else Bottleneck; option: its shortcut (`nn.make_shortcut`)."""

    name: str
    basic: bool
    inplanes: int
    planes: int
    H: int
    W: int
    stride: int = 1
    N: int = 2
    groups: int = 1
    base_width: int = 64
    dilation: int = 1
    option: str = "B"

    def __str__(self) -> str:
        return self.name

    def make(self) -> nn.Module:
        """torchvision's block, in evaluation mode, with random statistics and affine parameters."""
        kind: type[resnet.BasicBlock | resnet.Bottleneck] = resnet.BasicBlock if self.basic else resnet.Bottleneck
        shortcut = make_shortcut(self.option, self.inplanes, self.planes * kind.expansion, self.stride)
        block = kind(self.inplanes, self.planes, self.stride, shortcut, self.groups, self.base_width, self.dilation)
        return randomize_(block).eval()

    def input(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
        """What a block sees: the ReLU of something, channels_last."""
        x = torch.relu(torch.randn(self.N, self.inplanes, self.H, self.W, device=device))
        return x.to(dtype, memory_format=torch.channels_last)

    def flops(self) -> int:
        """Multiplications and additions of the forward's convolutions."""
        P, Q = -(-self.H // self.stride), -(-self.W // self.stride)
        C, width = self.inplanes, self.planes
        if self.basic:
            K, macs = width, P * Q * 9 * (C * width + width * width)
        else:
            J = int(width * self.base_width / 64) * self.groups
            K = 4 * width
            macs = self.H * self.W * C * J + P * Q * (9 * J * J // self.groups + J * K)
        projected = self.option == "C" or (self.option == "B" and (C != K or self.stride > 1))
        return 2 * self.N * (macs + projected * P * Q * C * K)


def _basic(name: str, *shape: Any, **rest: Any) -> BlockCase:
    return BlockCase(name, True, *shape, **rest)


def _bottleneck(name: str, *shape: Any, **rest: Any) -> BlockCase:
    return BlockCase(name, False, *shape, **rest)


# Every distinct block of ResNet-18/34 and ResNet-50/101/152 at 224 x 224.
RESNET_CASES = (
    _basic("r18-layer1", 64, 64, 56, 56),
    _basic("r18-layer2-down", 64, 128, 56, 56, 2),
    _basic("r18-layer2", 128, 128, 28, 28),
    _basic("r18-layer3-down", 128, 256, 28, 28, 2),
    _basic("r18-layer3", 256, 256, 14, 14),
    _basic("r18-layer4-down", 256, 512, 14, 14, 2),
    _basic("r18-layer4", 512, 512, 7, 7),
    _bottleneck("r50-layer1-first", 64, 64, 56, 56),
    _bottleneck("r50-layer1", 256, 64, 56, 56),
    _bottleneck("r50-layer2-down", 256, 128, 56, 56, 2),
    _bottleneck("r50-layer2", 512, 128, 28, 28),
    _bottleneck("r50-layer3-down", 512, 256, 28, 28, 2),
    _bottleneck("r50-layer3", 1024, 256, 14, 14),
    _bottleneck("r50-layer4-down", 1024, 512, 14, 14, 2),
    _bottleneck("r50-layer4", 2048, 512, 7, 7),
)

# Every distinct block of ResNeXt-50 32x4d, and the widest groups of the 32x8d and 64x4d.
RESNEXT_CASES = (
    _bottleneck("x50-layer1-first", 64, 64, 56, 56, groups=32, base_width=4),
    _bottleneck("x50-layer1", 256, 64, 56, 56, groups=32, base_width=4),
    _bottleneck("x50-layer2-down", 256, 128, 56, 56, 2, groups=32, base_width=4),
    _bottleneck("x50-layer2", 512, 128, 28, 28, groups=32, base_width=4),
    _bottleneck("x50-layer3-down", 512, 256, 28, 28, 2, groups=32, base_width=4),
    _bottleneck("x50-layer3", 1024, 256, 14, 14, groups=32, base_width=4),
    _bottleneck("x50-layer4-down", 1024, 512, 14, 14, 2, groups=32, base_width=4),
    _bottleneck("x50-layer4", 2048, 512, 7, 7, groups=32, base_width=4),
    _bottleneck("x101-32x8d-layer2", 512, 128, 28, 28, groups=32, base_width=8),
    _bottleneck("x101-64x4d-layer1", 256, 64, 56, 56, groups=64, base_width=4),
)

# Where kernels go wrong: channels that fill no vector, odd maps with stride, tiny maps and batches, groups.
ODD_CASES = (
    _bottleneck("odd-channels", 20, 5, 9, 7),
    _bottleneck("odd-channels-down", 13, 5, 9, 7, 2),
    _basic("basic-odd-down", 7, 11, 13, 9, 2),
    _bottleneck("map-1x1", 32, 8, 1, 1),
    _bottleneck("map-1x1-down", 24, 8, 1, 1, 2),
    _bottleneck("batch-1", 64, 16, 10, 10, N=1),
    _bottleneck("batch-0", 64, 16, 10, 10, N=0),
    _bottleneck("batch-7", 64, 16, 6, 6, N=7),
    _bottleneck("groups-32", 256, 64, 10, 11, groups=32, base_width=4),
    _bottleneck("groups-down", 64, 32, 11, 10, 2, groups=4, base_width=8),
    _bottleneck("wide", 64, 16, 7, 7, base_width=128),
    _bottleneck("dilation-2", 64, 16, 9, 9, dilation=2),
    _bottleneck("dilation-4-down", 32, 16, 9, 11, dilation=4, stride=2),
    _bottleneck("option-A-down", 16, 8, 9, 9, 2, option="A"),
    _basic("basic-option-A-down", 16, 32, 9, 8, 2, option="A"),
    _bottleneck("option-C", 64, 16, 8, 8, option="C"),
    _basic("basic-option-C", 24, 24, 8, 8, option="C"),
)


def randomize_(model: nn.Module) -> nn.Module:
    """Give every batch norm statistics and affine parameters as a trained model has, away from 0 and 1."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            assert m.running_mean is not None and m.running_var is not None
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
            if m.weight is not None:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, 0, 0.3)
    return model


def calibrate_(model: nn.Module, images: Tensor) -> nn.Module:
    """Set the batch norms' statistics to those of the images, layer by layer, as training would have."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    training = model.training
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
    with torch.no_grad():
        model.train()(images)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    return model.train(training)


@dataclasses.dataclass(frozen=True)
class Errors:
    """Of a result and of PyTorch's own in the same dtype, both against fp64; `worst` is the index of `max`."""

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
        return self.misplaced == 0 and self.rms <= self.allowed_rms and self.max <= self.allowed_max

    def __str__(self) -> str:
        text = (
            f"rms {self.rms:.2e} (eager {self.eager_rms:.2e}, allowed {self.allowed_rms:.2e}), "
            f"max {self.max:.2e} at {self.worst} (eager {self.eager_max:.2e}, allowed {self.allowed_max:.2e}), "
            f"values of rms {self.scale:.2e}"
        )
        return text + (f", {self.misplaced} NaN or Inf missing or misplaced" if self.misplaced else "")


def compare(out: Tensor, eager: Tensor, exact: Tensor, reduction: int = 1) -> Errors:
    """The rule: the error against fp64 is at most twice PyTorch's own on the same inputs in the same dtype, as RMS and
    as maximum, plus a floor: eps / 4 of the dtype (what rounding once leaves) and sqrt(reduction) eps / 8 of the
    accumulator, of the values' own RMS and maximum. NaN and Inf stand where fp64 has them, except where the result or
    eager itself overflows.

    out, eager: results in the dtype under test. exact: the same in fp64; compared where it is. reduction: terms in the
    longest sum.
    Raises AssertionError where shape or dtype differ.
    """
    assert out.shape == exact.shape == eager.shape, f"shape: expected {exact.shape} ({eager.shape}), got {out.shape}"
    assert out.dtype == eager.dtype, f"dtype: expected {eager.dtype}, got {out.dtype}"
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    # fp64 is compared with fp64: there the reference errs as much as the result.
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
    """Raises AssertionError with the errors unless they are within the rule; by RMS alone if not `maximum`."""
    errors = compare(out, eager, exact, reduction)
    ok = errors.ok if maximum else errors.misplaced == 0 and errors.rms <= errors.allowed_rms
    assert ok, f"{name}: {errors}"


class RecordedReLU(nn.Module):
    """ReLU that tells where it let through."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor] = []

    def forward(self, z: Tensor) -> Tensor:
        self.masks.append(~(z <= 0))
        return torch.relu(z)


class GivenReLU(nn.Module):
    """Zero where the masks, one after the other, say so."""

    def __init__(self, masks: Iterable[Tensor]) -> None:
        super().__init__()
        self.masks = iter(masks)

    def forward(self, z: Tensor) -> Tensor:
        return torch.where(next(self.masks).to(z.device), z, 0)


def results(block: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Of a step: y, the gradients of x and of the parameters that want one, by name, and the buffers afterwards."""
    x = x.clone().requires_grad_()
    return _backward(block, x, block(x), dy)


def _backward(block: nn.Module, x: Tensor, y: Tensor, dy: Tensor) -> dict[str, Tensor]:
    y.backward(dy)
    grads = {name: p.grad for name, p in (("x", x), *block.named_parameters()) if p.grad is not None}
    return {"y": y.detach()} | grads | dict(block.named_buffers())


def eager_results(block: nn.Module, x: Tensor, dy: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """(results, masks of the ReLUs) of a step of torchvision's block."""
    block = copy.deepcopy(block)
    block.relu = relu = RecordedReLU()
    return results(block, x, dy), relu.masks


def fused_results(
    block: nn.Module, x: Tensor, dy: Tensor, backend: str | None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """(results, masks of the ReLUs) of a step of torchvision's block, replaced. Raises BackendUnavailable where it does
    not run fused."""
    block = copy.deepcopy(block)
    replace_blocks(block)
    x = x.clone().requires_grad_()
    with use_backend(backend):
        if reason := why_plain(block, x):
            raise BackendUnavailable(reason)
        y = block(x)
        node: Any = y.grad_fn
        plan = Plan(*node.plan)
        kept = Kept.of(node.saved_tensors[1 + node.count :], plan)
        out = _backward(block, x, y, dy)
    masks = []
    for i in range(plan.n - 1):
        a, b = (t.double()[:, None, None] for t in kept.tables[i][:2])
        masks.append(~((a * kept.c[i].double() + b).float() <= 0))
    return out, [*masks, ~(out["y"] <= 0)]


def exact_results(block: nn.Module, x: Tensor, dy: Tensor, masks: Iterable[Tensor]) -> dict[str, Tensor]:
    """Results of a step in fp64, the gradients under these masks: of a value near a ReLU's zero the sign is chance, and
    one that flips moves gradients by more than all rounding does."""
    block = copy.deepcopy(block).double()
    y = copy.deepcopy(block)(x.double()).detach()
    block.relu = GivenReLU(masks)
    return results(block, x.double(), dy.double()) | {"y": y}
