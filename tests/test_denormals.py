"""Numbers below the smallest normal one: they cost no time, what flushing them loses stays within the bound, and the
denormals of fp16, which are normal in fp32, lose nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from stacks import ratios, runnable

from vgg_fast import reference, selection, testing

ops = torch.ops.vgg_fast
KERNELS = selection.cpu_kernels()
FP16_KERNELS = [kernel for kernel in KERNELS if not kernel.endswith("bf16") and "winograd" not in kernel]


def pack(weight: torch.Tensor, kernel: str) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.pack(weight, None, None, None, None, None, 0.0, kernel)


# Without FlushDenormals the ratios were 50 to 160 (fp32 kernels) and, for packing, 4 to 6: docs/performance.md.
@pytest.mark.parametrize("kernel", KERNELS)
def test_denormals_cost_no_time(kernel):
    dtype = runnable(kernel)
    torch.set_num_threads(1)
    x, weight = testing.random_tensor(1, 64, 14, 14), 0.05 * testing.random_tensor(64, 64, 3, 3, seed=1)
    normal, denormal = weight.to(dtype), (1e-38 * weight).to(dtype)
    full, tiny, small = (pack((weight * scale).to(dtype), kernel) for scale in (1.0, 1e-38, 1e-20))

    def run(x: torch.Tensor, *layers: tuple[torch.Tensor, torch.Tensor]) -> Callable[[], torch.Tensor]:
        x, packed, affines = x.to(dtype), [p[0] for p in layers], [p[1] for p in layers]
        return lambda: ops.conv_stack(x, packed, affines, [0] * len(layers), kernel, False)

    found = ratios(
        {
            "weights": (run(x, tiny), run(x, full)),
            "activations": (run(1e-39 * x, full), run(x, full)),
            "activations that become denormal": (run(1e-19 * x, small, full), run(x, full, full)),
            "packing": (lambda: pack(denormal, kernel), lambda: pack(normal, kernel)),
        }
    )
    assert max(found.values()) < 1.5, found


def test_fp16_denormals_convert_as_fast_as_other_numbers():
    torch.set_num_threads(1)
    x = testing.random_tensor(1, 32, 56, 56, dtype=torch.float16)
    tiny = 1e-6 * x
    found = ratios({"pool": (lambda: ops.maxpool2x2(tiny), lambda: ops.maxpool2x2(x))})
    assert found["pool"] < 1.5


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("of_x", "of_weight"), [(1e-39, 1.0), (1.0, 1e-39), (1e-20, 1e-19), (1e-39, 1e30)])
def test_what_is_flushed_stays_within_the_bound(kernel, of_x, of_weight):
    dtype = runnable(kernel)
    for name in ("rgb_odd", "ragged"):
        x, weight, _ = testing.conv_inputs(testing.shape(name))
        x, weight = (x * of_x).to(dtype), (weight * of_weight).to(dtype)
        y = ops.conv3x3(x, weight, None, False, True, kernel)
        testing.assert_conv_close(y, x, weight, pool=True, kernel=kernel)


@pytest.mark.parametrize("kernel", FP16_KERNELS)
@pytest.mark.parametrize(("of_x", "of_weight"), [(2.0**-24, 1.0), (2.0**-12, 2.0**-12), (1.0, 2.0**-24)])
def test_fp16_denormals_are_exact(kernel, of_x, of_weight):
    """Integers times 2^-24: inputs, weights or only the results are denormal in fp16, and every sum is exact."""
    runnable(kernel)
    x = testing.integer_tensor(2, 5, 9, 11, limit=4, dtype=torch.float16) * of_x
    first = testing.integer_tensor(7, 5, 3, 3, limit=1, seed=1, dtype=torch.float16) * of_weight
    second = torch.zeros(6, 7, 3, 3, dtype=torch.float16)
    second[:, :6, 1, 1] = torch.eye(6)
    layers = [pack(weight, kernel) for weight in (first, second)]
    y = ops.conv_stack(x, [p[0] for p in layers], [p[1] for p in layers], [0, 1], kernel, False)
    expected = reference.conv3x3(x.double(), first.double(), None, True).half()[:, :6]
    assert torch.count_nonzero((expected > 0) & (expected < torch.finfo(torch.float16).tiny)) > 100
    assert torch.equal(y, expected)


@pytest.mark.parametrize("flush", [False, True])
def test_the_callers_mode_is_left_alone(flush):
    denormals = torch.full((200_000,), 1e-39)  # enough for every thread to have its share
    try:
        torch.set_flush_denormal(flush)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            before = denormals * 0.5
            ops.conv3x3(torch.ones(3, 3, 32, 32), torch.ones(16, 3, 3, 3))
            after = denormals * 0.5
            assert torch.equal(before.view(torch.int32), after.view(torch.int32))
            assert flush or after.view(torch.int32).all()
    finally:
        torch.set_flush_denormal(False)
