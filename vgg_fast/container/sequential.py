"""The container that runs several of its children at once: an ``nn.Sequential`` in everything but the time it takes.

``forward`` looks at the children as they are at that moment (:mod:`vgg_fast.container.chains`), runs each chain of 3x3
convolutions as one ``conv_stack`` and everything else as before. The rule throughout: whatever is unusual runs the
children one by one, so that PyTorch's own results and errors appear by construction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module
from torch.utils._device import DeviceContext

import vgg_fast.ops  # noqa: F401  (declares torch.ops.vgg_fast)
from vgg_fast import selection
from vgg_fast.container import choice, linear_chains, training
from vgg_fast.container.chains import Chain, LinearChain, Plain, Plan, output_channels_last
from vgg_fast.container.packs import FUSED_DTYPES, Pack, PackCache, Packed
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


def _run_chain(
    container: FusedSequential,
    state: _State,
    plan: Plan,
    chain: Chain | LinearChain,
    children: tuple[nn.Module, ...],
    x: Any,
) -> Tensor | str:
    """The output of the chain, or the reason why its children have to run one by one."""
    reason = _context_reason() or _input_reason(x, chain)
    if reason is not None:
        return reason
    sources = plan.sources[chain.start]
    tensors = sources.read()
    if tensors is None:
        state.plan = None
        return "a parameter came or went since the children were parsed"
    gradients = torch.is_grad_enabled() and torch._C._any_requires_grad(x, *tensors)
    if gradients and isinstance(chain, LinearChain):
        return "gradients are on and the input or a parameter requires them; use torch.no_grad() or inference_mode()"
    device = x.device
    autocast = device.type in _AUTOCAST and torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else x.dtype
    backend = container.__dict__.get(_BACKEND, "auto")
    if x.dtype not in FUSED_DTYPES and (autocast or backend == "auto"):
        return f"{x.dtype} is not fused"
    limit = 2 * len(plan.sources) + 2
    if isinstance(chain, LinearChain):
        with torch.autocast(device.type, enabled=False) if autocast else contextlib.nullcontext():
            ran = linear_chains.run(chain, sources, tensors, x, dtype, autocast, backend, state.packs, limit)
        if isinstance(ran, str):
            return ran
        y, kernel = ran
        _note(container, chain.start, chain.stop, "", kernel)
        return y

    def run(kernel: str) -> Tensor | str:
        pack = state.packs.get(chain, sources, tensors, kernel, dtype, autocast, limit)
        if isinstance(pack, str):
            return pack
        if device != pack.device or x.shape[1] != pack.channels[0]:
            wanted = f"{pack.channels[0]} channels on {pack.device}"
            return f"the input is {tuple(x.shape)} on {device}, the weights want {wanted}"
        last = output_channels_last(chain, suggests_channels_last(x), pack.channels_last, x.shape, pack.channels[1:])
        if not autocast:
            return _conv_stack(x, pack, chain, kernel, last)
        # The casts that autocast would make, made here; inside, nothing may be cast again.
        with torch.autocast(device.type, enabled=False):
            return _conv_stack(x.to(dtype), pack, chain, kernel, last)

    if device.type == "cuda" and backend == "auto":
        if chain.batch or gradients:
            return "gradients and batch statistics on a GPU are left to PyTorch"
        verdict = choice.on_gpu(chain, children, tensors, x, dtype, run)
        if verdict.kernel == selection.REFERENCE:
            return verdict.reason
        kernel, timed = verdict.kernel, verdict.reason
    else:
        kernel, timed = choice.by_name(dtype, device, backend)
    if kernel == selection.REFERENCE:
        if backend != "auto":
            return "backend 'reference' was asked for"
        # The full answer looks around the installation, which takes longer than a small convolution.
        return selection.why_reference(dtype, device) if _recordings else "there is no fused kernel"
    if chain.batch or gradients:
        small = training.too_small(chain, x, tensors) if backend == "auto" else None
        if small is not None:
            return small
        return _run_trainable(container, state, plan, chain, x, kernel, dtype, autocast)
    result = run(kernel)
    if isinstance(result, Tensor):
        _note(container, chain.start, chain.stop, "", kernel, timed)
    return result


def _run_trainable(
    container: FusedSequential,
    state: _State,
    plan: Plan,
    chain: Chain,
    x: Tensor,
    kernel: str,
    dtype: torch.dtype,
    autocast: bool,
) -> Tensor | str:
    trainable = plan.trainable.get(chain.start) or plan.trainable.setdefault(
        chain.start, training.Trainable(chain, plan.sources[chain.start], plan.modules)
    )
    with torch.autocast(x.device.type, enabled=False) if autocast else contextlib.nullcontext():
        y = training.run_chain(trainable, state.packs, x, kernel, dtype, autocast)
    if isinstance(y, Tensor):
        _note(container, chain.start, chain.stop, "", kernel)
    return y


def _conv_stack(x: Tensor, pack: Pack, chain: Chain, kernel: str, channels_last: bool) -> Tensor:
    return torch.ops.vgg_fast.conv_stack.default(x, pack.weights, pack.affines, chain.program, kernel, channels_last)


# --- when the children must see for themselves ----------------------------------------------------------------------

_GLOBAL_HOOKS = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)


def _replaceable() -> tuple[Any, ...]:
    """What profilers and patches replace for all modules at once."""
    return (
        nn.Module.__call__,
        nn.Conv2d.forward,
        nn.Conv2d._conv_forward,
        nn.BatchNorm2d.forward,
        nn.ReLU.forward,
        nn.MaxPool2d.forward,
        nn.Linear.forward,
        nn.Dropout.forward,
        F.conv2d,
        F.batch_norm,
        F.relu,
        F.max_pool2d,
        F.linear,
        F.dropout,
    )


_ORIGINALS = _replaceable()


def _context_reason() -> str | None:
    """Why nothing may be fused at this moment, whatever the input."""
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is recording"
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode is active"
    if torch._C._len_torch_function_stack() and not _only_device_contexts():
        return "a TorchFunctionMode is active"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if any(_GLOBAL_HOOKS):
        return "global module hooks are registered"
    if _replaceable() != _ORIGINALS:
        return "a class or function that the children use was replaced (monkeypatched)"
    return None


def _only_device_contexts() -> bool:
    # torch.set_default_device works through such a mode; it concerns the creation of tensors only.
    count = torch._C._len_torch_function_stack()
    return all(type(torch._C._get_function_stack_at(i)) is DeviceContext for i in range(count))


def _input_reason(x: Any, chain: Chain | LinearChain) -> str | None:
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"the input is a {type(x).__name__}, not a plain Tensor"
    if x.layout is not torch.strided or x.is_nested:
        return f"the input's layout is not dense ({x.layout}, nested={x.is_nested})"
    if isinstance(chain, LinearChain):
        return linear_chains.input_reason(x)
    if x.dim() != 4:
        return f"the input has {x.dim()} dimensions, fused: 4"
    _, channels, height, width = x.shape
    if not x.numel():
        return f"the input is empty: {tuple(x.shape)}"
    if not (height >> chain.pools and width >> chain.pools):
        return f"{height}x{width} is too small for {chain.pools} pools"
    if channels == height == width == 1:
        return "a 1x1 map of one channel is not worth it"  # and its strides do not tell its memory format
    return None
