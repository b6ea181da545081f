"""Compile recorded launches for an architecture, on any machine, and read the resources and instructions of the result.

The launches go through Triton's own specialization of their arguments, so the compiled kernel is the one a GPU would
run.
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

from .configs import RESERVED_SHARED, SHARED_MEMORY
from .launch import Launch

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

# Threads and registers of a multiprocessor: with shared memory, they limit how many CTAs it holds.
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
REGISTERS = 65536


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The resources and instructions of one compiled launch.

    registers, stack: per thread, the latter in bytes. shared: bytes of shared memory per CTA. warps: per CTA.
    matrix: {name: matrix product instructions}. bulk_copies: copies by the tensor copy engine. async_copies: cp.async.
    nan_max, plain_max: maxima that propagate NaN, and that drop it.
    full_waits: waits inside a mainloop for every outstanding matrix product; they keep the next one from overlapping.
    partial_waits: waits for only some of the outstanding products, in loops whose products read operands from registers
    that the next step overwrites: a race.
    machine_code: digest of the instructions, without symbols, line numbers and debug information.
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
    full_waits: int
    partial_waits: int
    ptx: str
    machine_code: str

    @property
    def programs(self) -> int:
        """The number of CTAs (Triton's programs) that fit a multiprocessor at once."""
        threads = self.warps * 32
        # Warps receive registers in steps of 8 per thread.
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * threads)
        limit = SHARED_MEMORY[self.arch] + RESERVED_SHARED
        by_shared = limit // (self.shared + RESERVED_SHARED)
        return min(THREADS[self.arch] // threads, by_registers, by_shared)

    def wrong(self) -> list[str]:
        """Return the defects that no shipped configuration may have."""
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of stack")
        if self.shared > SHARED_MEMORY[self.arch]:
            found.append(f"expected at most {SHARED_MEMORY[self.arch]} bytes of shared memory, got {self.shared}")
        if self.partial_waits:
            found.append(
                f"{self.partial_waits} waits that leave products reading registers that the next step overwrites"
            )
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
    """Return (key, source, options). Launches that share a compiled kernel have equal keys."""
    backend, bind = _binder(launch.kernel, arch)
    bound, specialization, options = bind(**launch.arguments, **launch.options)
    parsed, signature, constants, attributes = launch.kernel._pack_args(
        backend, {**options}, bound, specialization, options
    )
    key = (launch.name, str(specialization), tuple(sorted(options.items())), str(sorted(constants.items(), key=str)))
    return key, ASTSource(launch.kernel, signature, constants, attributes), parsed


def loop_bodies(ptx: str) -> list[str]:
    """Return the loops of a PTX text: for each label, the text from it to the last branch back to it."""
    bodies = []
    for label in re.finditer(r"^(\$L__BB\d+_\d+):", ptx, re.MULTILINE):
        ends = [
            m.end() for m in re.finditer(rf"bra(?:\.uni)?\s+{re.escape(label[1])};", ptx) if m.start() > label.end()
        ]
        if ends:
            bodies.append(ptx[label.end() : ends[-1]])
    return bodies


def _full_waits(ptx: str) -> int:
    """Count waits for all outstanding wgmma inside innermost loops that multiply."""
    bodies = [b for b in loop_bodies(ptx) if "wgmma.mma_async" in b]
    inner = [b for b in bodies if not any(o is not b and o in b for o in bodies)]
    return sum(b.count("wgmma.wait_group.sync.aligned 0") for b in inner)


def _partial_waits(ptx: str) -> int:
    """Count waits for only some outstanding wgmma, in loops whose products read an operand from registers: the next
    step may overwrite registers that a product still reads."""
    bodies = [b for b in loop_bodies(ptx) if re.search(r"wgmma\.mma_async[^;]*\}, *\{", b)]
    return sum(len(re.findall(r"wgmma\.wait_group\.sync\.aligned [1-9]", b)) for b in bodies)


def count(ptx: str) -> dict[str, Any]:
    """Return the fields of `Compiled` that count instructions of a PTX text."""
    names = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
    return {
        "matrix": {name: ptx.count(instruction) for name, instruction in names.items() if instruction in ptx},
        "bulk_copies": len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", ptx)),
        "async_copies": len(re.findall(r"cp\.async\.c[ag]\.shared", ptx)),
        "nan_max": len(re.findall(r"max\.NaN\.(?:bf16|f16|f32)", ptx)),
        "plain_max": len(re.findall(r"max\.(?:bf16|f16|f32|ftz)", ptx)),
        "full_waits": _full_waits(ptx),
        "partial_waits": _partial_waits(ptx),
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
