"""All ops: opcheck (schema, fake, autograd, compile), torch.compile and export; the pool, pack, stack, fingerprint."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from vgg_fast import fold, reference, selection, testing

ops = torch.ops.vgg_fast
KERNELS = selection.cpu_kernels()


def native_dtype(kernel: str) -> torch.dtype:
    return torch.bfloat16 if kernel.endswith("bf16") else torch.float32


def packed_chain(kernel: str, channels: list[int], dtype: torch.dtype, batchnorm: bool = True):
    """Random weights for a chain of convolutions: plain ``(weight, bn vectors)`` and what pack makes of them."""
    plain, weights, affines = [], [], []
    for i, (cin, cout) in enumerate(pairwise(channels)):
        weight = (testing.random_tensor(cout, cin, 3, 3, seed=i) * (2 / (9 * cin)) ** 0.5).to(dtype)
        bias, mean, gamma, beta = (testing.random_tensor(cout, seed=10 * i + j) for j in range(4))
        var = testing.random_tensor(cout, seed=10 * i + 5).square() + 0.1
        bn = (mean, var, gamma, beta) if batchnorm else (None,) * 4
        args = (weight, bias.to(dtype), *bn, 1e-5)
        packed, affine = ops.pack(*args, kernel)
        plain.append(args)
        weights.append(packed)
        affines.append(affine)
    return plain, weights, affines


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(dtype, channels_last):
    x, weight, bias = testing.conv_inputs(testing.shape("two"), dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    for relu, pool in ((False, False), (True, True)):
        torch.library.opcheck(ops.conv3x3.default, (x, weight, bias, relu, pool))
        leaves = tuple(t.clone().requires_grad_() for t in (x, weight, bias))
        torch.library.opcheck(ops.conv3x3.default, (*leaves, relu, pool))
    torch.library.opcheck(ops.maxpool2x2.default, (x,))
    torch.library.opcheck(ops.maxpool2x2.default, (x.clone().requires_grad_(),))
    kernel = selection.choose(dtype, x.device)
    vectors = [testing.random_tensor(17, seed=i).abs() for i in range(4)]
    torch.library.opcheck(ops.pack.default, (weight, bias, *vectors, 1e-5, kernel))
    packed, affine = ops.pack(weight, bias, *vectors, 1e-5, kernel)
    torch.library.opcheck(ops.conv_stack.default, (x, [packed], [affine], [3], kernel, channels_last))
    torch.library.opcheck(ops.fingerprint.default, ([x, weight, bias],), test_utils=("test_schema",))


def test_compile_and_export_keep_the_op():
    x, weight, bias = testing.conv_inputs(testing.shape("ragged"), integers=True)

    class Net(torch.nn.Module):
        def forward(self, x):
            return ops.maxpool2x2(ops.conv3x3(x, weight, bias, True, False))

    kernel = selection.choose(x.dtype, x.device)
    testing.assert_conv_close(Net()(x), x, weight, bias, relu=True, pool=True, kernel=kernel)
    expected = Net()(x)
    assert torch.equal(torch.compile(Net(), fullgraph=True, backend="aot_eager")(x), expected)
    exported = torch.export.export(Net(), (x,))
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert called == ["vgg_fast.conv3x3.default", "vgg_fast.maxpool2x2.default"]
    assert torch.equal(exported.module()(x), expected)


# maxpool2x2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_maxpool_is_pytorchs(dtype, channels_last):
    x = testing.integer_tensor(2, 37, 13, 10, limit=3, dtype=dtype)
    x[0, 0, 0, 0] = x[0, 1, 3, 3] = x[1, 2, 4, 5] = x[1, 2, 5, 5] = float("nan")
    x[0, 3, 0, 0] = float("-inf")
    x[1, 5, :2, :2] = float("-inf")
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    expected, y = F.max_pool2d(x, 2), ops.maxpool2x2(x)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    assert y.stride() == expected.stride()


def test_maxpool_gradient_is_pytorchs_with_ties_and_is_deterministic():
    base = testing.integer_tensor(2, 8, 9, 12, limit=1)  # three values only: most windows have ties
    ours, theirs = base.clone().requires_grad_(), base.clone().requires_grad_()
    grad = testing.integer_tensor(2, 8, 4, 6, limit=5, seed=3)
    ops.maxpool2x2(ours).backward(grad)
    F.max_pool2d(theirs, 2).backward(grad)
    assert torch.equal(ours.grad, theirs.grad)


# pack and conv_stack


def test_pack_computes_the_affine_map_in_float64_and_moves_the_sign():
    (args,), _, (affine,) = packed_chain("portable_f32", [5, 40], torch.float32)
    sign, expected = fold.batchnorm_affine(40, *args[1:])
    assert (sign < 0).any()
    assert (affine[0] >= 0).all()
    # Two float64 programs rounded to fp32: equal but for the last bit.
    torch.testing.assert_close(affine, expected, rtol=2.0**-23, atol=0.0)
    weight, bias, mean, var, gamma, beta, eps = args
    x = testing.random_tensor(2, 5, 7, 8)
    batchnorm = F.batch_norm(F.conv2d(x, weight, bias, padding=1), mean, var, gamma, beta, eps=eps)
    signed = weight * sign[:, None, None, None]
    torch.testing.assert_close(reference.conv3x3_affine(x, signed, affine, False, False), batchnorm)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("batchnorm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stack_equals_its_steps_bit_for_bit(kernel, batchnorm, dtype):
    if kernel.endswith("bf16") and dtype is torch.float16:
        return
    if "winograd" in kernel and dtype is not torch.float32:
        return
    _, weights, affines = packed_chain(kernel, [3, 40, 64, 33, 48], dtype, batchnorm)
    x = testing.random_tensor(3, 3, 24, 21, dtype=dtype)
    program = [1, 3, 2, 1]
    for last in (False, True):
        y = ops.conv_stack(x, weights, affines, program, kernel, last)
        step = x
        for weight, affine, flags in zip(weights, affines, program, strict=True):
            step = ops.conv_stack(step, [weight], [affine], [flags], kernel, last)
        assert torch.equal(y, step)
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("kernel", KERNELS)
def test_few_channels_in_the_middle_of_a_stack(kernel):
    """1 to 3 input channels, which a first layer gathers into neighbourhoods, may also come later."""
    dtype = native_dtype(kernel)
    channels, program = [3, 1, 8, 2, 3, 16], [1, 0, 3, 0, 0]
    plain, packs = [], []
    for i, (cin, cout) in enumerate(pairwise(channels)):
        weight = testing.integer_tensor(cout, cin, 3, 3, limit=1, seed=i, dtype=dtype)
        plain.append((weight, torch.stack([torch.ones(cout), torch.zeros(cout)])))
        packs.append(ops.pack(weight, None, None, None, None, None, 0.0, kernel))
    x = testing.integer_tensor(2, 3, 9, 7, limit=1, dtype=dtype)
    # Sums of small integers are exact in fp32, so that both sides round the same values to bf16.
    expected = reference.conv_stack(x, *zip(*plain, strict=True), program)
    for last in (False, True):
        y = ops.conv_stack(x, [p[0] for p in packs], [p[1] for p in packs], program, kernel, last)
        assert torch.equal(y, expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("channels", [[15, 2, 15], [3, 3, 1, 2, 40]], ids=["one", "all"])
@pytest.mark.parametrize("last", [False, True])
def test_thin_layers_inside_a_chain(kernel, channels, last):
    """A kernel with a form of its own for first layers packs by Cin alone; inside a chain that form has to work too."""
    dtype = native_dtype(kernel)
    _, weights, affines = packed_chain(kernel, channels, dtype)
    program = [1, 3, 1, 0][: len(weights)]
    for n in (1, 4):
        x = step = testing.random_tensor(n, channels[0], 11, 8, dtype=dtype)
        for weight, affine, flags in zip(weights, affines, program, strict=True):
            step = ops.conv_stack(step, [weight], [affine], [flags], kernel, last)
        assert torch.equal(ops.conv_stack(x, weights, affines, program, kernel, last), step)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["rgb_odd", "ragged", "deep", "tall", "one_pixel"])
def test_batchnorm_epilogue_within_the_derived_bound(kernel, name):
    shape, dtype = testing.shape(name), native_dtype(kernel)
    (args,), weights, affines = packed_chain(kernel, [shape.cin, shape.cout], dtype)
    x = testing.random_tensor(shape.n, shape.cin, shape.h, shape.w, dtype=dtype)
    weight, bias, mean, var, gamma, beta, eps = (t.double() if isinstance(t, torch.Tensor) else t for t in args)
    pool = min(shape.h, shape.w) >= 2
    y = ops.conv_stack(x, weights, affines, [3 if pool else 1], kernel, False)
    expected = F.relu(F.batch_norm(F.conv2d(x.double(), weight, bias, padding=1), mean, var, gamma, beta, eps=eps))
    if pool:
        expected = F.max_pool2d(expected, 2)
    bound = testing.conv_bound(x, args[0], affines[0], pool=pool, kernel=kernel)
    testing.assert_within(y, expected, bound, f"{kernel} {name}")


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_scale_of_zero_still_shows_infinities(kernel):
    """0 * inf is NaN, also where the pool would have preferred a finite neighbour."""
    dtype = native_dtype(kernel)
    x = testing.integer_tensor(1, 4, 4, 4, limit=2, dtype=dtype)
    x[0, 0, 0, 0] = float("-inf")
    weight = torch.ones(16, 4, 3, 3, dtype=dtype)
    gamma = torch.ones(16)
    gamma[:3] = torch.tensor([0.0, -0.0, -2.0])
    vectors = (torch.zeros(16), torch.ones(16), gamma, torch.full((16,), 0.5))
    packed, affine = ops.pack(weight, None, *vectors, 0.0, kernel)
    y = ops.conv_stack(x, [packed], [affine], [2], kernel, False)
    batchnorm = F.batch_norm(F.conv2d(x.double(), weight.double(), padding=1), *(v.double() for v in vectors), eps=0.0)
    expected = F.max_pool2d(batchnorm, 2).to(dtype)
    assert expected[0, 0, 0, 0].isnan()
    assert torch.equal(y.nan_to_num(nan=99.0), expected.nan_to_num(nan=99.0))


def test_scale_in_the_epilogue_is_closer_than_scale_in_bf16_weights():
    """The measurement behind fold.py: multiplying the scale into bf16 weights rounds each of them a second time."""
    (args,), weights, affines = packed_chain("portable_f32", [64, 64], torch.bfloat16)
    x = testing.random_tensor(1, 64, 28, 28, dtype=torch.bfloat16)
    weight, bias, mean, var, gamma, beta, eps = args
    exact = F.batch_norm(
        F.conv2d(x.double(), weight.double(), bias.double(), padding=1),
        *(t.double() for t in (mean, var, gamma, beta)),
        eps=eps,
    )
    scale = gamma / (var + eps).sqrt()
    folded = (weight.float() * scale[:, None, None, None]).bfloat16()
    folded_bias = beta + (bias.float() - mean) * scale
    with_folding = F.conv2d(x.double(), folded.double(), padding=1) + folded_bias.double()[:, None, None]
    ours = ops.conv_stack(x, weights, affines, [0], "portable_f32", False)
    error = testing.relative_error(ours, exact)
    assert error < 0.9 * testing.relative_error(with_folding.bfloat16(), exact)


def test_stack_refuses_what_does_not_fit():
    _, weights, affines = packed_chain("portable_f32", [8, 16], torch.float32)
    x = torch.ones(1, 8, 4, 4)
    with pytest.raises(RuntimeError, match="1 weights and 1 affines for a program of 2 steps"):
        ops.conv_stack(x, weights, affines, [0, 0], "portable_f32", False)
    with pytest.raises(RuntimeError, match="weight 0 is not what pack"):
        ops.conv_stack(torch.ones(1, 32, 4, 4), weights, affines, [0], "portable_f32", False)
    with pytest.raises(RuntimeError, match="affine 0 must be a contiguous fp32 CPU tensor"):
        ops.conv_stack(x, weights, [affines[0].double()], [0], "portable_f32", False)
    with pytest.raises(RuntimeError, match="cannot be pooled"):
        ops.conv_stack(torch.ones(1, 8, 1, 1), weights, affines, [2], "portable_f32", False)


# fingerprint


def test_fingerprint_sees_every_dense_update_and_nothing_else():
    tensors = [
        testing.random_tensor(64, 64, 3, 3),
        testing.random_tensor(64),
        torch.zeros(4, dtype=torch.float64),
    ]
    before = ops.fingerprint(tensors)
    assert ops.fingerprint([t.clone() for t in tensors]) == before
    for tensor in tensors:
        saved = tensor.clone()
        tensor += 1e-3 * (1 + saved.abs())
        assert ops.fingerprint(tensors) != before
        tensor.copy_(saved)
        assert ops.fingerprint(tensors) == before
    # Every element of a small tensor, every filter and every input channel of a large weight.
    for part in (tensors[1][17], *tensors[0], *tensors[0].unbind(1)):
        part += 1
        assert ops.fingerprint(tensors) != before
        part -= 1


@pytest.mark.parametrize("size", [(1500, 900), (40, 3000), (3000, 40)])
def test_fingerprint_sees_every_row_and_column_of_a_matrix(size):
    matrix = testing.integer_tensor(*size, limit=100)  # so that adding and taking away gives the same again
    before = ops.fingerprint([matrix])
    torch.set_num_threads(1)
    assert ops.fingerprint([matrix]) == before
    for part in (*matrix[::7], matrix[-1], *matrix.unbind(1)[::7], matrix[:, -1]):
        part += 1
        assert ops.fingerprint([matrix]) != before
        part -= 1
    assert ops.fingerprint([matrix]) == before


def test_fingerprint_follows_strides():
    x = testing.random_tensor(40, 50)
    assert ops.fingerprint([x.t()]) == ops.fingerprint([x.t().contiguous()])


# torch.compile


def test_compile_and_export_keep_conv_stack_where_its_kernel_is_not_tritons():
    kernel = selection.choose(torch.float32, torch.device("cpu"))
    _, weights, affines = packed_chain(kernel, [3, 16, 24], torch.float32)
    x, program = testing.random_tensor(2, 3, 9, 8), [1 | 4, 1 | 2 | 4]
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    class Net(torch.nn.Module):
        def forward(self, x):
            return ops.conv_stack_taps(x, weights, affines, program, kernel, True)

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(Net(), fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    with torch.no_grad():
        for ours, expected in zip(compiled(x), Net()(x), strict=True):
            assert torch.equal(ours, expected)
    assert "vgg_fast.conv_stack_taps.default" in seen
    exported = torch.export.export(Net(), (x,))
    assert "vgg_fast.conv_stack_taps.default" in [str(node.target) for node in exported.graph.nodes]
