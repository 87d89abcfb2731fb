"""The gradient of a chain of constants: masks as eager PyTorch decides them, the bits of its steps one by one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from test_conv_stack import Chain, native_dtype
from torch import Tensor

from vgg_fast import selection, testing
from vgg_fast.ops import conv_stack_backward as op
from vgg_fast.reference import Step

ops = torch.ops.vgg_fast
KERNELS = selection.cpu_kernels()
RELU, POOL, NONE = Step.RELU, Step.POOL, Step.NONE

CHAINS = (
    Chain("vgg", (3, 32, 48, 64), 12, 20, (RELU, RELU | POOL, RELU | POOL), "as in a VGG, also for Winograd"),
    Chain("odd", (5, 20, 33, 3, 17), 15, 13, (RELU | POOL, NONE, POOL, RELU), "odd maps, a pool without ReLU, no mask"),
    Chain("strips", (3, 64, 64), 97, 115, (RELU, RELU | POOL), "forward, two threads write the rows at a seam"),
    Chain("up", (64, 64, 3), 97, 115, (RELU, NONE), "backward, the first two layers run in strips"),
)
SMALL = CHAINS[:2]


@dataclass(frozen=True)
class Problem:
    """Packs, plain weights and the x of a chain."""

    x: Tensor
    plain: list[Tensor]
    weights: list[Tensor]
    affines: list[Tensor]
    transposed: list[Tensor]
    factors: list[Tensor]
    program: list[int]
    kernel: str

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        *masks, y = ops.conv_stack_masks(x, self.weights, self.affines, self.program, self.kernel, True)
        return y, masks

    def backward(self, dy: Tensor, masks: list[Tensor], channels_last: bool = True) -> Tensor:
        size = [dy.shape[0], *self.x.shape[1:]]
        rest = self.program, size, self.kernel, channels_last
        return ops.conv_stack_backward(dy, self.transposed, self.factors, masks, *rest)


def problem(chain: Chain, kernel: str, dtype: torch.dtype, integers: bool = False, n: int = 3) -> Problem:
    make = testing.integer_tensor if integers else testing.random_tensor
    limit = {"limit": 1} if integers else {}
    x = make(n, chain.channels[0], chain.h, chain.w, dtype=dtype, **limit)
    plain, weights, affines, transposed, factors = [], [], [], [], []
    for i, (cin, cout) in enumerate(zip(chain.channels, chain.channels[1:], strict=False)):
        weight = make(cout, cin, 3, 3, seed=i + 1, dtype=dtype, **limit)
        scale = torch.tensor([0.5, -1.0, 2.0, 1.0]).repeat(cout)[:cout]  # a batch norm's, one in four negative
        if integers:  # of one input channel each, so that four layers stay below 2**8
            weight *= F.one_hot(torch.arange(cout) * 7 % cin, cin)[:, :, None, None].to(dtype)
            scale = scale.sign()
        else:
            weight *= (2 / (9 * cin)) ** 0.5
        bn = [torch.zeros(cout), torch.ones(cout), scale, testing.integer_tensor(cout, limit=2, seed=i)]
        pack = ops.pack(weight, None, *bn, 0.0, kernel)
        plain.append(weight)
        weights.append(pack[0])
        affines.append(pack[1])
        transposed.append(ops.pack_transposed(weight, kernel))
        factors.append(scale)
    return Problem(x, plain, weights, affines, transposed, factors, [int(s) for s in chain.program], kernel)


def in_float64(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The result, a gradient of it and that of x, by autograd."""
    x = p.x.double().requires_grad_()
    y = x
    for weight, factor, affine, step in zip(p.plain, p.factors, p.affines, p.program, strict=True):
        y = F.conv2d(y, weight.double(), padding=1) * factor.double()[:, None, None]
        y = y + affine[1].double()[:, None, None]
        y = F.relu(y) if step & RELU else y
        y = F.max_pool2d(y, 2) if step & POOL else y
    dy = testing.integer_tensor(*y.shape, limit=1, seed=9, dtype=p.x.dtype)
    (dx,) = torch.autograd.grad(y, x, dy.double())
    return y.detach(), dy, dx


@pytest.mark.parametrize("kernel", [k for k in KERNELS if "winograd" not in k])
@pytest.mark.parametrize("chain", SMALL, ids=lambda c: c.name)
def test_integers_bit_for_bit(kernel, chain):
    p = problem(chain, kernel, native_dtype(kernel), integers=True)
    expected, dy, expected_dx = in_float64(p)
    assert float(expected_dx.abs().max()) > 0
    y, masks = p.forward(p.x)
    assert torch.equal(y.double(), expected)
    for last in (False, True):
        dx = p.backward(dy.contiguous(memory_format=torch.channels_last), masks, last)
        assert dx.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        assert torch.equal(dx.double(), expected_dx)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: c.name)
def test_a_chain_has_the_bits_of_its_steps(kernel, chain):
    """Also of images one by one, which are shared out over the threads."""
    p = problem(chain, kernel, native_dtype(kernel))
    y, masks = p.forward(p.x)
    assert torch.equal(y, ops.conv_stack(p.x, p.weights, p.affines, p.program, kernel, True))
    dy = testing.random_tensor(*y.shape, seed=5, dtype=y.dtype).contiguous(memory_format=torch.channels_last)
    dx = p.backward(dy, masks)
    left, maps = list(masks), op.sizes(p.program, chain.h, chain.w)
    grad, factor = dy, p.factors[-1]
    for i in reversed(range(len(p.program))):
        mask = left.pop() if p.program[i] & (RELU | POOL) else None
        dz = op.through_gate(grad, mask, factor, bool(p.program[i] & POOL), maps[i])
        scale = p.factors[i - 1] if i else torch.ones(chain.channels[0])  # rounded once, with the convolution
        affine = torch.stack([scale, torch.zeros_like(scale)])
        grad = ops.conv_stack(dz, [p.transposed[i]], [affine], [NONE], kernel, True)
        factor = torch.ones_like(scale)
    assert torch.equal(dx, grad)
    for image in range(len(p.x)):
        alone, alone_masks = p.forward(p.x[image : image + 1])
        assert torch.equal(alone[0], y[image])
        assert torch.equal(p.backward(dy[image : image + 1], alone_masks)[0], dx[image])


@pytest.mark.parametrize("chain", SMALL, ids=lambda c: c.name)
def test_the_python_of_other_devices_says_the_same(chain):
    """Whose weights are plain ones, with the sign of the scale."""
    p = problem(chain, "portable_f32", torch.float32, integers=True)
    _, dy, expected_dx = in_float64(p)
    _, masks = p.forward(p.x)
    signed = [w * f.sign()[:, None, None, None] for w, f in zip(p.plain, p.factors, strict=True)]
    *theirs, _ = op._python_masks(p.x, signed, p.affines, p.program, selection.REFERENCE, True)
    channels = [cout for cout, step in zip(chain.channels[1:], p.program, strict=True) if step]
    for mine, mask, cout in zip(masks, theirs, channels, strict=True):
        assert torch.equal(op.unpack_mask(mine, cout), op.unpack_mask(mask, cout))
    turned = [w.flip(2, 3).transpose(0, 1).contiguous() for w in p.plain]
    rest = p.program, list(p.x.shape), selection.REFERENCE, False
    assert torch.equal(op._python_backward(dy, turned, p.factors, theirs, *rest).double(), expected_dx)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_passes_and_the_last_of_two_gets_the_gradient(kernel):
    """0 * NaN makes every neighbour of a NaN one as well: a row of 8 is NaN up to column 4."""
    x = torch.zeros(1, 1, 2, 8, dtype=native_dtype(kernel))
    x[..., 3] = float("nan")
    pack = ops.pack(torch.ones(16, 1, 3, 3, dtype=x.dtype), None, None, None, None, None, 0.0, kernel)
    mask, y = ops.conv_stack_masks(x, [pack[0]], [pack[1]], [RELU | POOL], kernel, True)
    assert y[0, 5].isnan().tolist() == [[False, True, True, False]]
    value = F.relu(F.conv2d(x.float(), torch.ones(1, 1, 3, 3), padding=1)).requires_grad_()
    pooled = F.max_pool2d(value, 2)
    (expected,) = torch.autograd.grad(pooled[pooled.isnan()].sum(), value)
    assert expected.sum() == 2
    assert torch.equal(op.unpack_mask(mask, 16), expected.bool().expand(1, 16, 2, 8))


def test_same_bits_for_any_number_of_threads():
    p = problem(CHAINS[2], selection.choose(torch.float32, torch.device("cpu")), torch.float32)
    dy = None
    threads, seen = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y, masks = p.forward(p.x)
            dy = torch.ones_like(y) if dy is None else dy
            seen.append((y, *masks, p.backward(dy, masks)))
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_opcheck_and_refusals():
    p = problem(CHAINS[1], "portable_f32", torch.float32, n=2)
    args = p.weights, p.affines, p.program, p.kernel, True
    torch.library.opcheck(ops.conv_stack_masks.default, (p.x, *args))
    y, masks = p.forward(p.x)
    size = list(p.x.shape)
    rest = p.program, size, p.kernel, True
    torch.library.opcheck(ops.conv_stack_backward.default, (y, p.transposed, p.factors, masks, *rest))
    with pytest.raises(RuntimeError, match="the mask of step 2 is not that of 2 maps of 3 channels of 7x6"):
        ops.conv_stack_backward(y, p.transposed, p.factors, [masks[0], masks[2], masks[2]], *rest)
    with pytest.raises(RuntimeError, match=r"dy must be \[2, 17, 3, 3\]"):
        ops.conv_stack_backward(y[:, :, :2], p.transposed, p.factors, masks, *rest)
    with pytest.raises(RuntimeError, match="a contiguous fp32 CPU tensor of 33 elements"):
        ops.conv_stack_backward(y, p.transposed, [p.factors[0], *[f.double() for f in p.factors[1:]]], masks, *rest)
    with pytest.raises(RuntimeError, match="a program without taps"):
        ops.conv_stack_masks(p.x, p.weights, p.affines, [s | Step.TAP for s in p.program], p.kernel, True)
