"""Every GPU kernel against the reference, on the CPU and, where there is one, on a GPU: what it computes, at its edges
and with special values."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gpu_kernels import FAMILIES, KERNELS, GpuKernels, load
from torch import Tensor

from vgg_fast import fold, reference, testing

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
POOLABLE = [s for s in testing.SHAPES if min(s.h, s.w) > 1]


@pytest.fixture(params=KERNELS)
def gpu(request: pytest.FixtureRequest) -> GpuKernels:
    return load(request.param)


def ohwi(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).contiguous()


def bias_affine(bias: Tensor) -> Tensor:
    return torch.stack([torch.ones_like(bias), bias]).float()


def rounded(exact: Tensor, dtype: torch.dtype, gpu: GpuKernels) -> Tensor:
    """fp32 to ``dtype`` as the kernels round on this machine."""
    if dtype == torch.bfloat16 and gpu.truncates_bf16:
        exact = (exact.view(torch.int32) & -(1 << 16)).view(torch.float32)
    return exact.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", testing.SHAPES, ids=lambda s: s.name)
def test_integers_are_exact(gpu: GpuKernels, shape: testing.Shape, dtype: torch.dtype) -> None:
    x, weight, bias = testing.conv_inputs(shape, dtype, integers=True)
    actual = gpu.conv3x3(x, ohwi(weight), bias_affine(bias), True, False)
    expected = reference.conv3x3(x.float(), weight.float(), bias.float(), relu=True)
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(actual, rounded(expected, dtype, gpu))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", POOLABLE, ids=lambda s: s.name)
def test_integers_are_exact_when_pooled(gpu: GpuKernels, shape: testing.Shape, dtype: torch.dtype) -> None:
    x, weight, bias = testing.conv_inputs(shape, dtype, integers=True)
    actual = gpu.conv3x3(x, ohwi(weight), bias_affine(bias), False, True)
    expected = reference.conv3x3(x.float(), weight.float(), bias.float(), pool=True)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(actual, rounded(expected, dtype, gpu))


@pytest.mark.parametrize("pool", [False, True], ids=["", "pool"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["rgb_odd", "deep", "ragged", "two"])
def test_batchnorm_with_negative_scales(gpu: GpuKernels, name: str, dtype: torch.dtype, pool: bool) -> None:
    x, weight, bias = testing.conv_inputs(testing.shape(name), dtype)
    cout = weight.shape[0]
    mean, beta, gamma = (testing.random_tensor(cout, seed=seed) for seed in (3, 4, 5))
    var = testing.random_tensor(cout, seed=6).square() + 0.1
    assert (gamma < 0).any()
    gamma[0] = 0  # a channel that is beta alone

    sign, affine = fold.batchnorm_affine(cout, bias, mean, var, gamma, beta, 1e-5)
    signed = weight * sign.to(dtype)[:, None, None, None]
    actual = gpu.conv3x3(x, ohwi(signed), affine, True, pool)

    y = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    y = F.batch_norm(y, mean.double(), var.double(), gamma.double(), beta.double(), eps=1e-5).relu()
    expected = reference.maxpool2x2(y) if pool else y
    bound = testing.conv_bound(x, weight, affine, pool=pool)
    testing.assert_within(actual, expected, bound * (2 if gpu.truncates_bf16 else 1))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # NumPy, in the interpreter
@pytest.mark.parametrize("pool", [False, True], ids=["", "pool"])
def test_nan_and_infinity_pass_through(gpu: GpuKernels, pool: bool) -> None:
    x, weight, bias = testing.conv_inputs(testing.Shape("", 1, 5, 6, 12, 14, ""))
    x[0, 1, 3, 4] = float("nan")
    x[0, 2, 8, 9] = float("inf")
    x[0, 0, 11, 0] = -float("inf")
    actual = gpu.conv3x3(x, ohwi(weight), bias_affine(bias), True, pool)
    expected = reference.conv3x3(x, weight, bias, relu=True, pool=pool)
    assert expected.isnan().any()
    assert expected.isposinf().any()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
    finite = expected.isfinite()
    torch.testing.assert_close(actual[finite], expected[finite])


def test_relu_keeps_the_sign_of_zero(gpu: GpuKernels) -> None:
    x = torch.full((1, 1, 1, 1), -1e-30)
    weight = torch.zeros(2, 1, 3, 3)
    weight[:, :, 1, 1] = torch.tensor([1.0, -1.0])[:, None]
    affine = torch.tensor([[1e-30, 1e-30], [-0.0, -0.0]])  # the product underflows to -0 and to +0
    actual = gpu.conv3x3(x, ohwi(weight), affine, True, False)
    expected = reference.conv3x3_affine(x, weight, affine, relu=True, pool=False)
    assert expected.signbit().flatten().tolist() == [True, False]
    assert torch.equal(actual.signbit(), expected.signbit())
    assert torch.equal(actual, expected)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # NumPy, in the interpreter
def test_overflow_becomes_infinity(gpu: GpuKernels) -> None:
    x = torch.full((1, 1, 2, 2), 60000.0, dtype=torch.float16)
    weight = torch.zeros(1, 1, 3, 3, dtype=torch.float16)
    weight[0, 0, 1, 1] = 2.0
    assert gpu.conv3x3(x, ohwi(weight), torch.tensor([[1.0], [0.0]]), False, True).item() == float("inf")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_an_image_do_not_depend_on_its_place_in_the_batch(gpu: GpuKernels, dtype: torch.dtype) -> None:
    """On the size of the batch they may: where it leaves multiprocessors idle, programs share the sum of a tile."""
    x, weight, bias = testing.conv_inputs(testing.Shape("", 3, 24, 20, 9, 11, ""), dtype)
    last, first = (gpu.conv3x3(t, ohwi(weight), bias_affine(bias), True, True) for t in (x, x.roll(1, 0)))
    assert torch.equal(last[2], first[0])


def test_any_memory_format_is_accepted(gpu: GpuKernels) -> None:
    x, weight, bias = testing.conv_inputs(testing.Shape("", 2, 6, 8, 10, 12, ""), integers=True)
    expected = reference.conv3x3(x[:, :, ::2, 1:], weight, bias)
    for view in (x, x.contiguous(memory_format=torch.channels_last)):
        actual = gpu.conv3x3(view[:, :, ::2, 1:], ohwi(weight), bias_affine(bias), False, False)
        assert torch.equal(actual, expected)
        assert torch.equal(gpu.maxpool2x2(view[:, :, ::2, 1:]), reference.maxpool2x2(x[:, :, ::2, 1:]))


def test_an_empty_batch_is_an_empty_result(gpu: GpuKernels) -> None:
    weight, affine = torch.ones(8, 3, 3, 4), torch.ones(2, 8)
    assert gpu.conv3x3(torch.ones(0, 4, 6, 6), weight, affine, False, True).shape == (0, 8, 3, 3)
    assert gpu.maxpool2x2(torch.ones(0, 4, 6, 6)).shape == (0, 4, 3, 3)


INSIDE = """
import sys, torch
from gpu_kernels import between_guard_pages, load
from vgg_fast import reference, testing

gpu = load(sys.argv[1])
for name in ("ragged", "block"):
    x, weight, bias = testing.conv_inputs(testing.shape(name), torch.float16, integers=True)
    affine = torch.stack([torch.ones_like(bias), bias]).float()
    for at_end in (False, True):
        nhwc, ohwi = (t.permute(0, 2, 3, 1) for t in (x, weight))
        nhwc, ohwi, scales = (between_guard_pages(t, at_end=at_end) for t in (nhwc, ohwi, affine))
        for pool in (False, True):
            actual = gpu.conv3x3(nhwc.permute(0, 3, 1, 2), ohwi, scales, False, pool)
            expected = reference.conv3x3(x.float(), weight.float(), bias.float(), pool=pool)
            assert torch.equal(actual, expected.half())
        assert torch.equal(gpu.maxpool2x2(nhwc.permute(0, 3, 1, 2)), reference.maxpool2x2(x))
"""


@pytest.mark.skipif(os.name != "posix", reason="guard pages are made with mprotect")
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_outside_the_tensors_is_read(name: str) -> None:
    load(name)  # skips here, where the reason is printed
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", INSIDE, name], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode} (-11: a read outside a tensor)\n{done.stderr}"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["rgb_odd", "wide", "tall", "ragged", "two"])
def test_maxpool(gpu: GpuKernels, name: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    s = testing.shape(name)
    x = testing.random_tensor(s.n, s.cin, s.h, s.w, dtype=dtype).contiguous(memory_format=memory_format)
    flat = x.view(-1) if x.is_contiguous() else x.permute(0, 2, 3, 1).reshape(-1)
    flat[::7], flat[3::11], flat[5::13] = -0.0, 0.0, float("nan")
    flat[1::17], flat[2::19] = float("inf"), -float("inf")
    actual, expected = gpu.maxpool2x2(x), reference.maxpool2x2(x)
    assert torch.equal(actual.nan_to_num(nan=123.0), expected.nan_to_num(nan=123.0))
    numbers = ~expected.isnan()
    assert torch.equal(actual[numbers].signbit(), expected[numbers].signbit())
    assert actual.stride() == expected.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stack_has_the_bits_of_single_calls(gpu: GpuKernels, dtype: torch.dtype) -> None:
    program = [reference.Step.RELU, reference.Step.RELU | reference.Step.POOL, reference.Step.NONE]
    channels = [3, 20, 24, 17]
    weights = [
        ohwi(testing.random_tensor(cout, cin, 3, 3, seed=i).div(cin**0.5 * 3).to(dtype))
        for i, (cin, cout) in enumerate(itertools.pairwise(channels))
    ]
    affines = [bias_affine(testing.random_tensor(w.shape[0], seed=9)) for w in weights]
    x = testing.random_tensor(2, 3, 13, 10, dtype=dtype)
    y = x
    for weight, affine, step in zip(weights, affines, program, strict=True):
        y = gpu.conv3x3(y, weight, affine, bool(step & reference.Step.RELU), bool(step & reference.Step.POOL))
    assert torch.equal(gpu.conv_stack(x, weights, affines, [int(step) for step in program]), y)
    plain = [w.permute(0, 3, 1, 2).float() for w in weights]
    expected = reference.conv_stack(x.float(), plain, affines, program)
    assert testing.relative_error(y, expected) < 4 * torch.finfo(dtype).eps


X, WEIGHT, AFFINE = torch.ones(1, 4, 6, 6), torch.ones(8, 3, 3, 4), torch.ones(2, 8)


@pytest.mark.parametrize(
    ("x", "weight", "affine", "pool", "message"),
    [
        (X[0], WEIGHT, AFFINE, False, r"expected \[N, Cin, H, W\]"),
        (X, torch.ones(8, 4, 3, 3), AFFINE, False, r"expected contiguous \[Cout, 3, 3, 4\]"),
        (X, WEIGHT.half(), AFFINE, False, "they must be the same"),
        (X, WEIGHT, AFFINE.double(), False, r"expected contiguous \S+ \[2, 8\]"),
        (X, WEIGHT, AFFINE[:, :7].contiguous(), False, r"expected contiguous \S+ \[2, 8\]"),
        (X, WEIGHT, AFFINE.to("meta"), False, "one device|Meta tensors"),
        (X[:, :, :1], WEIGHT, AFFINE, True, "a 1x6 map is smaller than 2x2"),
        (X[:, :, :0], WEIGHT, AFFINE, False, "a 0x6 map is smaller than 1x1"),
        (X[:, :0], WEIGHT[..., :0].contiguous(), AFFINE, False, "0 input and 8 output channels"),
        (X.double(), WEIGHT.double(), AFFINE, False, r"float64|Double"),
    ],
)
def test_bad_input_is_named(
    gpu: GpuKernels, x: Tensor, weight: Tensor, affine: Tensor, pool: bool, message: str
) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        gpu.conv3x3(x, weight, affine, False, pool)


def test_bad_input_of_the_pool_is_named(gpu: GpuKernels) -> None:
    with pytest.raises((ValueError, RuntimeError), match="a 6x1 map is smaller than 2x2"):
        gpu.maxpool2x2(X[..., :1])
    with pytest.raises((ValueError, RuntimeError), match=r"expected \[N, C, H, W\]"):
        gpu.maxpool2x2(X[0])
    with pytest.raises((ValueError, RuntimeError), match=r"float64|Double"):
        gpu.maxpool2x2(X.double())
