"""What the Triton kernels can run. This file does not import Triton, so that a machine without it can ask."""

from __future__ import annotations

import torch
from torch import Tensor


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


def check_supported(op: str, x: Tensor) -> None:
    """Raise ValueError with the reasons of :func:`unsupported` for this tensor, if there are any."""
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    if reasons := unsupported(x.dtype, capability):
        raise ValueError(f"{op} (triton): {'; '.join(reasons)}")


def check_conv3x3(x: Tensor, weight: Tensor, affine: Tensor, pool: bool) -> None:
    """Raise ValueError for tensors that ``conv3x3`` cannot take, naming what is wrong."""
    check_supported("conv3x3", x)
    if x.dim() != 4:
        raise ValueError(f"conv3x3 (triton): x has shape {tuple(x.shape)}; expected [N, Cin, H, W]")
    _, cin, h, w = x.shape
    if weight.dim() != 4 or weight.shape[1:] != (3, 3, cin) or not weight.is_contiguous():
        raise ValueError(
            f"conv3x3 (triton): weight has shape {tuple(weight.shape)}; expected contiguous [Cout, 3, 3, {cin}], as "
            "layout() makes it"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"conv3x3 (triton): weight is {weight.dtype}, x is {x.dtype}; they must be the same")
    if not weight.device == affine.device == x.device:
        raise ValueError(
            f"conv3x3 (triton): x is on {x.device}, weight on {weight.device} and affine on {affine.device}; "
            "they must be on one device"
        )
    cout = weight.shape[0]
    if affine.shape != (2, cout) or affine.dtype != torch.float32 or not affine.is_contiguous():
        raise ValueError(
            f"conv3x3 (triton): affine is {affine.dtype} of shape {tuple(affine.shape)}; expected contiguous "
            f"torch.float32 [2, {cout}]"
        )
    if not cin or not cout:
        raise ValueError(f"conv3x3 (triton): {cin} input and {cout} output channels; both must be at least 1")
    smallest = 2 if pool else 1
    if min(h, w) < smallest:
        raise ValueError(f"conv3x3 (triton): a {h}x{w} map is smaller than {smallest}x{smallest}")
