"""A chain in one call: the bits of its layers one by one, wherever it fuses, cuts into strips or returns taps."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from vgg_fast import reference, selection, testing
from vgg_fast.reference import Step

ops = torch.ops.vgg_fast
KERNELS = selection.cpu_kernels()
RELU, POOL, TAP = Step.RELU, Step.POOL, Step.TAP


@dataclass(frozen=True)
class Chain:
    """channels[0] -> channels[1] -> ... at h x w, and why."""

    name: str
    channels: tuple[int, ...]
    h: int
    w: int
    program: tuple[int, ...]
    why: str


# The map between the first two layers has more than the 512 KB from which on it exists in strips only (stack.cpp).
STRIPS = (
    Chain("vgg16", (3, 64, 64, 32), 96, 112, (RELU, RELU | POOL, RELU), "block 1 and what follows"),
    Chain("odd", (3, 64, 64), 97, 115, (RELU, RELU | POOL), "the pool drops a row that the strip above it needs"),
    Chain("two_rows", (3, 64, 64), 98, 112, (RELU, RELU), "the last strip has two rows"),
    Chain("one_row", (3, 64, 64), 97, 112, (RELU, 0), "the last strip has one row, and the result is not pooled"),
    Chain(
        "vgg11", (3, 64, 128), 150, 133, (RELU | POOL, RELU | POOL), "the first layer pools, an odd column is dropped"
    ),
    Chain("tapped", (3, 64, 64), 97, 115, (RELU, RELU | POOL | TAP), "the odd row is in the tap"),
    Chain("thin", (1, 18, 24), 200, 160, (RELU, RELU), "no number of channels is a whole vector"),
)
# With taps on the first layer, on a plain one, and on the last.
TAPS = (
    Chain("lpips", (3, 64, 64, 128), 22, 18, (RELU, RELU | POOL | TAP, RELU | TAP), "the slices of a perceptual loss"),
    Chain("all", (3, 16, 32, 16), 13, 11, (RELU | TAP, POOL | TAP, TAP), "every layer, odd maps"),
    Chain(
        "odd_channels", (5, 20, 3, 33), 9, 12, (RELU | POOL | TAP, TAP, RELU | POOL | TAP), "nothing is a whole vector"
    ),
)


# Weights that take longer to arrive than a small map to compute: from some layer on all images are run together.
TOGETHER = (
    Chain(
        "cifar", (3, 16, 64, 256, 256), 32, 32, (RELU | POOL, RELU | POOL, RELU, RELU | POOL), "its end, by Winograd"
    ),
    Chain("tapped", (3, 20, 260, 256, 33), 9, 7, (RELU | POOL | TAP, RELU, TAP | POOL, RELU | TAP), "3x4 and 1x2 maps"),
    Chain("alone", (256, 256), 5, 5, (RELU,), "from the first layer on, as a training step has it"),
)


def native_dtype(kernel: str) -> torch.dtype:
    """The kernel's own dtype, or a skip that says what this machine lacks."""
    dtype = torch.bfloat16 if kernel.endswith("bf16") else torch.float32
    try:
        selection.select(selection.problem_on(dtype, torch.device("cpu")), kernel)
    except RuntimeError as error:
        pytest.skip(str(error))
    return dtype


def packed(chain: Chain, kernel: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, chain.channels[0], chain.h, chain.w, generator=generator).to(dtype)
    weights, affines = [], []
    for cin, cout in zip(chain.channels, chain.channels[1:], strict=False):
        weight = torch.randn(cout, cin, 3, 3, generator=generator) * (2 / (9 * cin)) ** 0.5
        bias = torch.randn(cout, generator=generator)
        pack = ops.pack(weight.to(dtype), bias.to(dtype), None, None, None, None, 0.0, kernel)
        weights.append(pack[0])
        affines.append(pack[1])
    return x, weights, affines


def one_by_one(x: Tensor, weights: list[Tensor], affines: list[Tensor], program: tuple[int, ...], kernel: str):
    """What conv_stack_taps has to return, from calls of one layer each."""
    results = []
    for weight, affine, step in zip(weights, affines, program, strict=True):
        if step & TAP:
            results.append(ops.conv_stack(x, [weight], [affine], [step & RELU], kernel, True))
        x = ops.conv_stack(x, [weight], [affine], [step & (RELU | POOL)], kernel, True)
    return [*results, x]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("chain", STRIPS, ids=lambda c: c.name)
def test_strips_have_the_bits_of_the_layers(kernel, chain):
    x, weights, affines = packed(chain, kernel, native_dtype(kernel))
    expected = one_by_one(x, weights, affines, chain.program, kernel)
    for last in (False, True):
        results = ops.conv_stack_taps(x, weights, affines, chain.program, kernel, last)
        assert len(results) == len(expected)
        for result, tensor in zip(results, expected, strict=True):
            assert torch.equal(result, tensor)
        # One image alone is shared out over the threads, two are not.
        alone = ops.conv_stack_taps(x[1:], weights, affines, chain.program, kernel, last)
        assert all(torch.equal(a[0], r[1]) for a, r in zip(alone, results, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("chain", TAPS, ids=lambda c: c.name)
def test_taps(kernel, chain):
    dtype = native_dtype(kernel)
    x, weights, affines = packed(chain, kernel, dtype)
    expected = one_by_one(x, weights, affines, chain.program, kernel)
    for last in (False, True):
        results = ops.conv_stack_taps(x, weights, affines, chain.program, kernel, last)
        assert len(results) == sum(bool(step & TAP) for step in chain.program) + 1
        for result, tensor in zip(results, expected, strict=True):
            assert result.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            assert torch.equal(result, tensor)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("chain", TOGETHER, ids=lambda c: c.name)
def test_images_run_together_have_the_bits_of_each_alone(kernel, chain):
    x, weights, affines = packed(chain, kernel, native_dtype(kernel))
    x = torch.cat([x, x.flip(2), x.flip(3), x[:1] * 2])  # 7: for two threads one is left over
    for last in (False, True):
        results = ops.conv_stack_taps(x, weights, affines, chain.program, kernel, last)
        for image in range(len(x)):
            alone = ops.conv_stack_taps(x[image : image + 1], weights, affines, chain.program, kernel, last)
            assert all(torch.equal(a[0], r[image]) for a, r in zip(alone, results, strict=True))
    big = x.repeat(10, 1, 1, 1)  # more than are run together
    assert torch.equal(ops.conv_stack_taps(big, weights, affines, chain.program, kernel, True)[-1][63:], results[-1])


def workspace_bytes(x: Tensor, chain: Chain, weights: list[Tensor], affines: list[Tensor], kernel: str) -> int:
    """What a call allocates and frees again: one workspace for each image that is on its way at the same time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        ops.conv_stack_taps(x, weights, affines, chain.program, kernel, True)
    (call,) = [event for event in seen.events() if event.name == "vgg_fast::conv_stack_taps"]
    return -call.self_cpu_memory_usage - 64  # less the slack for aligning it


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("chain", [*TOGETHER, TAPS[0]], ids=lambda c: c.name)
def test_images_run_together_where_the_weights_are_larger_than_the_maps(kernel, chain):
    """One thread that runs image by image needs the workspace of one; together, all images need theirs at once."""
    x, weights, affines = packed(chain, kernel, native_dtype(kernel))
    torch.set_num_threads(1)
    one, seven, forty = (
        workspace_bytes(x[:1].expand(n, -1, -1, -1), chain, weights, affines, kernel) for n in (1, 7, 40)
    )
    # On cifar's 8x8 maps weights of 32 output channels are more than two maps, those of 16 are not.
    if chain is TAPS[0] or (chain.name == "cifar" and kernel.startswith(("avx2", "portable"))):
        assert one == seven == forty
    elif chain.name == "cifar" and "winograd" in kernel:
        assert seven > 7 * one, "all images share the transformed weights"
        assert forty > 20 * one
    else:
        assert (seven, forty) == (7 * one, 20 * one), "of 40 images 20 at a time"


def test_taps_are_what_the_reference_says():
    """On integers, so that the answers are exact: three layers of 2, 4 and 4 channels stay below 2**24."""
    x = testing.integer_tensor(2, 2, 9, 10, limit=4, seed=1)
    program = [RELU | TAP, RELU | POOL | TAP, POOL]
    plain = [
        (testing.integer_tensor(cout, cin, 3, 3, limit=1, seed=cout), torch.tensor([[1.0], [2.0]]).expand(2, cout))
        for cin, cout in ((2, 4), (4, 4), (4, 3))
    ]
    expected = reference.conv_stack_taps(x, *zip(*plain, strict=True), program)
    packs = [ops.pack(w, torch.full((len(w),), 2.0), None, None, None, None, 0.0, "portable_f32") for w, _ in plain]
    results = ops.conv_stack_taps(x, [p[0] for p in packs], [p[1] for p in packs], program, "portable_f32", False)
    assert [r.shape for r in results] == [e.shape for e in expected]
    assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True))


def test_taps_are_an_operator_like_any_other():
    x, weights, affines = packed(TAPS[1], "portable_f32", torch.float32)
    program = [int(step) for step in TAPS[1].program]
    torch.library.opcheck(ops.conv_stack_taps.default, (x, weights, affines, program, "portable_f32", True))


def test_conv_stack_itself_returns_no_taps():
    x, weights, affines = packed(TAPS[1], "portable_f32", torch.float32)
    with pytest.raises(RuntimeError, match="call conv_stack_taps"):
        ops.conv_stack(x, weights, affines, TAPS[1].program, "portable_f32", False)
