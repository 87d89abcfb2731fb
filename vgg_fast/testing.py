"""Shapes, inputs and derived tolerances that tests, ``vgg-fast verify`` and the benchmarks share.

Tolerances are derived, not tuned: a K-term dot product accumulated in precision u is off by at most K*u*sum|x||w|
(Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1), whatever the order of summation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vgg_fast import reference

# F(4x4, 3x3) on the points 0, +-5/8, +-3/2 and infinity, as in csrc/cpu/winograd_f32.inl.
_A, _B = 0.625, 1.5
_POINTS = torch.tensor([0.0, _A, -_A, _B, -_B], dtype=torch.float64)
_TILE, _PATCH = 4, 6


@dataclass(frozen=True)
class Shape:
    """A named problem: batch, channels and size, and the reason why it is in the table."""

    name: str
    n: int
    cin: int
    cout: int
    h: int
    w: int
    why: str


SHAPES = (
    Shape("rgb", 1, 3, 64, 32, 32, "first layer: Cin=3, a K of 27"),
    Shape("rgb_odd", 2, 3, 40, 17, 23, "first layer with odd sizes and a Cout that fills no register block"),
    Shape("gray", 1, 1, 16, 9, 16, "Cin=1"),
    Shape("block", 1, 64, 64, 28, 28, "whole channel blocks, no remainder anywhere"),
    Shape("wide", 1, 32, 32, 4, 130, "a row longer than any tile"),
    Shape("tall", 1, 32, 32, 67, 5, "rows shorter than any tile"),
    Shape("deep", 1, 128, 96, 14, 14, "14x14 as in block 5; Cout = 3 blocks of 32"),
    Shape("ragged", 3, 37, 53, 13, 11, "no dimension is a multiple of anything"),
    Shape("one_pixel", 2, 16, 32, 1, 1, "every tap but the centre lies in the padding"),
    Shape("one_row", 1, 16, 16, 1, 37, "H=1"),
    Shape("two", 1, 33, 17, 2, 2, "the smallest map that can be pooled; one channel past a block"),
)


def shape(name: str) -> Shape:
    """The entry of :data:`SHAPES` with this name."""
    return next(s for s in SHAPES if s.name == name)


# Fully connected layers: images, inputs, outputs.
LINEARS = {
    "one_image": (1, 4096, 40),
    "nothing_divides": (5, 37, 53),
    "one_input": (2, 1, 17),
    "one_output": (3, 100, 1),
    "a_row_past_a_tile": (17, 64, 33),  # and an image past a block of 16
    "many_images": (131, 70, 40),  # more than one pass over the weights
    "parts": (4, 2100, 9),  # three partial sums and a tail
    "no_inputs": (2, 0, 5),
}


def integer_tensor(*size: int, limit: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random integers in [-limit, limit]: sums stay exact, so every order of summation gives the same bits.

    Example:
        >>> integer_tensor(2, 3, limit=4).abs().max() <= 4
        tensor(True)
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit + 1, size, generator=generator).to(dtype)


def random_tensor(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values from a seeded generator, rounded to ``dtype``."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def conv_inputs(s: Shape, dtype: torch.dtype = torch.float32, integers: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """``(x, weight, bias)`` for a shape: random with the scale of a trained network, or small integers."""
    sizes = ((s.n, s.cin, s.h, s.w), (s.cout, s.cin, 3, 3), (s.cout,))
    if integers:
        limits = (4, 2, 4)
        x, weight, bias = (
            integer_tensor(*size, limit=limit, seed=i, dtype=dtype)
            for i, (size, limit) in enumerate(zip(sizes, limits, strict=True))
        )
        return x, weight, bias
    x, weight, bias = (random_tensor(*size, seed=i) for i, size in enumerate(sizes))
    return x.to(dtype), (weight * (2.0 / (9 * s.cin)) ** 0.5).to(dtype), bias.to(dtype)


def linear_inputs(name: str, dtype: torch.dtype = torch.float32, integers: bool = False) -> tuple[Tensor, ...]:
    """``(x, weight, bias)`` of :data:`LINEARS`: random with the scale of a trained network, or small integers."""
    images, inputs, outputs = LINEARS[name]
    sizes = ((images, inputs), (outputs, inputs), (outputs,))
    if integers:
        limits = (4, 2, 4)
        return tuple(
            integer_tensor(*size, limit=limit, seed=i, dtype=dtype)
            for i, (size, limit) in enumerate(zip(sizes, limits, strict=True))
        )
    x, weight, bias = (random_tensor(*size, seed=i) for i, size in enumerate(sizes))
    return x.to(dtype), (weight / max(inputs, 1) ** 0.5).to(dtype), bias.to(dtype)


# Relative error of a product of fp32 values as a kernel reads them: rounding to bf16 is off by 2^-8 at most, to 24 bits
# (weights only) by 2^-16. bf16 and fp16 tensors are read as they are.
_LINEAR_OPERANDS = {"amx_bf16": 2 * 2.0**-8 + 2.0**-16, "avx512_f24": 2.0**-16}


def linear_bound(x: Tensor, weight: Tensor, bias: Tensor, kernel: str) -> Tensor:
    """Elementwise error bound of ``linear`` with fp32 accumulation and one rounding at the end, in float64."""
    magnitude = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    operands = _LINEAR_OPERANDS.get(kernel, 0.0) if x.dtype == torch.float32 else 0.0
    return magnitude * (operands + (x.shape[1] + 1) * 2.0**-24 + torch.finfo(x.dtype).eps / 2)


# Relative error of one product. Rounding to bf16 is off by u = 2^-8 at most, the sum of k bf16 values by u^k; three
# products leave out x2 w2, six leave out x2 w3 and x3 w2, which are as large as what was rounded away. tf32 has 10 bits
# after the point; a tensor core may cut off the others, so that an operand is off by 2^-10 (rounding would be 2^-11).
_U = 2.0**-8
_TF32 = 2.0**-10
_PRODUCT_ERRORS = {
    "amx_bf16": 2 * _U + _U**2,
    "avx512_bf16": 2 * _U + _U**2,
    "amx_bf16x3": 3 * _U**2,
    "amx_bf16x6": 4 * _U**3,
    "triton_bf16x3": 3 * _U**2,
    "triton_tf32": 2 * _TF32 + _TF32**2,
    "cuda_tf32": 2 * _TF32 + _TF32**2,
    "cuda_wgmma_tf32": 2 * _TF32 + _TF32**2,
}

# Additions per product, in units of fp32's rounding. A tensor core adds a block of products to its accumulator with all
# of them aligned to the largest and the rest cut off (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA
# tensor cores", 2021): at most 2 roundings per block, and half a one per operand. A block of 8 (fp16, bf16) costs 6.5
# for 8 products, which is less than the 1 of every order of summation; one of 4 (tf32) costs 4.5, and bf16x3 has
# three products for one.
_ADDITIONS = {"triton_tf32": 9 / 8, "cuda_tf32": 9 / 8, "cuda_wgmma_tf32": 9 / 8, "triton_bf16x3": 3.0}


def product_error(kernel: str, dtype: torch.dtype) -> float:
    """Relative error of one product of a kernel on tensors of ``dtype``: 0 where products are exact.

    Example:
        >>> product_error("amx_bf16", torch.bfloat16), product_error("amx_bf16x3", torch.float32)
        (0.0, 4.57763671875e-05)
    """
    # One bf16 value holds a bf16 value, two hold an fp16 one: then only the small products that are left out count.
    if dtype is torch.bfloat16:
        return 0.0
    return _PRODUCT_ERRORS.get(kernel, 0.0)


def is_direct(kernel: str, cin: int, h: int, w: int) -> bool:
    """Whether a kernel sums up plain products, and so is exact on small integers, for a convolution of this size.

    The Winograd kernels leave thin and tiny layers to the direct kernel (``winograd_pays`` in csrc/cpu/winograd.h).

    Example:
        >>> is_direct("avx512_f32", 64, 28, 28), is_direct("avx512_winograd_f32", 64, 28, 28)
        (True, False)
    """
    tiles = -(-h // _TILE) * -(-w // _TILE)
    return "winograd" not in kernel or cin < 48 or _PATCH**2 * tiles + 250 >= 9 * h * w


def winograd_matrices() -> tuple[Tensor, Tensor, Tensor]:
    """``(A, G, B)`` of ``Y = A^T [(G g G^T) * (B^T d B)] A`` in float64: ``[6, 4]``, ``[6, 3]`` and ``[6, 6]``.

    Rows of A and G are the powers of the points, those of G over the product of the distances to the other points; B
    follows from them, being what makes the formula right (Lavin and Gray, arXiv 1509.09308).

    Example:
        >>> [tuple(m.shape) for m in winograd_matrices()]
        [(6, 4), (6, 3), (6, 6)]
    """
    a, g = torch.zeros(_PATCH, 4, dtype=torch.float64), torch.zeros(_PATCH, 3, dtype=torch.float64)
    a[-1, -1] = g[-1, -1] = 1.0  # the point at infinity
    for i, p in enumerate(_POINTS):
        others = torch.cat([_POINTS[:i], _POINTS[i + 1 :]])
        a[i], g[i] = p ** torch.arange(4), p ** torch.arange(3) / (p - others).prod()
    # y[k] = sum_r g[r] d[k + r] for every d and g: twelve linear equations for each column of B^T.
    products = torch.einsum("ik,ir->kri", a, g).reshape(12, _PATCH)
    wanted = torch.stack([torch.eye(_PATCH, dtype=torch.float64)[k + r] for k in range(4) for r in range(3)])
    return a, g, torch.linalg.lstsq(products, wanted).solution.T


def winograd(x: Tensor, weight: Tensor, absolute: bool = False) -> Tensor:
    """The convolution by F(4x4, 3x3) in float64; with ``absolute``, all signs dropped: what its errors are measured by.

    Args:
        x: ``[N, Cin, H, W]``.
        weight: ``[Cout, Cin, 3, 3]``.
        absolute: take the absolute value of every coefficient, input and weight, so that nothing cancels.

    Returns:
        float64 ``[N, Cout, H, W]``.
    """
    h, w = x.shape[2:]
    a, g, b, x, weight = *winograd_matrices(), x.double(), weight.double()
    if absolute:
        a, g, b, x, weight = a.abs(), g.abs(), b.abs(), x.abs(), weight.abs()
    padded = F.pad(x, (1, -w % _TILE + 1, 1, -h % _TILE + 1))
    patches = padded.unfold(2, _PATCH, _TILE).unfold(3, _PATCH, _TILE)  # [N, Cin, tile rows, tile columns, 6, 6]
    products = torch.einsum("nchwij,ocij->nohwij", b.T @ patches @ b, g @ weight @ g.T)
    tiles = a.T @ products @ a
    return tiles.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)[..., :h, :w]


def conv_bound(
    x: Tensor,
    weight: Tensor,
    affine: Tensor | None = None,
    *,
    pool: bool = False,
    out_dtype: torch.dtype | None = None,
    kernel: str = "",
) -> Tensor:
    """Elementwise error bound of ``conv3x3`` with fp32 accumulation and one rounding at the end, in float64.

    Args:
        x: ``[N, Cin, H, W]``.
        weight: ``[Cout, Cin, 3, 3]``.
        affine: ``[2, Cout]`` scale and shift of the epilogue; None for scale 1 (a bias adds its own rounding below).
        pool: the bound of the pooled result: the largest in each window.
        out_dtype: the dtype the result is rounded to (default: of ``x``).
        kernel: the kernel's name, for those that split or round their operands (:func:`product_error`) or whose sums
            are not of plain products (:func:`is_direct`).

    Returns:
        float64 ``[N, Cout, H, W]`` or its pooled size.
    """
    u32 = 2.0**-24
    magnitude = F.conv2d(x.double().abs(), weight.double().abs(), padding=1)
    # Denormal operands (or parts of them) are read as zeros and denormal sums flushed, up to six products for one: the
    # smallest normal number times what it meets.
    tiny = torch.finfo(torch.float32).tiny
    met = F.conv2d(x.double().abs(), torch.ones(1, *weight.shape[1:], dtype=torch.float64, device=x.device), padding=1)
    flushed = tiny * (met + weight.double().abs().sum((1, 2, 3))[:, None, None] + 6 * 9 * x.shape[1])
    if is_direct(kernel, *x.shape[1:]):
        terms = 9 * x.shape[1] * _ADDITIONS.get(kernel, 1.0)
        error = magnitude * (terms * u32 + product_error(kernel, x.dtype))
    else:
        # Roundings on the way of a term: 2 in each of the two passes of B, 4 in each of G (its coefficient, a product,
        # two sums), 3 in each of A, and the sum over Cin in parts of 32 channels.
        sums = min(x.shape[1], 32) + -(-x.shape[1] // 32)
        error = winograd(x, weight, absolute=True) * ((2 * 2 + 2 * 4 + 2 * 3 + sums) * u32)
    if affine is not None:
        scale, shift = affine.double().abs()[:, :, None, None]
        flushed = flushed * scale + tiny * magnitude
        magnitude, error = magnitude * scale + shift, error * scale
    # Then the two operations of the epilogue, and the rounding of the affine vectors themselves.
    bound = error + magnitude * 4 * u32 + flushed
    rounding = torch.finfo(out_dtype or x.dtype).eps / 2
    bound = bound + rounding * (magnitude + bound)
    # Results below the smallest normal number may be flushed or rounded to a denormal.
    bound = bound + torch.finfo(out_dtype or x.dtype).tiny
    return F.max_pool2d(bound, 2) if pool else bound


def norm_bound(kernel: str, dtype: torch.dtype, cin: int) -> float:
    """What :func:`relative_error` of a convolution of random numbers may be.

    :func:`conv_bound` holds for the worst of inputs, and grows with the number of terms: behind 4608 of them tf32 would
    pass for fp32. The roundings of random sums add up like their root: u * sqrt(K / 6) for one sum in order.

    Args:
        kernel: the kernel's name.
        dtype: of the tensors.
        cin: input channels.

    Example:
        >>> norm_bound("cuda", torch.float32, 512) < 1e-4 < norm_bound("cuda_tf32", torch.float32, 512)
        True
    """
    u32 = 2.0**-24
    return product_error(kernel, dtype) + 8 * u32 * (9 * cin) ** 0.5 + torch.finfo(dtype).eps


def weight_grad_bound(x: Tensor, dy: Tensor, out_dtype: torch.dtype, *, winograd: bool) -> Tensor:
    """Elementwise error bound of ``conv3x3_weight_grad`` with fp32 sums and one rounding at the end, in float64.

    Args:
        x: ``[N, Cin, H, W]``.
        dy: ``[N, Cout, H, W]``.
        out_dtype: of the result.
        winograd: whether it is computed by F(3x3, 4x4) instead of plain products.

    Returns:
        float64 ``[Cout, Cin, 3, 3]``.
    """
    u32, tiny = 2.0**-24, torch.finfo(torch.float32).tiny
    n, _, h, w = x.shape
    wide, gradient = x.double().abs(), dy.double().abs()
    magnitude = weight_grad(wide, gradient)
    if winograd:
        a, g, b = (m.abs() for m in winograd_matrices())
        padded = F.pad(wide, (1, -w % _TILE + 1, 1, -h % _TILE + 1))
        patches = padded.unfold(2, _PATCH, _TILE).unfold(3, _PATCH, _TILE)
        tiles = F.pad(gradient, (0, -w % _TILE, 0, -h % _TILE)).unfold(2, _TILE, _TILE).unfold(3, _TILE, _TILE)
        products = torch.einsum("nihwab,nohwab->oiab", b.T @ patches @ b, a @ tiles @ a.T)
        # Roundings on the way of a term: 2 in each of the two passes of B and of A, 4 in each of G, and the sum over
        # tiles in chunks of 128.
        count = n * -(-h // _TILE) * -(-w // _TILE)
        sums = min(count, 128) + -(-count // 128)
        error = g.T @ products @ g * ((2 * 2 + 2 * 2 + 2 * 4 + sums) * u32)
    else:
        error = magnitude * (n * h * w * u32)
    # Denormal operands and sums are read as zeros and flushed; then the result is rounded.
    bound = error + tiny * (1 + wide.sum((0, 2, 3)) + gradient.sum((0, 2, 3))[:, None])[..., None, None]
    return bound + torch.finfo(out_dtype).eps / 2 * (magnitude + bound)


def weight_grad(x: Tensor, dy: Tensor) -> Tensor:
    """PyTorch's gradient of ``conv3x3`` in its weight, ``[Cout, Cin, 3, 3]``.

    Example:
        >>> weight_grad(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)).flatten().tolist()
        [4.0, 6.0, 4.0, 6.0, 9.0, 6.0, 4.0, 6.0, 4.0]
    """
    weight = x.new_empty(dy.shape[1], x.shape[1], 3, 3)
    options = None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    return torch.ops.aten.convolution_backward(dy, x, weight, *options)[1]


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor, what: str = "result") -> None:
    """Every element within its own bound of the float64 expectation; the border is judged separately.

    A similarity over the whole map would pass with one wrong corner pixel, so the message tells where the worst element
    is and whether it lies on the border.

    Raises:
        AssertionError: naming the worst element, its position, and the share of wrong elements on the border.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    if not actual.numel():
        return
    error = (actual.double() - expected.double()).abs()
    same_special = (actual.isnan() & expected.isnan()) | (actual.double() == expected.double())
    wrong = ~((error <= bound) | same_special)
    if not wrong.any():
        return
    border = torch.zeros_like(wrong)
    border[..., (0, -1), :] = True
    border[..., (0, -1)] = True
    excess = torch.where(wrong, (error / bound).nan_to_num(nan=float("inf")), torch.zeros_like(error))
    position = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are off, {int((wrong & border).sum())} of them on the "
        f"border; worst at {position}: {actual[position].item()} instead of {expected[position].item()}, "
        f"{excess[position].item():.3g} times its bound {bound[position].item():.3g}"
    )


def assert_conv_close(
    actual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = False,
    pool: bool = False,
    kernel: str = "",
) -> None:
    """``actual`` against ``reference.conv3x3`` in float64, with the bound of :func:`conv_bound`."""
    expected = reference.conv3x3(x.double(), weight.double(), None if bias is None else bias.double(), relu, pool)
    shift = torch.zeros(weight.shape[0]) if bias is None else bias.float()
    affine = torch.stack([torch.ones_like(shift), shift])
    bound = conv_bound(x, weight, affine, pool=pool, out_dtype=actual.dtype, kernel=kernel)
    assert_within(actual, expected, bound, f"conv3x3 relu={relu} pool={pool} {actual.dtype}")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``, both in float64.

    Example:
        >>> relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
        0.0
    """
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
