"""``vgg_fast::conv_stack``: a chain of convolutions in one call, the activations staying in the kernel's own layout.

``program[i]`` (a ``reference.Step``: RELU 1, POOL 2) says what follows convolution i; ``weights`` and ``affines`` come
from ``pack(..., kernel)``. Intermediate values are rounded to the dtype of x, so the chain has the bits of the steps
taken one by one. For inference: it has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from vgg_fast import reference, selection
from vgg_fast.ops._layout import empty_image

define(
    "vgg_fast::conv_stack",
    "(Tensor x, Tensor[] weights, Tensor[] affines, int[] program, str kernel, bool channels_last) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@register_fake("vgg_fast::conv_stack")
def _fake(
    x: Tensor,
    weights: Sequence[Tensor],
    affines: Sequence[Tensor],
    program: Sequence[int],
    kernel: str,
    channels_last: bool,
) -> Tensor:
    height, width = x.shape[2:]
    for step in program:
        if step & reference.Step.POOL:
            height, width = height // 2, width // 2
    return empty_image(x, affines[-1].shape[1], height, width, channels_last)


def _python(
    x: Tensor,
    weights: Sequence[Tensor],
    affines: Sequence[Tensor],
    program: Sequence[int],
    kernel: str,
    channels_last: bool,
) -> Tensor:
    name = selection.choose(x.dtype, x.device, kernel)
    if name == "triton":
        from vgg_fast.kernels import conv3x3 as triton_kernel

        y = triton_kernel.conv_stack(x, weights, affines, program)
    elif name == "cuda":
        y = torch.ops.vgg_fast_cuda.conv_stack(x, weights, affines, program)
    else:
        y = reference.conv_stack(x, weights, affines, program)
    return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def register(keys: list[str]) -> None:
    """Puts the Python implementation behind these dispatch keys."""
    for key in keys:
        impl("vgg_fast::conv_stack", key)(_python)
