"""What is compared: PyTorch as a knowledgeable user would run it, and ours. Used by every benchmark."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import resnet_kernels as rk

BASELINES: tuple[str, ...] = ("eager", "eager channels_last", "inductor")
OURS: tuple[str, ...] = ("replaced", "frozen")
if torch.cuda.is_available():
    BASELINES += ("inductor max-autotune",)
    OURS += ("frozen triton",)


def provider(name: str, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model as the provider runs it, in inference. The model is not changed."""
    model = copy.deepcopy(model).eval()
    if name == "frozen":
        return rk.freeze(model)
    if name == "frozen triton":
        with rk.use_backend("triton"):
            return rk.freeze(model)
    if name != "eager":
        model.to(memory_format=torch.channels_last)
    if name == "replaced":
        rk.replace_blocks(model)
    if name.startswith("inductor"):
        # Freezing folds the batch norms and packs the weights, as freeze does. max-autotune captures CUDA graphs too.
        compiled = torch.compile(model, mode="max-autotune" if name.endswith("max-autotune") else None)

        def run(x: Tensor) -> Tensor:
            with torch._inductor.config.patch(freezing=True):
                return compiled(x)

        return run
    return model


def arrange(name: str, x: Tensor) -> Tensor:
    """The input in the layout the provider likes best."""
    return x.contiguous() if name == "eager" else x.contiguous(memory_format=torch.channels_last)


def synchronize(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


@functools.cache
def peak_gflops(device: str, dtype: torch.dtype) -> float:
    """The best rate a dense product or a 3x3 convolution of torch reaches here: what shares of the peak refer to."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    images = 256 if device == "cuda" else 4
    x = torch.randn(images, 256, 28, 28, device=device).to(dtype, memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    work = {2 * n**3: lambda: a @ b, 2 * images * 28 * 28 * 9 * 256**2: lambda: nn.functional.conv2d(x, w, padding=1)}
    best = 0.0
    with torch.no_grad():
        for flops, run in work.items():
            run()
            for _ in range(10):
                synchronize(x)
                start = time.perf_counter()
                run()
                synchronize(x)
                best = max(best, flops / (time.perf_counter() - start) / 1e9)
    return best


def interleaved(
    runs: dict[str, Callable[[], object]], rounds: int, after: Callable[[], None]
) -> dict[str, dict[str, float]]:
    """Seconds of each run as median, p20 and p80, over rounds in which every run has its turn, in rotating order."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            after()
            start = time.perf_counter()
            runs[name]()
            after()
            seconds[name].append(time.perf_counter() - start)
    out = {}
    for name, s in seconds.items():
        deciles = statistics.quantiles(s, n=10, method="inclusive")
        out[name] = {"median": statistics.median(s), "p20": deciles[1], "p80": deciles[7]}
    return out
