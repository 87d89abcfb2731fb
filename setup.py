"""Builds and packages vgg-fast: `vgg_fast/`, the Triton kernels as `vgg_fast.kernels`, and the compiled libraries.

`_C` (CPU) and `_C_cuda` (GPU, where there is an nvcc) use nothing but PyTorch's stable ABI and no Python at all, so one
build serves every PyTorch >= 2.10 and every CPython >= 3.10. Without a compiler the package installs all the same and
says what it lacks (`vgg-fast doctor`). VGG_FAST_CUDA=0 leaves `_C_cuda` out, 1 insists on it, auto (the default) builds
it if it can; VGG_FAST_CUDA_ARCHS=80,90 names the architectures (csrc/cuda/build.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

ROOT = Path(__file__).parent
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of PyTorch 2.10
BUILD_INFO = "_build_info.json"  # read by vgg_fast.library

VGG_FAST_CUDA = os.environ.get("VGG_FAST_CUDA", "auto")
if VGG_FAST_CUDA not in ("0", "1", "auto"):
    raise SystemExit(f"vgg-fast: VGG_FAST_CUDA is {VGG_FAST_CUDA!r}; it must be 0 (without), 1 (insist) or auto")

# `make sanitize` builds, in a folder of its own, a library that stops at the first wrong access: "address,undefined".
SANITIZERS = os.environ.get("VGG_FAST_SANITIZE", "")
SANITIZE = [f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1"]
SANITIZE = SANITIZE if SANITIZERS else []

# Products and sums are contracted where the sources say so and nowhere else: the passes around a convolution find masks
# again by the same arithmetic, and have the same bits on every instruction set.
ARITHMETIC = ["-ffp-contract=off"]

# gcc 12 sees uninitialised variables in its own AVX-512 header, and warns that a 64-byte vector (of internal functions,
# in the portable kernel) has another calling convention with AVX-512 than without.
WARNINGS = ["-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-psabi"]

_spec = importlib.util.spec_from_file_location("vgg_fast_cuda_build", ROOT / "csrc/cuda/build.py")
assert _spec is not None
assert _spec.loader is not None
cuda = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cuda)


def find_torch() -> Path | None:
    """The installed PyTorch: of this process, or (in an isolated build) of the environment it builds for."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    beside = Path(sysconfig.get_paths()["platlib"]) / "torch"
    return beside if (beside / "include").is_dir() else None


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, or c++ / g++ / clang++ on the PATH."""
    named = os.environ.get("CXX", "").split()
    return next((path for name in [*named[:1], "c++", "g++", "clang++"] if (path := shutil.which(name))), None)


class BuildLibraries(build_ext):
    """Compiles the sources of a library side by side, and writes down what was built or why it was not."""

    def run(self) -> None:
        self.check_settings()
        self.info: dict[str, str] = {}
        super().run()
        package = Path("vgg_fast") if self.inplace else Path(self.build_lib) / "vgg_fast"
        package.mkdir(parents=True, exist_ok=True)
        (package / BUILD_INFO).write_text(json.dumps(self.info, indent=1) + "\n")

    def check_settings(self) -> None:
        """What cannot be done is said before minutes of compiling, and whatever VGG_FAST_CUDA says."""
        if VGG_FAST_CUDA == "0":
            return
        try:
            cuda.wanted_architectures()
            if nvcc := cuda.find_nvcc():
                cuda.architectures(nvcc)
        except ValueError as error:
            raise SystemExit(f"vgg-fast: {error}") from error
        if VGG_FAST_CUDA == "1" and nvcc is None:
            self.leave_out("_C_cuda", "no nvcc was found in CUDA_HOME, on the PATH, in /usr/local/cuda or in Python")

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        compiler, torch = find_compiler(), find_torch()
        if compiler is None or torch is None:
            lacking = "no C++ compiler" if compiler is None else "no PyTorch"
            self.leave_out(name, f"{lacking} was found when vgg-fast was installed")
        elif name == "_C_cuda":
            self.build_cuda(ext, compiler, torch)
        else:
            self.build_cpu(ext, compiler, torch)

    def leave_out(self, name: str, reason: str) -> None:
        """Installs without a library, unless it was insisted on."""
        if name == "_C_cuda" and VGG_FAST_CUDA == "1":
            raise SystemExit(f"vgg-fast: VGG_FAST_CUDA=1, but {reason}")
        self.info[name] = reason
        self.warn(f"{reason}: installing without vgg_fast.{name}")

    def build_cuda(self, ext: Extension, compiler: str, torch: Path) -> None:
        name, nvcc = "_C_cuda", cuda.find_nvcc()
        if VGG_FAST_CUDA == "0":
            return self.leave_out(name, "VGG_FAST_CUDA=0 when vgg-fast was installed")
        if nvcc is None:
            return self.leave_out(name, "no nvcc was found when vgg-fast was installed")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            cuda.build(target, nvcc, compiler, torch)
            built_for = ", ".join(f"sm_{sm}" for sm in cuda.architectures(nvcc))
        except (subprocess.CalledProcessError, RuntimeError) as error:
            # An nvcc that does not fit its host compiler is common, and no reason to go without the CPU kernels.
            return self.leave_out(name, f"{nvcc} failed when vgg-fast was installed: {error}")
        self.info[name] = f"built with {nvcc} for {built_for}"

    def build_cpu(self, ext: Extension, compiler: str, torch: Path) -> None:
        ext.extra_compile_args += ["-isystem", str(torch / "include")]  # as system headers: their warnings are not ours
        ext.library_dirs.append(str(torch / "lib"))
        compile_all = self.compiler.compile

        def compile_side_by_side(sources: list[str], **options: object) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [o for objects in pool.map(lambda s: compile_all([s], **options), sources) for o in objects]

        self.compiler.compile = compile_side_by_side
        try:
            super().build_extension(ext)
        except CCompilerError as error:
            # `optional` below lets a library be absent; one that does not compile must not pass for that.
            raise SystemExit(f"vgg-fast: {ext.name} does not compile with {compiler}: {error}") from error
        self.info["_C"] = f"built with {compiler}"


def sources(*patterns: str) -> list[str]:
    """Files under csrc, relative to this one."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


EXTRAS = {
    "triton": ["triton>=3.4"],
    "keras": ["h5py>=3.10"],
    "peers": ["matplotlib>=3.8", "openvino", "onnx", "onnxruntime", "torchvision"],
}

SUBPACKAGES = ("ops", "gpu", "container", "models", "bench", "verify", "cli", "kernels")

setup(
    name="vgg-fast",
    version="0.1.0",
    description="VGG-like convolution stacks in PyTorch, fused and fast, with the same answers",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=["vgg_fast", *(f"vgg_fast.{name}" for name in SUBPACKAGES)],
    package_dir={"vgg_fast": "vgg_fast", "vgg_fast.kernels": "kernels"},
    package_data={"vgg_fast": ["py.typed"]},
    install_requires=["torch>=2.10", "numpy", "typer", "rich", "pillow", "safetensors"],
    extras_require=EXTRAS,
    setup_requires=[] if find_torch() else ["torch>=2.10"],
    entry_points={"console_scripts": ["vgg-fast = vgg_fast.cli:main"]},
    ext_modules=[
        Extension(
            "vgg_fast._C",
            sources=sources("bindings.cpp", "cpu/*.cpp"),
            depends=sources("*.h", "cpu/*.h", "cpu/*.inl", "cpu/*.inc"),
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", *ARITHMETIC, *WARNINGS, *SANITIZE],
            extra_link_args=SANITIZE,
            libraries=["torch_cpu", "c10"],
            py_limited_api=True,
            optional=True,  # absent where there is no compiler
            language="c++",
        ),
        Extension(
            "vgg_fast._C_cuda",
            sources=sources("cuda/*.cpp", "cuda/*.cu"),
            depends=sources("cuda/*.h", "cuda/*.cuh", "cuda/build.py"),
            py_limited_api=True,
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
