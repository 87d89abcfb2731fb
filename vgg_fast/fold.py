"""Batch-norm in evaluation mode as a per-channel affine map in the epilogue of the convolution before it.

The scale is *not* multiplied into the weights: in bf16 that would round every weight a second time. The epilogue has a
float32 multiply-add per output for the bias anyway, so the scale rides along for nothing. Only its *sign* moves into
the weights, which is exact in every dtype and leaves a scale >= 0: then the 2x2 max-pool commutes with the affine map
and ReLU, and kernels may pool their raw accumulators. A scale of 0 moves into the weights as a whole, so that an
infinite input gives the NaN it has to give before the pool could hide it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def batchnorm_affine(
    channels: int,
    bias: Tensor | None = None,
    bn_mean: Tensor | None = None,
    bn_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    bn_eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Signs and affine map of ``batch_norm(conv(x, w) + bias)`` with running statistics.

    Args:
        channels: Cout, used where every vector is None.
        bias, bn_mean, bn_var, bn_weight, bn_bias: ``[Cout]`` of any floating dtype, or None. Without ``bn_mean`` and
            ``bn_var`` there is no batch-norm.
        bn_eps: added to the variance.

    Returns:
        ``(sign, affine)``: sign ``[Cout]`` fp32 of +1, -1 or 0 to multiply into the weights, and affine fp32
        ``[2, Cout]`` (scale > 0, shift), computed in float64.

    Example:
        >>> sign, affine = batchnorm_affine(2, bias=torch.tensor([1.0, 2.0]))
        >>> affine.tolist()
        [[1.0, 1.0], [1.0, 2.0]]
    """
    device = next((t.device for t in (bias, bn_mean) if t is not None), None)
    shift = torch.zeros(channels, dtype=torch.float64, device=device) if bias is None else bias.detach().double()
    if bn_mean is None or bn_var is None:
        scale = torch.ones_like(shift)
    else:
        scale = torch.rsqrt(bn_var.double() + bn_eps)
        if bn_weight is not None:
            scale = scale * bn_weight.detach().double()
        shift = (shift - bn_mean.double()) * scale
        if bn_bias is not None:
            shift = shift + bn_bias.detach().double()
    sign = torch.where(scale < 0, -1.0, torch.where(scale == 0, 0.0, 1.0)).to(torch.float32)
    magnitude = torch.where(scale == 0, 1.0, scale.abs())
    return sign, torch.stack([magnitude, shift]).to(torch.float32)
