"""Compile launches ahead of their first run, in processes of their own on all cores, into Triton's cache.

`python -m resnet_kernels.backends.triton.ahead` is such a process. It is no fork and no multiprocessing worker: the
caller may hold a CUDA context, and its main module may not be importable.
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

# A launch without its kernel, whose module and name stand for it.
Sent = tuple[str, str, Launch]


def _compile(sent: Sequence[Sent], arch: int) -> list[offline.Compiled | str]:
    found: list[offline.Compiled | str] = []
    for module, name, launch in sent:
        kernel = getattr(importlib.import_module(module), name)
        try:
            found.append(
                offline.read(Launch(kernel, launch.grid, launch.arguments, launch.options, "", launch.work), arch)
            )
        except Exception as error:  # whatever the compiler raises: that configuration does not exist
            found.append(f"{type(error).__name__}: {error}")
    return found


def compile_all(launches: Sequence[Launch], arch: int, workers: int | None = None) -> list[offline.Compiled | str]:
    """What each of the recorded launches compiles to, or why it does not. workers: processes; None: one a core."""
    workers = min(workers or os.cpu_count() or 1, len(launches))
    sent = [
        (
            made.kernel.__module__,
            made.kernel.__name__,
            Launch(None, made.grid, made.arguments, made.options, "", made.work),
        )
        for made in launches
    ]
    processes = []
    for i in range(workers):
        # Files, not pipes: nobody waits for a pipe to be read.
        jobs, out = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        pickle.dump((sent[i::workers], arch), jobs)
        jobs.seek(0)
        command = [sys.executable, "-m", __name__]
        processes.append((subprocess.Popen(command, stdin=jobs, stdout=out, stderr=subprocess.PIPE, text=True), out))
    found: list[offline.Compiled | str] = [""] * len(launches)
    for i, (process, out) in enumerate(processes):
        _, errors = process.communicate()
        if process.returncode:
            # The compiler took the process with it: what that one was given stays unknown.
            found[i::workers] = [f"the compiler ended with {process.returncode}: {errors[-300:]}"] * len(
                sent[i::workers]
            )
            continue
        out.seek(0)
        found[i::workers] = pickle.loads(out.read())
    return found


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # Triton prints there what ptxas refuses
        result = _compile(*pickle.load(sys.stdin.buffer))
    sys.stdout.buffer.write(pickle.dumps(result))
