"""The contract between the ops and the backends: data structures, primitives, and their argument checks.

`Backend`, at the end of this file, lists every primitive with its formula, shapes, dtypes and errors. They come in five
families:

    conv         sums of convolutions with an epilogue; with `Product.data_grad_size`, data gradients
    wgrad        weight gradients, and `moments`: the first and second moments of an activation
    bn_pass      memory-bound passes over an activation; `reduce` is the same pass without a stored result
    gated        the pass that ends a block whose branch is gated per image, and its gradient
    finalize_*   the per-channel algebra between those passes

Letters: N images; C input channels; H x W input map; K output channels; R x S filter; P x Q output map; M = N*P*Q rows
(positions of the output map); J input channels of a 1x1 convolution c = h W^T, whose weight W is (K, J).

Layout and dtypes: activations are channels_last (NHWC in memory) and their sizes are written N, C, H, W. Activations
and weights share one compute dtype; scales, shifts, statistics and sums are in `accumulator_dtype` of it (fp32, or fp64
for fp64 activations).

The backend `reference` defines the result of every primitive. Another backend implements a subset and reports the rest
in `why_not`, a pure function of a call's metadata (`Call`), so that a backend is chosen before anything runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class BackendUnavailable(RuntimeError):
    """The backend that the user named cannot run this call. The message gives the reason."""


class Geometry(NamedTuple):
    """Stride, padding, dilation and groups of a convolution; the first three hold for rows and columns alike."""

    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    def output_size(self, size: int, kernel: int) -> int:
        """Return the output rows (or columns) for `size` input rows and a filter of `kernel` rows."""
        return (size + 2 * self.padding - self.dilation * (kernel - 1) - 1) // self.stride + 1


class Packed(NamedTuple):
    """A weight in the layout that one backend's `conv` reads.

    weight: a Tensor, or an object private to the backend.
    scale: (K), the scale per output channel that `conv` still has to apply; None if `weight` already contains it.
    shape: (K, C/groups, R, S), the shape of the weight before packing.
    """

    weight: Any
    scale: Tensor | None
    shape: tuple[int, ...]


class Pool(NamedTuple):
    """Max pooling over kernel x kernel windows."""

    kernel: int
    stride: int
    padding: int


# The value in `Pooled.winners` of a window whose gradient goes to no element: its maximum, after ReLU, is 0.
NO_WINNER = 255


class Pooled(NamedTuple):
    """The data that the gradient of ReLU and max pooling needs besides the gradient of the pooled map.

    winners: uint8, of the pooled map's sizes. Each value is the position of the maximum within its window, counted row
        by row, or NO_WINNER.
    size: (H, W) of the map before pooling.
    """

    winners: Tensor
    pool: Pool
    size: tuple[int, int]


class PackedBlock(NamedTuple):
    """A residual block ready for inference: a chain of convolutions with its shortcut.

    weights, geometries: of each convolution of the chain in order, then of the projection if there is one.
    shifts: one per convolution of the chain, each (its K). The last includes the projection's shift.
    shortcut: "projection", "identity", "zero_pad" or "none".
    relu: whether the block ends with a ReLU. Must be True unless `shortcut` is "none".
    """

    weights: Sequence[Packed]
    shifts: Sequence[Tensor]
    geometries: Sequence[Geometry]
    shortcut: str
    relu: bool = True


@dataclass(frozen=True)
class Operand:
    """A tensor together with elementwise work that a kernel applies while loading it. No other tensor is stored.

    The value v that an operand stands for is computed in this order; absent fields are skipped:

    stride          v = every stride-th row and column of `tensor` (and of the other tensors below)
    pooled          v = the gradient before max pooling: each element of the un-pooled map gets the sum of v over the
                    windows whose maximum it was. Requires stride 1; the tensors below then have the un-pooled sizes.
    mask            v = v where the mask keeps it, else 0. One of: a bool tensor of `tensor`'s sizes (True keeps); what
                    the same backend returned for `Epilogue.reduce` = "mask"; an Operand u of one tensor, with at most
                    an affine and a ReLU, which keeps v where not (u <= 0)
    affine          v = a*v + b, with affine = (a, b), each (C)
    second          v = a*v + a2*(tensor2 - mean) + b, with second = (tensor2, a2, mean): a2 and mean are (C). The mean
                    is subtracted before the factor multiplies, so a large mean costs no digits
    relu            v = max(v, 0); NaN stays NaN
                    v is rounded to `tensor`'s dtype
    centre          v = v - centre, (C). fp32 and fp64 only

    tensor: (N, C, H, W). Vectors are in `accumulator_dtype(tensor.dtype)`.
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
        """(N, C, H, W) of the value, after un-pooling and striding."""
        N, C, H, W = self.tensor.shape
        if self.pooled is not None:
            H, W = self.pooled.size
        return N, C, -(-H // self.stride), -(-W // self.stride)

    @property
    def plain(self) -> bool:
        """True if the value is `tensor` itself, with nothing to apply."""
        optional = (self.affine, self.second, self.mask, self.centre, self.pooled)
        return self.stride == 1 and not self.relu and all(value is None for value in optional)


class Normalized(NamedTuple):
    """xhat = (tensor - mean) * rstd per channel: a batch norm's input (N, C, H, W) with its statistics, each (C)."""

    tensor: Tensor
    mean: Tensor
    rstd: Tensor


@dataclass(frozen=True)
class Product:
    """One term of a `conv`: scale * conv(operand, weight), or its data gradient.

    operand: (N, C, H, W); of a data gradient (N, K, P, Q), the gradient of the convolution's output.
    weight: (K, C/groups, R, S) in the operand's dtype, or a `Packed` from the same backend's `pack`, which then holds
        the scale. Of a data gradient always a Tensor.
    scale: one factor per channel of the result, (K), or (C) of a data gradient; None for no scale.
    data_grad_size: (H, W) of the result (N, C, H, W) of a data gradient; None for a forward convolution.
    """

    operand: Operand
    weight: Tensor | Packed
    geometry: Geometry = Geometry()
    scale: Tensor | None = None
    data_grad_size: tuple[int, int] | None = None

    @property
    def packed(self) -> Packed:
        """The weight as a `Packed`; a plain weight is wrapped unchanged."""
        if isinstance(self.weight, Packed):
            return self.weight
        return Packed(self.weight, self.scale, tuple(self.weight.shape))

    def output_sizes(self) -> tuple[int, int, int, int]:
        """Return (N, K, P, Q), or (N, C, H, W) for a data gradient.

        Raises:
            ValueError: the shapes of operand, weight and geometry do not fit together.
        """
        x, shape, g = self.operand.tensor, self.packed.shape, self.geometry
        if x.dim() != 4 or len(shape) != 4:
            raise ValueError(f"conv: expected 4-D operand and weight, got {tuple(x.shape)} and {shape}")
        N, channels, H, W = self.operand.sizes
        K, C, R, S = shape[0], shape[1] * g.groups, shape[2], shape[3]
        expected = C if self.data_grad_size is None else K
        if channels != expected:
            raise ValueError(f"conv: expected an operand of {expected} channels, got sizes {tuple(x.shape)}")
        if K % g.groups:
            raise ValueError(f"conv: expected output channels divisible by {g.groups} groups, got {K}")
        P, Q = (H, W) if self.data_grad_size is None else self.data_grad_size
        out = g.output_size(P, R), g.output_size(Q, S)
        if min(out) < 1:
            raise ValueError(
                f"conv: expected a filter that fits, got {R}x{S} with {g}, which does not fit a map of {P}x{Q}"
            )
        if self.data_grad_size is None:
            return N, K, *out
        if out != (H, W):
            raise ValueError(
                f"conv: expected an operand of {out[0]}x{out[1]} positions for a data gradient of {P}x{Q}, got {H}x{W}"
            )
        return N, C, P, Q


@dataclass(frozen=True)
class Epilogue:
    """The operations on the accumulator t of a `conv` or the value t of a `bn_pass`, in this order:

    t += shift;  t += residual;  t = relu(t);  t = t where mask, else 0;  round to the operand's dtype;  reduce

    shift: (K), in `accumulator_dtype`.
    residual: (N, K, P, Q). It may have fewer channels; the missing ones count as zero.
    upsample: the residual is zero-inserted: its rows and columns land on every upsample-th row and column of the
        result, with zeros between. Its map is then ceil(P/upsample) x ceil(Q/upsample).
    mask: bool of the result's sizes (True keeps), or an Operand u of those sizes, which keeps t where not (u <= 0).
    reduce: what to compute from the result, returned beside it:
        None          nothing
        "stats"       `Stats` of the rounded result
        `Normalized`  (sum(t), sum(t * xhat)) per channel, each (K)
        "mask"        a tensor from which the same backend can read where not (result <= 0), see `Backend.mask_size`
        "winners"     `Pooled.winners`; only `bn_pass` with ReLU and pooling. The first of several equal maxima wins;
                      NO_WINNER where the result is <= 0
    overwrite: the result may reuse the residual's memory.
    """

    shift: Tensor | None = None
    residual: Operand | None = None
    relu: bool = False
    mask: Tensor | Operand | None = None
    reduce: str | Normalized | None = None
    overwrite: bool = False
    upsample: int = 1


class Stats(NamedTuple):
    """Batch statistics of M rows per channel: mean and M2 = sum((row - mean)^2), each (K) in `accumulator_dtype`.

    rows: M; a 0-dim Tensor where statistics of several processes were merged.
    """

    rows: int | Tensor
    mean: Tensor
    M2: Tensor


class Moments(NamedTuple):
    """First and second moments of M rows h of J channels, in `accumulator_dtype`.

    rows: M.
    mean: (J).
    M2: (J, J) = sum over rows of (h - mean)(h - mean)^T.
    centred: h - mean as a plain Operand, if the backend stored it to compute M2 (fp32 and fp64 only); else None.
    """

    rows: int
    mean: Tensor
    M2: Tensor
    centred: Operand | None = None


class Affine(NamedTuple):
    """A batch norm as an affine map y = a*x + b, with the statistics behind it. Every field is (K).

    a = gamma*rstd, b = beta - mean*a, rstd = 1/sqrt(biased variance + eps). var is the unbiased variance, which updates
    the running variance. The fields are the rows of the (5, K) table that `finalize_stats` and `finalize_moments`
    return.
    """

    a: Tensor
    b: Tensor
    mean: Tensor
    rstd: Tensor
    var: Tensor

    @classmethod
    def of(cls, table: Tensor) -> Affine:
        """Return the rows of a (5, K) table as an Affine."""
        return cls(*table.unbind())


class TailGrad(NamedTuple):
    """Gradients of a tail c = h W^T followed by batch norm, where c was never stored.

    dL/dh = g A + (h - centre) B + v, where g is the gradient of the batch norm's output and `centre` is the argument of
    `Backend.finalize_tail_grad`.

    dweight: (K, J) and dgamma: (K), in `accumulator_dtype`.
    A: (K, J) and B: (J, J), in the weight's dtype, ready to be weights of products.
    v: (J), in `accumulator_dtype`.
    """

    dweight: Tensor
    dgamma: Tensor
    A: Tensor
    B: Tensor
    v: Tensor


@dataclass(frozen=True)
class Call:
    """The metadata of a call: everything that `Backend.why_not` may depend on.

    needs: the primitives and features that the call uses.
        Primitives: "conv", "wgrad", "moments", "bn_pass", "finalize", and "gated" (the pass and its gradient).
        Features: "residual"; "two_products"; "lazy" (an Operand's affine, ReLU or stride, or `Epilogue.upsample`);
        "two_tensors" (`Operand.second`); "mask"; "stats"; "reduce" (any other `Epilogue.reduce`); "data_grad"; "pool".
        "training" stands for all primitives and features except "pool" and "gated".
    weights: (shape (K, C/groups, R, S), geometry) of each product.
    size: (N, C, H, W) of the first operand, or () if unknown. Only choices from measured tables depend on it.
    """

    device: torch.device
    dtype: torch.dtype
    needs: frozenset[str]
    weights: tuple[tuple[tuple[int, ...], Geometry], ...] = field(default=())
    size: tuple[int, ...] = ()


def why_unsupported(
    call: Call, supports: frozenset[str], device: str | None, dtypes: Sequence[torch.dtype] | None
) -> str | None:
    """Return why a backend with these capabilities cannot run the call, or None if it can.

    Args:
        supports: the names of `Call.needs` that the backend implements.
        device: the device type it needs; None: any.
        dtypes: the compute dtypes it has; None: any floating dtype.
    """
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
    """Return the metadata of `conv(products, epilogue)`."""
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
    needs = frozenset(name for name, used in present.items() if used)
    return Call(x.device, x.dtype, needs, shapes, tuple(x.shape))


def check_conv(products: Sequence[Product], epilogue: Epilogue) -> tuple[int, int, int, int]:
    """Check the arguments of a `conv` and return the sizes of its result, (N, K, P, Q) or (N, C, H, W).

    Raises:
        ValueError: no products, or shapes that do not fit together.
        TypeError: operands, weights or residual differ in dtype or device from the first operand.
    """
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
            raise TypeError(f"conv: expected a weight in {first.dtype}, the operand's dtype, got {p.weight.dtype}")
        if p.output_sizes() != sizes:
            raise ValueError(f"conv: expected products of equal sizes, got {sizes} and {p.output_sizes()}")
    if epilogue.residual is not None:
        got = epilogue.residual.sizes
        expected = (*sizes[:2], *(-(-n // epilogue.upsample) for n in sizes[2:]))
        if (got[0], *got[2:]) != (expected[0], *expected[2:]) or got[1] > expected[1]:
            raise ValueError(f"conv: expected a residual of {expected}, or of fewer channels, got {got}")
    if epilogue.shift is not None and epilogue.shift.shape != (sizes[1],):
        raise ValueError(f"conv: expected {sizes[1]} shifts, got a shift of sizes {tuple(epilogue.shift.shape)}")
    return sizes


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums, scales, shifts and statistics for activations of `dtype`: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def nhwc_strides(t: Tensor) -> tuple[int, int, int]:
    """Return the strides (image, row, column) of an NHWC tensor in elements. A dimension of size 1 gets the stride that
    a dense map would have, whatever torch reports."""
    N, C, H, W = t.shape
    n, _, h, w = t.stride()
    w = w if W > 1 else C
    h = h if H > 1 else W * w
    return n if N > 1 else H * h, h, w


def tf32_allowed() -> bool:
    """Return whether torch's flags let fp32 convolutions multiply in tf32."""
    cudnn: Any = torch.backends.cudnn
    return cudnn.conv.fp32_precision == "tf32"


def fold(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weight * scale per output channel, computed in `accumulator_dtype` and rounded once to `dtype`. weight:
    (K, C/groups, R, S); scale: (K)."""
    return (weight.to(accumulator_dtype(dtype)) * scale[:, None, None, None]).to(dtype)


class Backend(Protocol):
    """The primitives of a backend. A backend is a module with these names.

    A primitive may be called only if `why_not` returned None for a `Call` that names it; a backend may lack the rest.
    Activations in results are channels_last.

    Raises: `conv` raises TypeError or ValueError for arguments that do not fit (`check_conv`). The other primitives get
    arguments that this package checked; what a backend checks again raises TypeError or ValueError from Python and
    RuntimeError from C++.

    Numerics, for every backend: products accumulate in fp32 (fp64 for fp64 activations) and a result is rounded once,
    at its end, unless the backend's file says otherwise. A mask keeps where not (t <= 0), so that a gradient passes
    where t is NaN. This package's own kernels add in a fixed order, without atomics: the same call gives the same bits.

    A backend may also define the following names; the callers look them up with getattr.

    residual_blocks(x, blocks, overwrite) -> Tensor
        Run consecutive `PackedBlock`s, each with a shortcut. x: (N, C, H, W), channels_last, in the compute dtype.
        overwrite: the result may reuse x's memory. Without it, `ops.block_inference.run` composes blocks from `conv`.
    residual_block(x, block) -> Tensor | None
        Run one block, or return None if no kernel covers all of it.
    stem(x, weight, shift, geometry, pool) -> Tensor
        Return max_pool(relu(conv(x, weight) + shift)). weight comes from `pack_stem(weight, scale, geometry, pool)`. x
        has `stem_channels(sizes of the weight, geometry, pool)` channels; those after the image's own are zero.
    taped(key, tensors, function) -> list[Tensor]
        Return function(), a list of tensors that depends only on `tensors` and `key`. The backend may record the
        launches of a first call and replay them for other tensors of the same sizes.

    Attributes:
        NAME: the name that `use_backend` takes.
        SUPPORTS: the names of `Call.needs` that are implemented.
        PACKS_FOR_SIZE: whether the result of `pack` depends on the operand's size.
    """

    NAME: str
    SUPPORTS: frozenset[str]
    PACKS_FOR_SIZE: bool

    def why_not(self, call: Call) -> str | None:
        """Return None if this backend can run the call, else the reason. A pure function of the metadata in `call`."""

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which activations of `dtype` are computed and stored inside a fused sequence."""

    def images_per_pass(self, image_bytes: int) -> int | None:
        """Return how many images to run at a time through a sequence of blocks, or None for the whole batch.

        Args:
            image_bytes: bytes of the largest pair of consecutive activations of one image.
        """

    def pack(self, weight: Tensor, scale: Tensor, geometry: Geometry, size: Sequence[int], keep: bool = True) -> Packed:
        """Return a weight and its scale in the layout that this backend's `conv` reads.

        Args:
            weight: (K, C/groups, R, S), in the compute dtype.
            scale: (K), in `accumulator_dtype`.
            size: (N, C, H, W) of the operands to come; ignored unless PACKS_FOR_SIZE.
            keep: the result will be reused by many calls, so that more work here pays off.
        """

    def mask_size(self, sizes: Sequence[int]) -> tuple[int, ...] | None:
        """Return the sizes of the uint8 tensor that `Epilogue.reduce` = "mask" returns for a result of (N, K, P, Q), or
        None if the backend returns the result itself, from which the mask is not (result <= 0)."""

    def materialize(self, operand: Operand, kernel: int) -> Operand:
        """Return an operand that several kernels will read, in the form that suits this backend.

        Args:
            kernel: one of the readers is a product with a kernel x kernel filter.

        Returns:
            `operand` unchanged if the readers apply its fields while loading; else a plain Operand, computed once.
        """

    def conv(self, products: Sequence[Product], epilogue: Epilogue) -> tuple[Tensor, Any]:
        """t = epilogue(sum over products of scale * conv(operand, weight)).

        Args:
            products: one or more terms of equal result sizes, all in one dtype on one device.

        Returns:
            (t, reduced): t is (N, K, P, Q), or (N, C, H, W) of data gradients, in the operands' dtype; `reduced` as
            `Epilogue.reduce` says.

        Raises:
            TypeError, ValueError: see `check_conv`.

        Numerics: the scale of a plain weight multiplies the accumulator, not the weight; that of a weight from `pack`
            may be folded into the weight. A backend that departs from this says so in its file.
        """

    def masked_conv(self, products: Sequence[Product], epilogue: Epilogue) -> tuple[Operand, tuple[Tensor, Tensor]]:
        """t = `conv` with a mask and the sums (sum(t), sum(t * xhat)) per channel.

        Args:
            epilogue: with `mask` an Operand and `reduce` a `Normalized`.

        Returns:
            (t, (sum(t), sum(t * xhat))): t as an Operand, which may hold the mask instead of a masked tensor. Sums are
            (K), or (C) of data gradients, in `accumulator_dtype`.
        """

    def wgrad(
        self, g: Operand, x: Operand, kernel: tuple[int, int], geometry: Geometry, sums: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """dweight[k, c, r, s] = sum over output positions of g[k] * x[c] at the position that tap (r, s) reads.

        Args:
            g: (N, K, P, Q), the gradient of the convolution's output.
            x: (N, C, H, W), the convolution's operand.
            kernel: (R, S).
            sums: also return the sum of g per channel.

        Returns:
            (dweight (K, C/groups, R, S), sum of g (K) or None), both in `accumulator_dtype`.
        """

    def moments(self, h: Operand) -> Moments:
        """Return mean = sum(h)/M and M2 = sum((h - mean)(h - mean)^T) over the M = N*P*Q rows of h.

        Args:
            h: (N, J, P, Q).

        Numerics: of the rounded h. The mean is taken out before the products where h is fp32 or fp64.
        """

    def bn_pass(self, x: Operand, epilogue: Epilogue, pool: Pool | None = None) -> tuple[Tensor, Any]:
        """t = epilogue(x), then max-pooled if `pool` is given: one read and one write of memory.

        Args:
            x: (N, C, H, W).
            pool: padding counts as -inf, and NaN is the greatest value, as in torch.

        Returns:
            (t, reduced): t is (N, C, H, W), or of the pooled sizes, in x's dtype; `reduced` as `Epilogue.reduce` says.
        """

    def reduce(self, x: Operand, by: str | Normalized) -> Any:
        """Return what `bn_pass(x, Epilogue(reduce=by))` reduces to, without storing its result. by: "stats" or a
        `Normalized`."""

    def gated(self, z: Tensor, gate: Tensor | None, shortcut: Tensor | None, relu: bool) -> Tensor:
        """y = relu(gate * z + shortcut).

        Args:
            z: (N, K, P, Q), channels_last: the branch of the block.
            gate: (N, K) in `accumulator_dtype`; None counts as one.
            shortcut: (N, K, P, Q), channels_last; None counts as zero.
            relu: False leaves the ReLU out.

        Returns:
            y (N, K, P, Q) in z's dtype, channels_last.

        Numerics: computed in `accumulator_dtype`, rounded once.
        """

    def gated_grad(
        self, dy: Tensor, y: Tensor | None, z: Tensor | None, gate: Tensor | None, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dz = g * gate, dgate = sum over P and Q of g * z, dshortcut = g, where g = dy where not (y <= 0), else 0.

        Args:
            dy: (N, K, P, Q), channels_last.
            y: the result of `gated`, whose ReLU masks dy; None if it had no ReLU: g = dy.
            z: (N, K, P, Q), channels_last. Needed for dgate only.
            gate: (N, K) in `accumulator_dtype`. Needed for dz only.
            wanted: whether to compute each of dz, dgate, dshortcut.

        Returns:
            (dz (N, K, P, Q) in dy's dtype, dgate (N, K) in `accumulator_dtype`, dshortcut (N, K, P, Q) in dy's dtype);
            None for each that was not requested.
        """

    def finalize_stats(self, stats: Stats, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        """rstd = 1/sqrt(M2/rows + eps), a = gamma*rstd, b = beta - mean*a.

        Args:
            gamma, beta: (K), in `accumulator_dtype`.

        Returns:
            The (5, K) table of `Affine`, in gamma's dtype.

        Numerics: computed in fp64 and rounded once. b uses the rounded a.
        """

    def finalize_moments(self, m: Moments, weight: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        """The table of `finalize_stats` for c = h W^T, from the moments of h: mean = W mu, var = diag(W Cov W^T).

        Args:
            m: moments of h over rows of J channels: mu = m.mean, Cov = m.M2 / m.rows.
            weight: W, (K, J).
            gamma, beta: (K), in `accumulator_dtype`.

        Returns:
            The (5, K) table of `Affine`, in gamma's dtype.

        Numerics: a variance that rounding made slightly negative counts as zero; NaN stays NaN.
        """

    def finalize_bn_grad(self, sums: tuple[Tensor, Tensor], rows: int | Tensor, affine: Affine) -> tuple[Tensor, ...]:
        """dL/dc = al*g + be*(c - mean) + const: the coefficients of a batch norm's gradient.

        al = a, be = -a * rstd * sum(g*xhat) / rows, const = -a * sum(g) / rows.

        Args:
            sums: (sum(g), sum(g * xhat)), each (K): also the gradients of beta and gamma.
            rows: M; a Tensor where the rows of several processes were added.

        Returns:
            (al, be, const), each (K) in `accumulator_dtype`.

        Numerics: computed in fp64 and rounded once.
        """

    def finalize_tail_grad(
        self, sg: Tensor, G: Tensor, centre: Tensor | None, m: Moments, weight: Tensor, affine: Affine
    ) -> TailGrad:
        """dL/dh = g A + (h - centre) B + v for c = h W^T and its batch norm, with dweight and dgamma: see `TailGrad`.

        Args:
            sg: (K), sum(g) over rows: also the gradient of beta.
            G: (K, J) = g^T (h - centre), the `wgrad` of g and the centred h.
            centre: (J), or None for zero.
            m: the moments of h from which the statistics of c came.
            weight: W, (K, J).
            affine: the batch norm, from `finalize_moments`.

        Numerics: vectors are computed in fp64 and rounded once. v uses the rounded A and B, so that their rounding does
            not shift the mean of dL/dh.
        """
