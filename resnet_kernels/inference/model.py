"""`freeze` and the model it returns.

Folded are: every residual block of torchvision or timm (or of `resnet_kernels.nn`); a Sequential of nothing but blocks,
into one `FrozenTrunk`; a block that is gated or interrupted, into a `FrozenGated` of several trunks; the stem of a
backbone cut out by torchvision; and stem and stages of a torchvision ResNet, into one trunk. Everything else is copied.

A trunk runs its blocks depth first over a few images at a time, so only the activations of a few images are in flight,
whatever the batch. The weights of a frozen model never change; several threads may call it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .freezer import Freezer
from .modules import FrozenResNet


class FrozenModel(nn.Module):
    """A model for inference, made by `freeze`. Call it like its source; inputs may have any floating dtype.

    fused: the names of the blocks and stems that were folded. left: name -> why a residual block was copied as it is.
    """

    def __init__(self, source: nn.Module, dtype: torch.dtype | None, cuda_graphs: bool) -> None:
        super().__init__()
        self.training = False
        # In a tuple, so that the source is no submodule: its weights are not this model's.
        self._source = (source,)
        self._options = dtype, cuda_graphs
        self.refresh()

    def refresh(self) -> None:
        """Fold the source model's weights and statistics as they are now.

        A call that is running in another thread finishes with the old ones.
        """
        built = Freezer(self._source[0], *self._options)
        self.fused, self.left = tuple(built.fused), built.left
        self.dtype, self.compute_dtype, self.device = built.dtype, built.compute_dtype, built.device
        self.net = built.net

    def train(self, mode: bool = True) -> FrozenModel:
        if mode:
            raise RuntimeError("a frozen model is for inference only; train the model it was made from, then refresh()")
        return super().train(False)

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
            raise RuntimeError("a frozen model cannot be traced or exported; export the model it was made from")
        available = torch.amp.is_autocast_available(self.device.type)  # not on meta tensors
        plain = torch.autocast(self.device.type, enabled=False) if available else contextlib.nullcontext()
        with torch.no_grad(), plain:
            if not isinstance(self.net, FrozenResNet):  # its trunk casts while loading
                args, kwargs = pytree.tree_map(_caster(self.compute_dtype), (args, kwargs))
            return pytree.tree_map(_caster(self.dtype), self.net(*args, **kwargs))

    def _apply(self, fn: Callable, recurse: bool = True) -> FrozenModel:
        raise RuntimeError("a frozen model cannot be moved or cast; move the model it was made from and freeze that")


def _caster(dtype: torch.dtype) -> Callable[[Any], Any]:
    return lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t


def freeze(model: nn.Module, dtype: torch.dtype | None = None, cuda_graphs: bool = True) -> FrozenModel:
    """Return a copy of the model for inference: batch norms folded, weights packed for the processor, blocks and stem
    fused.

    Args:
        model: a torchvision or timm ResNet, ResNeXt, Wide ResNet or SE-ResNet, or any model with their blocks
            (segmentation and detection models and their backbones, your own), in evaluation mode, replaced or not. The
            model is not changed. Later changes of its weights show after `refresh()`.
        dtype: torch.float32, bfloat16, float16 or float64 for weights, activations and results; None for the model's
            own.
        cuda_graphs: on a GPU, capture a CUDA graph at the second call with a size of input and replay it from then on:
            one graph for a whole ResNet, one for each trunk of another model, for the 8 latest sizes. During a capture
            no other thread may synchronise the device. Calls on several streams and from several threads wait for each
            other on the device. False launches kernel by kernel.
    Returns:
        FrozenModel: takes the model's arguments and returns its results, in `dtype`, without gradients.
    Raises:
        TypeError: dtype is no floating torch.dtype.
        ValueError: a batch norm is in training mode, the blocks have several dtypes and none was given, or there is
            nothing to fold.
        BackendUnavailable: the backend that was named cannot run the model.
    Numerics: scale = weight / sqrt(running_var + eps) is multiplied into the convolution's weight in fp32 and rounded
        once to `dtype`. CPUs without 16-bit arithmetic compute 16-bit models in fp32 and round the results.
    """
    training = next(
        (name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training),
        None,
    )
    if training is not None:
        raise ValueError(f"model: expected it in evaluation mode, got {training!r} in training mode; call model.eval()")
    return FrozenModel(model, dtype, cuda_graphs)
