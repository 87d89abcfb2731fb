"""``vgg_fast::conv_stack_backward``: the gradient of a chain in its input, the weights being constants.

``conv_stack_masks`` is ``conv_stack`` that also returns what its gradient needs: for every step with RELU or POOL a
mask, in order, and the result comes last. A mask is uint8 ``[N, ceil(C / 16), H, W, 2]``, the two bytes being a bit for
each of 16 channels: whether a gradient passes to that value of the convolution's result. The ReLU has to let it pass
(NaN passes) and the pool to choose it (of equals the first, of NaNs the last).

    dz = dy of the value, or of its window, where the mask has a bit, else 0; times factor
    dx = conv3x3 of dz with the transposed weight                             step by step, from the last one on

``conv_stack_backward`` takes dy in fp32 or bf16, dense in channels_last, weights from ``pack_transposed``, per step
``factors`` fp32 ``[Cout]`` (the scale of a batch norm in evaluation, else ones), the masks, the program and the four
sizes of x. Between the steps the gradient stays in the kernel's own layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import register_fake

from vgg_fast.ops._declare import define, fallback
from vgg_fast.ops._layout import empty_image
from vgg_fast.ops.conv_stack import ARGUMENTS, Tensors, fake_conv_stack, python_conv_stack
from vgg_fast.reference import Step

define("vgg_fast::conv_stack_masks", f"{ARGUMENTS} -> Tensor[]")
define(
    "vgg_fast::conv_stack_backward",
    "(Tensor dy, Tensor[] weights, Tensor[] factors, Tensor[] masks, int[] program, int[] size, str kernel, "
    "bool channels_last) -> Tensor",
)

_VECTOR = 16  # channels of a mask's two bytes


def unpack_mask(mask: Tensor, channels: int) -> Tensor:
    """A mask as bools ``[N, channels, H, W]``.

    Example:
        >>> unpack_mask(torch.full((1, 1, 1, 1, 2), 3, dtype=torch.uint8), 3).flatten().tolist()
        [True, True, False]
    """
    bits = mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    n, vectors, height, width = mask.shape[:4]
    bits = bits.reshape(n, vectors, height, width, _VECTOR).permute(0, 1, 4, 2, 3)
    return bits.reshape(n, vectors * _VECTOR, height, width)[:, :channels].bool()


def pack_mask(passes: Tensor) -> Tensor:
    """The mask of bools ``[N, C, H, W]``."""
    n, channels, height, width = passes.shape
    vectors = -(-channels // _VECTOR)
    bits = F.pad(passes.to(torch.uint8), (0, 0, 0, 0, 0, vectors * _VECTOR - channels))
    bits = bits.reshape(n, vectors, 2, 8, height, width).permute(0, 1, 4, 5, 2, 3)
    return (bits << torch.arange(8, dtype=torch.uint8, device=passes.device)).sum(-1, dtype=torch.uint8)


def through_gate(dy: Tensor, mask: Tensor | None, factor: Tensor, pool: bool, size: Sequence[int]) -> Tensor:
    """dz of the module's docstring; differentiable in dy.

    Args:
        dy: ``[N, C, H, W]``, or of half the size where there is a pool.
        mask: or None, without ReLU and pool.
        factor: fp32 ``[C]``.
        pool: whether dy is that of windows.
        size: H, W of the result.
    """
    dz = dy.float() * factor[:, None, None]
    if pool:
        dz = dz.repeat_interleave(2, 2).repeat_interleave(2, 3)
        dz = F.pad(dz, (0, size[1] - dz.shape[3], 0, size[0] - dz.shape[2]))
    if mask is not None:
        dz = torch.where(unpack_mask(mask, dz.shape[1]), dz, 0.0)
    return dz.to(dy.dtype)


def sizes(program: Sequence[int], height: int, width: int) -> list[tuple[int, int]]:
    """Height and width of every step's convolution."""
    results = []
    for step in program:
        results.append((height, width))
        if step & Step.POOL:
            height, width = height // 2, width // 2
    return results


@register_fake("vgg_fast::conv_stack_masks")
def _fake_masks(
    x: Tensor, weights: Tensors, affines: Tensors, program: Sequence[int], kernel: str, channels_last: bool
) -> list[Tensor]:
    masks = []
    for affine, step, (height, width) in zip(affines, program, sizes(program, *x.shape[2:]), strict=True):
        if step & (Step.RELU | Step.POOL):
            shape = x.shape[0], -(-affine.shape[1] // _VECTOR), height, width, 2
            masks.append(x.new_empty(shape, dtype=torch.uint8))
    return [*masks, fake_conv_stack(x, weights, affines, program, kernel, channels_last)]


@fallback("vgg_fast::conv_stack_masks")
def _python_masks(
    x: Tensor, weights: Tensors, affines: Tensors, program: Sequence[int], kernel: str, channels_last: bool
) -> list[Tensor]:
    masks = []
    for weight, affine, step in zip(weights, affines, program, strict=True):
        value = python_conv_stack(x, [weight], [affine], [step & Step.RELU], kernel, True)
        passes = ~(value <= 0) if step & Step.RELU else torch.ones_like(value, dtype=torch.bool)
        x = value
        if step & Step.POOL:
            x, index = F.max_pool2d(value, 2, return_indices=True)
            chosen = torch.zeros_like(passes).flatten(2).scatter(2, index.flatten(2), True)
            passes = passes & chosen.view_as(passes)
        if step & (Step.RELU | Step.POOL):
            masks.append(pack_mask(passes))
    last = torch.channels_last if channels_last else torch.contiguous_format
    return [*masks, x.contiguous(memory_format=last)]


@register_fake("vgg_fast::conv_stack_backward")
def _fake_backward(
    dy: Tensor, _weights: Any, _factors: Any, _masks: Any, _program: Any, size: Sequence[int], _kernel: str, last: bool
) -> Tensor:
    return empty_image(dy, size[1], size[2], size[3], last)


@fallback("vgg_fast::conv_stack_backward")
def _python_backward(
    dy: Tensor,
    weights: Tensors,
    factors: Tensors,
    masks: Tensors,
    program: Sequence[int],
    size: Sequence[int],
    kernel: str,
    channels_last: bool,
) -> Tensor:
    left, maps = list(masks), sizes(program, size[2], size[3])
    for i in reversed(range(len(program))):
        mask = left.pop() if program[i] & (Step.RELU | Step.POOL) else None
        dz = through_gate(dy, mask, factors[i], bool(program[i] & Step.POOL), maps[i])
        channels = factors[i - 1].numel() if i else size[1]
        ones = torch.stack([dz.new_ones(channels), dz.new_zeros(channels)]).float()
        dy = python_conv_stack(dz, [weights[i]], [ones], [Step.NONE], kernel, channels_last or i > 0)
    return dy
