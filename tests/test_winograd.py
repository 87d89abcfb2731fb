"""The Winograd kernels: accuracy against PyTorch's, infinities and large values, every way of cutting up a map."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vgg_fast import reference, selection, testing
from vgg_fast.accelerate import accelerate
from vgg_fast.models import vgg16_bn

conv3x3 = torch.ops.vgg_fast.conv3x3
CHANNELS_LAST = torch.channels_last


@pytest.fixture(params=[k for k in selection.cpu_kernels() if "winograd" in k])
def kernel(request):
    """Every Winograd kernel that this machine can run."""
    try:
        return selection.choose(torch.float32, torch.device("cpu"), request.param)
    except RuntimeError as error:
        pytest.skip(str(error))


def layer(cin: int, cout: int, h: int, w: int, n: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """``(x, weight, bias)`` as within a network: what comes out of a ReLU, weights of He's scale."""
    shape = testing.Shape("layer", n, cin, cout, h, w, "")
    x, weight, bias = testing.conv_inputs(shape)
    return F.relu(x), weight, bias


def test_the_formula_is_the_convolution():
    """The matrices that the bound is derived from compute a convolution, in float64."""
    x, weight, _ = testing.conv_inputs(testing.shape("ragged"))
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    torch.testing.assert_close(testing.winograd(x, weight), expected, rtol=1e-12, atol=1e-12)


# What the plan (csrc/cpu/winograd.h) does with a layer depends on its size; each of these takes another road.
ROADS = {
    "one row of tiles": (64, 32, 4, 16),
    "weights shared, one chunk per tile row": (48, 32, 20, 224),
    "weights shared, rows cut across": (48, 16, 8, 900),
    "inputs shared, one pass over the channels": (64, 160, 12, 12),
    "inputs shared, several passes": (144, 256, 12, 13),
    "inputs shared, several units per group": (208, 192, 60, 61),
    "inputs shared, two bands": (256, 144, 84, 100),
    "no whole tiles": (48, 33, 9, 11),
    "the last word of the last block": (129, 48, 8, 8),
}


@pytest.mark.parametrize("road", ROADS)
def test_every_road_lies_within_the_derived_bound(kernel, road):
    cin, cout, h, w = ROADS[road]
    assert not testing.is_direct(kernel, cin, h, w)
    x, weight, bias = layer(cin, cout, h, w)
    for pool in (False, True):
        y = conv3x3(x, weight, bias, True, pool, kernel)
        testing.assert_conv_close(y, x, weight, bias, relu=True, pool=pool, kernel=kernel)


@pytest.mark.parametrize(("cin", "size"), [(48, 56), (64, 56), (128, 56), (256, 28), (512, 14)])
def test_a_layers_error_is_at_most_twice_pytorchs(kernel, cin, size):
    """DESIGN's `highest`, by layer: against PyTorch in channels_last, the format that it is fast in."""
    x, weight, _ = layer(cin, 64, size, size)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    ours = conv3x3(x, weight, None, False, False, kernel)
    theirs = F.conv2d(x.to(memory_format=CHANNELS_LAST), weight.to(memory_format=CHANNELS_LAST), padding=1)
    assert testing.relative_error(ours, exact) <= 2 * testing.relative_error(theirs, exact)


def test_the_features_error_is_at_most_twice_pytorchs(kernel):
    """The same for all of VGG16-BN's features, and against the more accurate of PyTorch's two memory formats."""
    torch.manual_seed(0)
    features = vgg16_bn().features.eval()
    x = testing.random_tensor(1, 3, 112, 112)  # 7x7 in the end: all but the first layer are Winograd's
    with torch.inference_mode():
        exact = copy.deepcopy(features).double()(x.double())
        plain = torch.nn.Sequential(*copy.deepcopy(features).children())
        theirs = [plain(x), plain.to(memory_format=CHANNELS_LAST)(x.to(memory_format=CHANNELS_LAST))]
        ours = accelerate(features, kernel)(x)
    assert testing.relative_error(ours, exact) <= 2 * min(testing.relative_error(y, exact) for y in theirs)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e30, -3e38])
@pytest.mark.parametrize("where", [(0, 0), (3, 4), (39, 55), (17, 31)])
def test_large_inputs_reach_nine_pixels_and_no_more(kernel, value, where):
    """In a tile's 36 products an infinity would turn all 16 outputs into NaN; a large value would drown the others."""
    x, weight, bias = layer(48, 40, 40, 56)
    clean = conv3x3(x, weight, bias, False, False, kernel)
    x[0, 7, where[0], where[1]] = value
    y = conv3x3(x, weight, bias, False, False, kernel)
    touched = torch.zeros(40, 56, dtype=torch.bool)
    touched[max(0, where[0] - 1) : where[0] + 2, max(0, where[1] - 1) : where[1] + 2] = True
    expected = reference.conv3x3(x.double(), weight.double(), bias.double(), False, False)
    if abs(value) < float("inf"):
        testing.assert_conv_close(y, x, weight, bias)  # the direct kernel's bound
    else:
        assert torch.equal(y.isfinite(), expected.isfinite())
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y[y.isinf()].double(), expected[expected.isinf()])
    bound = 2 * testing.conv_bound(x.nan_to_num(0, 0, 0).clamp(-9, 9), weight, kernel=kernel).float()
    assert ((y - clean).abs() <= bound)[..., ~touched].all()


@pytest.mark.parametrize(("cin", "cout", "size"), [(48, 80, 24), (144, 256, 12)])  # weights shared; inputs shared
def test_large_weights(kernel, cin, cout, size):
    x, weight, bias = layer(cin, cout, size, size)
    weight[33, cin - 3, 1, 2] = float("inf")
    weight[5, 1, 0, 0] = 3e38
    weight[70, 2, 2, 2] = float("nan")
    expected = reference.conv3x3(x.double(), weight.double(), bias.double(), False, False)
    y = conv3x3(x, weight, bias, False, False, kernel)
    assert torch.equal(y.isnan(), expected.isnan())
    inside = expected.isfinite() & (expected.abs() < 3e38)
    assert torch.equal(y.isfinite(), inside | (y.isfinite() & expected.isfinite()))
    untouched = [c for c in range(cout) if c not in (5, 33, 70)]
    bound = testing.conv_bound(x, weight[untouched], torch.stack([torch.ones(cout), bias])[:, untouched], kernel=kernel)
    testing.assert_within(y[:, untouched], expected[:, untouched], bound)


def test_a_large_value_changes_bits_of_no_other_image(kernel):
    x, weight, bias = layer(64, 64, 28, 28, n=3)
    clean = conv3x3(x, weight, bias, True, True, kernel)
    x[1, 3, 5, 5] = float("inf")
    y = conv3x3(x, weight, bias, True, True, kernel)
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


def test_small_values_keep_their_relative_accuracy(kernel):
    """Products near the smallest normal number, but not below it, where they are flushed: nothing is lost."""
    x, weight, _ = layer(64, 32, 12, 12)
    y = conv3x3(x * 1e-17, weight * 1e-17, None, False, False, kernel)
    testing.assert_conv_close(y, x * 1e-17, weight * 1e-17, kernel=kernel)
    assert (y != 0).float().mean() > 0.99


@pytest.mark.parametrize(("cin", "cout", "size"), [(64, 64, 56), (512, 64, 28), (272, 320, 14)])
def test_same_bits_for_any_batch_and_thread_count(kernel, cin, cout, size):
    x, weight, bias = layer(cin, cout, size, size, n=3)
    torch.set_num_threads(1)
    alone = torch.cat([conv3x3(image[None], weight, bias, True, True, kernel) for image in x])
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(conv3x3(x, weight, bias, True, True, kernel), alone), threads


def test_packed_weights_are_those_of_the_direct_kernel(kernel):
    """Hence no larger than the originals: transformed weights, four times their size, live for one call only."""
    weight = testing.random_tensor(96, 64, 3, 3)
    arguments = (weight, None, None, None, None, None, 0.0)
    packed, _ = torch.ops.vgg_fast.pack(*arguments, kernel)
    plain, _ = torch.ops.vgg_fast.pack(*arguments, kernel.replace("winograd_", ""))
    assert torch.equal(packed, plain)
    assert packed.numel() == weight.numel()


@pytest.mark.parametrize(("size", "winograd"), [((4, 4), False), ((6, 6), False), ((7, 7), True), ((2, 16), False)])
def test_tiny_maps_are_left_to_the_direct_kernel(kernel, size, winograd):
    x, weight, bias = testing.conv_inputs(testing.Shape("tiny", 1, 64, 64, *size, ""), integers=True)
    y = conv3x3(x, weight, bias, False, False, kernel)
    assert torch.equal(y, reference.conv3x3(x, weight, bias, False, False)) != winograd
    assert testing.is_direct(kernel, 64, *size) != winograd


def test_thin_layers_are_left_to_the_direct_kernel(kernel):
    """Up to 47 input channels PyTorch's error is too small for twice of it to cover Winograd's."""
    for cin, winograd in ((3, False), (47, False), (48, True)):
        x, weight, bias = testing.conv_inputs(testing.Shape("thin", 1, cin, 32, 16, 16, ""), integers=True)
        y = conv3x3(x, weight, bias, False, False, kernel)
        assert torch.equal(y, reference.conv3x3(x, weight, bias, False, False)) != winograd
        assert testing.is_direct(kernel, cin, 16, 16) != winograd
