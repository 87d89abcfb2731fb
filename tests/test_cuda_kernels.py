"""The instrument that runs csrc/cuda on the CPU, and what only it can show. What the kernels compute is in
test_gpu_kernels.py."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from gpu_kernels import Huge, cuda_on_host, load
from torch import Tensor

from tests.virtual_gpu.cases import Conv3x3Args, Maxpool2x2Args
from vgg_fast import reference, testing
from vgg_fast.ops import _self_test

FLOAT16 = 1  # vgg_fast::cuda::DType
SENTINEL = -1234.0


def launch_conv3x3(x: Tensor, weight: Tensor, out: Tensor, pool: bool) -> None:
    """x channels_last, weight OIHW, both fp16; out is plain memory."""
    packed, cout = weight.permute(0, 2, 3, 1).contiguous(), weight.shape[0]
    affine = torch.stack([torch.ones(cout), torch.zeros(cout)])
    n, cin, h, w = x.shape
    pointers = (x.data_ptr(), packed.data_ptr(), affine.data_ptr(), out.data_ptr())
    args = Conv3x3Args(*pointers, n, h, w, cin, cout, FLOAT16, False, pool)
    assert cuda_on_host().launch_conv3x3(ctypes.byref(args)) is None


def launch_maxpool2x2(x: Tensor, out: Tensor) -> None:
    n, c, h, w = x.shape
    args = Maxpool2x2Args(x.data_ptr(), out.data_ptr(), n, h, w, c, FLOAT16)
    assert cuda_on_host().launch_maxpool2x2(ctypes.byref(args)) is None


def guarded(elements: int) -> tuple[Tensor, Tensor]:
    """Memory with a margin of sentinels on both sides: (all of it, what the kernel is given)."""
    memory = torch.full((elements + 2048,), SENTINEL, dtype=torch.float16)
    return memory, memory[1024:-1024]


@pytest.fixture
def run_blocks() -> Iterator[Callable[[int, int], None]]:
    """Limits the launches to a range of their blocks."""
    yield cuda_on_host().run_blocks
    cuda_on_host().run_blocks(0, 2**32 - 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversions_on_the_host_are_the_hardware_s(dtype: torch.dtype) -> None:
    """Every value of the type through widen and narrow, and every fp32 exponent through narrow, against PyTorch."""
    conv = load("cuda").conv3x3
    centre = torch.zeros(1, 3, 3, 1, dtype=dtype)
    centre[0, 1, 1] = 1
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1, 1, 1)
    identity = torch.tensor([[1.0], [0.0]])
    actual = conv(x, centre, identity, False, False)
    assert torch.equal(actual.isnan(), x.isnan())
    assert torch.equal(actual.nan_to_num(nan=0, posinf=1, neginf=-1), x.nan_to_num(nan=0, posinf=1, neginf=-1))

    # One output channel per fp32 value, the values spread over all exponents, the ties among them.
    values = torch.ldexp(testing.random_tensor(4096), torch.arange(4096) % 280 - 150)
    ties = x.flatten().float()[::7] * (1 + torch.finfo(dtype).eps / 2)
    values = torch.cat([values, ties[~ties.isnan()]])
    affine = torch.stack([torch.zeros_like(values), values])
    weight = torch.zeros(len(values), 3, 3, 1, dtype=dtype)
    actual = conv(torch.ones(1, 1, 1, 1, dtype=dtype), weight, affine, False, False)
    assert torch.equal(actual.flatten(), values.to(dtype))


@pytest.mark.parametrize("pool", [False, True], ids=["", "pool"])
@pytest.mark.parametrize("name", ["ragged", "two", "tall"])
def test_every_output_is_written_and_nothing_else(name: str, pool: bool) -> None:
    s = testing.shape(name)
    x, weight, _ = testing.conv_inputs(s, torch.float16, integers=True)
    expected = reference.conv3x3(x.float(), weight.float(), pool=pool).half()
    memory, out = guarded(expected.numel())
    launch_conv3x3(x.contiguous(memory_format=torch.channels_last), weight, out, pool)
    assert torch.equal(out, expected.permute(0, 2, 3, 1).flatten())
    assert (memory[:1024] == SENTINEL).all()
    assert (memory[-1024:] == SENTINEL).all()

    expected = reference.maxpool2x2(x)
    memory, out = guarded(expected.numel())
    launch_maxpool2x2(x.contiguous(memory_format=torch.channels_last), out)
    assert torch.equal(out, expected.permute(0, 2, 3, 1).flatten())
    assert (memory[:1024] == SENTINEL).all()
    assert (memory[-1024:] == SENTINEL).all()


def test_conv3x3_past_2_31_elements(run_blocks: Callable[[int, int], None]) -> None:
    huge = Huge()
    c = huge.channels
    weight = testing.integer_tensor(c, c, 3, 3, limit=2, dtype=torch.float16)
    items = huge.height // 2 * (huge.width // 2) * (c // 4)  # quads, four channels a thread; no warp hangs over
    run_blocks(items // 128 - 4, items // 128)
    launch_conv3x3(huge.x, weight, huge.out, pool=False)
    expected = reference.conv3x3(huge.last.float(), weight.float()).half()
    assert torch.equal(huge.out_pixels(huge.height, huge.width)[:, :, -1, -64:], expected[:, :, -1, -64:])


def test_maxpool2x2_past_2_32_outputs(run_blocks: Callable[[int, int], None]) -> None:
    huge = Huge(height=4, width=2**26 + 8)
    height, width = huge.height // 2, huge.width // 2
    outputs = height * width * huge.channels
    assert outputs > 2**32
    items = outputs // 8  # 16 bytes a thread
    run_blocks(items // 128 - 16, items // 128)
    launch_maxpool2x2(huge.x, huge.out)
    expected = reference.maxpool2x2(huge.last)
    assert torch.equal(huge.out_pixels(height, width)[:, :, -1, -64:], expected[:, :, -1, -64:])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(2, 16, 6, 16), (1, 8, 7, 8), (2, 3, 5, 7), (1, 24, 9, 11)], ids=str)
def test_maxpool2x2_backward(size: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """PyTorch's choice among equal values and NaN, odd edges, 16 bytes of channels or of a row, and what is neither."""
    load("cuda")
    x = testing.integer_tensor(*size, limit=2, dtype=dtype).contiguous(memory_format=memory_format)
    x[0, 0, 0, 1] = x[0, 0, 1, 0] = float("nan")
    x.requires_grad_()
    out = torch.nn.functional.max_pool2d(x, 2)
    grad = testing.random_tensor(*out.shape, dtype=dtype)
    (expected,) = torch.autograd.grad(out, x, grad)
    actual = torch.ops.vgg_fast_cuda_on_host.maxpool2x2_backward(grad, x.detach())
    assert torch.equal(actual, expected)
    assert actual.stride() == x.stride()


def test_bad_gradients_of_the_pool_are_named() -> None:
    load("cuda")
    backward, x = torch.ops.vgg_fast_cuda_on_host.maxpool2x2_backward, torch.ones(1, 8, 4, 6)
    with pytest.raises(RuntimeError, match=r"grad has sizes \[1, 8, 2, 2\]; expected \[1, 8, 2, 3\]"):
        backward(torch.ones(1, 8, 2, 2), x)
    with pytest.raises(RuntimeError, match="grad is Half and x is Float"):
        backward(torch.ones(1, 8, 2, 3).half(), x)


def test_a_grid_too_large_is_refused() -> None:
    args = Maxpool2x2Args(None, None, 2**20, 2**12, 2**12, 2**6, FLOAT16)
    assert b"split the batch" in cuda_on_host().launch_maxpool2x2(ctypes.byref(args))


@pytest.fixture
def pretend_device() -> Iterator[Callable[[int, int], int]]:
    """Sets compute capability and multiprocessors; returns how many tensor-core launches there were since."""
    yield cuda_on_host().pretend_device
    cuda_on_host().pretend_device(0, 0)


NONE, RELU, POOL, TAP = reference.Step.NONE, reference.Step.RELU, reference.Step.POOL, reference.Step.TAP
PROGRAMS = {
    "the result is a tap": [RELU | TAP, RELU, NONE, RELU | TAP],
    "a tap and its pool from one launch": [RELU, RELU | POOL | TAP, POOL, RELU],
    "no taps": [NONE, RELU, RELU | POOL, POOL],
}


@pytest.mark.parametrize("sm", [0, 80], ids=["plain", "tensor cores"])
@pytest.mark.parametrize("why", PROGRAMS)
def test_a_chain_has_the_bits_of_its_steps(pretend_device: Callable[[int, int], int], why: str, sm: int) -> None:
    """Who reads and writes what: maps in turn in one workspace, taps, results, and the scratch of shared sums."""
    program, channels = PROGRAMS[why], [3, 16, 24, 20, 32]
    weights = [
        testing.integer_tensor(cout, 3, 3, cin, limit=2, seed=cin, dtype=torch.float16)
        for cin, cout in itertools.pairwise(channels)
    ]
    affines = [torch.stack([torch.full([w.shape[0]], 2.0**-5), torch.zeros(w.shape[0])]) for w in weights]
    x, conv = testing.integer_tensor(2, 3, 14, 12, limit=4, dtype=torch.float16), load("cuda").conv3x3
    expected, y = [], x
    for weight, affine, step in zip(weights, affines, program, strict=True):
        if step & TAP:
            expected.append(conv(y, weight, affine, bool(step & RELU), False))
        y = conv(y, weight, affine, bool(step & RELU), bool(step & POOL))
    pretend_device(sm, 8)
    run = torch.ops.vgg_fast_cuda_on_host.conv_stack_taps
    actual = run(x, weights, affines, [int(step) for step in program])
    # Cin 3, and Cin 20 with its pixels of 40 bytes, are left to the plain kernel.
    assert pretend_device(0, 0) == (2 if sm else 0)
    assert all(torch.equal(a, e) for a, e in zip(actual, [*expected, y], strict=True))
    assert len({t.data_ptr() for t in actual}) == len(actual)


@pytest.mark.parametrize("program", [[RELU, RELU | POOL, RELU], [NONE, RELU | POOL | TAP], [RELU | TAP, RELU]], ids=str)
def test_the_first_block_is_one_launch(pretend_device: Callable[[int, int], int], program: list[int]) -> None:
    """But not where somebody wants to see what lies between its two convolutions."""
    channels = [3, 64, 64, 16][: len(program) + 1]
    weights = [
        testing.integer_tensor(cout, 3, 3, cin, limit=2, seed=cin, dtype=torch.float16)
        for cin, cout in itertools.pairwise(channels)
    ]
    affines = [torch.stack([torch.full([w.shape[0]], 2.0**-6), torch.ones(w.shape[0])]) for w in weights]
    x, run = testing.integer_tensor(1, 3, 10, 12, dtype=torch.float16, limit=4), cuda_on_host()
    stack, steps = torch.ops.vgg_fast_cuda_on_host.conv_stack_taps, [int(step) for step in program]
    expected = stack(x, weights, affines, steps)
    assert run.pretend_device(80, 108) == 0
    actual = stack(x, weights, affines, steps)
    assert pretend_device(0, 0) == len(program) - 1
    assert run.block1_launches() == (program[0] & TAP == 0)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_tensor_cores_multiply_fp32_only_as_tf32(pretend_device: Callable[[int, int], int]) -> None:
    x, weight, affine = torch.ones(1, 64, 6, 6), torch.ones(64, 3, 3, 64), torch.ones(2, 64)
    conv = torch.ops.vgg_fast_cuda_on_host.conv3x3
    for kernel, launches in (("cuda", 0), ("cuda_tf32", 1)):
        pretend_device(80, 108)
        conv(x, weight, affine, False, False, kernel)
        assert pretend_device(0, 0) == launches
    pretend_device(75, 40)
    conv(x.half(), weight.half(), affine, False, False)
    assert pretend_device(0, 0) == 0


@pytest.mark.parametrize(("sm", "kernel", "hopper"), [(90, "cuda_wgmma", 2), (90, "cuda", 0), (100, "cuda_wgmma", 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_hopper_has_kernels_of_its_own(
    pretend_device: Callable[[int, int], int], dtype: torch.dtype, sm: int, kernel: str, hopper: int
) -> None:
    """By name alone; also with shared sums, whose memory is that of its plan."""
    sizes = ((64, 128), (128, 128), (128, 24))  # the last has too few channels for its tile
    weights = [testing.integer_tensor(cout, 3, 3, cin, limit=2, dtype=dtype) for cin, cout in sizes]
    affines = [torch.stack([torch.full([w.shape[0]], 2.0**-7), torch.ones(w.shape[0])]) for w in weights]
    x, program = testing.integer_tensor(1, 64, 14, 14, dtype=dtype, limit=4), [int(RELU), int(RELU | POOL), 0]
    stack = torch.ops.vgg_fast_cuda_on_host.conv_stack_taps
    (expected,) = stack(x, weights, affines, program)
    pretend_device(sm, 132)
    (actual,) = stack(x, weights, affines, program, kernel if dtype == torch.float16 else f"{kernel}_tf32")
    assert pretend_device(0, 0) == 3
    assert cuda_on_host().hopper_launches() == hopper
    assert torch.equal(actual, expected)


def test_the_self_test_runs_through_the_library(pretend_device: Callable[[int, int], int]) -> None:
    """Its checks, workspace and launches; which kernels and tiles it reaches on which GPU is in test_self_test.py."""
    stack = torch.ops.vgg_fast_cuda_on_host.conv_stack_taps
    pretend_device(90, 132)
    assert _self_test.failure("cuda_wgmma", torch.float16, torch.device("cpu"), stack) is None
    assert pretend_device(0, 0) > 8
    assert cuda_on_host().block1_launches() == 1
    assert cuda_on_host().hopper_launches() > 2


def test_an_image_or_weights_that_are_not_aligned_are_two_launches(pretend_device: Callable[[int, int], int]) -> None:
    """block1 copies both 16 bytes at a time."""
    memory = testing.integer_tensor(64 * 27 + 8, limit=2, dtype=torch.float16)
    second, affines = torch.ones(16, 3, 3, 64, dtype=torch.float16), [torch.ones(2, 64), torch.ones(2, 16)]
    for image_at, weight_at in ((0, 0), (1, 0), (0, 4)):
        x = memory[image_at : image_at + 6 * 4 * 3].view(1, 6, 4, 3).permute(0, 3, 1, 2)
        first = memory[weight_at : weight_at + 64 * 27].view(64, 3, 3, 3)
        pretend_device(80, 108)
        torch.ops.vgg_fast_cuda_on_host.conv_stack(x, [first, second], affines, [0, 0])
        assert pretend_device(0, 0) == 1
        assert cuda_on_host().block1_launches() == (image_at + weight_at == 0)


def test_what_is_not_aligned_is_left_to_the_plain_kernel(pretend_device: Callable[[int, int], int]) -> None:
    weight, affine = torch.ones(16, 3, 3, 16, dtype=torch.float16), torch.ones(2, 16)
    memory = torch.ones(4 * 4 * 16 + 1, dtype=torch.float16)
    x = memory[1:].view(1, 4, 4, 16).permute(0, 3, 1, 2)
    assert x.data_ptr() % 16
    pretend_device(80, 108)
    once = torch.ops.vgg_fast_cuda_on_host.conv_stack(x, [weight], [affine], [0])
    assert pretend_device(80, 108) == 0
    twice = torch.ops.vgg_fast_cuda_on_host.conv_stack(x, [weight, weight], [affine, affine], [0, 0])
    assert pretend_device(0, 0) == 1
    assert once.shape == twice.shape == (1, 16, 4, 4)


def test_a_chain_names_what_is_wrong_with_it() -> None:
    run, stack = torch.ops.vgg_fast_cuda_on_host.conv_stack_taps, torch.ops.vgg_fast_cuda_on_host.conv_stack
    x, weight, affine = torch.ones(1, 4, 6, 6), torch.ones(4, 3, 3, 4), torch.ones(2, 4)
    with pytest.raises(RuntimeError, match="a program with taps returns several tensors: call conv_stack_taps"):
        stack(x, [weight], [affine], [TAP])
    with pytest.raises(RuntimeError, match="step 8 of the program"):
        run(x, [weight], [affine], [8])
    with pytest.raises(RuntimeError, match="2 weights, 1 affines and 1 program entries"):
        run(x, [weight, weight], [affine], [0])
    with pytest.raises(
        RuntimeError, match="no kernel 'cuda_mma'; choose one of cuda, cuda_tf32, cuda_wgmma, cuda_wgmma_tf32"
    ):
        run(x, [weight], [affine], [0], "cuda_mma")
    with pytest.raises(RuntimeError, match="the program is empty"):
        run(x, [], [], [])
    with pytest.raises(RuntimeError, match="a 1x1 map is smaller than 2x2"):
        run(x, [weight] * 3, [affine] * 3, [POOL, POOL, POOL])
