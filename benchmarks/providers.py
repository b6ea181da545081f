"""The providers that compute a case: peers as an experienced user would run them, and this package's implementations.

Peers are PyTorch (eager, folded, torch.compile), timm, OpenVINO, ONNX Runtime and cuDNN's graphs. `build` of a provider
returns one function of the case's inputs per mode: "call", launched from Python, and "graph", one captured CUDA graph.
`measure` captures the calls of a provider that has no graph of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import resnet_kernels as rk
from resnet_kernels.backends import select
from resnet_kernels.backends.contract import Backend, Epilogue, Geometry, Operand, Product, call_of
from resnet_kernels.ops.batch_norm import affine_of

from . import cudnn_graph
from .cases import Case, ConvAct, ConvStats, ConvWgrad, Prepared, loss_of
from .folding import folded

# Sets of sections in which a provider takes part.
INFERENCE = frozenset({"primitives", "blocks", "inference"})
MODELS = frozenset({"blocks", "inference"})
ALONE = frozenset({"inference"})


@dataclasses.dataclass
class Built:
    """runs: the function of the inputs, by mode. module: the module of a training step, whose gradients are checked."""

    runs: dict[str, Callable[..., Any]]
    module: nn.Module | None = None


@dataclasses.dataclass(frozen=True)
class Provider:
    """An implementation to measure.

    peer: True for implementations other than this package's.
    sections: those in which it takes part. devices: those on which it runs.
    build: returns the functions to check and time.
    why_not: returns why it cannot compute a case on this machine, or None.
    contiguous: its inputs are NCHW; if False, channels_last.
    keeps_memory: it holds memory between calls, so that the memory of a single call cannot be measured.
    patience: seconds that building for a whole network may take on a GPU machine and on two CPU cores. It is not begun
        if fewer are left.
    """

    name: str
    peer: bool
    sections: frozenset[str]
    build: Callable[[Prepared, Case], Built]
    devices: tuple[str, ...] = ("cpu", "cuda")
    why_not: Callable[[Prepared, Case], str | None] = lambda prepared, case: None
    contiguous: bool = False
    keeps_memory: bool = False
    patience: tuple[float, float] = (1.0, 5.0)

    def __str__(self) -> str:
        return self.name

    def patience_on(self, device: torch.device, section: str) -> float:
        """Return the seconds that building may take. Convolutions and blocks take less than whole networks."""
        seconds = self.patience[0 if device.type == "cuda" else 1]
        if section in ("inference", "training"):
            return seconds
        return 10.0 if seconds > 20 else min(seconds, 1.0)


def _copied(prepared: Prepared) -> nn.Module:
    return copy.deepcopy(prepared.module)


def _nhwc(prepared: Prepared) -> nn.Module:
    return _copied(prepared).to(memory_format=torch.channels_last)


def _no_grad(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Tensor) -> Any:
        with torch.no_grad():
            return function(*inputs)

    return run


def _step(module: nn.Module, case: Case) -> Built:
    """Return the forward and backward of a training step, which allocates its gradients anew each time."""
    module.train()

    def run(*inputs: Tensor) -> Tensor:
        module.zero_grad(set_to_none=True)
        _, loss = loss_of(module, inputs, case.dtype)
        loss.backward()
        return loss

    return Built({"call": run}, module)


def _inference_or_step(module: nn.Module, case: Case) -> Built:
    return _step(module, case) if case.training else Built({"call": _no_grad(module)})


# Peers


def _eager(prepared: Prepared, case: Case) -> Built:
    return _inference_or_step(_copied(prepared), case)


def _channels_last(prepared: Prepared, case: Case) -> Built:
    return _inference_or_step(_nhwc(prepared), case)


def _folded(prepared: Prepared, case: Case) -> Built:
    return Built({"call": _no_grad(folded(prepared.module))})


def _inductor(prepared: Prepared, case: Case, mode: str | None = None) -> Built:
    # fullgraph: what cannot be compiled is an error. It must not fall back to eager.
    compiled = torch.compile(_nhwc(prepared), mode=mode, dynamic=False, fullgraph=True)
    if case.training:
        return _step(compiled, case)

    # Inductor's freezing folds batch norms and packs weights, as rk.freeze does. It is needed while compiling only.
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        compiled(*prepared.inputs[0])
    # max-autotune captures CUDA graphs by itself.
    return Built({"graph" if mode == "max-autotune" else "call": _no_grad(compiled)})


def _timm_why_not(prepared: Prepared, case: Case) -> str | None:
    if importlib.util.find_spec("timm") is None:
        return "timm is not installed"
    import timm

    return None if case.name in timm.list_models() else f"timm has no {case.name}"


def _timm(prepared: Prepared, case: Case) -> Built:
    import timm

    module = timm.create_model(case.name, pretrained=False)
    module.load_state_dict(prepared.module.state_dict())
    like = next(prepared.module.parameters())
    module = module.eval().to(like.device, like.dtype, memory_format=torch.channels_last)
    return _inference_or_step(module, case)


def _exported(prepared: Prepared, path: Path) -> None:
    """Write the module, with batch norms folded, as ONNX for the inputs' sizes."""
    module = folded(prepared.module).to(memory_format=torch.contiguous_format)
    inputs = tuple(t.contiguous() for t in prepared.inputs[0])
    torch.onnx.export(module, inputs, path, dynamo=True, optimize=True, verbose=False)


def _missing(package: str) -> Callable[[Prepared, Case], str | None]:
    """Return the `why_not` of a peer in this Python package, which is measured in fp32 only."""

    def why_not(prepared: Prepared, case: Case) -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (pip install -e '.[peers]')"
        return None if case.dtype == "fp32" else f"{package} is measured in fp32 only, got {case.dtype}"

    return why_not


def _openvino(prepared: Prepared, case: Case) -> Built:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        _exported(prepared, Path(folder, "model.onnx"))
        model = openvino.Core().read_model(Path(folder, "model.onnx"))
    # The dtype is given because by default OpenVINO may choose a narrower one.
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    options["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino.Core().compile_model(model, "CPU", options)

    def run(*inputs: Tensor) -> Tensor:
        return torch.from_numpy(compiled([t.numpy() for t in inputs])[0])

    return Built({"call": run})


def _onnxruntime(prepared: Prepared, case: Case) -> Built:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        _exported(prepared, Path(folder, "model.onnx"))
        session = onnxruntime.InferenceSession(
            str(Path(folder, "model.onnx")), options, providers=["CPUExecutionProvider"]
        )
    names = [i.name for i in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        given = dict(zip(names, (t.numpy() for t in inputs), strict=True))
        return torch.from_numpy(session.run(None, given)[0])

    return Built({"call": run})


def _cudnn_why_not(prepared: Prepared, case: Case) -> str | None:
    if isinstance(prepared.module, ConvWgrad):
        return "a weight gradient has nothing to fuse: eager PyTorch already runs cuDNN's"
    return cudnn_graph.why_not()


def _cudnn(prepared: Prepared, case: Case) -> Built:
    return Built({"call": _no_grad(cudnn_graph.fuse(prepared.module))})


# Ours


def _by(backend: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, run by the named backend; None: by the automatic choice."""
    if backend is None:
        return function

    @functools.wraps(function)
    def run(*inputs: Tensor) -> Any:
        with rk.use_backend(backend):
            return function(*inputs)

    return run


def _replaced(prepared: Prepared, case: Case, backend: str | None = None) -> Built:
    module = _nhwc(prepared)
    rk.replace_blocks(module)
    built = _inference_or_step(module, case)
    built.runs = {mode: _by(backend, run) for mode, run in built.runs.items()}
    return built


def _frozen(prepared: Prepared, case: Case, backend: str | None = None) -> Built:
    with rk.use_backend(backend):
        if not prepared.inputs[0][0].is_cuda:
            return Built({"call": rk.freeze(prepared.module)})
        modes = {"call": False, "graph": True}
        return Built({mode: rk.freeze(prepared.module, cuda_graphs=graphs) for mode, graphs in modes.items()})


def _conv(prepared: Prepared, case: Case, backend: str) -> Built:
    """Return a primitive by a backend's contract: a convolution with packed weight, statistics or a weight gradient."""
    b, module = select.BY_NAME[backend], prepared.module
    if isinstance(module, ConvWgrad):
        kernel, of = tuple(module.conv1.weight.shape[2:]), _geometry(module.conv1)
        # Rounded to the dtype of x, as PyTorch's weight gradient is.
        return Built({"call": lambda x, dy: b.wgrad(Operand(dy), Operand(x), kernel, of)[0].to(x.dtype)})
    if isinstance(module, ConvStats):
        return Built({"call": _no_grad(functools.partial(_with_statistics, b, module.conv1))})
    assert isinstance(module, ConvAct)
    x, *residual = prepared.inputs[0]
    with torch.no_grad():
        scale, shift = affine_of(module.bn1)
        weight, geometry = module.conv1.weight.detach(), _geometry(module.conv1)
        packed = b.pack(weight, scale, geometry, tuple(x.shape))

    def run(x: Tensor, *residual: Tensor) -> Tensor:
        added = Operand(residual[0]) if residual else None
        return b.conv([Product(Operand(x), packed, geometry)], Epilogue(shift, added, relu=True))[0]

    return Built({"call": _no_grad(run)})


def _with_statistics(b: Backend, conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return conv(x), its sum and its sum of squares per channel, from the backend's (rows, mean, M2)."""
    c, stats = b.conv([Product(Operand(x), conv.weight, _geometry(conv))], Epilogue(reduce="stats"))
    return c, stats.mean * stats.rows, stats.M2 + stats.rows * stats.mean.square()


def _geometry(conv: nn.Conv2d) -> Geometry:
    assert not isinstance(conv.padding, str)
    return Geometry(conv.stride[0], conv.padding[0], conv.dilation[0], conv.groups)


def _conv_why_not(prepared: Prepared, case: Case, backend: str) -> str | None:
    """Return why the backend does not run the case's primitive, or None."""
    module = prepared.module
    x, *residual = prepared.inputs[0]
    product = Product(Operand(x), module.conv1.weight, _geometry(module.conv1))
    if isinstance(module, ConvWgrad):
        of = ((tuple(module.conv1.weight.shape), product.geometry),)
        call = select.Call(x.device, x.dtype, frozenset({"wgrad"}), of, tuple(x.shape))
    else:
        reduce = "stats" if isinstance(module, ConvStats) else None
        call = call_of([product], Epilogue(residual=Operand(residual[0]) if residual else None, reduce=reduce))
    return select.BY_NAME[backend].why_not(call)


def _block_why_not(prepared: Prepared, case: Case, backend: str) -> str | None:
    """Return why the backend does not run the case's blocks, or None.

    The answer is that for a 3x3 convolution with a residual in the case's dtype, which stands for all of them.
    """
    x = prepared.inputs[0][0]
    needs, weights = frozenset({"conv", "residual"}), (((64, 64, 3, 3), Geometry(1, 1)),)
    return select.BY_NAME[backend].why_not(select.Call(x.device, x.dtype, needs, weights))


def _of_backend(backend: str, devices: tuple[str, ...]) -> list[Provider]:
    """Return the providers of a named backend: single convolutions, replaced blocks and frozen models."""

    def bind(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(function, backend=backend)

    why = bind(_block_why_not)
    # Training by a named backend is measured only if the automatic choice ("replaced") may be another one.
    trained = {"training"} if backend in ("gpu", "gpu:triton", "gpu:sm90", "gpu:cuda") else set()
    return [
        Provider(backend, False, frozenset({"primitives"}), bind(_conv), devices, bind(_conv_why_not)),
        Provider(f"replaced {backend}", False, frozenset({"blocks"} | trained), bind(_replaced), devices, why),
        Provider(f"frozen {backend}", False, MODELS, bind(_frozen), devices, why),
    ]


def _everywhere() -> frozenset[str]:
    return INFERENCE | {"training"}


# In the order of the tables.
PROVIDERS: list[Provider] = [
    Provider("eager", True, _everywhere(), _eager, contiguous=True),
    Provider("eager channels_last", True, _everywhere(), _channels_last),
    Provider("eager folded", True, MODELS | {"primitives"}, _folded),
    Provider("timm", True, frozenset({"inference", "training"}), _timm, why_not=_timm_why_not, patience=(3.0, 10.0)),
    Provider("cudnn graph", True, INFERENCE, _cudnn, ("cuda",), _cudnn_why_not, patience=(30.0, 0.0)),
    Provider("openvino", True, ALONE, _openvino, ("cpu",), _missing("openvino"), True, True, (0.0, 30.0)),
    Provider("onnxruntime", True, ALONE, _onnxruntime, ("cpu",), _missing("onnxruntime"), True, True, (0.0, 30.0)),
    Provider("inductor", True, MODELS | {"training"}, _inductor, patience=(25.0, 60.0)),
    Provider(
        "inductor max-autotune",
        True,
        ALONE,
        functools.partial(_inductor, mode="max-autotune"),
        ("cuda",),
        keeps_memory=True,
        patience=(50.0, 0.0),
    ),
    Provider("replaced", False, MODELS | {"training"}, _replaced),
    Provider("frozen", False, MODELS, _frozen),
    *_of_backend("cpu", ("cpu",)),
    *_of_backend("gpu", ("cuda",)),
    *_of_backend("gpu:sm90", ("cuda",)),
    *_of_backend("gpu:cuda", ("cuda",)),
    *_of_backend("library", ("cpu", "cuda")),
]


def providers_of(section: str, device: str, names: list[str] | None = None) -> list[Provider]:
    """Return the providers that take part in a section on a device; if names are given, only those of these names."""
    found = [p for p in PROVIDERS if section in p.sections and device in p.devices]
    return found if names is None else [p for p in found if p.name in names]
