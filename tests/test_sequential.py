"""FusedSequential: answers equal to those of the children, bit for bit where sums are exact, however it is used."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import stacks
import torch
from stacks import changed, check_equal, conv, fused_copy, fused_names, image, kernel, norm, run, stack
from torch import nn

from vgg_fast import testing
from vgg_fast.accelerate import accelerate
from vgg_fast.container.sequential import FusedSequential


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(2, 3, 12, 10), (1, 3, 4, 4), (1, 3, 5, 7), (3, 3, 13, 31), (1, 3, 4, 61)])
@pytest.mark.parametrize("inplace", [True, False])
def test_equal_bits_without_batch_norm(dtype, size, inplace):
    # One rounding after convolution and bias in both, then only ReLU and pool, which commute with rounding.
    plain = stack(inplace=inplace).to(dtype)
    if dtype is torch.float16:
        plain = plain[:5]  # the third convolution passes 2048, where fp16 sums of PyTorch itself are not exact
    check_equal(plain, fused_copy(plain), image(*size, dtype=dtype), kernel(dtype))


@pytest.mark.parametrize("size", [(2, 3, 12, 10), (1, 3, 4, 4), (1, 3, 5, 7), (3, 3, 13, 31)])
def test_equal_bits_with_batch_norm(size):
    plain = stack(bn=True)
    segments = check_equal(plain, fused_copy(plain), image(*size), kernel())
    assert [s.names for s in segments] == [tuple(map(str, range(11)))]


@pytest.mark.parametrize("backend", ["cpu", "portable_f32", kernel()])
def test_a_named_kernel_runs(backend):
    plain = stack(bn=True)
    expected = kernel() if backend == "cpu" else backend
    check_equal(plain, fused_copy(plain, backend), image(), expected)


@pytest.mark.parametrize("bn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_random_values_are_no_further_from_float64_than_pytorch(bn, dtype):
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
    layers += nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
    for module in layers.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    layers = (layers if bn else nn.Sequential(*[m for m in layers if not isinstance(m, nn.BatchNorm2d)])).eval()
    layers, x = layers.to(dtype), testing.random_tensor(2, 3, 20, 22, dtype=dtype)
    exact, _ = run(copy.deepcopy(layers).double(), x.double())
    theirs, _ = run(layers, x)
    ours, segments = run(fused_copy(layers), x)
    assert [s.kernel for s in segments] == [kernel(dtype)]
    # fp32 within twice PyTorch's own error. In half precision both round once per layer where there is no batch norm,
    # and which way single values fall differs with the order of summation; with it, PyTorch rounds twice.
    allowed = 2.0 if dtype is torch.float32 else 1.0 if bn else 1.02
    assert testing.relative_error(ours, exact) <= allowed * testing.relative_error(theirs, exact)


def test_one_convolution_lies_within_its_derived_bound():
    layers = nn.Sequential(nn.Conv2d(37, 53, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    x = testing.random_tensor(2, 37, 11, 13)
    actual, segments = run(fused_copy(layers), x)
    assert [s.kernel for s in segments] == [kernel()]
    testing.assert_conv_close(actual, x, layers[0].weight.detach(), layers[0].bias.detach(), relu=True, pool=True)


def test_unusual_batch_norms():
    x = image()
    for bn in (nn.BatchNorm2d(8, momentum=None), nn.BatchNorm2d(8, affine=False), changed(norm(8), bias=None)):
        bn.eps = stacks.EPS
        bn.running_var.fill_(4.0 - stacks.EPS)
        plain = nn.Sequential(conv(3, 8), bn.eval(), nn.ReLU())
        segments = check_equal(plain, fused_copy(plain), x, kernel())
        assert fused_names(segments) == ["0", "1", "2"]
    plain = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU()).eval()
    expected, _ = run(plain, x)
    actual, segments = run(fused_copy(plain), x)
    assert fused_names(segments) == ["0", "1", "2"]  # with the statistics of the batch, which are not exact
    torch.testing.assert_close(actual, expected)


def test_convolutions_without_bias():
    plain = nn.Sequential(conv(3, 8, bias=False), norm(8), nn.ReLU(), conv(8, 8, bias=False))
    check_equal(plain, fused_copy(plain), image(), kernel())


def test_bf16_input_with_fp32_batch_norm():
    plain = stack(bn=True)
    for module in plain:
        if isinstance(module, nn.Conv2d):
            module.bfloat16()
    x = image(dtype=torch.bfloat16)
    exact, _ = run(copy.deepcopy(plain).double(), x.double())
    theirs, _ = run(plain, x)
    ours, segments = run(fused_copy(plain), x)
    assert {s.kernel for s in segments} == {kernel(torch.bfloat16)}
    assert stacks.layout(ours) == stacks.layout(theirs)
    assert testing.relative_error(ours, exact) <= testing.relative_error(theirs, exact)


def test_training_batch_norm_updates_its_statistics():
    plain = stack(bn=True).train()
    fused = fused_copy(plain)
    expected, _ = run(plain, image())
    actual, segments = run(fused, image())
    # Behind the first batch norm no value is an integer any more.
    assert {s.kernel for s in segments} == {kernel()}
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(plain.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert int(fused[1].num_batches_tracked) == 1


# --- containers as people use them ----------------------------------------------------------------------------------


def test_looping_over_the_children():
    plain = stack(bn=True)
    fused = fused_copy(plain)
    x = y = image()
    with torch.no_grad():
        for a, b in zip(plain, fused, strict=True):
            x, y = a(x), b(y)
            assert torch.equal(x, y)


@pytest.mark.parametrize("bn", [False, True])
def test_every_slice(bn):
    plain = stack(bn)
    fused = fused_copy(plain)
    taps = [image()]
    with torch.no_grad():
        for child in stack(bn, inplace=False):
            taps.append(child(taps[-1]))
    for start in range(len(plain)):
        for stop in range(start + 1, len(plain) + 1):
            part = fused[start:stop]
            assert type(part) is FusedSequential
            assert list(part._modules) == list(plain[start:stop]._modules)
            segments = check_equal(plain[start:stop], part, taps[start].clone())
            convolutions = [n for n in part._modules if isinstance(plain[int(n)], nn.Conv2d)]
            assert [n for n in fused_names(segments) if n in convolutions] == convolutions


def test_slices_keep_the_backend():
    fused = fused_copy(stack(), "portable_f32")
    check_equal(stack()[:3], fused[:3], image(), "portable_f32")


def test_an_in_place_relu_first_writes_into_the_callers_tensor():
    plain = nn.Sequential(nn.ReLU(inplace=True), conv(3, 8), nn.ReLU(inplace=True))
    x, y = image(), image()
    expected, _ = run(plain, x)
    actual, segments = run(fused_copy(plain), y)
    assert torch.equal(actual, expected)
    assert torch.equal(x, y)
    assert not torch.equal(y, image())
    assert fused_names(segments) == ["1", "2"]


def test_text_detection_slices_end_on_bn_and_begin_with_an_in_place_relu():
    plain = stack(bn=True)
    fused = fused_copy(plain)
    with torch.no_grad():
        expected = plain[:2](image())
        actual = fused[:2](image())
        assert torch.equal(actual, expected)
        plain[2:](expected)
        fused[2:](actual)
    assert torch.equal(actual, expected)  # both were written into by the ReLU of the second slice
    assert (actual >= 0).all()


def test_in_place_relu_does_not_touch_the_input():
    fused, x = fused_copy(stack()), image()
    run(fused, x)
    assert torch.equal(x, image())


def test_shared_modules():
    relu, pool, same = nn.ReLU(inplace=True), nn.MaxPool2d(2), conv(8, 8)
    plain = nn.Sequential(conv(3, 8), relu, same, relu, pool, same, relu, pool)
    segments = check_equal(plain, fused_copy(plain), image(), kernel())
    assert len(segments) == 1


def test_two_containers_share_a_convolution():
    shared = conv(3, 8)
    first, second = nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared, nn.MaxPool2d(2))
    model = accelerate(nn.ModuleList([first, second]))
    for part in model:
        check_equal(nn.Sequential(*part), part, image(), kernel())
    shared.weight.data.mul_(2.0)
    for part in model:
        check_equal(nn.Sequential(*part), part, image(), kernel())


def test_nested_containers_and_names():
    plain = nn.Sequential(
        OrderedDict(
            block=nn.Sequential(OrderedDict(conv=conv(3, 8), act=nn.ReLU())), head=nn.Sequential(conv(8, 8), nn.Tanh())
        )
    )
    segments = check_equal(plain, fused_copy(plain), image(), kernel())
    assert fused_names(segments) == ["conv", "act", "0"]


def test_a_plain_child_splits_the_chain():
    plain = nn.Sequential(conv(3, 8), nn.ReLU(), nn.AvgPool2d(2), conv(8, 8), nn.ReLU())
    segments = check_equal(plain, fused_copy(plain), image(), kernel())
    assert [s.names for s in segments] == [("0", "1"), ("2",), ("3", "4")]
