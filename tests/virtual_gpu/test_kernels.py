"""The shipped kernels, as their compilers translate them, on the virtual GPU against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.virtual_gpu import cases
from tests.virtual_gpu.async_agents import SCHEDULES
from vgg_fast import reference, testing

# Shape, dtype, pool; each with what it makes the compilers do.
CONVOLUTIONS = {
    "channels in one block": ("block", torch.float16, True),
    "two tiles of channels, the second not full": ("deep", torch.bfloat16, False),
    "rows not aligned: a gather of 2-byte copies": ("ragged", torch.float16, True),
    "first layer: gathered, odd sizes, padding channels": ("rgb_odd", torch.bfloat16, False),
    "fp32 on the FMA units": ("two", torch.float32, True),
}
POOLS = {"fp16 in vectors": (64, torch.float16), "bf16, odd": (37, torch.bfloat16), "fp32": (3, torch.float32)}


@pytest.fixture(params=["triton 80", "triton 90", "cuda 80", "cuda 90a"])
def gpu(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Any]:
    """(conv3x3, maxpool2x2, target)."""
    family, target = request.param.split()
    if family == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        return cases.triton_conv3x3, cases.triton_maxpool2x2, int(target)
    if cases.find_nvcc() is None:
        pytest.skip("no nvcc to compile csrc/cuda with")
    return cases.cuda_conv3x3, cases.cuda_maxpool2x2, target


@pytest.mark.parametrize("why", CONVOLUTIONS)
def test_conv3x3(gpu: Any, why: str) -> None:
    conv, _, target = gpu
    name, dtype, pool = CONVOLUTIONS[why]
    s = testing.shape(name)
    small = testing.Shape(s.name, s.n, s.cin, s.cout, min(s.h, 14), min(s.w, 14), s.why)
    x, weight, bias = testing.conv_inputs(small, dtype, integers=True)
    x = x.contiguous(memory_format=torch.channels_last)
    affine = torch.stack([torch.ones_like(bias), bias]).float()
    actual = conv(x, weight.permute(0, 2, 3, 1).contiguous(), affine, relu=True, pool=pool, target=target)
    expected = reference.conv3x3(x.float(), weight.float(), bias.float(), relu=True, pool=pool)
    assert torch.equal(actual, expected.to(dtype))


@pytest.mark.parametrize("why", POOLS)
def test_maxpool2x2(gpu: Any, why: str) -> None:
    _, pool, target = gpu
    channels, dtype = POOLS[why]
    x = testing.random_tensor(2, channels, 7, 9, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x[0, 0, 1, 1] = float("nan")
    x[1, 2, :2, :2] = -float("inf")
    torch.testing.assert_close(pool(x, target=target), reference.maxpool2x2(x), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("target", [80, 90])
def test_every_schedule_gives_the_same_bits(target: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    x, weight, bias = testing.conv_inputs(testing.Shape("", 2, 128, 64, 9, 10, ""), torch.float16)
    x = x.contiguous(memory_format=torch.channels_last)
    affine = torch.stack([torch.ones_like(bias), bias]).float()
    packed = weight.permute(0, 2, 3, 1).contiguous()
    latest, *others = (
        cases.triton_conv3x3(x, packed, affine, True, False, target, schedule=schedule) for schedule in SCHEDULES
    )
    expected = reference.conv3x3(x.double(), weight.double(), bias.double(), relu=True)
    testing.assert_within(latest, expected, testing.conv_bound(x, weight, affine))
    assert all(torch.equal(latest, other) for other in others)
