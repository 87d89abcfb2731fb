"""2x2 max-pool with stride 2 in Triton; NaN is passed on and ties keep the first value, as in PyTorch.

    out[n, h, w, c] = max(x[n, 2h, 2w, c], x[n, 2h, 2w + 1, c], x[n, 2h + 1, 2w, c], x[n, 2h + 1, 2w + 1, c])

A contiguous NCHW tensor is an NHWC one with N * C images of one channel, so one kernel serves both layouts.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .support import check_supported, unsupported

__all__ = ["constants", "maxpool2x2", "unsupported"]

_ELEMENTS = 1024  # per program: 8 for each of 128 threads, one 16-byte access in fp16


@triton.jit(do_not_specialize=["ROWS", "H", "W"])
def _maxpool2x2_kernel(
    x_ptr,  # [N, H, W, C]
    out_ptr,  # [N, H // 2, W // 2, C]
    ROWS,  # N * (H // 2) * (W // 2)
    H,
    W,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    COLUMNS: tl.constexpr = (C + BC - 1) // BC
    program = tl.program_id(0)
    c = (program % COLUMNS * BC + tl.arange(0, BC))[None, :]
    row = (program // COLUMNS).to(tl.int64) * BR + tl.arange(0, BR)
    mask = (row < ROWS)[:, None] & (c < C)
    line = row // (W // 2)
    image = line // (H // 2)
    corner = (image * H + line % (H // 2) * 2) * W + row % (W // 2) * 2
    x_ptrs = x_ptr + corner[:, None] * C + c
    below = W.to(tl.int64) * C
    # fp32 holds every fp16 and bf16 exactly; the interpreter compares bf16 by its bits otherwise.
    best = tl.load(x_ptrs, mask=mask).to(tl.float32)
    value = tl.load(x_ptrs + C, mask=mask).to(tl.float32)
    best = tl.where((value > best) | (value != value), value, best)
    value = tl.load(x_ptrs + below, mask=mask).to(tl.float32)
    best = tl.where((value > best) | (value != value), value, best)
    value = tl.load(x_ptrs + below + C, mask=mask).to(tl.float32)
    best = tl.where((value > best) | (value != value), value, best)
    tl.store(out_ptr + row[:, None] * C + c, best.to(out_ptr.dtype.element_ty), mask=mask)


def constants(channels: int) -> dict[str, int]:
    """The compile-time arguments of the kernel for a number of channels: what a launch compiles."""
    bc = min(_ELEMENTS, triton.next_power_of_2(channels))
    return {"C": channels, "BR": _ELEMENTS // bc, "BC": bc}


def maxpool2x2(x: Tensor) -> Tensor:
    """2x2 max-pool with stride 2, rounding down.

    Args:
        x: ``[N, C, H, W]``, fp32, fp16 or bf16, channels_last or contiguous (anything else is copied first); on a GPU,
            or on the CPU in Triton's interpreter.

    Returns:
        ``[N, C, H // 2, W // 2]``: channels_last where x is (and is not contiguous as well), else contiguous.

    Raises:
        ValueError: for another dtype or rank, or a map smaller than 2x2.

    Example (on a machine without a GPU: with ``TRITON_INTERPRET=1``):
        >>> maxpool2x2(torch.arange(16.0).reshape(1, 1, 4, 4)).flatten()
        tensor([ 5.,  7., 13., 15.])
    """
    check_supported("maxpool2x2", x)
    if x.dim() != 4:
        raise ValueError(f"maxpool2x2 (triton): x has shape {tuple(x.shape)}; expected [N, C, H, W]")
    n, c, h, w = x.shape
    if h < 2 or w < 2:
        raise ValueError(f"maxpool2x2 (triton): a {h}x{w} map is smaller than 2x2")
    planar = x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.contiguous_format if planar else torch.channels_last
    x = x.contiguous(memory_format=memory_format)
    out = torch.empty((n, c, h // 2, w // 2), dtype=x.dtype, device=x.device, memory_format=memory_format)
    if not out.numel():
        return out
    channels = 1 if planar else c
    rows = out.numel() // channels
    kwargs = constants(channels)
    grid = (triton.cdiv(rows, kwargs["BR"]) * triton.cdiv(channels, kwargs["BC"]),)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _maxpool2x2_kernel[grid](x, out, rows, h, w, **kwargs)
    return out
