"""The GPU kernels without a GPU: Triton's in its interpreter, the CUDA ones compiled for the CPU (cuda_on_host/); and,
where there is a GPU, the same kernels on it."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import mmap
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from compiled import compiled
from torch import Tensor

from vgg_fast import gpu, library, testing

# Their threads wait for each other: they run on the virtual GPU (virtual_gpu/test_cuda_*.py), not thread by thread.
TENSOR_CORES = ("block1.cu", "conv3x3_mma.cu", "conv3x3_sm90.cu")
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


ON_A_GPU = " on a GPU"
FAMILIES = ("triton", "cuda")
# For a fixture: what runs everywhere, and the same on the GPU where there is one (test_on_gpu.py says so where not).
KERNELS = [
    *FAMILIES,
    *(pytest.param(name + ON_A_GPU, marks=pytest.mark.gpu) for name in FAMILIES if gpu.lacking() is None),
]


@functools.cache
def load(name: str) -> GpuKernels:
    """One of :data:`KERNELS`; skips the test where it cannot be had, saying why."""
    if name.endswith(ON_A_GPU):
        return on_a_gpu(name.removesuffix(ON_A_GPU))
    if name == "triton":
        conv, pool, stack = interpreted("conv3x3"), interpreted("maxpool2x2"), interpreted_stack()
        return GpuKernels(conv.conv3x3, pool.maxpool2x2, lambda *a: stack.conv_stack(*a)[-1], truncates_bf16=True)
    cuda_on_host()
    ops = torch.ops.vgg_fast_cuda_on_host
    return GpuKernels(ops.conv3x3, ops.maxpool2x2, ops.conv_stack, truncates_bf16=False)


def on_a_gpu(family: str) -> GpuKernels:
    """The kernels themselves; tensors are taken to the GPU and results are brought back."""
    if reason := gpu.lacking() or (library.missing("_C_cuda") if family == "cuda" else None):
        pytest.skip(reason)
    if family == "triton":
        conv3x3 = importlib.import_module("vgg_fast.kernels.conv3x3").conv3x3
        maxpool2x2 = importlib.import_module("vgg_fast.kernels.maxpool2x2").maxpool2x2
    else:
        conv3x3, maxpool2x2 = torch.ops.vgg_fast_cuda.conv3x3, torch.ops.vgg_fast_cuda.maxpool2x2

    def there(t: Tensor) -> Tensor:
        return t.cuda() if t.device.type == "cpu" else t  # a test of errors has a tensor on another device

    def conv_stack(x: Tensor, weights: list[Tensor], affines: list[Tensor], program: list[int]) -> Tensor:
        oihw = [there(w).permute(0, 3, 1, 2) for w in weights]
        packed = [torch.ops.vgg_fast.pack(w, None, None, None, None, None, 0.0, family)[0] for w in oihw]
        affines = [there(a) for a in affines]
        return torch.ops.vgg_fast.conv_stack(there(x), packed, affines, program, family, True).cpu()

    return GpuKernels(
        lambda x, weight, affine, relu, pool: conv3x3(there(x), there(weight), there(affine), relu, pool).cpu(),
        lambda x: maxpool2x2(there(x)).cpu(),
        conv_stack,
        truncates_bf16=False,
    )


@functools.cache
def interpreted(name: str) -> ModuleType:
    """A private copy of ``vgg_fast.kernels.<name>`` whose kernels run in Triton's interpreter.

    ``triton.jit`` looks at TRITON_INTERPRET when it decorates. Setting that for the whole process would turn the real
    modules, which other tests import, into interpreted ones. It works as long as the kernels call builtins of
    triton.language alone: its own jitted functions (tl.zeros, tl.max, tl.cdiv) are of the mode Triton was imported in.
    """
    found = importlib.util.find_spec(f"vgg_fast.kernels.{name}")
    assert found is not None
    assert found.origin is not None
    return interpreted_file(found.origin, f"vgg_fast.kernels._interpreted_{name}")


@functools.cache
def interpreted_stack() -> ModuleType:
    """``vgg_fast.kernels.stack`` over the interpreted convolution."""
    module = interpreted("stack")
    module.launch_of = interpreted("conv3x3").launch_of
    return module


def interpreted_file(path: str, name: str) -> ModuleType:
    """The same of any file, as a module of this name."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    spec = importlib.util.spec_from_file_location(name, path)
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
    not_on_host = ("bindings_cuda.cpp", "torch_device.cpp", *TENSOR_CORES)
    sources = [s for s in sorted([*CUDA.glob("*.cu"), *CUDA.glob("*.cpp")]) if s.name not in not_on_host]
    sources.append(ON_HOST / "bindings_host.cpp")
    command = [
        *(compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden"),
        *("-Wall", "-Werror", "-Wno-unknown-pragmas"),
        *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", TORCH / "include"),
        *("-I", ON_HOST, "-I", CUDA, "-x", "c++", *sources, "-x", "none"),
        *(f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"),
    ]
    read = [*sources, *CUDA.glob("*.h"), *CUDA.glob("*.cuh"), *ON_HOST.rglob("*.h")]
    library = str(compiled(command, read, ".so"))
    torch.ops.load_library(library)
    loaded = ctypes.CDLL(library)
    loaded.launch_conv3x3.restype = loaded.launch_maxpool2x2.restype = ctypes.c_char_p
    return loaded


def between_guard_pages(t: Tensor, *, at_end: bool) -> Tensor:
    """A contiguous copy that ends (or begins) at a page which may not be touched: reading past it ends the process."""
    page = mmap.PAGESIZE
    nbytes = t.numel() * t.element_size()
    inside = -(-nbytes // page) * page
    memory = mmap.mmap(-1, inside + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + page + inside):
        if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(guard), page, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page + (inside - nbytes if at_end else 0)
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset)
    copy.copy_(t.flatten())
    return copy.view(t.shape)


def sparse_half(elements: int) -> Tensor:
    """fp16 zeros that take memory only where they are touched: for offsets past 2^31 on an ordinary machine."""
    if sys.platform != "linux":
        pytest.skip("reserving gigabytes of addresses without their memory is done the Linux way")
    no_reserve = 0x4000  # MAP_NORESERVE, which Python's mmap knows by name only from 3.12 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=torch.float16)


class Huge:
    """A map whose last rows lie past 2^31 elements, all zero but the last columns; and memory for an output.

    Attributes:
        x: fp16 ``[1, channels, height, width]``, channels_last.
        last: its last ``columns`` columns, integers.
        out: fp16, as many elements as ``x``.
    """

    channels, columns = 64, 256

    def __init__(self, height: int = 6, width: int = 3 * 2**22 + 8) -> None:
        self.height, self.width = height, width
        elements = height * width * self.channels
        assert elements > 3 * 2**30
        self.out = sparse_half(elements)
        self.x = sparse_half(elements).view(1, height, width, self.channels).permute(0, 3, 1, 2)
        size = (1, self.channels, height, self.columns)
        self.last = testing.integer_tensor(*size, limit=4, dtype=torch.float16)
        self.x[..., -self.columns :] = self.last

    def out_pixels(self, height: int, width: int) -> Tensor:
        """The output as ``[1, channels, height, width]``."""
        nhwc = self.out[: height * width * self.channels].view(1, height, width, self.channels)
        return nhwc.permute(0, 3, 1, 2)
