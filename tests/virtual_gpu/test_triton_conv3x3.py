"""Every tile, precision and epilogue of kernels/conv3x3.py in the PTX that Triton makes of it, on the virtual GPU."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed, whose PTX is run")
from tests.virtual_gpu import cases
from tests.virtual_gpu.async_agents import SCHEDULES
from vgg_fast import reference, testing
from vgg_fast.kernels.configs import TILES, Config, is_lean
from vgg_fast.kernels.conv3x3 import Launch, launch_of

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
EPILOGUES = {  # relu, pool, tap, split
    "plain": (False, False, False, 1),
    "relu": (True, False, False, 1),
    "pool": (True, True, False, 1),
    "tap": (True, True, True, 1),
    "split": (True, False, False, 3),
    "split pool": (False, True, False, 2),
    "split tap": (True, True, True, 3),
}
SMALLEST = {kind: tiles[-1] for kind, tiles in TILES["sm_80"].items()}
ODD = testing.Shape(
    "odd", 2, 64, 40, 9, 7, "windows hang over, a tile holds pixels of two images, 24 columns are masked"
)


@functools.cache
def inputs(shape: testing.Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, so that every order of summation is exact: x, weights as the kernel reads them, affine."""
    x, weight, bias = testing.conv_inputs(shape, dtype, integers=True)
    affine = torch.stack([torch.arange(len(bias)) % 3, bias]).float()
    return x.contiguous(memory_format=torch.channels_last), weight.permute(0, 2, 3, 1).contiguous(), affine


def launch_for(shape: testing.Shape, precision: str, epilogue: str, tile: Config, target: int) -> Launch:
    relu, pool, tap, split = EPILOGUES[epilogue]
    dtype, fp32 = DTYPES.get(precision, torch.float32), "ieee" if precision in DTYPES else precision
    size = (shape.n, shape.h, shape.w, shape.cin, shape.cout)
    architecture, tile = cases.ARCHITECTURES[target], tile._replace(split=split)
    return launch_of(dtype, *size, relu, pool, architecture, tap, fp32, tile)


def check(shape: testing.Shape, precision: str, epilogue: str, tile: Config, target: int) -> None:
    """The launch of this tile gives exactly what the reference gives."""
    launch, dtype = launch_for(shape, precision, epilogue, tile, target), DTYPES.get(precision, torch.float32)
    x, weight, affine = inputs(shape, dtype)
    actual = cases.triton_conv3x3(x, weight, affine, target=target, launched=launch)
    relu, pool, tap, _ = EPILOGUES[epilogue]
    y = reference.conv3x3_affine(x.float(), weight.permute(0, 3, 1, 2).float(), affine, relu=relu, pool=False)
    expected = [*([y] if tap else []), reference.maxpool2x2(y) if pool else y]
    for got, want in zip(actual if tap else [actual], expected, strict=True):
        assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize(
    ("precision", "epilogue"),
    [("fp16", epilogue) for epilogue in EPILOGUES]
    + [(precision, e) for precision in ("bf16", "ieee", "tf32", "bf16x3") for e in ("relu", "split pool", "split tap")],
)
@pytest.mark.parametrize("target", [80, 90])
def test_epilogue(target: int, precision: str, epilogue: str) -> None:
    check(ODD, precision, epilogue, SMALLEST["16 bits" if precision in DTYPES else precision], target)


@pytest.mark.parametrize(
    ("target", "kind", "tile"),
    [(sm, kind, tile) for sm in (80, 90) for kind, tiles in TILES[f"sm_{sm}"].items() for tile in tiles],
    ids=lambda value: "x".join(map(str, value[:4])) if isinstance(value, Config) else str(value),
)
def test_tile(target: int, kind: str, tile: Config) -> None:
    """Each with the epilogue that asks most of it. Two k-steps to a tap: one loop over taps and channels, which with 8
    warps once came out wrong (triton #1254)."""
    shape = testing.Shape(
        "", 1, 2 * tile.bk, tile.bn, 20, 14, "280 pixels: more than most tiles, less than the largest"
    )
    precision = "fp16" if kind == "16 bits" else kind
    check(shape, precision, "split tap" if is_lean(tile) else "pool", tile, target)


@pytest.mark.parametrize("channels", [(3, 64), (40, 16), (37, 53)], ids=str)
@pytest.mark.parametrize("precision", ["fp16", "tf32", "ieee"])
def test_ragged_channels(precision: str, channels: tuple[int, int]) -> None:
    """A step runs through taps and channels: the first layer in one step, rows of 16 bytes, rows of nothing."""
    shape = testing.Shape("", 1, *channels, 7, 9, "")
    dtype = DTYPES.get(precision, torch.float32)
    launch = launch_of(dtype, 1, 7, 9, *channels, True, False, cases.ARCHITECTURES[80])
    tile = Config(*(launch.options[name] for name in ("BM", "BN", "BK", "num_warps", "num_stages")))
    assert shape.cin % tile.bk
    check(shape, precision, "relu", tile, 80)


@pytest.mark.parametrize("target", [80, 90])
def test_special_values_survive_the_split_of_fp32(target: int) -> None:
    x, weight, bias = testing.conv_inputs(testing.Shape("", 1, 32, 32, 6, 6, ""))
    x[0, 1, 3, 4], x[0, 2, 0, 5], x[0, 0, 5, 0], x[0, 5, 0, 0] = float("nan"), float("inf"), -float("inf"), 3e38
    weight[3, 2] = 0
    launch = launch_of(x.dtype, 1, 6, 6, 32, 32, True, False, cases.ARCHITECTURES[target], precision="bf16x3")
    packed, affine = weight.permute(0, 2, 3, 1).contiguous(), torch.stack([torch.ones_like(bias), bias])
    x = x.contiguous(memory_format=torch.channels_last)
    actual = cases.triton_conv3x3(x, packed, affine, target=target, launched=launch)
    expected = reference.conv3x3(x, weight, bias, relu=True)
    assert expected.isnan().any()
    assert expected.isinf().any()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())


@pytest.mark.parametrize(("precision", "error"), [("ieee", 2.0**-22), ("bf16x3", 3 * 2.0**-16), ("tf32", 2.0**-9)])
@pytest.mark.parametrize("target", [80, 90])
def test_error_of_fp32(target: int, precision: str, error: float) -> None:
    """Of a product: tf32 drops 13 bits of each factor (2^-10 each), bf16x3 leaves out the product of two remainders."""
    x, weight, bias = testing.conv_inputs(ODD)
    affine = torch.stack([torch.ones_like(bias), bias])
    launch = launch_for(ODD, precision, "split", SMALLEST[precision], target)
    x = x.contiguous(memory_format=torch.channels_last)
    actual = cases.triton_conv3x3(x, weight.permute(0, 2, 3, 1).contiguous(), affine, target=target, launched=launch)
    expected = reference.conv3x3(x.double(), weight.double(), bias.double(), relu=True)
    magnitude = reference.conv3x3(x.double().abs(), weight.double().abs(), bias.double().abs())
    testing.assert_within(actual, expected, testing.conv_bound(x, weight, affine) + error * magnitude)
    if precision != "ieee":
        assert testing.relative_error(actual, expected) > 2.0**-20, "this was not computed in the precision asked for"


@pytest.mark.parametrize("target", [80, 90])
def test_shared_sums_have_the_same_bits_in_every_schedule(target: int) -> None:
    """Which program arrives last depends on the schedule, the order of the sum does not; races are looked for."""
    x, weight, bias = testing.conv_inputs(testing.Shape("", 2, 128, 64, 9, 10, ""), torch.float16)
    x, packed = x.contiguous(memory_format=torch.channels_last), weight.permute(0, 2, 3, 1).contiguous()
    affine = torch.stack([torch.ones_like(bias), bias]).float()
    size = (2, 9, 10, 128, 64)
    tile = SMALLEST["16 bits"]._replace(split=5)
    launch = launch_of(x.dtype, *size, True, False, cases.ARCHITECTURES[target], config=tile)
    assert launch.grid == (15,)
    first, *others = (
        cases.triton_conv3x3(x, packed, affine, target=target, launched=launch, schedule=schedule, seed=seed)
        for schedule, seed in [*((schedule, 0) for schedule in SCHEDULES), ("random", 1), ("random", 2)]
    )
    expected = reference.conv3x3(x.double(), weight.double(), bias.double(), relu=True)
    testing.assert_within(first, expected, testing.conv_bound(x, weight, affine))
    assert all(torch.equal(first, other) for other in others)
