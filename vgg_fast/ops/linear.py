"""``vgg_fast::linear``: a fully connected layer with optional bias and ReLU, and ``vgg_fast::linear_pack``.

    y = relu(x @ weight.T + bias)

x ``[..., in]``, weight ``[out, in]``, bias ``[out]``; fp32, bf16 or fp16, all of one dtype; y ``[..., out]``, dense.
Kernels read PyTorch's own weights. Two of them take fp32 tensors at less precision, and weights as
``linear_pack(weight, kernel)`` makes them: ``avx512_f24`` with the upper 24 bits of each, ``amx_bf16`` rounded to bf16.
``kernel`` is ``auto`` or the name of a kernel, which then runs or raises RuntimeError. For inference: it has no
gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import register_fake

from vgg_fast import reference, selection
from vgg_fast.ops._declare import define, fallback

define("vgg_fast::linear", "(Tensor x, Tensor weight, Tensor? bias=None, bool relu=False, str kernel='auto') -> Tensor")
define("vgg_fast::linear_pack", "(Tensor weight, str kernel) -> Tensor")

F24 = "avx512_f24"  # the one kernel whose packed weights have a layout of their own
PACKING = ("amx_bf16", F24)  # the kernels for which fp32 weights are packed


@register_fake("vgg_fast::linear")
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False, kernel: str = "auto") -> Tensor:
    torch._check(x.dim() >= 1, lambda: "linear: x must be [..., in], got a scalar")
    columns = -(-x.shape[-1] // 16) * 48 if kernel == F24 else x.shape[-1]
    torch._check(
        weight.dim() == 2 and weight.shape[1] == columns,
        lambda: f"linear: weight must be [out, {columns}] for this x and kernel {kernel}, got {tuple(weight.shape)}",
    )
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@register_fake("vgg_fast::linear_pack")
def _fake_pack(weight: Tensor, kernel: str) -> Tensor:
    torch._check(weight.dim() == 2, lambda: f"linear_pack: weight must be [out, in], got {weight.dim()} dimensions")
    if kernel == F24:
        return weight.new_empty((weight.shape[0], -(-weight.shape[1] // 16) * 48), dtype=torch.uint8)
    return weight.new_empty(weight.shape, dtype=torch.bfloat16)


@fallback("vgg_fast::linear")
def _python(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False, kernel: str = "auto") -> Tensor:
    if kernel not in ("auto", selection.REFERENCE):
        raise RuntimeError(f"linear kernel {kernel!r} cannot run on {x.device.type} here; take 'auto' or 'reference'")
    return reference.linear(x, weight, bias, relu)
