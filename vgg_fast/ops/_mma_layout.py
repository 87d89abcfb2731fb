"""The layout of a weight that the tensor-core kernels of csrc/cuda read: csrc/cuda/conv3x3_mma_cuda.h."""

from __future__ import annotations

import torch
from torch import Tensor


def applies(cin: int, dtype: torch.dtype) -> bool:
    """Whether the pixels of x are whole vectors of 16 bytes; if not, the plain kernel and its layout are used."""
    return cin * dtype.itemsize % 16 == 0


def shape(cout: int, cin: int, dtype: torch.dtype) -> tuple[int, ...]:
    """``[chunks, kw, kh, 2, cout_stored, u]``: ``u`` channels are 16 bytes, a chunk is two times that.

    Example:
        >>> shape(64, 128, torch.float16)
        (8, 3, 3, 2, 64, 8)
    """
    unit = 16 // dtype.itemsize
    return -(-cin // (2 * unit)), 3, 3, 2, -(-cout // 32) * 32, unit


def pack(weight: Tensor) -> Tensor:
    """``[Cout, Cin, 3, 3]`` laid out; fp32 values are rounded to tf32, to nearest with ties away from zero.

    Row ``8 j + 2 t + e`` of a block of ``4 u`` rows holds output channel ``u t + 2 j + e``. Lane ``t`` of four then
    ends up with the sums of ``u`` neighbouring channels, its share of ``u / 2`` products.
    """
    if weight.dtype == torch.float32:
        cut = ((weight.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
        weight = torch.where(weight.isfinite(), cut, weight)
    cout, cin = weight.shape[:2]
    chunks, _, _, halves, stored, unit = shape(cout, cin, weight.dtype)
    padded = weight.new_zeros(stored, chunks * halves * unit, 3, 3)
    padded[:cout, :cin] = weight
    blocks = padded.view(stored // (4 * unit), 4, unit // 2, 2, chunks, halves, unit, 3, 3)
    # [block, t, j, e, chunk, half, channel, kh, kw] -> [chunk, kw, kh, half, block, j, t, e, channel]
    return blocks.permute(4, 8, 7, 5, 0, 2, 1, 3, 6).reshape(chunks, 3, 3, halves, stored, unit)
