"""Small VGG-like stacks for the tests of the container.

Their values are integers and powers of two, so that every order of summation is exact and fused and plain must agree
bit for bit: |x| <= 4, |w| <= 1, scales of 1/2 and 1, at most 72 products in a sum; three convolutions stay below 2**24.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from vgg_fast import selection, testing
from vgg_fast.accelerate import accelerate
from vgg_fast.container.sequential import Segment, record

CPU = torch.device("cpu")
T = TypeVar("T")
EPS = 2.0**-10  # training wants one above 0; 4 - EPS + EPS is exact


def kernel(dtype: torch.dtype = torch.float32) -> str:
    """The kernel that this machine chooses by itself; never the reference, or the tests would show nothing."""
    name = selection.choose(dtype, CPU)
    assert name != selection.REFERENCE, selection.why_reference(dtype, CPU)
    return name


def runnable(kernel: str) -> torch.dtype:
    """The kernel's own dtype, or a skip that says what this machine lacks."""
    dtype = torch.bfloat16 if kernel.endswith("bf16") else torch.float32
    try:
        selection.select(selection.problem_on(dtype, CPU), kernel)
    except RuntimeError as error:
        pytest.skip(str(error))
    return dtype


def at_once(*calls: Callable[[], T]) -> list[T]:
    """The results of these calls, each in a thread of its own, all starting at the same moment."""
    barrier = threading.Barrier(len(calls))

    def wait_and_call(call: Callable[[], T]) -> T:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [f.result(timeout=60) for f in [pool.submit(wait_and_call, call) for call in calls]]


def ratios(calls: dict[str, tuple[Callable[[], object], Callable[[], object]]]) -> dict[str, float]:
    """How much longer the first call of each pair takes than the second, by the least time of each.

    All calls take turns, for as many rounds as a busy machine needs: noise only ever adds to a time, so more rounds
    bring a ratio of 1 closer to 1, while a ratio of 100 stays what it is.
    """
    best = {name: [float("inf")] * 2 for name in calls}
    for _ in range(300):
        for name, pair in calls.items():
            for i, call in enumerate(pair):
                start = time.perf_counter()
                call()
                best[name][i] = min(best[name][i], time.perf_counter() - start)
        if all(denormal < 1.2 * normal for denormal, normal in best.values()):
            break
    return {name: denormal / normal for name, (denormal, normal) in best.items()}


def direct_kernel() -> str:
    """A kernel of this machine that is exact on integers for any number of channels: Winograd's, from 16 on, is not."""
    return kernel().replace("winograd_", "")


def conv(cin: int, cout: int, seed: int = 0, bias: bool = True) -> nn.Conv2d:
    module = nn.Conv2d(cin, cout, 3, padding=1, bias=bias)
    with torch.no_grad():
        module.weight.copy_(testing.integer_tensor(cout, cin, 3, 3, limit=1, seed=seed))
        if module.bias is not None:
            module.bias.copy_(testing.integer_tensor(cout, limit=4, seed=seed + 1))
    return module


def norm(channels: int, seed: int = 0) -> nn.BatchNorm2d:
    """Batch norm in evaluation mode with scales of +-1/2, +-1 and 0."""
    module = nn.BatchNorm2d(channels, eps=EPS).eval()
    with torch.no_grad():
        module.weight.copy_(testing.integer_tensor(channels, limit=2, seed=seed))
        module.bias.copy_(testing.integer_tensor(channels, limit=3, seed=seed + 1))
        module.running_mean.copy_(testing.integer_tensor(channels, limit=3, seed=seed + 2))
        module.running_var.fill_(4.0 - EPS)
    return module


def changed(module: nn.Module, **attributes: object) -> nn.Module:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def stack(bn: bool = False, inplace: bool = True) -> nn.Sequential:
    """conv [bn] relu conv [bn] relu pool conv [bn] relu pool: 3 -> 8 -> 8 -> 16 channels, evaluation mode."""
    layers: list[nn.Module] = []
    for i, (cin, cout, pool) in enumerate(((3, 8, False), (8, 8, True), (8, 16, True))):
        layers.append(conv(cin, cout, seed=10 * i))
        layers += [norm(cout, seed=10 * i + 5)] * bn
        layers.append(nn.ReLU(inplace=inplace))
        layers += [nn.MaxPool2d(2)] * pool
    return nn.Sequential(*layers).eval()


def image(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return testing.integer_tensor(*(size or (2, 3, 12, 10)), limit=4, seed=99, dtype=dtype)


def fused_copy(model: nn.Module, backend: str = "auto") -> nn.Module:
    return accelerate(copy.deepcopy(model), backend)


def run(model: nn.Module, *args: Tensor) -> tuple[Tensor, list[Segment]]:
    """The model's output without gradients, and what its containers ran."""
    with torch.no_grad(), record() as segments:
        return model(*args), segments


def layout(t: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return t.shape, t.stride(), t.dtype


def fused_names(segments: list[Segment]) -> list[str]:
    return [name for s in segments if s.kernel is not None for name in s.names]


def check_equal(plain: nn.Module, fused: nn.Module, x: Tensor, expected_kernel: str | None = None) -> list[Segment]:
    """Same bits, shape, strides and dtype; and if a kernel is named, it ran and no convolution ran without it."""
    expected, _ = run(plain, x.clone(memory_format=torch.preserve_format))
    actual, segments = run(fused, x)
    assert layout(actual) == layout(expected)
    assert torch.equal(actual, expected) or torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))
    if expected_kernel is not None:
        assert [s.kernel for s in segments if s.kernel] != []
        assert {s.kernel for s in segments if s.kernel} == {expected_kernel}
        for segment in segments:
            if segment.kernel is None:
                children = [segment.container.get_submodule(name) for name in segment.names]
                assert not any(isinstance(child, nn.Conv2d) for child in children), segment
    return segments


def check_plain(plain: nn.Module, fused: nn.Module, x: Tensor, reason: str) -> None:
    """Same answer, nothing ran fused, and the reason given contains this text."""
    segments = check_equal(plain, fused, x)
    assert fused_names(segments) == []
    assert any(reason in s.reason for s in segments), [s.reason for s in segments]


def error_of(model: nn.Module, *args: Tensor) -> tuple[type[BaseException], str]:
    """The type and message of the error that a call without gradients raises."""
    try:
        with torch.no_grad():
            model(*args)
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("no error was raised")
