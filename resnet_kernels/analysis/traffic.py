"""The bytes that a convolution, a residual block or a ResNet must move through device memory, and its operations.

Both follow from shapes alone. They are the floor under measured times.

A plan says which kernels compute a block. A kernel is written as a line, "name: tensors it reads -> tensors it writes".
Every tensor counts as a whole and once, or twice if the line names it twice. The names, with convolutions 1 to n (n = 3
in a bottleneck, 2 in a basic block):

    x y dx dy        the block's input and result, and their gradients
    W1 dW1           the weight of convolution 1, and its gradient
    c1 z1 h1         the output of convolution 1; z1 = a*c1 + b, its batch norm; h1 = relu(z1)
    dc1 dh1 gh1      the gradients of c1 and h1; gh1 = dh1 where h1 > 0, else 0
    g mask           g = dy where y > 0, else 0; the mask holds y > 0, one bit per element
    r                the residual: x with an identity, the subsampled x with zero padding; absent with a projection
    gr maskr         the part of dy and mask that the shortcut's gradient reads: r's channels; with a projection, all
    xs Ws dWs        of a projection: the part of x that it reads, its weight, and the weight's gradient
    cs zs dcs        of a projection: its output, the output's batch norm, and the gradient of cs
    s                the zero-padded shortcut, where a plan materializes it
    dx1 dxs          the gradient of x through the convolutions, and through a shortcut other than the identity
    gs               the gradient of xs through the projection, or g with zero padding, where a plan materializes it
    cov covs         the covariances of h2 and of xs, channels x channels, in fp32
    B Bs             the matrices, channels x channels, that multiply h2 and xs in the data gradients

A tensor that a block does not have counts nothing. A kernel whose results are all absent is left out.

Operations: a kernel that reads a weight or writes its gradient does the convolution's multiply-adds (those of the
padding included), two operations each. A kernel that writes cov or reads B does channels^2 multiply-adds per position.
So training takes three times the operations of the forward, less the stem's data gradient, which is not needed; "lazy"
and "materialised" add those of cov and B.

Neglected: vectors per channel; partial sums, and what small kernels make of them and of cov (8 MB an image for
ResNet-50's blocks at batch 256, mostly in a cache); loss and optimizer; arithmetic other than matrix products. Weights
and their gradients are counted in the dtype of the activations, feature maps as channels_last.

No tensor is assumed to stay in a cache from one kernel to the next. With a batch so small that it does, less moves.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from ..backends import select
from ..backends.contract import Geometry
from ..nn import fusable
from ..nn.gated import Gated
from ..ops.spec import map_sizes

Sizes = Sequence[int]

# Plans for inference. convolution: one kernel per convolution, with its batch norm, ReLU and residual. tail: one kernel
# for the first convolution, and one for all others and the projection. block: one kernel, which reads x and writes y.
# The stem is one kernel in each plan.
INFERENCE = ("convolution", "tail", "block")
# Plans for training with batch statistics.
# eager: PyTorch's kernels.
# lazy: normalised activations are recomputed while loading, and neither c3 nor a bottleneck's cs is ever stored. This
# is a bound only: the package has no 3x3 convolutions of its own for training.
# materialised: the plan of the Triton kernels. Convolutions other than 1x1 are a library's, which reads plain operands
# and has no epilogue for statistics, sums and masks; cs is never stored.
TRAINING = ("eager", "lazy", "materialised")
PLANS = INFERENCE + TRAINING


class Need(NamedTuple):
    """What a computation needs at least. bytes: moved through device memory. flops: operations."""

    bytes: int = 0
    flops: int = 0

    def plus(self, other: Need) -> Need:
        return Need(*map(operator.add, self, other))

    def seconds(self, memory: float, matrix: float) -> float:
        """Return the least seconds at `memory` bytes/s and `matrix` operations/s."""
        return max(self.bytes / memory, self.flops / matrix)


class Kernel(NamedTuple):
    """One launch of a plan: its name, the names of the tensors it reads and writes, and what it needs.

    Launches run one after the other. The sum of their least times is a higher floor than the least time of their sum.
    """

    what: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    need: Need


def total(needs: Iterable[Need]) -> Need:
    """Return the sum of bytes and the sum of operations."""
    return reduce(Need.plus, needs, Need())


# The line of a plan that separates the kernels of the forward from those of the backward.
BACKWARD = "backward"


def _inference(plan: str, n: int) -> list[str]:
    """Return the lines of a block of n convolutions under a plan for inference."""
    rest = " ".join(f"W{i}" for i in range(2, n + 1))
    if plan == "block":
        return [f"block: x W1 {rest} Ws -> y"]
    if plan == "tail":
        return ["conv1: x W1 -> h1", f"tail: h1 {rest} r xs Ws -> y"]
    inner = ["conv1: x W1 -> h1", "conv2: h1 W2 -> h2"][: n - 1]
    return [*inner, "projection: xs Ws -> zs", f"conv{n}: h{n - 1} W{n} r zs -> y"]


def _eager(n: int, shortcut: str) -> list[str]:
    """Return the lines of a training step of n convolutions by PyTorch's kernels.

    A batch norm reads its operands twice: first for the statistics or sums, then to normalise. ReLU and addition work
    in place (h overwrites z).
    """
    h = ["x", "h1", "h2"]
    added, dx_shortcut = {"identity": ("x", "g"), "projection": ("zs", "dxs"), "zero_pad": ("s", "dxs")}[shortcut]
    lines = []
    for i in range(1, n + 1):
        lines += [f"conv{i}: {h[i - 1]} W{i} -> c{i}", f"bn{i}: c{i} c{i} -> z{i}"]
        lines += [f"relu{i}: z{i} -> h{i}"] * (i < n)
    lines += ["projection: xs Ws -> cs", "bn of projection: cs cs -> zs", "zero padding: r -> s"]
    lines += [f"add: z{n} {added} -> z{n}", f"relu: z{n} -> y"]
    lines += [BACKWARD, "relu: dy y -> g"]
    for i in range(n, 0, -1):
        lines += [f"relu{i}: dh{i} h{i} -> gh{i}"] * (i < n)
        g, d = "g" if i == n else f"gh{i}", "dx1" if i == 1 else f"dh{i - 1}"
        lines += [f"bn{i}: {g} c{i} {g} c{i} -> dc{i}"]
        lines += [f"weight gradient {i}: dc{i} {h[i - 1]} -> dW{i}", f"data gradient {i}: dc{i} W{i} -> {d}"]
    lines += ["bn of projection: g cs g cs -> dcs", "weight gradient of projection: dcs xs -> dWs"]
    lines += ["data gradient of projection: dcs Ws -> dxs"] * (shortcut == "projection")
    lines += ["zero padding: gr -> dxs"] * (shortcut == "zero_pad")
    return [*lines, f"add: dx1 {dx_shortcut} -> dx"]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


# The statistics of a 1x1 convolution follow from the mean and covariance of its operand: var3[k] = W3[k] cov W3[k]^T
# for output channel k. So its scale and shift are known before it runs, c3 is not stored, and the backward reads h2
# instead: dh2 = g A + h2 B + v, with A of W3's size. Other statistics, and the two sums of a batch norm's backward, are
# taken in epilogues; h = relu(a*c + b) and dc = al*gh + be*c + constant are computed while loading.
LAZY_BOTTLENECK = _lines("""
    conv1: x W1 -> c1
    conv2: c1 W2 -> c2
    moments of h2: c2 -> cov
    moments of xs: xs -> covs
    conv3, projection, add, relu: c2 W3 r xs Ws -> y mask
    backward
    weight gradient 3: dy mask c2 -> dW3
    weight gradient of projection: dy mask xs -> dWs
    data gradient 3: dy mask c2 W3 B -> gh2
    weight gradient 2: gh2 c2 c1 -> dW2
    data gradient 2: gh2 c2 c1 W2 -> gh1
    weight gradient 1: gh1 c1 x -> dW1
    data gradients of 1 and the shortcut: gh1 c1 W1 gr maskr xs Ws Bs -> dx
""")
# The launches of ops/chain_training.py, as roofline.py records them. ADDED stands for the tensors that the shortcut
# adds to y, BACK for those that it adds to the gradient of x.
MATERIALISED_BOTTLENECK = _lines("""
    conv1: x W1 -> c1
    normalise: c1 -> h1
    conv2: h1 W2 -> c2
    statistics: c2 ->
    moments of h2: c2 -> cov
    moments of xs: xs -> covs
    zero padding: r -> s
    conv3, projection, add, relu: c2 W3 ADDED xs Ws -> y mask
    backward
    weight gradient of projection: dy mask xs -> dWs
    data gradient of the shortcut: dy mask xs Ws Bs -> gs
    weight gradient 3: dy mask c2 -> dW3
    data gradient 3: dy mask c2 W3 B -> gh2
    bn2: gh2 c2 -> dc2
    normalise: c1 -> h1
    weight gradient 2: dc2 h1 -> dW2
    data gradient 2: dc2 W2 -> dh1
    sums of gh1: dh1 c1 ->
    weight gradient 1: dh1 c1 x -> dW1
    data gradient 1, add: dh1 c1 W1 BACK -> dx
""")
# No convolution of a basic block is 1x1, so the outputs of the last convolution and of the projection are stored.
LAZY_BASIC = _lines("""
    conv1: x W1 -> c1
    conv2: c1 W2 -> c2
    projection: xs Ws -> cs
    bn2, bn of projection, add, relu: c2 r cs -> y mask
    backward
    sums of g: dy mask c2 cs ->
    weight gradient 2: dy mask c2 c1 -> dW2
    weight gradient of projection: dy mask cs xs -> dWs
    data gradient 2: dy mask c2 c1 W2 -> gh1
    weight gradient 1: gh1 c1 x -> dW1
    data gradients of 1 and the shortcut: gh1 c1 W1 gr maskr cs Ws -> dx
""")
MATERIALISED_BASIC = _lines("""
    conv1: x W1 -> c1
    statistics: c1 ->
    normalise: c1 -> h1
    conv2: h1 W2 -> c2
    statistics: c2 ->
    moments of xs: xs -> covs
    zero padding: r -> s
    projection, bn2, add, relu: c2 ADDED xs Ws -> y mask
    backward
    weight gradient of projection: dy mask xs -> dWs
    data gradient of the shortcut: dy mask xs Ws Bs -> gs
    sums of g: dy mask c2 ->
    bn2: dy mask c2 -> dc2
    normalise: c1 -> h1
    weight gradient 2: dc2 h1 -> dW2
    data gradient 2: dc2 W2 -> dh1
    sums of gh1: dh1 c1 ->
    relu1, bn1: dh1 c1 -> dc1
    weight gradient 1: dc1 x -> dW1
    data gradient 1: dc1 W1 -> dx1
    add: dx1 BACK -> dx
""")


def _block_lines(plan: str, n: int, shortcut: str) -> list[str]:
    """Return the lines of a block of n convolutions. shortcut: "identity", "projection" or "zero_pad"."""
    if plan in INFERENCE:
        return _inference(plan, n)
    if plan == "eager":
        return _eager(n, shortcut)
    if plan == "lazy":
        return LAZY_BOTTLENECK if n == 3 else LAZY_BASIC
    added, back = {"identity": ("r", "gr maskr"), "projection": ("", "gs"), "zero_pad": ("s", "gr")}[shortcut]
    lines = MATERIALISED_BOTTLENECK if n == 3 else MATERIALISED_BASIC
    return [line.replace("ADDED", added).replace("BACK", back) for line in lines]


# The stem: y = max_pool(relu(bn(c))). indices: the positions of the maxima as PyTorch stores them, 8 bytes each.
# winners: the same as this package stores them, one byte each. "lazy" searches c for them again.
STEM = {
    "inference": ["conv, bn, relu, pool: x W -> y"],
    "eager": _lines("""
        conv: x W -> c
        bn: c c -> z
        relu: z -> h
        pool: h -> y indices
        backward
        pool: dy indices -> dh
        relu: dh h -> g
        bn: g c g c -> dc
        weight gradient: dc x -> dW
    """),
    "eager, without a pool": _lines("""
        conv: x W -> c
        bn: c c -> z
        relu: z -> y
        backward
        relu: dy y -> g
        bn: g c g c -> dc
        weight gradient: dc x -> dW
    """),
    "lazy": _lines("""
        conv: x W -> c
        bn, relu, pool: c -> y
        backward
        sums of g: dy c ->
        weight gradient: dy c x -> dW
    """),
    "materialised": _lines("""
        conv: x W -> c
        statistics: c ->
        bn, relu, pool: c -> y winners
        backward
        sums of g: dy winners c ->
        pool, relu, bn: dy winners c -> dc
        weight gradient: dc x -> dW
    """),
}
# The head: y = W p + bias, with p the mean of x over the feature map. W and dW include the bias.
HEAD = _lines("""
    pool: x -> p
    classifier: p W -> y
    backward
    weight gradient: dy p -> dW
    data gradient: dy W -> dp
    pool: dp -> dx
""")


class _Part:
    """The kernels of a stem, block or head.

    Args:
        lines: the part's lines under a plan.
        sizes: the bytes of each tensor, by name.
        flops: the operations of a kernel that names this tensor, for the tensors that stand for a matrix product.
    """

    def __init__(self, lines: Sequence[str], sizes: dict[str, int], flops: dict[str, int]) -> None:
        self.sizes = sizes
        self.forward: list[Kernel] = []
        self.backward: list[Kernel] = []
        kernels = self.forward
        for line in lines:
            if line == BACKWARD:
                kernels = self.backward
                continue
            what, _, moved = line.partition(": ")
            reads, writes = (tuple(side.split()) for side in moved.split("->"))
            if not writes or any(sizes[name] for name in writes):
                needs = (Need(sizes[name], flops.get(name, 0)) for name in reads + writes)
                kernels.append(Kernel(what, reads, writes, total(needs)))

    def saved(self) -> set[str]:
        """Return the names of x and the forward's results that the backward reads and does not recompute."""
        part_of = {"xs": "x", "r": "x", "maskr": "mask"}
        read = {part_of.get(name, name) for k in self.backward for name in k.reads}
        available = {"x"}.union(*(k.writes for k in self.forward)).difference(*(k.writes for k in self.backward))
        return available & read


def reached(size: int, kernel: int, g: Geometry) -> int:
    """Return how many of `size` rows (or columns) are read by at least one tap of a filter of `kernel` taps."""
    outputs = range(g.output_size(size, kernel))
    taps = {p * g.stride - g.padding + r * g.dilation for p in outputs for r in range(kernel)}
    return len(taps & set(range(size)))


class _Convolution(NamedTuple):
    """Elements of a convolution's operand that the filter reads, of its weight and of its output; its operations."""

    x: int
    weight: int
    y: int
    flops: int


def _convolution(x_sizes: Sizes, weight_sizes: Sizes, g: Geometry) -> _Convolution:
    """x_sizes: (N, C, H, W). weight_sizes: (K, C/groups, R, S), K output channels, an R x S filter."""
    (N, C, H, W), (K, terms, R, S) = x_sizes, weight_sizes
    if C != terms * g.groups:
        raise ValueError(f"x: expected {terms * g.groups} channels, got {tuple(x_sizes)}")
    y = N * K * g.output_size(H, R) * g.output_size(W, S)
    return _Convolution(N * C * reached(H, R, g) * reached(W, S, g), K * terms * R * S, y, 2 * y * terms * R * S)


def _elements(*counts: tuple[int, str]) -> dict[str, int]:
    """Return {name: count} from pairs of a count and the space-separated names that have it."""
    return {name: count for count, names in counts for name in names.split()}


def _bytes(elements: dict[str, int], itemsize: int) -> dict[str, int]:
    """Return bytes by name: covariances are at least fp32, masks one bit per element, the rest `itemsize` bytes."""
    sizes = {name: itemsize * count for name, count in elements.items()}
    sizes |= {name: max(4, itemsize) * elements[name] for name in ("cov", "covs") if name in elements}
    return sizes | {name: -(-elements[name] // 8) for name in ("mask", "maskr") if name in elements}


def _check_block(module: nn.Module) -> None:
    if not isinstance(module, (resnet.BasicBlock, resnet.Bottleneck)):
        raise TypeError(f"expected a torchvision ResNet, BasicBlock or Bottleneck, got {type(module).__name__}")
    if isinstance(module, Gated):
        raise TypeError(f"expected blocks that are one op, got {type(module).__name__}, whose gate is a second op")


def _block(block: nn.Module, x_sizes: Sizes, itemsize: int, plan: str) -> _Part:
    _check_block(block)
    p = fusable.parts(block)
    if isinstance(p, str):
        raise ValueError(p)
    N, C, H, W = x_sizes
    weights, geometries = [tuple(c.weight.shape) for c in p.convs], [fusable.geometry(c) for c in p.convs]
    operands, maps = map_sizes((C, H, W), weights, geometries, p.shortcut)
    convs = [_convolution((N, *o), w, g) for o, w, g in zip(operands, weights, geometries, strict=True)]
    n, (K, P, Q) = len(maps) - 1, maps[-1]
    x, y = N * C * H * W, N * K * P * Q
    projected = p.shortcut == "projection"
    projection = convs[n] if projected else _Convolution(0, 0, 0, 0)
    added = N * min(C, K) * P * Q
    # convs[0].x and not x: a strided 1x1 as the first convolution reads no more of x than the shortcut does.
    counts = [(convs[0].x, "x"), (x, "dx dx1 dxs"), (y, "y dy g mask")]
    counts += [(0 if projected else added, "r"), (y if projected else added, "gr maskr")]
    counts += [(projection.x, "xs"), (projection.weight, "Ws dWs"), (projection.y, "cs zs dcs")]
    padded = y if p.shortcut == "zero_pad" else 0
    counts += [(padded, "s"), (projection.x + padded, "gs")]
    products = [(projection.flops, "Ws dWs")]
    for i, conv in enumerate(convs[:n], 1):
        counts += [(conv.y, f"c{i} z{i} h{i} dc{i} dh{i} gh{i}"), (conv.weight, f"W{i} dW{i}")]
        products += [(conv.flops, f"W{i} dW{i}")]
    for channels, names in ((maps[n - 1][0], "cov B"), (C if projected else 0, "covs Bs")):
        counts += [(channels**2, names)]
        products += [(2 * N * P * Q * channels**2, names)]
    lines = _block_lines(plan, n, p.shortcut)
    return _Part(lines, _bytes(_elements(*counts), itemsize), _elements(*products))


def _stem(model: resnet.ResNet, x: Sizes, y: int, itemsize: int, plan: str) -> _Part:
    reason = fusable.why_not_convolution(model.conv1)
    if reason:
        raise ValueError(f"conv1: {reason}")
    conv = _convolution(x, model.conv1.weight.shape, fusable.geometry(model.conv1))
    elements = _elements((conv.x, "x"), (conv.weight, "W dW"), (conv.y, "c z h dc dh g"), (y, "y dy"))
    unpooled = plan == "eager" and isinstance(model.maxpool, nn.Identity)
    lines = STEM["inference" if plan in INFERENCE else "eager, without a pool" if unpooled else plan]
    return _Part(lines, _bytes(elements, itemsize) | {"indices": 8 * y, "winners": y}, _elements((conv.flops, "W dW")))


def _head(model: resnet.ResNet, x: Sizes, p: Sizes, y: Sizes, itemsize: int, plan: str) -> _Part:
    parameters = list(model.fc.parameters())
    flops = 2 * x[0] * sum(w.numel() for w in parameters if w.dim() == 2)
    elements = _elements((math.prod(x), "x dx"), (math.prod(p), "p dp"), (math.prod(y), "y dy"))
    elements |= _elements((sum(w.numel() for w in parameters), "W dW"))
    lines = HEAD[: HEAD.index(BACKWARD)] if plan in INFERENCE else HEAD
    return _Part(lines, _bytes(elements, itemsize), _elements((flops, "W dW")))


def _shapes(model: nn.Module, x_sizes: Sizes) -> dict[str, tuple[Sizes, Sizes]]:
    """Return (input sizes, result sizes) of conv1, each block, avgpool and fc, by name, in the order they run.

    A copy of the model on meta tensors runs for it, so no memory is taken.
    """
    tensors = [*model.parameters(), *model.buffers()]
    # deepcopy takes an object's copy from the memo if it is there: here each tensor's copy is its meta tensor.
    copied = copy.deepcopy(model, {id(t): t.detach().to("meta") for t in tensors}).eval()
    shapes: dict[str, tuple[Sizes, Sizes]] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        return lambda module, args, y: shapes.update({name: (args[0].shape, y.shape)})

    for name, module in copied.named_modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
        if name in ("conv1", "avgpool", "fc") or isinstance(module, (resnet.BasicBlock, resnet.Bottleneck)):
            module.register_forward_hook(remember(name))
    with torch.no_grad(), select.use_backend(select.EAGER):
        copied(torch.empty(tuple(x_sizes), dtype=next(copied.parameters()).dtype, device="meta"))
    return shapes


def block_sizes(module: nn.Module, x_sizes: Sizes) -> dict[str, Sizes]:
    """Return the input sizes (N, C, H, W) of every block of a ResNet, by the block's name; for a block, by "".

    Raises TypeError for other modules.
    """
    if not isinstance(module, resnet.ResNet):
        _check_block(module)
        return {"": x_sizes}
    outside = ("conv1", "avgpool", "fc")
    found = {name: sizes for name, (sizes, _) in _shapes(module, x_sizes).items() if name not in outside}
    for name in found:
        _check_block(module.get_submodule(name))
    return found


def _parts(module: nn.Module, x_sizes: Sizes, itemsize: int, plan: str) -> dict[str, _Part]:
    if plan not in PLANS:
        raise ValueError(f"plan: expected one of {', '.join(PLANS)}, got {plan!r}")
    if not isinstance(module, resnet.ResNet):
        return {"block": _block(module, x_sizes, itemsize, plan)}
    shapes = _shapes(module, x_sizes)
    (x, _), (last, p), (_, y) = (shapes.pop(name) for name in ("conv1", "avgpool", "fc"))
    pooled = math.prod(next(iter(shapes.values()))[0])
    blocks = {name: _block(module.get_submodule(name), sizes, itemsize, plan) for name, (sizes, _) in shapes.items()}
    stem, head = _stem(module, x, pooled, itemsize, plan), _head(module, last, p, y, itemsize, plan)
    return {"stem": stem, **blocks, "head": head}


def kernels(module: nn.Module, x_sizes: Sizes, itemsize: int, plan: str) -> dict[str, list[Kernel]]:
    """Return the kernels that a plan launches.

    Args:
        module: a torchvision ResNet, or one of its BasicBlocks or Bottlenecks, or subclasses of these. It is neither
            changed nor run. It may be on any device, in training or in evaluation mode.
        x_sizes: (N, C, H, W) of its input: images, channels, height, width.
        itemsize: bytes per element of activations and weights.
        plan: one of PLANS.
    Returns:
        For a ResNet the kernels of its "stem", of each block by the block's name, and of its "head", in the order in
        which the forward runs; each part's backward follows its forward. For a block its kernels, as "block".
    Raises:
        TypeError: another module.
        ValueError: another plan; or sizes, a shortcut or a stem that are not supported.
    """
    return {name: p.forward + p.backward for name, p in _parts(module, x_sizes, itemsize, plan).items()}


def parts(module: nn.Module, x_sizes: Sizes, itemsize: int, plan: str) -> dict[str, Need]:
    """Return what each part of `kernels` needs; arguments as for `kernels`."""
    launched = kernels(module, x_sizes, itemsize, plan)
    return {name: total(k.need for k in part) for name, part in launched.items()}


def block(module: nn.Module, x_sizes: Sizes, itemsize: int, plan: str = "block") -> Need:
    """Return what a BasicBlock or Bottleneck needs; arguments as for `kernels`."""
    return parts(module, x_sizes, itemsize, plan)["block"]


def convolution(x_sizes: Sizes, weight_sizes: Sizes, geometry: Geometry, itemsize: int, residual: bool = False) -> Need:
    """Return what a convolution needs: every operand is read and the result written once.

    Counted are the part of x (N, C, H, W) that the filter reads, the weight (K, C/groups, R, S), y (N, K, P, Q) and a
    residual of y's sizes. K: output channels, R, S: filter, P, Q: height and width of y. Weight and data gradient need
    as much, except that the data gradient writes all of x's gradient.
    """
    c = _convolution(x_sizes, weight_sizes, geometry)
    return Need(itemsize * (c.x + c.weight + c.y * (1 + residual)), c.flops)


def saved(module: nn.Module, x_sizes: Sizes, itemsize: int, plan: str) -> int:
    """Return the bytes that a training plan saves in the forward for the backward, the module's input included.

    Not counted: weights, vectors per channel, and matrices such as cov, whose sizes do not depend on the input's.
    Arguments as for `kernels`.
    """
    found: dict[tuple[int, str], int] = {}
    x = 0
    for i, part in enumerate(_parts(module, x_sizes, itemsize, plan).values()):
        for name in part.saved():
            # A part's input is the result of the part before. If both save it, it counts once.
            shared = name == "x" and i > 0
            found[(i - 1, "y") if shared else (i, name)] = x if shared else part.sizes[name]
        x = part.sizes["y"]
    return sum(found.values())
