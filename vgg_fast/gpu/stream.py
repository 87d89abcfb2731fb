"""Work queued on a device: whether a graph is being captured, how long calls take, waiting for the end."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def capturing(device: torch.device) -> bool:
    """Whether what is queued on this device now goes into a CUDA graph: nothing may wait for the device then."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def clock(device: torch.device) -> Callable[[Callable[[], object], int], float]:
    """A clock for :func:`vgg_fast.gpu.tuning.contest`: CUDA events on the current stream, around calls back to back.

    So a call counts for as long as the GPU or the CPU needs, whichever is longer: what a user sees of it.
    """

    def seconds(call: Callable[[], object], repeats: int) -> float:
        stream = torch.cuda.current_stream(device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        for _ in range(repeats):
            call()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats

    return seconds


def keep_busy(call: Callable[[], object], device: torch.device, seconds: float) -> None:
    """Calls again and again: an idle GPU turns its clocks up only after some tenths of a second of work."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        call()
        synchronize(device)


def synchronize(device: torch.device) -> None:
    """Waits for what was queued on ``device``; the CPU has no queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
