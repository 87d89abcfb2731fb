"""Timing that can be trusted on a noisy machine.

Absolute times on a shared machine drift by tens of percent within minutes; ratios of contestants that took turns do
not. So everything that times here (``vgg-fast demo``, ``vgg-fast bench``, benchmarks/) goes through :func:`interleave`.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

_LEAST_ROUNDS = 3  # below that a median is one of the extremes


@dataclass(frozen=True)
class Timing:
    """What one contestant took.

    Attributes:
        milliseconds: per call, one value per round.
    """

    milliseconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Milliseconds: what to compare."""
        return statistics.median(self.milliseconds)

    @property
    def minimum(self) -> float:
        """Milliseconds: what the machine can do when nobody disturbs it."""
        return min(self.milliseconds)

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.milliseconds + other.milliseconds)


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 10,
    warmup: int = 2,
    turn_ms: float = 5.0,
    budget_s: float = math.inf,
    on_round: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Times contestants in turns: round by round, each once per round, in changing order.

    A turn is one call that is not timed, so that everybody finds the caches as its own previous call left them, then as
    many timed calls as fill ``turn_ms``.

    Args:
        contestants: name -> call without arguments.
        rounds: turns of each contestant.
        warmup: calls of each before the first round (compilation, packing of weights, first touch of memory).
        turn_ms: least length of a turn in milliseconds; the clock and the interpreter are noise in shorter ones.
        budget_s: begin no new round after this many seconds, once there are three.
        on_round: called after the warm-up and after each round, for a progress bar.

    Returns:
        name -> :class:`Timing`, in the order given.

    Raises:
        ValueError: ``rounds`` or ``warmup`` is less than 1.

    Example:
        >>> timings = interleave({"a": lambda: sum(range(100)), "b": lambda: sum(range(200))}, rounds=3, turn_ms=0)
        >>> [len(t.milliseconds) for t in timings.values()]
        [3, 3]
    """
    if rounds < 1 or warmup < 1:
        raise ValueError(f"rounds={rounds} and warmup={warmup} must be at least 1")
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    calls = {}
    for name, call in contestants.items():
        for _ in range(warmup):
            start = time.perf_counter()
            call()
            _synchronize()
            last = (time.perf_counter() - start) * 1e3
        calls[name] = max(1, math.ceil(turn_ms / max(last, 1e-4)))
    if on_round:
        on_round()
    with _without_gc():
        for r in range(rounds):
            if r >= _LEAST_ROUNDS and time.perf_counter() - began > budget_s:
                break
            # Rotated, and every other round backwards, so that nobody always follows the same neighbour.
            order = names[r % len(names) :] + names[: r % len(names)]
            for name in reversed(order) if r % 2 else order:
                call = contestants[name]
                call()
                _synchronize()
                start = time.perf_counter()
                for _ in range(calls[name]):
                    call()
                _synchronize()
                times[name].append((time.perf_counter() - start) * 1e3 / calls[name])
            if on_round:
                on_round()
    return {name: Timing(tuple(values)) for name, values in times.items()}


def enqueue(call: Callable[[], object], calls: int = 10, repeats: int = 5) -> tuple[float, float]:
    """Milliseconds per call until it returns, and until its work is done: the medians of several series of calls.

    Args:
        call: already warm.
        calls: in a series, few enough for the queue of a GPU, which holds about a thousand launches.
        repeats: series.

    Example:
        >>> returns, done = enqueue(lambda: sum(range(1000)))
        >>> 0 < returns <= done
        True
    """
    returns, done = [], []
    for _ in range(repeats):
        _synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        returned = time.perf_counter()
        _synchronize()
        done.append((time.perf_counter() - start) * 1e3 / calls)
        returns.append((returned - start) * 1e3 / calls)
    return statistics.median(returns), statistics.median(done)


def ratio_to_best(timings: Mapping[str, Timing], ours: str) -> float:
    """Median of ``ours`` over the median of the fastest of the others: below 1 is faster than all of them.

    Raises:
        ValueError: there is nobody else.

    Example:
        >>> ratio_to_best({"peer": Timing((8.0,)), "slow peer": Timing((9.0,)), "ours": Timing((4.0,))}, "ours")
        0.5
    """
    peers = [timing.median for name, timing in timings.items() if name != ours]
    if not peers:
        raise ValueError(f"{ours!r} has nobody to be compared with")
    return timings[ours].median / min(peers)


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """A collection would land in whoever's turn it is."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
