"""The rules of the house that a reader relies on: who imports whom, in Python and in C++."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "vgg_fast").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))

# From the meaning of things up to the command line; a module may import from its own layer and from lower ones.
LAYERS = [
    {"reference", "fold", "locks"},
    {"testing"},
    {"library", "kernels", "precision"},
    {"selection"},
    {"ops"},
    {"gpu"},
    {"container"},
    {"accelerate", "explain"},
    {"models"},
    {"bench"},
    {"verify"},
    {"cli"},
]
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports, ``from a import b`` as ``a.b``."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = {0: "", 1: f"vgg_fast.{path.parent.name}."}[node.level] + (node.module or "")
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def layer_of(dotted: str) -> int | None:
    """The layer of ``vgg_fast.<module>...``; None for anything else and for the package's own public names."""
    parts = dotted.split(".")
    return LAYER.get(parts[1]) if parts[0] == "vgg_fast" and len(parts) > 1 else None


def test_the_rules_name_every_module():
    modules = {p.relative_to(ROOT / "vgg_fast").parts[0].removesuffix(".py") for p in PACKAGE}
    assert modules - {"__init__"} | {"kernels"} == set(LAYER)


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_imports_go_down(path):
    if path == ROOT / "vgg_fast/__init__.py":
        return  # the public face imports whatever it offers
    module = path.relative_to(ROOT / "vgg_fast").parts[0].removesuffix(".py")
    for name in imports(path):
        assert name.split(".")[0] not in ("tests", "benchmarks"), f"{path.name} imports {name}"
        level = layer_of(name)
        assert level is None or level <= LAYER[module], f"{path.name} imports {name}, which lies above it"


@pytest.mark.parametrize("name", ["reference", "fold", "testing"])
def test_the_specification_needs_torch_only(name):
    allowed = {"torch", "vgg_fast", "__future__", "collections", "dataclasses", "enum", "math"}
    assert {i.split(".")[0] for i in imports(ROOT / f"vgg_fast/{name}.py")} <= allowed


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_triton_kernels_know_nothing_of_the_package_above(path):
    above = {i for i in imports(path) if i.split(".")[0] == "vgg_fast" and not i.startswith("vgg_fast.kernels")}
    assert not above


def test_importing_the_package_is_light():
    """No optional or heavy module comes along with ``import vgg_fast``."""
    heavy = ["triton", "PIL", "typer", "rich", "h5py", "keras", "safetensors", "torchvision", "vgg_fast.cli"]
    code = f"import sys, torch; had = set(sys.modules); import vgg_fast; print(set({heavy}) & (set(sys.modules) - had))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


# C++: plain headers <- device and ISA files, Torch-facing files; bindings only register.

INTRINSICS = {"immintrin.h"}
TORCH_FACING = {"bindings.cpp", "torch_cpu.h", "conv3x3.cpp", "conv_stack.cpp", "pack.cpp", "maxpool2x2.cpp"} | {
    "fingerprint.cpp",
    "batch_norm.cpp",
    "conv3x3_backward.cpp",
    "linear.cpp",
    "stack.cpp",
}
CPU = [ROOT / "csrc/bindings.cpp", ROOT / "csrc/conv3x3.h", *sorted((ROOT / "csrc/cpu").iterdir())]


def includes(path: Path) -> set[str]:
    """What a C++ file includes itself."""
    return set(re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', path.read_text(), re.M))


@pytest.mark.parametrize("path", CPU, ids=lambda p: p.name)
def test_cpp_zones(path):
    included = includes(path)
    torch = {i for i in included if i.startswith("torch/") or i.endswith("torch_cpu.h")}
    if path.name in TORCH_FACING:
        assert not included & INTRINSICS, "intrinsics belong into the ISA files"
        stable = ("torch/csrc/stable/", "torch/headeronly/", "torch_cpu.h", "cpu/torch_cpu.h")
        assert all(i.startswith(stable) for i in torch), "only the stable ABI"
    else:
        assert not torch, "torch belongs into the Torch-facing files"


def test_isa_files_set_the_target_by_function():
    """A pragma or a compiler flag for a whole file would leak AVX code into shared weak symbols."""
    for path in CPU:
        text = path.read_text()
        assert "#pragma GCC target" not in text, path
        if "immintrin.h" in includes(path):
            assert "#define VGG_TARGET __attribute__((target(" in text, path
    assert "-march" not in (ROOT / "setup.py").read_text()
    assert "-mavx" not in (ROOT / "setup.py").read_text()


def test_every_microkernel_has_its_file_and_prototype():
    table = re.findall(r"^MICROKERNEL(?:_WINOGRAD)?\((\w+),", (ROOT / "csrc/cpu/microkernels.inc").read_text(), re.M)
    assert table[-1] == "portable_f32"
    header = (ROOT / "csrc/conv3x3.h").read_text()
    sources = "".join(p.read_text() for p in CPU if p.name.startswith("conv3x3_") and p.suffix == ".cpp")
    for name in table:
        assert f"void conv3x3_{name}(" in header
        assert f"void conv3x3_{name}(" in sources
