"""``vgg_fast::conv3x3_input_grad``: the gradient of ``conv3x3`` in its input, from the weight as PyTorch has it.

    dx[n, i, h, w] = sum over o, r, s of  dy[n, o, h + 1 - r, w + 1 - s] * weight[o, i, r, s]

dy ``[N, Cout, H, W]`` and the weight have one dtype, fp32 or bf16. For a weight that changes from step to step: it is
packed into memory of the library that every call uses again. ``pack_transposed`` and ``conv_stack`` do the same in two
steps for a weight that does not. ``kernel`` is ``auto`` or a CPU micro-kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import register_fake

from vgg_fast.ops._declare import define, fallback
from vgg_fast.ops._layout import empty_image

define("vgg_fast::conv3x3_input_grad", "(Tensor dy, Tensor weight, str kernel, bool channels_last) -> Tensor")


@register_fake("vgg_fast::conv3x3_input_grad")
def _fake(dy: Tensor, weight: Tensor, kernel: str, channels_last: bool) -> Tensor:
    return empty_image(dy, weight.shape[1], dy.shape[2], dy.shape[3], channels_last)


@fallback("vgg_fast::conv3x3_input_grad")
def _python(dy: Tensor, weight: Tensor, kernel: str, channels_last: bool) -> Tensor:
    dx = torch.nn.functional.conv_transpose2d(dy, weight, padding=1)
    return dx.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
