"""Odd inputs of a FusedSequential: PyTorch's own errors, special values, and its memory format to the last stride."""

from __future__ import annotations

import itertools
import math

import pytest
import stacks
import torch
from stacks import check_equal, check_plain, conv, error_of, fused_copy, image, kernel, layout, norm, run, stack
from torch import nn

from vgg_fast.container.sequential import FusedSequential

# --- empty, tiny, wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bn", [False, True])
def test_an_empty_batch_works(bn):
    plain = stack(bn)
    check_plain(plain, fused_copy(plain), torch.zeros(0, 3, 12, 10), "the input is empty")


@pytest.mark.parametrize("bn", [False, True])
def test_three_dimensions_are_legal_without_batch_norm_only(bn):
    plain = stack(bn)
    if bn:
        error = error_of(plain, torch.zeros(3, 12, 10))
        assert error[0] is ValueError
        assert error_of(fused_copy(plain), torch.zeros(3, 12, 10)) == error
    else:
        check_plain(plain, fused_copy(plain), image(3, 12, 10), "the input has 3 dimensions")


WRONG = {
    "zero height": torch.zeros(1, 3, 0, 10),
    "zero width": torch.zeros(1, 3, 12, 0),
    "1x1 into the pool": torch.zeros(1, 3, 1, 1),
    "one row into the pool": torch.zeros(1, 3, 1, 12),
    "too small for the second pool": torch.zeros(1, 3, 3, 12),
    "channels": torch.zeros(1, 4, 12, 10),
    "five dimensions": torch.zeros(1, 3, 2, 12, 10),
    "two dimensions": torch.zeros(12, 10),
    "no dimensions": torch.zeros(()),
    "float64": torch.zeros(1, 3, 12, 10, dtype=torch.float64),
    "bf16 with fp32 weights": torch.zeros(1, 3, 12, 10, dtype=torch.bfloat16),
    "integers": torch.zeros(1, 3, 12, 10, dtype=torch.int64),
    "complex": torch.zeros(1, 3, 12, 10, dtype=torch.complex64),
    "sparse": torch.zeros(1, 3, 12, 10).to_sparse(),
    "not a tensor": "a string",
    "None": None,
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("bn", [False, True])
def test_wrong_input_raises_the_error_of_the_children(name, bn):
    plain = stack(bn)
    fused = fused_copy(plain)
    run(fused, image())  # with weights packed as well as without
    for model in (fused, fused_copy(plain)):
        assert error_of(model, WRONG[name]) == error_of(plain, WRONG[name])


@pytest.mark.parametrize("size", [(1, 3, 1, 1), (2, 3, 1, 7), (2, 3, 7, 1), (1, 3, 2, 2), (5, 3, 1, 2), (1, 3, 3, 3)])
@pytest.mark.parametrize("bn", [False, True])
def test_tiny_sizes(size, bn):
    plain = stack(bn)[: 5 if bn else 4]  # up to the first pool
    check_equal(plain, fused_copy(plain), image(*size), kernel())
    if min(size[2:]) >= 2:
        plain = stack(bn)[: 7 if bn else 5]
        check_equal(plain, fused_copy(plain), image(*size), kernel())


def mismatched_batch_norm() -> nn.Sequential:
    return nn.Sequential(conv(3, 8), norm(16), nn.ReLU())


def mismatched_channels() -> nn.Sequential:
    return nn.Sequential(conv(3, 8), conv(16, 8))


def half_batch_norm() -> nn.Sequential:
    return nn.Sequential(conv(3, 8), norm(8).bfloat16())


def float64_bias() -> nn.Sequential:
    model = nn.Sequential(conv(3, 8))
    model[0].bias.data = model[0].bias.data.double()
    return model


def child_of_none() -> nn.Sequential:
    model = nn.Sequential(conv(3, 8), nn.ReLU())
    model._modules["1"] = None
    return model


def weight_of_none() -> nn.Sequential:
    model = nn.Sequential(conv(3, 8), nn.ReLU())
    model[0].weight = None
    return model


def missing_attribute() -> nn.Sequential:
    model = nn.Sequential(conv(3, 8), nn.ReLU())
    del model[0].stride
    return model


BROKEN = [
    mismatched_batch_norm,
    mismatched_channels,
    half_batch_norm,
    float64_bias,
    child_of_none,
    weight_of_none,
    missing_attribute,
]


@pytest.mark.parametrize("build", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_model_raises_the_error_of_the_children(build):
    fused = stacks.accelerate(build())
    for _ in range(2):
        assert error_of(fused, image()) == error_of(build(), image())


def test_a_model_that_breaks_after_it_ran():
    plain = stack(bn=True)
    fused = fused_copy(plain)
    run(fused, image())
    for model in (plain, fused):
        model[4].running_var = None
    assert error_of(fused, image()) == error_of(plain, image())


def test_a_named_backend_raises_instead_of_falling_back():
    fused = fused_copy(stack().double(), kernel())
    kind, message = error_of(fused, image(dtype=torch.float64))
    assert kind is RuntimeError
    assert kernel() in message
    assert "float64" in message


def test_a_model_without_memory():
    plain = stack(bn=True).to("meta")
    fused, x = fused_copy(plain), image().to("meta")
    expected, _ = run(plain, x)
    actual, segments = run(fused, x)
    assert layout(actual) == layout(expected)
    assert "it runs on cpu, not meta" in segments[0].reason


def test_an_empty_container():
    x = image()
    assert FusedSequential()(x) is x


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", [(0, 0, 0, 0), (1, 2, 11, 9), (0, 1, 5, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inf_and_nan_in_the_input(value, where, dtype):
    plain, x = stack(bn=dtype is torch.float32).to(dtype), image(dtype=dtype)
    x[where] = value
    check_equal(plain, fused_copy(plain), x, kernel(dtype))


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"])
def test_inf_and_nan_in_the_parameters(value, name):
    plain = stack(bn=True)
    plain.state_dict()[name].view(-1)[3] = value
    check_equal(plain, fused_copy(plain), image(), kernel())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("bn", [False, True])
def test_the_sign_of_zero(bn, relu, pool):
    plain = nn.Sequential(conv(3, 16), *[norm(16)] * bn, *[nn.ReLU()] * relu, *[nn.MaxPool2d(2)] * pool)
    plain[0].bias.data.zero_()
    plain[0].bias.data[::2] = -0.0
    for x in (torch.zeros(2, 3, 4, 4), -torch.zeros(2, 3, 4, 4), image(2, 3, 4, 4)):
        expected, _ = run(plain, x)
        actual, segments = run(fused_copy(plain), x)
        assert [s.kernel for s in segments] == [kernel()]
        assert torch.equal(actual, expected)
        assert torch.equal(actual.signbit(), expected.signbit())


def test_lazily_negated_and_lazily_zero_tensors():
    # PyTorch keeps the sign of such a tensor in a bit; its memory holds the opposite values.
    x = torch.imag(torch.complex(image(), image()).conj())
    assert x.is_neg()
    plain = stack()
    fused = fused_copy(plain)
    for value in (x, torch._efficientzerotensor((2, 3, 12, 10))):
        check_equal(plain, fused, value, kernel())
    weight = plain[0].weight.detach()
    for model in (plain, fused):
        model[0].weight = nn.Parameter(torch.imag(torch.complex(weight, weight).conj()))
    check_equal(plain, fused, image(), kernel())


# --- memory format --------------------------------------------------------------------------------------------------


def layouts(n: int, c: int, h: int, w: int) -> dict[str, torch.Tensor]:
    """The same values in every memory layout that a caller can make of them."""
    x, last = image(n, c, h, w), torch.channels_last
    wide = image(n, c + 2, h + 2, w + 2)
    return {
        "contiguous": x,
        "channels_last": torch.empty(n, c, h, w).to(memory_format=last).copy_(x),
        "contiguous(channels_last)": x.contiguous(memory_format=last),
        "sliced channels": wide[:, 1 : c + 1, :h, :w],
        "sliced width": wide[:, :c, :h, 1 : w + 1],
        "every other image": image(2 * n, c, h, w)[::2],
        "every other pixel": image(n, c, 2 * h, 2 * w)[:, :, ::2, ::2],
        "sliced channels_last": wide.contiguous(memory_format=last)[:, 1 : c + 1, :h, 1 : w + 1],
        "expanded batch": image(1, c, h, w).expand(n, c, h, w),
        "expanded channels": image(n, 1, h, w).expand(n, c, h, w),
        "expanded pixels": image(n, c, 1, 1).expand(n, c, h, w),
        "transposed": image(n, c, w, h).transpose(2, 3),
        "permuted from NHWC": image(n, h, w, c).permute(0, 3, 1, 2),
        "permuted from CNHW": image(c, n, h, w).transpose(0, 1),
        "reversed dimensions": image(w, h, c, n).permute(3, 2, 1, 0),
    }


SIZES = [(1, 1, 1), (2, 1, 1), (2, 1, 4), (1, 2, 2), (2, 4, 4), (2, 5, 6)]
TAILS = {
    "conv": lambda i: [],
    "relu": lambda i: [nn.ReLU(inplace=False)],
    "relu_": lambda i: [nn.ReLU(inplace=True)],
    "bn": lambda i: [norm(i)],
    "bn relu_ pool": lambda i: [norm(i), nn.ReLU(inplace=True), nn.MaxPool2d(2)],
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("channels", [(1, 8, 8), (3, 1, 8), (3, 8, 1), (1, 1, 1)])
@pytest.mark.parametrize("weights_last", [(False, False), (True, False)])
def test_the_strides_are_those_of_the_children(tail, channels, weights_last):
    torch.set_num_threads(1)  # maps of a few pixels: two threads would mostly wait for each other
    c0, c1, c2 = channels
    plain = nn.Sequential(conv(c0, c1), *TAILS[tail](c1), conv(c1, c2), *TAILS[tail](c2)).eval()
    for module, last in zip([m for m in plain if isinstance(m, nn.Conv2d)], weights_last, strict=True):
        if last:
            module.to(memory_format=torch.channels_last)
    fused = fused_copy(plain)
    ran = 0
    pools = 4 if "pool" in tail else 1
    for n, h, w in SIZES:
        if min(h, w) < pools:
            continue
        for name, x in layouts(n, c0, h, w).items():
            expected, _ = run(plain, x)
            actual, segments = run(fused, x)
            assert layout(actual) == layout(expected), (n, h, w, name, x.stride())
            assert torch.equal(actual, expected), (n, h, w, name)
            ran += segments[0].kernel == kernel()
            assert segments[0].kernel == kernel() or c0 == h == w == 1
    assert ran >= len(layouts(1, 1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_model_in_channels_last(dtype):
    plain, x = stack().to(dtype), image(dtype=dtype)
    last = torch.channels_last
    for weights, pixels in itertools.product((torch.contiguous_format, last), repeat=2):
        model = plain.to(memory_format=weights)
        y = x.contiguous(memory_format=pixels)
        check_equal(model, fused_copy(model), y, kernel(dtype))
        out, _ = run(fused_copy(model), y)
        assert out.is_contiguous(memory_format=last) == (last in (weights, pixels))


def test_the_result_is_its_own_memory():
    fused, x = fused_copy(stack()), image()
    first, _ = run(fused, x)
    kept = first.clone()
    run(fused, -x)
    assert torch.equal(first, kept)
    assert first._base is None
