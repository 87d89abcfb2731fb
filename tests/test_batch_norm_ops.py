"""``bn_relu_pool``, its gradient and the sums for it: every instruction set, exact on integers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vgg_fast import testing
from vgg_fast.ops import batch_norm

ops = torch.ops.vgg_fast
LEVELS = ["portable", "avx2", "avx512"]
# Channels past a vector, odd sizes with a pool, one row, and enough pixels for several units.
SIZES = [(2, 37, 7, 9), (3, 16, 1, 5), (1, 128, 33, 30)]


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    if request.param != "portable" and request.param not in ops.cpu_flags():
        pytest.skip(f"this CPU lacks {request.param}")
    monkeypatch.setenv("VGG_FAST_ISA", request.param)
    assert ops.cpu_passes() == request.param
    return request.param


def last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relu", [False, True])
def test_integers_bit_for_bit(dtype, relu):
    for size in SIZES:
        channels = size[1]
        z = last(testing.integer_tensor(*size, limit=4, dtype=dtype))  # many ties
        affine = torch.stack([testing.integer_tensor(channels, limit=2) / 2, testing.integer_tensor(channels, limit=3)])
        factor = testing.integer_tensor(1, channels, limit=3, seed=1)
        centre = testing.integer_tensor(3, channels, limit=2, seed=2)
        for pool in (False, True) if min(size[2:]) > 1 else (False,):
            y = ops.bn_relu_pool(z, affine, relu, pool)
            assert torch.equal(y, batch_norm._value(z, affine, relu, pool))
            dy = last(testing.integer_tensor(*y.shape, limit=4, seed=3, dtype=dtype))
            for each in (None, centre):
                args = dy, z, affine, factor, each, relu, pool
                assert torch.equal(ops.bn_relu_pool_backward(*args), batch_norm._gradient(*args))
            args = dy, z, affine, centre[:1], relu, pool
            assert torch.equal(ops.bn_relu_pool_sums(*args), batch_norm._sums(*args))


@pytest.mark.usefixtures("level")
def test_nan_passes_and_the_last_of_two_gets_the_gradient():
    z = torch.zeros(1, 16, 2, 4)
    z[0, :, 0, 0] = z[0, :, 1, 0] = z[0, :, 0, 3] = float("nan")
    z = last(z).requires_grad_()
    expected = torch.nn.functional.max_pool2d(torch.relu(z), 2)
    (gradient,) = torch.autograd.grad(expected, z, torch.ones_like(expected))
    affine = torch.stack([torch.ones(16), torch.zeros(16)])
    y = ops.bn_relu_pool(z.detach(), affine, True, True)
    assert y.isnan().all()
    dz = ops.bn_relu_pool_backward(last(torch.ones_like(y)), z.detach(), affine, affine[:1], None, True, True)
    assert torch.equal(dz, gradient)
    assert dz[0, 0].tolist() == [[0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]]


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_moments_are_as_close_as_pytorchs(offset):
    """Also where the mean is a thousand times the deviation, which sums of squares would not survive."""
    z = last(testing.random_tensor(3, 40, 31, 29) + offset)
    exact = batch_norm._moments(z)
    ours = ops.batch_moments(z)
    mean, variance = torch.zeros(2, 40)
    torch.nn.functional.batch_norm(z, mean, variance, training=True, momentum=1.0)
    count = z.numel() // 40
    for mine, theirs, value in zip(ours, (mean, variance.double() * (count - 1) / count), exact, strict=True):
        assert testing.relative_error(mine, value) <= 2 * testing.relative_error(theirs, value)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_batch_norm_is_what_autograd_says(dtype, batch):
    """With the ReLU and pool behind it; bf16 parameters are those of a model in bf16."""
    z = last(testing.random_tensor(2, 37, 9, 7, dtype=dtype))
    gamma, beta, mean = (testing.random_tensor(37, seed=i, dtype=dtype) for i in range(3))
    variance = testing.random_tensor(37, seed=3, dtype=dtype).abs() + 0.5
    statistics = (None, None) if batch else (mean, variance)
    y, state = ops.batch_norm_forward(z, gamma, beta, *statistics, 1e-5, True, True)
    dy = last(testing.random_tensor(*y.shape, seed=5, dtype=dtype))
    dz, sums = ops.batch_norm_backward(dy, z, state, batch, True, True)

    def by_autograd(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (z, gamma, beta)]
        running = (None, None) if batch else (mean.to(dtype), variance.to(dtype))
        value = F.max_pool2d(F.relu(F.batch_norm(leaves[0], *running, *leaves[1:], training=batch)), 2)
        return [value.detach(), *torch.autograd.grad(value, leaves, dy.to(dtype))]

    # Where bf16 makes two values of a window equal, the first gets the gradient, here as in PyTorch.
    exact, pytorch = by_autograd(torch.float64), by_autograd(dtype)
    for ours, plain, value in zip((y, dz, *sums), pytorch, exact, strict=True):
        assert testing.relative_error(ours, value) <= 2 * testing.relative_error(plain, value) + 1e-6
    theirs = batch_norm._forward(z, gamma, beta, *statistics, 1e-5, True, True)
    torch.testing.assert_close((y, state), theirs, rtol=1e-6, atol=1e-6)
    other = batch_norm._backward(dy, z, state, batch, True, True)
    torch.testing.assert_close((dz, sums), other, rtol=1e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-4)


def test_all_levels_and_numbers_of_threads_give_the_same_bits(monkeypatch):
    z, dy = (last(testing.random_tensor(2, 40, 23, 30, seed=i)) for i in range(2))
    affine, centre = testing.random_tensor(2, 40, seed=2), testing.random_tensor(3, 40, seed=3)
    threads, seen = torch.get_num_threads(), []
    levels = [level for level in LEVELS if level == "portable" or level in ops.cpu_flags()]
    try:
        for level in levels:
            monkeypatch.setenv("VGG_FAST_ISA", level)
            for count in (1, 3):
                torch.set_num_threads(count)
                results = ops.bn_relu_pool(z, affine, True, True), ops.batch_moments(z)
                sums = ops.bn_relu_pool_sums(dy, z, affine, centre[:1], True, False)
                dz = ops.bn_relu_pool_backward(dy, z, affine, affine[:1], centre, True, False)
                seen.append((ops.cpu_passes(), *results, sums, dz))
    finally:
        torch.set_num_threads(threads)
    assert [name for name, *_ in seen] == [level for level in levels for _ in range(2)]
    for _, *results in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, seen[0][1:], strict=True))


def test_opcheck_and_refusals():
    z, affine = last(testing.random_tensor(2, 17, 4, 6)), testing.random_tensor(2, 17)
    y = ops.bn_relu_pool(z, affine, True, True)
    torch.library.opcheck(ops.bn_relu_pool.default, (z, affine, True, True))
    torch.library.opcheck(ops.batch_moments.default, (z,))
    torch.library.opcheck(ops.bn_relu_pool_sums.default, (y, z, affine, affine[:1], True, True))
    centre = testing.random_tensor(3, 17)
    torch.library.opcheck(ops.bn_relu_pool_backward.default, (y, z, affine, affine[:1], centre, True, True))
    vector = testing.random_tensor(17)
    torch.library.opcheck(ops.batch_norm_forward.default, (z, vector, None, None, None, 1e-5, True, True))
    _, state = ops.batch_norm_forward(z, vector, None, None, None, 1e-5, True, True)
    torch.library.opcheck(ops.batch_norm_backward.default, (y, z, state, True, True, True))
    with pytest.raises(RuntimeError, match="state is not what batch_norm_forward returned"):
        ops.batch_norm_backward(y, z, state[:2], True, True, True)
    with pytest.raises(RuntimeError, match="weight must be a CPU tensor of 17 elements"):
        ops.batch_norm_forward(z, vector[:3], None, None, None, 1e-5, True, True)
    with pytest.raises(RuntimeError, match="dense in channels_last"):
        ops.bn_relu_pool(z.contiguous(), affine, False, False)
    with pytest.raises(RuntimeError, match=r"fp32 CPU tensor \[2, 17\]"):
        ops.bn_relu_pool(z, affine.double(), False, False)
    with pytest.raises(RuntimeError, match="Output size is too small"):
        ops.bn_relu_pool(last(z[:, :, :1]), affine, False, True)
