"""The tensor-core kernels of csrc/cuda as launches on the virtual GPU, cut by the planner that cuts them on a GPU."""

from __future__ import annotations

import ctypes
import functools
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.compiled import compiled
from tests.virtual_gpu import sm90
from tests.virtual_gpu.cases import CUDA, DTYPES, ROOT, Conv3x3Args, Maxpool2x2Args, channels_last, nvcc_ptx
from tests.virtual_gpu.launch import Entry, launch, ptx_entry
from vgg_fast.kernels.configs import Architecture

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
    """The planners of csrc/cuda, compiled for this machine."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler on the PATH to compile csrc/cuda/*_plan.cpp with")
    on_host = ROOT / "tests" / "cuda_on_host"
    sources = [*sorted(CUDA.glob("*_plan.cpp")), on_host / "plan.cpp"]
    options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    options += ["-I", str(on_host), "-I", str(CUDA)]
    read = [*sources, *CUDA.glob("*.h"), *CUDA.glob("*.cuh"), *on_host.glob("*.h")]
    loaded = ctypes.CDLL(str(compiled([compiler, *options, *sources], read, ".so")))
    loaded.mma_unsupported_for.restype = ctypes.c_char_p
    loaded.plain_blocks_for.restype = ctypes.c_int64
    return loaded


def problem(n: int, h: int, w: int, cin: int, cout: int, dtype: torch.dtype) -> MmaProblem:
    return MmaProblem(n, h, w, cin, cout, DTYPES[dtype][0])


def plan(wanted: MmaProblem, multiprocessors: int = A100, tile: int = -1, split: int = 0) -> MmaPlan:
    result = MmaPlan()
    planner().plan_for(ctypes.byref(wanted), multiprocessors, tile, split, ctypes.byref(result))
    return result


def stages() -> tuple[int, int]:
    """Of weights and of halos, in a tile of conv3x3_mma."""
    return planner().mma_weight_stages(), planner().mma_halo_stages()


def plan_block1(n: int, h: int, w: int) -> MmaPlan:
    result = MmaPlan()
    planner().plan_block1_for(*(ctypes.c_int64(size) for size in (n, h, w)), ctypes.byref(result))
    return result


TILES = ("256x128", "128x64", "256x64")  # kMmaTiles
FAMILIES = ("cuda", "cuda_tf32", "cuda_wgmma", "cuda_wgmma_tf32")  # Family
PLAIN, TENSOR_CORES, HOPPER = range(3)  # Kernel


class LayerPlan(ctypes.Structure):
    """Layer of layer_cuda.h; with ``in_next`` it is part of the next one's launch."""

    _fields_ = [
        ("args", Conv3x3Args),
        ("step", ctypes.c_int64),
        ("aligned", ctypes.c_bool),
        ("kernel", ctypes.c_int),
        ("plan", MmaPlan),
        ("hopper", sm90.Plan),
        ("in_next", ctypes.c_bool),
        ("with_previous", ctypes.c_bool),
    ]


def plan_chain(
    size: tuple[int, int, int, int],
    couts: Sequence[int],
    program: Sequence[int],
    dtype: torch.dtype,
    kernel: str,
    architecture: Architecture,
) -> list[LayerPlan]:
    """What conv_stack of csrc/cuda decides about each layer of a chain.

    Args:
        size: of the input, ``(N, Cin, H, W)``.
        couts, program: per convolution, output channels and bits of what follows.
        kernel: of :data:`FAMILIES`.
    """
    chain = (LayerPlan * len(couts))()
    n, cin, h, w = size
    for layer, cout, step in zip(chain, couts, program, strict=True):
        layer.step, layer.aligned = step, True
        args = layer.args
        args.n, args.h, args.w, args.cin, args.cout, args.dtype = n, h, w, cin, cout, DTYPES[dtype][0]
        cin, h, w = cout, h // (2 if step & 2 else 1), w // (2 if step & 2 else 1)
    planner().plan_chain_for(chain, len(couts), FAMILIES.index(kernel), *architecture)
    return list(chain)


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
    cut: MmaPlan | None = None,
    change: Callable[[Entry], Entry] = lambda entry: entry,
    **options: Any,
) -> dict[str, Tensor]:
    """``x`` channels_last, ``weight`` [Cout, Cin, 3, 3]; what is asked for of ``out`` and ``pooled``."""
    (n, cin, h, w), cout = x.shape, weight.shape[0]
    wanted = problem(n, h, w, cin, cout, x.dtype)
    cut, args = cut or plan(wanted, tile=tile, split=split), MmaArgs()
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
    launch(change(entry), (cut.ctas,), [(MmaArgs, fields | results | scratch)], **options)
    if scratch:
        assert not scratch["arrived"].any(), "the counters are not ready for the next launch"
    return results


class Block1Args(ctypes.Structure):
    """With the fields of ``second``, which begins where its first pointer would, by other names."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("image", "first_weight", "first_affine")),
        ("first_cin", ctypes.c_int),
        ("first_relu", ctypes.c_bool),
        *MmaArgs._fields_,
    ]


def block1(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    affines: tuple[Tensor, Tensor],
    out: bool = True,
    pooled: bool = True,
    target: str = "80",
    change: Callable[[Entry], Entry] = lambda entry: entry,
    **options: Any,
) -> dict[str, Tensor]:
    """Two convolutions with ReLU; ``x`` channels_last, weights [Cout, Cin, 3, 3]."""
    (n, cin, h, w), cout = x.shape, weights[1].shape[0]
    wanted, cut, args = problem(n, h, w, 64, cout, x.dtype), plan_block1(n, h, w), MmaArgs()
    planner().args_for(ctypes.byref(wanted), ctypes.byref(cut), ctypes.byref(args))
    fields: dict[str, Any] = {name: getattr(args, name) for name, _ in MmaArgs._fields_}
    first, second = (weight.permute(0, 2, 3, 1).contiguous() for weight in weights)
    fields |= {"image": x, "first_weight": first, "first_affine": affines[0], "first_cin": cin, "first_relu": True}
    fields |= {"weight": second, "affine": affines[1], "relu": True}
    results = {}
    if out:
        results["out"] = channels_last(n, cout, h, w, dtype=x.dtype)
    if pooled:
        results["pooled"] = channels_last(n, cout, h // 2, w // 2, dtype=x.dtype)
    entry = ptx_entry(nvcc_ptx(CUDA / "block1.cu", target), f"block1_kernel{DTYPES[x.dtype][1]}")
    options |= {"outputs": [*results], "shared_bytes": cut.shared_bytes}
    launch(change(entry), (cut.rows,), [(Block1Args, fields | results)], **options)
    return results


class Maxpool2x2BackwardArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("grad_out", "x", "grad_x")),
        *((name, ctypes.c_int64) for name in ("n", "h", "w", "c")),
        ("dtype", ctypes.c_int),
    ]


def maxpool2x2(x: Tensor, grad: Tensor | None = None, target: str = "80", **options: Any) -> Tensor:
    """The pool, or with ``grad`` its backward; channels_last, or contiguous with one channel to an image."""
    planar = x.is_contiguous()
    n, c, h, w = (x.shape[0] * x.shape[1], 1, *x.shape[2:]) if planar else x.shape
    code, name = DTYPES[x.dtype]
    form, packet, edge = "", 16 // x.element_size(), 0 if grad is None else 1
    items = n * ((h + edge) // 2)
    if c % packet == 0:
        items *= (w + edge) // 2 * (c // packet)
    elif c == 1 and w % packet == 0:
        form, items = "_columns", items * (w // packet)
    else:
        packet, items = 1, items * ((w + edge) // 2) * c
    sizes = {"n": n, "h": h, "w": w, "c": c, "dtype": code}
    if grad is None:
        result = torch.empty(*x.shape[:2], h // 2, w // 2, dtype=x.dtype)
    else:
        result = torch.empty(x.shape, dtype=x.dtype)
    result = result if planar else result.contiguous(memory_format=torch.channels_last)
    if grad is None:
        kernel, written = f"maxpool2x2{form}_kernel", "out"
        arguments: Any = (Maxpool2x2Args, {"x": x, "out": result} | sizes)
    else:
        kernel, written = f"maxpool2x2_backward{form}_kernel", "grad_x"
        arguments = (Maxpool2x2BackwardArgs, {"grad_out": grad, "x": x, "grad_x": result} | sizes)
    entry = ptx_entry(nvcc_ptx(CUDA / "maxpool2x2.cu", target), f"{kernel}{name}Li{packet}E")
    launch(entry, (-(-items // 128),), [arguments], outputs=[written], **options)
    return result
