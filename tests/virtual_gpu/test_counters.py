"""Counters on access patterns whose cost is known, and the model on a kernel computed by hand."""

from __future__ import annotations

import doctest
from dataclasses import dataclass

import numpy as np
import pytest

from tests.virtual_gpu import counters
from tests.virtual_gpu.counters import GPUS, Counters, distinct_per_warp, predict, resident_ctas, wavefronts

LANES = np.arange(32)


@dataclass
class Instruction:
    """What the counters look at of an instruction."""

    op: str
    index: int = 0
    line: int = 1
    source: tuple[str, int] | None = None


def test_examples() -> None:
    assert doctest.testmod(counters).failed == 0


ROWS = np.arange(64)[:, None] * 128 + np.arange(8) * 16  # a tile of 128-byte rows in units of 16 bytes
SWIZZLED = ROWS ^ (np.arange(64)[:, None] & 7) << 4
SHARED = {  # addresses, bytes per thread, wavefronts, ideal
    "consecutive words": (LANES * 4, 4, 1, 1),
    "all lanes the same word": (LANES * 0, 4, 1, 1),
    "every second word": (LANES * 8, 4, 2, 1),
    "an odd stride": (LANES * 132, 4, 1, 1),
    "stride 32: every lane the same bank": (LANES * 128, 4, 32, 1),
    "halves, two lanes to a word": (LANES * 2, 2, 1, 1),
    "bytes, four lanes to a word": (LANES, 1, 1, 1),
    "pairs of words, by half warps": (LANES * 8, 8, 2, 2),
    "four words, by quarter warps": (LANES * 16, 16, 4, 4),
    "four words, a row apart": (LANES * 128, 16, 32, 4),
    "a column of a plain tile, as ldmatrix.x4 reads it": (ROWS[:32, 3], 16, 32, 4),
    "a column of a swizzled tile, as ldmatrix.x4 reads it": (SWIZZLED[:32, 3], 16, 4, 4),
    "a column of a swizzled tile, shifted by one tap": (SWIZZLED[1:33, 3], 16, 4, 4),
    "ldmatrix.x2: lanes 0 to 15": (SWIZZLED[:16, 3], 16, 2, 2),
}


@pytest.mark.parametrize("case", SHARED.values(), ids=SHARED)
def test_wavefronts(case: tuple[np.ndarray, int, int, int]) -> None:
    addresses, size, expected, ideal = case
    threads = np.arange(len(addresses))
    assert wavefronts(threads, addresses, size) == expected
    assert distinct_per_warp(threads, addresses, size, 128) == ideal
    three_warps = np.concatenate([threads, threads + 64, threads + 1024]), np.tile(addresses, 3)
    assert wavefronts(*three_warps, size) == 3 * expected
    assert distinct_per_warp(*three_warps, size, 128) == 3 * ideal


def test_wavefronts_of_random_accesses() -> None:
    """Against the rule, word by word."""
    rng = np.random.default_rng(1)
    for size in (2, 4, 8, 16):
        threads = np.sort(rng.choice(128, 70, replace=False))
        addresses = rng.integers(0, 256, 70) * size
        expected = 0
        for phase in range(128 * max(size, 4) // 128):
            words: dict[int, set[int]] = {bank: set() for bank in range(32)}
            for thread, address in zip(threads, addresses, strict=True):
                if thread // (128 // max(size, 4)) == phase:
                    for word in range(address // 4, -(-(address + size) // 4)):
                        words[word % 32].add(word)
            expected += max(map(len, words.values()))
        assert wavefronts(threads, addresses, size) == expected


GLOBAL = {  # addresses, bytes per thread, sectors, ideal
    "consecutive words": (LANES * 4, 4, 4, 4),
    "consecutive words, not aligned to a sector": (LANES * 4 + 16, 4, 5, 4),
    "all lanes the same word": (LANES * 0 + 4096, 4, 1, 1),
    "every second word": (LANES * 8, 4, 8, 4),
    "a sector for every lane": (LANES * 32, 4, 32, 4),
    "16 bytes each": (LANES * 16, 16, 16, 16),
    "16 bytes of 4 rows": (LANES % 8 * 16 + LANES // 8 * 4096, 16, 16, 16),
    "halves of a column": (LANES * 512, 2, 32, 2),
}


@pytest.mark.parametrize("case", GLOBAL.values(), ids=GLOBAL)
def test_sectors(case: tuple[np.ndarray, int, int, int]) -> None:
    addresses, size, sectors, ideal = case
    seen = Counters()
    for _ in range(2):
        seen.memory(Instruction("ld.global.b32"), "global", "load", LANES, addresses, size)
    assert (seen.total.sectors, seen.total.sectors_ideal) == (2 * sectors, 2 * ideal)
    assert (seen.read.bytes, seen.written.bytes) == (sectors * 32, 0)


def test_touched_memory_is_counted_once_and_by_direction() -> None:
    seen = Counters()
    load, store, add = (Instruction(op, i) for i, op in enumerate(("ld.global.b32", "st.global.b32", "red.global")))
    seen.memory(load, "global", "load", LANES, LANES * 4 + (1 << 40), 4)
    seen.memory(load, "global", "async", LANES, LANES * 4 + (1 << 40), 4)
    seen.memory(store, "global", "store", LANES, LANES * 4 + (1 << 20) - 64, 4)  # across two pages of the record
    seen.memory(add, "global", "atomic", LANES, LANES * 4 + (3 << 20), 4)
    assert (seen.read.bytes, seen.written.bytes) == (256, 256)
    seen.bulk(Instruction("cp.async.bulk.tensor", 3), "async", 512, np.arange(16) * 16 + (5 << 30))
    assert (seen.read.bytes, seen.written.bytes) == (512, 256)
    assert (seen.rows[3].wavefronts, seen.rows[3].sectors) == (512 // 128, 256 // 32)  # half of the box lies outside


def test_rows_of_16_bytes_take_a_sector_each() -> None:
    """A box of ten rows of 16 bytes, 128 bytes apart: half of each sector is wanted. Then two rows in a row."""
    seen = Counters()
    seen.bulk(Instruction("cp.async.bulk.tensor", 0), "async", 160, np.arange(10) * 128)
    assert (seen.rows[0].sectors, seen.rows[0].sectors_ideal) == (10, 5)
    seen.bulk(Instruction("cp.async.bulk.tensor", 1), "async", 64, np.array([0, 16, 128 + 16, 128 + 32]))
    assert (seen.rows[1].sectors, seen.rows[1].sectors_ideal) == (3, 2)


@pytest.mark.parametrize(
    ("op", "warps", "flops"),
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", 3, 3 * 2 * 16 * 8 * 16),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", 1, 2 * 16 * 8 * 8),
        ("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16", 8, 2 * 2 * 64 * 128 * 16),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16", 1, 0),
        ("fma.rn.f32", 1, 0),
    ],
)
def test_tensor_operations(op: str, warps: int, flops: int) -> None:
    seen = Counters()
    seen.issue(Instruction(op), warps)
    assert (seen.total.flops, seen.total.issues) == (flops, warps)


def by_hand() -> Counters:
    """200 CTAs of 4 warps; each warp 10 times: one mma, a conflict of 2 in shared memory, 16 sectors, 5 others."""
    seen = Counters()
    seen.begin(None, (100, 2, 1), 128)
    ops = ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "ld.shared.b32", "ld.global.v4.b32", "add.s32")
    mma, load, copy, other = (Instruction(op, index) for index, op in enumerate(ops))
    times = 200 * 4 * 10
    for instruction in (mma, load, copy):
        seen.issue(instruction, times)
    seen.issue(other, 5 * times)
    seen.bulk(load, "load", 2 * 128 * times)
    seen.bulk(copy, "load", 0, np.tile(np.arange(32) * 16, times))
    seen.written.add(np.arange(1 << 20))
    return seen


def test_prediction_of_a_kernel_computed_by_hand() -> None:
    """On A100: ceil(200 / 108) = 2 CTAs on the busiest SM, 8 warps."""
    got = predict(by_hand(), GPUS["A100"], registers=128, shared_bytes=50_000)
    clock = 1.41e9
    assert got.times == pytest.approx(
        {
            "tensor": 8 * 10 * 4096 / 2048 / clock,
            "issue": 8 * 10 * 8 / 4 / clock,
            "shared": 8 * 10 * 2 / clock,
            "L2": 8 * 10 * 512 / (5120 / 108) / clock,
            "HBM": ((32 << 20) + 512) / 1.555e12,
        }
    )
    assert (got.bound, got.seconds) == ("HBM", max(got.times.values()))
    assert got.occupancy == 3 * 4 / 64  # 50,000 + 1024 bytes: three CTAs
    assert got.busy == 200 / 216


def test_prediction_for_more_ctas_than_simulated() -> None:
    gpu = GPUS["H100"]
    whole = predict(by_hand(), gpu, 128, 50_000)
    tenfold = predict(by_hand(), gpu, 128, 50_000, ctas=2000)
    assert tenfold.times["tensor"] == pytest.approx(whole.times["tensor"] * 16 / 2)  # ceil(2000 / 132), ceil(200 / 132)
    assert tenfold.times["HBM"] == pytest.approx(whole.times["HBM"] * 10)


@pytest.mark.parametrize(
    ("name", "tflops", "terabytes"),
    [("A100", 312, 7.2), ("H100", 989.4, 9.4), ("H200", 989.4, 9.4), ("B200", 2250, 10.7)],
)
def test_the_limits_multiply_to_the_published_peaks(name: str, tflops: float, terabytes: float) -> None:
    gpu = GPUS[name]
    assert gpu.sms * gpu.tensor * gpu.clock == pytest.approx(tflops * 1e12, rel=0.002)
    assert gpu.l2 * gpu.clock == pytest.approx(terabytes * 1e12, rel=0.01)
    assert gpu.source
    assert bool(gpu.assumed) == (name != "A100")


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "expected"),
    [(128, 32, 0, 16), (128, 0, 0, 16), (32, 16, 0, 32), (128, 254, 0, 2), (128, 129, 0, 3), (256, 64, 73_744, 2)],
    ids=["64 warps", "registers unknown", "32 CTAs", "registers", "registers round up to 8", "shared memory"],
)
def test_resident_ctas(threads: int, registers: int, shared: int, expected: int) -> None:
    assert resident_ctas(GPUS["A100"], threads, registers, shared) == expected


def test_a_cta_that_does_not_fit_names_the_limit() -> None:
    with pytest.raises(
        ValueError, match=r"200000 bytes of shared memory does not fit .* 167936 bytes of shared memory"
    ):
        resident_ctas(GPUS["A100"], 128, 32, 200_000)


def test_counters_are_of_one_launch() -> None:
    seen = by_hand()
    with pytest.raises(RuntimeError, match="have seen a launch"):
        seen.begin(None, (1,), 32)


def test_the_table_shows_the_worst_first() -> None:
    seen = by_hand()
    bad = Instruction("st.shared.b32", 9, line=77)
    seen.memory(bad, "shared", "store", LANES, LANES * 128, 4)
    lines = seen.table(limit=2).splitlines()
    assert [line.split()[-1] for line in lines] == ["op", "total", "st.shared.b32", "add.s32"]
    assert lines[2].split()[:5] == ["77", "0", "0", "32", "1"]
