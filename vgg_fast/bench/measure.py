"""Timing that can be trusted on a noisy machine, and the description of the machine that belongs to every number.

Absolute times on a shared machine drift by tens of percent within minutes; ratios of contestants that took turns do
not. So everything that times here (``vgg-fast demo``, ``vgg-fast bench``, benchmarks/) goes through :func:`interleave`.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import gc
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vgg_fast import library

_ROOT = Path(__file__).parents[2]
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


# --- memory and lost devices ----------------------------------------------------------------------------------------


def out_of_memory(error: BaseException) -> bool:
    """Whether this says that a tensor did not fit, on the CPU or on a GPU.

    Example:
        >>> try: torch.empty(2**60)
        ... except RuntimeError as error: out_of_memory(error)
        True
    """
    said = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in said for words in ("DefaultCPUAllocator: can't allocate", "not enough memory", "CUDA out of memory")
    )


def free_memory() -> None:
    """Gives back to the GPU what PyTorch keeps for later, once what did not fit is gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_LOST = (
    *("illegal memory access", "misaligned address", "unspecified launch failure", "device-side assert"),
    *("illegal instruction", "illegal address", "launch timed out", "uncorrectable ECC"),
)


def device_lost(error: BaseException) -> bool:
    """Whether CUDA answers nothing any more after this error: it stays in the context of the whole process.

    Example:
        >>> device_lost(RuntimeError("CUDA error: an illegal memory access was encountered"))
        True
    """
    said = str(error)
    return "CUDA" in said and any(words in said for words in _LOST)


# --- the machine ----------------------------------------------------------------------------------------------------


def machine() -> dict[str, str | int | None]:
    """What a number means nothing without: processor, flags, threads, versions, commit.

    Example:
        >>> machine()["threads"] == torch.get_num_threads()
        True
    """
    from vgg_fast import __version__

    return {
        "cpu": cpu_name(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "cpu_flags": "" if library.missing("_C") else torch.ops.vgg_fast.cpu_flags(),
        "isa_cap": os.environ.get("VGG_FAST_ISA") or None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vgg_fast": __version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    """The processor's name for people, or at least its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Those this process may use, where the system can tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit(root: Path = _ROOT) -> str | None:
    """The git commit of this package's checkout ``root``, with ``-dirty`` after uncommitted changes; or None."""
    # An installed package often lies in somebody else's repository (their project's .venv), whose commit says nothing.
    if not (root / ".git").exists() or not (root / "setup.py").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}-dirty" if changes else head


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows with the columns of :func:`machine` after their own, so that files of several machines can be joined.

    Args:
        path: replaced if it exists.
        rows: any mappings; a key that a row lacks is left empty.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> import tempfile; path = tempfile.mkdtemp() + "/times.csv"
        >>> write_csv(path, [{"contestant": "ours", "median_ms": 1.5}]); open(path).readline().startswith("contestant,")
        True
    """
    here = machine()
    columns = list(dict.fromkeys([key for row in rows for key in row] + list(here)))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({**here, **row} for row in rows)
