"""What a kernel asked of the memories and the tensor cores, per instruction, and a model of the time that takes.

:class:`Counters` is the observer of a launch; it counts what the simulated instructions did, exactly. :func:`predict`
is a *model*: the slowest of five resources at its published peak. It knows no latency, no L1 cache, no replay and no
clock that drops under load: it says what a kernel cannot beat and which resource stands in its way, not what it takes.

    wavefront   what the shared memory serves in one clock: one 4-byte word from each of its 32 banks. A warp's accesses
                of 8 bytes go by half warps, those of 16 bytes (and ldmatrix) by quarters.
    sector      32 aligned bytes, the unit of the L2 and of the traffic between it and a multiprocessor
    issue slot  one PTX instruction of one warp, the weakest of the five numbers: in the shipped conv3x3 ptxas makes
                0.85 (sm_80) or 1.04 (sm_90) machine instructions of it (test_counters_of_kernels.py)

The terms are those of the Nsight Compute documentation, "Metrics Decoder".
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

BANKS_BYTES = 128  # of one wavefront: 32 banks of 4 bytes
SECTOR = 32
PAGE_SECTORS = 1 << 15  # how finely touched memory is recorded: pages of 1 MiB
MMA_SHAPE = re.compile(r"(?:^mma|^wgmma\.mma_async)\..*\.m(\d+)n(\d+)k(\d+)\b")


@dataclass
class Row:
    """Counts of one static instruction, over all warps and executions."""

    line: int = 0
    op: str = ""
    source: tuple[str, int] | None = None
    issues: int = 0  # by warps
    flops: int = 0  # of the tensor cores
    wavefronts: int = 0
    wavefronts_ideal: int = 0
    sectors: int = 0
    sectors_ideal: int = 0

    def add(self, other: Row) -> None:
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


COUNTS = ("issues", "flops", "wavefronts", "wavefronts_ideal", "sectors", "sectors_ideal")


class Touched:
    """The sectors of global memory that were accessed at all, one bit each."""

    def __init__(self) -> None:
        self.pages: dict[int, NDArray[np.bool_]] = {}

    def add(self, sectors: Integers) -> None:
        pages = sectors // PAGE_SECTORS
        for page in distinct(pages).tolist():
            bits = self.pages.setdefault(page, np.zeros(PAGE_SECTORS, dtype=bool))
            bits[sectors[pages == page] % PAGE_SECTORS] = True

    @property
    def bytes(self) -> int:
        return SECTOR * sum(int(bits.sum()) for bits in self.pages.values())


@dataclass
class Counters:
    """The observer of a launch: ``launch(..., observer=counters)``.

    Attributes:
        rows: by the index of the instruction.
        ctas, threads: of the launch.
        read, written: global memory.

    Example (see test_counters.py for one that runs):
        >>> counters = Counters()
        >>> counters.total.flops
        0
    """

    rows: dict[int, Row] = field(default_factory=dict)
    ctas: int = 0
    threads: int = 0
    read: Touched = field(default_factory=Touched)
    written: Touched = field(default_factory=Touched)

    def begin(self, kernel: Any, grid: tuple[int, ...], threads_per_cta: int) -> None:
        if self.ctas:
            raise RuntimeError("these counters have seen a launch; take new ones, rows are numbered by its kernel")
        self.ctas, self.threads = math.prod(grid), threads_per_cta

    def end(self) -> None:
        """Nothing is left to do: every count is kept up to date."""

    def issue(self, instruction: Any, warps: int) -> None:
        row = self._row(instruction)
        row.issues += warps
        if shape := MMA_SHAPE.search(instruction.op):
            together = 4 if instruction.op.startswith("wgmma") else 1  # a warpgroup is four warps
            row.flops += 2 * math.prod(map(int, shape.groups())) * warps // together

    def memory(
        self, instruction: Any, space: str, kind: str, threads: Integers, addresses: Integers, size: int
    ) -> None:
        """Accesses of ``size`` bytes by single threads; thread ``t`` is of warp ``t // 32``."""
        row = self._row(instruction)
        if space == "shared":
            row.wavefronts += wavefronts(threads, addresses, size)
            row.wavefronts_ideal += distinct_per_warp(threads, addresses, size, BANKS_BYTES)
        elif space == "global":
            sectors = distinct((threads >> 5 << 48) | (addresses >> 5)) & ((1 << 48) - 1)
            row.sectors += len(sectors)
            row.sectors_ideal += distinct_per_warp(threads, addresses, size, SECTOR)
            self._touch(kind, sectors)
        else:
            raise ValueError(f"space is {space!r}; counted are 'shared' and 'global'")

    def bulk(
        self, instruction: Any, kind: str, shared_bytes: int, addresses: Integers | None = None, unit: int = 16
    ) -> None:
        """Accesses of the asynchronous units, taken as free of conflicts: TMA, and the operands of wgmma.

        ``shared_bytes`` are those of all CTAs together, ``addresses`` their units of ``unit`` bytes in global memory.
        """
        row = self._row(instruction)
        row.wavefronts += -(-shared_bytes // BANKS_BYTES)
        row.wavefronts_ideal += -(-shared_bytes // BANKS_BYTES)
        if addresses is not None:
            sectors = -(-len(addresses) * unit // SECTOR)
            row.sectors += sectors
            row.sectors_ideal += sectors
            self._touch(kind, distinct(addresses >> 5))

    @property
    def total(self) -> Row:
        total = Row(op="total")
        for row in self.rows.values():
            total.add(row)
        return total

    def table(self, limit: int = 20) -> str:
        """The instructions that wait longest for a memory: their worst excess over the ideal first."""
        columns = ("line", *COUNTS, "op")
        rows = sorted(
            self.rows.values(),
            key=lambda row: (row.wavefronts - row.wavefronts_ideal + row.sectors - row.sectors_ideal, row.issues),
        )
        lines = [[str(asdict(row)[c]) for c in columns] for row in (self.total, *rows[: -limit - 1 : -1])]
        widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
        widths[-1] = 0  # the last column is not padded
        padded = ([cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in (columns, *lines))
        return "\n".join(map("  ".join, padded))

    def _row(self, instruction: Any) -> Row:
        row = self.rows.get(instruction.index)
        if row is None:
            row = self.rows[instruction.index] = Row(instruction.line, instruction.op, instruction.source)
        return row

    def _touch(self, kind: str, sectors: Integers) -> None:
        if kind in ("store", "atomic"):
            self.written.add(sectors)
        if kind in ("load", "async", "atomic"):
            self.read.add(sectors)


def distinct(keys: Integers) -> Integers:
    """Each value once, in order. ``np.unique`` hashes, which takes five times as long here."""
    keys = np.sort(keys)
    return keys[np.concatenate([[True], keys[1:] != keys[:-1]])] if len(keys) else keys


def wavefronts(threads: Integers, addresses: Integers, size: int) -> int:
    """How many wavefronts a shared-memory access takes: in each phase, as many as a bank has different words.

    Args:
        threads, addresses: ``[n]``, the active threads.
        size: bytes per thread, 1 to 16, to which addresses are aligned. 8 and 16 bytes go in 2 and 4 phases of a warp;
            that two phases may be served at once where neighbours read the same words is left out.

    Example:
        >>> lanes = np.arange(32)
        >>> [wavefronts(lanes, lanes * stride * 4, 4) for stride in (1, 2, 32)]
        [1, 2, 32]
    """
    if not len(threads):
        return 0
    unit = max(size, 4)
    phase = threads // (BANKS_BYTES // unit)
    phase = phase - phase.min()
    banks = BANKS_BYTES // unit
    words = distinct(phase << 40 | addresses // unit)
    at_bank = (words >> 40) * banks + (words & ((1 << 40) - 1)) % banks
    per_bank = np.bincount(at_bank, minlength=(int(phase.max()) + 1) * banks)
    return int(per_bank.reshape(-1, banks).max(axis=1).sum())


def distinct_per_warp(threads: Integers, addresses: Integers, size: int, unit: int) -> int:
    """How many units of ``unit`` bytes the different bytes that each warp accesses would fill: the ideal."""
    if not len(threads):
        return 0
    warps = distinct((threads >> 5 << 48) | addresses // size) >> 48
    per_warp = np.bincount(warps - warps[0])
    return int((-(-per_warp * size // unit)).sum())


@dataclass(frozen=True)
class Gpu:
    """Published limits of a GPU. ``assumed`` says which of them are not published, and what they are taken from."""

    sms: int
    clock: float  # Hz, boost
    tensor: int  # dense fp16 operations per clock and SM
    l2: int  # bytes per clock
    hbm: float  # bytes per second
    shared_bytes: int  # per SM
    source: str
    assumed: str = ""
    warps: int = 64  # per SM; this and the next two: CUDA C++ Programming Guide, "Compute Capabilities"
    registers: int = 65536
    ctas: int = 32
    schedulers: int = 4  # each issues one instruction of one warp per clock


GPUS = {
    "A100": Gpu(
        108, 1.410e9, 2048, 5120, 1.555e12, 164 << 10,
        source="NVIDIA A100 Tensor Core GPU Architecture whitepaper (2020): 108 SMs, 1410 MHz, 312 TFLOP/s dense fp16, "
        "L2 read bandwidth 5120 bytes per clock, 1555 GB/s (40 GB model)",
    ),
    "H100": Gpu(
        132, 1.830e9, 4096, 5120, 3.35e12, 228 << 10,
        source="NVIDIA H100 datasheet and H100 Tensor Core GPU Architecture whitepaper (2022), SXM5: 132 SMs, 989.4 "
        "TFLOP/s dense fp16, 3.35 TB/s",
        assumed="clock: 989.4 TFLOP/s / (132 SMs x 4096); L2: bytes per clock as A100",
    ),
    "H200": Gpu(
        132, 1.830e9, 4096, 5120, 4.8e12, 228 << 10,
        source="NVIDIA H200 datasheet, SXM: 989 TFLOP/s dense fp16, 4.8 TB/s; SMs as H100",
        assumed="as H100",
    ),
    "B200": Gpu(
        148, 1.856e9, 8192, 5740, 7.7e12, 228 << 10,
        source="NVIDIA HGX B200 datasheet: 18 PFLOP/s dense fp16 and 62 TB/s for eight GPUs; 148 SMs",
        assumed="clock: 2.25 PFLOP/s / (148 SMs x 8192); L2: bytes per clock and SM as H100",
    ),
}  # fmt: skip


class Prediction(NamedTuple):
    """Of :func:`predict`, a model.

    Attributes:
        times: seconds that each resource needs at its peak, when work is spread as the grid allows.
        seconds: the largest of them.
        bound: its name.
        occupancy: warps resident on a full multiprocessor, of those it can hold. Printed, not multiplied in: how many
            warps hide the latencies of a kernel is what this model cannot say.
        busy: share of the multiprocessors' time that has a CTA: 1 but for the last wave.
    """

    times: dict[str, float]
    seconds: float
    bound: str
    occupancy: float
    busy: float


def resident_ctas(gpu: Gpu, threads: int, registers: int, shared_bytes: int) -> int:
    """CTAs of a kernel that fit a multiprocessor; registers go by 256 to a warp, shared memory costs 1 KiB more each.

    Raises:
        ValueError: where not one fits, naming the limit.

    Example:
        >>> resident_ctas(GPUS["A100"], 128, 254, 98_304)
        1
    """
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    limits = {
        f"{gpu.warps} warps": gpu.warps // warps,
        f"{gpu.registers} registers": gpu.registers // (warps * per_warp) if registers else gpu.ctas,
        f"{gpu.shared_bytes} bytes of shared memory": gpu.shared_bytes // (shared_bytes + 1024),
        f"{gpu.ctas} CTAs": gpu.ctas,
    }
    if empty := [name for name, fit in limits.items() if not fit]:
        raise ValueError(
            f"a CTA of {threads} threads with {registers} registers each and {shared_bytes} bytes of shared memory "
            f"does not fit a multiprocessor: it has {', '.join(empty)}"
        )
    return min(limits.values())


def predict(
    counters: Counters,
    gpu: Gpu,
    registers: int,
    shared_bytes: int,
    ctas: int | None = None,
    memory_bytes: int | None = None,
) -> Prediction:
    """The time a launch would take if its most wanted resource were always busy: a model, and a lower bound.

    max(tensor, issue, shared, L2, HBM). The first four belong to a multiprocessor (of the L2 its share), so they wait
    for the one that got the most CTAs: ``ceil(ctas / SMs)`` of them. HBM carries every touched sector once. Where a
    grid leaves SMs idle, the others may get more than their share of the L2 (how much is not published), and be faster.

    Args:
        counters: of a launch, all of it or (with ``ctas``) a part; of 16-bit tensor instructions.
        gpu: of :data:`GPUS`.
        registers, shared_bytes: per thread and per CTA, see machine_code.py.
        ctas: of the real launch, where only some were simulated; the traffic of each is taken as their average.
        memory_bytes: that the real launch reads and writes, each counted once, where it is known better than that.
    """
    total, simulated = counters.total, counters.ctas
    ctas = simulated if ctas is None else ctas
    most = -(-ctas // gpu.sms)
    per_sm = {  # work of the busiest SM / what it does per second
        "tensor": total.flops / gpu.tensor,
        "issue": total.issues / gpu.schedulers,
        "shared": total.wavefronts,
        "L2": total.sectors * SECTOR / (gpu.l2 / gpu.sms),
    }
    times = {name: work / simulated * most / gpu.clock for name, work in per_sm.items()}
    if memory_bytes is None:
        memory_bytes = (counters.read.bytes + counters.written.bytes) * ctas // simulated
    times["HBM"] = memory_bytes / gpu.hbm
    bound = max(times, key=lambda name: times[name])
    warps = -(-counters.threads // 32) * resident_ctas(gpu, counters.threads, registers, shared_bytes)
    return Prediction(times, times[bound], bound, warps / gpu.warps, ctas / (most * gpu.sms))
