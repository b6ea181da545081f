"""The package's layers: what imports what, read from the source, and what `import resnet_kernels` loads."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import resnet_kernels as rk

PACKAGE = Path(rk.__file__).parent
NAME = "resnet_kernels"
# From the top to the bottom: a module imports from its own part and from lower layers. Parts that share a layer do not
# import each other. "" is the root, the public names: its __init__.py imports them when they are first used.
LAYERS = (
    {"cli"},
    {""},
    {"tuning"},
    {"explain"},
    {"analysis"},
    {"testing", "inference"},
    {"models", "replace"},
    {"nn"},
    {"ops"},
    {"backends"},
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def modules():
    """{dotted name below the package: path} of every module; a folder's __init__.py has the folder's name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def type_checking(node):
    """Whether the statement is `if TYPE_CHECKING:`, whose body never runs."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(tree):
    """Every statement that may run, inside functions too."""
    for child in ast.iter_child_nodes(tree):
        if type_checking(child):
            for other in child.orelse:
                yield other
                yield from statements(other)
        else:
            yield child
            yield from statements(child)


def imported_by(name, path, known):
    """{module of the package: line of its first import} that the module imports."""
    package = name.split(".") if name else []
    if path.name != "__init__.py":
        package = package[:-1]
    found = {}
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [NAME, *package][: len(package) + 2 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import name` imports the module of that name, if there is one, and else the package itself.
            for alias in node.names:
                below = f"{module}.{alias.name}"
                targets.append(below if below.removeprefix(f"{NAME}.") in known else module)
        for target in targets:
            if target == NAME or target.startswith(f"{NAME}."):
                found.setdefault(target.removeprefix(NAME).removeprefix("."), node.lineno)
    return found


@functools.cache
def imports():
    """{module: {imported module: line}}. What the root imports does not count."""
    known = modules()
    return {name: imported_by(name, path, known) for name, path in known.items() if name} | {"": {}}


def circles(graph):
    """The sets of more than one node that reach each other, and the nodes that reach themselves directly (Tarjan)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1 or node in graph[node]:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_the_root_holds_the_entry_points_and_folders_alone():
    built = {path.name for path in PACKAGE.glob("_*.so")} | {path.name for path in PACKAGE.glob("_*.pyd")}
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()} - built
    assert files == {"__init__.py", "models.py", "replace.py", "explain.py", "py.typed"}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders | {"", "models", "replace", "explain"} == set(LEVEL)


def test_imports_go_down_through_the_layers():
    upwards = []
    for name, targets in imports().items():
        part = name.split(".")[0]
        for target, line in targets.items():
            other = target.split(".")[0]
            if other != part and LEVEL[other] <= LEVEL[part]:
                upwards.append(f"{name}:{line} imports {target or 'the root'}")
    assert upwards == []


def test_no_circle_among_modules():
    """A folder's __init__.py stands for itself: that a package runs before its modules is no import of theirs."""
    assert circles(imports()) == []


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_circle_among_folders(depth):
    """Folders at a depth below the package; a module outside any such folder counts by itself."""
    known = modules()

    def folder(name):
        parts = name.split(".")
        inside = parts if known[name].name == "__init__.py" else parts[:-1]
        return ".".join(inside[:depth]) if len(inside) >= depth else name

    graph = {}
    for name, targets in imports().items():
        edges = graph.setdefault(folder(name), set())
        # From a folder into itself is no circle of folders.
        edges |= {folder(target) for target in targets} - {folder(name)}
    assert circles(graph) == []


def test_what_is_read_of_imports(tmp_path):
    """The reading itself, on a module with every form of import."""
    path = tmp_path / "module.py"
    path.write_text(
        "from __future__ import annotations\nimport torch\nfrom typing import TYPE_CHECKING\nfrom . import cpu\n"
        "from .contract import Call\nfrom .. import nn\nfrom ..ops import functional\nimport resnet_kernels.models\n"
        "from resnet_kernels import explain\nif TYPE_CHECKING:\n    from .. import cli\n"
        "def deferred():\n    from ..replace import replace_blocks\n    from .. import freeze\n"
    )
    known = {"backends.cpu", "nn", "ops.functional", "explain", "models", "cli"}
    assert imported_by("backends.module", path, known) == {
        "backends.cpu": 4,
        "backends.contract": 5,
        "nn": 6,
        "ops.functional": 7,
        "models": 8,
        "explain": 9,
        "replace": 13,
        "": 14,
    }
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "d"}}) == [["a", "b", "c"], ["d"]]


def test_importing_loads_nothing_that_draws_writes_or_prints():
    """In a process of its own. What torch and torchvision load themselves (torchvision loads Triton) is not ours."""
    names = ["rich", "jinja2", "matplotlib", "onnx", "sklearn", "filelock", "platformdirs", "triton"]
    program = (
        "import sys, torch, torchvision\nbefore = set(sys.modules)\nimport resnet_kernels\n"
        f"print(*sorted({set(names)!r} & (set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert done.stdout.split() == []
