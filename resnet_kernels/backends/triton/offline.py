"""Compile recorded launches for an architecture, on any machine, and read what came out.

The launches go through Triton's own specialization of their arguments: what is compiled is what a GPU would get.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from .configs import RESERVED, shared_memory
from .launch import Launch

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

# What bounds the programs on a multiprocessor, beside shared memory: threads and registers.
THREADS = {80: 2048, 90: 2048, 100: 2048, 120: 1536}
REGISTERS = 65536


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Of one launch: registers and bytes of stack a thread, loads from it (spills that are read back), bytes of shared
    memory, and instructions by what they do.

    drains: waits for every outstanding matrix product inside a loop, which keep the next from being issued behind it.
    """

    arch: int
    registers: int
    stack: int
    stack_loads: int
    shared: int
    warps: int
    matrix: dict[str, int]
    bulk_copies: int
    async_copies: int
    nan_max: int
    plain_max: int
    drains: int
    ptx: str

    @property
    def programs(self) -> int:
        """That fit a multiprocessor at once."""
        threads = self.warps * 32
        # Registers are given to warps in steps of 8 a thread.
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * threads)
        limit = shared_memory(self.arch) + RESERVED
        by_shared = limit // (self.shared + RESERVED)
        return min(THREADS[self.arch] // threads, by_registers, by_shared)

    def wrong(self) -> list[str]:
        """What no shipped configuration may have."""
        found = []
        # ptxas zeroes 8 bytes for every tensor copy's kernel on sm_120, and never reads them.
        if self.stack_loads or self.stack > (8 if self.arch == 120 else 0):
            found.append(f"{self.stack} bytes of stack, {self.stack_loads} loads from it")
        if self.shared > shared_memory(self.arch):
            found.append(f"{self.shared} bytes of shared memory, {shared_memory(self.arch)} there are")
        if self.plain_max:
            found.append(f"{self.plain_max} maxima that drop NaN")
        return found


@functools.cache
def _binder(kernel: Any, arch: int) -> tuple[Any, Any]:
    backend = make_backend(GPUTarget("cuda", arch, 32))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def specialize(launch: Launch, arch: int) -> tuple[Any, ASTSource, Any]:
    """(a key equal for launches that share a compiled kernel, the source, the options)."""
    backend, bind = _binder(launch.kernel, arch)
    bound, specialization, options = bind(**launch.arguments, **launch.options)
    parsed, signature, constants, attributes = launch.kernel._pack_args(
        backend, {**options}, bound, specialization, options
    )
    key = (launch.name, str(specialization), tuple(sorted(options.items())), str(sorted(constants.items(), key=str)))
    return key, ASTSource(launch.kernel, signature, constants, attributes), parsed


def loop_bodies(ptx: str) -> list[str]:
    """The text between each label and the last branch back to it."""
    bodies = []
    for label in re.finditer(r"^(\$L__BB\d+_\d+):", ptx, re.MULTILINE):
        ends = [
            m.end() for m in re.finditer(rf"bra(?:\.uni)?\s+{re.escape(label[1])};", ptx) if m.start() > label.end()
        ]
        if ends:
            bodies.append(ptx[label.end() : ends[-1]])
    return bodies


def _drains(ptx: str) -> int:
    """Full waits inside innermost loops that multiply."""
    bodies = [b for b in loop_bodies(ptx) if "wgmma.mma_async" in b]
    inner = [b for b in bodies if not any(o is not b and o in b for o in bodies)]
    return sum(b.count("wgmma.wait_group.sync.aligned 0") for b in inner)


def count(ptx: str) -> dict[str, Any]:
    """`Compiled`'s instructions."""
    names = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
    return {
        "matrix": {name: ptx.count(instruction) for name, instruction in names.items() if instruction in ptx},
        "bulk_copies": len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", ptx)),
        "async_copies": len(re.findall(r"cp\.async\.c[ag]\.shared", ptx)),
        "nan_max": len(re.findall(r"max\.NaN\.(?:bf16|f16|f32)", ptx)),
        "plain_max": len(re.findall(r"max\.(?:bf16|f16|f32|ftz)", ptx)),
        "drains": _drains(ptx),
        "ptx": ptx,
    }


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


def read(launch: Launch, arch: int) -> Compiled:
    """Compile the launch's kernel for the architecture and read its resources and instructions."""
    _, source, options = specialize(launch, arch)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options.__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "--dump-resource-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found is not None, usage
        registers, stack = map(int, found.groups())
        loads = len(re.findall(r"\bLDL\b", _output("nvdisasm", "-c", file.name))) if stack else 0
    return Compiled(
        arch, registers, stack, loads, kernel.metadata.shared, launch.options["num_warps"], **count(kernel.asm["ptx"])
    )
