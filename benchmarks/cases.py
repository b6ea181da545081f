"""The cases of the benchmarks: convolutions with their epilogues, residual blocks, whole models, training steps.

In signatures C is the number of input channels, K of output channels, R the height and width of the filter, and `size`
the height and width of the input map.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from resnet_kernels.analysis import traffic
from resnet_kernels.analysis.results import Row
from resnet_kernels.backends.contract import Geometry
from resnet_kernels.testing import RESNET_CASES, RESNEXT_CASES, BlockCase, randomize_

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CLASSES = 1000


class ConvAct(nn.Module):
    """y = [relu](bn(conv(x)) [+ residual]), in evaluation mode."""

    def __init__(self, C: int, K: int, R: int, stride: int, relu: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(C, K, R, stride, R // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(K)
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor, *residual: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        return self.relu(y + residual[0] if residual else y)


class ConvStats(nn.Module):
    """c = conv(x), with its sum and its sum of squares per channel, from which a batch norm's statistics follow."""

    def __init__(self, C: int, K: int, R: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(C, K, R, stride, R // 2, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.conv1(x)
        wide = c if c.dtype == torch.float64 else c.float()
        return c, wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))


class ConvWgrad(nn.Module):
    """The gradient of a convolution's weight, from x and dy, the gradient of the convolution's result."""

    def __init__(self, C: int, K: int, R: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(C, K, R, stride, R // 2, bias=False)

    def forward(self, x: Tensor, dy: Tensor) -> Tensor:
        return conv2d_weight(x, list(self.conv1.weight.shape), dy, self.conv1.stride, self.conv1.padding)


def results_of(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the results of a module as a list, also if there is one only."""
    return [result] if isinstance(result, Tensor) else list(result)


class Prepared(NamedTuple):
    """A case on a device.

    module: in the case's dtype. Providers copy it and do not change it.
    inputs: several sets of inputs; each call takes the next one.
    trial: the inputs that results are checked on: the first set, in training of fewer images.
    eager, exact: the results for `trial` by eager PyTorch and in fp64; empty if no references were requested.
    """

    module: nn.Module
    inputs: list[tuple[Tensor, ...]]
    trial: tuple[Tensor, ...]
    eager: list[Tensor]
    exact: list[Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """One computation to measure.

    section, name, dtype, batch, size: as in the rows of a results file (`analysis.results.Row`).
    channels: channels of x.
    make: returns the module, in fp32.
    needs: the bytes and operations of each kernel of the plan that needs the least.
    terms: the number of terms in the longest sum, for the rule of comparison.
    residual: sizes of the second operand (a residual, or dy) without the batch, those of the result; None without one.
    """

    section: str
    name: str
    dtype: str
    batch: int
    size: int
    channels: int
    make: Callable[[], nn.Module]
    needs: tuple[traffic.Need, ...]
    terms: int
    residual: tuple[int, ...] | None = None

    @property
    def training(self) -> bool:
        return self.section == "training"

    @property
    def need(self) -> traffic.Need:
        """The bytes and operations of all kernels together."""
        return traffic.total(self.needs)

    def floor(self, facts: dict[str, Any]) -> float | None:
        """Return the least seconds at the ceilings in a machine's facts; None if they were not measured."""
        memory, matrix = facts.get("memory"), facts.get("matrix", {}).get(self.dtype)
        return sum(need.seconds(memory, matrix) for need in self.needs) if memory and matrix else None

    def row(self, provider: str, status: str, **rest: Any) -> Row:
        """Return a row of the results file for this case."""
        return Row(
            self.section,
            self.name,
            provider,
            status,
            dtype=self.dtype,
            batch=self.batch,
            size=self.size,
            bytes=self.need.bytes,
            flops=self.need.flops,
            **rest,
        )

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}-{self.batch}"

    def _inputs(self, device: torch.device, batch: int) -> tuple[Tensor, ...]:
        dtype = torch.float32 if self.training else DTYPES[self.dtype]
        x = torch.randn(batch, self.channels, self.size, self.size, device=device)
        if self.section in ("primitives", "blocks"):
            x = torch.relu(x)  # a block's input is the result of a ReLU
        tensors = [x.to(dtype)]
        if self.residual is not None:
            tensors.append(torch.randn(batch, *self.residual, device=device).to(dtype))
        tensors = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
        if self.training:
            tensors.append(torch.randint(CLASSES, (batch,), device=device))
        return tuple(tensors)

    def prepare(self, device: torch.device, seed: int = 0, references: bool = True) -> Prepared:
        """Return the case on the device, with 2 to 4 sets of random inputs, so that no cache holds them all.

        references: whether to compute the results by eager PyTorch and in fp64.
        """
        torch.manual_seed(seed)
        # A reference is computed once, so trying cuDNN's algorithms would not pay.
        torch.backends.cudnn.benchmark = False
        module = self.make().to(device)
        if not self.training:
            module = module.eval().to(DTYPES[self.dtype])
        sets = max(2, min(4, -(-(128 << 20) // max(1, self.need.bytes))))
        inputs = [self._inputs(device, self.batch) for _ in range(sets)]
        # The gradients of a step are compared on fewer images: in fp64 the activations of a whole batch may exceed
        # memory.
        fewer = 32 if device.type == "cuda" else 8
        trial = self._inputs(device, fewer) if self.training and self.batch > fewer else inputs[0]
        eager, exact = ([self._computed(module, trial, double) for double in (False, True)]) if references else ([], [])
        return Prepared(module, inputs, trial, eager, exact)

    def _computed(self, module: nn.Module, inputs: tuple[Tensor, ...], double: bool) -> list[Tensor]:
        """Return the results of eager PyTorch, in fp64 if `double`, else in the case's dtype."""
        module = copy.deepcopy(module).to(memory_format=torch.channels_last)
        if double:
            module.double()
            inputs = tuple(t.double() if t.is_floating_point() else t for t in inputs)
        if self.training:
            return trained(module, inputs, "fp32" if double else self.dtype)
        with torch.no_grad():
            if isinstance(module, (ConvStats, ConvWgrad)) or not double:
                return results_of(module(*inputs))
            # In fp64 32 images at a time: the intermediate results of the whole batch may exceed memory.
            parts = zip(*(t.split(32) for t in inputs), strict=True)
            return [torch.cat([module(*part) for part in parts])]


def loss_of(module: nn.Module, inputs: tuple[Tensor, ...], dtype: str) -> tuple[Tensor, Tensor]:
    """Return (logits, loss) for (images, labels), under autocast unless the dtype is fp32."""
    images, labels = inputs
    with torch.autocast(images.device.type, DTYPES[dtype], enabled=dtype != "fp32"):
        logits = module(images)
        return logits, F.cross_entropy(logits, labels)


def trained(module: nn.Module, inputs: tuple[Tensor, ...], dtype: str) -> list[Tensor]:
    """Return [logits, all gradients concatenated] of a training step on (images, labels)."""
    module.train().zero_grad(set_to_none=True)
    logits, loss = loss_of(module, inputs, dtype)
    loss.backward()
    gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    module.zero_grad(set_to_none=True)
    return [logits.detach(), torch.cat(gradients)]


def _primitive(
    C: int,
    K: int,
    R: int,
    size: int,
    stride: int,
    dtype: str,
    batch: int,
    kind: str,
    make: Callable[[], nn.Module],
    terms: int,
    operand: tuple[int, ...] | None = None,
    residual: bool = False,
) -> Case:
    """Return a case on one convolution. kind: the end of its name. operand: sizes of a second operand."""
    geometry = Geometry(stride, R // 2)
    need = traffic.convolution((batch, C, size, size), (K, C, R, R), geometry, DTYPES[dtype].itemsize, residual)
    name = f"{R}x{R} {C}->{K} {size}x{size}" + f"/{stride}" * (stride > 1) + kind
    return Case("primitives", name, dtype, batch, size, C, make, (need,), terms, operand)


def _output_size(R: int, size: int, stride: int) -> int:
    return Geometry(stride, R // 2).output_size(size, R)


def _convolution(C: int, K: int, R: int, size: int, stride: int, residual: bool, dtype: str, batch: int) -> Case:
    make = functools.partial(_randomized, functools.partial(ConvAct, C, K, R, stride))
    out = _output_size(R, size, stride)
    kind, operand = (" + residual", (K, out, out)) if residual else ("", None)
    return _primitive(C, K, R, size, stride, dtype, batch, kind, make, C * R * R, operand, residual)


def _statistics(C: int, K: int, R: int, size: int, dtype: str, batch: int) -> Case:
    make = functools.partial(ConvStats, C, K, R, 1)
    return _primitive(C, K, R, size, 1, dtype, batch, ", statistics", make, batch * size * size)


def _weight_gradient(C: int, K: int, R: int, size: int, stride: int, dtype: str, batch: int) -> Case:
    make = functools.partial(ConvWgrad, C, K, R, stride)
    out = _output_size(R, size, stride)
    kind, operand = ", weight gradient", (K, out, out)
    return _primitive(C, K, R, size, stride, dtype, batch, kind, make, batch * out * out, operand)


def _randomized(make: Callable[[], nn.Module]) -> nn.Module:
    return randomize_(make())


# Convolutions of ResNet-50, one of each kind and map: C, K, R, size, stride, residual.
CONVOLUTIONS = (
    (64, 64, 3, 56, 1, False),
    (64, 256, 1, 56, 1, True),
    (256, 64, 1, 56, 1, False),
    (128, 128, 3, 56, 2, False),
    (128, 128, 3, 28, 1, False),
    (128, 512, 1, 28, 1, True),
    (512, 128, 1, 28, 1, False),
    (256, 256, 3, 14, 1, False),
    (256, 1024, 1, 14, 1, True),
    (1024, 256, 1, 14, 1, False),
    (512, 512, 3, 7, 1, False),
    (512, 2048, 1, 7, 1, True),
    (2048, 512, 1, 7, 1, False),
)


def primitives(dtype: str, batch: int, full: bool) -> Iterator[Case]:
    """Yield convolutions; if `full` all of them, with statistics and weight gradients."""
    for shape in CONVOLUTIONS if full else CONVOLUTIONS[:3]:
        yield _convolution(*shape, dtype, batch)
    if full:
        yield _statistics(64, 64, 3, 56, dtype, batch)
        yield _statistics(256, 64, 1, 56, dtype, batch)
        for C, K, R, size, stride, _ in CONVOLUTIONS[1::2]:
            yield _weight_gradient(C, K, R, size, stride, dtype, batch)


def _block(case: BlockCase, dtype: str, batch: int) -> Case:
    sizes = (batch, case.inplanes, case.H, case.W)
    with torch.device("meta"):
        shapes = [m.weight.shape for m in case.make().modules() if isinstance(m, nn.Conv2d)]
        need = traffic.block(case.make(), sizes, DTYPES[dtype].itemsize)
    return Case(
        "blocks", case.name, dtype, batch, case.H, case.inplanes, case.make, (need,), max(s[1:].numel() for s in shapes)
    )


# The blocks that take most of the time of ResNet-18 and ResNet-50, with both kinds of shortcut.
FEW_BLOCKS = ("r18-layer1", "r50-layer1", "r50-layer2-down", "r50-layer3")


def blocks(dtype: str, batch: int, full: bool) -> Iterator[Case]:
    """Yield residual blocks; if `full` all of them, else FEW_BLOCKS."""
    for case in (*RESNET_CASES, RESNEXT_CASES[3]) if full else RESNET_CASES:
        if full or case.name in FEW_BLOCKS:
            yield _block(case, dtype, batch)


def _model(name: str) -> nn.Module:
    return randomize_(torchvision.models.get_model(name))


def model(section: str, name: str, dtype: str, batch: int, size: int = 224) -> Case:
    """Return a whole model's case. section: "inference" or "training". name: torchvision's name of the model."""
    with torch.device("meta"):
        network = torchvision.models.get_model(name)
    plan = "block" if section == "inference" else "lazy"
    kernels = traffic.kernels(network, (batch, 3, size, size), DTYPES[dtype].itemsize, plan)
    needs = tuple(k.need for part in kernels.values() for k in part)
    return Case(section, name, dtype, batch, size, 3, functools.partial(_model, name), needs, 2048)


def networks(section: str, models: Sequence[str], dtypes: Sequence[str], batches: Sequence[int]) -> Iterator[Case]:
    """Yield the cases of all models in all dtypes with all batches."""
    for name in models:
        for dtype in dtypes:
            for batch in batches:
                yield model(section, name, dtype, batch)
