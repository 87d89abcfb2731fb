"""Runs a chain of fully connected layers, over PyTorch's own weights wherever a kernel reads those.

Packed are only the weights that a kernel wants with fewer digits: fp32 ones where PyTorch's precision of float32 has
been lowered, and those that autocast casts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vgg_fast import selection
from vgg_fast.container.chains import LinearChain, Sources
from vgg_fast.container.packs import FUSED_DTYPES, LinearPack, PackCache, plain_reason
from vgg_fast.ops.linear import PACKING

# Weights of a chain below which nothing is gained (measured at batch 1 in fp32): up to there they stay in the L2
# caches, and what counts is the time that a call takes to start.
SMALL = 2**21


def input_reason(x: Tensor) -> str | None:
    """Why this input is left to PyTorch."""
    if not x.dim() or not x.numel():
        return f"the input is empty or a scalar: {tuple(x.shape)}"
    if not x.is_contiguous():
        return "the input is not contiguous"  # its strides would decide those of the output
    return None


def run(
    chain: LinearChain,
    sources: Sources,
    tensors: list[Tensor],
    x: Tensor,
    dtype: torch.dtype,
    autocast: bool,
    backend: str,
    packs: PackCache,
    limit: int,
) -> tuple[Tensor, str] | str:
    """The output of the chain and the kernel that ran it, or the reason why its children have to run one by one.

    Args:
        chain, sources: what the container's plan says.
        tensors: ``sources.read()``.
        x: ``[..., in]``.
        dtype: the dtype to compute in.
        autocast: whether everything is cast to it, as under ``torch.autocast``.
        backend: as named to ``accelerate``.
        packs: the container's packed weights, of which it keeps ``limit``.
    """
    layers = list(sources.by_run(tensors))
    reason = plain_reason(tensors) or _unfit(layers, x, dtype, autocast)
    if reason is not None:
        return reason
    weights = [layer[0] for layer in layers if layer[0] is not None]
    biases = [layer[1] for layer in layers]
    size = sum(weight.numel() for weight in weights)
    if size < SMALL and backend == "auto":
        return f"{size} weights are too few to be faster than PyTorch (from {SMALL} on)"
    kernel = selection.choose_linear(dtype, x.device, backend)
    if kernel == selection.REFERENCE:
        return f"there is no kernel for fully connected layers of {dtype} on {x.device.type} (backend {backend!r})"
    if any(_is_packed(weight, kernel, dtype) for weight in weights):
        key = (chain.start, chain.stop, kernel, dtype, autocast)
        pack = packs.lookup(key, tensors, (sources.present,), limit, lambda: _pack(layers, kernel, dtype))
        if isinstance(pack, str):
            return pack
        weights, biases = pack.weights, pack.biases
    y = x.to(dtype)
    for weight, bias, step in zip(weights, biases, chain.runs, strict=True):
        y = torch.ops.vgg_fast.linear.default(y, weight, bias, step.relu is not None, kernel)
    return y, kernel


def _is_packed(weight: Tensor, kernel: str, dtype: torch.dtype) -> bool:
    return weight.dtype != dtype or (dtype == torch.float32 and kernel in PACKING)


def _pack(layers: Sequence[list[Tensor | None]], kernel: str, dtype: torch.dtype) -> LinearPack | str:
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    for weight, bias in layers:
        assert weight is not None
        if _is_packed(weight, kernel, dtype):
            straight = weight.dtype == torch.float32 and kernel in PACKING
            weight = torch.ops.vgg_fast.linear_pack(weight, kernel) if straight else weight.to(dtype)
        weights.append(weight)
        biases.append(None if bias is None else bias.to(dtype))
    return LinearPack(weights, biases)


def _unfit(layers: Sequence[list[Tensor | None]], x: Tensor, dtype: torch.dtype, cast: bool) -> str | None:
    """Why PyTorch would not run these parameters together, or would in a way that we do not reproduce."""
    inputs = x.shape[-1]
    for weight, bias in layers:
        assert weight is not None
        if weight.dim() != 2 or weight.shape[1] != inputs or not weight.numel():
            return f"a weight of shape {tuple(weight.shape)} for {inputs} inputs, fused: (out, {inputs})"
        if weight.stride(1) != 1:
            return "a weight whose rows are not dense"
        inputs = weight.shape[0]
        if bias is not None and bias.shape != (inputs,):
            return f"a bias does not have {inputs} elements"
        for operand in (weight, bias):
            if operand is not None and operand.dtype != dtype and not (cast and operand.dtype in FUSED_DTYPES):
                return f"a parameter is {operand.dtype}, the input {dtype}"
    if x.device != (layers[0][0].device if layers[0][0] is not None else None):
        return f"the input is on {x.device}, the weights are not"
    return None
