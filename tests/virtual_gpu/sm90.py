"""csrc/cuda/conv3x3_sm90.cu on the virtual GPU, cut by its own planner, with the tensor maps of its host code."""

from __future__ import annotations

import ctypes
import functools
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.virtual_gpu.cases import CUDA, DTYPES, ROOT, channels_last, nvcc_ptx
from tests.virtual_gpu.launch import Entry, Mapped, launch, ptx_entry

MULTIPROCESSORS = 132  # of H100 and H200, SXM
THREADS, HALO, COLUMNS = 384, 10, 128  # as in conv3x3_sm90.cuh


class Problem(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("n", "h", "w", "cin", "cout")), ("dtype", ctypes.c_int)]


class Plan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("down", "across", "whole", "items", "split")),
        ("partial_bytes", ctypes.c_int64),
        ("counter_bytes", ctypes.c_int64),
    ]


class Task(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("affine", "out", "pooled", "partial", "arrived")),
        *((name, ctypes.c_int) for name in ("n", "h", "w", "cin", "cout", "down", "across", "whole", "items", "split")),
        ("floor", ctypes.c_float),
    ]


@functools.cache
def planner() -> ctypes.CDLL:
    """csrc/cuda/conv3x3_sm90_plan.cpp, compiled for this machine."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler on the PATH to compile csrc/cuda/conv3x3_sm90_plan.cpp with")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "plan.so"
        sources = [CUDA / "conv3x3_sm90_plan.cpp", ROOT / "tests" / "cuda_on_host" / "plan_sm90.cpp"]
        options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-I", str(CUDA)]
        subprocess.run([compiler, *options, *map(str, sources), "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.sm90_unsupported_for.restype = ctypes.c_char_p
    return loaded


def problem(n: int, h: int, w: int, cin: int, cout: int, dtype: torch.dtype = torch.float16) -> Problem:
    return Problem(n, h, w, cin, cout, DTYPES[dtype][0])


def plan(wanted: Problem, multiprocessors: int = MULTIPROCESSORS) -> Plan:
    result = Plan()
    planner().plan_sm90_for(ctypes.byref(wanted), multiprocessors, ctypes.byref(result))
    return result


def shared_bytes() -> int:
    """Dynamic shared memory, as the source states it."""
    found = re.search(r"static_assert\(kSharedBytes == (\d+)", (CUDA / "conv3x3_sm90.cuh").read_text())
    assert found is not None
    return int(found[1])


@functools.cache
def _ptx() -> str:
    return nvcc_ptx(CUDA / "conv3x3_sm90.cu", "90a")


def entry(dtype: torch.dtype) -> Entry:
    return ptx_entry(_ptx(), f"conv3x3_sm90_kernel{DTYPES[dtype][1]}")


def pack(weight: Tensor) -> Tensor:
    """[Cout, Cin, 3, 3] as [Cin / 16, kw, kh, 2, Cout, 8]; row 32 a + 8 b + 2 t + e is channel 32 a + 8 t + 2 b + e."""
    cout, cin = weight.shape[:2]
    a_t_b_e = weight.view(cout // 32, 4, 4, 2, cin // 16, 2, 8, 3, 3)
    return a_t_b_e.permute(4, 8, 7, 5, 0, 2, 1, 3, 6).reshape(cin // 16, 3, 3, 2, cout, 8)


def maps(x: Tensor, packed: Tensor) -> tuple[Mapped, Mapped]:
    """Of ``x`` [N, Cin, H, W] channels_last, and of packed weights."""
    (n, cin, h, w), cout = x.shape, packed.shape[4]
    cells = x.permute(0, 2, 3, 1).reshape(n, h, w, cin // 8, 8).permute(0, 3, 1, 2, 4)
    rows = packed.view(cin // 16, 9, 2, cout // 32, 256)
    return Mapped(x, (8, HALO, HALO, 8, 1), view=cells), Mapped(packed, (256, COLUMNS // 32, 2, 1, 4), view=rows)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    affine: Tensor,
    relu: bool = False,
    out: bool = True,
    pooled: bool = False,
    multiprocessors: int = MULTIPROCESSORS,
    change: Callable[[Entry], Entry] = lambda entry: entry,
    **options: Any,
) -> dict[str, Tensor]:
    """What is asked for of ``out`` and ``pooled``.

    Args:
        x: ``[N, Cin, H, W]``, channels_last.
        weight: ``[Cout, Cin, 3, 3]``.
        affine: fp32 ``[2, Cout]``.
        multiprocessors: of the GPU that the problem is cut for; as many CTAs are launched.
    """
    (n, cin, h, w), cout = x.shape, weight.shape[0]
    cut = plan(problem(n, h, w, cin, cout, x.dtype), multiprocessors)
    results, scratch = {}, {}
    if out:
        results["out"] = channels_last(n, cout, h, w, dtype=x.dtype)
    if pooled:
        results["pooled"] = channels_last(n, cout, h // 2, w // 2, dtype=x.dtype)
    if cut.split > 1:
        scratch["partial"] = torch.full([cut.partial_bytes // 4], math.nan)
        scratch["arrived"] = torch.zeros(cut.counter_bytes // 4, dtype=torch.int32)
    fields: dict[str, Any] = {"affine": affine, "n": n, "h": h, "w": w, "cin": cin, "cout": cout}
    fields |= {name: getattr(cut, name) for name in ("down", "across", "whole", "items", "split")}
    fields |= {"floor": 0.0 if relu else -math.inf} | results | scratch
    arguments = [*maps(x, pack(weight)), (Task, fields)]
    options |= {"outputs": [*results], "scratch": [*scratch], "shared_bytes": shared_bytes()}
    launch(change(entry(x.dtype)), (min(cut.items, multiprocessors),), arguments, **options)
    if scratch:
        assert not scratch["arrived"].any(), "the counters are not ready for the next launch"
    return results
