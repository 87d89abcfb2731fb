"""The power-on self test of GPU kernels: it passes the reference, and finds whatever is wrong with a kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vgg_fast import reference, selection
from vgg_fast.kernels.configs import Architecture
from vgg_fast.ops._self_test import CHANNELS, PROGRAM, failure, pool_failure, require

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Change = Callable[[list[Tensor]], list[Tensor]]


class Kernel:
    """The reference as a GPU kernel, with a fault of one's choice."""

    def __init__(self, change: Change = lambda results: results) -> None:
        self.change, self.calls = change, 0

    def __call__(self, x, weights, affines, program, kernel):
        self.calls += 1
        plain = [weight.permute(0, 3, 1, 2) for weight in weights]
        return self.change(reference.conv_stack_taps(x, plain, affines, program))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_passes(dtype):
    """In every dtype: the values are exact in it, so that a kernel has to have these bits."""
    assert failure("imagined", dtype, CPU, Kernel()) is None


@pytest.mark.parametrize("where", [(0, 0, 0, 0), (1, 23, 12, 10), (1, 7, 0, 10), (0, 11, 6, 5)])
@pytest.mark.parametrize("which", [0, 1], ids=["tap", "result"])
def test_one_wrong_pixel_is_found(which, where):
    def change(results: list[Tensor]) -> list[Tensor]:
        y = results[which]
        position = tuple(min(i, size - 1) for i, size in zip(where, y.shape, strict=True))
        y[position] += 1.0
        return results

    reason = failure("imagined", torch.float16, CPU, Kernel(change)) or ""
    assert f"{['the tap', 'the result'][which]} is wrong: 1 of {[6864, 384][which]} values differ" in reason


def test_other_faults_are_named():
    def fault(change: Change) -> str | None:
        return failure("imagined", torch.float32, CPU, Kernel(change))

    def raises(results: list[Tensor]) -> list[Tensor]:
        raise RuntimeError("no kernel image is available\nfor this device")

    assert fault(raises) == "RuntimeError: no kernel image is available"
    assert "1 results instead of 2" in fault(lambda results: results[1:])
    assert "the tap is wrong: (2, 24, 13, 10)" in fault(lambda results: [results[0][..., :-1], results[1]])
    assert "torch.float64 instead of" in fault(lambda results: [results[0].double(), results[1]])
    assert "nan instead of" in fault(lambda results: [results[0] * float("nan"), results[1]])


def test_what_it_covers():
    """A pool, a tap, odd sizes, Cin = 3, a Cout that fills no block of 16; and on today's GPUs a split sum."""
    assert {int(step) for step in PROGRAM} == {0, 1, 3, 7}
    assert CHANNELS[0] == 3
    assert any(c % 16 for c in CHANNELS[1:])
    from vgg_fast.kernels.stack import Problem, launches_of

    for sm, multiprocessors in ((80, 108), (89, 128), (90, 132), (100, 148), (120, 170)):
        for dtype in DTYPES:
            problem = Problem((2, 3, 13, 11), CHANNELS[1:], PROGRAM, dtype, "ieee", CPU)
            launches = launches_of(problem, Architecture(sm, multiprocessors))
            assert any(launch.counters for launch in launches), (sm, dtype)
            assert any(not launch.counters for launch in launches), (sm, dtype)


def test_a_kernel_is_tested_once_per_device_and_dtype():
    kernel = Kernel()
    for _ in range(2):
        require("imagined sound kernel", torch.float32, CPU, kernel)
        require("imagined sound kernel", torch.float16, CPU, kernel)
    assert kernel.calls == 2
    assert selection.why_switched_off("imagined sound kernel", CPU) is None


def refused(dtype: torch.dtype, kernel: Kernel) -> None:
    with pytest.raises(RuntimeError, match="is switched off on cpu: the result is wrong: 384 of 384 values differ"):
        require("imagined broken kernel", dtype, CPU, kernel)


def test_a_kernel_that_fails_is_switched_off_and_says_what_to_do():
    kernel = Kernel(lambda results: [results[0], results[1] + 1])
    with pytest.warns(RuntimeWarning, match=r"'imagined broken kernel' failed its self test on cpu.*vgg-fast verify"):
        refused(torch.float32, kernel)
    assert "384 of 384" in selection.why_switched_off("imagined broken kernel", CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in DTYPES:  # what fails in one dtype is not trusted in another
            refused(dtype, kernel)
    assert kernel.calls == 1


def test_it_works_in_whatever_mode_the_first_call_is_made_and_leaves_the_random_state():
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        assert failure("imagined", torch.float32, CPU, Kernel()) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_the_pool_is_tested_in_both_memory_formats():
    def only_contiguous(x: Tensor) -> Tensor:
        y = reference.maxpool2x2(x)
        return y if x.is_contiguous() else y.flip(3)

    for dtype in DTYPES:
        assert pool_failure(dtype, CPU, reference.maxpool2x2) is None
        assert "values differ, the first at" in (pool_failure(dtype, CPU, only_contiguous) or "")
    assert pool_failure(torch.float32, CPU, lambda x: x.no_such_thing) == (
        "AttributeError: 'Tensor' object has no attribute 'no_such_thing'"
    )
