"""verify passes on every kernel of this machine, and fails on a kernel that is wrong in any one way."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from vgg_fast import gpu, reference, selection, testing
from vgg_fast.bench import peers
from vgg_fast.verify.checks import Interrupted, Ops, kernels, verify
from vgg_fast.verify.verdicts import Row

SHAPES = [testing.shape(name) for name in ("rgb_odd", "one_row", "two")]
GOOD = Ops()


def rows_of(ops: Ops, dtype=torch.float32, shapes=SHAPES) -> dict[str, Row]:
    """op -> row, of the kernel that auto takes; maxpool2x2 has no kernels to choose from and is not among them."""
    kernel = selection.choose(dtype, torch.device("cpu"))
    return {row.op: row for row in verify(only=[kernel], shapes=shapes, dtypes=[dtype], checked=ops)}


def test_every_kernel_of_this_machine_is_right():
    seen = []
    rows = verify(shapes=SHAPES, on_progress=lambda done, total: seen.append((done, total)))
    assert not [miss for row in rows for miss in row.misses]
    assert seen == [(i + 1, 9) for i in range(9)]
    for dtype in ("float32", "bfloat16", "float16"):
        ran = {row.kernel for row in rows if row.dtype == dtype and row.op == "conv_stack" and row.problems}
        assert selection.choose(getattr(torch, dtype), torch.device("cpu")) in ran
        assert selection.cpu_kernels()[-1] in ran, "the portable kernel runs everywhere"
    for row in rows:
        assert row.result == ("not here" if row.absent else "ok")
        # With a pool and without, two memory formats: rgb_odd and two have 2x2 epilogues, one_row only two. Each once
        # more with a tap, which gives two results; and three chains.
        expected = {"conv3x3": (40, 20), "conv_stack": (83, 43), "linear": (32, 16)}.get(row.op, (12, 12))  # the pool
        assert (row.problems, row.exact) == ((0, 0) if row.absent else expected)
        assert 0 <= row.worst <= 1
        assert 0 <= row.worst_border <= 1


def corner(y: torch.Tensor) -> torch.Tensor:
    """One wrong pixel: last image, last channel, last row, last column."""
    y = y.clone()
    y[-1, -1, -1, -1] += 0.5
    return y


def test_a_wrong_corner_pixel_of_conv3x3_is_found():
    rows = rows_of(replace(GOOD, conv3x3=lambda *a: corner(GOOD.conv3x3(*a))))
    row = rows["conv3x3"]
    assert row.result == "MISS"
    assert row.worst_border > 1 >= row.worst, "on the border and nowhere else"
    assert len(row.misses) == row.problems, "integers and random numbers, with every epilogue"
    assert "1 of " in row.misses[0]
    assert rows["conv_stack"].result == "ok"


def test_a_wrong_corner_pixel_of_conv_stack_is_found():
    rows = rows_of(replace(GOOD, conv_stack=lambda *a: corner(GOOD.conv_stack(*a))), torch.bfloat16)
    assert rows["conv_stack"].result == "MISS"
    assert rows["conv_stack"].worst_border > 1 >= rows["conv_stack"].worst
    assert rows["conv3x3"].result == "ok"


@pytest.mark.parametrize("which", [0, 1])
def test_a_wrong_tap_and_a_wrong_result_behind_it_are_found(which):
    def wrong(*arguments):
        both = GOOD.conv_stack_taps(*arguments)
        both[which] = corner(both[which])
        return both

    row = rows_of(replace(GOOD, conv_stack_taps=wrong))["conv_stack"]
    assert len(row.misses) == 20, "ten epilogues, of integers and of random numbers"
    assert all(("tap and result" in miss) == bool(which) for miss in row.misses)


# Two layers as they follow each other in a network; the batch of 5 has either image at three and two places.
LAYERS = (peers.Layer("first", 3, 16, 12, True), peers.Layer("second", 16, 24, 6, False))
BATCHES = (1, 5)


def layer_rows(ops: Ops) -> dict[str, Row]:
    kernel = selection.choose(torch.float32, torch.device("cpu"))
    options = {"shapes": [], "layers": LAYERS, "batches": BATCHES, "dtypes": [torch.float32], "checked": ops}
    return {row.op: row for row in verify(only=[kernel], **options)}


def test_layers_of_a_network_at_their_real_size():
    rows = layer_rows(GOOD)
    assert {rows[f"layers, batch {n}"].result for n in BATCHES} == {"ok"}
    # The pooled layer has five results, each judged element by element and by the norm, and a second run; the other
    # layer has one result fewer; then comes the chain.
    assert rows["layers, batch 1"].problems == (2 * 5 + 1) + (2 * 4 + 1) + 1
    assert rows["layers, batch 5"].problems == (3 * 5 + 1) + (3 * 4 + 1) + 1, "and the bits at the other places"
    assert 0 < rows["layers, batch 5"].worst <= 1


def test_a_wrong_image_in_the_middle_of_a_batch_is_found():
    """A row of it only: the first two images, which float64 judges, are right."""

    def wrong(x, *rest):
        y = GOOD.conv_stack(x, *rest).clone()
        y[3:4, :, -1] = y[3:4, :, 0]
        return y

    rows = layer_rows(replace(GOOD, conv_stack=wrong))
    assert rows["layers, batch 1"].result == "ok"
    misses = rows["layers, batch 5"].misses
    assert any("images [3] have not the bits" in miss for miss in misses)
    assert rows["layers, batch 5"].worst <= 1


def test_tf32_that_passes_for_fp32_is_found_behind_thousands_of_terms():
    """The bound of the worst case is too wide there; the norm is not."""

    def lowered(x, *rest):
        return GOOD.conv_stack(peers.round_to_tf32(x, cut=True), *rest)

    deep = peers.Layer("deep", 512, 16, 4, False)
    options = {"shapes": [], "layers": [deep], "batches": (1,), "dtypes": [torch.float32]}
    rows = verify(only=["portable_f32"], checked=replace(GOOD, conv_stack=lowered), **options)
    (row,) = [row for row in rows if row.op == "layers, batch 1"]
    assert row.worst <= 1
    assert len(row.misses) == 1
    assert "relative error" in row.misses[0]


def test_bits_that_change_from_run_to_run_are_found():
    flips = iter([0.0, 1e-7] * 100)

    def unsteady(*arguments):
        return GOOD.conv_stack(*arguments) * (1 + next(flips))

    misses = layer_rows(replace(GOOD, conv_stack=unsteady))["layers, batch 1"].misses
    assert any("other bits when run again" in miss for miss in misses)


def test_what_does_not_fit_into_memory_is_no_miss_and_the_rest_goes_on():
    def large(x, *rest):
        if len(x) == 5:
            torch.empty(2**60)
        return GOOD.conv3x3(x, *rest)

    rows = layer_rows(replace(GOOD, conv3x3=large))
    row = rows["layers, batch 5"]
    assert row.unjudged == ["first, batch 5: out of memory", "second, batch 5: out of memory"]
    assert (row.result, row.misses, row.problems) == ("ok", [], 1), "the chain, which fits"
    assert rows["layers, batch 1"].unjudged == []


def test_a_lost_gpu_ends_the_checking_and_what_was_not_reached_says_so():
    def broken(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    kernel = selection.choose(torch.float32, torch.device("cpu"))
    options = {"shapes": SHAPES, "layers": LAYERS, "batches": (1,), "dtypes": [torch.float32]}
    rows = {row.op: row for row in verify(only=[kernel], checked=replace(GOOD, conv_stack=broken), **options)}
    assert rows["conv3x3"].result == "ok"
    assert len(rows["conv_stack"].misses) == 1
    assert "not reached: the GPU gave up at conv_stack" in rows["layers, batch 1"].absent


def test_ctrl_c_keeps_what_was_checked():
    def impatient(done, total):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stopped:
        verify(only=["portable_f32"], shapes=SHAPES, dtypes=[torch.float32], on_progress=impatient)
    by_op = {row.op: row for row in stopped.value.rows}
    assert by_op["conv3x3"].problems == 16, "the first shape only"


@pytest.mark.parametrize("op", ["maxpool2x2", "maxpool2x2_backward"])
def test_a_wrong_corner_pixel_of_the_pool_and_of_its_gradient_is_found(op):
    wrong = replace(GOOD, **{op: lambda *tensors: corner(getattr(GOOD, op)(*tensors))})
    rows = verify(shapes=[testing.shape("two")], dtypes=[torch.float32], checked=wrong)
    assert {row.op for row in rows if row.result == "MISS"} == {op}


def test_a_wrong_output_of_linear_is_found():
    def last(*arguments):
        y = GOOD.linear(*arguments).clone()
        y[-1, -1] = 3 * y[-1, -1].abs() + 1
        return y

    rows = verify(shapes=[], dtypes=[torch.bfloat16], checked=replace(GOOD, linear=last))
    (found,) = [row for row in rows if row.kernel == "portable_f32" and row.op == "linear"]
    assert found.result == "MISS"
    assert len(found.misses) == found.problems


def test_an_error_inside_is_not_blamed_on_the_border():
    def inside(*arguments):
        y = GOOD.conv3x3(*arguments).clone()
        y[..., 1:-1, 1:-1] += 0.5
        return y

    row = rows_of(replace(GOOD, conv3x3=inside), shapes=[testing.shape("ragged")])["conv3x3"]
    assert row.worst > 1 >= row.worst_border


def test_padding_that_is_not_zero_is_found():
    """The classic mistake at a border: the edge repeated instead of zeros."""

    def replicated(x, weight, bias, relu, pool, kernel):
        padded = torch.nn.functional.pad(x.float(), (1, 1, 1, 1), mode="replicate")
        y = torch.nn.functional.conv2d(padded, weight.float(), bias.float())
        y = y.relu() if relu else y
        return (reference.maxpool2x2(y) if pool else y).to(x.dtype)

    row = rows_of(replace(GOOD, conv3x3=replicated), shapes=[testing.shape("block")])["conv3x3"]
    assert row.worst_border > 1 >= row.worst


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_kernel_that_is_wrong_in_one_memory_format_is_found(memory_format):
    def wrong(x, *rest):
        y = GOOD.conv3x3(x, *rest)
        return corner(y) if x.is_contiguous(memory_format=memory_format) else y

    row = rows_of(replace(GOOD, conv3x3=wrong), shapes=[testing.shape("ragged")])["conv3x3"]
    assert len(row.misses) == row.problems / 2
    assert all(("channels_last" in miss) == (memory_format is torch.channels_last) for miss in row.misses[:4])


def test_a_lost_sign_of_the_batch_norm_is_found():
    def unsigned(weight, bias, mean, var, gamma, *rest):
        return GOOD.pack(weight, bias, mean, var, None if gamma is None else gamma.abs(), *rest)

    rows = rows_of(replace(GOOD, pack=unsigned))
    assert rows["conv_stack"].result == "MISS"


def test_a_chain_that_does_not_round_between_its_steps_is_found():
    def wide(x, weights, affines, program, kernel, last):
        if len(program) == 1:
            return GOOD.conv_stack(x, weights, affines, program, kernel, last)
        return GOOD.conv_stack(x, weights, affines, program, kernel, last).nextafter(x.new_tensor(math.inf))

    misses = rows_of(replace(GOOD, conv_stack=wide))["conv_stack"].misses
    assert len(misses) == len(SHAPES)
    assert all("chain of three" in miss for miss in misses)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: y * math.nan, "elements"),
        (lambda y: y.double(), "float64"),
        (lambda y: y[..., :-1], "instead of"),
    ],
    ids=["NaN", "dtype", "shape"],
)
def test_nan_another_dtype_and_another_shape_are_found(spoil, message):
    row = rows_of(replace(GOOD, conv3x3=lambda *a: spoil(GOOD.conv3x3(*a))))["conv3x3"]
    assert row.result == "MISS"
    assert any(message in miss for miss in row.misses)


def test_an_op_that_raises_is_a_miss_and_the_others_are_still_checked():
    def broken(*arguments):
        raise RuntimeError("out of registers\nand a long trace")

    rows = rows_of(replace(GOOD, pack=broken))
    assert rows["conv_stack"].result == "MISS"
    assert rows["conv_stack"].misses[0].endswith("RuntimeError: out of registers")
    assert rows["conv3x3"].result == "ok"


def test_a_kernel_beyond_the_cap_is_absent_with_the_reason(monkeypatch):
    monkeypatch.setenv("VGG_FAST_ISA", "portable")
    rows = verify(shapes=[testing.shape("two")], dtypes=[torch.float32])
    by_kernel = {row.kernel: row for row in rows if row.op == "conv3x3"}
    assert by_kernel["portable_f32"].result == "ok"
    for name in selection.cpu_kernels()[:-1]:
        assert by_kernel[name].result == "not here"
        assert name in by_kernel[name].absent


def test_a_kernel_that_failed_its_self_test_is_a_miss_and_not_merely_absent(monkeypatch):
    monkeypatch.setattr(selection, "_switched_off", {})
    selection.switch_off("portable_f32", torch.device("cpu"), "3 of 384 values differ")
    rows = verify(only=["portable_f32"], shapes=[testing.shape("two")], dtypes=[torch.float32])
    (row,) = [row for row in rows if row.op == "conv3x3"]
    assert row.result == "MISS"
    assert row.misses == ["switched off: 3 of 384 values differ"]


def test_only_the_named_kernels():
    rows = verify(only=["portable_f32"], shapes=[testing.shape("two")], dtypes=[torch.float32])
    names = ("linear", "conv3x3", "conv_stack")
    assert [(row.op, row.kernel) for row in rows] == [(name, "portable_f32") for name in names]


def test_unknown_names_say_what_there_is():
    with pytest.raises(gpu.Unavailable, match=f"no kernel 'neon'.*{kernels('cpu')[0]}"):
        verify(only=["neon"])
    with pytest.raises(gpu.Unavailable, match="cpu or cuda"):
        verify("tpu")


@pytest.mark.skipif(gpu.lacking() is None, reason="this machine has a CUDA device")
def test_cuda_without_a_gpu_is_said_clearly():
    with pytest.raises(gpu.Unavailable, match="no CUDA device"):
        verify("cuda")
