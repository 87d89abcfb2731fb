"""``vgg_fast::conv3x3``: 3x3 convolution, stride 1, padding 1, with optional bias, ReLU and 2x2/2 max-pool.

    y = pool(relu(conv(x, weight) + bias))

x ``[N, Cin, H, W]``, weight ``[Cout, Cin, 3, 3]``, bias ``[Cout]``; fp32, bf16 or fp16, all of one dtype; y is
channels_last if x or weight is. Differentiable, twice. ``kernel`` is ``auto`` or the name of a kernel of the device,
which then runs or raises RuntimeError.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import impl, register_autograd, register_fake

from vgg_fast import reference, selection
from vgg_fast.ops._declare import define, fallback
from vgg_fast.ops._layout import empty_image, suggests_channels_last

define(
    "vgg_fast::conv3x3",
    "(Tensor x, Tensor weight, Tensor? bias=None, bool relu=False, bool pool=False, str kernel='auto') -> Tensor",
)


def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False, pool: bool = False, kernel: str = "auto"
) -> Tensor:
    """The op; see the module's docstring.

    Example:
        >>> conv3x3(torch.ones(1, 3, 4, 4), torch.ones(8, 3, 3, 3), relu=True, pool=True).shape
        torch.Size([1, 8, 2, 2])
    """
    return torch.ops.vgg_fast.conv3x3(x, weight, bias, relu, pool, kernel)


@register_fake("vgg_fast::conv3x3")
def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False, pool: bool = False, kernel: str = "auto"
) -> Tensor:
    torch._check(x.dim() == 4, lambda: f"conv3x3: x must be [N, C, H, W], got {x.dim()} dimensions")
    torch._check(
        weight.dim() == 4 and weight.shape[1] == x.shape[1] and weight.shape[2:] == (3, 3),
        lambda: f"conv3x3: weight must be [Cout, {x.shape[1]}, 3, 3] for this x, got {tuple(weight.shape)}",
    )
    torch._check(x.dtype == weight.dtype, lambda: f"conv3x3: x is {x.dtype} and weight {weight.dtype}")
    height, width = (x.shape[2] // 2, x.shape[3] // 2) if pool else (x.shape[2], x.shape[3])
    last = suggests_channels_last(x) or suggests_channels_last(weight)
    return empty_image(x, weight.shape[0], height, width, last)


@fallback("vgg_fast::conv3x3")
def _python(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False, pool: bool = False, kernel: str = "auto"
) -> Tensor:
    """For devices without a compiled implementation: the kernel that `selection` chooses."""
    # PyTorch leaves out arguments that have their default, hence the defaults once more.
    name = selection.choose(x.dtype, x.device, selection.exactly(kernel))
    if name == selection.REFERENCE:
        return reference.conv3x3(x, weight, bias, relu, pool)
    packed, affine = torch.ops.vgg_fast.pack(weight, bias, None, None, None, None, 0.0, name)
    last = suggests_channels_last(x) or suggests_channels_last(weight)
    program = [int(relu) * reference.Step.RELU | int(pool) * reference.Step.POOL]
    return torch.ops.vgg_fast.conv_stack(x, [packed], [affine], program, name, last)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.relu, ctx.pool, _ = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """From PyTorch's own differentiable formulas, so that second derivatives exist.

    The value before the pool is computed again: keeping it would cost the memory that fusing saves.
    """
    x, weight, bias = ctx.saved_tensors
    if ctx.relu or ctx.pool:
        before = F.conv2d(x, weight, bias, padding=1)
        if ctx.pool:
            # The pool of the ReLU: a ReLU before it changes which of several non-positive elements is the first.
            pooled_from = F.relu(before) if ctx.relu else before
            _, index = F.max_pool2d(pooled_from.detach(), 2, return_indices=True)
            flat = torch.zeros_like(before).flatten(2)
            grad = flat.scatter(2, index.flatten(2), grad.flatten(2)).view_as(before)
        if ctx.relu:
            grad = grad * (before > 0)
    wanted = [*ctx.needs_input_grad[:2], bias is not None and ctx.needs_input_grad[2]]
    channels = None if bias is None else [weight.shape[0]]
    grads = torch.ops.aten.convolution_backward(
        grad, x, weight, channels, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted
    )
    return (*(g if want else None for g, want in zip(grads, wanted, strict=True)), None, None, None)


register_autograd("vgg_fast::conv3x3", _backward, setup_context=_setup_context)


def _autocast(device_type: str) -> None:
    """Under autocast the operands are cast as PyTorch casts those of conv2d."""

    def cast(argument: Any) -> Any:
        eligible = isinstance(argument, Tensor) and argument.is_floating_point() and argument.dtype != torch.float64
        return argument.to(torch.get_autocast_dtype(device_type)) if eligible else argument

    @impl("vgg_fast::conv3x3", f"Autocast{device_type.upper()}")
    def run(*arguments: Any) -> Tensor:
        with torch.autocast(device_type, enabled=False):
            return torch.ops.vgg_fast.conv3x3(*map(cast, arguments))


_autocast("cpu")
_autocast("cuda")
