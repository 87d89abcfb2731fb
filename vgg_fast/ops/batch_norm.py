"""``bn_relu_pool`` and its gradient: what stands between two convolutions under gradients, in one pass each way.

    y = max_pool(relu(round(z * scale + shift)))

z and y are fp32 or bf16 ``[N, C, H, W]`` in channels_last, ``affine`` is fp32 ``[2, C]``: scale and shift. The gradient
needs z and nothing else: the ReLU's mask and the pool's choice (of equals the first, of NaNs the last) are found again.

    dz = g * factor + (z - mean) * slope + offset

with g = dy where it came from, else 0; ``factor`` is fp32 ``[1, C]``, ``centre`` fp32 ``[3, C]`` (mean, slope, offset)
or None. ``batch_moments(z)`` are mean and biased variance of every channel, ``bn_relu_pool_sums`` the sums of g and of
``g * (z - mean)``; both are float64 ``[2, C]``. All of them give the same bits for any number of threads.

``batch_norm_forward`` and ``batch_norm_backward`` are a batch norm with what follows it, made of these: the first
returns y and a state, float64 ``[4, C]`` (mean, ``1 / sqrt(variance + eps)``, scale, shift), of the batch's statistics
unless ``mean`` and ``variance`` are given; the second dz, and float64 ``[2, C]``: the gradients of weight and bias.
``batch`` says that the statistics were the batch's, so that dz goes through them, too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import register_fake

from vgg_fast.ops._declare import define, fallback

# Made of PyTorch's own operators, every function below is also its op's fake: shapes, dtypes, memory formats.


def _before_pool(z: Tensor, affine: Tensor, relu: bool) -> Tensor:
    scale, shift = affine[:, :, None, None]
    v = (z.float() * scale + shift).to(z.dtype)
    return F.relu(v) if relu else v


define("vgg_fast::bn_relu_pool", "(Tensor z, Tensor affine, bool relu, bool pool) -> Tensor")


@register_fake("vgg_fast::bn_relu_pool")
@fallback("vgg_fast::bn_relu_pool")
def _value(z: Tensor, affine: Tensor, relu: bool, pool: bool) -> Tensor:
    v = _before_pool(z, affine, relu)
    return (F.max_pool2d(v, 2) if pool else v).contiguous(memory_format=torch.channels_last)


define("vgg_fast::batch_moments", "(Tensor z) -> Tensor")


@register_fake("vgg_fast::batch_moments")
@fallback("vgg_fast::batch_moments")
def _moments(z: Tensor) -> Tensor:
    variance, mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    return torch.stack([mean, variance])


def _unpooled(dy: Tensor, z: Tensor, affine: Tensor, relu: bool, pool: bool) -> Tensor:
    """g in float32, as large as z."""
    v = _before_pool(z, affine, relu)
    g = dy.float()
    if pool:
        _, index = F.max_pool2d(v, 2, return_indices=True)
        g = torch.zeros_like(v, dtype=torch.float32).flatten(2).scatter(2, index.flatten(2), g.flatten(2)).view(v.shape)
    return torch.where(v <= 0, 0.0, g) if relu else g


define(
    "vgg_fast::bn_relu_pool_sums", "(Tensor dy, Tensor z, Tensor affine, Tensor mean, bool relu, bool pool) -> Tensor"
)


@register_fake("vgg_fast::bn_relu_pool_sums")
@fallback("vgg_fast::bn_relu_pool_sums")
def _sums(dy: Tensor, z: Tensor, affine: Tensor, mean: Tensor, relu: bool, pool: bool) -> Tensor:
    g = _unpooled(dy, z, affine, relu, pool).double()
    centred = z.double() - mean[0, :, None, None]
    return torch.stack([g.sum((0, 2, 3)), (g * centred).sum((0, 2, 3))])


define(
    "vgg_fast::bn_relu_pool_backward",
    "(Tensor dy, Tensor z, Tensor affine, Tensor factor, Tensor? centre, bool relu, bool pool) -> Tensor",
)


@register_fake("vgg_fast::bn_relu_pool_backward")
@fallback("vgg_fast::bn_relu_pool_backward")
def _gradient(
    dy: Tensor, z: Tensor, affine: Tensor, factor: Tensor, centre: Tensor | None, relu: bool, pool: bool
) -> Tensor:
    dz = _unpooled(dy, z, affine, relu, pool) * factor[0, :, None, None]
    if centre is not None:
        mean, slope, offset = centre[:, :, None, None]
        dz = dz + ((z.float() - mean) * slope + offset)
    return dz.to(z.dtype).contiguous(memory_format=torch.channels_last)


define(
    "vgg_fast::batch_norm_forward",
    "(Tensor z, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? variance, float eps, bool relu, bool pool) "
    "-> (Tensor, Tensor)",
)


@register_fake("vgg_fast::batch_norm_forward")
@fallback("vgg_fast::batch_norm_forward")
def _forward(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    relu: bool,
    pool: bool,
) -> tuple[Tensor, Tensor]:
    moments = _moments(z) if mean is None or variance is None else torch.stack([mean, variance]).double()
    invstd = torch.rsqrt(moments[1] + eps)
    scale = invstd if weight is None else invstd * weight.double()
    shift = -moments[0] * scale
    shift = shift if bias is None else shift + bias.double()
    state = torch.stack([moments[0], invstd, scale, shift])
    return _value(z, state[2:].float(), relu, pool), state


define(
    "vgg_fast::batch_norm_backward",
    "(Tensor dy, Tensor z, Tensor state, bool batch, bool relu, bool pool) -> (Tensor, Tensor)",
)


@register_fake("vgg_fast::batch_norm_backward")
@fallback("vgg_fast::batch_norm_backward")
def _backward(dy: Tensor, z: Tensor, state: Tensor, batch: bool, relu: bool, pool: bool) -> tuple[Tensor, Tensor]:
    mean, invstd, scale, _ = state
    affine = state[2:].float()
    sums = _sums(dy, z, affine, mean.float()[None], relu, pool)
    count = z.numel() // z.shape[1]
    centre = torch.stack([mean, -scale * invstd.square() * sums[1] / count, -scale * sums[0] / count]).float()
    dz = _gradient(dy, z, affine, affine[:1], centre if batch else None, relu, pool)
    return dz, torch.stack([sums[1] * invstd, sums[0]])
