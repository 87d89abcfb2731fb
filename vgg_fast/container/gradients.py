"""The nodes of autograd that ``training.py`` makes a chain of: a convolution, a batch norm, a frozen chain.

Their gradients are kernels of ours. Under ``create_graph=True`` they are formulas of PyTorch instead, which can be
differentiated again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgg_fast.container.chains import uses_batch_statistics
from vgg_fast.container.packs import Pack
from vgg_fast.ops._layout import suggests_channels_last
from vgg_fast.ops.conv_stack_backward import sizes, through_gate
from vgg_fast.reference import Step

_ops = torch.ops.vgg_fast
_LAST = torch.channels_last


@dataclass(frozen=True)
class PackedConvolution:
    """The packed weight of one convolution, and what is known of the plain one."""

    weight: Tensor
    affine: Tensor
    cin: int
    cout: int
    device: torch.device
    channels_last: bool


@dataclass(frozen=True)
class Transposed:
    """The weights of the convolutions that compute the gradient of the input, and what they were made from."""

    packed: list[Tensor]
    stamp: tuple[Any, ...]


@dataclass(frozen=True)
class Task:
    """What a convolution has to know besides its tensors."""

    kept: dict[Any, Transposed]  # transposed packs of the chain
    position: int
    pack: PackedConvolution
    kernel: str
    dtype: torch.dtype
    relu: bool = False
    pool: bool = False
    channels_last: bool = True
    factor: Tensor | None = None  # [Cout], of a batch norm that is folded into the convolution
    centred: bool = False  # whether batch statistics follow, which no bias can change


# --- convolution ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _identity(channels: int) -> Tensor:
    """Scale 1 and shift 0."""
    with torch.inference_mode(False):
        return torch.stack([torch.ones(channels), torch.zeros(channels)])


class Convolution(torch.autograd.Function):
    """``pool(relu(conv(x) * scale + shift))``; saves x for the weight, and the value before the pool.

    That value comes in a list of one where the whole chain was computed at once.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, task: Task, value: list[Tensor | None]
    ) -> Tensor:
        last = task.channels_last or task.pool
        step = Step.RELU if task.relu else Step.NONE
        before = value.pop()
        if before is None:
            before = _ops.conv_stack(x, [task.pack.weight], [task.pack.affine], [step], task.kernel, last)
        elif not last:
            before = before.contiguous()
        y = before
        if task.pool:
            y = _ops.bn_relu_pool(before, _identity(before.shape[1]), False, True)
            if not task.channels_last:
                y = y.contiguous()
        ctx.task, ctx.shape, ctx.format = task, x.shape, suggests_channels_last(x)
        wants_x, wants_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if wants_weight else None,
            weight if wants_x or wants_weight else None,
            before if task.relu or task.pool else None,
        )
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        task: Task = ctx.task
        x, weight, before = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            return (*_differentiable_convolution(ctx, grad, x, weight, before, wanted), None, None)
        dz = grad.contiguous(memory_format=_LAST)
        if before is not None:
            before = before.contiguous(memory_format=_LAST)
            ones = _identity(grad.shape[1])
            factor = ones[:1] if task.factor is None else task.factor[None]
            dz = _ops.bn_relu_pool_backward(dz, before, ones, factor, None, task.relu, task.pool)
        elif task.factor is not None:
            dz = (dz * task.factor[:, None, None]).to(dz.dtype)
        dx = dw = db = None
        if wanted[0]:
            last = ctx.format or suggests_channels_last(weight)
            if weight.requires_grad:
                dx = _ops.conv3x3_input_grad(dz, weight.detach().to(task.dtype), task.kernel, last)
            else:
                key = task.position, task.kernel, task.dtype
                packed = _transposed(task.kept, key, [weight], task.kernel, task.dtype)
                dx = _ops.conv_stack(dz, packed, [_identity(ctx.shape[1])], [Step.NONE], task.kernel, last)
        if wanted[1]:
            dw = _ops.conv3x3_weight_grad(x.contiguous(memory_format=_LAST), dz, weight, task.kernel)
        if wanted[2]:
            # Batch statistics take any bias away again, so that its gradient is 0; PyTorch's is the rounding around it.
            db = dz.new_zeros(dz.shape[1]) if task.centred else dz.sum((0, 2, 3))
        return dx, dw, db, None, None


def _differentiable_convolution(
    ctx: Any, grad: Tensor, x: Tensor | None, weight: Tensor | None, before: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    task: Task = ctx.task
    if before is not None:
        before = before.detach()
        if task.pool:
            _, index = F.max_pool2d(before, 2, return_indices=True)
            flat = grad.new_zeros(before.shape).flatten(2)
            grad = flat.scatter(2, index.flatten(2), grad.flatten(2)).view_as(before)
        if task.relu:
            grad = torch.ops.aten.threshold_backward(grad, before, 0)
    if task.factor is not None:
        grad = grad * task.factor.to(grad.dtype)[:, None, None]
    if weight is None:  # only the bias is wanted
        return None, None, grad.sum((0, 2, 3))
    if x is None:  # its values are not needed, only its shape
        x = grad.new_zeros(()).expand(ctx.shape)
    grads = torch.ops.aten.convolution_backward(
        grad, x, weight.to(grad.dtype), [weight.shape[0]], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, list(wanted)
    )
    dx, dw, db = (g if want else None for g, want in zip(grads, wanted, strict=True))
    return dx, dw if dw is None else dw.to(weight.dtype), db


def _transposed(
    kept: dict[Any, Transposed], key: tuple[Any, ...], weights: Sequence[Tensor], kernel: str, dtype: torch.dtype
) -> list[Tensor]:
    """The packed weights of the gradient in x, kept for weights that are constants."""
    stamp = *((weight.data_ptr(), weight._version) for weight in weights), _ops.fingerprint(weights)
    known = kept.get(key)
    if known is not None and known.stamp == stamp:
        return known.packed
    packed = [_ops.pack_transposed(weight.detach().to(dtype), kernel) for weight in weights]
    kept[key] = Transposed(packed, stamp)
    return packed


# --- a chain whose weights are constants ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChainTask:
    """What a frozen chain has to know besides its tensors."""

    kept: dict[Any, Transposed]  # transposed packs of the chain
    pack: Pack
    factors: list[Tensor]  # fp32 [Cout], of batch norms that are folded into the convolutions
    program: list[int]
    kernel: str
    dtype: torch.dtype
    channels_last: bool


class FrozenChain(torch.autograd.Function):
    """A whole chain in one call each way; saves a bit for every value, and no values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, task: ChainTask, *weights: Tensor) -> Tensor:
        pack = task.pack
        *masks, y = _ops.conv_stack_masks(x, pack.weights, pack.affines, task.program, task.kernel, task.channels_last)
        ctx.task, ctx.shape = task, list(x.shape)
        ctx.channels_last = suggests_channels_last(x) or suggests_channels_last(weights[0])
        ctx.save_for_backward(*weights, *masks)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        task: ChainTask = ctx.task
        program, steps = task.program, len(task.program)
        weights, masks = ctx.saved_tensors[:steps], list(ctx.saved_tensors[steps:])
        if torch.is_grad_enabled():
            maps = sizes(program, *ctx.shape[2:])
            for i in reversed(range(steps)):
                mask = masks.pop() if program[i] & (Step.RELU | Step.POOL) else None
                dz = through_gate(grad, mask, task.factors[i], bool(program[i] & Step.POOL), maps[i])
                grad = F.conv_transpose2d(dz, weights[i].to(dz.dtype), padding=1)
            dx = grad
        else:
            packed = _transposed(task.kept, (task.kernel, task.dtype), weights, task.kernel, task.dtype)
            dy, options = grad.contiguous(memory_format=_LAST), (ctx.shape, task.kernel, ctx.channels_last)
            dx = _ops.conv_stack_backward(dy, packed, task.factors, masks, program, *options)
        return dx, None, *[None] * steps


# --- batch norm -----------------------------------------------------------------------------------------------------


def normalises_with(bn: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None]:
    """Running mean and variance where they are what to normalise with, so that autograd watches over them."""
    return (None, None) if uses_batch_statistics(vars(bn)) else (bn.running_mean, bn.running_var)


class Normalisation(torch.autograd.Function):
    """``pool(relu(batch_norm(z)))`` with statistics of the batch, or with trained parameters; saves z."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        bn: nn.BatchNorm2d,
        relu: bool,
        pool: bool,
        channels_last: bool,
    ) -> Tensor:
        ctx.batch = mean is None
        y, ctx.state = _ops.batch_norm_forward(z, weight, bias, mean, variance, bn.eps, relu, pool)
        if ctx.batch:
            _track(bn, ctx.state, z.numel() // z.shape[1])
        ctx.eps, ctx.relu, ctx.pool = bn.eps, relu, pool
        ctx.save_for_backward(z, weight, bias, mean, variance)
        return y if channels_last else y.contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, bias, mean, variance = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        nothing = (None,) * 6
        if torch.is_grad_enabled():
            return (*_differentiable_norm(ctx, grad, (z, weight, bias), mean, variance, wanted), *nothing)
        grad = grad.contiguous(memory_format=_LAST)
        dz, sums = _ops.batch_norm_backward(grad, z, ctx.state, ctx.batch, ctx.relu, ctx.pool)
        dw, db = (None if v is None else g.to(v.dtype) for v, g in zip((weight, bias), sums, strict=True))
        grads = (g if want else None for g, want in zip((dz, dw, db), wanted, strict=True))
        return (*grads, *nothing)


def _differentiable_norm(
    ctx: Any,
    grad: Tensor,
    inputs: tuple[Tensor | None, ...],
    mean: Tensor | None,
    variance: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    z, weight, bias = inputs
    assert z is not None
    y = F.batch_norm(z, mean, variance, weight, bias, training=ctx.batch, eps=ctx.eps)
    y = F.relu(y) if ctx.relu else y
    y = F.max_pool2d(y, 2) if ctx.pool else y
    chosen = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want and tensor is not None]
    grads = iter(torch.autograd.grad(y, chosen, grad, create_graph=True))
    return tuple(next(grads) if want else None for want in wanted)


def _track(bn: nn.BatchNorm2d, state: Tensor, count: int) -> None:
    """What ``nn.BatchNorm2d.forward`` does to its buffers in training."""
    if not (bn.training and bn.track_running_stats):
        return
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    unbiased = (state[1].pow(-2) - bn.eps) * (count / (count - 1))
    for running, now in ((bn.running_mean, state[0]), (bn.running_var, unbiased)):
        if running is not None:
            # .data: PyTorch, too, leaves the version counter alone, so that an earlier graph may still be used.
            running.data.mul_(1 - momentum).add_(now.to(running.dtype), alpha=momentum)
