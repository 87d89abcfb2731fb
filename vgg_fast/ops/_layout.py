"""Memory formats as PyTorch decides them, from strides alone."""

from __future__ import annotations

import torch
from torch import Tensor


def suggests_channels_last(tensor: Tensor) -> bool:
    """``Tensor::suggest_memory_format() == ChannelsLast`` of C++: strides grow in the order C, W, H, N.

    Example:
        >>> suggests_channels_last(torch.empty(2, 3, 4, 5, memory_format=torch.channels_last))
        True
    """
    if tensor.dim() != 4:
        return False
    sizes, strides = tensor.shape, tensor.stride()
    if strides[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        size, stride = sizes[d], strides[d]
        if size == 0 or stride < least or (d == 0 and least == strides[1]):
            return False
        least = stride * size if size > 1 else stride
    return True


def empty_image(like: Tensor, channels: int, height: int, width: int, channels_last: bool) -> Tensor:
    """An uninitialised ``[N, channels, height, width]`` like ``like``."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (like.shape[0], channels, height, width),
        dtype=like.dtype,
        device=like.device,
        memory_format=memory_format,
    )
