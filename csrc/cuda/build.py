"""Builds csrc/cuda into one shared library: nvcc for the .cu files, the C++ compiler for the Torch-facing ones.

    python csrc/cuda/build.py vgg_fast/_C_cuda.abi3.so

Neither a GPU nor a CUDA build of PyTorch is needed: the library uses PyTorch's stable ABI only, carries the CUDA
runtime inside, and looks up the one function it needs of libtorch_cuda at run time (torch_device.cpp).

nvcc comes from $CUDA_HOME, the PATH, /usr/local/cuda, or NVIDIA's packages on PyPI, which together make a toolkit under
site-packages/nvidia/cu13 (all five must be of one version: each one's own dependencies would take the newest):

    pip install nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
        nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ARCHITECTURES = (80, 90, 100, 120)  # 86 and 89 run code of 80, 103 of 100, 121 of 120; later ones compile the PTX
TORCH_TARGET_VERSION = "0x020a000000000000"  # PyTorch 2.10


def find_nvcc() -> Path | None:
    """The CUDA compiler, or None. ``$CUDA_HOME`` comes first: who sets it means it."""
    candidates = [Path(os.environ[name]) / "bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    candidates += [Path(folder) / "nvidia/cu13/bin/nvcc" for folder in (*sys.path, sysconfig.get_paths()["purelib"])]
    return next((nvcc for nvcc in candidates if nvcc.is_file()), None)


def architectures(nvcc: Path) -> list[int]:
    """Those of :data:`ARCHITECTURES` that this nvcc knows."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [sm for sm in ARCHITECTURES if f"sm_{sm}" in known]


def compile_cuda(nvcc: Path, source: Path, target: Path, sms: list[int]) -> list[str]:
    """The command that compiles one .cu: machine code for each architecture, and PTX of the newest.

    A file ``…_sm90.cu`` uses what only Hopper has (wgmma): its machine code runs there and nowhere else.
    """
    codes = [f"arch=compute_{sm},code=sm_{sm}" for sm in sms] + [f"arch=compute_{sms[-1]},code=compute_{sms[-1]}"]
    if source.stem.endswith("_sm90"):
        codes = ["arch=compute_90a,code=sm_90a"]
    return [
        *(str(nvcc), "-std=c++17", "-O3", "-Xptxas", "--warn-on-spills"),
        *("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"),
        *(option for code in codes for option in ("-gencode", code)),
        *("-c", str(source), "-o", str(target)),
    ]


def compile_cpp(compiler: str, source: Path, target: Path, torch: Path) -> list[str]:
    """The command that compiles one Torch-facing .cpp."""
    return [
        *(compiler, "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden"),
        *("-Wall", "-Wextra", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"),
        *("-isystem", str(torch / "include"), "-I", str(HERE)),
        *("-c", str(source), "-o", str(target)),
    ]


def link(nvcc: Path, objects: list[Path], target: Path, torch: Path) -> list[str]:
    """The command that links the library. nvcc adds the static CUDA runtime and what that needs."""
    libraries = [torch / "lib", nvcc.resolve().parents[1] / "lib"]  # the latter: NVIDIA's PyPI packages have no lib64
    return [
        *(str(nvcc), "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL", "-o", str(target)),
        *(str(o) for o in objects),
        *(f"-L{path}" for path in libraries),
        *("-ltorch_cpu", "-lc10"),
    ]


def build(target: Path, nvcc: Path, compiler: str, torch: Path) -> None:
    """Compiles every .cu and .cpp of this folder and links them.

    Args:
        target: the library to write, ``…/_C_cuda.abi3.so``.
        nvcc: see :func:`find_nvcc`.
        compiler: the C++ compiler.
        torch: the folder of the installed torch package.

    Raises:
        subprocess.CalledProcessError: where a compiler fails; its messages are on stderr.
    """
    sms = architectures(nvcc)
    if not sms:
        raise RuntimeError(f"{nvcc} knows none of the architectures {ARCHITECTURES}; take CUDA 12.8 or later")
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for source in sorted([*HERE.glob("*.cu"), *HERE.glob("*.cpp")]):
            objects.append(Path(folder) / f"{source.name}.o")
            is_cuda = source.suffix == ".cu"
            command = compile_cuda(nvcc, source, objects[-1], sms) if is_cuda else None
            subprocess.run(command or compile_cpp(compiler, source, objects[-1], torch), check=True)
        subprocess.run(link(nvcc, objects, target, torch), check=True)


def main() -> None:
    nvcc, spec = find_nvcc(), importlib.util.find_spec("torch")
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if nvcc is None or spec is None or spec.origin is None or compiler is None:
        sys.exit(f"build.py needs nvcc ({nvcc}), torch ({spec and spec.origin}) and a C++ compiler ({compiler})")
    build(Path(sys.argv[1]), nvcc, compiler, Path(spec.origin).parent)


if __name__ == "__main__":
    main()
