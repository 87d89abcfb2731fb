"""conv3x3 and conv_stack on shapes, layouts and thread counts that nobody thought of.

Integers only: every order of summation is exact on them, so that any difference at all is an error.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vgg_fast import reference, selection, testing

ops = torch.ops.vgg_fast
# The same examples in every run: a failure that comes and goes helps nobody. The fixture that hypothesis would complain
# of is conftest's, which may as well run once for all the examples.
same_every_time = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def runnable() -> list[tuple[str, torch.dtype]]:
    """Every kernel of this machine that is exact on integers (Winograd's are not), with every dtype it takes."""
    pairs = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        problem = selection.problem_on(dtype, torch.device("cpu"))
        for kernel in selection.cpu_kernels():
            if "winograd" in kernel:
                continue
            try:
                pairs.append((selection.select(problem, kernel), dtype))
            except RuntimeError:
                continue
    return pairs


# Mostly near the edges of a block of 16 or 32 channels, or of a register block.
channels = st.one_of(st.integers(1, 5), st.sampled_from([15, 16, 17, 31, 32, 33, 48, 63, 64, 65]), st.integers(1, 80))
sides = st.one_of(st.integers(1, 6), st.integers(1, 34))
layouts = st.sampled_from(["nchw", "channels_last", "sliced", "every_other_row", "expanded_batch"])
threads = st.integers(1, 4)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same shape with other strides; `expanded_batch` repeats the first image."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.nn.functional.pad(x, (1, 2, 3, 1))[:, :, 3:-1, 1:-2]
    if layout == "every_other_row":
        return x.repeat_interleave(2, 2)[:, :, ::2]
    return x[:1].expand_as(x) if layout == "expanded_batch" else x


def test_there_is_something_to_draw_from():
    assert ("portable_f32", torch.float32) in runnable()


@given(data=st.data())
@settings(same_every_time, max_examples=500)
def test_a_convolution_is_the_references_bit_for_bit(data):
    kernel, dtype = data.draw(st.sampled_from(runnable()))
    n, cin, cout = data.draw(st.integers(0, 5)), data.draw(channels), data.draw(channels)
    h, w = data.draw(sides), data.draw(sides)
    relu, pool = data.draw(st.booleans()), min(h, w) >= 2 and data.draw(st.booleans())
    x = laid_out(testing.integer_tensor(n, cin, h, w, limit=4, dtype=dtype), data.draw(layouts))
    weight = testing.integer_tensor(cout, cin, 3, 3, limit=2, seed=1, dtype=dtype)
    if data.draw(st.booleans()):
        weight = weight.contiguous(memory_format=torch.channels_last)
    bias = testing.integer_tensor(cout, limit=4, seed=2, dtype=dtype) if data.draw(st.booleans()) else None
    torch.set_num_threads(data.draw(threads))
    y = ops.conv3x3(x, weight, bias, relu, pool, kernel)
    wide = None if bias is None else bias.double()
    expected = reference.conv3x3(x.double(), weight.double(), wide, relu, pool)
    assert torch.equal(y, expected.to(dtype))
    # As PyTorch lays it out; the strides of an empty tensor and of sizes of 1 say nothing.
    theirs = reference.conv3x3(x, weight, bias, relu, pool).stride()
    assert [d for d in range(4) if n and y.shape[d] > 1 and y.stride(d) != theirs[d]] == []


@given(data=st.data())
@settings(same_every_time, max_examples=250)
def test_a_chain_is_its_steps_bit_for_bit(data):
    """In any batch and by any number of threads; the steps are also checked against the reference."""
    kernel, dtype = data.draw(st.sampled_from(runnable()))
    n, h, w = data.draw(st.integers(1, 5)), data.draw(sides), data.draw(sides)
    widths = data.draw(st.lists(channels, min_size=2, max_size=5))
    last = data.draw(st.booleans())
    x = laid_out(testing.integer_tensor(n, widths[0], h, w, limit=2, dtype=dtype), data.draw(layouts))
    torch.set_num_threads(data.draw(threads))
    packs, program, step = [], [], x
    for i, (cin, cout) in enumerate(pairwise(widths)):
        flags = data.draw(st.integers(0, 3)) & (3 if min(step.shape[2:]) >= 2 else 1)
        # Few nonzero weights: the sums stay integers that fp16 and bf16 hold at least to within one rounding.
        weight = testing.integer_tensor(cout, cin, 3, 3, limit=1, seed=i, dtype=dtype)
        weight = weight * (testing.integer_tensor(cout, cin, 3, 3, limit=4, seed=50 + i, dtype=dtype) == 0)
        packs.append(ops.pack(weight, None, None, None, None, None, 0.0, kernel))
        program.append(flags)
        before = step.bfloat16() if kernel.endswith("bf16") else step  # all that a single bf16 value holds of fp32
        step = ops.conv_stack(step, [packs[-1][0]], [packs[-1][1]], [flags], kernel, last)
        # Later inputs are larger: only kernels that keep every bit of them are exact.
        if i == 0 or testing.product_error(kernel, dtype) == 0:
            expected = reference.conv3x3(before.double(), weight.double(), None, bool(flags & 1), bool(flags & 2))
            assert torch.equal(step, expected.to(dtype))
    weights, affines = [p[0] for p in packs], [p[1] for p in packs]
    assert torch.equal(ops.conv_stack(x, weights, affines, program, kernel, last), step)
    torch.set_num_threads(data.draw(threads))
    assert torch.equal(ops.conv_stack(x, weights, affines, program, kernel, not last), step)
    some = data.draw(st.integers(0, n - 1))
    assert torch.equal(ops.conv_stack(x[some : some + 1], weights, affines, program, kernel, last)[0], step[some])


@given(data=st.data())
@settings(same_every_time, max_examples=100)
def test_the_pool_alone_is_pytorchs(data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    size = (
        data.draw(st.integers(0, 4)),
        data.draw(channels),
        data.draw(st.integers(2, 20)),
        data.draw(st.integers(2, 20)),
    )
    x = laid_out(testing.integer_tensor(*size, limit=9, dtype=dtype), data.draw(layouts))
    torch.set_num_threads(data.draw(threads))
    assert torch.equal(ops.maxpool2x2(x), torch.nn.functional.max_pool2d(x, 2))
