"""``vgg_fast::pack``: a convolution's weight, bias and batch-norm in the form a kernel reads.

    scale = bn_weight / sqrt(bn_var + bn_eps)          (1 without batch-norm), in float64
    shift = bn_bias + (bias - bn_mean) * scale

Returns ``(packed, affine)``: the weight times the sign of the scale, laid out for ``kernel`` (an opaque tensor), and
fp32 ``[2, Cout]`` holding ``|scale|`` (1 where the scale is 0) and ``shift``. Why the scale stays out of the weights:
vgg_fast/fold.py.

``pack_transposed(weight, kernel)`` is the packed weight of the convolution that takes the gradient of the output to
that of the input: Cin and Cout change places, and the taps are in reverse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from vgg_fast import fold, selection
from vgg_fast.ops._declare import define, fallback

define(
    "vgg_fast::pack",
    "(Tensor weight, Tensor? bias, Tensor? bn_mean, Tensor? bn_var, Tensor? bn_weight, Tensor? bn_bias, "
    "float bn_eps, str kernel) -> (Tensor, Tensor)",
)

define("vgg_fast::pack_transposed", "(Tensor weight, str kernel) -> Tensor")


@register_fake("vgg_fast::pack")
def _fake(weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    kernel = others[-1]
    cout, cin = weight.shape[:2]
    affine = weight.new_empty((2, cout), dtype=torch.float32)
    if kernel not in selection.cpu_kernels():
        return weight.new_empty(weight.shape if kernel == selection.REFERENCE else (cout, 3, 3, cin)), affine
    words = torch.ops.vgg_fast.cpu_packed_words(cout, cin, kernel)
    return weight.new_empty((words,), dtype=torch.int32), affine


@fallback("vgg_fast::pack")
def _python(
    weight: Tensor,
    bias: Tensor | None,
    bn_mean: Tensor | None,
    bn_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    bn_eps: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    sign, affine = fold.batchnorm_affine(weight.shape[0], bias, bn_mean, bn_var, bn_weight, bn_bias, bn_eps)
    signed = weight * sign.to(weight)[:, None, None, None]
    affine = affine.to(weight.device)
    # The GPU kernels read [Cout, 3, 3, Cin].
    return (signed if kernel == selection.REFERENCE else signed.permute(0, 2, 3, 1).contiguous()), affine


@register_fake("vgg_fast::pack_transposed")
def _fake_transposed(weight: Tensor, kernel: str) -> Tensor:
    return _fake(weight.transpose(0, 1), kernel)[0]


@fallback("vgg_fast::pack_transposed")
def _transposed(weight: Tensor, kernel: str) -> Tensor:
    turned = weight.flip(2, 3).transpose(0, 1)
    return _python(turned, None, None, None, None, None, 0.0, kernel)[0]
