"""Which layers of a model run fused, by which kernel, and why the others do not: seen in one real forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vgg_fast.container.chains import child_reason
from vgg_fast.container.sequential import FusedSequential, Segment, drop_cache, packed_weights, record

__all__ = ["Explanation", "Packing", "Row", "Segment", "explain", "record"]


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        path: its name in the model, as in ``named_modules``.
        type: its class.
        status: ``fused``, ``plain``, or ``both`` if its container was called several times with different outcomes.
        kernel: the kernel that ran it, empty where plain.
        chain: number of the chain of layers that it was part of, None where plain.
        reason: why it did not run fused, empty where it did.
    """

    path: str
    type: str
    status: str
    kernel: str
    chain: int | None
    reason: str


@dataclass(frozen=True)
class Packing:
    """What the packed weights of one container cost.

    Attributes:
        container: its name in the model, empty for the model itself.
        milliseconds: that the call which packed them, usually the first, took longer.
        bytes: of the packed weights, which the container keeps.
        source_bytes: of the weights that they were made from.
    """

    container: str
    milliseconds: float
    bytes: int
    source_bytes: int

    def __str__(self) -> str:
        return (
            f"packed weights of {self.container or 'the model'}: {self.bytes / 1e6:.1f} MB, "
            f"{self.bytes / self.source_bytes:.2f} times the originals; the first call took {self.milliseconds:.0f} ms "
            "longer to pack them"
        )


@dataclass(frozen=True)
class Explanation:
    """The layers of a model in order; ``str()`` is a readable table.

    Attributes:
        rows: one :class:`Row` per layer that has no children.
        accelerated: whether the model was accelerated, or only for the moment of explaining.
        packing: one :class:`Packing` per container that keeps packed weights.
        timings: on a GPU, per chain that runs fused the times that its kernel was chosen by, or that it stands in for
            one which failed its self test. Why one is left to PyTorch is the reason of its rows.
    """

    rows: tuple[Row, ...]
    accelerated: bool
    packing: tuple[Packing, ...] = ()
    timings: tuple[str, ...] = ()

    @property
    def fused(self) -> int:
        """Number of layers that run fused."""
        return sum(row.status != "plain" for row in self.rows)

    def __str__(self) -> str:
        header = ("layer", "type", "status", "chain", "kernel", "reason")
        cells = [
            (r.path, r.type, r.status, "" if r.chain is None else str(r.chain), r.kernel, r.reason) for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (header, *cells)]
        chains = len({row.chain for row in self.rows if row.chain is not None})
        lines += [*self.timings, *map(str, self.packing)]
        lines.append(f"{self.fused} of {len(self.rows)} layers run fused, in {chains} calls")
        if not self.accelerated:
            lines.append("(the model is not accelerated yet: this is what vgg_fast.accelerate(model) would do)")
        return "\n".join(lines)


def explain(model: nn.Module, example_input: Tensor | Sequence[Any] | Mapping[str, Any]) -> Explanation:
    """Runs the model once on an example and tells which layers ran fused, by which kernel, and why the others did not.

    It sees what a call at this place would do, grad mode, autocast and training mode included: call it under
    ``torch.inference_mode()`` to see inference. A model that is not accelerated is, for this one run. The example, the
    model's buffers and the random state are left as they were; hooks of the model do run.

    Args:
        model: any module.
        example_input: the tensor to call it with, a tuple or list of positional arguments, or a dict of keywords.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        Exception: whatever the model raises on this input.

    Example:
        >>> layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Softmax(dim=1))
        >>> with torch.inference_mode():
        ...     print(explain(layers, torch.zeros(1, 3, 8, 8)).rows[1].reason)
        Softmax is not a type that is fused
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain takes a torch.nn.Module, not {type(model).__name__}")
    plain: list[Any] = [m for m in model.modules() if type(m) is nn.Sequential]
    args, kwargs = _arguments(example_input)
    try:
        for module in plain:
            module.__class__ = FusedSequential
        with _unchanged(model), record() as segments:
            model(*args, **kwargs)
        rows, timings = tuple(_rows(model, segments)), tuple(_timings(segments))
        return Explanation(rows, not plain, tuple(_packing(model)), timings)
    finally:
        for module in plain:
            drop_cache(module)
            module.__class__ = nn.Sequential


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def copy(value: Any) -> Any:  # an in-place ReLU at the start of a model writes into its input
        return value.clone() if isinstance(value, Tensor) else value

    if isinstance(example, Mapping):
        return (), {name: copy(value) for name, value in example.items()}
    return tuple(map(copy, example if isinstance(example, (tuple, list)) else (example,))), {}


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Puts buffers (batch-norm statistics in training mode) and the random state back."""
    training = any(module.training for module in model.modules())
    kept = [
        (module._buffers, name, buffer, buffer.clone())
        for module in (model.modules() if training else ())
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        try:
            yield
        finally:
            with torch.no_grad():
                for owner, name, buffer, value in kept:
                    owner[name] = buffer.copy_(value)


@dataclass
class _Seen:
    """What one layer went through, over all calls of its container."""

    kernel: str = ""
    chain: int | None = None
    reason: str = ""
    calls: set[str] = field(default_factory=set)


def _packing(model: nn.Module) -> Iterator[Packing]:
    for path, module in model.named_modules():
        packs = packed_weights(module) if isinstance(module, FusedSequential) else []
        if packs:
            sums = (
                sum(p.seconds for p in packs) * 1e3,
                sum(p.bytes for p in packs),
                sum(p.source_bytes for p in packs),
            )
            yield Packing(path, *sums)


def _chain_numbers(segments: Sequence[Segment]) -> dict[tuple[int, tuple[str, ...]], int]:
    """The number of every chain that ran fused, in the order of the first calls."""
    fused = dict.fromkeys((id(s.container), s.names) for s in segments if s.kernel is not None)
    return {chain: number for number, chain in enumerate(fused, 1)}


def _timings(segments: Sequence[Segment]) -> Iterator[str]:
    numbers = _chain_numbers(segments)
    told = dict.fromkeys((numbers[id(s.container), s.names], s.timed) for s in segments if s.timed)
    return (f"chain {number} {timed}" for number, timed in told)


def _rows(model: nn.Module, segments: Sequence[Segment]) -> Iterator[Row]:
    chains = _chain_numbers(segments)
    seen: dict[tuple[int, str], _Seen] = {}
    for segment in segments:
        owner = id(segment.container)
        for name in segment.names:
            layer = seen.setdefault((owner, name), _Seen())
            if segment.kernel is None:
                layer.calls.add("plain")
                layer.reason = layer.reason or segment.reason
            else:
                layer.calls.add("fused")
                layer.kernel = segment.kernel
                layer.chain = chains[owner, segment.names]
    # Duplicates are kept: a ReLU that several places share has a row for each.
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        if next(module.children(), None) is not None:
            continue
        parent_path, _, name = path.rpartition(".")
        parent = modules[parent_path] if path else None
        found = seen.get((id(parent), name))
        if found is None:
            found = _Seen(reason=_unseen_reason(module, parent, parent_path), calls={"plain"})
        status = next(iter(found.calls)) if len(found.calls) == 1 else "both"
        yield Row(path, type(module).__name__, status, found.kernel, found.chain, found.reason)


def _unseen_reason(module: nn.Module, parent: nn.Module | None, parent_path: str) -> str:
    """Why no FusedSequential reported this layer."""
    own = child_reason(module)
    if own is not None:
        return own
    if isinstance(parent, FusedSequential):
        container = parent_path or "the model"
        if "forward" in vars(parent):
            return f"the forward of {container} was replaced on the instance"
        return f"{container} is not called as a whole: the model calls its layers itself, or not at all"
    if isinstance(parent, nn.Sequential):
        return f"{type(parent).__name__} is a subclass of nn.Sequential and may have a forward of its own"
    if parent is None:
        return "the model is a single layer; only the children of an nn.Sequential are fused"
    return f"it is called by {type(parent).__name__}, not by an nn.Sequential"
