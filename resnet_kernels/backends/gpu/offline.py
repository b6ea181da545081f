"""Compile recorded launches for an architecture, on any machine, and read what came out.

The launches go through Triton's own specialization of their arguments: what is compiled is what a GPU would get.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from .configs import RESERVED, SHARED_MEMORY
from .launch import Launch

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

# What bounds the programs on a multiprocessor, beside shared memory: threads and registers.
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
REGISTERS = 65536


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Of one launch: registers and bytes of stack a thread, bytes of shared memory, and instructions by what they do.

    machine_code: digest of the instructions, without symbols, line numbers and debug information.
    drains: waits for every outstanding matrix product inside a loop, which keep the next from being issued behind it.
    torn: waits for a part of them, in loops whose products read operands from registers that the next step writes.
    """

    arch: int
    registers: int
    stack: int
    shared: int
    warps: int
    matrix: dict[str, int]
    bulk_copies: int
    async_copies: int
    nan_max: int
    plain_max: int
    drains: int
    torn: int
    ptx: str
    machine_code: str

    @property
    def programs(self) -> int:
        """That fit a multiprocessor at once."""
        threads = self.warps * 32
        # Registers are given to warps in steps of 8 a thread.
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * threads)
        limit = SHARED_MEMORY[self.arch] + RESERVED
        by_shared = limit // (self.shared + RESERVED)
        return min(THREADS[self.arch] // threads, by_registers, by_shared)

    def wrong(self) -> list[str]:
        """What no shipped configuration may have."""
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of stack")
        if self.shared > SHARED_MEMORY[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_MEMORY[self.arch]} there are")
        if self.torn:
            found.append(f"{self.torn} waits that leave products reading registers which are written again")
        if self.plain_max:
            found.append(f"{self.plain_max} maxima that drop NaN")
        return found


def machine_code(cubin: bytes) -> dict[str, str]:
    """Return {kernel's symbol: digest of its instructions} of a cubin (64-bit ELF): its sections .text.SYMBOL."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    strings = headers[names][4]
    found = {}
    for name, _, _, _, offset, length in headers:
        start = strings + name
        section = cubin[start : cubin.index(b"\0", start)].decode()
        if section.startswith(".text."):
            found[section.removeprefix(".text.")] = hashlib.sha256(cubin[offset : offset + length]).hexdigest()[:16]
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


def _torn(ptx: str) -> int:
    """Waits for a part only, in loops whose products read registers: what is read may be written by the next step."""
    bodies = [b for b in loop_bodies(ptx) if re.search(r"wgmma\.mma_async[^;]*\}, *\{", b)]
    return sum(len(re.findall(r"wgmma\.wait_group\.sync\.aligned [1-9]", b)) for b in bodies)


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
        "torn": _torn(ptx),
        "ptx": ptx,
    }


def read(launch: Launch, arch: int) -> Compiled:
    """Compile the launch's kernel for the architecture and read its resources and instructions."""
    _, source, options = specialize(launch, arch)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options.__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    registers, stack = map(int, found.groups())
    (code,) = machine_code(kernel.asm["cubin"]).values()
    counts = count(kernel.asm["ptx"])
    return Compiled(
        arch, registers, stack, kernel.metadata.shared, launch.options["num_warps"], **counts, machine_code=code
    )
