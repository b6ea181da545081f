"""What a backend may implement: the primitives' signatures, shapes, dtypes and errors.

Everything is NHWC in memory (channels_last), written N, C, H, W; K output channels, R x S filter, P x Q output map,
M = N*P*Q. Activations and weights share the compute dtype; scales, shifts, statistics and sums are fp32 (fp64 for
fp64 inputs: `accumulator_dtype`). Five families, see `Backend`:

    conv         sums of products with an epilogue: forward convolutions and, with `data_grad_size`, data gradients
    wgrad        weight gradients, and the moments of an activation
    bn_pass      memory-bound passes; `reduce`, those that write nothing
    gated        a pass that ends a block whose branch is gated per image, and its gradient
    finalize_*   the per-channel algebra between them

`reference` defines the result of each. Another backend implements what it can and tells the rest in `why_not`, a pure
function of a `Call`; it never tries and fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class BackendUnavailable(RuntimeError):
    """A backend that was named cannot run the call; the message says why."""


class Geometry(NamedTuple):
    """Of a convolution, the same in both directions."""

    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    def output_size(self, size: int, kernel: int) -> int:
        return (size + 2 * self.padding - self.dilation * (kernel - 1) - 1) // self.stride + 1


class Packed(NamedTuple):
    """A weight (K, C/groups, R, S) = shape as a backend wants it: laid out, and multiplied by its scale if `scale` is
    None. `weight` is a Tensor or the backend's own object."""

    weight: Any
    scale: Tensor | None
    shape: tuple[int, ...]


class Pool(NamedTuple):
    """Max pooling over kernel x kernel windows."""

    kernel: int
    stride: int
    padding: int


# In place of an element of a window: what its maximum gets ends there.
NO_WINNER = 255


class Pooled(NamedTuple):
    """What the gradient of max pooling needs beside that of its result. winners: uint8 of the result's sizes, which
    element of its window, row by row, each maximum was, or NO_WINNER. size: (H, W) of what was pooled."""

    winners: Tensor
    pool: Pool
    size: tuple[int, int]


class PackedBlock(NamedTuple):
    """A residual block: packed weights and geometries of its chain, then of its projection if `shortcut` is
    "projection" (else "identity", "zero_pad" or "none"); the chain's shifts, the last with the projection's added; and
    whether it ends with a ReLU, which only a chain without a shortcut may not."""

    weights: Sequence[Packed]
    shifts: Sequence[Tensor]
    geometries: Sequence[Geometry]
    shortcut: str
    relu: bool = True


@dataclass(frozen=True)
class Operand:
    """A tensor seen through what is applied while loading it, in this order:

    v = tensor, every stride-th row and column
    v = of the map that was pooled, where each element gets what the maxima that it was have in v (then stride is 1)
    v = v where mask, else 0         mask: bool of the tensor's sizes, or what the same backend returned for "mask", or
                                     another operand of one tensor with affine and ReLU: where not (it <= 0)
    v = a*v + b                      affine = (a, b), per channel
    v = a*v + a2*(tensor2 - mean) + b   with second = (tensor2, a2, mean): a large mean leaves before it is multiplied
    v = relu(v), rounded to the tensor's dtype
    v = v - centre, per channel      (fp32 and fp64 only: it is not rounded again)
    """

    tensor: Tensor
    affine: tuple[Tensor, Tensor] | None = None
    second: tuple[Tensor, Tensor, Tensor] | None = None
    relu: bool = False
    mask: Tensor | Operand | None = None
    stride: int = 1
    centre: Tensor | None = None
    pooled: Pooled | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """N, C, H, W of what it stands for."""
        N, C, H, W = self.tensor.shape
        if self.pooled is not None:
            H, W = self.pooled.size
        return N, C, -(-H // self.stride), -(-W // self.stride)

    @property
    def plain(self) -> bool:
        """Return whether it is its tensor."""
        nothing = (self.affine, self.second, self.mask, self.centre, self.pooled)
        return self.stride == 1 and not self.relu and all(value is None for value in nothing)


class Normalized(NamedTuple):
    """xhat = (tensor - mean) * rstd, per channel."""

    tensor: Tensor
    mean: Tensor
    rstd: Tensor


@dataclass(frozen=True)
class Product:
    """scale * conv(operand, weight), scale per output channel.

    weight: (K, C/groups, R, S), plain or packed by the backend that gets it (which then holds the scale).
    data_grad_size: (H, W) turns it into the data gradient: operand is (N, K, P, Q), the result (N, C, H, W).
    """

    operand: Operand
    weight: Tensor | Packed
    geometry: Geometry = Geometry()
    scale: Tensor | None = None
    data_grad_size: tuple[int, int] | None = None

    @property
    def packed(self) -> Packed:
        if isinstance(self.weight, Packed):
            return self.weight
        return Packed(self.weight, self.scale, tuple(self.weight.shape))

    def output_sizes(self) -> tuple[int, int, int, int]:
        """(N, K, P, Q), or (N, C, H, W) of a data gradient. Raises ValueError where the shapes do not fit."""
        x, shape, g = self.operand.tensor, self.packed.shape, self.geometry
        if x.dim() != 4 or len(shape) != 4:
            raise ValueError(f"conv: expected 4-D operand and weight, got {tuple(x.shape)} and {shape}")
        N, channels, H, W = self.operand.sizes
        K, C, R, S = shape[0], shape[1] * g.groups, shape[2], shape[3]
        expected = C if self.data_grad_size is None else K
        if channels != expected:
            raise ValueError(f"conv: expected an operand of {expected} channels, got {tuple(x.shape)}")
        if K % g.groups:
            raise ValueError(f"conv: expected output channels divisible by {g.groups} groups, got {K}")
        P, Q = (H, W) if self.data_grad_size is None else self.data_grad_size
        out = g.output_size(P, R), g.output_size(Q, S)
        if min(out) < 1:
            raise ValueError(f"conv: a {R}x{S} filter with {g} does not fit a map of {P}x{Q}")
        if self.data_grad_size is None:
            return N, K, *out
        if out != (H, W):
            raise ValueError(f"conv: a gradient for {P}x{Q} has {out[0]}x{out[1]} positions, got {H}x{W}")
        return N, C, P, Q


@dataclass(frozen=True)
class Epilogue:
    """What happens to the accumulator t: t += shift, t += residual, relu, zero where not mask, round, reduce.

    residual: of the result's sizes; with fewer channels, those it lacks are zero. upsample: it stands at every
        upsample-th row and column of the result, zeros between.
    mask: bool of the result's sizes, or an Operand: then t stays where `not (operand <= 0)`.
    reduce: "stats" for `Stats` of the rounded result; `Normalized` xhat for the pair sum(t), sum(t * xhat) per channel;
        "mask" for a tensor that tells where `not (result <= 0)`, in a form of the backend's own (`mask_size`);
        "winners", with relu and pooling, for `Pooled.winners`: of several maxima the first, NO_WINNER where the result
        is <= 0.
    overwrite: the result may take the residual's memory.
    """

    shift: Tensor | None = None
    residual: Operand | None = None
    relu: bool = False
    mask: Tensor | Operand | None = None
    reduce: str | Normalized | None = None
    overwrite: bool = False
    upsample: int = 1


class Stats(NamedTuple):
    """Per channel: rows, mean, and the sum of squared deviations from it."""

    rows: int | Tensor
    mean: Tensor
    M2: Tensor


class Moments(NamedTuple):
    """Of rows h: how many, mean (J) and M2 = sum of (h - mean)(h - mean)^T (J, J). centred: h - mean as a plain
    operand, where it was made on the way (fp32 and fp64 only)."""

    rows: int
    mean: Tensor
    M2: Tensor
    centred: Operand | None = None


class Affine(NamedTuple):
    """A batch norm ready to apply: y = a*x + b, with the mean and 1/sqrt(var + eps) it came from, and the unbiased
    variance. The rows of the (5, K) table that `finalize_*` return."""

    a: Tensor
    b: Tensor
    mean: Tensor
    rstd: Tensor
    var: Tensor

    @classmethod
    def of(cls, table: Tensor) -> Affine:
        return cls(*table.unbind())


class TailGrad(NamedTuple):
    """Of c = h W^T and its batch norm: dweight (K, J) and dgamma (K) in `accumulator_dtype`; A (K, J) and B (J, J) in
    the weight's dtype and v (J) in `accumulator_dtype` with dL/dh = g A + (h - centre) B + v."""

    dweight: Tensor
    dgamma: Tensor
    A: Tensor
    B: Tensor
    v: Tensor


@dataclass(frozen=True)
class Call:
    """Metadata of a call, all that `why_not` may look at.

    needs: names of what is asked for: a primitive ("conv", "wgrad", "moments", "bn_pass", "finalize") and features
        ("residual", "two_products", "lazy", "two_tensors", "mask", "stats", "reduce" (what else `Epilogue.reduce`
        says), "data_grad", "pool"), or "gated" for that pass and its gradient. "training" stands for all primitives and
        features but "pool" and "gated".
    weights: (K, C/groups, R, S) and geometry of each product.
    size: (N, C, H, W) of the first operand where it is known; only what was measured depends on it.
    """

    device: torch.device
    dtype: torch.dtype
    needs: frozenset[str]
    weights: tuple[tuple[tuple[int, ...], Geometry], ...] = field(default=())
    size: tuple[int, ...] = ()


def why_unsupported(
    call: Call, supports: frozenset[str], device: str | None, dtypes: Sequence[torch.dtype] | None
) -> str | None:
    """Why a call is beyond a backend of these primitives and features, device type and dtypes (None: any), or None."""
    missing = call.needs - supports
    if missing:
        return f"not implemented here: {', '.join(sorted(missing))}"
    if device is not None and call.device.type != device:
        return f"expected tensors on {device}, got {call.device}"
    if not call.dtype.is_floating_point or (dtypes is not None and call.dtype not in dtypes):
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) if dtypes else "a floating dtype"
        return f"expected {names}, got {call.dtype}"
    return None


def call_of(products: Sequence[Product], epilogue: Epilogue) -> Call:
    """The metadata of a `conv`."""
    operands = [p.operand for p in products] + ([epilogue.residual] if epilogue.residual else [])
    present = {
        "conv": True,
        "two_products": len(products) > 1,
        "residual": epilogue.residual is not None,
        "lazy": epilogue.upsample > 1 or any(o.affine is not None or o.relu or o.stride > 1 for o in operands),
        "two_tensors": any(o.second is not None for o in operands),
        "mask": epilogue.mask is not None or any(o.mask is not None for o in operands),
        "stats": epilogue.reduce == "stats",
        "reduce": epilogue.reduce not in (None, "stats"),
        "data_grad": any(p.data_grad_size for p in products),
        "pool": any(o.pooled is not None for o in operands),
    }
    x = products[0].operand.tensor
    shapes = tuple((p.packed.shape, p.geometry) for p in products)
    return Call(x.device, x.dtype, frozenset(n for n, there in present.items() if there), shapes, tuple(x.shape))


def check_conv(products: Sequence[Product], epilogue: Epilogue) -> tuple[int, int, int, int]:
    """The result's sizes. Raises TypeError or ValueError naming what was expected and what came."""
    if not products:
        raise ValueError("conv: expected at least one product, got none")
    sizes = products[0].output_sizes()
    first = products[0].operand.tensor
    residual = epilogue.residual.tensor if epilogue.residual else None
    for name, t in [("operand", p.operand.tensor) for p in products[1:]] + [("residual", residual)]:
        if t is not None and (t.dtype, t.device) != (first.dtype, first.device):
            raise TypeError(f"conv: expected {name} in {first.dtype} on {first.device}, got {t.dtype} on {t.device}")
    for p in products:
        if not isinstance(p.weight, Packed) and p.weight.dtype != first.dtype:
            raise TypeError(f"conv: expected a weight in {first.dtype}, as its operand, got {p.weight.dtype}")
        if p.output_sizes() != sizes:
            raise ValueError(f"conv: expected products of equal sizes, got {sizes} and {p.output_sizes()}")
    if epilogue.residual is not None:
        got = epilogue.residual.sizes
        expected = (*sizes[:2], *(-(-n // epilogue.upsample) for n in sizes[2:]))
        if (got[0], *got[2:]) != (expected[0], *expected[2:]) or got[1] > expected[1]:
            raise ValueError(f"conv: expected a residual of {expected}, got {got}")
    if epilogue.shift is not None and epilogue.shift.shape != (sizes[1],):
        raise ValueError(f"conv: expected {sizes[1]} shifts, got {tuple(epilogue.shift.shape)}")
    return sizes


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, scales and statistics beside activations of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def nhwc_strides(t: Tensor) -> tuple[int, int, int]:
    """Elements from an image, row, column to the next; where there is one only, what a dense map would have."""
    N, C, H, W = t.shape
    n, _, h, w = t.stride()
    w = w if W > 1 else C
    h = h if H > 1 else W * w
    return n if N > 1 else H * h, h, w


def tf32_allowed() -> bool:
    """Return whether torch's flags let convolutions of fp32 multiply in tf32."""
    cudnn: Any = torch.backends.cudnn
    return cudnn.conv.fp32_precision == "tf32"


def fold(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight (K, ...) times scale per output channel, computed in `accumulator_dtype` and rounded once."""
    return (weight.to(accumulator_dtype(dtype)) * scale[:, None, None, None]).to(dtype)


class Backend(Protocol):
    """A backend is a module with these names. A primitive may be called where `why_not` of its call is None, and need
    not exist elsewhere. Optional are, in one call, what `ops.block_inference.run` and `ops.stem_inference.run` compose,
    and a way to decide once:

    residual_blocks(x, blocks, overwrite), of blocks that have a shortcut
    residual_block(x, block), of one: its result, or None where no kernel has all of it
    stem(x, weight, shift, geometry, pool), with its weight by `pack_stem(weight, scale, geometry, pool)` and its x in
        memory of `stem_channels(weight sizes, geometry, pool)` channels, zeros behind the image's

    taped(key, tensors, function) -> function(), a list of tensors that follows from the tensors and from key. It may
        record the first call, and do the same again on other tensors of the same sizes

    PACKS_FOR_SIZE: whether `pack` depends on the operand's size.
    """

    NAME: str
    SUPPORTS: frozenset[str]
    PACKS_FOR_SIZE: bool

    def why_not(self, call: Call) -> str | None:
        """None if the call runs here, else the reason. A pure function of metadata."""

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype activations of `dtype` are computed and kept in inside a fused sequence."""

    def images_per_pass(self, image_bytes: int) -> int | None:
        """How many images to run through a sequence of blocks at a time, when the largest pair of an image's
        activations takes `image_bytes`; None for the whole batch."""

    def pack(self, weight: Tensor, scale: Tensor, geometry: Geometry, size: Sequence[int], keep: bool = True) -> Packed:
        """Prepare a weight for operands of `size` (N, C, H, W). keep: for many calls, so that work here pays."""

    def mask_size(self, sizes: Sequence[int]) -> tuple[int, ...] | None:
        """Of the uint8 tensor that stands for the mask of a result of these sizes (N, K, P, Q); None: the result itself
        is what `reduce="mask"` returns."""

    def materialize(self, operand: Operand, kernel: int) -> Operand:
        """An operand that several kernels are going to read, one of them a product with a kernel x kernel filter: as
        it came if they apply what it holds while loading, else computed once."""

    def conv(self, products: Sequence[Product], epilogue: Epilogue) -> tuple[Tensor, Any]:
        """(t, reduced): t (N, K, P, Q) = epilogue(sum of products), channels_last; reduced as `Epilogue.reduce`."""

    def masked_conv(self, products: Sequence[Product], epilogue: Epilogue) -> tuple[Operand, tuple[Tensor, Tensor]]:
        """`conv` with a mask, an Operand, and sums; the result as an operand that may hold the mask."""

    def wgrad(
        self, g: Operand, x: Operand, kernel: tuple[int, int], geometry: Geometry, sums: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(dL/dweight (K, C/groups, R, S), sum of g per channel if `sums`), both in `accumulator_dtype`, for
        g = dL/dconv (N, K, P, Q) and conv's operand x (N, C, H, W)."""

    def moments(self, h: Operand) -> Moments:
        """Over the M rows of h (N, J, P, Q)."""

    def bn_pass(self, x: Operand, epilogue: Epilogue, pool: Pool | None = None) -> tuple[Tensor, Any]:
        """(t, reduced): epilogue(x), then max-pooled (NaN wins, padding -inf) if pool is given."""

    def reduce(self, x: Operand, by: str | Normalized) -> Any:
        """What `bn_pass` of x reduces to by "stats" or `Normalized`, without its result."""

    def gated(self, z: Tensor, gate: Tensor | None, shortcut: Tensor | None, relu: bool) -> Tensor:
        """y (N, K, P, Q) = relu(gate * z + shortcut), rounded once. z, shortcut: of y's sizes, channels_last; gate:
        (N, K) in `accumulator_dtype`; a gate of None is one, a shortcut of None zero."""

    def gated_grad(
        self, dy: Tensor, y: Tensor | None, z: Tensor | None, gate: Tensor | None, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """With g = dy where not (y <= 0), or dy where y is None: g * gate, the sum of g * z over P and Q (N, K) in
        `accumulator_dtype`, and g; None for what is not wanted. z is needed for the sum alone. Maps are
        channels_last."""

    def finalize_stats(self, stats: Stats, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        """The table of `Affine`: a = gamma*rstd, b = beta - mean*a, from the biased variance."""

    def finalize_moments(self, m: Moments, weight: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        """The same for c = h W^T (weight (K, J)), from h's moments: mean = W mu, var = diag(W Cov W^T)."""

    def finalize_bn_grad(self, sums: tuple[Tensor, Tensor], rows: int | Tensor, affine: Affine) -> tuple[Tensor, ...]:
        """From sum(g), sum(g*xhat): (al, be, const) with dL/dc = al*g + be*(c - mean) + const."""

    def finalize_tail_grad(
        self, sg: Tensor, G: Tensor, centre: Tensor | None, m: Moments, weight: Tensor, affine: Affine
    ) -> TailGrad:
        """From sg = sum(g) and G = g^T (h - centre), for c = h W^T whose statistics came from the moments m; weight and
        G are (K, J), centre None is zero."""
