"""``conv3x3_weight_grad``: every kernel of the table by name, bit for bit on integers, within derived bounds else."""

from __future__ import annotations

import pytest
import torch

from vgg_fast import selection, testing

ops = torch.ops.vgg_fast
KERNELS = selection.cpu_kernels()
NAMES = ["rgb", "rgb_odd", "block", "wide", "deep", "ragged", "one_pixel", "one_row", "two"]


def operands(name: str, dtype: torch.dtype, integers: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, dy (dense in channels_last) and a weight."""
    s = testing.shape(name)
    sizes = (s.n, s.cin, s.h, s.w), (s.n, s.cout, s.h, s.w)
    if integers:
        x, dy = (testing.integer_tensor(*size, limit=4 - i, seed=i, dtype=dtype) for i, size in enumerate(sizes))
    else:
        x, dy = (testing.random_tensor(*size, seed=i, dtype=dtype) for i, size in enumerate(sizes))
    last = {"memory_format": torch.channels_last}
    return x.contiguous(**last), dy.contiguous(**last), torch.empty(s.cout, s.cin, 3, 3, dtype=dtype)


def method(kernel: str, x: torch.Tensor, dy: torch.Tensor) -> str:
    n, cin, h, w = x.shape
    return ops.cpu_weight_grad(kernel, str(x.dtype).removeprefix("torch."), n, cin, dy.shape[1], h, w)


def takes(kernel: str, dtype: torch.dtype) -> bool:
    return dtype is torch.float32 or "winograd" not in kernel


def test_the_method_belongs_to_the_kernel():
    """Asked for by name, also for instruction sets that this machine may lack."""
    x, dy, _ = operands("block", torch.float32)
    expected = {
        "amx_bf16": ("avx512 winograd", "amx"),
        "amx_bf16x3": ("avx512 winograd", "avx512"),
        "avx512_winograd_f32": ("avx512 winograd", "avx512"),
        "amx_bf16x6": ("avx512 winograd", "avx512"),
        "avx512_bf16": ("avx512 winograd", "avx512"),
        "avx512_f32": ("avx512", "avx512"),
        "avx2_winograd_f32": ("avx2 winograd", "avx2"),
        "avx2_f32": ("avx2", "avx2"),
        "portable_f32": ("portable", "portable"),
    }
    assert set(KERNELS) <= set(expected)
    for kernel in KERNELS:
        assert (method(kernel, x, dy), method(kernel, x.bfloat16(), dy.bfloat16())) == expected[kernel]
    thin, gradient, _ = operands("rgb", torch.float32)
    assert method("avx2_winograd_f32", thin, gradient) == "avx2"  # 3 channels are no block
    with pytest.raises(RuntimeError, match="kernel 'none' has no weight gradient"):
        ops.cpu_weight_grad("none", "float32", 1, 16, 16, 8, 8)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_bit_for_bit_and_random_values_within_bounds(kernel, dtype):
    if not takes(kernel, dtype):
        return
    methods = set()
    for name in NAMES:
        x, dy, weight = operands(name, dtype, integers=True)
        how = method(kernel, x, dy)
        methods.add(how)
        if "winograd" not in how:
            expected = testing.weight_grad(x.double(), dy.double())
            assert torch.equal(ops.conv3x3_weight_grad(x, dy, weight.float(), kernel).double(), expected), name
        x, dy, weight = operands(name, dtype)
        dw = ops.conv3x3_weight_grad(x, dy, weight, kernel)
        assert dw.dtype == dtype
        bound = testing.weight_grad_bound(x, dy, dtype, winograd="winograd" in how)
        testing.assert_within(dw, testing.weight_grad(x.double(), dy.double()), bound, f"{kernel} {name} {how}")
    direct = {m for m in methods if "winograd" not in m}
    assert len(direct) == 1
    assert len(methods) == (
        2 if dtype is torch.float32 and method(kernel, *operands("block", dtype)[:2]) not in direct else 1
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_pytorchs(dtype):
    x, dy, weight = operands("block", dtype)
    exact = testing.weight_grad(x.double(), dy.double())
    ours = testing.relative_error(ops.conv3x3_weight_grad(x, dy, weight, "auto"), exact)
    # The larger of PyTorch's two, as in the contests.
    theirs = (testing.weight_grad(x, dy), testing.weight_grad(x.contiguous(), dy.contiguous()))
    assert ours <= 2 * max(testing.relative_error(dw, exact) for dw in theirs)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k in ("amx_bf16", "avx512_winograd_f32", "avx2_f32")])
def test_same_bits_for_any_number_of_threads(kernel):
    """Also with several slots and bands: 57x61 pixels of 4 images are 960 tiles and 28 chunks of AMX."""
    dtype = torch.bfloat16 if kernel == "amx_bf16" else torch.float32
    x = testing.random_tensor(4, 48, 57, 61, dtype=dtype).contiguous(memory_format=torch.channels_last)
    dy = testing.random_tensor(4, 32, 57, 61, seed=1, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight, threads = torch.empty(32, 48, 3, 3), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(ops.conv3x3_weight_grad(x, dy, weight, kernel))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])
    winograd = "winograd" in method(kernel, x, dy)
    bound = testing.weight_grad_bound(x, dy, torch.float32, winograd=winograd)
    testing.assert_within(results[0], testing.weight_grad(x.double(), dy.double()), bound, kernel)


@pytest.mark.parametrize(
    "kernel", [k for k in KERNELS if k in ("amx_bf16", "avx512_winograd_f32", "avx2_winograd_f32")]
)
def test_infinities_do_not_spread_and_large_values_do_not_overflow(kernel):
    dtype = torch.bfloat16 if kernel == "amx_bf16" else torch.float32
    x, dy, weight = operands("block", dtype, integers=True)
    assert method(kernel, x, dy) in ("amx", "avx512 winograd", "avx2 winograd")
    dy = dy.abs() + 1  # inf times 0 would be NaN
    x[0, 5, 9, 9] = float("inf")
    expected = testing.weight_grad(x.double(), dy.double())
    dw = ops.conv3x3_weight_grad(x, dy, weight, kernel)
    assert torch.equal(dw.isinf(), expected.isinf())
    assert dw.isinf().any()
    assert dw.isfinite().any()
    x[0, 5, 9, 9] = 3e38
    dy[0, :, 8:11, 8:11] = 2.0**-20
    assert ops.conv3x3_weight_grad(x, dy, weight, kernel).isfinite().all()


def test_the_result_has_the_memory_format_of_the_weight():
    x, dy, weight = operands("ragged", torch.float32, integers=True)
    last = weight.contiguous(memory_format=torch.channels_last)
    plain, strided = (ops.conv3x3_weight_grad(x, dy, w, "auto") for w in (weight, last))
    assert plain.is_contiguous()
    assert strided.stride() == last.stride()
    assert torch.equal(plain, strided)


def test_opcheck_and_refusals():
    x, dy, weight = operands("two", torch.float32)
    kernel = selection.choose(torch.float32, x.device)
    torch.library.opcheck(ops.conv3x3_weight_grad.default, (x, dy, weight, kernel))
    torch.library.opcheck(ops.pack_transposed.default, (weight, kernel))
    with pytest.raises(RuntimeError, match="dense in channels_last"):
        ops.conv3x3_weight_grad(x.contiguous(), dy, weight, "auto")
    with pytest.raises(RuntimeError, match=r"weight must be \[17, 33, 3, 3\]"):
        ops.conv3x3_weight_grad(x, dy, weight[:, 1:], "auto")
    with pytest.raises(RuntimeError, match="one dtype and one size"):
        ops.conv3x3_weight_grad(x, dy.bfloat16(), weight, "auto")


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_transposed_pack_is_that_of_the_turned_weight(kernel):
    for cout, cin in ((40, 37), (64, 3), (3, 64)):
        weight = testing.random_tensor(cout, cin, 3, 3)
        turned = ops.pack(weight.flip(2, 3).transpose(0, 1), None, None, None, None, None, 0.0, kernel)[0]
        for each in (weight, weight.contiguous(memory_format=torch.channels_last)):
            assert torch.equal(ops.pack_transposed(each, kernel), turned)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_gradient_of_the_input_packs_for_itself(kernel):
    """The bits of a transposed pack and a chain of one, whatever was left in the memory that it packs into."""
    dtype = torch.bfloat16 if kernel.endswith("bf16") else torch.float32
    for cout, cin in ((64, 64), (40, 37), (3, 64)):
        dy = testing.random_tensor(3, cout, 9, 12, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight = testing.random_tensor(cout, cin, 3, 3, seed=1, dtype=dtype)
        affine = torch.stack([torch.ones(cin), torch.zeros(cin)])
        for each in (weight, weight.contiguous(memory_format=torch.channels_last)):
            packed = ops.pack_transposed(each, kernel)
            expected = ops.conv_stack(dy, [packed], [affine], [0], kernel, True)
            assert torch.equal(ops.conv3x3_input_grad(dy, each, kernel, True), expected)
    torch.library.opcheck(ops.conv3x3_input_grad.default, (dy, weight, kernel, False))
    with pytest.raises(RuntimeError, match=r"weight \[Cout, Cin, 3, 3\] of the same dtype"):
        ops.conv3x3_input_grad(dy[:, :2], weight, kernel, True)
