"""How the time of VGG16-BN's features follows the number of threads and the size of the batch, ours beside eager's.

All calls take turns in one process, whatever their threads and batch, so that what is compared ran at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vgg_fast.bench import contest, measure, peers
from vgg_fast.bench.contest import Contest
from vgg_fast.bench.measure import Timing
from vgg_fast.bench.peers import CHANNELS_LAST, OURS

BATCHES = (1, 2, 4, 8, 16, 32)
_PROBLEM = "scaling"


@dataclass(frozen=True)
class Scaling:
    """Stands in for a :class:`~vgg_fast.bench.contest.Contest` over several numbers of threads and batch sizes.

    Attributes:
        contests: (threads, batch) -> what ran there.
        left_out: as of a contest; nobody is.
    """

    contests: dict[tuple[int, int], Contest]
    left_out: dict[str, str] = field(default_factory=dict)

    def time(self, rounds: int = 5, budget_s: float = 60.0) -> dict[str, Timing]:
        """Milliseconds per image, every call measured in turns with all others; keys are for :meth:`rows`."""
        calls = {
            _key(threads, batch, name): call
            for (threads, batch), each in self.contests.items()
            for name, call in each.calls.items()
        }
        before = torch.get_num_threads()
        try:
            timings = measure.interleave(calls, rounds=rounds, warmup=1, turn_ms=0.0, budget_s=budget_s)
        finally:
            torch.set_num_threads(before)
        return timings

    def rows(self, timings: dict[str, Timing]) -> list[dict[str, Any]]:
        """Rows as of a contest, with ``threads``."""
        result = []
        for (threads, batch), each in self.contests.items():
            of_calls = {name: timings[_key(threads, batch, name)].milliseconds for name in each.calls}
            per_image = {name: Timing(tuple(ms / batch for ms in times)) for name, times in of_calls.items()}
            result += [{**row, "threads": threads} for row in each.rows(per_image)]
        return result


def _key(threads: int, batch: int, name: str) -> str:
    return f"{threads} {batch} {name}"


def features(dtype: torch.dtype, batches: Sequence[int] = BATCHES, size: int = 224) -> Scaling:
    """One thread against all of them at the first batch size, and all of them at every batch size.

    Args:
        dtype: of weights and input.
        batches: of images, in increasing order.
        size: of the images.

    Raises:
        Disagreement: our error is larger than the precision ladder allows, or depends on the batch.

    Example:
        >>> features(torch.float32, [1], 32).contests[1, 1].name
        'scaling 32, 1 thread'
    """
    most = torch.get_num_threads()
    checked = contest.features(dtype, 1, size)
    network = peers.plain_features()
    x = torch.randn(batches[-1], 3, size, size, generator=torch.Generator().manual_seed(1))
    peers.calibrate(network, x[:1])
    contestants = peers.contestants(network.to(dtype))
    x = x.to(dtype)
    whole = contestants[OURS].on(x)()
    contests = {}
    for threads, batch in sorted({(1, batches[0])} | {(most, batch) for batch in batches}):
        calls = {name: _with_threads(threads, contestants[name].on(x[:batch])) for name in (CHANNELS_LAST, OURS)}
        if not torch.equal(calls[OURS](), whole[:batch]):
            raise contest.Disagreement(f"{threads} threads, batch {batch}: not the bits of batch {len(x)}")
        name = f"{_PROBLEM} {size}, {threads} thread{'' if threads == 1 else 's'}"
        contests[threads, batch] = replace(checked, name=name, batch=batch, calls=calls)
    torch.set_num_threads(most)
    return Scaling(contests)


def _with_threads(threads: int, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def with_threads() -> Tensor:
        torch.set_num_threads(threads)  # 1 us where the number stays
        return call()

    return with_threads


@dataclass(frozen=True)
class Summary:
    """What the rows of :class:`Scaling` say of one contestant in one precision.

    Attributes:
        precision, contestant: whose.
        threads: the larger number of threads.
        speedup: time with one thread over that with all of them.
        milliseconds: batch -> per image, with all threads.
        growth: the largest time per image over that of any smaller batch; at most 1 if it never grows.
    """

    precision: str
    contestant: str
    threads: int
    speedup: float
    milliseconds: dict[int, float]
    growth: float

    def __str__(self) -> str:
        times = ", ".join(f"{batch}: {ms:.2f}" for batch, ms in self.milliseconds.items())
        return (
            f"{self.precision} {self.contestant}: {self.speedup:.2f} times as fast with {self.threads} threads as with "
            f"one; ms per image by batch {times}; grows to {self.growth:.3f} at most"
        )


def summaries(rows: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """Of all rows that :class:`Scaling` made; others are left out.

    Example:
        >>> summaries([{"problem": "features 224"}])
        []
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["problem"].startswith(_PROBLEM):
            groups.setdefault((row["precision"], row["contestant"]), []).append(row)
    result = []
    for (precision, contestant), group in groups.items():
        most = max(row["threads"] for row in group)
        times = {row["batch"]: row["median_ms_per_image"] for row in group if row["threads"] == most}
        alone = next(row for row in group if row["threads"] == 1)
        batches = sorted(times)
        growth = max([times[b] / min(times[a] for a in batches if a < b) for b in batches[1:]], default=1.0)
        speedup = alone["median_ms_per_image"] / times[alone["batch"]]
        result.append(Summary(precision, contestant, most, speedup, times, growth))
    return result
