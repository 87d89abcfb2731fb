"""Which children of a Sequential run as ops of ours: the parse into chains, and for every other child the reason.

Predicates are exact (type, attributes, hooks), never "looks like VGG". A child that fails one runs by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from vgg_fast.reference import Step

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Plain:
    """A child that runs by itself, and why."""

    index: int
    reason: str


@dataclass(frozen=True)
class Run:
    """One convolution and the children that are fused to it, by their positions in the container."""

    conv: int
    bn: int | None
    relu: int | None
    pool: int | None
    relu_inplace: bool
    batch: bool = False  # batch norm with the statistics of the batch

    @property
    def step(self) -> int:
        """The entry of ``program`` of ``conv_stack``."""
        return (Step.RELU if self.relu is not None else 0) | (Step.POOL if self.pool is not None else 0)


@dataclass(frozen=True)
class Chain:
    """Consecutive runs, children ``start`` to ``stop - 1``: one call of ``conv_stack``."""

    start: int
    stop: int
    runs: tuple[Run, ...]
    program: list[int] = field(compare=False)
    pools: int
    eps: tuple[float, ...]

    @property
    def batch(self) -> bool:
        """Whether a batch norm normalises with the statistics of the batch."""
        return any(run.batch for run in self.runs)


@dataclass(frozen=True)
class LinearRun:
    """One fully connected layer and its ReLU, by their positions; dropout in evaluation mode is the identity."""

    linear: int
    relu: int | None


@dataclass(frozen=True)
class LinearChain:
    """Consecutive fully connected layers, children ``start`` to ``stop - 1``: one call of ``linear`` for each run."""

    start: int
    stop: int
    runs: tuple[LinearRun, ...]


# --- predicates -----------------------------------------------------------------------------------------------------


def _is_pair(value: Any, number: int) -> bool:
    """``number`` or ``(number, number)``; a list could change in place without our noticing, so it does not count."""
    return (type(value) is int and value == number) or (type(value) is tuple and value == (number, number))


def _conv_reason(state: dict[str, Any]) -> str | None:
    if not _is_pair(state["kernel_size"], 3):
        return f"kernel_size={state['kernel_size']}, fused: (3, 3)"
    if not _is_pair(state["stride"], 1):
        return f"stride={state['stride']}, fused: (1, 1)"
    if state["padding"] != "same" and not _is_pair(state["padding"], 1):
        return f"padding={state['padding']!r}, fused: (1, 1)"
    if not _is_pair(state["dilation"], 1):
        return f"dilation={state['dilation']}, fused: (1, 1)"
    if state["groups"] != 1:
        return f"groups={state['groups']}, fused: 1"
    if state["padding_mode"] != "zeros":
        return f"padding_mode={state['padding_mode']!r}, fused: 'zeros'"
    if state["_parameters"].get("weight") is None or "bias" not in state["_parameters"]:
        return "its weight is not an ordinary parameter"
    return None


def _linear_reason(state: dict[str, Any]) -> str | None:
    if state["_parameters"].get("weight") is None or "bias" not in state["_parameters"]:
        return "its weight is not an ordinary parameter"
    return None


def _dropout_reason(state: dict[str, Any]) -> str | None:
    if state["training"]:
        return "dropout in training mode draws random numbers"
    if type(state["p"]) not in (int, float) or not 0 <= state["p"] <= 1:
        return f"p={state['p']!r} is not a number from 0 to 1"
    return None


def _bn_reason(state: dict[str, Any]) -> str | None:
    running = [state["_buffers"].get(name, "missing") for name in ("running_mean", "running_var")]
    if "missing" in running or (running[0] is None) != (running[1] is None):
        return "its running statistics are not an ordinary pair of buffers"
    if "weight" not in state["_parameters"] or "bias" not in state["_parameters"]:
        return "its weight and bias are not ordinary parameters"
    return None


def uses_batch_statistics(state: dict[str, Any]) -> bool:
    """Whether a batch norm with this ``__dict__`` normalises with the statistics of the batch."""
    return state["training"] or state["_buffers"]["running_mean"] is None


def _relu_reason(state: dict[str, Any]) -> str | None:
    return None if type(state["inplace"]) is bool else f"inplace={state['inplace']!r} is not a bool"


def _pool_reason(state: dict[str, Any]) -> str | None:
    if not _is_pair(state["kernel_size"], 2):
        return f"kernel_size={state['kernel_size']}, fused: 2"
    if state["stride"] is not None and not _is_pair(state["stride"], 2):
        return f"stride={state['stride']}, fused: 2"
    if not _is_pair(state["padding"], 0):
        return f"padding={state['padding']}, fused: 0"
    if not _is_pair(state["dilation"], 1):
        return f"dilation={state['dilation']}, fused: 1"
    if state["ceil_mode"] is not False:
        return f"ceil_mode={state['ceil_mode']}, fused: False"
    if state["return_indices"] is not False:
        return f"return_indices={state['return_indices']}, fused: False"
    return None


@dataclass(frozen=True)
class _Kind:
    """What the parse reads of one module type: attributes, and the predicate on them."""

    keys: tuple[str, ...]
    reason: Callable[[dict[str, Any]], str | None]
    own: frozenset[str]  # what a fresh instance has in its __dict__; anything more may shadow a method
    read: Callable[[dict[str, Any]], tuple[Any, ...]]


def _kind(fresh: nn.Module, reason: Callable[[dict[str, Any]], str | None], *keys: str) -> _Kind:
    return _Kind(keys, reason, frozenset(vars(fresh)), itemgetter(*_HOOKS, *keys))


_POOL_KEYS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_CONV_KEYS = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_KINDS: dict[type[nn.Module], _Kind] = {
    nn.Conv2d: _kind(nn.Conv2d(1, 1, 3, device="meta"), _conv_reason, *_CONV_KEYS),
    nn.BatchNorm2d: _kind(nn.BatchNorm2d(1, device="meta"), _bn_reason, "training", "eps"),
    nn.ReLU: _kind(nn.ReLU(), _relu_reason, "inplace"),
    nn.MaxPool2d: _kind(nn.MaxPool2d(2), _pool_reason, *_POOL_KEYS),
    nn.Linear: _kind(nn.Linear(1, 1, device="meta"), _linear_reason),
    nn.Dropout: _kind(nn.Dropout(), _dropout_reason, "training", "p"),
}


def child_reason(module: nn.Module) -> str | None:
    """Why this module cannot be part of a fused chain, whatever stands around it; None if it can.

    Example:
        >>> child_reason(nn.Conv2d(3, 8, kernel_size=5))
        'kernel_size=(5, 5), fused: (3, 3)'
    """
    kind = _KINDS.get(type(module))
    if kind is None:
        return f"{type(module).__name__} is not a type that is fused"
    state = vars(module)
    missing = [key for key in (*_HOOKS, *kind.keys) if key not in state]
    if missing:
        return f"it lacks the attribute {missing[0]!r}"
    if any(state[name] for name in _HOOKS):
        return "it has hooks, which must see its own input and output"
    for name in state.keys() - kind.own:
        # An attribute on the instance hides the class's: forward, _conv_forward, _compiled_call_impl, ...
        if hasattr(type(module), name):
            return f"{name!r} was replaced on this instance"
    return kind.reason(state)


# --- the parse ------------------------------------------------------------------------------------------------------


def parse(modules: Sequence[nn.Module]) -> list[Chain | LinearChain | Plain]:
    """The children in order: chains of fused runs ``conv3x3 [+ batch norm] [+ ReLU] [+ max-pool]``, chains of ``linear
    [+ ReLU] [+ dropout]``, and plain ones.

    Args:
        modules: the children of a Sequential.

    Returns:
        Parts that cover every child once.

    Example:
        >>> [type(p).__name__ for p in parse([nn.ReLU(), nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()])]
        ['Plain', 'Chain']
    """
    reasons = [child_reason(m) for m in modules]
    parts: list[Chain | LinearChain | Plain] = []
    i = 0

    def take(kind: type[nn.Module]) -> int | None:
        nonlocal i
        if i == len(modules) or type(modules[i]) is not kind or reasons[i] is not None:
            return None
        i += 1
        return i - 1

    while i < len(modules):
        start, runs, dense = i, [], []
        while (conv := take(nn.Conv2d)) is not None:
            bn, relu, pool = take(nn.BatchNorm2d), take(nn.ReLU), take(nn.MaxPool2d)
            inplace = relu is not None and bool(vars(modules[relu])["inplace"])
            runs.append(Run(conv, bn, relu, pool, inplace, bn is not None and uses_batch_statistics(vars(modules[bn]))))
        while not runs and (linear := take(nn.Linear)) is not None:
            dense.append(LinearRun(linear, take(nn.ReLU)))
            take(nn.Dropout)
        if runs:
            parts.append(_chain(start, i, runs, modules))
        elif dense:
            parts.append(LinearChain(start, i, tuple(dense)))
        else:
            # Only a ReLU whose input was made inside the run may be swallowed: an in-place one writes into its input.
            parts.append(Plain(i, reasons[i] or "it does not follow a fused layer directly"))
            i += 1
    return parts


def _chain(start: int, stop: int, runs: list[Run], modules: Sequence[nn.Module]) -> Chain:
    eps = tuple(0.0 if run.bn is None else float(vars(modules[run.bn])["eps"]) for run in runs)
    pools = sum(run.pool is not None for run in runs)
    return Chain(start, stop, tuple(runs), [run.step for run in runs], pools, eps)


# --- the plan: a parse, and the cheap test that it still holds ------------------------------------------------------

_Slot = tuple[dict[str, Any], str, str]  # module.__dict__, "_parameters" or "_buffers", name


class Plan:
    """A parse with everything that it depended on, so that a forward can check it instead of parsing again.

    Parsing VGG16-BN's 44 children takes about 0.2 ms, checking them 0.012 ms: the check is tuple comparisons only.

    Args:
        modules: the children of the container at this moment.
    """

    def __init__(self, modules: tuple[nn.Module, ...]) -> None:
        self.modules = modules
        # All that `holds` compares is read before the parse: what another thread changes meanwhile is then noticed.
        self.types = tuple(map(type, modules))
        # A child of None is possible, and an error only when its turn comes.
        states = [getattr(m, "__dict__", {}) for m in modules]
        self.sizes = tuple(map(len, states))
        self.reads = tuple(map(_reader, modules))
        self.values = tuple(read(state) for read, state in zip(self.reads, states, strict=True))
        hooks = [[vars(m).get(name) for name in _HOOKS] for m in modules if type(m) in _KINDS]
        self.unhooked = tuple(h for four in hooks if not any(four) for h in four)
        self.hooked = tuple(four for four in hooks if any(four))
        self.parts = parse(modules)
        self.sources = {part.start: Sources(part, modules) for part in self.parts if not isinstance(part, Plain)}
        self.trainable: dict[int, Any] = {}  # by the start of a chain; filled and read by vgg_fast.container.training

    def holds(self, modules: tuple[nn.Module, ...], start: int = 0, stop: int | None = None) -> bool:
        """Whether ``modules`` are the children ``start`` to ``stop - 1`` and would be parsed in the same way again."""
        span = slice(start, stop)
        if modules != self.modules[span] or tuple(map(type, modules)) != self.types[span]:
            return False
        try:
            states = tuple(map(vars, modules))
            if tuple(map(len, states)) != self.sizes[span]:
                return False
            # Equality starts with identity, so this is cheap; it is also what makes a replaced hook dictionary visible.
            if tuple([read(d) for read, d in zip(self.reads[span], states, strict=True)]) != self.values[span]:
                return False
        except (KeyError, RuntimeError, TypeError, ValueError):  # an attribute was removed, or has no ordinary ==
            return False
        return not any(self.unhooked) and all(map(any, self.hooked))


def _reader(module: nn.Module) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    kind = _KINDS.get(type(module))
    if kind is None:
        return _read_nothing
    if vars(module).keys() != kind.own:
        # Foreign attributes: watch all names, since one of them could turn into a method's replacement.
        return lambda state: (tuple(state), *map(state.get, kind.keys), *map(state.get, _HOOKS))
    return kind.read


def _read_nothing(state: dict[str, Any]) -> tuple[Any, ...]:
    return ()


class Sources:
    """The tensors a chain is packed from: where they are, and which of the optional ones exist."""

    def __init__(self, chain: Chain | LinearChain, modules: Sequence[nn.Module]) -> None:
        slots = [slot for run in chain.runs for slot in _run_slots(run, modules)]
        self.per_run = len(slots) // len(chain.runs)
        self.present = tuple(d[group][name] is not None for d, group, name in slots)
        self.filled: tuple[_Slot, ...] = tuple(s for s, here in zip(slots, self.present, strict=True) if here)
        # A bias or a batch-norm vector that is None but may be set later.
        self.empty = tuple(s for s, here in zip(slots, self.present, strict=True) if not here and s is not _NOTHING)

    def read(self) -> list[Tensor] | None:
        """The tensors as they are now, or None if one came or went since the parse."""
        if any(d[group].get(name) is not None for d, group, name in self.empty):
            return None
        try:
            tensors = [d[group][name] for d, group, name in self.filled]
        except KeyError:
            return None
        return None if any(t is None for t in tensors) else tensors

    def by_run(self, tensors: list[Tensor]) -> Iterator[list[Tensor | None]]:
        """Per run: weight, bias and, of convolutions, bn mean, variance, weight and bias; None where there is none."""
        rest = iter(tensors)
        padded = [next(rest) if here else None for here in self.present]
        return (padded[i : i + self.per_run] for i in range(0, len(padded), self.per_run))


_NOTHING: _Slot = ({"_parameters": {"nothing": None}}, "_parameters", "nothing")


def _run_slots(run: Run | LinearRun, modules: Sequence[nn.Module]) -> list[_Slot]:
    layer = vars(modules[run.linear if isinstance(run, LinearRun) else run.conv])
    slots: list[_Slot] = [(layer, "_parameters", "weight"), (layer, "_parameters", "bias")]
    if isinstance(run, LinearRun):
        return slots
    if run.bn is None:
        return slots + [_NOTHING] * 4
    bn = vars(modules[run.bn])
    slots += [(bn, "_buffers", "running_mean"), (bn, "_buffers", "running_var")]
    return [*slots, (bn, "_parameters", "weight"), (bn, "_parameters", "bias")]


# --- memory format --------------------------------------------------------------------------------------------------


def output_channels_last(
    chain: Chain, x_suggests: bool, weights_suggest: Sequence[bool], size: Sequence[int], channels: Sequence[int]
) -> bool:
    """Whether the children, one by one, would return a tensor with the strides of channels_last.

    Args:
        chain: what runs.
        x_suggests: whether the strides of the input suggest channels_last.
        weights_suggest: the same of each weight.
        size: of the input, ``(N, C, H, W)``, where C, H and W are not all 1.
        channels: Cout of each convolution.
    """
    if not (x_suggests or any(weights_suggest)):
        return False
    height, width = size[2], size[3]
    if 1 not in channels and (height >> chain.pools > 1 or width >> chain.pools > 1):
        return True
    # With C = 1 or H = W = 1 both formats have the same memory, and each operation makes its own choice of strides.
    last = x_suggests
    for run, weight_suggests, cout in zip(chain.runs, weights_suggest, channels, strict=True):
        last = last or weight_suggests
        ambiguous = cout == 1 or height == width == 1
        if ambiguous and (run.bn is not None or (run.relu is not None and not run.relu_inplace)):
            last = False  # both write contiguous strides when they may; an in-place ReLU keeps what it finds
        last = last and not (cout == height == width == 1)  # strides of (1, 1, 1, 1) suggest NCHW
        if run.pool is not None:
            height, width = height // 2, width // 2
            last = last and not (cout == height == width == 1)
    return last
