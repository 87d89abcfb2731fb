"""What this machine could do at best, measured now: arithmetic by a large matrix product, memory by a large copy.

Peaks from a data sheet do not know the clock under load, the neighbours on the machine or a cap on the instruction set.
GPUs have them all the same (:func:`data_sheet`), as everybody quotes them: a share of the roofline is said of both.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from vgg_fast import gpu
from vgg_fast.bench import failures


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


# (name as PyTorch has it, dense TFLOP/s of fp16 and bf16 with fp32 sums, of tf32, of fp32 on the FMA units, GB/s,
# source). All NVIDIA's own, at boost clock; where only figures "with sparsity" are printed, half of them. Names match
# as a whole: a "3090 Ti", a laptop's GPU or a slice of one is another thing, and is measured.
_DATA_SHEETS = (
    (r"NVIDIA A100-SXM4-40GB|NVIDIA A100-PCIE-40GB", 312, 156, 19.5, 1555, "A100 data sheet"),
    (r"NVIDIA A100-SXM4-80GB", 312, 156, 19.5, 2039, "A100 data sheet"),
    (r"NVIDIA A100 80GB PCIe", 312, 156, 19.5, 1935, "A100 data sheet"),
    (r"NVIDIA A30", 165, 82, 10.3, 933, "A30 data sheet"),
    (r"NVIDIA A10", 125, 62.5, 31.2, 600, "A10 data sheet"),
    (r"NVIDIA A40", 149.7, 74.8, 37.4, 696, "A40 data sheet"),
    (r"NVIDIA RTX A6000", 154.8, 77.4, 38.7, 768, "GA102 whitepaper"),
    (r"NVIDIA GeForce RTX 3080", 59.5, 29.8, 29.8, 760, "GA102 whitepaper"),
    (r"NVIDIA GeForce RTX 3090", 71, 35.6, 35.6, 936, "GA102 whitepaper"),
    (r"NVIDIA L4", 121, 60, 30.3, 300, "L4 data sheet"),
    (r"NVIDIA L40", 181, 90.5, 90.5, 864, "L40 data sheet"),
    (r"NVIDIA L40S", 362, 183, 91.6, 864, "L40S data sheet"),
    (r"NVIDIA RTX 6000 Ada Generation", 364.2, 182.1, 91.1, 960, "Ada architecture whitepaper"),
    (r"NVIDIA GeForce RTX 4080", 97.5, 48.7, 48.7, 716.8, "Ada architecture whitepaper"),
    (r"NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6, 1008, "Ada architecture whitepaper"),
    (r"NVIDIA H100 80GB HBM3", 989.4, 494.7, 66.9, 3352, "H100 architecture whitepaper"),
    (r"NVIDIA H100 PCIe", 756, 378, 51.2, 2039, "H100 architecture whitepaper"),
    (r"NVIDIA H100 NVL", 835, 417.5, 60, 3938, "H100 data sheet"),
    (r"NVIDIA H200", 989.4, 494.7, 66.9, 4800, "H200 data sheet"),
    (r"NVIDIA H200 NVL", 835, 417.5, 60, 4800, "H200 data sheet"),
    (r"NVIDIA B200", 2250, 1125, 75, 8000, "HGX B200 data sheet"),
    (r"NVIDIA GB200", 2500, 1250, 80, 8000, "GB200 NVL72 data sheet"),
    (r"NVIDIA GeForce RTX 5090", 209.5, 104.8, 104.8, 1792, "RTX Blackwell architecture whitepaper"),
)


def data_sheet(name: str) -> Ceilings | None:
    """The peaks that NVIDIA prints for a GPU; None for one that is not in the table.

    Args:
        name: ``torch.cuda.get_device_name()``.

    Example:
        >>> data_sheet("NVIDIA L4").floor_ms("fp16", gflop=121.0, megabytes=30.0)
        1.0
    """
    for pattern, half, tf32, single, gbytes, source in _DATA_SHEETS:
        if re.fullmatch(pattern, name):
            teraflops = {"fp32": single, "tf32": tf32, "bf16": half, "fp16": half}
            how = f"NVIDIA's peaks for {name} at boost clock, without sparsity ({source})"
            return Ceilings({key: 1e3 * value for key, value in teraflops.items()}, float(gbytes), how)
    return None


_CPU = torch.device("cpu")


def measure_ceilings(
    size: int | None = None, copied_mb: int | None = None, repeats: int = 5, device: torch.device = _CPU
) -> Ceilings:
    """Measures :class:`Ceilings` in a few seconds.

    Args:
        size: of the square matrices; also half as much again, as libraries reach their peak at different sizes. None:
            2048, on a GPU 8192.
        copied_mb: megabytes to copy, more than fits into the caches. None: 512, on a GPU 1024.
        repeats: the fastest of so many counts.
        device: whose ceilings.

    Raises:
        ValueError: an argument is less than 1.

    Example:
        >>> measure_ceilings(64, 1, 1).gbytes > 0
        True
    """
    on_gpu = device.type == "cuda"
    size = (8192 if on_gpu else 2048) if size is None else size
    copied_mb = (1024 if on_gpu else 512) if copied_mb is None else copied_mb
    if min(size, copied_mb, repeats) < 1:
        raise ValueError(f"size={size}, copied_mb={copied_mb} and repeats={repeats} must be at least 1")
    gflops: dict[str, float] = {}
    sides = sorted({min(size, 512), size, size * 3 // 2})
    for name, dtype, setting in _precisions(on_gpu):
        # Random, as the clock follows the power and zeros draw little. Small first: some processors only emulate bf16.
        seconds, before = 0.0, sides[0]
        for side in sides:
            if seconds * (side / before) ** 3 > 1:
                break
            before = side
            try:
                with gpu.float32(setting):
                    seconds = _product(side, dtype, repeats, device)
            except RuntimeError as error:
                if not failures.out_of_memory(error):
                    raise
                failures.free_memory()
                break
            gflops[name] = max(gflops.get(name, 0.0), 2e-9 * side**3 / seconds)
    source = torch.ones(copied_mb * 250_000, device=device)
    target = torch.empty_like(source)
    seconds = _fastest(lambda: target.copy_(source), repeats, device)
    threads = torch.get_num_threads()
    where = "on the GPU" if on_gpu else f"with {threads} thread{'s' if threads > 1 else ''}"
    how = (
        f"measured in this run {where}: torch.mm of square random matrices "
        f"of {', '.join(map(str, sides))}, and a copy of {copied_mb} MB (read plus written bytes); best of {repeats}"
    )
    return Ceilings(gflops, 2e-3 * copied_mb / seconds, how)


def _precisions(on_gpu: bool) -> list[tuple[str, torch.dtype, str | None]]:
    """(name, dtype, PyTorch's setting of fp32 on a GPU that belongs to it); on the CPU the setting is the user's."""
    if not on_gpu:
        return [("fp32", torch.float32, None), ("bf16", torch.bfloat16, None)]
    of_fp32 = [(name, torch.float32, setting) for name, setting in gpu.FLOAT32.items()]
    return [*of_fp32, ("bf16", torch.bfloat16, None), ("fp16", torch.float16, None)]


def _product(side: int, dtype: torch.dtype, repeats: int, device: torch.device) -> float:
    """Seconds of one product of random matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return _fastest(partial(torch.mm, a, b, out=torch.empty_like(a)), repeats, device)


def _fastest(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds."""
    call()
    gpu.synchronize(device)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        gpu.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
