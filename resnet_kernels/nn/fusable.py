"""Whether a block's forward may run fused.

The fused forward bypasses the forward of the inner modules. So whatever could change what these would compute makes the
block run as plain torch modules, with a reason. A function why_... returns such a reason, or None.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize
from torchvision.ops import FrozenBatchNorm2d

from ..backends import select
from ..backends.contract import Call, Geometry, Pool
from ..ops.batch_norm import group_of, uses_batch_statistics
from ..ops.block_training import MAX_POOL_KERNEL, call_of_training
from ..ops.spec import BlockSpec, map_sizes, pooled_size, same_padding, total_stride
from .shortcuts import Preactivation, ZeroPadShortcut

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


class Parts(NamedTuple):
    """The convolutions and batch norms of a block, and how they are connected. See `BlockSpec`.

    convs, norms: the chain's, then the projection's if there is one (in a pre-activation block it has no batch norm).
    Their types are not checked yet. A stem is a chain of one convolution without a shortcut; pool ends it.
    """

    convs: list[nn.Conv2d]
    norms: list[nn.Module]
    shortcut: str
    preactivation: bool = False
    pool: Pool | None = None
    relu: bool = True

    @property
    def spec(self) -> BlockSpec:
        return BlockSpec(
            tuple(conv.stride[0] for conv in self.convs),
            tuple(conv.dilation[0] for conv in self.convs),
            tuple(conv.groups for conv in self.convs),
            self.shortcut,
            self.relu,
            self.preactivation,
            self.pool,
        )

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The sizes of the weights, (K, C/groups, R, S)."""
        return [tuple(conv.weight.shape) for conv in self.convs]

    @property
    def geometries(self) -> list[Geometry]:
        """The geometries of convolutions that passed `why_not_convolution`."""
        return [geometry(conv) for conv in self.convs]


def parts(block: nn.Module) -> Parts | str:
    """Return the block's parts, or why its structure cannot be fused."""
    names = ["1", "2", "3"] if hasattr(block, "conv3") else ["1", "2"]
    convs = [getattr(block, f"conv{n}") for n in names]
    norms = [getattr(block, f"bn{n}") for n in names]
    downsample = block.downsample
    pre = isinstance(block, Preactivation)
    if downsample is None:
        return Parts(convs, norms, "identity", pre)
    if type(downsample) is ZeroPadShortcut:
        return Parts(convs, norms, "zero_pad", pre)
    if pre:
        if isinstance(downsample, nn.Conv2d):
            return Parts([*convs, downsample], norms, "projection", pre)
        return f"downsample: expected None, Conv2d or ZeroPadShortcut, got {_name(downsample)}"
    if type(downsample) is nn.Sequential and len(downsample) == 2:
        conv, bn = downsample
        return Parts([*convs, cast(nn.Conv2d, conv)], [*norms, bn], "projection")
    return f"downsample: expected None, Sequential(Conv2d, BatchNorm2d) or ZeroPadShortcut, got {_name(downsample)}"


def _name(module: object) -> str:
    return type(module).__name__


def inner_modules(block: nn.Module, p: Parts) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module that the fused forward bypasses, with its name."""
    n = len(p.convs) - (p.shortcut == "projection")
    for i in range(n):
        yield f"conv{i + 1}", p.convs[i]
        yield f"bn{i + 1}", p.norms[i]
    yield "relu", block.get_submodule("relu")
    if block.downsample is not None:
        yield "downsample", block.get_submodule("downsample")
    if p.shortcut == "projection" and not p.preactivation:
        yield "downsample.0", p.convs[-1]
        yield "downsample.1", p.norms[-1]


def hook_on(module: nn.Module) -> str | None:
    """Return the kind of hook or override that the module carries, or None."""
    if module._forward_pre_hooks:
        return "a forward pre-hook"
    if module._forward_hooks:
        return "a forward hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return "a backward hook"
    if any(name in module.__dict__ for name in ("forward", "_forward_impl", "_conv_forward")):
        return "a forward of its own"
    return None


def why_it_must_run(name: str, module: nn.Module) -> str | None:
    """Return why the forward of a module that would be bypassed must run, or None."""
    hook = hook_on(module)
    if hook:
        return f"{name} carries {hook}"
    if module.training and parametrize.is_parametrized(module):
        return f"{name} has a parametrization in training mode, which may change each time it is read"
    return None


def why_unfused(block: nn.Module) -> str | None:
    """Return why the block cannot be fused whatever its input, or None."""
    p = parts(block)
    if isinstance(p, str):
        return p
    for name, module in inner_modules(block, p):
        reason = why_it_must_run(name, module)
        if reason:
            return reason
    if type(block.relu) is not nn.ReLU:
        return f"relu: expected ReLU, got {_name(block.relu)}"
    for kind, modules, why in (("conv", p.convs, why_not_convolution), ("bn", p.norms, why_not_batch_norm)):
        for i, module in enumerate(modules):
            reason = why(module)
            if reason:
                chain = len(p.convs) - (p.shortcut == "projection")
                return f"{f'{kind}{i + 1}' if i < chain else 'downsample'}: {reason}"
    return why_shortcut_misfits(block, p)


def why_shortcut_misfits(block: nn.Module, p: Parts) -> str | None:
    """Return why the shortcut does not fit the chain, or None. `why_not_tensors` checks the sizes of a projection."""
    chain = p.convs[:-1] if p.shortcut == "projection" else p.convs
    stride = total_stride([geometry(conv) for conv in chain])
    C, K = chain[0].in_channels, chain[-1].out_channels
    if p.shortcut == "identity" and (stride, C) != (1, K):
        return f"downsample: None does not fit {C} channels to {K} with stride {stride}"
    if p.shortcut == "zero_pad":
        d = cast(ZeroPadShortcut, block.downsample)
        if (d.in_channels, d.out_channels, d.stride) != (C, K, stride):
            return f"downsample: {d} does not fit {C} channels to {K} with stride {stride}"
    return None


def geometry(conv: nn.Conv2d) -> Geometry:
    """Return the geometry of a convolution that passed `why_not_convolution`."""
    return same_padding(conv.weight, conv.stride[0], conv.dilation[0], conv.groups)


def why_not_convolution(conv: nn.Module) -> str | None:
    """Return why the convolution is not one that the fused ops compute, or None."""
    base = parametrize.type_before_parametrizations(conv)
    if base is not nn.Conv2d:
        return f"expected Conv2d, got {_name(conv)}"
    if conv.bias is not None:
        return "the convolution has a bias"
    if conv.padding_mode != "zeros":
        return f"expected padding_mode 'zeros', got {conv.padding_mode!r}"
    if conv.kernel_size[0] != conv.kernel_size[1] or conv.kernel_size[0] % 2 == 0:
        return f"expected an odd square filter, got {conv.kernel_size}"
    if not isinstance(conv.stride, tuple) or not isinstance(conv.dilation, tuple):
        return f"expected stride and dilation as pairs, got {conv.stride} and {conv.dilation}"
    same = conv.stride[0] == conv.stride[1] and conv.dilation[0] == conv.dilation[1]
    padding = conv.dilation[0] * (conv.kernel_size[0] // 2)
    if not same or conv.padding not in ((padding, padding), padding):
        return (
            f"expected equal strides and dilations and padding {padding}, got stride {conv.stride}, "
            f"dilation {conv.dilation}, padding {conv.padding}"
        )
    return None


def why_not_batch_norm(bn: nn.Module) -> str | None:
    """Return why the batch norm is not one that the fused ops compute, or None."""
    if parametrize.type_before_parametrizations(bn) not in BATCH_NORMS:
        return f"expected one of {', '.join(c.__name__ for c in BATCH_NORMS)}, got {_name(bn)}"
    if (bn.running_mean is None) != (bn.running_var is None):
        return "the batch norm has one running statistic without the other"
    return None


# The names of the stem's modules in torchvision's ResNets and backbones.
STEM = ("conv1", "bn1", "relu", "maxpool")


def stem(model: nn.Module) -> Parts | str:
    """Return the parts of a ResNet's stem, or why it cannot be fused whatever its input."""
    if not all(hasattr(model, name) for name in STEM):
        return f"expected {', '.join(STEM)}"
    conv, bn, relu, pool = (getattr(model, name) for name in STEM)
    for name, module in zip(STEM, (conv, bn, relu, pool), strict=True):
        reason = why_it_must_run(name, module)
        if reason:
            return reason
    if type(relu) is not nn.ReLU:
        return f"relu: expected ReLU, got {_name(relu)}"
    window: Pool | None = None
    if type(pool) is nn.MaxPool2d:
        window = Pool(*cast(tuple[int, int, int], (pool.kernel_size, pool.stride, pool.padding)))
        if not all(isinstance(v, int) for v in window) or pool.dilation != 1 or pool.ceil_mode or pool.return_indices:
            return f"maxpool: expected square windows without dilation, ceil_mode or indices, got {pool}"
    elif type(pool) is not nn.Identity:
        return f"maxpool: expected MaxPool2d or Identity, got {_name(pool)}"
    reason = why_not_convolution(conv)
    if reason:
        return f"conv1: {reason}"
    reason = why_not_batch_norm(bn)
    if reason:
        return f"bn1: {reason}"
    return Parts([conv], [bn], "none", pool=window)


def why_not_affine(bn: nn.Module) -> str | None:
    """Return why a batch norm that passed `why_not_batch_norm` is no affine map by running statistics, or None."""
    if not uses_batch_statistics(bn):
        return None
    return "it is in training mode" if bn.training else "the batch norm keeps no running statistics"


def why_not_frozen(block: nn.Module) -> str | None:
    """Return why the batch norms of a block that passed `why_unfused` are no affine maps, or None."""
    p = parts(block)
    assert isinstance(p, Parts)
    return next((reason for reason in map(why_not_affine, p.norms) if reason), None)


def trains(p: Parts) -> bool:
    """Return whether the block runs as the training op: some batch norm uses the batch's statistics, or it is a
    pre-activation block, for which there is no other op."""
    return p.preactivation or any(uses_batch_statistics(bn) for bn in p.norms)


def why_not_trained(p: Parts, x: Tensor) -> str | None:
    """Return why a block that `trains` cannot be fused for this input, or None. None also if it does not train."""
    if not trains(p):
        return None
    if p.shortcut == "projection" and (p.convs[-1].kernel_size != (1, 1) or p.convs[-1].groups != 1):
        return f"downsample: expected an ungrouped 1x1 convolution in training, got {p.convs[-1]}"
    sizes = map_sizes(x.shape[1:], p.shapes, p.geometries, p.shortcut)
    if p.pool is not None and (p.pool.kernel > MAX_POOL_KERNEL or min(pooled_size(sizes.maps[-1][1:], p.pool)) < 1):
        return f"maxpool: expected a kernel of at most {MAX_POOL_KERNEL} that fits the map, got {p.pool.kernel}"
    normalized = sizes.maps if p.preactivation else sizes.outputs
    for bn, (_, P, Q) in zip(p.norms, normalized, strict=False):
        # A batch norm over a process group has more values on the other processes.
        if uses_batch_statistics(bn) and not group_of(bn) and x.shape[0] * P * Q < 2:
            return f"x: expected more than one value per channel in training, got {tuple(x.shape)}"
    # A compiler's sizes may be symbols.
    size = () if torch.compiler.is_compiling() else tuple(x.shape)
    rows = [tuple(g) for g in p.geometries]
    return _why_no_backend_trains(x.device, x.dtype, p.shapes, rows, size, p.pool is not None, select.named())


@torch.compiler.assume_constant_result
def _why_no_backend_trains(
    device: torch.device,
    dtype: torch.dtype,
    shapes: list[tuple[int, ...]],
    geometries: list[tuple[int, ...]],
    size: tuple[int, ...],
    pool: bool,
    name: str | None,
) -> str | None:
    """Return why the named backend (None: every backend) cannot train a block or stem, or None.

    A compiler takes the result as a constant: what is built, and which tables exist, is not part of its graph.
    """
    call = call_of_training(device, dtype, shapes, [Geometry(*g) for g in geometries], size, pool)
    if name and name != select.EAGER:
        return select.BY_NAME[name].why_not(call)
    reasons = select.reasons(call)
    if all(reasons.values()):
        return "no backend trains it here: " + "; ".join(f"{n}: {reason}" for n, reason in reasons.items())
    return None


def training_call(p: Parts, x: Tensor) -> Call:
    """Return the metadata of a block or stem in training."""
    return call_of_training(x.device, x.dtype, p.shapes, p.geometries, tuple(x.shape), p.pool is not None)


def why_context_is_plain(x: Tensor) -> str | None:
    """Return why the current context (tracing, export, transforms, hooks) needs the plain modules, or None."""
    if isinstance(x, torch.fx.Proxy):
        return "the model is being traced by FX"
    if torch.onnx.is_in_onnx_export():
        return "the model is being exported to ONNX"
    if torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing():
        return "the model is being traced by TorchScript"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return "a global module hook is registered"
    return None


def why_not_tensors(p: Parts, x: Tensor) -> str | None:
    """Return why these tensors cannot be fused, or None. For wrong tensors the plain modules raise the error."""
    compiling = torch.compiler.is_compiling()
    if not compiling and type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"x: expected a Tensor, got {_name(x)}"
    if x.dim() != 4 or not x.dtype.is_floating_point:
        return f"x: expected (N, C, H, W) of a floating dtype, got {tuple(x.shape)} in {x.dtype}"
    if x.device.type not in ("cpu", "cuda"):
        return f"x: expected it on cpu or cuda, got {x.device}"
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        if x.dtype != dtype:
            return f"x: expected {dtype} under autocast, got {x.dtype}"
    channels, sizes = x.shape[1], list(x.shape[2:])
    for bn in p.norms:
        if bn.running_mean is not None and bn.running_mean.device != x.device:
            return f"expected statistics on {x.device}, as x, got {bn.running_mean.device}"
        if isinstance(bn, FrozenBatchNorm2d) and bn.weight.dtype != dtype:
            return f"a FrozenBatchNorm2d in {bn.weight.dtype} gives its own dtype, expected {dtype}"
    for i, conv in enumerate(p.convs):
        weight = conv.weight
        if not compiling and type(weight) not in (Tensor, nn.Parameter):
            return f"a weight is a {_name(weight)}"
        if weight.device != x.device:
            return f"expected weights on {x.device}, as x, got {weight.device}"
        if weight.dtype != dtype and not (torch.is_autocast_enabled(x.device.type) and weight.is_floating_point()):
            return f"expected weights in {dtype}, as x, got {weight.dtype}"
        projection = p.shortcut == "projection" and i == len(p.convs) - 1
        expected = x.shape[1] if projection else channels
        if weight.shape[1] * conv.groups != expected:
            return f"expected {weight.shape[1] * conv.groups} channels, got {expected}"
        channels = weight.shape[0]
        if not projection:
            sizes = [geometry(conv).output_size(n, weight.shape[2]) for n in sizes]
    if min(sizes) < 1:
        return f"x: expected a larger map, got {tuple(x.shape)}"
    return None


def why_plain(block: nn.Module, x: Tensor) -> str | None:
    """Return why the block's forward runs as plain torch modules for this input, or None if it runs fused."""
    reason = why_context_is_plain(x) or why_unfused(block)
    if reason:
        return reason
    p = parts(block)
    assert isinstance(p, Parts)
    return why_not_tensors(p, x) or why_not_trained(p, x)
