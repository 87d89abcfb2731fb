"""Packed weights, kept between forwards and made anew when anything that they came from has changed.

PyTorch's version counters and data pointers are not enough: ``SGD/Adam/AdamW(fused=True).step()``, ``p.data.add_()``,
writes through ``p.detach().numpy()`` and a batch norm's training forward change values without changing either. So a
fingerprint of the content is taken as well, before every forward; pointers and versions add what its sample may miss.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from vgg_fast.chains import Chain, Sources
from vgg_fast.ops._layout import suggests_channels_last

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that are fused
_lock = threading.RLock()  # held while packing; an RLock, because a signal handler may run the model too


def _new_lock() -> None:
    global _lock
    _lock = threading.RLock()  # the thread that held it in the parent does not exist in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


@dataclass(frozen=True)
class Pack:
    """What ``conv_stack`` needs to run one chain, and what it was made from.

    Attributes:
        weights, affines: per convolution, from ``vgg_fast::pack``.
        channels: of the input and then of every convolution's output.
        channels_last: per convolution, whether its weight suggests channels_last to PyTorch.
        device: of the sources.
        identity, fingerprint, extras: of the sources when they were packed.
    """

    weights: list[Tensor]
    affines: list[Tensor]
    channels: list[int]
    channels_last: list[bool]
    device: torch.device
    identity: tuple[list[Any], ...]
    fingerprint: int
    extras: tuple[Any, ...]

    def is_current(self, tensors: list[Tensor], extras: tuple[Any, ...]) -> bool:
        """Whether packing ``tensors`` now would give the same again."""
        try:
            # In this order: the fingerprint may only read tensors that are still the ones that were checked.
            if extras != self.extras or _identity(tensors) != self.identity:
                return False
        except RuntimeError:  # swapped for a tensor subclass without a data pointer
            return False
        return torch.ops.vgg_fast.fingerprint.default(tensors) == self.fingerprint


_version, _dtype, _shape = map(attrgetter, ("_version", "dtype", "shape"))


def _identity(tensors: list[Tensor]) -> tuple[list[Any], ...]:
    try:
        versions = list(map(_version, tensors))
    except RuntimeError:  # inference tensors have none
        versions = [None if t.is_inference() else t._version for t in tensors]
    # Lists of one attribute each: with map and attrgetter the loops run in C, 12 us for VGG16-BN's 78 tensors.
    return list(map(Tensor.data_ptr, tensors)), versions, list(map(_dtype, tensors)), list(map(_shape, tensors))


class PackCache:
    """The packed chains of one container, bounded in number."""

    def __init__(self) -> None:
        self._packs: dict[tuple[Any, ...], Pack] = {}

    def __len__(self) -> int:
        return len(self._packs)

    def get(
        self,
        chain: Chain,
        sources: Sources,
        tensors: list[Tensor],
        kernel: str,
        dtype: torch.dtype,
        autocast: bool,
        limit: int,
    ) -> Pack | str:
        """The packed weights of a chain, packed now if need be, or the reason why they cannot be.

        Args:
            chain, sources: what the container's plan says.
            tensors: ``sources.read()``.
            kernel: the kernel to pack for.
            dtype: the dtype to compute in.
            autocast: whether weights of another dtype are cast to it, as under ``torch.autocast``.
            limit: the number of packs to keep; the oldest go first.
        """
        key = (chain.start, chain.stop, kernel, dtype, autocast)
        extras = (chain.eps, sources.present)
        pack = self._packs.get(key)
        if pack is not None and pack.is_current(tensors, extras):
            return pack
        with _lock:
            pack = self._packs.get(key)  # another thread may have packed it while we waited
            if pack is not None and pack.is_current(tensors, extras):
                return pack
            self._packs.pop(key, None)
            reason = _unfit(sources.by_run(tensors), tensors, dtype, autocast)
            if reason is not None:
                return reason
            pack = self._packs[key] = _pack(chain, sources, tensors, kernel, dtype, extras)
            while len(self._packs) > limit:
                del self._packs[next(iter(self._packs))]
            return pack


def _pack(
    chain: Chain, sources: Sources, tensors: list[Tensor], kernel: str, dtype: torch.dtype, extras: tuple[Any, ...]
) -> Pack:
    device = tensors[0].device
    # The pack outlives this forward, so it must not be made of inference tensors; and autocast must not touch it.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        # Taken before the values are read: what another thread writes meanwhile is then found by the next forward.
        identity, fingerprint = _identity(tensors), torch.ops.vgg_fast.fingerprint.default(tensors)
        pairs, channels, last = [], [tensors[0].shape[1]], []
        for eps, (weight, bias, *bn) in zip(chain.eps, sources.by_run(tensors), strict=True):
            assert weight is not None
            cast_bias = None if bias is None else bias.to(dtype)
            pairs.append(torch.ops.vgg_fast.pack.default(weight.to(dtype), cast_bias, *bn, eps, kernel))
            channels.append(weight.shape[0])
            last.append(suggests_channels_last(weight))
    weights, affines = map(list, zip(*pairs, strict=True))
    return Pack(weights, affines, channels, last, device, identity, fingerprint, extras)


def _unfit(runs: Iterable[list[Tensor | None]], tensors: list[Tensor], dtype: torch.dtype, cast: bool) -> str | None:
    """Why PyTorch would not run these parameters together, or would in a way that we do not reproduce."""
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return f"a parameter is a {type(tensor).__name__}, not a plain Tensor"
        if tensor.layout is not torch.strided or tensor.device != tensors[0].device:
            return "the parameters are not dense tensors on one device"
    cin = None
    for weight, bias, *bn in runs:
        assert weight is not None
        if weight.dim() != 4 or weight.shape[2:] != (3, 3) or not weight.numel():
            return f"a weight of shape {tuple(weight.shape)}, fused: (Cout, Cin, 3, 3)"
        if cin is not None and weight.shape[1] != cin:
            return f"a weight of shape {tuple(weight.shape)} after a convolution with {cin} outputs"
        cin = weight.shape[0]
        vectors = [v for v in bn if v is not None]
        if any(v.shape != (cin,) for v in (bias, *vectors) if v is not None):
            return f"a bias or batch-norm vector does not have {cin} elements"
        for operand in (weight, bias):
            if operand is not None and operand.dtype != dtype and not (cast and operand.dtype in DTYPES):
                return f"a convolution's parameter is {operand.dtype}, the input {dtype}"
        # PyTorch takes batch-norm parameters of the input's dtype, or all fp32 with a half-precision input.
        kinds = {v.dtype for v in vectors}
        if kinds and kinds not in ({dtype}, {torch.float32}):
            return f"batch-norm parameters of {', '.join(map(str, kinds))} with an input of {dtype}"
    return None
