"""The shipped kernels as launches on the virtual GPU: what tests, the mutation suite and the VGG16 script share."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tests.compiled import compiled
from tests.virtual_gpu.launch import Entry, launch, ptx_entry, triton_entry
from vgg_fast.kernels.configs import Architecture

if TYPE_CHECKING:  # it imports Triton, which csrc/cuda can do without
    from vgg_fast.kernels.conv3x3 import Launch

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
ARCHITECTURES = {80: Architecture(80, 108), 90: Architecture(90, 132)}  # A100, H100


def channels_last(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype).contiguous(memory_format=torch.channels_last)


def triton_conv3x3(
    x: Tensor,
    weight: Tensor,
    affine: Tensor,
    relu: bool = False,
    pool: bool = False,
    target: int = 80,
    change: Callable[[Entry], Entry] = lambda entry: entry,
    launched: Launch | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """kernels/conv3x3.py on the virtual GPU; ``x`` channels_last, ``weight`` [Cout, 3, 3, Cin].

    ``launched`` instead of what a GPU of this architecture would launch. With a tap it is a pair.
    """
    from vgg_fast.kernels.conv3x3 import launch_of

    (n, cin, h, w), cout = x.shape, weight.shape[0]
    launched = launched or launch_of(x.dtype, n, h, w, cin, cout, relu, pool, ARCHITECTURES[target])
    arguments = arguments_of(launched, x, weight, affine)
    entry = change(triton_entry(launched.kernel, arguments, target))
    outputs = ["out_ptr", "tap_ptr"] if launched.options["TAP"] else ["out_ptr"]
    scratch = ["partials_ptr", "counters_ptr"] if launched.counters else []
    launch(entry, launched.grid, arguments, outputs=outputs, scratch=scratch, **options)
    if launched.counters:
        assert not arguments["counters_ptr"].any()
    return (arguments["tap_ptr"], arguments["out_ptr"]) if launched.options["TAP"] else arguments["out_ptr"]


def arguments_of(launched: Launch, x: Tensor, weight: Tensor, affine: Tensor) -> dict[str, Any]:
    """With new tensors for what the kernel writes."""
    n, _, h, w = x.shape
    out = channels_last(*launched.out_size, dtype=x.dtype)
    tap = channels_last(n, weight.shape[0], h, w, dtype=x.dtype) if launched.options["TAP"] else None
    partials = counters = None
    if launched.counters:
        partials, counters = torch.empty(launched.partials), torch.zeros(launched.counters, dtype=torch.int32)
    return launched.arguments(x, weight, affine, out, tap, partials, counters)


def triton_maxpool2x2(x: Tensor, target: int = 80, **options: Any) -> Tensor:
    """kernels/maxpool2x2.py; ``x`` channels_last."""
    from vgg_fast.kernels import maxpool2x2

    n, c, h, w = x.shape
    out = channels_last(n, c, h // 2, w // 2, dtype=x.dtype)
    constants, rows = maxpool2x2.constants(c), out.numel() // c
    grid = (-(-rows // constants["BR"]) * -(-c // constants["BC"]),)
    arguments = {"x_ptr": x, "out_ptr": out, "ROWS": rows, "H": h, "W": w} | constants
    launch(maxpool2x2._maxpool2x2_kernel, grid, arguments, outputs=["out_ptr"], target=target, **options)
    return out


# csrc/cuda. The structures are those of the headers beside the kernels.

DTYPES = {torch.float32: (0, "If"), torch.float16: (1, "I6__half"), torch.bfloat16: (2, "I13__nv_bfloat16")}


class Conv3x3Args(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "affine", "out")),
        *((name, ctypes.c_int64) for name in ("n", "h", "w", "cin", "cout")),
        ("dtype", ctypes.c_int),
        ("relu", ctypes.c_bool),
        ("pool", ctypes.c_bool),
    ]


class Maxpool2x2Args(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        *((name, ctypes.c_int64) for name in ("n", "h", "w", "c")),
        ("dtype", ctypes.c_int),
    ]


def find_nvcc() -> Path | None:
    """As csrc/cuda/build.py finds it."""
    spec = util.spec_from_file_location("build_cuda", CUDA / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.find_nvcc()


@functools.cache
def nvcc_ptx(source: Path, architecture: str) -> str:
    """PTX of one .cu with source lines, for ``80`` or ``90a``.

    Raises:
        FileNotFoundError: without nvcc.
    """
    return nvcc_ptx_file(source, architecture).read_text()


def nvcc_cubin(source: Path, architecture: str) -> bytes:
    """Machine code of this PTX; raises as :func:`nvcc_ptx`."""
    ptx, nvcc = nvcc_ptx_file(source, architecture), find_nvcc()
    assert nvcc is not None
    return compiled([nvcc, "-O3", "-cubin", f"-arch=sm_{architecture}", ptx], [ptx], ".cubin").read_bytes()


def nvcc_ptx_file(source: Path, architecture: str) -> Path:
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc: see csrc/cuda/build.py for where it is looked for")
    options = ["-std=c++17", "-O3", "-lineinfo", "-ptx", f"-arch=compute_{architecture}", "-I", str(CUDA)]
    read = [source, *CUDA.glob("*.cuh"), *CUDA.glob("*.h"), *source.parent.glob("*.cuh")]
    return compiled([nvcc, *options, source], read, ".ptx")


def cuda_conv3x3(
    x: Tensor,
    weight: Tensor,
    affine: Tensor,
    relu: bool = False,
    pool: bool = False,
    target: str = "80",
    **options: Any,
) -> Tensor:
    """csrc/cuda/conv3x3.cu, the plain kernel; arguments as :func:`triton_conv3x3`."""
    (n, cin, h, w), cout = x.shape, weight.shape[0]
    out = channels_last(n, cout, h // 2 if pool else h, w // 2 if pool else w, dtype=x.dtype)
    code, name = DTYPES[x.dtype]
    down, across = (h // 2, w // 2) if pool else ((h + 1) // 2, (w + 1) // 2)
    warps = n * down * -(-across // 4) * -(-cout // 32)
    packet = 1 if cin * x.element_size() % 32 else 4
    fields = {"x": x, "weight": weight, "affine": affine, "out": out, "n": n, "h": h, "w": w, "cin": cin, "cout": cout}
    arguments = (Conv3x3Args, fields | {"dtype": code, "relu": relu, "pool": pool})
    entry = ptx_entry(nvcc_ptx(CUDA / "conv3x3.cu", target), f"conv3x3_kernel{name}Li{packet}E")
    launch(entry, (-(-warps // 4),), [arguments], outputs=["out"], **options)
    return out


def cuda_maxpool2x2(x: Tensor, target: str = "80", **options: Any) -> Tensor:
    """csrc/cuda/maxpool2x2.cu; ``x`` channels_last."""
    n, c, h, w = x.shape
    out = channels_last(n, c, h // 2, w // 2, dtype=x.dtype)
    code, name = DTYPES[x.dtype]
    arguments = (Maxpool2x2Args, {"x": x, "out": out, "n": n, "h": h, "w": w, "c": c, "dtype": code})
    packet = 16 // x.element_size() if c * x.element_size() % 16 == 0 else 1
    entry = ptx_entry(nvcc_ptx(CUDA / "maxpool2x2.cu", target), f"maxpool2x2_kernel{name}Li{packet}E")
    launch(entry, (-(-out.numel() // packet // 128),), [arguments], outputs=["out"], **options)
    return out
