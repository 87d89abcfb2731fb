"""``vgg_fast::conv3x3_weight_grad``: the gradient of ``conv3x3`` in its weight.

    dw[o, i, r, s] = sum over n, h, w of  x[n, i, h + r - 1, w + s - 1] * dy[n, o, h, w]

x ``[N, Cin, H, W]`` and dy ``[N, Cout, H, W]``, fp32 or bf16, are dense in channels_last; the result has shape, dtype
and memory format of ``weight``, whose values do not matter. Sums are fp32, rounded once, and have the same bits for any
number of threads. ``kernel`` is ``auto`` or a CPU micro-kernel, whose instruction set computes it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import register_fake

from vgg_fast.ops._declare import define, fallback
from vgg_fast.ops._layout import empty_image, suggests_channels_last

define("vgg_fast::conv3x3_weight_grad", "(Tensor x, Tensor dy, Tensor weight, str kernel) -> Tensor")


@register_fake("vgg_fast::conv3x3_weight_grad")
def _fake(x: Tensor, dy: Tensor, weight: Tensor, kernel: str) -> Tensor:
    return empty_image(weight, weight.shape[1], 3, 3, suggests_channels_last(weight))


@fallback("vgg_fast::conv3x3_weight_grad")
def _python(x: Tensor, dy: Tensor, weight: Tensor, kernel: str) -> Tensor:
    options = None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    dw = torch.ops.aten.convolution_backward(dy, x, weight.to(x.dtype), *options)[1]
    last = suggests_channels_last(weight)
    return dw.to(weight.dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
