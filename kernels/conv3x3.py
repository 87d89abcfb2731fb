"""3x3 convolution with affine, ReLU and 2x2 max-pool in its epilogue, as an implicit GEMM in Triton.

    out[pixel, co] = relu(scale[co] * sum_k x[pixel + tap(k), ci(k)] * weight[co, k] + shift[co])

                     +- parallel -+- parallel -+------- sequential --------+
    one program:     |  BM pixels |  BN = co   |  9 taps x cin in BK steps |
                     +------------+------------+---------------------------+

Activations are NHWC (``channels_last``), weights OHWI, so that the sequential axis is contiguous in both. Programs that
share their pixels are neighbours in the grid: the input tile is then in L2 for all but the first of them.

The pooled form takes the maximum over the raw fp32 accumulators: with scale >= 0 (see ``vgg_fast.fold``) that commutes
with the affine map, with ReLU and with rounding, and leaves a quarter of the epilogue's work. Where the 2x2 window sits
in the tile is what makes it cheap; :func:`_conv3x3_kernel` says where.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .support import check_supported, unsupported

__all__ = ["Tile", "constants", "conv3x3", "conv_stack", "layout", "tile", "unsupported"]

RELU, POOL = 1, 2  # the bits of a program's entries, as in vgg_fast.reference.Step

# Triton's interpreter multiplies bf16 operands of a dot as if they were integers (triton #11584).
_INTERPRETED = triton.knobs.runtime.interpret


class Tile(NamedTuple):
    """How one program is cut: ``bm`` pixels x ``bn`` output channels, ``bk`` input channels per step."""

    bm: int
    bn: int
    bk: int
    num_warps: int
    num_stages: int


def tile(dtype: torch.dtype, cin: int, cout: int) -> Tile:
    """The tile for a problem: a function of the channels alone, so that a pixel's bits depend on nothing else.

    128x64x64 spills on none of sm_80 … sm_120 (128x128 unpooled does on sm_100) and its three stages take 73,744 of the
    101,376 bytes that the smallest of them (sm_120) has. Where rows are not 16-byte aligned every element needs its own
    pointer, and more than 16 of them per row spill. fp32 runs on the FMA units, where a quarter of the tile is enough.

    Example:
        >>> tile(torch.float16, 3, 64)
        Tile(bm=128, bn=64, bk=16, num_warps=4, num_stages=3)
    """
    bm, bn, bk = (64, 64, 32) if dtype == torch.float32 else (128, 64, 64)
    if cin * dtype.itemsize % 16:
        bk = 16
    return Tile(bm, _fit(cout, bn), _fit(cin, bk), num_warps=4, num_stages=3)


def _fit(size: int, limit: int) -> int:
    return min(limit, max(16, triton.next_power_of_2(size)))  # 16: the smallest operand of tl.dot


@triton.jit(do_not_specialize=["N", "H", "W"])
def _conv3x3_kernel(
    x_ptr,  # [N, H, W, CI]
    weight_ptr,  # [CO, 3, 3, CI]
    affine_ptr,  # [2, CO] fp32: scale >= 0, shift
    out_ptr,  # [N, H, W, CO], or [N, H // 2, W // 2, CO] with POOL
    N,
    H,
    W,
    CI: tl.constexpr,
    CO: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    UPCAST: tl.constexpr,  # in the interpreter only
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    COLUMNS: tl.constexpr = (CO + BN - 1) // BN
    STEPS: tl.constexpr = (CI + BK - 1) // BK
    program = tl.program_id(0)
    co = program % COLUMNS * BN + tl.arange(0, BN)
    # Every offset past this line is 64 bits wide: a batch of 700 first-block maps has 2^31 elements.
    tile_row = (program // COLUMNS).to(tl.int64)
    m = tl.arange(0, BM)
    if POOL:
        # The bits of m, from the highest: dh | window's upper bits | dw | window's lower 3 bits. An accumulator
        # fragment of mma holds rows r and r + 8 in one thread, and a warp's fragments lie in the upper bits, so all
        # four values of a window meet in one thread's registers: no shuffle, no shared memory.
        window = tile_row * (BM // 4) + (m % (BM // 2) // 16 * 8 + m % 8)
        inside = window < N.to(tl.int64) * (H // 2) * (W // 2)
        w = window % (W // 2) * 2 + m // 8 % 2
        line = window // (W // 2)
        h = line % (H // 2) * 2 + m // (BM // 2)
        n = line // (H // 2)
    else:
        pixel = tile_row * BM + m
        inside = pixel < N.to(tl.int64) * H * W
        w = pixel % W
        line = pixel // W
        h = line % H
        n = line // H

    # Bit 3 * kh + kw says whether that tap of the pixel lies inside the image: one test per step instead of four.
    rows = tl.where(h > 0, 0b111, 0) | 0b111000 | tl.where(h < H - 1, 0b111000000, 0)
    columns = tl.where(w > 0, 0b001001001, 0) | 0b010010010 | tl.where(w < W - 1, 0b100100100, 0)
    taps = tl.where(inside, rows & columns, 0)

    k = tl.arange(0, BK)
    x_ptrs = x_ptr + (((n * H + h) * W + w) * CI)[:, None]
    weight_ptrs = weight_ptr + co.to(tl.int64)[None, :] * (9 * CI) + k[:, None]
    acc = tl.full((BM, BN), 0.0, tl.float32)
    # One flat loop: a loop over taps around a loop over channels would drain the load pipeline nine times.
    for step in range(9 * STEPS):
        tap = step // STEPS
        ci = step % STEPS * BK + k
        shift = ((tap // 3 - 1) * W + (tap % 3 - 1)).to(tl.int64) * CI
        x_mask = ((taps >> tap) & 1 != 0)[:, None]
        weight_mask = (co < CO)[None, :]
        if CI % BK != 0:
            x_mask = x_mask & (ci < CI)[None, :]
            weight_mask = weight_mask & (ci < CI)[:, None]
        a = tl.load(x_ptrs + (shift + ci)[None, :], mask=x_mask, other=0.0)
        b = tl.load(weight_ptrs + (tap * CI + step % STEPS * BK), mask=weight_mask, other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")

    if POOL:
        # tl.max drops NaN, PyTorch passes it on; a reduction with a combine function of our own costs 256 shuffles and
        # spills on sm_100, two splits cost nothing.
        parts = acc.reshape(2, BM // 32, 2, 8, BN).permute(1, 2, 3, 4, 0)
        upper, lower = tl.split(parts)
        parts = tl.maximum(upper, lower, propagate_nan=tl.PropagateNan.ALL).permute(0, 2, 3, 1)
        left, right = tl.split(parts)
        y = tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL).reshape(BM // 4, BN)
        out_row = tile_row * (BM // 4) + tl.arange(0, BM // 4)
        out_rows = N.to(tl.int64) * (H // 2) * (W // 2)
    else:
        y = acc
        out_row = tile_row * BM + m
        out_rows = N.to(tl.int64) * H * W
    scale = tl.load(affine_ptr + co, mask=co < CO, other=0.0)
    offset = tl.load(affine_ptr + CO + co, mask=co < CO, other=0.0)
    y = y * scale[None, :] + offset[None, :]
    if RELU:
        y = tl.where(y < 0, 0.0, y)  # keeps NaN and -0.0, as PyTorch does
    out_mask = (out_row < out_rows)[:, None] & (co < CO)[None, :]
    out_ptrs = out_ptr + out_row[:, None] * CO + co[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=out_mask)


def constants(dtype: torch.dtype, cin: int, cout: int, relu: bool, pool: bool) -> dict[str, Any]:
    """The compile-time arguments of the kernel for a problem, and Triton's options: what a launch compiles."""
    t = tile(dtype, cin, cout)
    return {
        "CI": cin,
        "CO": cout,
        "RELU": relu,
        "POOL": pool,
        "UPCAST": _INTERPRETED and dtype == torch.bfloat16,
        "BM": t.bm,
        "BN": t.bn,
        "BK": t.bk,
        "num_warps": t.num_warps,
        "num_stages": t.num_stages,
    }


def layout(weight: Tensor) -> Tensor:
    """Weights as the kernel reads them: OIHW ``[Cout, Cin, 3, 3]`` -> contiguous OHWI ``[Cout, 3, 3, Cin]``.

    Example:
        >>> layout(torch.ones(8, 5, 3, 3)).shape
        torch.Size([8, 3, 3, 5])
    """
    return weight.permute(0, 2, 3, 1).contiguous()


def conv3x3(x: Tensor, weight: Tensor, affine: Tensor, relu: bool = False, pool: bool = False) -> Tensor:
    """``relu(conv(x, weight) * scale + shift)``, then a 2x2/2 max-pool, in one launch.

    Args:
        x: ``[N, Cin, H, W]``, fp32, fp16 or bf16, channels_last (anything else is copied first); on a GPU, or on the
            CPU in Triton's interpreter.
        weight: ``[Cout, 3, 3, Cin]``, contiguous, the dtype of ``x`` (see :func:`layout`).
        affine: fp32 ``[2, Cout]``, contiguous: scale >= 0 and shift (see ``vgg_fast.fold``).
        relu: apply ReLU.
        pool: apply the 2x2 max-pool.

    Returns:
        ``[N, Cout, H, W]`` or ``[N, Cout, H // 2, W // 2]``, channels_last, the dtype of ``x``; accumulated in fp32 and
        rounded once.

    Raises:
        ValueError: for a shape, dtype or layout that is none of the above, naming it.

    Example (on a machine without a GPU: with ``TRITON_INTERPRET=1``):
        >>> x = torch.ones(1, 4, 6, 6)
        >>> conv3x3(x, torch.ones(8, 3, 3, 4), torch.ones(2, 8), relu=True, pool=True)[0, 0, 0]
        tensor([37., 37., 37.])
    """
    _check(x, weight, affine, pool)
    x = x.contiguous(memory_format=torch.channels_last)
    n, cin, h, w = x.shape
    cout = weight.shape[0]
    out_size = (n, cout, h // 2, w // 2) if pool else (n, cout, h, w)
    out = torch.empty(out_size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if not out.numel():
        return out
    kwargs = constants(x.dtype, cin, cout, relu, pool)
    rows = out.numel() // cout * (4 if pool else 1)
    grid = (triton.cdiv(rows, kwargs["BM"]) * triton.cdiv(cout, kwargs["BN"]),)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _conv3x3_kernel[grid](x, weight, affine, out, n, h, w, **kwargs)
    return out


def conv_stack(x: Tensor, weights: Sequence[Tensor], affines: Sequence[Tensor], program: Sequence[int]) -> Tensor:
    """A chain of :func:`conv3x3`, ``program[i]`` (RELU | POOL) saying what follows the i-th convolution.

    Args:
        x: ``[N, Cin, H, W]``, as for :func:`conv3x3`.
        weights: ``[Cout_i, 3, 3, Cout_{i-1}]`` each.
        affines: fp32 ``[2, Cout_i]`` each.
        program: as many entries.

    Returns:
        channels_last; intermediate values are rounded to the dtype of ``x``, so the bits are those of single calls.

    Raises:
        ValueError: as :func:`conv3x3`, or where the three lists differ in length.
    """
    for weight, affine, step in zip(weights, affines, program, strict=True):
        x = conv3x3(x, weight, affine, relu=bool(step & RELU), pool=bool(step & POOL))
    return x


def _check(x: Tensor, weight: Tensor, affine: Tensor, pool: bool) -> None:
    check_supported("conv3x3", x)
    if x.dim() != 4:
        raise ValueError(f"conv3x3 (triton): x has shape {tuple(x.shape)}; expected [N, Cin, H, W]")
    _, cin, h, w = x.shape
    if weight.dim() != 4 or weight.shape[1:] != (3, 3, cin) or not weight.is_contiguous():
        raise ValueError(
            f"conv3x3 (triton): weight has shape {tuple(weight.shape)}; expected contiguous [Cout, 3, 3, {cin}], as "
            "layout() makes it"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"conv3x3 (triton): weight is {weight.dtype}, x is {x.dtype}; they must be the same")
    if not weight.device == affine.device == x.device:
        raise ValueError(
            f"conv3x3 (triton): x is on {x.device}, weight on {weight.device} and affine on {affine.device}; "
            "they must be on one device"
        )
    cout = weight.shape[0]
    if affine.shape != (2, cout) or affine.dtype != torch.float32 or not affine.is_contiguous():
        raise ValueError(
            f"conv3x3 (triton): affine is {affine.dtype} of shape {tuple(affine.shape)}; expected contiguous "
            f"torch.float32 [2, {cout}]"
        )
    if not cin or not cout:
        raise ValueError(f"conv3x3 (triton): {cin} input and {cout} output channels; both must be at least 1")
    smallest = 2 if pool else 1
    if min(h, w) < smallest:
        raise ValueError(f"conv3x3 (triton): a {h}x{w} map is smaller than {smallest}x{smallest}")
