"""Profiles the kernels of a frozen ResNet-50 with Nsight Compute (ncu).

`command` returns the ncu command line, `rows` reads its output. `python -m benchmarks.ncu` is the program that ncu
runs.
"""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import torch
import torchvision

import resnet_kernels as rk
from resnet_kernels.analysis.results import Row
from resnet_kernels.testing import randomize_

# Images; kernels that ncu profiles; kernels that are reported.
BATCH, KERNELS, SLOWEST = 256, 40, 8

# ncu's metrics by our name. Their names depend on the GPU's generation: the first one in the output counts.
METRICS = {
    "seconds": ("gpu__time_duration.sum",),
    "dram_share": (
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    ),
    "dram_bytes_per_second": ("dram__bytes.sum.per_second", "dram__bytes_read.sum.per_second"),
    "l2_share": (
        "lts__throughput.avg.pct_of_peak_sustained_elapsed",
        "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    ),
    "tensor_share": (
        "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active",
        "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    ),
    "occupancy": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "registers": ("launch__registers_per_thread",),
}
UNITS = {"ns": 1e-9, "us": 1e-6, "usecond": 1e-6, "nsecond": 1e-9, "ms": 1e-3, "msecond": 1e-3, "s": 1.0, "second": 1.0}
BYTES = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12}


def command(tool: str, out: Path) -> list[str]:
    """Return the command that profiles this module and writes CSV to `out`. tool: path of ncu.

    Clocks are left as they are. ncu is given sections and not names of metrics, because a name that the GPU does not
    know would be an error.
    """
    sections = ["SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "Occupancy", "LaunchStats"]
    chosen = [word for section in sections for word in ("--section", section)]
    return [
        *(tool, "--clock-control", "none", "--profile-from-start", "off", "--launch-count", str(KERNELS)),
        *chosen,
        *("--csv", "--page", "raw", "--log-file", str(out), sys.executable, "-m", "benchmarks.ncu"),
    ]


def _metrics(values: dict[str, str], unit: dict[str, str]) -> dict[str, float]:
    """Return one kernel's METRICS by our names, in seconds and bytes, from ncu's values and units by column."""
    found = {}
    for name, candidates in METRICS.items():
        for metric in candidates:
            value = values.get(metric, "").replace(",", "")
            if value and value.replace(".", "", 1).replace("-", "", 1).isdigit():
                units, key = (UNITS, unit[metric]) if name == "seconds" else (BYTES, unit[metric].split("/")[0])
                found[name] = float(value) * units.get(key, 1.0)
                break
    return found


def rows(text: str) -> list[Row]:
    """Return the slowest kernels in ncu's CSV (`--page raw`: a line of names, one of units, then one per kernel)."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return []
    header, units, *kernels = csv.reader(io.StringIO("\n".join(lines)))
    unit = dict(zip(header, units, strict=False))
    found = []
    for i, fields in enumerate(kernels):
        values = dict(zip(header, fields, strict=False))
        metrics = _metrics(values, unit)
        name = values.get("Kernel Name", "?").split("(")[0]
        row = Row(
            "profile", "resnet50", "frozen triton", "ok", part=f"{i}: {name}", dtype="bf16", batch=BATCH, size=224
        )
        row.seconds, row.metrics = metrics.pop("seconds", None), metrics
        found.append(row)
    slowest = sorted(found, key=lambda row: -(row.seconds or 0))[:SLOWEST]
    return [row for row in found if row in slowest]


@torch.no_grad()
def main() -> None:
    """Run the frozen model twice, the second time for the profiler."""
    model = randomize_(torchvision.models.resnet50()).eval().to("cuda", torch.bfloat16)
    x = torch.randn(BATCH, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    with rk.use_backend("gpu"):
        frozen = rk.freeze(model, cuda_graphs=False)
    frozen(x)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    frozen(x)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
