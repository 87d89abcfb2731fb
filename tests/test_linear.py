"""Fully connected layers: every kernel by name, against the specification, to the bit where that can be asked."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from stacks import CPU, ratios

from vgg_fast import reference, selection, testing
from vgg_fast.ops.linear import PACKING

ops = torch.ops.vgg_fast
KERNELS = selection.linear_kernels()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtypes_of(kernel: str) -> list[torch.dtype]:
    """What this kernel takes on this machine, or a skip that says what the machine lacks."""
    found = []
    for dtype in DTYPES:
        try:
            selection.select_linear(selection.problem_on(dtype, CPU), kernel)
            found.append(dtype)
        except RuntimeError as error:
            if "needs the CPU flags" in str(error):
                pytest.skip(str(error))
    return found


def weights_for(kernel: str, weight: torch.Tensor) -> torch.Tensor:
    return ops.linear_pack(weight, kernel) if weight.dtype == torch.float32 and kernel in PACKING else weight


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", testing.LINEARS)
def test_integers_are_exact(kernel, name):
    for dtype in dtypes_of(kernel):
        x, weight, bias = testing.linear_inputs(name, dtype, integers=True)
        packed = weights_for(kernel, weight)
        for b, relu in ((None, False), (bias, True)):
            expected = reference.linear(x.double(), weight.double(), None if b is None else b.double(), relu).to(dtype)
            assert torch.equal(ops.linear(x, packed, b, relu, kernel), expected), (dtype, relu)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["nothing_divides", "parts", "many_images"])
def test_within_the_derived_bound(kernel, name):
    for dtype in dtypes_of(kernel):
        x, weight, bias = testing.linear_inputs(name, dtype, integers=False)
        y = ops.linear(x, weights_for(kernel, weight), bias, False, kernel)
        bound = testing.linear_bound(x, weight, bias, kernel)
        testing.assert_within(y, reference.linear(x.double(), weight.double(), bias.double()), bound, kernel)


def test_error_is_no_larger_than_pytorchs():
    """At `highest` not twice PyTorch's own; in bf16 and fp16, whose results are rounded once, not larger at all."""
    for dtype, factor in ((torch.float32, 2.0), (torch.bfloat16, 1.001), (torch.float16, 1.001)):
        x = testing.random_tensor(2, 25088).relu().to(dtype)
        weight = (testing.random_tensor(64, 25088, seed=1) * (2 / 25088) ** 0.5).to(dtype)
        exact = F.linear(x.double(), weight.double())
        ours = ops.linear(x, weight, None, False, selection.choose_linear(dtype, CPU))
        theirs = testing.relative_error(F.linear(x, weight), exact)
        assert testing.relative_error(ours, exact) <= factor * theirs, dtype


@pytest.mark.parametrize("kernel", KERNELS)
def test_same_bits_for_any_batch_position_and_threads(kernel):
    for dtype in dtypes_of(kernel):
        x = testing.random_tensor(140, 1100, dtype=dtype)
        weight = weights_for(kernel, testing.random_tensor(150, 1100, seed=1, dtype=dtype))
        torch.set_num_threads(1)
        expected = ops.linear(x, weight, None, True, kernel)
        for threads, (first, n) in itertools.product((1, 2, 5), ((0, 1), (7, 2), (3, 3), (1, 16), (20, 33), (0, 140))):
            torch.set_num_threads(threads)
            part = ops.linear(x[first : first + n], weight, None, True, kernel)
            assert torch.equal(part, expected[first : first + n]), (dtype, threads, n)


@pytest.mark.parametrize("kernel", KERNELS)
def test_infinities_and_nan_go_through_as_in_pytorch(kernel):
    for dtype in dtypes_of(kernel):
        x = testing.integer_tensor(20, 40, limit=3, dtype=dtype)
        weight = testing.integer_tensor(33, 40, limit=3, seed=1, dtype=dtype)
        x[0, 3], x[5, 39], x[6, 0] = float("inf"), float("nan"), float("-inf")
        weight[2, 3], weight[31, 39], weight[32, 7] = float("nan"), float("inf"), float("-inf")
        for relu in (False, True):
            expected = reference.linear(x.double(), weight.double(), None, relu).to(dtype)
            y = ops.linear(x, weights_for(kernel, weight), None, relu, kernel)
            assert torch.equal(y.nan_to_num(nan=77.0), expected.nan_to_num(nan=77.0)), dtype


@pytest.mark.parametrize("kernel", KERNELS)
def test_denormals_cost_no_time(kernel):
    """As test_denormals.py has it of convolutions."""
    dtype = dtypes_of(kernel)[0]
    torch.set_num_threads(1)
    x, weight = testing.random_tensor(1, 512), testing.random_tensor(256, 512, seed=1)
    pairs = {}
    for name, of_x, of_weight in (("weights", 1.0, 1e-38), ("inputs", 1e-39, 1.0), ("products", 1e-20, 1e-19)):
        operands = [
            ((x * a).to(dtype), weights_for(kernel, (weight * b).to(dtype))) for a, b in ((of_x, of_weight), (1, 1))
        ]
        pairs[name] = tuple(lambda a=a, b=b: ops.linear(a, b, None, False, kernel) for a, b in operands)
    found = ratios(pairs)
    assert max(found.values()) < 1.5, found


def test_packed_weights_hold_what_they_promise():
    weight = testing.random_tensor(7, 37)
    weight[0, :6] = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.4028234e38, -0.0, 1.0 + 2.0**-16])
    kernels = [k for k in PACKING if torch.float32 in dtypes_of(k)]
    for kernel in kernels:
        packed = ops.linear_pack(weight, kernel)
        assert packed.nbytes <= 2 * weight.nbytes
        # An identity matrix reads the weights out again.
        back = ops.linear(torch.eye(37), packed, None, False, kernel).T
        finite = weight.isfinite().all(1)
        off = ((back - weight) / weight)[finite].abs().max()
        assert off <= {"amx_bf16": 2.0**-8, "avx512_f24": 2.0**-16}[kernel]
    assert kernels, "no kernel here packs"
    y = ops.linear(torch.ones(1, 1), ops.linear_pack(weight[:1, 3:4], kernels[-1]), None, False, kernels[-1])
    assert y.isfinite().all(), "the largest numbers are cut off, not rounded up to infinity"


def test_inputs_of_any_layout():
    weight, bias = testing.integer_tensor(24, 30, limit=2), testing.integer_tensor(24, limit=4)
    wide = testing.integer_tensor(4, 3, 60, limit=4, seed=5)
    views = (wide[0, 0, :30], wide[:, :, 1::2], wide.transpose(0, 1)[..., 30:], wide[:2, 0, :30].expand(2, 30))
    for x in (*views, wide[:0, :, :30]):
        y = ops.linear(x, weight, bias, True, "auto")
        assert torch.equal(y, reference.linear(x, weight, bias, True))
        assert y.is_contiguous()
    for rows in (weight[::2], testing.integer_tensor(24, 50, limit=2)[:, 11:41]):  # rows with gaps between them
        assert torch.equal(ops.linear(wide[0, :, :30], rows), F.linear(wide[0, :, :30], rows))


def test_opcheck():
    x, weight, bias = testing.linear_inputs("nothing_divides")
    for dtype in DTYPES:
        args = (x.to(dtype), weight.to(dtype), bias.to(dtype), True)
        torch.library.opcheck(ops.linear.default, (*args, selection.choose_linear(dtype, CPU)))
    for kernel in PACKING:
        if kernel in KERNELS and torch.float32 in dtypes_of(kernel):
            torch.library.opcheck(ops.linear_pack.default, (weight, kernel))
            torch.library.opcheck(ops.linear.default, (x, ops.linear_pack(weight, kernel), bias, True, kernel))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w, b: ops.linear(x[:, :3], w, b), r"weight must be \[out, 3\] for this x and kernel \w+, got 37"),
        (lambda x, w, b: ops.linear(x, w.half(), b), "reads weights of this x as they are, in the dtype of x"),
        (lambda x, w, b: ops.linear(x, w, b[:4]), "bias must have 53 elements, one per row"),
        (lambda x, w, b: ops.linear(x, w.T.contiguous().T, b), "must be dense .stride 1., not of stride 53"),
        (lambda x, w, b: ops.linear(x[0, 0], w, b), "got a scalar"),
        (lambda x, w, b: ops.linear(x, w, b, False, "fast"), "there is no linear kernel 'fast'; the kernels are auto"),
        (lambda x, w, b: ops.linear_pack(w, "portable_f32"), "portable_f32 reads these weights as they are"),
        (lambda x, w, b: ops.linear_pack(b, "avx512_f24"), r"must be \[out, in\], got 1 dimensions"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(*testing.linear_inputs("nothing_divides"))


# --- which kernel ---------------------------------------------------------------------------------------------------

AVX2 = "avx2 fma f16c"
AVX512 = AVX2 + " avx512f avx512bw avx512vl avx512dq"
AMX = AVX512 + " amx_tile amx_bf16"


@pytest.mark.parametrize(
    ("flags", "highest", "high", "medium", "half", "bf16"),
    [
        ("", *("portable_f32",) * 5),
        (AVX2, *("avx2_f32",) * 5),
        (AVX512, "avx512_f32", "avx512_f24", "avx512_f24", "avx512_f32", "avx512_f32"),
        (AMX, "avx512_f32", "avx512_f24", "amx_bf16", "avx512_f32", "amx_bf16"),
    ],
)
def test_the_kernel_by_flags(flags, highest, high, medium, half, bf16):
    def chosen(dtype: torch.dtype, precision: str = "highest") -> str:
        return selection.select_linear(selection.Problem(dtype, "cpu", flags, precision))

    settings = ("highest", "high", "medium")
    assert [chosen(torch.float32, precision) for precision in settings] == [highest, high, medium]
    assert {chosen(torch.float16, precision) for precision in settings} == {half}
    assert {chosen(torch.bfloat16, precision) for precision in settings} == {bf16}


def test_a_named_kernel_runs_or_raises():
    problem = selection.Problem(torch.float32, "cpu", AVX512)
    assert selection.select_linear(problem, "avx2_f32") == "avx2_f32"
    assert selection.select_linear(problem, "avx512_winograd_f32") == "avx512_f32"  # a name of convolutions only
    assert selection.select_linear(problem, "triton") == selection.REFERENCE
    with pytest.raises(RuntimeError, match="'amx_bf16' needs the CPU flags 'amx_tile amx_bf16'"):
        selection.select_linear(problem, "amx_bf16")
    with pytest.raises(RuntimeError, match="'avx512_f24' cannot hold float16 tensors"):
        selection.select_linear(selection.Problem(torch.float16, "cpu", AVX512), "avx512_f24")
    with pytest.raises(RuntimeError, match=r"takes float32, bfloat16, float16, not torch.float64"):
        selection.select_linear(selection.Problem(torch.float64, "cpu", AVX512), "cpu")
