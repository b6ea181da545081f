"""The three shortcuts of He et al. 2015 (arXiv 1512.03385, section 4.1), as a block's `downsample`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..ops.block_inference import zero_pad


class ZeroPadShortcut(nn.Module):
    """Option A: every stride-th row and column of x, zero channels appended. No parameters.

    x: (N, in_channels, H, W) -> (N, out_channels, ceil(H/stride), ceil(W/stride))
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        if out_channels < in_channels:
            raise ValueError(f"out_channels: expected at least in_channels = {in_channels}, got {out_channels}")
        super().__init__()
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        return zero_pad(x, self.stride, self.out_channels)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


class Preactivation(nn.Module):
    """Marks a block whose batch norms and ReLUs stand before its convolutions."""


def make_shortcut(
    option: str,
    in_channels: int,
    out_channels: int,
    stride: int = 1,
    norm_layer: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
) -> nn.Module | None:
    """Return the `downsample` of a block from in_channels to out_channels with this stride.

    option: "A" zero padding where the shape changes, "B" projection where it changes (torchvision's), "C" projection
        always. Where it does not change, A and B are the identity: None.
    norm_layer: the batch norm of a projection; None for a pre-activation block, whose projection has none.
    Raises ValueError for another option.
    """
    if option not in ("A", "B", "C"):
        raise ValueError(f"option: expected 'A', 'B' or 'C', got {option!r}")
    if option != "C" and in_channels == out_channels and stride == 1:
        return None
    if option == "A":
        return ZeroPadShortcut(in_channels, out_channels, stride)
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
    return conv if norm_layer is None else nn.Sequential(conv, norm_layer(out_channels))
