"""The container that runs several of its children at once: an ``nn.Sequential`` in everything but the time it takes.

``forward`` looks at the children as they are at that moment (:mod:`vgg_fast.container.chains`), runs each chain of 3x3
convolutions as one ``conv_stack`` and everything else as before. The rule throughout: whatever is unusual runs the
children one by one, so that PyTorch's own results and errors appear by construction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import vgg_fast.ops  # noqa: F401  (declares torch.ops.vgg_fast)
from vgg_fast import selection
from vgg_fast.container import choice, guards, linear_chains, training
from vgg_fast.container.chains import Chain, LinearChain, Plain, Plan, output_channels_last
from vgg_fast.container.packs import FUSED_DTYPES, PackCache, Packed
from vgg_fast.ops._layout import suggests_channels_last

_STATE = "_vgg_fast_state"  # plan and packed weights, in the container's __dict__; never copied, pickled or saved
_BACKEND = "_vgg_fast_backend"  # the backend asked for, absent for "auto"; copied and pickled like any attribute
_AUTOCAST = ("cpu", "cuda")  # where we know what autocast does; other devices have no kernel anyway


class _State:
    """What a container remembers between forwards."""

    __slots__ = ("packs", "plan")

    def __init__(self, packs: PackCache | None = None) -> None:
        self.plan: Plan | None = None
        self.packs = PackCache() if packs is None else packs  # an empty one is false

    def __reduce__(self) -> tuple[type[_State], tuple[()]]:
        return _State, ()  # where a restored container still has one, for the sake of a graph


class FusedSequential(nn.Sequential):
    """An ``nn.Sequential`` that runs chains of 3x3 convolution, batch norm, ReLU and 2x2 max-pool as one op.

    Chains of large fully connected layers, ReLU and dropout (the identity in evaluation) run as an op per layer.

    Children, names, parameters, hooks, slicing, copying and pickling are those of ``nn.Sequential``. Fused are, in
    evaluation without gradients, fp32, bf16 and fp16 tensors ``[N, C, H, W]`` of any memory format, and on the CPU
    fp32 and bf16 ones under gradients and in training mode as well (:mod:`vgg_fast.container.training`); all else runs
    child by child. :func:`vgg_fast.explain` says what ran how. Errors are those of the children; a backend that was
    named explicitly and cannot run raises RuntimeError with the reasons.

    Example:
        >>> layers = FusedSequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)).requires_grad_(False)
        >>> layers(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 8, 4, 4])
    """

    # Without annotations, as in nn.Sequential: TorchScript would take them at their word.
    def forward(self, input):
        """Runs the children on ``input``, several at once where that gives the same answer."""
        if torch.jit.is_scripting():
            for module in self:
                input = module(input)
            return input
        else:  # TorchScript compiles only the branch above, and only if this one is an else
            return _forward(self, input)

    def __getitem__(self, idx: slice | int) -> Any:
        item = super().__getitem__(idx)
        if isinstance(idx, slice) and _BACKEND in self.__dict__:
            item.__dict__[_BACKEND] = self.__dict__[_BACKEND]
        return item

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop(_STATE, None)
        return state

    def _replicate_for_data_parallel(self) -> FusedSequential:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__.pop(_STATE, None)  # it copied our __dict__, but its weights are on another device
        return replica

    def _apply(self, fn: Any, recurse: bool = True) -> FusedSequential:
        drop_cache(self)  # .to(), .half(), ...: the packed weights are stale, and their memory may be what is wanted
        return super()._apply(fn, recurse)


@dataclass(frozen=True)
class Segment:
    """What :func:`record` saw: children of one container that ran together, or one that ran by itself.

    Attributes:
        container: whose children they are.
        names: their names in the container.
        kernel: the kernel of ``conv_stack`` that ran them, or None if they ran one by one.
        reason: why they were not fused; empty if they were.
        timed: on a GPU, the times that the choice came from, or which kernel it stands in for.
    """

    container: FusedSequential
    names: tuple[str, ...]
    kernel: str | None
    reason: str = ""
    timed: str = ""


_recordings: list[list[Segment]] = []


@contextlib.contextmanager
def record() -> Iterator[list[Segment]]:
    """Collects what every FusedSequential of the process runs, in order, while the context is open.

    Example:
        >>> with record() as segments:
        ...     _ = FusedSequential(nn.Flatten())(torch.zeros(1, 2, 2))
        >>> segments[0].reason
        'Flatten is not a type that is fused'
    """
    segments: list[Segment] = []
    _recordings.append(segments)
    try:
        yield segments
    finally:
        # By identity: equal lists of two open recordings are not the same recording.
        _recordings[:] = [r for r in _recordings if r is not segments]


def drop_cache(container: FusedSequential) -> None:
    """Forgets the container's plan and packed weights, but for those in CUDA graphs; the next forward makes others."""
    state: _State | None = container.__dict__.pop(_STATE, None)
    if state is not None and state.packs.captured:
        container.__dict__[_STATE] = _State(PackCache(captured=state.packs.captured))


def packed_weights(container: FusedSequential) -> list[Packed[Any]]:
    """The packed weights that the container keeps at this moment."""
    state = container.__dict__.get(_STATE)
    return [] if state is None else list(state.packs)


def set_backend(container: FusedSequential, backend: str) -> None:
    """Which backend or kernel the container has to use; ``auto`` leaves the choice to :mod:`vgg_fast.selection`."""
    if backend == "auto":
        container.__dict__.pop(_BACKEND, None)
    else:
        container.__dict__[_BACKEND] = backend


# --- forward --------------------------------------------------------------------------------------------------------


def _forward(container: FusedSequential, x: Any) -> Any:
    if torch.compiler.is_compiling():
        for module in container:
            x = module(x)
        return x
    modules = tuple(container._modules.values())
    # setdefault, because several threads may make the first call at once.
    state: _State = container.__dict__.get(_STATE) or container.__dict__.setdefault(_STATE, _State())
    plan = state.plan
    if plan is None or not plan.holds(modules):
        state.plan = plan = Plan(modules)
    # The live iterator of nn.Sequential.forward: a hook that edits the container has the effect it always had.
    children = iter(container)
    edited = False
    for part in plan.parts:
        if isinstance(part, Plain):
            _note(container, part.index, part.index + 1, part.reason)
            for module in islice(children, 1):
                x = module(x)
            edited = True  # it may have: its code is not ours
            continue
        pulled = tuple(islice(children, part.stop - part.start))
        if edited and not plan.holds(pulled, part.start, part.stop):
            state.plan = None
            result: Tensor | str = "the container was changed while it ran"
        else:
            result = _run_chain(container, state, plan, part, pulled, x)
        if isinstance(result, str):
            _note(container, part.start, part.stop, result)
            for module in pulled:
                x = module(x)
            edited = True
        else:
            x = result
    for module in children:
        x = module(x)
    return x


def _note(
    container: FusedSequential, start: int, stop: int, reason: str, kernel: str | None = None, timed: str = ""
) -> None:
    if _recordings:
        segment = Segment(container, tuple(container._modules)[start:stop], kernel, reason, timed)
        for recording in _recordings:
            recording.append(segment)


class _Call(NamedTuple):
    """A forward of one chain, once nothing stands against running it at once.

    Attributes:
        plan, packs: of the container.
        children: that the chain stands for.
        tensors: the chain's parameters and statistics.
        x: the input.
        dtype: to compute in.
        autocast: whether all that has another dtype is cast to it.
        backend: as named to ``accelerate``.
        gradients: whether the result needs them.
    """

    plan: Plan
    packs: PackCache
    children: tuple[nn.Module, ...]
    tensors: list[Tensor]
    x: Tensor
    dtype: torch.dtype
    autocast: bool
    backend: str
    gradients: bool

    @property
    def limit(self) -> int:
        """The number of packs to keep: for two kernels or dtypes, and two more."""
        return 2 * len(self.plan.sources) + 2

    def casts_are_made(self) -> contextlib.AbstractContextManager[Any]:
        """The casts of autocast are made by us; inside, nothing may be cast again."""
        return torch.autocast(self.x.device.type, enabled=False) if self.autocast else contextlib.nullcontext()


_Ran = tuple[Tensor, str, str]  # the output, the kernel, and how it was chosen


def _run_chain(
    container: FusedSequential,
    state: _State,
    plan: Plan,
    chain: Chain | LinearChain,
    children: tuple[nn.Module, ...],
    x: Any,
) -> Tensor | str:
    """The output of the chain, or the reason why its children have to run one by one."""
    reason = guards.context_reason() or guards.input_reason(x, chain)
    if reason is not None:
        return reason
    tensors = plan.sources[chain.start].read()
    if tensors is None:
        state.plan = None
        return "a parameter came or went since the children were parsed"
    gradients = torch.is_grad_enabled() and torch._C._any_requires_grad(x, *tensors)
    if gradients and isinstance(chain, LinearChain):
        return "gradients are on and the input or a parameter requires them; use torch.no_grad() or inference_mode()"
    autocast = x.device.type in _AUTOCAST and torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    backend = container.__dict__.get(_BACKEND, "auto")
    if x.dtype not in FUSED_DTYPES and (autocast or backend == "auto"):
        return f"{x.dtype} is not fused"
    call = _Call(plan, state.packs, children, tensors, x, dtype, autocast, backend, gradients)
    ran = _run_linear(chain, call) if isinstance(chain, LinearChain) else _run_convolutions(chain, call)
    if isinstance(ran, str):
        return ran
    y, kernel, timed = ran
    _note(container, chain.start, chain.stop, "", kernel, timed)
    return y


def _run_linear(chain: LinearChain, call: _Call) -> _Ran | str:
    sources, x = call.plan.sources[chain.start], call.x
    with call.casts_are_made():
        ran = linear_chains.run(
            chain, sources, call.tensors, x, call.dtype, call.autocast, call.backend, call.packs, call.limit
        )
    return ran if isinstance(ran, str) else (*ran, "")


def _run_convolutions(chain: Chain, call: _Call) -> _Ran | str:
    chosen = _choose_kernel(chain, call)
    if isinstance(chosen, str):
        return chosen
    kernel, timed = chosen
    if chain.batch or call.gradients:
        small = training.too_small(chain, call.x, call.tensors) if call.backend == "auto" else None
        y = small or _run_trainable(chain, call, kernel)
    else:
        y = _run_packed(chain, call, kernel)
    return y if isinstance(y, str) else (y, kernel, timed)


def _choose_kernel(chain: Chain, call: _Call) -> tuple[str, str] | str:
    """The kernel and how it was chosen, or the reason why there is none."""
    device = call.x.device
    if device.type == "cuda" and call.backend == "auto":
        if chain.batch or call.gradients:
            return "gradients and batch statistics on a GPU are left to PyTorch"
        run = partial(_run_packed, chain, call)
        verdict = choice.on_gpu(chain, call.children, call.tensors, call.x, call.dtype, run)
        return verdict.reason if verdict.kernel == selection.REFERENCE else (verdict.kernel, verdict.reason)
    kernel, stands_in = choice.by_name(call.dtype, device, call.backend)
    if kernel != selection.REFERENCE:
        return kernel, stands_in
    if call.backend != "auto":
        return "backend 'reference' was asked for"
    # The full answer looks around the installation, which takes longer than a small convolution.
    return selection.why_reference(call.dtype, device) if _recordings else "there is no fused kernel"


def _run_packed(chain: Chain, call: _Call, kernel: str) -> Tensor | str:
    x, sources = call.x, call.plan.sources[chain.start]
    pack = call.packs.get(chain, sources, call.tensors, kernel, call.dtype, call.autocast, call.limit)
    if isinstance(pack, str):
        return pack
    if x.device != pack.device or x.shape[1] != pack.channels[0]:
        wanted = f"{pack.channels[0]} channels on {pack.device}"
        return f"the input is {tuple(x.shape)} on {x.device}, the weights want {wanted}"
    last = output_channels_last(chain, suggests_channels_last(x), pack.channels_last, x.shape, pack.channels[1:])
    conv_stack, rest = torch.ops.vgg_fast.conv_stack.default, (pack.weights, pack.affines, chain.program, kernel, last)
    if not call.autocast:
        return conv_stack(x, *rest)
    with call.casts_are_made():
        return conv_stack(x.to(call.dtype), *rest)


def _run_trainable(chain: Chain, call: _Call, kernel: str) -> Tensor | str:
    plan = call.plan
    trainable = plan.trainable.get(chain.start) or plan.trainable.setdefault(
        chain.start, training.Trainable(chain, plan.sources[chain.start], plan.modules)
    )
    with call.casts_are_made():
        return training.run_chain(trainable, call.packs, call.x, kernel, call.dtype, call.autocast)
