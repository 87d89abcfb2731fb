"""csrc/cuda/conv3x3_sm90.cu on the virtual GPU, cut by its own planner, with the tensor maps of its host code."""

from __future__ import annotations

import ctypes
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.compiled import compiled
from tests.virtual_gpu.cases import CUDA, DTYPES, ROOT, channels_last, find_nvcc, nvcc_ptx
from tests.virtual_gpu.launch import Entry, Mapped, launch, ptx_entry

MULTIPROCESSORS = 132  # of H100 and H200, SXM
THREADS, WIDTH, COLUMNS, HEIGHTS = 384, 8, 64, (14, 16)  # as in conv3x3_sm90_traits.cuh


class Problem(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("n", "h", "w", "cin", "cout")), ("dtype", ctypes.c_int)]


class Plan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("rows", "down", "across", "whole", "items", "split")),
        ("partial_bytes", ctypes.c_int64),
        ("counter_bytes", ctypes.c_int64),
    ]


class Task(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("affine", "out", "pooled", "partial", "arrived")),
        *((name, ctypes.c_int) for name in ("n", "h", "w", "cin", "cout", "down", "across", "whole", "items", "split")),
        ("floor", ctypes.c_float),
    ]


class Args(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "affine", "out", "pooled", "partial", "arrived")),
        ("relu", ctypes.c_bool),
    ]


@functools.cache
def host() -> ctypes.CDLL:
    """The launcher and the planner, with a CUDA runtime that writes down what is launched (recorded_runtime.cpp)."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc: see csrc/cuda/build.py for where it is looked for")
    ours = ROOT / "tests" / "cuda_on_host"
    sources = [CUDA / "conv3x3_sm90.cu", CUDA / "conv3x3_sm90_plan.cpp"]
    sources += [ours / "sm90_for_ctypes.cpp", ours / "recorded_runtime.cpp"]
    options = ["-std=c++17", "-O1", "-shared", "-Xcompiler", "-fPIC,-Wall,-Wextra,-Werror", "--cudart", "none"]
    options += ["-Xlinker", "-Bsymbolic,--no-undefined"]  # PyTorch may have brought the true runtime into this process
    options += ["-gencode", "arch=compute_90a,code=compute_90a", "-I", str(CUDA)]
    read = [*sources, *CUDA.glob("*.h"), *CUDA.glob("*.cuh")]
    loaded = ctypes.CDLL(str(compiled([nvcc, *options, *sources], read, ".so")))
    loaded.sm90_unsupported_for.restype = loaded.launch_sm90.restype = ctypes.c_char_p
    loaded.recorded_launch.restype = ctypes.POINTER(RecordedLaunch)
    loaded.recorded_map.restype = ctypes.POINTER(RecordedMap)
    loaded.recorded_argument.restype = ctypes.c_void_p
    return loaded


class RecordedMap(ctypes.Structure):
    _fields_ = [
        ("address", ctypes.c_uint64),
        ("sizes", ctypes.c_uint64 * 5),
        ("strides", ctypes.c_uint64 * 4),
        ("box", ctypes.c_uint32 * 5),
        ("steps", ctypes.c_uint32 * 5),
        *((name, ctypes.c_int) for name in ("type", "rank", "interleave", "swizzle", "fill")),
    ]


class RecordedLaunch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        *((name, ctypes.c_uint64) for name in ("shared_bytes", "allowed_shared_bytes", "stream")),
        *((name, ctypes.c_int) for name in ("device", "maps")),
        ("kernel", ctypes.c_char * 256),
    ]


def problem(n: int, h: int, w: int, cin: int, cout: int, dtype: torch.dtype = torch.float16) -> Problem:
    return Problem(n, h, w, cin, cout, DTYPES[dtype][0])


def plan(wanted: Problem, multiprocessors: int = MULTIPROCESSORS) -> Plan:
    result = Plan()
    host().plan_sm90_for(ctypes.byref(wanted), multiprocessors, ctypes.byref(result))
    return result


def shared_bytes(rows: int) -> int:
    """Dynamic shared memory with blocks of so many rows, as the source states it."""
    found = re.search(rf"Layout<{rows}>::kBytes == (\d+)", (CUDA / "conv3x3_sm90_traits.cuh").read_text())
    assert found is not None
    return int(found[1])


@functools.cache
def _ptx() -> str:
    return nvcc_ptx(CUDA / "conv3x3_sm90.cu", "90a")


def entry(dtype: torch.dtype, rows: int) -> Entry:
    return ptx_entry(_ptx(), f"conv3x3_sm90_kernel{DTYPES[dtype][1].removesuffix('E')}Li{rows}E")


def maps(x: Tensor, packed: Tensor, rows: int) -> tuple[Mapped, Mapped]:
    """Of ``x`` [N, Cin, H, W] channels_last, and of weights [Cout, 3, 3, Cin], for blocks of so many rows."""
    (n, cin, h, w), cout = x.shape, packed.shape[0]
    pixels = x.as_strided((n, h, w, cin), (h * w * cin, w * cin, cin, 1))  # as in memory, also where a size is 1
    if x.dtype == torch.float32:
        channels = packed.view(cout // 16, 2, 4, 2, 9 * cin)  # 16 w + 8 s + 2 r + e
    else:
        channels = packed.view(cout // 16, 4, 2, 2, 9 * cin).permute(0, 2, 1, 3, 4)  # 16 w + 4 r + 2 s + e: w, s, r, e
    chunk = 128 // x.element_size()
    boxes = (chunk, WIDTH + 2, rows + 2, 1), (chunk, 2, 4, 2, COLUMNS // 16)
    swizzle = {"swizzle": 128}
    return Mapped(x, boxes[0], swizzle, pixels), Mapped(packed, boxes[1], swizzle, channels)


def outputs(x: Tensor, cout: int, out: bool, pooled: bool) -> dict[str, Tensor]:
    n, _, h, w = x.shape
    sizes = {"out": (h, w)} if out else {}
    sizes |= {"pooled": (h // 2, w // 2)} if pooled else {}
    return {name: channels_last(n, cout, *size, dtype=x.dtype) for name, size in sizes.items()}


def workspace(cut: Plan) -> dict[str, Tensor]:
    if cut.split == 1:
        return {}
    arrived = torch.zeros(cut.counter_bytes // 4, dtype=torch.int32)
    return {"partial": torch.full([cut.partial_bytes // 4], math.nan), "arrived": arrived}


def task(x: Tensor, cout: int, affine: Tensor, relu: bool, cut: Plan) -> dict[str, Any]:
    """The fields of a :class:`Task`, all but the tensors that it may lack."""
    (n, cin, h, w) = x.shape
    fields: dict[str, Any] = {"affine": affine, "n": n, "h": h, "w": w, "cin": cin, "cout": cout}
    fields |= {name: getattr(cut, name) for name in ("down", "across", "whole", "items", "split")}
    return fields | {"floor": 0.0 if relu else -math.inf}


def conv3x3(
    x: Tensor,
    weight: Tensor,
    affine: Tensor,
    relu: bool = False,
    out: bool = True,
    pooled: bool = False,
    multiprocessors: int = MULTIPROCESSORS,
    cut: Plan | None = None,
    change: Callable[[Entry], Entry] = lambda entry: entry,
    **options: Any,
) -> dict[str, Tensor]:
    """What is asked for of ``out`` and ``pooled``.

    Args:
        x: ``[N, Cin, H, W]``, channels_last.
        weight: ``[Cout, Cin, 3, 3]``.
        affine: fp32 ``[2, Cout]``.
        multiprocessors: of the GPU that the problem is cut for; as many CTAs are launched.
        cut: another plan than the planner's.
    """
    (n, cin, h, w), cout = x.shape, weight.shape[0]
    cut = cut or plan(problem(n, h, w, cin, cout, x.dtype), multiprocessors)
    results = outputs(x, cout, out, pooled)
    scratch = workspace(cut)
    packed = weight.permute(0, 2, 3, 1).contiguous()
    fields = task(x, cout, affine, relu, cut) | results | scratch
    options |= {"outputs": [*results], "scratch": [*scratch], "shared_bytes": shared_bytes(cut.rows)}
    kernel, arguments = entry(x.dtype, cut.rows), [*maps(x, packed, cut.rows), (Task, fields)]
    launch(change(kernel), (min(cut.items, multiprocessors),), arguments, **options)
    if scratch:
        assert not scratch["arrived"].any(), "the counters are not ready for the next launch"
    return results
