"""conv3x3, every CPU micro-kernel by name: exact on integers, within derived bounds on random values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vgg_fast import library, reference, selection, testing
from vgg_fast.ops._layout import suggests_channels_last

KERNELS = selection.cpu_kernels()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPILOGUES = ((False, False), (True, False), (False, True), (True, True))
conv3x3 = torch.ops.vgg_fast.conv3x3


def test_the_compiled_library_is_there():
    assert library.missing("_C") is None
    assert KERNELS[-1] == "portable_f32"


def runnable(kernel: str, dtype: torch.dtype) -> str:
    """The kernel, or a skip that says what this machine lacks."""
    try:
        return selection.select(selection.problem_on(dtype, torch.device("cpu")), kernel)
    except RuntimeError as error:
        if "needs the CPU flags" in str(error):
            pytest.skip(str(error))
        raise


CASES = [(k, d) for k in KERNELS for d in DTYPES if not (d is torch.float16 and k.endswith("bf16"))]


@pytest.mark.parametrize(("kernel", "dtype"), CASES)
@pytest.mark.parametrize("shape", testing.SHAPES, ids=lambda s: s.name)
def test_integers_bit_for_bit(kernel, dtype, shape):
    assert runnable(kernel, dtype) == kernel
    x, weight, bias = testing.conv_inputs(shape, dtype, integers=True)
    for relu, pool in EPILOGUES:
        if pool and min(shape.h, shape.w) < 2:
            continue
        expected = reference.conv3x3(x.double(), weight.double(), bias.double(), relu, pool).to(dtype)
        assert torch.equal(conv3x3(x, weight, bias, relu, pool, kernel), expected), (relu, pool)


@pytest.mark.parametrize(("kernel", "dtype"), CASES)
@pytest.mark.parametrize("shape", testing.SHAPES, ids=lambda s: s.name)
def test_random_values_within_the_derived_bound(kernel, dtype, shape):
    runnable(kernel, dtype)
    x, weight, bias = testing.conv_inputs(shape, dtype)
    pool = min(shape.h, shape.w) >= 2
    error = testing.product_error(kernel, dtype)
    testing.assert_conv_close(conv3x3(x, weight, None, False, False, kernel), x, weight, product_error=error)
    y = conv3x3(x, weight, bias, True, pool, kernel)
    testing.assert_conv_close(y, x, weight, bias, relu=True, pool=pool, product_error=error)


def test_the_checker_sees_one_wrong_corner():
    x, weight, bias = testing.conv_inputs(testing.shape("block"))
    y = conv3x3(x, weight, bias)
    testing.assert_conv_close(y, x, weight, bias)
    y[0, 0, -1, -1] = 0.0
    with pytest.raises(AssertionError, match=r"1 of .* elements are off, 1 of them on the border"):
        testing.assert_conv_close(y, x, weight, bias)


@pytest.mark.parametrize("kernel", KERNELS)
def test_same_bits_for_any_batch_thread_count_and_position(kernel):
    dtype = torch.bfloat16 if kernel.endswith("bf16") else torch.float32
    runnable(kernel, dtype)
    x = testing.random_tensor(5, 48, 21, 19, dtype=dtype)
    weight = testing.random_tensor(70, 48, 3, 3, seed=1, dtype=dtype)
    torch.set_num_threads(1)
    alone = torch.cat([conv3x3(image[None], weight, None, True, True, kernel) for image in x])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(conv3x3(x, weight, None, True, True, kernel), alone), threads


@pytest.mark.parametrize("kernel", KERNELS)
def test_special_values(kernel):
    dtype = torch.bfloat16 if kernel.endswith("bf16") else torch.float32
    runnable(kernel, dtype)
    x, weight, bias = testing.conv_inputs(testing.shape("ragged"), dtype, integers=True)
    x[0, 0, 0, 0], x[0, 1, 5, 5], x[1, 2, 12, 10], x[2, 3, 7, 7] = (float(v) for v in ("inf", "-inf", "nan", "inf"))
    weight[3, 4, 1, 1] = float("inf")  # times the zero padding of no tap, but times zeros of x: NaN
    weight[5, 6, 0, 0] = float("inf")  # times zero padding: NaN in the first row and column
    for relu, pool in EPILOGUES:
        expected = reference.conv3x3(x.double(), weight.double(), bias.double(), relu, pool).to(dtype)
        y = conv3x3(x, weight, bias, relu, pool, kernel)
        assert torch.equal(y.isnan(), expected.isnan()), (relu, pool)
        assert torch.equal(y.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0)), (relu, pool)


@pytest.mark.parametrize("kernel", KERNELS)
def test_infinities_do_not_leak_through_padded_channels(kernel):
    """33 -> 17 channels leave lanes that do not exist; an infinity times their zero weights must not come back."""
    dtype = torch.bfloat16 if kernel.endswith("bf16") else torch.float32
    runnable(kernel, dtype)
    x = testing.integer_tensor(1, 33, 6, 6, limit=4, dtype=dtype)
    x[0, 0, 2, 2] = float("inf")
    first = torch.full((17, 33, 3, 3), -1.0, dtype=dtype)
    second = testing.integer_tensor(20, 17, 3, 3, limit=2, dtype=dtype)
    packs = [torch.ops.vgg_fast.pack(w, None, None, None, None, None, 0.0, kernel) for w in (first, second)]
    y = torch.ops.vgg_fast.conv_stack(x, [p[0] for p in packs], [p[1] for p in packs], [1, 0], kernel, False)
    expected = F.conv2d(F.relu(F.conv2d(x.double(), first.double(), padding=1)), second.double(), padding=1)
    assert torch.isfinite(expected).all()
    assert torch.equal(y, expected.to(dtype))


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.startswith("amx_bf16x")])
def test_sums_of_bf16_values_hold_what_fp32_holds(kernel):
    """Values next to the largest float, which round up to infinity in bf16; infinities times weights of either sign."""
    runnable(kernel, torch.float32)
    x = torch.zeros(1, 2, 6, 6)
    x[0, 0, 1, 1] = torch.finfo(torch.float32).max
    x[0, 1, 4, 4] = float("inf")
    x[0, 1, 0, 5] = float("-inf")
    weight = torch.zeros(16, 2, 3, 3)
    weight[:, 0, 1, 1] = 0.5 + 2.0**-20  # its second and third parts have the other sign, or are zero
    weight[:8, 1] = 1.0 - 2.0**-12
    weight[8:, 1] = -1.0 - 2.0**-12
    y = conv3x3(x, weight, None, False, False, kernel)
    expected = reference.conv3x3(x, weight)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    finite = expected.isfinite()
    torch.testing.assert_close(y[finite], expected[finite], rtol=2 * testing.product_error(kernel, x.dtype), atol=0.0)


@pytest.mark.parametrize(("kernel", "rung"), [("amx_bf16x6", 2.0), ("amx_bf16x3", None)])
def test_error_on_the_precision_ladder(kernel, rung):
    """highest: at most twice PyTorch's own fp32 error against float64; high: at most 3e-5, in norm."""
    runnable(kernel, torch.float32)
    x, weight, _ = testing.conv_inputs(testing.Shape("conv5", 1, 512, 64, 14, 14, "the longest sums of a VGG"))
    exact = reference.conv3x3(x.double(), weight.double())
    ours = testing.relative_error(conv3x3(x, weight, None, False, False, kernel), exact)
    last = torch.channels_last
    pytorch = reference.conv3x3(x.contiguous(memory_format=last), weight.contiguous(memory_format=last))
    assert ours <= (3e-5 if rung is None else rung * testing.relative_error(pytorch, exact))


def test_negative_zero_survives_relu():
    x = torch.zeros(1, 1, 2, 2)
    y = conv3x3(x, torch.ones(16, 1, 3, 3), torch.full((16,), -0.0), True)
    expected = reference.conv3x3(x, torch.ones(16, 1, 3, 3), torch.full((16,), -0.0), True)
    assert torch.equal(torch.signbit(y), torch.signbit(expected))


LAYOUTS = {
    "nchw": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: F.pad(x, (3, 2, 1, 4))[:, :, 1 : 1 + x.shape[2], 3 : 3 + x.shape[3]],
    "every_other": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "channels_last_sliced": lambda x: F.pad(x, (2, 2)).contiguous(memory_format=torch.channels_last)[..., 2:-2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:, :1].expand_as(x),
    "flipped_batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_last", [False, True], ids=["weight_oihw", "weight_channels_last"])
def test_any_strides_in_and_pytorchs_memory_format_out(layout, weight_last):
    x, weight, bias = testing.conv_inputs(testing.shape("ragged"), integers=True)
    x = LAYOUTS[layout](x)
    if weight_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    for pool in (False, True):
        expected = reference.conv3x3(x, weight, bias, True, pool)
        y = conv3x3(x, weight, bias, True, pool)
        assert torch.equal(y, expected)
        assert y.stride() == expected.stride()
        assert suggests_channels_last(y) == suggests_channels_last(expected)


def test_no_images():
    y = conv3x3(torch.empty(0, 3, 8, 8), torch.ones(16, 3, 3, 3), None, True, True)
    assert y.shape == (0, 16, 4, 4)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        ((3, 8, 8), (4, 3, 3, 3), "got 3 dimensions"),
        ((1, 3, 8, 8), (4, 2, 3, 3), r"must be \[Cout, 3, 3, 3\]"),
        ((1, 3, 8, 8), (4, 3, 5, 5), "another kernel size"),
        ((1, 3, 0, 8), (4, 3, 3, 3), "no pixels"),
    ],
)
def test_bad_shapes_are_named(x, weight, message):
    with pytest.raises(RuntimeError, match=message):
        conv3x3(torch.ones(x), torch.ones(weight))


def test_bad_dtypes_and_kernels_are_named():
    x, weight = torch.ones(1, 3, 8, 8), torch.ones(4, 3, 3, 3)
    with pytest.raises(RuntimeError, match="same dtype"):
        conv3x3(x, weight.bfloat16())
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        conv3x3(x.double(), weight.double())
    with pytest.raises(RuntimeError, match=r"there is no CPU kernel 'sse9'.*portable_f32"):
        conv3x3(x, weight, None, False, False, "sse9")
    with pytest.raises(RuntimeError, match="single bf16 values, which cannot hold fp16 tensors; convert them to bf16"):
        conv3x3(x.half(), weight.half(), None, False, False, "amx_bf16")
    with pytest.raises(RuntimeError, match=r"1x8 map cannot be pooled.*Output size is too small"):
        conv3x3(torch.ones(1, 3, 1, 8), weight, None, False, True)


# Derivatives, in the dtypes the kernels have: against PyTorch's own on float64 the values, by formula the gradients.


@pytest.mark.parametrize(("relu", "pool"), EPILOGUES)
def test_gradients_equal_pytorchs(relu, pool):
    inputs = testing.conv_inputs(testing.shape("ragged"), integers=True)
    ours = [t.clone().requires_grad_() for t in inputs]
    theirs = [t.clone().requires_grad_() for t in inputs]
    y, expected = conv3x3(*ours, relu, pool), reference.conv3x3(*theirs, relu, pool)
    grad = testing.integer_tensor(*y.shape, limit=3, seed=9)
    got = torch.autograd.grad(y, ours, grad)
    for mine, reference_grad in zip(got, torch.autograd.grad(expected, theirs, grad), strict=True):
        assert torch.equal(mine, reference_grad)


@pytest.mark.parametrize(("relu", "pool"), EPILOGUES)
def test_second_derivatives(relu, pool):
    """Gradient penalty: d|dy/dx|^2/dw, as WGAN-GP has it."""
    inputs = testing.conv_inputs(testing.shape("two"), integers=True)

    def penalty(function):
        x, weight, bias = (t.clone().requires_grad_() for t in inputs)
        (slope,) = torch.autograd.grad((function(x, weight, bias, relu, pool) ** 2).sum(), x, create_graph=True)
        return torch.autograd.grad((slope**2).sum(), [x, weight])

    for mine, expected in zip(penalty(conv3x3), penalty(reference.conv3x3), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=0.0)


def test_frozen_weights_get_no_gradient():
    x, weight, bias = testing.conv_inputs(testing.shape("two"))
    x.requires_grad_()
    conv3x3(x, weight, bias, True, True).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_autocast_casts_like_conv2d():
    x, weight, bias = testing.conv_inputs(testing.shape("block"))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            y, expected = conv3x3(x, weight, bias, True), reference.conv3x3(x, weight, bias, True)
        assert y.dtype == expected.dtype == dtype
        testing.assert_conv_close(y, x.to(dtype), weight.to(dtype), bias.to(dtype), relu=True)
