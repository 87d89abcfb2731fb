"""csrc/cuda as a building: which file may include what, what nvcc makes of it, and that the library loads beside any
PyTorch. What the kernels compute is in test_gpu_kernels.py, their machine code in test_machine_code.py."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from gpu_kernels import CUDA, ROOT, TENSOR_CORES, TORCH

STANDARD = r"<[a-z0-9_]+>"
PLAIN = r'"\w+_cuda\.h"'
# Files by name, and what they may include: plain headers stand between CUDA and Torch, who never see each other.
ZONES = {
    r"\w+_cuda\.h": ("plain", [STANDARD, PLAIN]),
    r"\w+\.cuh|\w+\.cu": ("CUDA", [STANDARD, PLAIN, r'"\w+\.cuh"', r"<cuda(_\w+)?\.h>"]),
    r"torch_\w+\.h|\w+\.cpp": (
        "Torch",
        [STANDARD, PLAIN, r'"torch_\w+\.h"', r"<torch/(csrc/stable|headeronly)/\S+\.h>", r"<dlfcn\.h>"],
    ),
}


def wrong_includes(name: str, text: str) -> list[str]:
    """The includes of a file of csrc/cuda that its zone does not allow."""
    zone = next((allowed for pattern, (_, allowed) in ZONES.items() if re.fullmatch(pattern, name)), None)
    assert zone is not None, f"csrc/cuda/{name} belongs to no zone; the zones are {list(ZONES)}"
    includes = re.findall(r"^\s*#\s*include\s+(\S+)", text, re.MULTILINE)
    return [include for include in includes if not any(re.fullmatch(allowed, include) for allowed in zone)]


def test_include_zones() -> None:
    files = [f for f in CUDA.iterdir() if f.suffix in (".h", ".cuh", ".cu", ".cpp")]
    assert len(files) > 10
    assert {f.name: wrong for f in files if (wrong := wrong_includes(f.name, f.read_text()))} == {}


@pytest.mark.parametrize(
    ("name", "include"),
    [
        ("conv3x3_cuda.h", "<cuda_runtime.h>"),
        ("conv3x3_cuda.h", "<torch/csrc/stable/tensor.h>"),
        ("conv3x3.cuh", '"torch_ops.h"'),
        ("conv3x3.cu", "<torch/csrc/stable/tensor.h>"),
        ("conv3x3_sm90_cuda.h", "<cuda.h>"),
        ("conv3x3.cpp", '"conv3x3.cuh"'),
        ("conv3x3.cpp", "<cuda_runtime.h>"),
        ("conv3x3.cpp", "<torch/torch.h>"),
        ("torch_ops.h", "<ATen/ATen.h>"),
    ],
)
def test_include_zones_are_checked(name: str, include: str) -> None:
    assert wrong_includes(name, f"#pragma once\n  # include {include}  // why\n") == [include]


def test_the_cuda_of_the_host_declares_no_cooperation_of_threads() -> None:
    """Running a kernel thread by thread would prove nothing about one whose threads wait for each other."""
    cooperation = re.compile(r"__shared__|__sync|__shfl|atomic|asm|ptx\w*\.cuh")
    on_host = [f for f in CUDA.glob("*.cu") if f.name not in TENSOR_CORES]
    assert {f.stem for f in on_host} == {"conv3x3", "maxpool2x2"}
    headers = {name for f in on_host for name in re.findall(r'"(\w+\.cuh)"', f.read_text())}
    while further := {n for h in headers for n in re.findall(r'"(\w+\.cuh)"', (CUDA / h).read_text())} - headers:
        headers |= further
    assert {"conv3x3.cuh", "maxpool2x2.cuh", "launch.cuh", "numeric.cuh"} <= headers
    assert not [f.name for f in [*on_host, *(CUDA / h for h in headers)] if cooperation.search(f.read_text())]


@functools.cache
def build_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_build", CUDA / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nvcc() -> Path:
    found = build_script().find_nvcc()
    if found is None:
        pytest.skip("no nvcc in $CUDA_HOME, on the PATH, in /usr/local/cuda or among the Python packages")
    return found


@pytest.fixture(scope="module")
def library(nvcc: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed library, which the same script has built; where its sources are newer, one built now."""
    sources = max(path.stat().st_mtime for path in CUDA.iterdir() if path.is_file())
    installed = sorted((ROOT / "vgg_fast").glob("_C_cuda*.so"))
    if installed and installed[0].stat().st_mtime > sources:
        return installed[0]
    target = tmp_path_factory.mktemp("cuda") / "_C_cuda.abi3.so"
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None, "nvcc needs a C++ compiler, and none is on the PATH"
    build_script().build(target, nvcc, compiler, TORCH)
    return target


LOAD = """
import sys, torch
torch.ops.load_library(sys.argv[1])
for op in ("conv3x3", "maxpool2x2", "maxpool2x2_backward", "conv_stack", "conv_stack_taps"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vgg_fast_cuda::{op}", "CUDA"), op
    print(getattr(torch.ops.vgg_fast_cuda, op).default._schema)
try:
    torch.ops.vgg_fast_cuda.maxpool2x2(torch.ones(1, 1, 2, 2))
except NotImplementedError as error:
    assert "'CPU' backend" in str(error), error
else:
    raise SystemExit("a CPU tensor was accepted")
"""


def test_the_library_registers_its_ops(library: Path) -> None:
    # In a process of its own: an op can be registered only once.
    done = subprocess.run([sys.executable, "-c", LOAD, str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tail = '(Tensor x, Tensor weight_ohwi, Tensor affine, bool relu, bool pool, str kernel="cuda") -> Tensor'
    assert done.stdout.splitlines()[0] == f"vgg_fast_cuda::conv3x3{tail}"


def test_the_library_needs_nothing_of_cuda(library: Path) -> None:
    """It must load beside a CPU build of PyTorch: CUDA's runtime is inside, libtorch_cuda is looked up at run time."""
    if not shutil.which("readelf"):
        pytest.skip("no readelf on the PATH")
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert {"libtorch_cpu.so", "libc10.so"} <= set(needed)
    assert not [name for name in needed if "cuda" in name or "cudnn" in name or "cublas" in name]
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_the_library_carries_every_architecture(nvcc: Path, library: Path) -> None:
    triton = pytest.importorskip("triton", reason="cuobjdump comes with Triton, which is not installed")
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [cuobjdump, "--list-elf", "--list-ptx", library]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sms = build_script().architectures(nvcc)
    assert {80, 90} <= set(sms)
    hopper = len(list(CUDA.glob("*_sm90.cu")))
    assert len(re.findall(r"\.sm_90a\.cubin", listing)) == hopper > 0, listing
    sources = len(list(CUDA.glob("*.cu"))) - hopper
    for sm in sms:
        assert len(re.findall(rf"\.sm_{sm}\.cubin", listing)) == sources, listing
    assert len(re.findall(rf"\.sm_{sms[-1]}\.ptx", listing)) == sources, listing


@pytest.mark.parametrize(
    ("wanted", "sms"), [("", []), ("80", [80]), ("90,80", [80, 90]), ("8.0;9.0a sm_120", [80, 90, 120])]
)
def test_architectures_may_be_named(monkeypatch: pytest.MonkeyPatch, wanted: str, sms: list[int]) -> None:
    monkeypatch.setenv("VGG_FAST_CUDA_ARCHS", wanted)
    assert build_script().wanted_architectures() == sms
