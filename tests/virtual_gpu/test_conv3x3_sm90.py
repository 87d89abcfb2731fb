"""Hopper's conv3x3 (csrc/cuda/conv3x3_sm90.cuh), as nvcc translates it, on the virtual GPU."""

from __future__ import annotations

import ctypes
import functools
import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.virtual_gpu import KernelError, cases, sm90
from tests.virtual_gpu.async_agents import SCHEDULES
from tests.virtual_gpu.counters import Counters
from tests.virtual_gpu.mutate import Mutant, apply, mutants
from vgg_fast import reference, testing

HALF, BF16 = torch.float16, torch.bfloat16


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
    """Sizes, what is stored, and for how many multiprocessors it is cut."""

    n: int
    cin: int
    cout: int
    h: int
    w: int
    dtype: torch.dtype
    stored: tuple[str, ...]
    multiprocessors: int = 1
    cut: tuple[int, int, int] = (1, 1, 1)  # whole tiles, items, CTAs that share a sum


OUT, POOLED, BOTH = ("out",), ("pooled",), ("out", "pooled")
EXACT = {
    "a whole tile and nothing else": Case(1, 64, 128, 16, 16, HALF, OUT),
    "a half tile": Case(1, 64, 128, 8, 16, BF16, POOLED, 2, (0, 1, 1)),
    "one pixel: eight taps in the padding, a block of nothing": Case(1, 64, 128, 1, 1, BF16, OUT, 2, (0, 1, 1)),
    "14x14 as in block 5": Case(1, 128, 128, 14, 14, HALF, POOLED),
    "odd sizes: the last row and column belong to no window": Case(2, 64, 128, 13, 9, BF16, BOTH, 2, (2, 2, 1)),
    "one CTA: the rings go on from tile to tile": Case(2, 128, 256, 9, 17, HALF, BOTH, 1, (6, 6, 1)),
    "whole tiles, then half ones": Case(1, 64, 256, 20, 20, HALF, BOTH, 4, (4, 6, 1)),
    "sums of 2 CTAs, one chunk or two": Case(1, 192, 128, 10, 12, HALF, BOTH, 4, (0, 4, 2)),
    "sums of 3 CTAs": Case(1, 192, 256, 7, 16, BF16, BOTH, 7, (0, 6, 3)),
}


@pytest.mark.parametrize("name", EXACT)
def test_integers_are_exact(name: str) -> None:
    c = EXACT[name]
    cut = sm90.plan(sm90.problem(c.n, c.h, c.w, c.cin, c.cout), c.multiprocessors)
    assert (cut.whole, cut.items, cut.split) == c.cut
    x, weight, affine = inputs(testing.Shape("", c.n, c.cin, c.cout, c.h, c.w, ""), c.dtype, integers=True)
    results = sm90.conv3x3(x, weight, affine, True, "out" in c.stored, "pooled" in c.stored, c.multiprocessors)
    expected = reference.conv3x3_affine(x.float(), weight.float(), affine, relu=True, pool=False)
    assert tuple(results) == c.stored
    for stored, actual in results.items():
        assert torch.equal(actual, (reference.maxpool2x2(expected) if stored == "pooled" else expected).to(c.dtype))


@pytest.mark.parametrize("multiprocessors", [1, 4], ids=["whole and half", "split"])
@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
def test_every_schedule_gives_the_same_bits(dtype: torch.dtype, multiprocessors: int) -> None:
    x, weight, affine = inputs(testing.Shape("", 1, 128, 128, 16, 13, ""), dtype)
    latest, *others = (
        sm90.conv3x3(x, weight, affine, False, True, True, multiprocessors, schedule=schedule) for schedule in SCHEDULES
    )
    for name, pool in (("out", False), ("pooled", True)):
        y = reference.conv3x3_affine(x.double(), weight.double(), affine.double(), relu=False, pool=pool)
        testing.assert_within(latest[name], y, testing.conv_bound(x, weight, affine, pool=pool))
        assert all(torch.equal(latest[name], other[name]) for other in others)


def test_nan_and_infinity_pass_through() -> None:
    x, weight, affine = inputs(testing.Shape("", 1, 64, 128, 12, 14, ""), HALF, integers=True)
    x[0, 1, 3, 4], x[0, 2, 8, 9], x[0, 0, 11, 0] = float("nan"), float("inf"), -float("inf")
    affine[0] += 1
    results = sm90.conv3x3(x, weight, affine, True, True, True)
    for name, pool in (("out", False), ("pooled", True)):
        expected = reference.conv3x3_affine(x.float(), weight.float(), affine, relu=True, pool=pool)
        assert expected.isnan().any()
        assert expected.isposinf().any()
        torch.testing.assert_close(results[name], expected.half(), rtol=0, atol=0, equal_nan=True)


def test_the_bits_of_an_image_do_not_depend_on_its_place() -> None:
    x, weight, affine = inputs(testing.Shape("", 3, 64, 128, 9, 12, ""), HALF)
    together = sm90.conv3x3(x, weight, affine, multiprocessors=1)["out"]
    assert torch.equal(together[2:], sm90.conv3x3(x[2:], weight, affine, multiprocessors=1)["out"])


def test_what_a_tile_moves() -> None:
    """Counts of one tile against hand arithmetic: 64 channels in, 16 x 16 pixels, an image of their own."""
    counters = Counters()
    x, weight, affine = inputs(testing.Shape("", 1, 64, 128, 16, 16, ""), HALF)
    sm90.conv3x3(x, weight, affine, multiprocessors=1, observer=counters)
    rows = [row for row in counters.rows.values() if row.op.startswith("cp.async.bulk.tensor")]
    pixels, weights = ([r for r in rows if r.issues == issues] for issues in (4, 9))
    # Each block lacks the two sides of its halo that lie outside: 9 x 9 pixels, 8 rows of 16 bytes each.
    assert [(r.sectors, r.sectors_ideal) for r in pixels] == [(4 * 9 * 9 * 8, 4 * 9 * 9 * 4)]
    assert [(r.sectors, r.sectors_ideal) for r in weights] == [(weight.numel() * 2 // 32,) * 2]
    stores = [r for r in counters.rows.values() if r.op.startswith("st.global")]
    assert sum(r.sectors for r in stores) == sum(r.sectors_ideal for r in stores) == 16 * 16 * 128 * 2 // 32
    total = counters.total
    assert total.flops == 2 * 9 * 16 * 16 * 64 * 128
    # TMA writes the halos and the weights once; a product reads 64 x 16 and 128 x 16 elements.
    written, read = 4 * 100 * 128 + 9 * 128 * 128, 9 * 4 * 4 * (64 + 128) * 32
    assert total.wavefronts == total.wavefronts_ideal == (written + read) // 128
    # An implicit GEMM with this tile reads its pixels nine times; with one of 128 x 128 its weights twice as well.
    l2 = sum(r.sectors for r in rows) * 32
    assert l2 < 0.55 * 9 * (256 + 128) * 128
    assert l2 < 0.4 * 9 * (128 + 128) * 128 * 2


def test_plans_cover_every_block_once() -> None:
    for n, h, w, cout, multiprocessors in itertools.product(
        (1, 2, 7, 32), (1, 7, 14, 28, 57), (1, 8, 14, 130), (128, 512), (1, 13, 132)
    ):
        cut = sm90.plan(sm90.problem(n, h, w, 320, cout), multiprocessors)
        columns, blocks = cout // 128, n * -(-h // 8) * -(-w // 8)
        halves = (cut.items - cut.whole) // cut.split
        assert (cut.down * cut.across * n, cut.whole % columns, halves % columns) == (blocks, 0, 0)
        covered = (4 * cut.whole + 2 * halves) // columns
        assert blocks <= covered < blocks + (2 if halves else 4)
        assert halves <= multiprocessors
        assert cut.split == 1 or (cut.whole == 0 and halves * cut.split <= multiprocessors)
        assert (cut.split - 1) * -(-5 // cut.split) < 5, "the last of those that share a sum has nothing to add"


# The layers of a VGG16 on an H100: (batch, cin, cout, size) -> whole tiles, items, CTAs that share a sum.
VGG16 = {
    (1, 64, 128, 112): (0, 98, 1),
    (1, 256, 256, 56): (0, 100, 2),
    (1, 512, 512, 28): (0, 128, 4),
    (1, 512, 512, 14): (0, 64, 8),
    (32, 128, 128, 112): (1568, 1568, 1),
    (32, 256, 256, 56): (784, 784, 1),
    (32, 512, 512, 28): (512, 512, 1),
    (32, 512, 512, 14): (128, 128, 1),
}


@pytest.mark.parametrize("key", VGG16, ids=str)
def test_plans_of_vgg16(key: tuple[int, ...]) -> None:
    n, cin, cout, size = key
    cut = sm90.plan(sm90.problem(n, size, size, cin, cout))
    assert (cut.whole, cut.items, cut.split) == VGG16[key]


@pytest.mark.parametrize("name", ["odd sizes: the last row and column belong to no window", "sums of 3 CTAs"])
def test_the_launcher_launches_what_is_simulated(name: str) -> None:
    """Tensor maps, arguments, grid and shared memory, as the CUDA runtime and the driver get them from the launcher."""
    c = EXACT[name]
    x, weight, affine = inputs(testing.Shape("", c.n, c.cin, c.cout, c.h, c.w, ""), c.dtype)
    wanted, packed = sm90.problem(c.n, c.h, c.w, c.cin, c.cout, c.dtype), weight.permute(0, 2, 3, 1).contiguous()
    cut, host = sm90.plan(wanted, c.multiprocessors), sm90.host()
    tensors = {"x": x, "weight": packed, "affine": affine} | sm90.outputs(x, c.cout, True, True) | sm90.workspace(cut)
    pointers = {key: tensor.data_ptr() for key, tensor in tensors.items()}
    sizes = [p.size for p in sm90.entry(c.dtype).code.kernel.parameters]
    host.record_arguments(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
    args = sm90.Args(**pointers, relu=True)
    stream = ctypes.c_void_p(77)
    assert host.launch_sm90(ctypes.byref(args), ctypes.byref(wanted), c.multiprocessors, 3, stream) is None

    launched = host.recorded_launch().contents
    assert launched.kernel.decode() == sm90.entry(c.dtype).code.name
    assert (launched.device, launched.stream) == (3, 77)
    assert ([*launched.grid], [*launched.block]) == ([min(cut.items, c.multiprocessors), 1, 1], [sm90.THREADS, 1, 1])
    assert launched.shared_bytes == launched.allowed_shared_bytes == sm90.shared_bytes()

    for i, mapped in enumerate(sm90.maps(x, packed)):
        number = ctypes.cast(host.recorded_argument(i), ctypes.POINTER(ctypes.c_uint64)).contents.value
        made, expected = host.recorded_map(number).contents, mapped.at(pointers["x" if i == 0 else "weight"])
        assert (made.address, [*made.sizes], [*made.strides], [*made.box]) == (
            expected.address,
            [*expected.sizes],
            [*expected.strides],
            [*expected.box],
        )
        types = {HALF: 6, BF16: 9}  # CUtensorMapDataType
        assert (made.type, made.rank, [*made.steps]) == (types[c.dtype], 5, [1] * 5)
        swizzles = {0: 0, 128: 3}  # CUtensorMapSwizzle
        assert (made.interleave, made.swizzle, made.fill) == (0, swizzles[expected.swizzle], 0)

    fields = sm90.task(x, c.cout, affine, True, cut)
    names = [key for key, _ in sm90.Task._fields_ if key in pointers]
    expected_task = sm90.Task(**fields | {key: pointers[key] for key in names})
    assert ctypes.string_at(host.recorded_argument(2), sizes[2]) == bytes(expected_task)


def test_the_launcher_refuses() -> None:
    wanted = sm90.problem(1, 7, 16, 192, 128)
    assert sm90.plan(wanted, 3).split == 3
    args = sm90.Args()
    assert b"workspace" in sm90.host().launch_sm90(ctypes.byref(args), ctypes.byref(wanted), 3, 0, None)
    args.x = 8
    assert b"multiple of 16 bytes" in sm90.host().launch_sm90(ctypes.byref(args), ctypes.byref(wanted), 3, 0, None)
    wanted.cout = 100
    assert b"one of 128" in sm90.host().launch_sm90(ctypes.byref(args), ctypes.byref(wanted), 3, 0, None)


def test_unsupported_says_why() -> None:
    def reason(*sizes: int, dtype: torch.dtype = HALF, sm: int = 90) -> bytes | None:
        return sm90.host().sm90_unsupported_for(ctypes.byref(sm90.problem(*sizes, dtype)), sm)

    assert reason(1, 14, 14, 64, 128) is None
    assert b"capability 9.0" in (reason(1, 14, 14, 64, 128, sm=100) or b"")
    assert b"fp16 and bf16" in (reason(1, 14, 14, 64, 128, dtype=torch.float32) or b"")
    assert b"multiple of 64" in (reason(1, 14, 14, 96, 128) or b"")
    assert b"one of 128" in (reason(1, 14, 14, 64, 64) or b"")
    assert b"2^31 pixels" in (reason(2**20, 64, 64, 64, 128) or b"")


# A mutant must not live in all of these: (cin, cout, h, w, multiprocessors). Two CTAs share the five chunks of a half
# tile; or one has two whole tiles of two chunks, so that every stage is filled again, in a tile and after its end.
MUTATED = ((320, 128, 8, 16, 2), (128, 128, 16, 32, 1))
WAIVED = {
    "drop mbarrier.arrive.shared #6": "a half tile is the last of its CTA, nothing is filled after it",
    "drop mbarrier.arrive.shared #7": "the same",
}


def survives(mutant: Mutant, arguments: tuple[Tensor, Tensor, Tensor], multiprocessors: int, expected: Tensor) -> bool:
    change = functools.partial(apply, [mutant])
    try:
        results = sm90.conv3x3(*arguments, True, multiprocessors=multiprocessors, change=change)
    except KernelError:
        return False
    return torch.equal(results["out"], expected)


def test_mutants_are_killed() -> None:
    living = list(mutants(sm90.entry(HALF)))
    assert len(living) >= 40, "little to mutate: the compiler writes other code than it used to"
    for cin, cout, h, w, multiprocessors in MUTATED:
        x, weight, affine = inputs(testing.Shape("", 1, cin, cout, h, w, ""), HALF, integers=True)
        expected = reference.conv3x3_affine(x.float(), weight.float(), affine, relu=True, pool=False).half()
        living = [m for m in living if survives(m, (x, weight, affine), multiprocessors, expected)]
    assert {mutant.name for mutant in living} == set(WAIVED)
