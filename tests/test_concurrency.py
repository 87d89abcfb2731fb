"""The ops themselves from several Python threads, under changing thread counts, and in forked processes.

The same for accelerated models is in test_container_concurrency.py; tests/thread_sanitizer looks for data races.
"""

from __future__ import annotations

import multiprocessing
import os
import threading

import pytest
import torch
from stacks import at_once
from torch.utils.data import DataLoader, Dataset

from vgg_fast import reference, selection, testing

ops = torch.ops.vgg_fast
SHAPES = [testing.shape(name) for name in ("rgb_odd", "ragged", "tall", "wide", "two", "block", "deep", "one_pixel")]
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


def runnable() -> list[tuple[str, torch.dtype]]:
    """The kernels of this machine, each with its own dtype."""
    pairs = []
    for kernel in selection.cpu_kernels():
        dtype = torch.bfloat16 if kernel.endswith("bf16") else torch.float32
        try:
            pairs.append((selection.select(selection.problem_on(dtype, torch.device("cpu")), kernel), dtype))
        except RuntimeError:
            continue
    return pairs


class Problem:
    """A convolution, its kernel, and the answer."""

    def __init__(self, shape: testing.Shape, kernel: str, dtype: torch.dtype) -> None:
        self.inputs, self.kernel = testing.conv_inputs(shape, dtype, integers=True), kernel
        self.pool = min(shape.h, shape.w) >= 2
        if testing.is_direct(kernel, shape.cin, shape.h, shape.w):
            self.expected = reference.conv3x3(*(t.double() for t in self.inputs), True, self.pool).to(dtype)
        else:
            self.expected = self.answer()  # not exact, but the same bits at any time; test_winograd.py has the values

    def answer(self) -> torch.Tensor:
        return ops.conv3x3(*self.inputs, True, self.pool, self.kernel)

    def is_right(self) -> bool:
        return torch.equal(self.answer(), self.expected)


def test_threads_with_different_shapes_and_kernels():
    """Neighbouring calls of one thread need scratch memory of other sizes, and neighbouring threads other kernels."""
    problems = [Problem(shape, *pair) for shape in SHAPES for pair in runnable()]

    def some(start: int) -> bool:
        return all(problems[(start + i) % len(problems)].is_right() for i in range(2 * len(problems)))

    assert all(at_once(*[lambda start=7 * i: some(start) for i in range(6)]))


def test_threads_that_change_the_number_of_threads():
    """set_num_threads between the calls of one Python thread, while others are in the middle of theirs."""
    problems = [Problem(shape, *pair) for shape in SHAPES for pair in runnable()]

    def some(start: int) -> bool:
        right = True
        for i in range(len(problems)):
            torch.set_num_threads(1 + (start + i) % 5)
            right &= problems[(start + 3 * i) % len(problems)].is_right()
        return right

    assert all(at_once(*[lambda start=i: some(start) for i in range(4)]))


@pytest.mark.parametrize(("kernel", "dtype"), runnable())
def test_more_threads_than_cores_rows_images_or_groups(kernel, dtype):
    """8 and 64 threads on whatever there is; up and down again, as a server and its libraries may do in turns."""
    x = testing.random_tensor(9, 20, 10, 12, dtype=dtype)
    weights = [testing.random_tensor(*size, 3, 3, seed=size[0], dtype=dtype) for size in ((40, 20), (17, 40))]
    packs = [ops.pack(weight, None, None, None, None, None, 0.0, kernel) for weight in weights]

    def run(n: int, threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        return ops.conv_stack(x[:n], [p[0] for p in packs], [p[1] for p in packs], [1, 3], kernel, False)

    expected = run(9, 1)
    for threads in (8, 1, 64, 2, 8):
        for n in (1, 2, 7, 8, 9):
            assert torch.equal(run(n, threads), expected[:n]), (n, threads)


def test_inference_beside_training():
    """Backward passes run in threads that autograd starts."""
    inference = [Problem(shape, *pair) for shape in SHAPES[:3] for pair in runnable()]
    x, weight, bias = testing.conv_inputs(testing.shape("ragged"), integers=True)

    def gradients(function) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        function(*leaves, True, True).sum().backward()
        return [leaf.grad for leaf in leaves]

    expected = gradients(reference.conv3x3)

    def train() -> bool:
        return all(
            torch.equal(ours, theirs)
            for _ in range(10)
            for ours, theirs in zip(gradients(ops.conv3x3), expected, strict=True)
        )

    def infer() -> bool:
        return all(problem.is_right() for _ in range(3) for problem in inference)

    assert all(at_once(train, infer, train, infer))


class Answers(Dataset):
    """Whether each problem comes out right, as found by a worker."""

    def __init__(self) -> None:
        self.problems = [Problem(shape, *pair) for shape in SHAPES[:4] for pair in runnable()]

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, i: int) -> tuple[int, bool]:
        assert torch.get_num_threads() == 1  # the loader's doing: with more, plain PyTorch hangs after a fork as well
        return os.getpid(), self.problems[i].is_right() and ops.fingerprint([self.problems[i].expected]) != 0


@forks
def test_dataloader_workers_that_are_forked_after_use():
    data = Answers()
    torch.set_num_threads(2)
    assert all(problem.is_right() for problem in data.problems)  # the parent's threads exist
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    answers = list(loader)
    assert len(answers) == len(data)
    assert os.getpid() not in {process for process, _ in answers}
    assert all(right for _, right in answers)
    assert all(problem.is_right() for problem in data.problems)  # and still do afterwards


def send_answer(problem: Problem, results) -> None:
    torch.set_num_threads(1)  # as in a DataLoader's worker
    results.send(problem.is_right())


@forks
def test_a_fork_in_the_middle_of_another_threads_call():
    """Nothing that a running call holds may be needed in the child, where its thread does not exist."""
    problems = [Problem(testing.shape("block"), *pair) for pair in runnable()]
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            assert problems[0].is_right()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for problem in problems:
            receive, send = multiprocessing.Pipe(duplex=False)
            child = multiprocessing.get_context("fork").Process(target=send_answer, args=(problem, send))
            child.start()
            assert receive.poll(60), "the child hangs"
            assert receive.recv()
            child.join(60)
    finally:
        done.set()
        worker.join()
