"""Builds and packages vgg-fast: `vgg_fast/`, the Triton kernels as `vgg_fast.kernels`, and the compiled library `_C`.

`_C` uses nothing but PyTorch's stable ABI and no Python at all, so one build serves every PyTorch >= 2.10 and every
CPython >= 3.10. Without a C++ compiler the package installs all the same and says what it lacks (`vgg-fast doctor`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

ROOT = Path(__file__).parent
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of PyTorch 2.10
BUILD_INFO = "_build_info.json"  # read by vgg_fast.library

# gcc 12 sees uninitialised variables in its own AVX-512 header, and warns that a 64-byte vector (of internal functions,
# in the portable kernel) has another calling convention with AVX-512 than without.
QUIET = ["-Wno-maybe-uninitialized", "-Wno-psabi"]


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
        self.info: dict[str, str] = {}
        super().run()
        package = Path("vgg_fast") if self.inplace else Path(self.build_lib) / "vgg_fast"
        package.mkdir(parents=True, exist_ok=True)
        (package / BUILD_INFO).write_text(json.dumps(self.info, indent=1) + "\n")

    def build_extension(self, ext: Extension) -> None:
        compiler, torch = find_compiler(), find_torch()
        name = ext.name.rpartition(".")[2]
        if compiler is None or torch is None:
            lacking = "no C++ compiler" if compiler is None else "no PyTorch"
            self.info[name] = f"{lacking} was found when vgg-fast was installed"
            self.warn(f"{self.info[name]}: installing without {ext.name}")
            return
        ext.extra_compile_args += [
            "-isystem",
            str(torch / "include"),
        ]  # as system headers: their warnings are not ours
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
        self.info[name] = f"built with {compiler}"


EXTRAS = {
    "triton": ["triton>=3.4"],
    "keras": ["h5py>=3.10"],
    "peers": ["openvino", "onnx", "onnxruntime", "torchvision"],
}

setup(
    name="vgg-fast",
    version="0.1.0",
    description="VGG-like convolution stacks in PyTorch, fused and fast, with the same answers",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=["vgg_fast", "vgg_fast.ops", "vgg_fast.cli", "vgg_fast.kernels"],
    package_dir={"vgg_fast": "vgg_fast", "vgg_fast.kernels": "kernels"},
    package_data={"vgg_fast": ["py.typed"]},
    install_requires=["torch>=2.10", "numpy", "typer", "rich", "pillow", "safetensors"],
    extras_require=EXTRAS,
    setup_requires=[] if find_torch() else ["torch>=2.10"],
    entry_points={"console_scripts": ["vgg-fast = vgg_fast.cli:main"]},
    ext_modules=[
        Extension(
            "vgg_fast._C",
            sources=[
                "csrc/bindings.cpp",
                *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp")),
            ],
            depends=[str(p.relative_to(ROOT)) for e in ("h", "inl", "inc") for p in (ROOT / "csrc").rglob(f"*.{e}")],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-Wall",
                "-Wextra",
                *QUIET,
            ],
            libraries=["torch_cpu", "c10"],
            py_limited_api=True,
            optional=True,  # absent where there is no compiler
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
