"""Launches that are prepared once and then cost little: everything but the addresses is fixed.

Triton's own ``kernel[grid](...)`` binds, inspects and hashes every argument at each call, 10 to 20 us; a chain of 13
convolutions at batch 1 takes the GPU about 100. A prepared launch passes addresses to the compiled kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton

Launcher = Callable[..., None]  # launcher(stream, *addresses)

ALIGNMENT = 16  # bytes that every address must be a multiple of: kernels are compiled for it


def prepare(
    kernel: Any, grid: Sequence[int], pointers: Mapping[str, torch.dtype | None], options: Mapping[str, Any]
) -> Launcher:
    """Compiles a kernel for the current device and fixes its launch.

    Args:
        kernel: a function of ``triton.jit`` whose first arguments are these pointers.
        grid: the programs.
        pointers: by name in the order of the arguments: what they point to, None where there is nothing.
        options: all other arguments and Triton's options, by name.

    Returns:
        ``launcher(stream, *addresses)``, the stream a ``cudaStream_t``; an address (or None) for every pointer.

    Raises:
        ValueError: the pointers are not the first arguments.
        triton.OutOfResources: the device is too small for the kernel.

    In Triton's interpreter, where there is neither device nor stream, addresses are of CPU memory.
    """
    names = list(kernel.arg_names)
    if names[: len(pointers)] != list(pointers):
        raise ValueError(f"the first arguments of {kernel.__name__} are {names[: len(pointers)]}, not {list(pointers)}")
    rest = [options[name] for name in names[len(pointers) :]]
    if isinstance(kernel, triton.JITFunction):
        extra = {name: value for name, value in options.items() if name not in names}
        # For a dtype Triton's warm-up assumes an aligned pointer to it.
        compiled = kernel.warmup(*pointers.values(), *rest, grid=tuple(grid), **extra)
        run = compiled[(*grid, 1, 1)[:3]]
        return lambda stream, *addresses: run(*addresses, *rest, stream=stream)
    interpreted = kernel[tuple(grid)]
    dtypes = list(pointers.values())

    def launch(stream: int, *addresses: int | None) -> None:
        interpreted(*map(_tensor_at, addresses, dtypes), *rest)

    return launch


def _tensor_at(address: int | None, dtype: torch.dtype | None) -> torch.Tensor | None:
    if address is None or dtype is None:
        return None
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy where its memory does not begin at a multiple of :data:`ALIGNMENT`."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor
