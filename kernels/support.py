"""What the Triton kernels can run. This file does not import Triton, so that a machine without it can ask."""

from __future__ import annotations

import torch


def unsupported(dtype: torch.dtype, capability: tuple[int, int] | None) -> list[str]:
    """Why the Triton kernels cannot run, or an empty list.

    Args:
        dtype: of the activations and weights.
        capability: CUDA compute capability, or None for the interpreter.

    Example:
        >>> unsupported(torch.float64, (7, 5))
        ['float64 is not one of float32, float16, bfloat16', 'sm_75 is older than sm_80']
    """
    reasons = []
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"{str(dtype).removeprefix('torch.')} is not one of float32, float16, bfloat16")
    if capability is not None and capability < (8, 0):
        reasons.append(f"sm_{capability[0]}{capability[1]} is older than sm_80")
    return reasons


def check_supported(op: str, x: torch.Tensor) -> None:
    """Raise ValueError with the reasons of :func:`unsupported` for this tensor, if there are any."""
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    if reasons := unsupported(x.dtype, capability):
        raise ValueError(f"{op} (triton): {'; '.join(reasons)}")
