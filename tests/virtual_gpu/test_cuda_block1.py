"""The first block of a VGG in one launch (csrc/cuda/block1.*): nvcc's PTX on the virtual GPU, against the reference."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from tests.virtual_gpu import cases, ptx_entry
from tests.virtual_gpu.async_agents import SCHEDULES
from tests.virtual_gpu.counters import Counters
from tests.virtual_gpu.cuda_cases import block1
from tests.virtual_gpu.mutate import mutants, survives
from vgg_fast import reference, testing

CASES = {
    "rgb, whole tiles": (1, 3, 64, 32, 16, torch.float16),
    "rgb, every edge": (2, 3, 64, 19, 21, torch.bfloat16),
    "gray, fewer channels, smaller than a tile": (1, 1, 24, 6, 7, torch.float16),
    "four channels": (1, 4, 64, 16, 17, torch.float16),
    "two channels, rows that begin in the middle of a sector": (1, 2, 32, 17, 20, torch.bfloat16),
    "rgb, even rows that do": (2, 3, 64, 5, 34, torch.float16),
    "two tiles, one above the other": (1, 3, 64, 18, 13, torch.float16),
    "four channels, stores one by one": (1, 4, 53, 5, 6, torch.float16),
}


@pytest.fixture(params=["80", "90"])
def target(request: pytest.FixtureRequest) -> str:
    if cases.find_nvcc() is None:
        pytest.skip("no nvcc to compile csrc/cuda with")
    return request.param


def inputs(why: str, integers: bool) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    n, cin, cout, h, w, dtype = CASES[why]
    x, first, bias = testing.conv_inputs(testing.Shape("", n, cin, 64, h, w, ""), dtype, integers=integers)
    _, second, other_bias = testing.conv_inputs(testing.Shape("", n, 64, cout, h, w, ""), dtype, integers=integers)
    x = x.contiguous(memory_format=torch.channels_last)
    # Powers of two keep integers exact; 1/64 lets them round in the middle, too.
    affines = [
        torch.stack([torch.full_like(b, s).float(), b.float()]) for b, s in ((bias, 1 / 4), (other_bias, 1 / 64))
    ]
    return x, (first, second), (affines[0], affines[1])


def expected(x: Tensor, weights: tuple[Tensor, Tensor], affines: tuple[Tensor, Tensor]) -> Tensor:
    """With the middle map rounded as the chain rounds it."""
    middle = reference.conv3x3_affine(x.double(), weights[0].double(), affines[0].double(), relu=True, pool=False)
    middle = middle.to(x.dtype).double()
    return reference.conv3x3_affine(middle, weights[1].double(), affines[1].double(), relu=True, pool=False)


@pytest.mark.parametrize("why", CASES)
def test_integers_are_exact(target: str, why: str) -> None:
    x, weights, affines = inputs(why, integers=True)
    results = block1(x, weights, affines, target=target)
    wanted = expected(x, weights, affines).to(x.dtype)
    assert torch.equal(results["out"], wanted)
    assert torch.equal(results["pooled"], reference.maxpool2x2(wanted))


def test_every_schedule_has_the_same_bits(target: str) -> None:
    x, weights, affines = inputs("rgb, every edge", integers=False)
    runs = [block1(x, weights, affines, out=False, target=target, schedule=s)["pooled"] for s in SCHEDULES]
    assert all(torch.equal(runs[0], run) for run in runs[1:])
    # A value of the middle map that lies near a tie may be rounded the other way: one unit of it, times its weights.
    wanted = reference.maxpool2x2(expected(x, weights, affines))
    assert testing.relative_error(runs[0], wanted) < torch.finfo(x.dtype).eps


@pytest.mark.parametrize("why", ["rgb, whole tiles", "rgb, every edge"])
def test_nan_passes_through(why: str) -> None:
    """And stays where it belongs, although its neighbours in memory are read and masked."""
    if cases.find_nvcc() is None:
        pytest.skip("no nvcc to compile csrc/cuda with")
    x, weights, affines = inputs(why, integers=False)
    last, right = x.shape[2] - 1, x.shape[3] - 1
    x[0, 1, 3, 4], x[0, 0, 15, 15], x[0, 2, last, 0] = float("nan"), float("inf"), float("nan")
    x[0, 2, 9, right] = float("nan")  # in memory the left neighbour of the next row's first pixel
    results = block1(x, weights, affines)
    wanted = expected(x, weights, affines)
    assert wanted.isnan().any()
    assert torch.equal(results["out"].isnan(), wanted.isnan())
    assert torch.equal(results["pooled"].isnan(), reference.maxpool2x2(wanted).isnan())


def test_no_bank_conflict_in_the_main_loop_and_the_middle_map_stays_on_the_chip(target: str) -> None:
    x, weights, affines = inputs("rgb, whole tiles", integers=True)
    counters = Counters()
    block1(x, weights, affines, out=False, target=target, observer=counters)
    loop = [r for r in counters.rows.values() if r.op.startswith(("ldmatrix", "cp.async"))]
    assert sum(r.wavefronts for r in loop) == sum(r.wavefronts_ideal for r in loop) > 0
    middle = [r for r in counters.rows.values() if r.op.startswith("st.shared.v4")]
    # But for the last product of each kind of a tile's pixels: 2 of them are left, in different quarters of a warp.
    assert sum(r.wavefronts for r in middle) == sum(r.wavefronts_ideal for r in middle) + 2 * 2 * 2 > 8
    stores = [r for r in counters.rows.values() if r.op.startswith("st.global")]
    assert sum(r.sectors for r in stores) * 32 == 16 * 8 * 64 * 2 == counters.written.bytes
    # Two tiles: 22 products of 16 pixels with 32 k, then 256 pixels with 9 x 64.
    assert counters.total.flops == 2 * 2 * 64 * (22 * 16 * 32 + 256 * 576)


def test_every_small_wrong_is_found_out() -> None:
    if cases.find_nvcc() is None:
        pytest.skip("no nvcc to compile csrc/cuda with")
    entry = ptx_entry(cases.nvcc_ptx(cases.CUDA / "block1.cu", "80"), "block1_kernelI6__half")
    living = [*mutants(entry)]
    assert len(living) >= 30, "little to mutate: the compiler writes other code than it used to"
    for why in ("two tiles, one above the other", "four channels, stores one by one"):
        x, weights, affines = inputs(why, integers=True)
        run = functools.partial(block1, x, weights, affines)
        wanted = expected(x, weights, affines).to(x.dtype)
        living = [m for m in living if survives(m, run, wanted)]
    # Weights of output channels that there are not, whose sums nobody stores.
    assert [mutant.name for mutant in living] == ["no zero-fill in cp.async.cg #27"]
