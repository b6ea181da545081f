"""The ctypes structures that Python fills are laid out as the C headers declare them, field by field."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from resnet_kernels.backends.gpu.cuda import calls
from resnet_kernels.backends.gpu.sm90 import launchers

CSRC = Path(__file__).parents[1] / "csrc"


def structures_in(module):
    found = [s for s in vars(module).values() if isinstance(s, type) and issubclass(s, ctypes.Structure)]
    return [s for s in found if hasattr(s, "C_NAME")]


@pytest.mark.parametrize(
    "header, module", [("cuda/api.h", calls), ("cuda/sm90/api.h", launchers)], ids=["cuda", "sm90"]
)
def test_every_field_lies_where_the_header_puts_it(header, module, tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    structures = structures_in(module)
    assert len(structures) > 5
    lines, expected = [], []
    for s in structures:
        lines.append(f'std::printf("{s.C_NAME} %zu\\n", sizeof({s.C_NAME}));')
        expected.append(f"{s.C_NAME} {ctypes.sizeof(s)}")
        for name, *_ in s._fields_:
            lines.append(f'std::printf("{s.C_NAME}.{name} %zu\\n", offsetof({s.C_NAME}, {name}));')
            expected.append(f"{s.C_NAME}.{name} {getattr(s, name).offset}")
    source = tmp_path / "offsets.cpp"
    includes = f'#include <cstddef>\n#include <cstdio>\n#include "{header}"\n'
    source.write_text(f"{includes}int main() {{\n" + "\n".join(lines) + "\n}\n")
    command = [compiler, "-std=c++17", "-w", f"-I{CSRC}", str(source), "-o", str(tmp_path / "offsets")]
    subprocess.run(command, check=True)
    found = subprocess.run([tmp_path / "offsets"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert found == expected
