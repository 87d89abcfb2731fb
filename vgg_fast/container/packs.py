"""Packed weights, kept between forwards and made anew when anything that they came from has changed.

PyTorch's version counters and data pointers are not enough: ``SGD/Adam/AdamW(fused=True).step()``, ``p.data.add_()``,
writes through ``p.detach().numpy()`` and a batch norm's training forward change values without changing either. So a
fingerprint of the content is taken as well, before every forward; pointers and versions add what its sample may miss.

On a GPU, reading a fingerprint back would wait for the device at every forward, and stop a CUDA graph from being
captured. There a launch of its own compares and packs again on the device (vgg_fast/kernels/pack.py), in every replay
of a graph as well; what the host compares is only where the sources lie.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from vgg_fast import gpu, selection
from vgg_fast.container.chains import Chain, Sources
from vgg_fast.locks import ForkLock
from vgg_fast.ops._layout import suggests_channels_last

if TYPE_CHECKING:  # it imports Triton
    from vgg_fast.kernels.pack import Repacker

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_lock = ForkLock()  # held while packing


@dataclass(frozen=True)
class Pack:
    """What ``conv_stack`` needs to run one chain.

    Attributes:
        weights, affines: per convolution, from ``vgg_fast::pack``.
        channels: of the input and then of every convolution's output.
        channels_last: per convolution, whether its weight suggests channels_last to PyTorch.
        device: of the sources.
        repacker: packs what has changed again on the device; None on the CPU.
    """

    weights: list[Tensor]
    affines: list[Tensor]
    channels: list[int]
    channels_last: list[bool]
    device: torch.device
    repacker: Repacker | None = None


@dataclass(frozen=True)
class LinearPack:
    """The weights and biases of one chain as ``vgg_fast::linear`` takes them."""

    weights: list[Tensor]
    biases: list[Tensor | None]


Content = TypeVar("Content", Pack, LinearPack)


@dataclass(frozen=True)
class Packed(Generic[Content]):
    """Packed weights, what they were made from, and what making them cost.

    Attributes:
        content: the packed weights.
        identity, fingerprint, extras: of the sources when they were packed; no fingerprint where a repacker takes its
            own.
        seconds: that packing took.
        source_bytes: of the weights that it was made from.
    """

    content: Content
    identity: tuple[list[Any], ...]
    fingerprint: int | None
    extras: tuple[Any, ...]
    seconds: float
    source_bytes: int

    @property
    def bytes(self) -> int:
        """Of the packed weights."""
        return sum(weight.nbytes for weight in self.content.weights)

    def is_current(self, tensors: list[Tensor], extras: tuple[Any, ...]) -> bool:
        """Whether packing ``tensors`` now would give the same again, or has just been made to on the device."""
        on_device = self.fingerprint is None
        try:
            # In this order: the fingerprint may only read tensors that are still the ones that were checked.
            if extras != self.extras or _identity(tensors, on_device) != self.identity:
                return False
        except RuntimeError:  # swapped for a tensor subclass without a data pointer
            return False
        if not on_device:
            return torch.ops.vgg_fast.fingerprint.default(tensors) == self.fingerprint
        repacker = self.content.repacker if isinstance(self.content, Pack) else None
        if repacker is not None:
            repacker(hash(tuple(_versions(tensors))))
        return repacker is not None


_version, _dtype, _shape = map(attrgetter, ("_version", "dtype", "shape"))


def _versions(tensors: list[Tensor]) -> list[int | None]:
    try:
        return list(map(_version, tensors))
    except RuntimeError:  # inference tensors have none
        return [None if t.is_inference() else t._version for t in tensors]


def _identity(tensors: list[Tensor], on_device: bool) -> tuple[list[Any], ...]:
    # Lists of one attribute each: with map and attrgetter the loops run in C, 12 us for VGG16-BN's 78 tensors.
    where = list(map(Tensor.data_ptr, tensors)), list(map(_dtype, tensors)), list(map(_shape, tensors))
    # What reads the sources by address has to know their strides; versions it is told at every call.
    return (*where, list(map(Tensor.stride, tensors)) if on_device else _versions(tensors))


class PackCache:
    """The packed chains of one container, bounded in number.

    Args:
        capturing: whether a CUDA graph is being captured on a device.
        captured: packs that graphs hold the addresses of: kept as long as the container, as its parameters are.
    """

    def __init__(
        self,
        capturing: Callable[[torch.device], bool] = gpu.capturing,
        captured: Iterable[Pack | LinearPack] = (),
    ) -> None:
        self._packs: dict[Any, Packed[Any]] = {}
        self._capturing = capturing
        self.captured = list(captured)

    def __len__(self) -> int:
        return len(self._packs)

    def __iter__(self) -> Iterator[Packed[Any]]:
        return iter(list(self._packs.values()))

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
        """The packed weights of a chain of convolutions, or the reason why they cannot be packed.

        Args:
            chain, sources: what the container's plan says.
            tensors: ``sources.read()``.
            kernel: the kernel to pack for.
            dtype: the dtype to compute in.
            autocast: whether weights of another dtype are cast to it, as under ``torch.autocast``.
            limit: the number of packs to keep; the oldest go first.
        """

        def make() -> Pack | str:
            return _unfit(sources.by_run(tensors), dtype, autocast) or _pack(chain, sources, tensors, kernel, dtype)

        key = (chain.start, chain.stop, selection.layout(kernel), dtype, autocast)
        return self.lookup(key, tensors, (chain.eps, sources.present), limit, make, on_device=tensors[0].is_cuda)

    def lookup(
        self,
        key: Any,
        tensors: list[Tensor],
        extras: tuple[Any, ...],
        limit: int,
        make: Callable[[], Content | str],
        on_device: bool = False,
    ) -> Content | str:
        """What was packed under ``key`` if it is current, else what ``make`` returns; a reason (str) is not kept.

        Args:
            key: the chain, and how it is packed.
            tensors: what is packed.
            extras: what else the result depends on.
            limit: the number of packs to keep; the oldest go first.
            make: packs ``tensors``.
            on_device: whether ``make`` makes a repacker, so that nothing has to be read back.
        """
        pack = self._packs.get(key)
        current = pack is not None and pack.is_current(tensors, extras)
        if self._capturing(tensors[0].device):
            if pack is not None and current:
                self.captured.append(pack.content)
                return pack.content
            return "a CUDA graph is being captured, and these weights are not packed: run the model once before"
        if pack is not None and current:
            return pack.content
        with _lock.held():
            pack = self._packs.get(key)  # another thread may have packed it while we waited
            if pack is not None and pack.is_current(tensors, extras):
                return pack.content
            self._packs.pop(key, None)
            made = _pack_now(tensors, extras, make, on_device)
            if isinstance(made, str):
                return made
            self._packs[key] = made
            while len(self._packs) > limit:
                del self._packs[next(iter(self._packs))]
            return made.content


def _pack_now(
    tensors: list[Tensor], extras: tuple[Any, ...], make: Callable[[], Content | str], on_device: bool
) -> Packed[Content] | str:
    start = time.perf_counter()
    reason = plain_reason(tensors)  # before anything reads them
    if reason is not None:
        return reason
    # The pack outlives this forward, so it must not be made of inference tensors; and autocast must not touch it.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
        # Taken before the values are read: what another thread writes meanwhile is then found by the next forward.
        identity = _identity(tensors, on_device)
        fingerprint = None if on_device else torch.ops.vgg_fast.fingerprint.default(tensors)
        content = make()
    if isinstance(content, str):
        return content
    sources = sum(tensor.nbytes for tensor in tensors if tensor.dim() > 1)
    return Packed(content, identity, fingerprint, extras, time.perf_counter() - start, sources)


def _pack(chain: Chain, sources: Sources, tensors: list[Tensor], kernel: str, dtype: torch.dtype) -> Pack:
    pairs, channels, last = [], [tensors[0].shape[1]], []
    for eps, (weight, bias, *bn) in zip(chain.eps, sources.by_run(tensors), strict=True):
        assert weight is not None
        cast_bias = None if bias is None else bias.to(dtype)
        pairs.append(torch.ops.vgg_fast.pack.default(weight.to(dtype), cast_bias, *bn, eps, kernel))
        channels.append(weight.shape[0])
        last.append(suggests_channels_last(weight))
    weights, affines = map(list, zip(*pairs, strict=True))
    pack = Pack(weights, affines, channels, last, tensors[0].device)
    if tensors[0].is_cuda and selection.has_triton():
        return replace(pack, repacker=repacker_of(pack, chain, sources, tensors))
    return pack


def repacker_of(pack: Pack, chain: Chain, sources: Sources, tensors: list[Tensor]) -> Repacker:
    """What keeps ``pack``, made of these tensors, current on their device (or, in Triton's interpreter, on the CPU)."""
    from vgg_fast.kernels.pack import Repacker, Source

    layers = []
    for eps, (weight, *vectors) in zip(chain.eps, sources.by_run(tensors), strict=True):
        assert weight is not None
        layers.append(Source(weight, vectors, eps))
    repacker = Repacker(layers, pack.weights, pack.affines)
    repacker(hash(tuple(_versions(tensors))))
    return repacker


def plain_reason(tensors: list[Tensor]) -> str | None:
    """Why these are not plain dense tensors on one device."""
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return f"a parameter is a {type(tensor).__name__}, not a plain Tensor"
        if tensor.layout is not torch.strided or tensor.device != tensors[0].device:
            return "the parameters are not dense tensors on one device"
    return None


def _unfit(runs: Iterable[list[Tensor | None]], dtype: torch.dtype, cast: bool) -> str | None:
    """Why PyTorch would not run these parameters together, or would in a way that we do not reproduce."""
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
            if operand is not None and operand.dtype != dtype and not (cast and operand.dtype in FUSED_DTYPES):
                return f"a convolution's parameter is {operand.dtype}, the input {dtype}"
        # PyTorch takes batch-norm parameters of the input's dtype, or all fp32 with a half-precision input.
        kinds = {v.dtype for v in vectors}
        if kinds and kinds not in ({dtype}, {torch.float32}):
            return f"batch-norm parameters of {', '.join(map(str, kinds))} with an input of {dtype}"
    return None
