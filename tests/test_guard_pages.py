"""No kernel reads or writes past what it was given: the page behind (or before) each tensor may not be touched.

A wrong access ends the process, so every kernel runs its cases in a process of its own. What the library allocates
itself (blocked maps, with slack for whole AMX tiles) ends at such a page in tests/thread_sanitizer.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import vgg_fast  # noqa: F401  (declares the ops)
from vgg_fast import reference, selection, testing
from vgg_fast.ops.linear import PACKING

ops = torch.ops.vgg_fast
PAGE = mmap.PAGESIZE
SIDES = ("before_the_page", "behind_the_page")
# Cin = 3, odd channels, whole blocks, more than one group, a row longer than a tile, and the smallest map.
SHAPES = [testing.shape(name) for name in ("rgb_odd", "gray", "block", "ragged", "wide", "two", "one_row")]
# Winograd takes over from 48 input channels on: tiles that hang over on both sides, and no whole blocks of channels.
SHAPES += [testing.Shape("winograd", 2, 51, 37, 13, 11, "")]


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


def dtypes_of(kernel: str) -> list[torch.dtype]:
    """Those that a kernel takes on this machine."""
    taken = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with contextlib.suppress(RuntimeError):
            selection.select(selection.problem_on(dtype, torch.device("cpu")), kernel)
            taken.append(dtype)
    return taken


def same(y: torch.Tensor, expected: torch.Tensor, kernel: str) -> bool:
    """Integers come out exactly, but for Winograd, whose transforms have fractions."""
    return testing.relative_error(y, expected) < 1e-5 if "winograd" in kernel else torch.equal(y, expected)


def check(kernel: str) -> None:
    """conv3x3, conv_stack and pack of one kernel with every tensor against a protected page."""
    for dtype, shape in itertools.product(dtypes_of(kernel), SHAPES):
        tensors = testing.conv_inputs(shape, dtype, integers=True)
        pool = min(shape.h, shape.w) >= 2
        expected = reference.conv3x3(*(t.double() for t in tensors), True, pool).to(dtype)
        for layout, side in itertools.product((torch.contiguous_format, torch.channels_last), SIDES):
            x, weight = (guarded(t.contiguous(memory_format=layout), side) for t in tensors[:2])
            bias = guarded(tensors[2], side)
            y = ops.conv3x3(x, weight, bias, True, pool, kernel)
            assert same(y, expected, kernel), (shape.name, dtype, layout, side)
            packed = ops.pack(weight, bias, None, None, None, None, 0.0, kernel)
            words, affine = (guarded(t, side) for t in packed)
            y = ops.conv_stack(x, [words], [affine], [3 if pool else 1], kernel, layout == torch.channels_last)
            assert same(y, expected, kernel), (shape.name, dtype, layout, side)
            if dtype != torch.float16:  # which has no gradients
                check_backward(x, weight, (words, affine), y, pool, kernel, side)


def check_backward(x, weight, packed, y, pool, kernel, side) -> None:
    """The chain of one layer with a mask, and its gradient."""
    arguments = [packed[0]], [packed[1]], [3 if pool else 1], kernel, True
    mask, again = ops.conv_stack_masks(x, *arguments)
    assert torch.equal(again, y), "the same kernel"
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


PROCESSES = multiprocessing.get_context("forkserver")  # one process imports PyTorch, and a new one is a fork of it
PROCESSES.set_forkserver_preload(["torch"])  # and not vgg_fast: its sys.path is not yet that of this process


def begin(path: Path, function: Callable[..., None], arguments: tuple[str, ...]) -> None:
    """What a process does: what it says goes to a file."""
    with path.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    function(*arguments)
    print("done", flush=True)


@pytest.fixture
def in_a_process(tmp_path):
    """Calls a function in a process of its own; returns its exit code and what it said."""

    def run(function: Callable[..., None], *arguments: str) -> tuple[int | None, str]:
        said = tmp_path / "said"
        process = PROCESSES.Process(target=begin, args=(said, function, arguments))
        process.start()
        process.join(300)
        process.kill()  # one that hangs; its exit code is None
        return process.exitcode, said.read_text()

    return run


@pytest.mark.parametrize("side", SIDES)
def test_the_guard_bites(in_a_process, side):
    """Reading one element past the end, or one before the start, ends a process."""
    code, said = in_a_process(bite, side)
    assert said.startswith("alive\n")
    # AddressSanitizer turns the signal into a report.
    assert code == -signal.SIGSEGV or "SEGV" in said, said
    assert "done" not in said.splitlines()


def bite(side: str) -> None:
    """Touches what is protected."""
    x = guarded(torch.ones(100), side)
    print("alive", flush=True)
    ctypes.string_at(x.data_ptr() + (400 if side == "before_the_page" else -4), 4)


@pytest.mark.parametrize("kernel", selection.cpu_kernels())
def test_a_kernel_stays_within_its_tensors(in_a_process, kernel):
    assert dtypes_of(kernel)
    assert in_a_process(check, kernel) == (0, "done\n")


@pytest.mark.parametrize("kernel", selection.linear_kernels())
def test_a_linear_kernel_stays_within_its_tensors(in_a_process, kernel):
    dtype = torch.bfloat16 if kernel == "amx_bf16" else torch.float32
    try:
        selection.select_linear(selection.problem_on(dtype, torch.device("cpu")), kernel)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert in_a_process(check_linear, kernel) == (0, "done\n")


def test_pool_and_fingerprint_stay_within_their_tensors(in_a_process):
    assert in_a_process(check_pool_and_fingerprint) == (0, "done\n")
