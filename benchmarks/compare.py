"""Whole models with every provider in one process, its turns interleaved: the numbers to quote.

    python -m benchmarks.compare --model resnet50 --dtype fp32 --batch 16 --out benchmarks/results/NAME.json

A provider whose result is outside the rule of `testing.compare` has no time.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import subprocess
from pathlib import Path

import torch
import torchvision

from resnet_kernels.testing import compare, randomize_

from .providers import BASELINES, OURS, arrange, interleaved, peak_gflops, provider, synchronize

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device, dtype = ("cuda" if torch.cuda.is_available() else "cpu"), DTYPES[args.dtype]
    torch.manual_seed(0)
    model = randomize_(torchvision.models.get_model(args.model)).eval().to(device, dtype)
    x = torch.randn(args.batch, 3, 224, 224, device=device).to(dtype)
    want = model(x)
    exact = torch.cat([copy.deepcopy(model).double()(part.double()) for part in x.split(16)])
    runs, rows = {}, {}
    for name in BASELINES + OURS:
        module, data = provider(name, model), arrange(name, x)
        module(data)
        errors = compare(module(data), want, exact, 2048)
        rows[name] = {"rms_error": errors.rms, "eager_rms_error": errors.eager_rms, "ok": errors.ok}
        if errors.ok:
            runs[name] = lambda module=module, data=data: module(data)
    times = interleaved(runs, args.rounds, lambda: synchronize(x))
    best = min(times[name]["median"] for name in BASELINES if name in times)
    print(f"{args.model} {args.dtype} batch {args.batch} on {processor()}, {torch.get_num_threads()} threads")
    for name, row in rows.items():
        if name in times:
            seconds = times[name]
            row |= seconds | {
                "images_per_second": args.batch / seconds["median"],
                "against_best_baseline": best / seconds["median"],
            }
            print(
                f"{name:22s} {row['images_per_second']:8.2f} img/s  ({args.batch / seconds['p80']:.2f} to "
                f"{args.batch / seconds['p20']:.2f})  {row['against_best_baseline']:.2f}x the best baseline"
            )
        else:
            print(f"{name:22s} wrong, so not timed: rms error {row['rms_error']:.1e}")
    if args.out:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
        ).stdout.strip()
        facts = {
            "model": args.model,
            "dtype": args.dtype,
            "batch": args.batch,
            "rounds": args.rounds,
            "processor": processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "peak_gflops": peak_gflops(device, torch.float32 if device == "cpu" else dtype),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "commit": commit,
            "date": datetime.date.today().isoformat(),
        }
        args.out.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
