"""``vgg_fast::fingerprint``: a hash of what tensors hold, cheap enough to take before every forward pass.

All of a tensor of up to 1024 elements; of a larger convolution weight one element at least of every filter and every
input channel, of a larger matrix one of every row and every column; of any other larger tensor 64 elements, evenly
spread with both ends. So every update of whole filters, channels, rows or columns changes it. Single-element
edits behind PyTorch's back can slip by; ``vgg_fast.refresh`` is for those.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import register_fake

from vgg_fast.ops._declare import define, fallback

define("vgg_fast::fingerprint", "(Tensor[] tensors) -> int")

_WHOLE, _SAMPLE = 1024, 64


@register_fake("vgg_fast::fingerprint")
def _fake(tensors: Sequence[Tensor]) -> torch.SymInt:
    # The value depends on data, which a traced graph does not have.
    return torch.library.get_ctx().new_dynamic_size()


@fallback("vgg_fast::fingerprint")
def _python(tensors: Sequence[Tensor]) -> int:
    samples = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        if flat.numel() > _WHOLE and tensor.dim() == 2:
            i = torch.arange(tensor.shape[0], device=flat.device)
            flat = torch.cat([tensor.detach()[0], tensor.detach()[i, i % tensor.shape[1]]])
        elif flat.numel() > _WHOLE and tensor.dim() == 4:
            i = torch.arange(max(tensor.shape[:2]), device=flat.device)
            filters, channels, height, width = tensor.shape
            tap = i % (height * width)
            flat = tensor.detach()[i % filters, i % channels, tap // width, tap % width]
        elif flat.numel() > _WHOLE:
            flat = flat[torch.linspace(0, flat.numel() - 1, _SAMPLE, dtype=torch.int64, device=flat.device)]
        samples.append(flat.double())
    return hash(torch.cat(samples).cpu().numpy().tobytes()) if samples else 0
