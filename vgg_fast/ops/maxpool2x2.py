"""``vgg_fast::maxpool2x2``: 2x2 max-pool with stride 2, ``[N, C, H, W]`` -> ``[N, C, H // 2, W // 2]``.

A NaN in a window is passed on; the memory format is that of ``F.max_pool2d``. Differentiable, twice, deterministically.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import register_autograd, register_fake

from vgg_fast import reference, selection
from vgg_fast.ops import _self_test
from vgg_fast.ops._declare import define, fallback
from vgg_fast.ops._layout import empty_image, suggests_channels_last

define("vgg_fast::maxpool2x2", "(Tensor x) -> Tensor")


def maxpool2x2(x: Tensor) -> Tensor:
    """The op; see the module's docstring.

    Example:
        >>> maxpool2x2(torch.arange(16.0).reshape(1, 1, 4, 4)).flatten().tolist()
        [5.0, 7.0, 13.0, 15.0]
    """
    return torch.ops.vgg_fast.maxpool2x2(x)


@register_fake("vgg_fast::maxpool2x2")
def _fake(x: Tensor) -> Tensor:
    torch._check(x.dim() == 4, lambda: f"maxpool2x2: x must be [N, C, H, W], got {x.dim()} dimensions")
    return empty_image(x, x.shape[1], x.shape[2] // 2, x.shape[3] // 2, suggests_channels_last(x))


def _triton(x: Tensor) -> Tensor:
    from vgg_fast.kernels import maxpool2x2 as kernel

    return kernel.maxpool2x2(x)


@fallback("vgg_fast::maxpool2x2")
def _python(x: Tensor) -> Tensor:
    if not _triton_runs(x.dtype, x.device) or x.dim() != 4 or min(x.shape[2:]) < 2:  # PyTorch has its own errors
        return reference.maxpool2x2(x)
    return _triton(x).contiguous(
        memory_format=torch.channels_last if suggests_channels_last(x) else torch.contiguous_format
    )


def _triton_runs(dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cuda" or selection.BACKENDS["triton"].unsupported(selection.problem_on(dtype, device)):
        return False
    test = partial(_self_test.pool_failure, dtype, device, _triton)
    return _self_test.fault("triton maxpool2x2", dtype, device, test) is None


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    _, index = F.max_pool2d(x.detach(), 2, return_indices=True)
    # Windows do not overlap, so no two gradients meet in one element: a scatter, not a sum.
    flat = torch.zeros_like(x).flatten(2)
    return flat.scatter(2, index.flatten(2), grad.flatten(2)).view_as(x)


register_autograd("vgg_fast::maxpool2x2", _backward, setup_context=_setup_context)
