"""Any size: from CIFAR to megapixels, thin and long, one channel or thousands, one image or hundreds, and offsets that
no 32-bit number holds. Integers, so every answer is exact; few channels where the map is large."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stacks import runnable

from vgg_fast import reference, selection, testing
from vgg_fast.testing import Shape

ops = torch.ops.vgg_fast
KERNELS = selection.cpu_kernels()
GIB = 2**30

SIZES = (
    Shape("cifar_256", 256, 3, 16, 32, 32, "CIFAR in a large batch: images are shared out over the threads"),
    Shape("odd_batch", 33, 20, 24, 7, 9, "a batch that leaves one image over for any even number of threads"),
    Shape("megapixel", 1, 3, 16, 1024, 1024, "1024x1024, the first layer"),
    Shape("odd_megapixel", 1, 17, 16, 1021, 1023, "odd sizes and two channel blocks: 126 MB of blocked map"),
    Shape("very_wide", 1, 8, 16, 3, 40000, "rows longer than any cache: one row of accumulators has 5 MB"),
    Shape("very_tall", 1, 8, 16, 40000, 3, "more rows than any other number here"),
    Shape("many_channels", 1, 2050, 1030, 3, 4, "a K of 18450: the longest sums, still exact"),
    Shape("one_to_many", 2, 1, 4099, 5, 5, "one input channel, a prime number of output channels"),
    Shape("many_to_one", 2, 4099, 1, 5, 5, "the other way round"),
)


def available_memory() -> int:
    """Bytes that Linux would still hand out; 0 where that cannot be known."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SIZES, ids=lambda s: s.name)
def test_sizes(kernel, shape):
    dtype = runnable(kernel)
    x, weight, bias = testing.conv_inputs(shape, dtype, integers=True)
    # fp32 holds every sum of these integers exactly (the largest is 18450 * 8), and is twice as fast as float64.
    expected = reference.conv3x3(x.float(), weight.float(), bias.float(), True, True).to(dtype)
    y = ops.conv3x3(x, weight, bias, True, True, kernel)
    if testing.is_direct(kernel, shape.cin, shape.h, shape.w):
        assert torch.equal(y, expected)
    else:
        testing.assert_conv_close(y, x, weight, bias, relu=True, pool=True, kernel=kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_batch_of_256_is_256_batches_of_one(kernel):
    dtype = runnable(kernel)
    x = testing.random_tensor(256, 3, 32, 32, dtype=dtype)
    weight = testing.random_tensor(40, 3, 3, 3, seed=1, dtype=dtype)
    packed, affine = ops.pack(weight, None, None, None, None, None, 0.0, kernel)
    together = ops.conv_stack(x, [packed], [affine], [3], kernel, False)
    for i in (0, 1, 127, 128, 254, 255):
        assert torch.equal(ops.conv_stack(x[i : i + 1], [packed], [affine], [3], kernel, False)[0], together[i])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("far", ["image", "channel", "row", "column"])
def test_strides_past_32_bits(kernel, far):
    """Each stride in turn takes the last element beyond 4 GiB. Only the pages that are touched cost memory."""
    dtype = runnable(kernel)
    values = testing.integer_tensor(2, 3, 4, 5, limit=4, dtype=dtype)
    strides, axis = [60, 20, 5, 1], ["image", "channel", "row", "column"].index(far)
    strides[axis] = 5 * GIB // dtype.itemsize // (values.shape[axis] - 1)
    elements = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
    try:
        x = torch.empty(elements, dtype=dtype).as_strided(values.shape, strides)
    except RuntimeError as error:
        pytest.skip(f"this machine does not hand out memory that is not used: {error}")
    x.copy_(values)
    assert torch.equal(x, values), "strides overlap"
    weight = testing.integer_tensor(16, 3, 3, 3, limit=2, seed=1, dtype=dtype)
    expected = reference.conv3x3(values.double(), weight.double(), None, True, True).to(dtype)
    assert torch.equal(ops.conv3x3(x, weight, None, True, True, kernel), expected)
    assert torch.equal(ops.maxpool2x2(x), torch.nn.functional.max_pool2d(values, 2))
    assert ops.fingerprint([x]) == ops.fingerprint([values])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_map_of_more_than_2_gib(dtype):
    """34 megapixels of one channel: 64 bytes each in the blocked map, and as many in an fp32 result of 16 channels."""
    side = 5800
    need = (2 * 64 + 16) * side**2 + GIB
    if available_memory() < 2 * need:
        pytest.skip(
            f"needs {need / GIB:.0f} GiB, twice that to be on the safe side; {available_memory() / GIB:.0f} there"
        )
    x = torch.zeros(1, 1, side, side, dtype=dtype)
    edge = 40  # the corners and the middle have values; all else is zeros, in the result too
    corners = [(0, 0), (0, side - edge), (side - edge, 0), (side - edge, side - edge), (side // 2, side // 2)]
    patches = testing.integer_tensor(len(corners), edge, edge, limit=4, dtype=dtype)
    for (row, column), patch in zip(corners, patches, strict=True):
        x[0, 0, row : row + edge, column : column + edge] = patch
    x = x.contiguous(memory_format=torch.channels_last)
    weight = testing.integer_tensor(16, 1, 3, 3, limit=2, seed=1, dtype=dtype)
    packed, affine = ops.pack(weight, None, None, None, None, None, 0.0, kernel := selection.choose(dtype, x.device))
    y = ops.conv_stack(x, [packed], [affine], [0], kernel, True)
    assert 64 * side**2 > 2**31
    for row, column in corners:  # each with the zeros around it
        top, left = max(0, row - 4), max(0, column - 4)
        part = (0, slice(None), slice(top, row + edge + 4), slice(left, column + edge + 4))
        assert torch.equal(y[part], reference.conv3x3(x[part][None].float(), weight.float()).to(dtype)[0])
        y[part] = 0
    # What is left is the seam of each patch's surroundings: zeros.
    assert not any(y[0, :, rows : rows + 100].any() for rows in range(0, side, 100))
