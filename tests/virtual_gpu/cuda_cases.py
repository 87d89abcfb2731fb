"""The tensor-core kernels of csrc/cuda as launches on the virtual GPU, cut by the planner that cuts them on a GPU."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.virtual_gpu.cases import CUDA, DTYPES, ROOT, channels_last, nvcc_ptx
from tests.virtual_gpu.launch import launch, ptx_entry

A100, H100 = 108, 132  # multiprocessors


class MmaProblem(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("n", "h", "w", "cin", "cout")), ("dtype", ctypes.c_int)]


class MmaPlan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("tile", "strip", "strips", "pairs", "pitch", "pad", "halo", "rows")),
        *((name, ctypes.c_int) for name in ("columns", "split", "shared_bytes")),
        ("partial_bytes", ctypes.c_int64),
        ("counter_bytes", ctypes.c_int64),
        ("clocks", ctypes.c_double),
    ]

    @property
    def ctas(self) -> int:
        return self.rows * self.columns * self.split


class MmaArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "affine", "out", "pooled", "partial", "arrived")),
        *((name, ctypes.c_int) for name in ("n", "h", "w", "cin", "cout", "strip", "strips", "pairs")),
        *((name, ctypes.c_int) for name in ("pitch", "pad", "halo", "columns", "split")),
        ("relu", ctypes.c_bool),
    ]


@functools.cache
def planner() -> ctypes.CDLL:
    """csrc/cuda/conv3x3_plan.cpp, compiled for this machine."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler on the PATH to compile csrc/cuda/conv3x3_plan.cpp with")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "plan.so"
        sources = [CUDA / "conv3x3_plan.cpp", ROOT / "tests" / "cuda_on_host" / "plan.cpp"]
        options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-I", str(CUDA)]
        subprocess.run([compiler, *options, *map(str, sources), "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.mma_unsupported_for.restype = ctypes.c_char_p
    return loaded


def problem(n: int, h: int, w: int, cin: int, cout: int, dtype: torch.dtype) -> MmaProblem:
    return MmaProblem(n, h, w, cin, cout, DTYPES[dtype][0])


def plan(wanted: MmaProblem, multiprocessors: int = A100, tile: int = -1, split: int = 0) -> MmaPlan:
    result = MmaPlan()
    planner().plan_for(ctypes.byref(wanted), multiprocessors, tile, split, ctypes.byref(result))
    return result


TILES = ("256x128", "128x64")  # kMmaTiles


def conv3x3_mma(
    x: Tensor,
    weight: Tensor,
    affine: Tensor,
    relu: bool = False,
    out: bool = True,
    pooled: bool = False,
    target: str = "80",
    tile: int = -1,
    split: int = 0,
    **options: Any,
) -> dict[str, Tensor]:
    """``x`` channels_last, ``weight`` [Cout, Cin, 3, 3]; what is asked for of ``out`` and ``pooled``."""
    (n, cin, h, w), cout = x.shape, weight.shape[0]
    wanted = problem(n, h, w, cin, cout, x.dtype)
    cut, args = plan(wanted, tile=tile, split=split), MmaArgs()
    planner().args_for(ctypes.byref(wanted), ctypes.byref(cut), ctypes.byref(args))
    fields: dict[str, Any] = {name: getattr(args, name) for name, _ in MmaArgs._fields_}
    fields |= {"x": x, "weight": weight.permute(0, 2, 3, 1).contiguous(), "affine": affine, "relu": relu}
    results = {}
    if out:
        results["out"] = channels_last(n, cout, h, w, dtype=x.dtype)
    if pooled:
        results["pooled"] = channels_last(n, cout, h // 2, w // 2, dtype=x.dtype)
    scratch = {}
    if cut.split > 1:
        scratch["partial"] = torch.full([cut.partial_bytes // 4], float("nan"))
        scratch["arrived"] = torch.zeros(cut.counter_bytes // 4, dtype=torch.int32)
    name = f"MmaTraitsI{DTYPES[x.dtype][1].removeprefix('I')}Li{cut.tile}E"
    entry = ptx_entry(nvcc_ptx(CUDA / "conv3x3_mma.cu", target), name)
    options |= {"outputs": [*results], "scratch": [*scratch], "shared_bytes": cut.shared_bytes}
    launch(entry, (cut.ctas,), [(MmaArgs, fields | results | scratch)], **options)
    if scratch:
        assert not scratch["arrived"].any(), "the counters are not ready for the next launch"
    return results
