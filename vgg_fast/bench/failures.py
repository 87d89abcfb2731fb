"""Errors after which a benchmark goes on without a problem, or cannot go on at all."""

from __future__ import annotations

import gc

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether this says that a tensor did not fit, on the CPU or on a GPU.

    Example:
        >>> try: torch.empty(2**60)
        ... except RuntimeError as error: out_of_memory(error)
        True
    """
    said = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in said for words in ("DefaultCPUAllocator: can't allocate", "not enough memory", "CUDA out of memory")
    )


def free_memory() -> None:
    """Gives back to the GPU what PyTorch keeps for later, once what did not fit is gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_LOST = (
    *("illegal memory access", "misaligned address", "unspecified launch failure", "device-side assert"),
    *("illegal instruction", "illegal address", "launch timed out", "uncorrectable ECC"),
)


def device_lost(error: BaseException) -> bool:
    """Whether CUDA answers nothing any more after this error: it stays in the context of the whole process.

    Example:
        >>> device_lost(RuntimeError("CUDA error: an illegal memory access was encountered"))
        True
    """
    said = str(error)
    return "CUDA" in said and any(words in said for words in _LOST)
