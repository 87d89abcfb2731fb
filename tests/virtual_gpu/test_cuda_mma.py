"""conv3x3 on tensor cores (csrc/cuda/conv3x3_mma.*): nvcc's PTX on the virtual GPU, against the reference."""

from __future__ import annotations

import ctypes
import functools
import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.virtual_gpu import cases, cuda_cases, predict_cuda, predicted, ptx_entry
from tests.virtual_gpu.async_agents import SCHEDULES
from tests.virtual_gpu.counters import Counters
from tests.virtual_gpu.cuda_cases import MmaArgs, conv3x3_mma, plan, planner, problem
from tests.virtual_gpu.mutate import mutants, survives
from vgg_fast import reference, testing

TARGETS = ("80", "90")
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32  # FLOAT: as tf32


class Case(NamedTuple):
    """Sizes, and how the problem is cut: ``cuda_cases.TILES[tile]``; split 0 lets the planner choose."""

    n: int
    cin: int
    cout: int
    h: int
    w: int
    dtype: torch.dtype
    tile: int
    split: int


CASES = {
    "whole strips of 8, one tile that ends in the image": Case(1, 32, 128, 16, 24, HALF, 0, 1),
    "five images in a tile, 8 positions cross strips": Case(5, 48, 64, 6, 6, HALF, 1, 1),
    "odd sizes: half a pair, a column too many; 2 of 3 tiles of channels full": Case(2, 32, 160, 13, 11, HALF, 1, 1),
    "channels: half a chunk, and stores one by one": Case(2, 24, 53, 9, 10, BFLOAT, 1, 1),
    "14x14 as in block 5": Case(2, 32, 128, 14, 14, BFLOAT, 0, 1),
    "sums shared by 3 CTAs, 5 chunks": Case(2, 72, 72, 10, 12, HALF, 1, 3),
    "sums shared by 2 CTAs of the large tile": Case(1, 32, 64, 14, 14, BFLOAT, 0, 2),
    "tf32": Case(1, 20, 64, 12, 14, FLOAT, 1, 1),
    "tf32, shared by 2 CTAs, odd channels": Case(1, 16, 35, 9, 9, FLOAT, 0, 2),
    "four warps of 64 channels each": Case(1, 32, 64, 18, 20, HALF, 2, 1),
    "one row, two strips that are wider than it": Case(1, 16, 32, 1, 70, HALF, 1, 1),
    "one pixel: every tap but the centre is padding": Case(2, 16, 32, 1, 1, HALF, 1, 0),
}


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    if cases.find_nvcc() is None:
        pytest.skip("no nvcc to compile csrc/cuda with")
    return request.param


def inputs(c: Case, integers: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x channels_last, weight OIHW, affine with scales other than 1 that keep integers exact."""
    shape = testing.Shape("", c.n, c.cin, c.cout, c.h, c.w, "")
    x, weight, bias = testing.conv_inputs(shape, c.dtype, integers=integers)
    affine = torch.stack([2.0 ** (torch.arange(c.cout) % 3 - 1), bias.float()])
    return x.contiguous(memory_format=torch.channels_last), weight, affine


@pytest.mark.parametrize("why", CASES)
def test_integers_are_exact(target: str, why: str) -> None:
    c = CASES[why]
    x, weight, affine = inputs(c, integers=True)
    poolable = min(c.h, c.w) > 1
    results = conv3x3_mma(x, weight, affine, True, True, poolable, target, c.tile, c.split)
    expected = reference.conv3x3_affine(x.float(), weight.float(), affine, relu=True, pool=False)
    assert torch.equal(results["out"], expected.to(c.dtype))
    if poolable:
        assert torch.equal(results["pooled"], reference.maxpool2x2(expected).to(c.dtype))


def tf32(t: Tensor) -> Tensor:
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize(("tile", "dtype"), [(0, HALF), (0, FLOAT), (1, BFLOAT), (2, HALF)], ids=str)
def test_within_the_bound_and_every_schedule_has_the_same_bits(target: str, tile: int, dtype: torch.dtype) -> None:
    """Against float64, each epilogue by itself. Those of tf32 are rounded before: its products are exact then."""
    c = Case(2, 48, 64, 10, 12, dtype, tile, 2)
    x, weight, affine = inputs(c, integers=False)
    operands = (tf32(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), tf32(weight)) if dtype == FLOAT else (x, weight)
    wide = [t.double() for t in operands]
    for pooled, relu in ((False, False), (True, True)):
        name, schedules = ("pooled", SCHEDULES) if pooled else ("out", SCHEDULES[:1])
        runs = [
            conv3x3_mma(x, weight, affine, relu, not pooled, pooled, target, tile, c.split, schedule=s)[name]
            for s in schedules
        ]
        expected = reference.conv3x3_affine(*wide, affine.double(), relu=relu, pool=pooled)
        testing.assert_within(runs[0], expected, testing.conv_bound(*operands, affine, pool=pooled, out_dtype=dtype))
        assert all(torch.equal(runs[0], run) for run in runs[1:])


def test_shared_sums_have_the_same_bits_whoever_comes_last() -> None:
    """He has his own part in registers, and it may be any of them."""
    if cases.find_nvcc() is None:
        pytest.skip("no nvcc to compile csrc/cuda with")
    x, weight, affine = inputs(Case(1, 48, 64, 8, 8, HALF, 1, 3), integers=False)
    first, *others = (
        conv3x3_mma(x, weight, affine, tile=1, split=3, schedule="random", seed=seed)["out"] for seed in range(6)
    )
    assert all(torch.equal(first, other) for other in others)


def test_nan_and_infinity_pass_through() -> None:
    if cases.find_nvcc() is None:
        pytest.skip("no nvcc to compile csrc/cuda with")
    c = Case(1, 24, 32, 12, 14, HALF, 1, 1)
    x, weight, affine = inputs(c, integers=False)
    x[0, 1, 3, 4], x[0, 2, 8, 9], x[0, 23, 11, 0] = float("nan"), float("inf"), -float("inf")
    results = conv3x3_mma(x, weight, affine, True, True, True, tile=1)
    for name, pool in (("out", False), ("pooled", True)):
        expected = reference.conv3x3_affine(x.float(), weight.float(), affine, relu=True, pool=pool)
        assert expected.isnan().any()
        assert expected.isposinf().any()
        assert torch.equal(results[name].isnan(), expected.isnan())
        assert torch.equal(results[name].isposinf(), expected.isposinf())


def test_the_bits_of_an_image_do_not_depend_on_its_place() -> None:
    if cases.find_nvcc() is None:
        pytest.skip("no nvcc to compile csrc/cuda with")
    x, weight, affine = inputs(Case(3, 32, 32, 10, 12, HALF, 1, 1), integers=False)
    together = conv3x3_mma(x, weight, affine, tile=1, split=2)["out"]
    alone = conv3x3_mma(x[2:], weight, affine, tile=0, split=2)["out"]  # nor on the tile
    assert torch.equal(together[2:], alone)


@pytest.mark.parametrize(("tile", "split"), [(0, 1), (1, 2), (2, 1)])
def test_no_bank_conflict_and_no_half_sector(target: str, tile: int, split: int) -> None:
    """In the main loop; every access to global memory, those of the epilogue too. And each pixel once per tile."""
    c = Case(2, 32, 128, 28, 28, HALF, tile, split)
    x, weight, affine = inputs(c, integers=True)
    counters = Counters()
    results = conv3x3_mma(x, weight, affine, True, True, True, target, tile, split, observer=counters)
    assert {name: tuple(t.shape[2:]) for name, t in results.items()} == {"out": (28, 28), "pooled": (14, 14)}
    loop = [r for r in counters.rows.values() if r.op.startswith(("ldmatrix", "cp.async", "ld.shared.u32"))]
    assert sum(r.wavefronts for r in loop) > 0
    assert sum(r.wavefronts for r in loop) == sum(r.wavefronts_ideal for r in loop)
    assert counters.total.sectors == counters.total.sectors_ideal > 0

    # An implicit GEMM of 128x128 tiles reads every pixel for each tap and each 128 channels.
    cut = plan(problem(*x.shape[:1], 28, 28, c.cin, c.cout, HALF), tile=tile, split=split)
    bm, bn = map(int, cuda_cases.TILES[tile].split("x"))
    tiles, products = cut.rows * cut.columns * bm * bn, sum(r.flops for r in counters.rows.values())
    assert products == tiles * 2 * 9 * c.cin
    copies = sum(r.sectors for r in counters.rows.values() if r.op.startswith("cp.async"))
    assert copies * 32 < (0.4, 0.75, 0.5)[tile] * tiles * 9 * c.cin * 2 * (1 / 128 + 1 / 128)


def brute_force_halo(cut: cuda_cases.MmaPlan, positions: int) -> int:
    """Pixels of shared memory that the kernel uses of a stage, over the tiles (fill_table in conv3x3_mma.cuh)."""
    largest = 0
    for row in range(min(cut.rows, 3000)):
        pairs = [at // cut.strip for at in (row * positions, (row + 1) * positions - 1)]
        strips = [pair // cut.pairs for pair in pairs]
        count = 2 * cut.pitch * (pairs[1] - pairs[0] + 2) + cut.pad * (strips[1] - strips[0])
        largest = max(largest, count)
    return largest


def test_plans_are_sound() -> None:
    """For many sizes: what the kernel assumes of a plan. The large tiles cannot hold those of small and thin maps."""
    sizes = [*range(1, 18), 27, 28, 32, 56, 63, 64, 65, 112, 130, 224, 333, 1000]
    for (h, w), n in itertools.product(itertools.product(sizes[::2], sizes), (1, 7)):
        for tile in range(3):
            cut = plan(problem(n, h, w, 64, 96, HALF), tile=tile)
            if cut.clocks < 0:
                assert (tile != 1, min(h, w) <= 6) == (True, True)
                continue
            positions = int(cuda_cases.TILES[tile].split("x")[0]) // 2
            assert (cut.strips - 1) * cut.strip < w <= cut.strips * cut.strip
            assert cut.strip % 2 == 0
            assert cut.pitch >= cut.strip + 2
            assert cut.pad >= 2 * cut.pitch
            assert (2 * cut.pitch - cut.strip) % 8 == cut.pad % 8 == 0  # no bank conflicts
            assert cut.halo % 8 == 4
            assert cut.rows * positions >= n * cut.strips * cut.pairs * cut.strip
            assert brute_force_halo(cut, positions) <= cut.halo
            assert cut.shared_bytes <= 98 << 10


# What a VGG16 of 224x224 images becomes: (batch, multiprocessors, cin, cout, size) -> tile, strip, split, CTAs.
VGG16 = {
    (1, 108, 64, 128, 112): ("128x64", 16, 1, 196),
    (1, 108, 512, 512, 28): ("128x64", 10, 3, 168),
    (1, 108, 512, 512, 14): ("128x64", 14, 12, 192),
    (32, 108, 128, 128, 112): ("256x128", 16, 1, 1568),
    (32, 108, 256, 256, 56): ("256x64", 8, 1, 1568),
    (32, 108, 512, 512, 28): ("256x128", 28, 1, 392),
    (32, 108, 512, 512, 14): ("256x128", 14, 1, 100),
    (32, 132, 512, 512, 14): ("128x64", 14, 1, 392),
    (128, 132, 512, 512, 14): ("256x128", 14, 1, 392),
}


@pytest.mark.parametrize("key", VGG16, ids=str)
def test_plans_of_vgg16(key: tuple[int, ...]) -> None:
    n, multiprocessors, cin, cout, size = key
    cut = plan(problem(n, size, size, cin, cout, HALF), multiprocessors)
    assert (cuda_cases.TILES[cut.tile], cut.strip, cut.split, cut.ctas) == VGG16[key]
    assert cut.strip * cut.strips <= size * (1.08 if n == 1 else 1)  # columns computed for nothing


def test_what_has_no_plan_says_why() -> None:
    def why(*sizes: int) -> bytes | None:
        return planner().mma_unsupported_for(ctypes.byref(problem(*sizes, HALF)))

    assert why(1, 8, 8, 64, 64) is None
    assert why(1, 8, 8, 3, 64) == b"the pixels of x are not whole vectors of 16 bytes"
    assert why(1 << 20, 64, 64, 64, 64) == b"x has 2^31 pixels; split the batch"
    assert why(1, 8, 8, 1 << 21, 64) == b"more than 2^20 channels"


def test_structures_are_those_of_the_header() -> None:
    """Every field of the arguments, through the compiler and back."""
    wanted = problem(2, 13, 70, 24, 53, FLOAT)
    cut, args = plan(wanted, split=2), MmaArgs()
    planner().args_for(ctypes.byref(wanted), ctypes.byref(cut), ctypes.byref(args))
    sizes = [args.n, args.h, args.w, args.cin, args.cout, args.split]
    assert sizes == [2, 13, 70, 24, 53, 2]
    same = ("strip", "strips", "pairs", "pitch", "pad", "halo", "columns", "split")
    assert [getattr(args, name) for name in same] == [getattr(cut, name) for name in same]
    assert cut.strip * cut.strips >= 70


# The least demanding layer of each block: a larger one has more chunks to the same prologue and epilogue.
@pytest.mark.parametrize(("cin", "cout", "size"), [(64, 128, 112), (128, 256, 56), (256, 512, 28), (512, 512, 14)])
def test_predicted_share_of_the_tensor_cores_peak(cin: int, cout: int, size: int) -> None:
    """Batch 32 on A100 by the model of counters.py; and at most half of the traffic of an implicit GEMM."""
    if cases.find_nvcc() is None:
        pytest.skip("no nvcc to compile csrc/cuda with")
    layer = predicted.Layer(cin, cout, size, pool=False)
    row = predict_cuda.prediction(layer, 32, "A100")
    assert row.flops / predicted.peak("A100") / row.model.seconds >= 0.8
    assert row.l2 <= 0.5


MUTATED = {  # in turn, those that the ones before did not find out
    "half a chunk, two tiles": Case(1, 40, 64, 14, 14, HALF, 1, 1),
    "shared sums": Case(1, 40, 64, 8, 8, HALF, 1, 2),
    "stores one by one": Case(1, 16, 53, 14, 14, HALF, 1, 1),
    "shared sums, the first CTA is the last": Case(1, 40, 64, 8, 8, HALF, 1, 2),
}
LATE_FIRST = {"schedule": "random", "seed": 5}  # in which it so happens


def test_every_small_wrong_is_found_out() -> None:
    if cases.find_nvcc() is None:
        pytest.skip("no nvcc to compile csrc/cuda with")
    entry = ptx_entry(cases.nvcc_ptx(cases.CUDA / "conv3x3_mma.cu", "80"), "MmaTraitsI6__halfLi1E")
    living = [*mutants(entry)]
    assert len(living) >= 30, "little to mutate: the compiler writes other code than it used to"
    for why, c in MUTATED.items():
        schedule = LATE_FIRST if "first CTA" in why else {}
        x, weight, affine = inputs(c, integers=True)
        run = functools.partial(
            conv3x3_mma, x, weight, affine, True, True, True, tile=c.tile, split=c.split, **schedule
        )
        expected = reference.conv3x3_affine(x.float(), weight.float(), affine, relu=True, pool=False).half()
        living = [m for m in living if survives(m, run, expected)]
    assert [mutant.name for mutant in living] == []
