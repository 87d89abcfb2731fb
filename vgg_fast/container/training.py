"""A chain of convolutions under gradients, saving for its gradient no more than PyTorch would.

A chain of which nothing is trained is one node of autograd, ``FrozenChain``. Else a run is one or two: ``Convolution``
(with what follows it, a frozen batch norm included) and, where batch norm has statistics of the batch or parameters
that are trained, ``Normalisation``. Their gradients are kernels of ours. Under ``create_graph=True`` they are formulas
of PyTorch instead, which can be differentiated again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgg_fast import fold, selection
from vgg_fast.container.chains import Chain, Run, Sources, output_channels_last
from vgg_fast.container.gradients import (
    ChainTask,
    Convolution,
    FrozenChain,
    Normalisation,
    PackedConvolution,
    Task,
    Transposed,
    normalises_with,
)
from vgg_fast.container.packs import Pack, PackCache
from vgg_fast.ops._layout import suggests_channels_last
from vgg_fast.reference import Step

TRAINED_DTYPES = (torch.float32, torch.bfloat16)

# With fewer pixels on its last maps PyTorch trains a chain faster, as packing weights and writing their gradients costs
# more than computing. Measured for VGG16's features in fp32, whose last convolutions see 1/16 of the image: 0.58 of
# eager's time for one image of 224 (196 pixels), 0.95 for 64 of 32 (256), 0.96 for 16 of 32 (64), 0.97 for four of 48
# (36), 0.88 for two of 64 (32), but 1.69 for one of 32 (4).
LEAST_PIXELS = 32


def too_small(chain: Chain, x: Tensor, tensors: Sequence[Tensor]) -> str | None:
    """Why a chain that is trained is left to PyTorch for the sake of time.

    Args:
        chain: of the plan.
        x: ``[N, C, H, W]``.
        tensors: the parameters and statistics of the chain.
    """
    pools = sum(run.pool is not None for run in chain.runs[:-1])
    height, width = x.shape[2] >> pools, x.shape[3] >> pools
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not trained or x.shape[0] * height * width >= LEAST_PIXELS:
        return None
    return f"{x.shape[0]} last maps of {height}x{width} are too few pixels to be trained faster than by PyTorch"


class Trainable:
    """What a chain needs besides its plan to run under gradients; made once per plan.

    Args:
        chain, sources: of the plan.
        modules: the children of the container.
    """

    def __init__(self, chain: Chain, sources: Sources, modules: Sequence[nn.Module]) -> None:
        self.chain, self.sources = chain, sources
        self.parts = [_Part(run, eps, modules) for run, eps in zip(chain.runs, chain.eps, strict=True)]
        self.transposed: dict[Any, Transposed] = {}
        self.factors: tuple[Pack | None, list[Tensor]] = None, []

    def factors_of(self, pack: Pack) -> list[Tensor]:
        """Scales of the batch norms that are folded into a pack; computed once per pack."""
        of, factors = self.factors
        if of is not pack:
            factors = [_factor(part.bn, channels) for part, channels in zip(self.parts, pack.channels[1:], strict=True)]
            self.factors = pack, factors
        return factors

    def frozen(self) -> bool:
        """Whether nothing of the chain is trained."""
        convs = (part.conv for part in self.parts)
        return not any(p.requires_grad for conv in convs for p in (conv.weight, conv.bias) if p is not None)


class _Part:
    """One run, as chains of their own for the cache of packed weights: with its batch norm folded, and without."""

    def __init__(self, run: Run, eps: float, modules: Sequence[nn.Module]) -> None:
        self.run = run
        self.conv = modules[run.conv]
        self.bn = None if run.bn is None else modules[run.bn]
        alone, folded = Run(run.conv, None, None, None, False), Run(run.conv, run.bn, None, None, False)
        self.alone = _alone(alone, run.conv + 1, 0.0, modules)
        self.folded = self.alone if run.bn is None else _alone(folded, run.bn + 1, eps, modules)

    def separate(self) -> bool:
        """Whether batch norm is a node of its own."""
        if self.bn is None:
            return False
        vectors = (self.bn.weight, self.bn.bias)
        trained = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in vectors)
        return self.run.batch or trained


def _alone(run: Run, stop: int, eps: float, modules: Sequence[nn.Module]) -> tuple[Chain, Sources]:
    chain = Chain(run.conv, stop, (run,), [Step.NONE], 0, (eps,))
    return chain, Sources(chain, modules)


def run_chain(
    trainable: Trainable,
    cache: PackCache,
    x: Tensor,
    kernel: str,
    dtype: torch.dtype,
    autocast: bool,
) -> Tensor | str:
    """The output of a chain, with a gradient where gradients are on; or the reason why the children have to run.

    Args:
        trainable: the chain.
        cache: of the container.
        x: ``[N, C, H, W]``.
        kernel: a CPU micro-kernel.
        dtype: to compute in.
        autocast: whether weights of another dtype are cast to it.
    """
    if dtype not in TRAINED_DTYPES or kernel not in _cpu_kernels():
        return f"gradients or batch statistics of {dtype} by kernel {kernel!r} are left to PyTorch"
    separate = [part.separate() for part in trainable.parts]
    if not any(separate) and trainable.frozen():
        return _run_frozen(trainable, cache, x, kernel, dtype, autocast)
    packs = _packs(trainable, cache, separate, kernel, dtype, autocast)
    if isinstance(packs, str):
        return packs
    channels, values = x.shape[1], x.numel() // x.shape[1]
    for part, own_norm, pack in zip(trainable.parts, separate, packs, strict=True):
        if pack.device != x.device or pack.cin != channels:
            return f"{channels} channels on {x.device} meet weights for {pack.cin} on {pack.device}"
        channels = pack.cout
        reason = _norm_reason(part, channels, dtype, values) if own_norm else None
        if reason is not None:
            return reason
        values = values // 4 if part.run.pool is not None else values
    size, suggest = x.shape, [pack.channels_last for pack in packs]
    last = output_channels_last(
        trainable.chain, suggests_channels_last(x), suggest, size, [pack.cout for pack in packs]
    )
    x = x.to(dtype)
    befores = [None] * len(packs) if any(separate) else _values(trainable.chain, packs, x, kernel)
    for i, (part, own_norm, pack) in enumerate(zip(trainable.parts, separate, packs, strict=True)):
        inside = last if i + 1 == len(packs) else True
        relu, pool = part.run.relu is not None, part.run.pool is not None
        conv, bn = part.conv, part.bn
        if own_norm:
            assert isinstance(bn, nn.BatchNorm2d)
            task = Task(trainable.transposed, i, pack, kernel, dtype, centred=part.run.batch)
            x = Convolution.apply(x, conv.weight, conv.bias, task, [None])
            x = Normalisation.apply(x, bn.weight, bn.bias, *normalises_with(bn), bn, relu, pool, inside)
        else:
            factor = None if bn is None else _factor(bn, pack.cout)
            task = Task(
                trainable.transposed, i, pack, kernel, dtype, relu=relu, pool=pool, channels_last=inside, factor=factor
            )
            x = Convolution.apply(x, conv.weight, conv.bias, task, [befores[i]])
            befores[i] = None
    return x


def _run_frozen(
    trainable: Trainable, cache: PackCache, x: Tensor, kernel: str, dtype: torch.dtype, autocast: bool
) -> Tensor | str:
    chain = trainable.chain
    pack = _pack(trainable, chain, trainable.sources, cache, kernel, dtype, autocast)
    if isinstance(pack, str):
        return pack
    if pack.device != x.device or pack.channels[0] != x.shape[1]:
        return f"{x.shape[1]} channels on {x.device} meet weights for {pack.channels[0]} on {pack.device}"
    last = output_channels_last(chain, suggests_channels_last(x), pack.channels_last, x.shape, pack.channels[1:])
    factors, program = trainable.factors_of(pack), [int(step) for step in chain.program]
    task = ChainTask(trainable.transposed, pack, factors, program, kernel, dtype, last)
    return FrozenChain.apply(x.to(dtype), task, *(part.conv.weight for part in trainable.parts))


def _values(chain: Chain, packs: list[PackedConvolution], x: Tensor, kernel: str) -> list[Tensor | None]:
    """Of every run the value before its pool, computed in one call: nothing is packed again between the layers."""
    program: list[int] = [step | Step.TAP for step in chain.program]
    if not chain.program[-1] & Step.POOL:
        program[-1] = chain.program[-1]  # the result itself
    weights, affines = [pack.weight for pack in packs], [pack.affine for pack in packs]
    with torch.no_grad():
        values = torch.ops.vgg_fast.conv_stack_taps.default(x, weights, affines, program, kernel, True)
    return values[: len(packs)]


def _packs(
    trainable: Trainable, cache: PackCache, separate: list[bool], kernel: str, dtype: torch.dtype, autocast: bool
) -> list[PackedConvolution] | str:
    """The packed weights of every run: those of inference where no batch norm is a node of its own."""
    if not any(separate):
        chains = [(trainable.chain, trainable.sources)]
    else:
        chains = [
            part.alone if own_norm else part.folded for part, own_norm in zip(trainable.parts, separate, strict=True)
        ]
    packed = []
    for chain, sources in chains:
        pack = _pack(trainable, chain, sources, cache, kernel, dtype, autocast)
        if isinstance(pack, str):
            return pack
        for i, (weight, affine) in enumerate(zip(pack.weights, pack.affines, strict=True)):
            cin, cout = pack.channels[i : i + 2]
            packed.append(PackedConvolution(weight, affine, cin, cout, pack.device, pack.channels_last[i]))
    return packed


def _pack(
    trainable: Trainable,
    chain: Chain,
    sources: Sources,
    cache: PackCache,
    kernel: str,
    dtype: torch.dtype,
    autocast: bool,
) -> Pack | str:
    tensors = sources.read()
    if tensors is None:
        return "a parameter came or went since the children were parsed"
    return cache.get(chain, sources, tensors, kernel, dtype, autocast, limit=4 * len(trainable.parts) + 4)


@functools.cache
def _cpu_kernels() -> frozenset[str]:
    return frozenset(selection.cpu_kernels())


def _factor(bn: nn.Module | None, channels: int) -> Tensor:
    """Scale of a batch norm in evaluation."""
    if bn is None:
        return torch.ones(channels)
    assert isinstance(bn, nn.BatchNorm2d)
    vectors = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    with torch.no_grad():
        sign, affine = fold.batchnorm_affine(bn.num_features, None, *vectors, bn_eps=bn.eps)
        return sign * affine[0]


def _norm_reason(part: _Part, channels: int, dtype: torch.dtype, values: int) -> str | None:
    """Why a batch norm that is a node of its own is left to PyTorch, whose errors then appear."""
    bn = part.bn
    assert isinstance(bn, nn.BatchNorm2d)
    if part.run.batch and values == 1:
        return "batch statistics of one value per channel"
    vectors = [v for v in (bn.weight, bn.bias, bn.running_mean, bn.running_var) if v is not None]
    for vector in vectors:
        if type(vector) not in (Tensor, nn.Parameter) or vector.shape != (channels,) or vector.device.type != "cpu":
            return f"a batch-norm vector that is not a plain CPU tensor of {channels} elements"
    kinds = {v.dtype for v in vectors}
    if kinds and kinds not in ({dtype}, {torch.float32}):
        return f"batch-norm parameters of {', '.join(map(str, kinds))} with an input of {dtype}"
    return None
