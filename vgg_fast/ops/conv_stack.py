"""``vgg_fast::conv_stack``: a chain of convolutions in one call, the activations staying in the kernel's own layout.

``program[i]`` (a ``reference.Step``: RELU 1, POOL 2, TAP 4) says what follows convolution i; ``weights`` and
``affines`` come from ``pack(..., kernel)``. Intermediate values are rounded to the dtype of x, so the chain has the
bits of the steps taken one by one. For inference: it has no gradient. ``kernel`` is the name of a kernel, not of a
backend: on a GPU ``cuda`` is that kernel and no other, whatever accelerate() takes for the backend of that name.

``conv_stack_taps`` also returns the values before the pool of every step with TAP, in order; the result comes last.
Perceptual losses want these: a tap and its pooled value come from one pass over the map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.library import register_fake, register_torch_dispatch

from vgg_fast import reference, selection
from vgg_fast.ops import _self_test
from vgg_fast.ops._declare import define, fallback
from vgg_fast.ops._layout import empty_image

Tensors = Sequence[Tensor]

ARGUMENTS = "(Tensor x, Tensor[] weights, Tensor[] affines, int[] program, str kernel, bool channels_last)"
define("vgg_fast::conv_stack", f"{ARGUMENTS} -> Tensor")
define("vgg_fast::conv_stack_taps", f"{ARGUMENTS} -> Tensor[]")


@register_fake("vgg_fast::conv_stack_taps")
def _fake_taps(
    x: Tensor, weights: Tensors, affines: Tensors, program: Sequence[int], kernel: str, channels_last: bool
) -> list[Tensor]:
    height, width = x.shape[2:]
    results = []
    for affine, step in zip(affines, program, strict=True):
        if step & reference.Step.TAP:
            results.append(empty_image(x, affine.shape[1], height, width, channels_last))
        if step & reference.Step.POOL:
            height, width = height // 2, width // 2
    return [*results, empty_image(x, affines[-1].shape[1], height, width, channels_last)]


def run(x: Tensor, weights: Tensors, affines: Tensors, program: Sequence[int], kernel: str) -> list[Tensor]:
    """The taps, then the result, by a kernel that :func:`selection.choose` has named; in a memory format of its own."""
    backend, _, precision = kernel.partition("_")
    if backend == "triton":
        from vgg_fast.kernels import stack

        return stack.conv_stack(x, weights, affines, program, precision or "ieee")
    if backend == "cuda":
        return torch.ops.vgg_fast_cuda.conv_stack_taps(x, weights, affines, program, kernel)
    return reference.conv_stack_taps(x, weights, affines, program)


@fallback("vgg_fast::conv_stack_taps")
def _python_taps(
    x: Tensor, weights: Tensors, affines: Tensors, program: Sequence[int], kernel: str, channels_last: bool
) -> list[Tensor]:
    """For devices without a compiled implementation: the kernel that `selection` chooses."""
    name = selection.choose(x.dtype, x.device, selection.exactly(kernel))
    if name != selection.REFERENCE:
        _self_test.require(name, x.dtype, x.device, run)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    *taps, y = run(x, weights, affines, program, name)
    y = y.clone() if taps and y is taps[-1] else y  # an operator may not return one tensor twice
    return [tensor.contiguous(memory_format=memory_format) for tensor in (*taps, y)]


def _last(taps: Callable[..., list[Tensor]]) -> Callable[..., Tensor]:
    """``conv_stack`` out of ``conv_stack_taps``: the same arguments, and the result alone."""

    def last(x: Tensor, weights: Tensors, affines: Tensors, program: Sequence[int], *rest: Any) -> Tensor:
        if any(step & reference.Step.TAP for step in program):
            raise RuntimeError("conv_stack: a program with taps returns several tensors: call conv_stack_taps")
        return taps(x, weights, affines, program, *rest)[-1]

    return last


fake_conv_stack = register_fake("vgg_fast::conv_stack")(_last(_fake_taps))
python_conv_stack = fallback("vgg_fast::conv_stack")(_last(_python_taps))


def _decomposed(
    mode: FunctionalTensorMode, op: torch._ops.OpOverload, types: Any, args: Any, kwargs: Any
) -> Tensor | list[Tensor]:
    """What torch.compile's graph holds: the Triton kernels where those will run, for Inductor to see; or the op.

    As ``torch.library.triton_op`` does it, for an op that has other kernels as well. An exported program keeps the op.
    """
    x, weights, affines, program, kernel, channels_last = args
    if not _is_seen_through(x, kernel):
        return mode.__torch_dispatch__(op, types, args, kwargs)
    from vgg_fast.kernels import stack

    precision = selection.choose(x.dtype, x.device, selection.exactly(kernel)).partition("_")[2] or "ieee"
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    with mode:
        results = stack.traced(x, weights, affines, program, precision)
        results = [y.contiguous(memory_format=memory_format) for y in results]
    return results if op is torch.ops.vgg_fast.conv_stack_taps.default else results[-1]


def _is_seen_through(x: Tensor, kernel: str) -> bool:
    if x.device.type != "cuda" or not torch._functorch.config.decompose_custom_triton_ops:
        return False
    # A launch is computed from numbers; a graph for all sizes keeps the op, which computes it at each call.
    fixed = all(type(size) is int for size in x.shape)
    return fixed and selection.choose(x.dtype, x.device, selection.exactly(kernel)).startswith("triton")


for _name in ("conv_stack", "conv_stack_taps"):
    register_torch_dispatch(f"vgg_fast::{_name}", FunctionalTensorMode, _decomposed)
