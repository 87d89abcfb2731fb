"""Launches that are prepared once and then cost little: everything but the addresses is fixed.

Triton's own ``kernel[grid](...)`` binds, inspects and hashes every argument at each call, 10 to 20 us; a chain of 13
convolutions at batch 1 takes the GPU about 100. A prepared launch passes addresses to the compiled kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton

Launcher = Callable[..., None]  # launcher(stream, *addresses)

ALIGNMENT = 16  # bytes that every address must be a multiple of: kernels are compiled for it


def prepare(
    kernel: Any, grid: Sequence[int], arguments: Mapping[str, torch.dtype | int | None], options: Mapping[str, Any]
) -> Launcher:
    """Compiles a kernel for the current device and fixes its launch.

    Args:
        kernel: a function of ``triton.jit``.
        grid: the programs.
        arguments: the first ones by name, which every launch gives anew: what a pointer points to, None for one that
            is None, or for a number one of its size.
        options: all other arguments and Triton's options, by name.

    Returns:
        ``launcher(stream, *values)``, the stream a ``cudaStream_t``; an address, None or a number for every argument.

    Raises:
        ValueError: these are not the first arguments.
        triton.OutOfResources: the device is too small for the kernel.

    In Triton's interpreter, where there is neither device nor stream, addresses are of CPU memory.
    """
    names, first = list(kernel.arg_names), list(arguments)
    if names[: len(first)] != first:
        raise ValueError(f"the first arguments of {kernel.__name__} are {names[: len(first)]}, not {first}")
    rest = [options[name] for name in names[len(first) :]]
    if isinstance(kernel, triton.JITFunction):
        extra = {name: value for name, value in options.items() if name not in names}
        # For a dtype Triton's warm-up assumes an aligned pointer to it.
        compiled = kernel.warmup(*arguments.values(), *rest, grid=tuple(grid), **extra)
        run = compiled[(*grid, 1, 1)[:3]]
        return lambda stream, *values: run(*values, *rest, stream=stream)
    interpreted, kinds = kernel[tuple(grid)], list(arguments.values())
    return lambda stream, *values: interpreted(*map(_value_at, values, kinds), *rest)


def _value_at(value: int | None, kind: torch.dtype | int | None) -> torch.Tensor | int | None:
    """What the interpreter wants: a tensor at that address, or the number."""
    if value is None or not isinstance(kind, torch.dtype):
        return value
    return torch.frombuffer((ctypes.c_char * kind.itemsize).from_address(value), dtype=kind)


def current_stream(device: torch.device) -> int:
    """PyTorch's current ``cudaStream_t`` on a device; 0 on the CPU, where the interpreter runs."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device the current one, for that is where Triton launches; cheap where it is."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy where its memory does not begin at a multiple of :data:`ALIGNMENT`."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor
