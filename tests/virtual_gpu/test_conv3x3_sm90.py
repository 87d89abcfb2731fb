"""Hopper's conv3x3 (csrc/cuda/conv3x3_sm90.cuh), as nvcc translates it, on the virtual GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.virtual_gpu import KernelError, cases, sm90
from tests.virtual_gpu.async_agents import SCHEDULES
from tests.virtual_gpu.counters import Counters
from tests.virtual_gpu.mutate import apply, mutants
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


def ohwi(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).contiguous()


@dataclass(frozen=True)
class Case:
    n: int
    cin: int
    cout: int
    h: int
    w: int
    dtype: torch.dtype
    relu: bool = False
    pool: bool = False
    tap: bool = False
    ctas: int | None = None


EXACT = {
    "a tile and nothing else": Case(1, 64, 128, 16, 16, HALF, relu=True),
    "one pixel: eight taps in the padding, three blocks of nothing": Case(1, 64, 128, 1, 1, BF16),
    "14x14 pooled, blocks hang over": Case(1, 128, 128, 14, 14, HALF, relu=True, pool=True),
    "odd sizes, the last row and column belong to no window; a tap": Case(2, 64, 128, 13, 9, BF16, True, True, True),
    "tiles of one CTA share the rings; two tiles of channels": Case(3, 128, 256, 9, 17, HALF, True, False, False, 2),
    "the same, pooled": Case(3, 64, 256, 10, 18, BF16, pool=True, ctas=3),
}


@pytest.mark.parametrize("name", EXACT)
def test_integers_are_exact(name: str) -> None:
    c = EXACT[name]
    x, weight, affine = inputs(testing.Shape("", c.n, c.cin, c.cout, c.h, c.w, ""), c.dtype, integers=True)
    out, *tap = sm90.conv3x3(x, ohwi(weight), affine, c.relu, c.pool, c.tap, c.ctas)
    plain = reference.conv3x3_affine(x.float(), weight.float(), affine, relu=c.relu, pool=False)
    assert torch.equal(out, (reference.maxpool2x2(plain) if c.pool else plain).to(c.dtype))
    assert len(tap) == c.tap
    assert all(torch.equal(t, plain.to(c.dtype)) for t in tap)


@pytest.mark.parametrize("pool", [False, True], ids=["", "pool"])
@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
def test_every_schedule_gives_the_same_bits(dtype: torch.dtype, pool: bool) -> None:
    x, weight, affine = inputs(testing.Shape("", 1, 128, 128, 19, 12, ""), dtype)
    latest, *others = (
        sm90.conv3x3(x, ohwi(weight), affine, True, pool, ctas=1, schedule=schedule)[0] for schedule in SCHEDULES
    )
    y = reference.conv3x3_affine(x.double(), weight.double(), affine.double(), relu=True, pool=pool)
    testing.assert_within(latest, y, testing.conv_bound(x, weight, affine, pool=pool))
    assert all(torch.equal(latest, other) for other in others)


@pytest.mark.parametrize("pool", [False, True], ids=["", "pool"])
def test_nan_and_infinity_pass_through(pool: bool) -> None:
    x, weight, affine = inputs(testing.Shape("", 1, 64, 128, 12, 14, ""), HALF, integers=True)
    x[0, 1, 3, 4], x[0, 2, 8, 9], x[0, 0, 11, 0] = float("nan"), float("inf"), -float("inf")
    affine[0] += 1
    out, *_ = sm90.conv3x3(x, ohwi(weight), affine, True, pool)
    expected = reference.conv3x3_affine(x.float(), weight.float(), affine, relu=True, pool=pool)
    assert expected.isnan().any()
    assert expected.isposinf().any()
    torch.testing.assert_close(out, expected.half(), rtol=0, atol=0, equal_nan=True)


def test_what_a_tile_moves() -> None:
    """Counts of one tile against hand arithmetic: 64 channels in, 16 x 16 pixels in the middle of an image."""
    counters = Counters()
    x, weight, affine = inputs(testing.Shape("", 1, 64, 128, 16, 16, ""), HALF)
    sm90.conv3x3(x, ohwi(weight), affine, True, False, observer=counters)
    rows = [row for row in counters.rows.values() if row.op.startswith("cp.async.bulk.tensor")]
    pixels, weights = [r for r in rows if r.issues == 1], [r for r in rows if r.issues == 9]
    assert (len(pixels), len(weights)) == (4, 1)
    # Each block lacks the two sides of its halo that lie outside: 9 x 9 pixels, 8 rows of 16 bytes each.
    assert [(r.sectors, r.sectors_ideal) for r in pixels] == [(9 * 9 * 8, 9 * 9 * 4)] * 4
    assert (weights[0].sectors, weights[0].sectors_ideal) == (weight.numel() * 2 // 32,) * 2
    stores = [r for r in counters.rows.values() if r.op.startswith("st.global")]
    assert sum(r.sectors for r in stores) == sum(r.sectors_ideal for r in stores) == 16 * 16 * 128 * 2 // 32
    total = counters.total
    assert total.flops == 2 * 9 * 16 * 16 * 64 * 128
    assert total.wavefronts == total.wavefronts_ideal
    # TMA writes the halos and the weights once; a product reads 64 x 16 and 128 x 16 elements.
    written, read = 4 * 100 * 128 + 9 * 128 * 128, 9 * 4 * 4 * (64 + 128) * 32
    assert total.wavefronts == (written + read) // 128
    # An implicit GEMM with this tile reads its pixels nine times.
    l2 = sum(r.sectors for r in rows) * 32
    assert l2 < 0.55 * 9 * (256 + 128) * 128


def test_mutants_are_killed() -> None:
    """Two tiles of one CTA, two chunks each: every stage is filled again, in the middle of a tile and after its end."""
    x, weight, affine = inputs(testing.Shape("", 1, 128, 256, 10, 16, ""), HALF, integers=True)
    expected = reference.conv3x3_affine(x.float(), weight.float(), affine, relu=True, pool=False).half()
    survivors = []
    every = list(mutants(sm90.entry(HALF, pool=False)))
    assert len(every) >= 20, "next to nothing to mutate: the compiler writes other code than it used to"
    for mutant in every:
        try:
            out, *_ = sm90.conv3x3(x, ohwi(weight), affine, True, ctas=1, change=functools.partial(apply, [mutant]))
        except KernelError:
            continue
        if torch.equal(out, expected):
            survivors.append(mutant.name)
    assert survivors == []
