"""The GPU kernels without a GPU: Triton's in its interpreter, the CUDA ones compiled for the CPU (cuda_on_host/)."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from vgg_fast import testing

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
ON_HOST = ROOT / "tests" / "cuda_on_host"
TORCH = Path(torch.__file__).parent


@dataclass(frozen=True)
class GpuKernels:
    """The entry points that both families of kernels share; weights are [Cout, 3, 3, Cin]."""

    conv3x3: Callable[[Tensor, Tensor, Tensor, bool, bool], Tensor]
    maxpool2x2: Callable[[Tensor], Tensor]
    conv_stack: Callable[[Tensor, list[Tensor], list[Tensor], list[int]], Tensor]
    truncates_bf16: bool  # the interpreter drops the lower bits of a float where the hardware rounds


@functools.cache
def load(name: str) -> GpuKernels:
    """``triton`` or ``cuda``; skips the test where it cannot be had, saying why."""
    if name == "triton":
        conv, pool = interpreted("conv3x3"), interpreted("maxpool2x2")
        return GpuKernels(conv.conv3x3, pool.maxpool2x2, conv.conv_stack, truncates_bf16=True)
    cuda_on_host()
    ops = torch.ops.vgg_fast_cuda_on_host
    return GpuKernels(ops.conv3x3, ops.maxpool2x2, ops.conv_stack, truncates_bf16=False)


@functools.cache
def interpreted(name: str) -> ModuleType:
    """A private copy of ``vgg_fast.kernels.<name>`` whose kernels run in Triton's interpreter.

    ``triton.jit`` looks at TRITON_INTERPRET when it decorates. Setting that for the whole process would turn the real
    modules, which other tests import, into interpreted ones.
    """
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    found = importlib.util.find_spec(f"vgg_fast.kernels.{name}")
    assert found is not None
    assert found.origin is not None
    spec = importlib.util.spec_from_file_location(f"vgg_fast.kernels._interpreted_{name}", found.origin)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = True
    try:
        spec.loader.exec_module(module)
    finally:
        triton.knobs.runtime.interpret = before
    return module


@functools.cache
def cuda_on_host() -> ctypes.CDLL:
    """csrc/cuda compiled for the CPU, its ops registered as vgg_fast_cuda_on_host."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on the PATH to compile csrc/cuda for the CPU")
    not_on_host = ("bindings_cuda.cpp", "torch_device.cpp")
    sources = [s for s in sorted([*CUDA.glob("*.cu"), *CUDA.glob("*.cpp")]) if s.name not in not_on_host]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "cuda_on_host.so"
        command = [
            *(compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden"),
            *("-Wall", "-Werror", "-Wno-unknown-pragmas"),
            *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(TORCH / "include")),
            *("-I", str(ON_HOST), "-I", str(CUDA), "-x", "c++"),
            *(str(s) for s in [*sources, ON_HOST / "bindings_host.cpp"]),
            *("-o", str(library), f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"),
        ]
        subprocess.run(command, check=True)
        torch.ops.load_library(library)
        loaded = ctypes.CDLL(str(library))
    loaded.launch_conv3x3.restype = loaded.launch_maxpool2x2.restype = ctypes.c_char_p
    return loaded


def sparse_half(elements: int) -> Tensor:
    """fp16 zeros that take memory only where they are touched: for offsets past 2^31 on an ordinary machine."""
    if sys.platform != "linux":
        pytest.skip("reserving 6 GB of addresses without their memory is done the Linux way")
    no_reserve = 0x4000  # MAP_NORESERVE, which Python's mmap knows by name only from 3.12 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=torch.float16)


class Huge:
    """A map of more than 2^31 elements in its first two rows, all zero but the last columns; and memory for an output.

    Attributes:
        x: fp16 ``[1, channels, 3, width]``, channels_last.
        last: its last ``columns`` columns, integers.
        out: fp16, as many elements as ``x``.
    """

    channels, width, columns = 64, 5 * 2**22 + 8, 256

    def __init__(self) -> None:
        elements = 3 * self.width * self.channels
        assert elements * 2 // 3 > 2**31
        self.out = sparse_half(elements)
        self.x = sparse_half(elements).view(1, 3, self.width, self.channels).permute(0, 3, 1, 2)
        size = (1, self.channels, 3, self.columns)
        self.last = testing.integer_tensor(*size, limit=4, dtype=torch.float16)
        self.x[..., -self.columns :] = self.last

    def out_pixels(self, height: int, width: int) -> Tensor:
        """The output as ``[1, channels, height, width]``."""
        nhwc = self.out[: height * width * self.channels].view(1, height, width, self.channels)
        return nhwc.permute(0, 3, 1, 2)
