"""csrc/cuda/conv3x3_sm90.cu as a launch on the virtual GPU, with the tensor maps that its host code makes."""

from __future__ import annotations

import ctypes
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.virtual_gpu.cases import CUDA, DTYPES, channels_last, nvcc_ptx
from tests.virtual_gpu.launch import Entry, Mapped, launch, ptx_entry

BLOCK, BLOCKS, COLUMNS, THREADS = 8, 4, 128, 384  # as in conv3x3_sm90.cuh


class Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("affine", "out", "tap")),
        *((name, ctypes.c_int) for name in ("n", "h", "w", "cin", "cout", "down", "across", "tiles")),
        ("floor", ctypes.c_float),
    ]


def shared_bytes() -> int:
    """Dynamic shared memory, as the source states it."""
    found = re.search(r"static_assert\(kSharedBytes == (\d+)", (CUDA / "conv3x3_sm90.cuh").read_text())
    assert found is not None
    return int(found[1])


@functools.cache
def _ptx() -> str:
    return nvcc_ptx(CUDA / "conv3x3_sm90.cu", "90a")


def entry(dtype: torch.dtype, pool: bool) -> Entry:
    return ptx_entry(_ptx(), f"conv3x3_sm90_kernel{DTYPES[dtype][1]}Lb{pool:d}E")


def maps(x: Tensor, weight: Tensor) -> tuple[Mapped, Mapped]:
    """Of ``x`` [N, Cin, H, W] channels_last, and of ``weight`` [Cout, 3, 3, Cin]."""
    (n, cin, h, w), cout = x.shape, weight.shape[0]
    cells = x.permute(0, 2, 3, 1).reshape(n, h, w, cin // 8, 8).permute(0, 3, 1, 2, 4)
    rows = weight.view(cout // 32, 4, 4, 2, 9 * cin).permute(
        0, 2, 1, 3, 4
    )  # channel 32 a + 8 t + 2 b + e as [a][b][t][e]
    halo = BLOCK + 2
    return (
        Mapped(x, (8, halo, halo, 8, 1), view=cells),
        Mapped(weight, (64, 2, 4, 4, COLUMNS // 32), {"swizzle": 128}, view=rows),
    )


def tiles(n: int, h: int, w: int, cout: int) -> int:
    return -(-n * -(-h // BLOCK) * -(-w // BLOCK) // BLOCKS) * (cout // COLUMNS)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    affine: Tensor,
    relu: bool = False,
    pool: bool = False,
    tap: bool = False,
    ctas: int | None = None,
    change: Callable[[Entry], Entry] = lambda entry: entry,
    **options: Any,
) -> tuple[Tensor, ...]:
    """The result, and with ``tap`` also the map before the pool.

    Args:
        x: ``[N, Cin, H, W]``, channels_last.
        weight: ``[Cout, 3, 3, Cin]``.
        affine: fp32 ``[2, Cout]``.
        ctas: of the grid; as many as there are tiles unless fewer are named.
    """
    (n, cin, h, w), cout = x.shape, weight.shape[0]
    out = channels_last(n, cout, h // 2 if pool else h, w // 2 if pool else w, dtype=x.dtype)
    every = tiles(n, h, w, cout)
    fields: dict[str, Any] = {"affine": affine, "out": out, "tiles": every, "floor": 0.0 if relu else -math.inf}
    fields |= {"n": n, "h": h, "w": w, "cin": cin, "cout": cout, "down": -(-h // BLOCK), "across": -(-w // BLOCK)}
    whole = channels_last(n, cout, h, w, dtype=x.dtype)
    fields |= {"tap": whole} if tap else {}
    arguments = [*maps(x, weight), (Problem, fields)]
    outputs = ["out", "tap"] if tap else ["out"]
    grid = (every if ctas is None else min(every, ctas),)
    launch(change(entry(x.dtype, pool)), grid, arguments, outputs=outputs, shared_bytes=shared_bytes(), **options)
    return (out, whole) if tap else (out,)
