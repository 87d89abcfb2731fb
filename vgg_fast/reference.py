"""What each op means, in plain PyTorch. This file is the specification: kernels are tested against it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntFlag

import torch
import torch.nn.functional as F
from torch import Tensor


class Step(IntFlag):
    """One entry of the ``program`` of :func:`conv_stack`: what follows the convolution."""

    NONE = 0
    RELU = 1
    POOL = 2
    TAP = 4  # return the value before the pool as well


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False, pool: bool = False) -> Tensor:
    """3x3 convolution, stride 1, zero padding 1, then optional ReLU and 2x2/2 max-pool.

    Args:
        x: ``[N, Cin, H, W]``, any memory format.
        weight: ``[Cout, Cin, 3, 3]``, the dtype of ``x``.
        bias: ``[Cout]`` or None.
        relu: apply ReLU.
        pool: apply a 2x2 max-pool with stride 2 (floor) at the end.

    Returns:
        ``[N, Cout, H, W]``, or ``[N, Cout, H // 2, W // 2]`` with ``pool``.

    Example:
        >>> conv3x3(torch.ones(1, 3, 4, 4), torch.ones(8, 3, 3, 3), relu=True, pool=True).shape
        torch.Size([1, 8, 2, 2])
    """
    y = F.conv2d(x, weight, bias, stride=1, padding=1)
    if relu:
        y = F.relu(y)
    return maxpool2x2(y) if pool else y


def maxpool2x2(x: Tensor) -> Tensor:
    """2x2 max-pool with stride 2, floor: ``[N, C, H, W]`` -> ``[N, C, H // 2, W // 2]``; NaN is passed on.

    Example:
        >>> maxpool2x2(torch.arange(16.0).reshape(1, 1, 4, 4)).flatten().tolist()
        [5.0, 7.0, 13.0, 15.0]
    """
    return F.max_pool2d(x, kernel_size=2, stride=2)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """Fully connected layer, then optional ReLU: ``[..., in]`` with weight ``[out, in]`` -> ``[..., out]``.

    Computed in float32 (float64 for float64 input) and rounded once at the end.

    Example:
        >>> linear(torch.ones(2, 3), torch.ones(5, 3), relu=True).shape
        torch.Size([2, 5])
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return (F.relu(y) if relu else y).to(x.dtype)


def conv3x3_affine(x: Tensor, weight: Tensor, affine: Tensor, relu: bool, pool: bool) -> Tensor:
    """One step of :func:`conv_stack`: ``conv(x, weight) * scale + shift``, then ReLU and pool.

    Args:
        x: ``[N, Cin, H, W]``.
        weight: ``[Cout, Cin, 3, 3]`` with the sign of the scale multiplied in (see :mod:`vgg_fast.fold`).
        affine: fp32 ``[2, Cout]``: scale > 0, shift.
        relu: apply ReLU.
        pool: apply the 2x2 max-pool.

    Returns:
        ``[N, Cout, H, W]``, or half of it with ``pool``, in the dtype of ``x``; computed in float32 (float64 for
        float64 input) and rounded once at the end.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    scale, shift = affine.to(wide)[:, :, None, None]
    y = F.conv2d(x.to(wide), weight.to(wide), padding=1) * scale + shift
    if relu:
        y = F.relu(y)
    return (maxpool2x2(y) if pool else y).to(x.dtype)


def conv_stack(x: Tensor, weights: Sequence[Tensor], affines: Sequence[Tensor], program: Sequence[int]) -> Tensor:
    """A chain of convolutions; intermediate values are rounded to the dtype of ``x``, as in the steps one by one.

    Args:
        x: ``[N, C0, H, W]``, any floating dtype and memory format.
        weights: ``[Ci, C(i-1), 3, 3]`` each, see :func:`conv3x3_affine`.
        affines: fp32 ``[2, Ci]`` each: scale > 0, shift.
        program: a :class:`Step` each: what follows the convolution.

    Returns:
        ``[N, Cn, H', W']`` in the dtype of ``x``; every POOL halves H and W (floor).

    Raises:
        ValueError: not as many weights, affines and steps.

    Example:
        >>> affine = torch.tensor([[1.0] * 8, [0.0] * 8])
        >>> conv_stack(torch.ones(1, 3, 4, 4), [torch.ones(8, 3, 3, 3)], [affine], [Step.RELU | Step.POOL]).shape
        torch.Size([1, 8, 2, 2])
    """
    return conv_stack_taps(x, weights, affines, program)[-1]


def conv_stack_taps(
    x: Tensor, weights: Sequence[Tensor], affines: Sequence[Tensor], program: Sequence[int]
) -> list[Tensor]:
    """:func:`conv_stack` with the values before the pool of every step with TAP, in order; the result comes last.

    Example:
        >>> weight, affine = torch.ones(8, 3, 3, 3), torch.tensor([[1.0] * 8, [0.0] * 8])
        >>> results = conv_stack_taps(torch.ones(1, 3, 4, 4), [weight], [affine], [Step.POOL | Step.TAP])
        >>> [tuple(y.shape) for y in results]
        [(1, 8, 4, 4), (1, 8, 2, 2)]
    """
    taps = []
    for weight, affine, step in zip(weights, affines, program, strict=True):
        x = conv3x3_affine(x, weight, affine, bool(step & Step.RELU), False)
        if step & Step.TAP:
            taps.append(x)
        if step & Step.POOL:
            x = maxpool2x2(x)
    return [*taps, x]
