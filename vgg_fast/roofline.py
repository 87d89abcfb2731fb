"""What this machine could do at best, measured now: arithmetic by a large matrix product, memory by a large copy.

Peaks from a data sheet do not know the clock under load, the neighbours on the machine or a cap on the instruction set.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch


@dataclass(frozen=True)
class Ceilings:
    """Of this process with its number of threads.

    Attributes:
        gflops: precision (``fp32``, ``bf16``) -> 1e9 operations per second of ``torch.mm`` on random data.
        gbytes: 1e9 bytes per second of a copy, bytes read plus bytes written.
        how: how they were measured, in one sentence.
    """

    gflops: dict[str, float]
    gbytes: float
    how: str

    def floor_ms(self, precision: str, gflop: float, megabytes: float) -> float:
        """Milliseconds below which ``gflop`` operations and ``megabytes`` of traffic cannot come.

        Direct convolution with its maps in memory; Winograd multiplies less, AMX can stand in for fp32, and maps that
        stay in a cache cost no traffic: all three may go below it, and so may a kernel better than ``torch.mm``.

        Example:
            >>> Ceilings({"fp32": 100.0}, 10.0, "").floor_ms("fp32", gflop=1.0, megabytes=50.0)
            10.0
        """
        # Where 16 bits have no unit of their own they can still be widened.
        peak = max(self.gflops["fp32"], self.gflops.get(precision, 0.0))
        return max(gflop / peak * 1e3, megabytes / self.gbytes)


def measure_ceilings(size: int = 2048, copied_mb: int = 512, repeats: int = 5) -> Ceilings:
    """Measures :class:`Ceilings` in a few seconds.

    Args:
        size: of the square matrices; also half as much again, as libraries reach their peak at different sizes.
        copied_mb: megabytes to copy, more than fits into the caches.
        repeats: the fastest of so many counts.

    Raises:
        ValueError: an argument is less than 1.

    Example:
        >>> measure_ceilings(64, 1, 1).gbytes > 0
        True
    """
    if min(size, copied_mb, repeats) < 1:
        raise ValueError(f"size={size}, copied_mb={copied_mb} and repeats={repeats} must be at least 1")
    gflops: dict[str, float] = {}
    sides = sorted({min(size, 512), size, size * 3 // 2})
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        # Random, as the clock follows the power and zeros draw little. Small first: some processors only emulate bf16.
        seconds, before = 0.0, sides[0]
        for side in sides:
            if seconds * (side / before) ** 3 > 1:
                break
            before = side
            a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
            out = torch.empty(side, side, dtype=dtype)
            seconds = _fastest(partial(torch.mm, a, b, out=out), repeats)
            gflops[name] = max(gflops.get(name, 0.0), 2e-9 * side**3 / seconds)
    source = torch.ones(copied_mb * 250_000)
    target = torch.empty_like(source)
    seconds = _fastest(lambda: target.copy_(source), repeats)
    threads = torch.get_num_threads()
    how = (
        f"measured in this run with {threads} thread{'s' if threads > 1 else ''}: torch.mm of square random matrices "
        f"of {', '.join(map(str, sides))}, and a copy of {copied_mb} MB (read plus written bytes); best of {repeats}"
    )
    return Ceilings(gflops, 2e-3 * copied_mb / seconds, how)


def _fastest(call: Callable[[], object], repeats: int) -> float:
    """Seconds."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
