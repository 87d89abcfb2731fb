"""No kernel reads or writes past what it was given: the page behind (or before) each tensor may not be touched.

A wrong access ends the process, so every kernel runs its cases in a process of its own. What the library allocates
itself (blocked maps, with slack for whole AMX tiles) ends at such a page in tests/thread_sanitizer.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch

import vgg_fast  # noqa: F401  (declares the ops)
from vgg_fast import reference, selection, testing
from vgg_fast.ops.linear import PACKING

ops = torch.ops.vgg_fast
PAGE = mmap.PAGESIZE
SIDES = ("before_the_page", "behind_the_page")
# Cin = 3, odd channels, whole blocks, more than one group, a row longer than a tile, and the smallest map.
NAMES = ("rgb_odd", "gray", "block", "ragged", "wide", "two", "one_row")


def protect(address: int) -> None:
    """Nobody may touch this page any more."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(values: torch.Tensor, side: str) -> torch.Tensor:
    """The same values and strides in memory that a protected page follows or precedes at once."""
    dense = values.permute(sorted(range(values.dim()), key=values.stride, reverse=True))
    assert dense.is_contiguous()
    size = values.numel() * values.element_size()
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    before = side == "before_the_page"
    protect(address + pages * PAGE if before else address)
    offset = pages * PAGE - size if before else PAGE
    flat = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset)
    result = flat.as_strided(values.shape, values.stride())
    result.copy_(values)
    return result


def check(kernel: str) -> None:
    """conv3x3, conv_stack and pack of one kernel with every tensor against a protected page."""
    dtypes = (
        (torch.float32, torch.bfloat16) if kernel.endswith("bf16") else (torch.float32, torch.bfloat16, torch.float16)
    )
    for dtype, name in itertools.product(dtypes, NAMES):
        shape = testing.shape(name)
        tensors = testing.conv_inputs(shape, dtype, integers=True)
        pool = min(shape.h, shape.w) >= 2
        expected = reference.conv3x3(*(t.double() for t in tensors), True, pool).to(dtype)
        for layout, side in itertools.product((torch.contiguous_format, torch.channels_last), SIDES):
            x, weight = (guarded(t.contiguous(memory_format=layout), side) for t in tensors[:2])
            bias = guarded(tensors[2], side)
            assert torch.equal(ops.conv3x3(x, weight, bias, True, pool, kernel), expected), (name, dtype, layout, side)
            packed = ops.pack(weight, bias, None, None, None, None, 0.0, kernel)
            words, affine = (guarded(t, side) for t in packed)
            y = ops.conv_stack(x, [words], [affine], [3 if pool else 1], kernel, layout == torch.channels_last)
            assert torch.equal(y, expected), (name, dtype, layout, side)
            if dtype != torch.float16:  # which has no gradients
                check_backward(x, weight, (words, affine), y, pool, kernel, side)


def check_backward(x, weight, packed, y, pool, kernel, side) -> None:
    """The chain of one layer with a mask, and its gradient."""
    arguments = [packed[0]], [packed[1]], [3 if pool else 1], kernel, True
    mask, again = ops.conv_stack_masks(x, *arguments)
    assert torch.equal(again, y)
    dy = guarded(torch.ones_like(y, memory_format=torch.channels_last), side)
    transposed, factor = guarded(ops.pack_transposed(weight, kernel), side), guarded(torch.ones(len(weight)), side)
    ops.conv_stack_backward(dy, [transposed], [factor], [guarded(mask, side)], arguments[2], x.shape, kernel, True)


# Rows and images that end within a vector, a tile or a register block, and whole ones.
LINEARS = ((1, 64, 32), (1, 37, 53), (3, 100, 7), (17, 33, 40), (2, 1, 1))


def check_linear(kernel: str) -> None:
    """linear and linear_pack of one kernel with every tensor against a protected page."""
    problem = partial(selection.problem_on, device=torch.device("cpu"))
    ran = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        try:
            selection.select_linear(problem(dtype), kernel)
        except RuntimeError:
            continue  # not a dtype of this kernel
        ran.append(dtype)
        for (n, inputs, outputs), side in itertools.product(LINEARS, SIDES):
            x = testing.integer_tensor(n, inputs, limit=4, dtype=dtype)
            weight = testing.integer_tensor(outputs, inputs, limit=2, seed=1, dtype=dtype)
            bias = testing.integer_tensor(outputs, limit=4, seed=2, dtype=dtype)
            expected = reference.linear(x, weight, bias, True)
            weight = guarded(weight, side)
            if dtype == torch.float32 and kernel in PACKING:
                weight = guarded(ops.linear_pack(weight, kernel), side)
            y = ops.linear(guarded(x, side), weight, guarded(bias, side), True, kernel)
            assert torch.equal(y, expected), (dtype, n, inputs, outputs, side)
    assert ran


def check_pool_and_fingerprint() -> None:
    """The ops that no kernel's name chooses."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for size in ((2, 3, 7, 9), (1, 37, 2, 3), (1, 16, 4, 33)):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                values = testing.integer_tensor(*size, limit=9, dtype=dtype).contiguous(memory_format=memory_format)
                for side in SIDES:
                    x = guarded(values, side)
                    assert torch.equal(ops.maxpool2x2(x), torch.nn.functional.max_pool2d(values, 2))
                    assert ops.fingerprint([x]) == ops.fingerprint([values])
    weight = testing.random_tensor(70, 33, 3, 3)  # large enough to be sampled
    assert all(ops.fingerprint([guarded(weight, side)]) == ops.fingerprint([weight]) for side in SIDES)


def in_a_process(call: str) -> subprocess.CompletedProcess:
    """This file run as a program, which calls the function named."""
    # The package this process has, in whatever folder it lies.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, __file__, call], capture_output=True, text=True, env=environment, timeout=300, check=False
    )


def test_the_guard_bites():
    """Reading one element past the end, and one before the start, ends a process."""
    for side in SIDES:
        done = in_a_process(f"bite:{side}")
        assert done.stdout == "alive\n"
        # AddressSanitizer turns the signal into a report.
        assert done.returncode == -signal.SIGSEGV or "SEGV" in done.stderr, done.stderr


def bite(side: str) -> None:
    """Touches what is protected."""
    x = guarded(torch.ones(100), side)
    print("alive", flush=True)
    ctypes.string_at(x.data_ptr() + (400 if side == "before_the_page" else -4), 4)


@pytest.mark.parametrize("kernel", selection.cpu_kernels())
def test_a_kernel_stays_within_its_tensors(kernel):
    try:
        selection.select(selection.problem_on(torch.bfloat16, torch.device("cpu")), kernel)
    except RuntimeError as error:
        pytest.skip(str(error))
    done = in_a_process(f"kernel:{kernel}")
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    assert done.stdout == "done\n"


@pytest.mark.parametrize("kernel", selection.linear_kernels())
def test_a_linear_kernel_stays_within_its_tensors(kernel):
    dtype = torch.bfloat16 if kernel == "amx_bf16" else torch.float32
    try:
        selection.select_linear(selection.problem_on(dtype, torch.device("cpu")), kernel)
    except RuntimeError as error:
        pytest.skip(str(error))
    done = in_a_process(f"linear:{kernel}")
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    assert done.stdout == "done\n"


def test_pool_and_fingerprint_stay_within_their_tensors():
    done = in_a_process("others")
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    assert done.stdout == "done\n"


if __name__ == "__main__":
    what, _, argument = sys.argv[1].partition(":")
    if what == "bite":
        bite(argument)
    elif what == "kernel":
        check(argument)
    elif what == "linear":
        check_linear(argument)
    else:
        check_pool_and_fingerprint()
    print("done")
