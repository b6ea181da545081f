"""Compile launches before their first run, in worker processes on all cores, into Triton's cache.

`python -m resnet_kernels.backends.gpu.ahead` is a worker. It is neither forked nor a multiprocessing worker, because
the caller may hold a CUDA context, and the caller's main module may not be importable.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from . import offline
from .launch import Launch

# A launch that can be pickled: (the kernel's module, the kernel's name, the launch without its kernel).
PickledLaunch = tuple[str, str, Launch]


def _compile(launches: Sequence[PickledLaunch], arch: int) -> list[offline.Compiled | str]:
    found: list[offline.Compiled | str] = []
    for module, name, launch in launches:
        kernel = getattr(importlib.import_module(module), name)
        try:
            found.append(
                offline.read(Launch(kernel, launch.grid, launch.arguments, launch.options, "", launch.work), arch)
            )
        except Exception as error:  # whatever the compiler raises, this configuration cannot run
            found.append(f"{type(error).__name__}: {error}")
    return found


def compile_all(launches: Sequence[Launch], arch: int, workers: int | None = None) -> list[offline.Compiled | str]:
    """Return for each recorded launch what it compiles to, or the error message.

    workers: the number of processes; None: one per core.
    """
    workers = min(workers or os.cpu_count() or 1, len(launches))
    pickled = [
        (
            made.kernel.__module__,
            made.kernel.__name__,
            Launch(None, made.grid, made.arguments, made.options, "", made.work),
        )
        for made in launches
    ]
    processes = []
    for i in range(workers):
        # Files, not pipes: a worker would block on a full pipe until this process reads from it.
        jobs, out = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        pickle.dump((pickled[i::workers], arch), jobs)
        jobs.seek(0)
        command = [sys.executable, "-m", __name__]
        processes.append((subprocess.Popen(command, stdin=jobs, stdout=out, stderr=subprocess.PIPE, text=True), out))
    found: list[offline.Compiled | str] = [""] * len(launches)
    for i, (process, out) in enumerate(processes):
        _, errors = process.communicate()
        if process.returncode:
            # The compiler crashed the worker: all launches of that worker get the error.
            error = f"the compiler's process ended with {process.returncode}: {errors[-300:]}"
            found[i::workers] = [error] * len(pickled[i::workers])
            continue
        out.seek(0)
        found[i::workers] = pickle.loads(out.read())
    return found


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # Triton prints ptxas's errors to stdout
        result = _compile(*pickle.load(sys.stdin.buffer))
    sys.stdout.buffer.write(pickle.dumps(result))
