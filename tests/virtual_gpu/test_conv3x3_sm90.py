"""Hopper's conv3x3 (csrc/cuda/conv3x3_sm90.cuh), as nvcc translates it, on the virtual GPU."""

from __future__ import annotations

import ctypes
import functools
import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.virtual_gpu import cases, sm90
from tests.virtual_gpu.async_agents import SCHEDULES
from tests.virtual_gpu.counters import Counters
from tests.virtual_gpu.mutate import mutants, survives
from vgg_fast import reference, testing

HALF, BF16, TF32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _nvcc() -> None:
    if cases.find_nvcc() is None:
        pytest.skip("no nvcc to compile csrc/cuda with")


def inputs(s: testing.Shape, dtype: torch.dtype, integers: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x channels_last, weight OIHW, affine with scales of 0 to 4."""
    x, weight, bias = testing.conv_inputs(s, dtype, integers)
    affine = torch.stack([torch.arange(len(bias)) % 5 / (1 if integers else 3), bias]).float()
    return x.contiguous(memory_format=torch.channels_last), weight, affine


class Case(NamedTuple):
    """Sizes, what is stored, for how many multiprocessors it is cut, and how."""

    n: int
    cin: int
    cout: int
    h: int
    w: int
    dtype: torch.dtype
    stored: tuple[str, ...]
    multiprocessors: int
    cut: tuple[int, int, int, int]  # rows of a block, whole tiles, items, CTAs that share a sum


OUT, POOLED, BOTH = ("out",), ("pooled",), ("out", "pooled")
ODD = "odd sizes: the last row and column belong to no window"
EXACT = {
    "a whole tile and nothing else": Case(1, 64, 64, 28, 16, HALF, OUT, 1, (14, 1, 1, 1)),
    "a whole tile of 16 rows": Case(1, 64, 64, 32, 16, BF16, BOTH, 1, (16, 1, 1, 1)),
    "a half tile": Case(1, 64, 64, 14, 16, BF16, POOLED, 2, (14, 0, 1, 1)),
    "one pixel: eight taps in the padding, blocks of nothing": Case(1, 64, 64, 1, 1, BF16, OUT, 2, (14, 0, 1, 1)),
    "14x14 as in block 5: two blocks of a tile are no image's": Case(
        1, 128, 128, 14, 14, HALF, POOLED, 1, (14, 2, 2, 1)
    ),
    ODD: Case(2, 64, 128, 13, 9, BF16, BOTH, 2, (14, 2, 2, 1)),
    "one CTA: the rings go on from tile to tile": Case(2, 128, 128, 17, 9, HALF, BOTH, 1, (14, 4, 4, 1)),
    "the same with 16 rows": Case(1, 128, 128, 31, 17, HALF, BOTH, 1, (16, 4, 4, 1)),
    "whole tiles, then half ones": Case(1, 64, 128, 42, 24, HALF, BOTH, 4, (14, 4, 6, 1)),
    "sums of 2 CTAs, one chunk or two": Case(1, 192, 128, 10, 12, HALF, BOTH, 4, (14, 0, 4, 2)),
    "sums of 2 CTAs with 16 rows": Case(1, 128, 64, 32, 8, BF16, POOLED, 2, (16, 0, 2, 2)),
    "tf32: chunks of 32 channels": Case(1, 96, 64, 28, 16, TF32, BOTH, 1, (14, 1, 1, 1)),
    "tf32: 16 rows, odd sizes, half tiles": Case(1, 32, 128, 31, 13, TF32, BOTH, 4, (16, 0, 4, 1)),
    "tf32: sums of 3 CTAs": Case(1, 96, 64, 9, 13, TF32, BOTH, 3, (14, 0, 3, 3)),
    "sums of 3 CTAs": Case(1, 192, 128, 7, 16, BF16, BOTH, 7, (14, 0, 6, 3)),
}


@pytest.mark.parametrize("name", EXACT)
def test_integers_are_exact(name: str) -> None:
    c = EXACT[name]
    cut = sm90.plan(sm90.problem(c.n, c.h, c.w, c.cin, c.cout, c.dtype), c.multiprocessors)
    assert (cut.rows, cut.whole, cut.items, cut.split) == c.cut
    x, weight, affine = inputs(testing.Shape("", c.n, c.cin, c.cout, c.h, c.w, ""), c.dtype, integers=True)
    results = sm90.conv3x3(x, weight, affine, True, "out" in c.stored, "pooled" in c.stored, c.multiprocessors)
    expected = reference.conv3x3_affine(x.float(), weight.float(), affine, relu=True, pool=False)
    assert tuple(results) == c.stored
    for stored, actual in results.items():
        assert torch.equal(actual, (reference.maxpool2x2(expected) if stored == "pooled" else expected).to(c.dtype))


@pytest.mark.parametrize("multiprocessors", [1, 4], ids=["whole tiles of 14 rows", "split ones of 16"])
@pytest.mark.parametrize("dtype", [HALF, BF16, TF32], ids=str)
def test_every_schedule_gives_the_same_bits(dtype: torch.dtype, multiprocessors: int) -> None:
    cin = 256 // dtype.itemsize
    cut = sm90.plan(sm90.problem(1, 16, 13, cin, 128, dtype), multiprocessors)
    assert (cut.rows, cut.whole, cut.split) == ((14, 2, 1) if multiprocessors == 1 else (16, 0, 2))
    x, weight, affine = inputs(testing.Shape("", 1, cin, 128, 16, 13, ""), dtype)
    latest, *others = (
        sm90.conv3x3(x, weight, affine, False, True, True, multiprocessors, schedule=schedule) for schedule in SCHEDULES
    )
    kernel = "cuda_tf32" if dtype == TF32 else "cuda"
    for name, pool in (("out", False), ("pooled", True)):
        y = reference.conv3x3_affine(x.double(), weight.double(), affine.double(), relu=False, pool=pool)
        testing.assert_within(latest[name], y, testing.conv_bound(x, weight, affine, pool=pool, kernel=kernel))
        assert all(torch.equal(latest[name], other[name]) for other in others)


def test_nan_and_infinity_pass_through() -> None:
    x, weight, affine = inputs(testing.Shape("", 1, 64, 64, 12, 14, ""), HALF, integers=True)
    x[0, 1, 3, 4], x[0, 2, 8, 9], x[0, 0, 11, 0] = float("nan"), float("inf"), -float("inf")
    affine[0] += 1
    results = sm90.conv3x3(x, weight, affine, True, True, True)
    for name, pool in (("out", False), ("pooled", True)):
        expected = reference.conv3x3_affine(x.float(), weight.float(), affine, relu=True, pool=pool)
        assert expected.isnan().any()
        assert expected.isposinf().any()
        torch.testing.assert_close(results[name], expected.half(), rtol=0, atol=0, equal_nan=True)


def test_the_bits_of_an_image_do_not_depend_on_its_place() -> None:
    x, weight, affine = inputs(testing.Shape("", 3, 64, 64, 9, 12, ""), HALF)
    together = sm90.conv3x3(x, weight, affine, multiprocessors=1)["out"]
    assert torch.equal(together[2:], sm90.conv3x3(x[2:], weight, affine, multiprocessors=1)["out"])


def test_what_a_tile_moves() -> None:
    """Counts of one tile against hand arithmetic: 64 channels in and out, 28 x 16 pixels, an image of their own."""
    counters = Counters()
    x, weight, affine = inputs(testing.Shape("", 1, 64, 64, 28, 16, ""), HALF)
    sm90.conv3x3(x, weight, affine, multiprocessors=1, observer=counters)
    rows = [row for row in counters.rows.values() if row.op.startswith("cp.async.bulk.tensor")]
    pixels, weights = ([r for r in rows if dimensions in r.op] for dimensions in (".4d.", ".5d."))
    # Each block lacks the two sides of its halo that lie outside: 15 x 9 pixels of 128 bytes.
    assert [(r.issues, r.sectors, r.sectors_ideal) for r in pixels] == [(4, 4 * 15 * 9 * 4, 4 * 15 * 9 * 4)]
    assert [(r.issues, r.sectors, r.sectors_ideal) for r in weights] == [(9, *(weight.numel() * 2 // 32,) * 2)]
    stores = [r for r in counters.rows.values() if r.op.startswith("st.global")]
    assert sum(r.sectors for r in stores) == sum(r.sectors_ideal for r in stores) == 28 * 16 * 64 * 2 // 32
    total = counters.total
    assert total.flops == 2 * 9 * 28 * 16 * 64 * 64
    # TMA writes the halos and the weights once; a product reads 64 x 16 and 112 x 16 elements.
    written, read = 4 * 160 * 128 + 9 * 64 * 128, 9 * 4 * 4 * (64 + 112) * 32
    assert total.wavefronts == total.wavefronts_ideal == (written + read) // 128
    # An implicit GEMM reads its pixels nine times, and its weights for each 128 or 256 of them.
    l2, products = sum(r.sectors for r in rows) * 32, 9 * 28 * 16 * 64 * 64
    assert l2 < 0.5 * products * 2 * (1 / 256 + 1 / 128) < 0.5 * products * 2 * (1 / 128 + 1 / 128)


@pytest.mark.parametrize("stored", [OUT, POOLED, BOTH], ids=" and ".join)
@pytest.mark.parametrize("rows", sm90.HEIGHTS)
@pytest.mark.parametrize("dtype", [HALF, TF32], ids=str)
def test_every_sector_is_full(dtype: torch.dtype, rows: int, stored: tuple[str, ...]) -> None:
    """Of halos, weights, partial sums, affine map and results."""
    cut = sm90.Plan(rows=rows, down=1, across=2, items=2, split=2, partial_bytes=2 * 2 * rows * 8 * 64 * 4)
    cut.counter_bytes, counters = 4, Counters()
    x, weight, affine = inputs(testing.Shape("", 1, 256 // dtype.itemsize, 64, rows, 16, ""), dtype)
    sm90.conv3x3(x, weight, affine, True, "out" in stored, "pooled" in stored, cut=cut, observer=counters)
    moved = {f"{row.op} line {n}": row for n, row in counters.rows.items() if row.sectors}
    kinds = {row.op.split(".")[0] for row in moved.values()}
    assert {"cp", "ld", "st", "atom"} == kinds
    wasted = {name: row for name, row in moved.items() if row.sectors != row.sectors_ideal}
    assert not wasted


def test_plans_cover_every_block_once() -> None:
    for n, h, w, cout, multiprocessors in itertools.product(
        (1, 2, 7, 32), (1, 7, 14, 28, 57), (1, 8, 14, 130), (64, 512), (1, 13, 132)
    ):
        cut = sm90.plan(sm90.problem(n, h, w, 320, cout), multiprocessors)
        columns, blocks = cout // 64, n * -(-h // cut.rows) * -(-w // 8)
        halves = (cut.items - cut.whole) // cut.split
        assert cut.rows in sm90.HEIGHTS
        assert (cut.down * cut.across * n, cut.whole % columns, halves % columns) == (blocks, 0, 0)
        covered = (4 * cut.whole + 2 * halves) // columns
        assert blocks <= covered < blocks + (2 if halves else 4)
        assert halves <= multiprocessors
        assert cut.split == 1 or (cut.whole == 0 and halves * cut.split <= multiprocessors)
        assert (cut.split - 1) * -(-5 // cut.split) < 5, "the last of those that share a sum has nothing to add"


# The layers of a VGG16 on an H100: (batch, cin, cout, size) -> rows, whole tiles, items, CTAs that share a sum.
VGG16 = {
    (1, 64, 64, 224): (14, 112, 112, 1),
    (1, 64, 128, 112): (14, 0, 112, 1),
    (1, 256, 256, 56): (14, 0, 112, 2),
    (1, 512, 512, 28): (14, 0, 128, 4),
    (1, 512, 512, 14): (14, 0, 32, 4),  # a part more costs more than a chunk less takes
    (32, 64, 64, 224): (16, 3136, 3136, 1),
    (32, 128, 128, 112): (16, 1568, 1568, 1),
    (32, 256, 256, 56): (14, 896, 896, 1),
    (32, 512, 512, 28): (14, 512, 512, 1),
    (32, 512, 512, 14): (14, 128, 128, 1),
}


@pytest.mark.parametrize("key", VGG16, ids=str)
def test_plans_of_vgg16(key: tuple[int, ...]) -> None:
    n, cin, cout, size = key
    cut = sm90.plan(sm90.problem(n, size, size, cin, cout))
    assert (cut.rows, cut.whole, cut.items, cut.split) == VGG16[key]


@pytest.mark.parametrize("name", [ODD, "sums of 3 CTAs", "tf32: sums of 3 CTAs"])
def test_the_launcher_launches_what_is_simulated(name: str) -> None:
    """Tensor maps, arguments, grid and shared memory, as the CUDA runtime and the driver get them from the launcher."""
    c = EXACT[name]
    x, weight, affine = inputs(testing.Shape("", c.n, c.cin, c.cout, c.h, c.w, ""), c.dtype)
    wanted, packed = sm90.problem(c.n, c.h, c.w, c.cin, c.cout, c.dtype), weight.permute(0, 2, 3, 1).contiguous()
    cut, host = sm90.plan(wanted, c.multiprocessors), sm90.host()
    tensors = {"x": x, "weight": packed, "affine": affine} | sm90.outputs(x, c.cout, True, True) | sm90.workspace(cut)
    pointers = {key: tensor.data_ptr() for key, tensor in tensors.items()}
    entry = sm90.entry(c.dtype, cut.rows)
    sizes = [p.size for p in entry.code.kernel.parameters]
    host.record_arguments(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
    args = sm90.Args(**pointers, relu=True)
    stream = ctypes.c_void_p(77)
    assert host.launch_sm90(ctypes.byref(args), ctypes.byref(wanted), c.multiprocessors, 3, stream) is None

    launched = host.recorded_launch().contents
    assert launched.kernel.decode() == entry.code.name
    assert (launched.device, launched.stream) == (3, 77)
    assert ([*launched.grid], [*launched.block]) == ([min(cut.items, c.multiprocessors), 1, 1], [sm90.THREADS, 1, 1])
    assert launched.shared_bytes == launched.allowed_shared_bytes == sm90.shared_bytes(cut.rows)

    for i, mapped in enumerate(sm90.maps(x, packed, cut.rows)):
        number = ctypes.cast(host.recorded_argument(i), ctypes.POINTER(ctypes.c_uint64)).contents.value
        made, expected = host.recorded_map(number).contents, mapped.at(pointers["x" if i == 0 else "weight"])
        rank = len(expected.sizes)
        assert (made.address, made.rank, tuple(made.sizes[:rank]), tuple(made.strides[: rank - 1])) == (
            expected.address,
            rank,
            expected.sizes,
            expected.strides,
        )
        types = {HALF: 6, TF32: 7, BF16: 9}  # CUtensorMapDataType
        assert (made.type, tuple(made.box[:rank]), [*made.steps[:rank]]) == (types[c.dtype], expected.box, [1] * rank)
        assert expected.swizzle == 128
        assert (made.interleave, made.swizzle, made.fill) == (0, 3, 0)  # CU_TENSOR_MAP_SWIZZLE_128B

    fields = sm90.task(x, c.cout, affine, True, cut)
    names = [key for key, _ in sm90.Task._fields_ if key in pointers]
    expected_task = sm90.Task(**fields | {key: pointers[key] for key in names})
    assert ctypes.string_at(host.recorded_argument(2), sizes[2]) == bytes(expected_task)


def test_the_launcher_refuses() -> None:
    wanted = sm90.problem(1, 7, 16, 192, 64)
    assert sm90.plan(wanted, 3).split == 3
    args = sm90.Args()
    assert b"workspace" in sm90.host().launch_sm90(ctypes.byref(args), ctypes.byref(wanted), 3, 0, None)
    args.x = 8
    assert b"multiple of 16 bytes" in sm90.host().launch_sm90(ctypes.byref(args), ctypes.byref(wanted), 3, 0, None)
    wanted.cout = 100
    assert b"multiple of 64" in sm90.host().launch_sm90(ctypes.byref(args), ctypes.byref(wanted), 3, 0, None)


def test_unsupported_says_why() -> None:
    def reason(*sizes: int, dtype: torch.dtype = HALF, sm: int = 90) -> bytes | None:
        return sm90.host().sm90_unsupported_for(ctypes.byref(sm90.problem(*sizes, dtype)), sm)

    assert reason(1, 14, 14, 64, 64) is None
    assert b"capability 9.0" in (reason(1, 14, 14, 64, 128, sm=100) or b"")
    assert reason(1, 14, 14, 96, 64, dtype=TF32) is None
    assert b"32 with fp32" in (reason(1, 14, 14, 48, 64, dtype=TF32) or b"")
    for cin, cout in ((96, 128), (64, 96)):
        assert b"multiple of 64" in (reason(1, 14, 14, cin, cout) or b"")
    assert b"2^31 pixels" in (reason(2**20, 64, 64, 64, 128) or b"")


# A mutant must not live in all of these: (cin, cout, h, w, multiprocessors). Two CTAs share the two chunks of a half
# tile, which is done quickly and kills most; one has two whole tiles of two chunks, so that every stage is filled
# again, in a tile and after its end; two share the five chunks of a half tile.
MUTATED = ((128, 64, 14, 16, 2), (128, 64, 28, 32, 1), (320, 64, 14, 16, 2))
WAIVED = {
    "drop mbarrier.arrive.shared #6": "a half tile is the last of its CTA, nothing is filled after it",
    "drop mbarrier.arrive.shared #7": "the same",
}


def test_mutants_are_killed() -> None:
    living = list(mutants(sm90.entry(HALF, 14)))
    assert len(living) >= 40, "little to mutate: the compiler writes other code than it used to"
    for cin, cout, h, w, multiprocessors in MUTATED:
        x, weight, affine = inputs(testing.Shape("", 1, cin, cout, h, w, ""), HALF, integers=True)
        expected = reference.conv3x3_affine(x.float(), weight.float(), affine, relu=True, pool=False).half()
        run = functools.partial(sm90.conv3x3, x, weight, affine, True, True, True, multiprocessors)
        living = [m for m in living if survives(m, run, expected)]
    assert {mutant.name for mutant in living} == set(WAIVED)
