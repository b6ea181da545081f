"""A peer: cuDNN's graph API, with each convolution, its folded batch norm, residual and ReLU in one cuDNN graph.

This is written as an experienced user of `nvidia-cudnn-frontend` would. No GPU has run it yet.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from .cases import ConvAct, ConvStats
from .folding import folded


def why_not() -> str | None:
    """Return why cuDNN's graphs cannot run here, or None."""
    return None if importlib.util.find_spec("cudnn") else "nvidia-cudnn-frontend is not installed"


def _names() -> dict[torch.dtype, Any]:
    """Return cuDNN's data types by torch's."""
    import cudnn

    types = cudnn.data_type
    return {torch.bfloat16: types.BFLOAT16, torch.float16: types.HALF, torch.float32: types.FLOAT}


class _Plan:
    """A built graph for operands of one size: y = [relu](conv(x, weight) [+ bias] [+ residual]).

    statistics: also compute the convolution's sum and sum of squares per channel.
    """

    def __init__(self, conv: nn.Conv2d, x: Tensor, handle: Any, relu: bool, residual: bool, statistics: bool) -> None:
        import cudnn

        self.handle, names = handle, _names()
        float32, compute = names[torch.float32], names[x.dtype]
        graph = cudnn.pygraph(
            io_data_type=compute, intermediate_data_type=float32, compute_data_type=float32, handle=handle
        )

        def tensor(name: str, t: Tensor) -> Any:
            return graph.tensor(name=name, dim=list(t.shape), stride=list(t.stride()), data_type=names[t.dtype])

        nhwc = torch.channels_last
        sizes = torch.nn.functional.conv2d(x.to("meta"), conv.weight.to("meta"), None, *_geometry(conv)).shape
        self.sizes = sizes
        y = torch.empty(sizes, dtype=x.dtype, device="meta").to(memory_format=nhwc)
        self.x, self.weight = tensor("x", x), tensor("weight", conv.weight)
        stride, padding, dilation, _ = _geometry(conv)
        t = graph.conv_fprop(
            image=self.x, weight=self.weight, padding=list(padding), stride=list(stride), dilation=list(dilation)
        )
        self.bias = self.residual = None
        self.sums: tuple[Any, ...] = ()
        if statistics:
            self.sums = graph.genstats(input=t)
            for s in self.sums:
                s.set_output(True).set_data_type(float32)
        if conv.bias is not None:
            self.bias = tensor("bias", conv.bias.view(1, -1, 1, 1))
            t = graph.bias(input=t, bias=self.bias)
        if residual:
            self.residual = tensor("residual", y)
            t = graph.add(a=t, b=self.residual)
        t = graph.relu(input=t) if relu else t
        # Without explicit strides the result would be NCHW.
        t.set_output(True).set_data_type(compute).set_dim(list(sizes)).set_stride(list(y.stride()))
        self.y = t
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        self.graph = graph
        self.workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=x.device)

    def run(self, conv: nn.Conv2d, x: Tensor, residual: Tensor | None) -> list[Tensor]:
        """Return [y], or [y, sum, sum of squares] with statistics. conv: gives weight and bias."""
        import cudnn

        y = torch.empty(self.sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        operands = {self.x: x, self.weight: conv.weight, self.y: y}
        if self.bias is not None:
            operands[self.bias] = conv.bias
        if self.residual is not None:
            operands[self.residual] = residual
        sums = [torch.empty(y.shape[1], dtype=torch.float32, device=x.device) for _ in self.sums]
        operands |= dict(zip(self.sums, sums, strict=True))
        cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        self.graph.execute(operands, self.workspace, handle=self.handle)
        return [y, *sums]


def _geometry(conv: nn.Conv2d) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Return (stride, padding, dilation, groups)."""
    assert not isinstance(conv.padding, str)
    return conv.stride, conv.padding, conv.dilation, conv.groups


@functools.cache
def _handle() -> Any:
    import cudnn

    return cudnn.create_handle()


# Built graphs, by everything that a graph depends on. Convolutions of the same sizes share one.
_plans: dict[tuple, _Plan] = {}


class Fused(nn.Module):
    """A convolution whose batch norm is folded into weight and bias, with residual and ReLU, as one cuDNN graph."""

    def __init__(self, conv: nn.Conv2d, relu: bool, statistics: bool = False) -> None:
        super().__init__()
        self.conv, self.relu, self.statistics = conv, relu, statistics

    def forward(self, x: Tensor, *residual: Tensor) -> Any:
        x, conv = x.contiguous(memory_format=torch.channels_last), self.conv
        kind = (self.relu, bool(residual), self.statistics)
        key = (x.shape, x.dtype, x.device, conv.weight.shape, _geometry(conv), conv.bias is None, *kind)
        if key not in _plans:
            _plans[key] = _Plan(conv, x, _handle(), *kind)
        results = _plans[key].run(conv, x, residual[0] if residual else None)
        return results if self.statistics else results[0]


class FusedBlock(nn.Module):
    """A residual block whose convolutions are `Fused`."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        convs = [getattr(block, f"conv{i}") for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
        self.chain = nn.ModuleList(Fused(conv, relu=True) for conv in convs)
        downsample = block.downsample
        self.shortcut = nn.Identity() if downsample is None else Fused(downsample[0], relu=False)

    def forward(self, x: Tensor) -> Tensor:
        *first, last = self.chain
        h = x
        for conv in first:
            h = conv(h)
        return last(h, self.shortcut(x))


def fuse(module: nn.Module) -> nn.Module:
    """Return a copy of the module for inference whose convolutions run as cuDNN graphs."""
    copied = folded(module)
    if isinstance(copied, ConvStats):
        return Fused(copied.conv1, relu=False, statistics=True)
    if isinstance(copied, ConvAct):
        return Fused(copied.conv1, relu=isinstance(copied.relu, nn.ReLU))
    if isinstance(copied, (resnet.BasicBlock, resnet.Bottleneck)):
        return FusedBlock(copied)
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (resnet.BasicBlock, resnet.Bottleneck)):
                setattr(parent, name, FusedBlock(child))
    # The stem stays torch's: cuDNN's fused engines require channel counts that are multiples of 8.
    return copied
