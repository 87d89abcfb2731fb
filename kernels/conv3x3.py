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

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .configs import Architecture, Config
from .support import check_conv3x3, unsupported

__all__ = ["Launch", "architecture_of", "conv3x3", "conv_stack", "launch_of", "layout", "unsupported"]

RELU, POOL = 1, 2  # the bits of a program's entries, as in vgg_fast.reference.Step

# Triton's interpreter multiplies bf16 operands of a dot as if they were integers (triton #11584).
_INTERPRETED = triton.knobs.runtime.interpret

# Elements from which on offsets take 64 bits: those of rows past the last, which nobody loads, must not wrap around.
_WIDE = 2**31 - 2**24


class Launch(NamedTuple):
    """What runs a convolution: everything but its tensors.

    Attributes:
        kernel: the Triton function.
        grid: programs.
        out_size: of the output, ``[N, Cout, h, w]``.
        partials: fp32 elements of scratch memory, in any state.
        counters: int32 elements of scratch memory that are zero before the launch, and after it. Launches that may run
            at the same time need their own.
        options: the sizes, the compile-time arguments and Triton's options, by name.
    """

    kernel: Any
    grid: tuple[int]
    out_size: tuple[int, int, int, int]
    partials: int
    counters: int
    options: dict[str, Any]

    def arguments(
        self,
        x: Tensor,
        weight: Tensor,
        affine: Tensor,
        out: Tensor,
        tap: Tensor | None = None,
        partials: Tensor | None = None,
        counters: Tensor | None = None,
    ) -> dict[str, Any]:
        """All arguments of the kernel by name: ``launch.kernel[launch.grid](**launch.arguments(...))``.

        ``tap`` with ``TAP`` only, ``partials`` and ``counters`` where their sizes are not 0.
        """
        tensors = {"x_ptr": x, "weight_ptr": weight, "affine_ptr": affine, "out_ptr": out, "tap_ptr": tap}
        return tensors | {"partials_ptr": partials, "counters_ptr": counters} | self.options


def launch_of(
    dtype: torch.dtype,
    n: int,
    h: int,
    w: int,
    cin: int,
    cout: int,
    relu: bool,
    pool: bool,
    architecture: Architecture,
    tap: bool = False,
    precision: str = "ieee",
    config: Config | None = None,
) -> Launch:
    """What :func:`conv3x3` launches for a problem: a pure function.

    Args:
        dtype: of the tensors.
        n, h, w, cin, cout: of the convolution, none of them 0.
        relu, pool, tap, precision: as for :func:`conv3x3`.
        architecture: of the GPU, see :func:`architecture_of`.
        config: instead of the one that ``configs.config`` picks.

    Raises:
        ValueError: for a precision that does not go with the dtype, or a tap without a pool.

    Example:
        >>> launch = launch_of(torch.float16, 32, 14, 14, 512, 512, True, False, Architecture(80, 108))
        >>> launch.grid, launch.options["BM"], launch.options["BN"]
        ((196,), 128, 128)
    """
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, precision)
    if name != precision and precision != "ieee":
        raise ValueError(f"conv3x3 (triton): precision {precision!r} is for fp32 tensors, x is {dtype}")
    if tap and not pool:
        raise ValueError("conv3x3 (triton): a tap is the value before the pool, and there is no pool")
    c = config or configs.config(name, n, h, w, cin, cout, pool, architecture, tap)
    out_size = (n, cout, h // 2, w // 2) if pool else (n, cout, h, w)
    rows = configs.rows_of(n, h, w, pool, tap)
    tiles = triton.cdiv(rows, c.bm) * triton.cdiv(cout, c.bn)
    largest = max(n * h * w * cin, rows * cout, 9 * cin * cout)
    options = {
        "N": n,
        "H": h,
        "W": w,
        "CI": cin,
        "CO": cout,
        "RELU": relu,
        "POOL": pool,
        "TAP": tap,
        "PRECISION": "ieee" if _INTERPRETED else precision,  # it knows no bf16x3, and multiplies fp32 in any case
        "WIDE": largest >= _WIDE,
        "UPCAST": _INTERPRETED and dtype == torch.bfloat16,
        "SPLIT": c.split,
        "BM": c.bm,
        "BN": c.bn,
        "BK": c.bk,
        "num_warps": c.num_warps,
        "num_stages": c.num_stages,
    }
    partials, counters = (tiles * c.split * c.bm * c.bn, tiles) if c.split > 1 else (0, 0)
    return Launch(_conv3x3_kernel, (tiles * c.split,), out_size, partials, counters, options)


@functools.cache
def architecture_of(device: torch.device) -> Architecture:
    """Of a CUDA device; for the CPU, where the interpreter runs, that of an A100.

    Example:
        >>> architecture_of(torch.device("cpu"))
        Architecture(sm=80, multiprocessors=108)
    """
    if device.type != "cuda":
        return Architecture(80, 108)
    properties = torch.cuda.get_device_properties(device)
    return Architecture(10 * properties.major + properties.minor, properties.multi_processor_count)


@triton.jit(do_not_specialize=["N", "H", "W", "SPLIT"])
def _conv3x3_kernel(
    x_ptr,  # [N, H, W, CI]
    weight_ptr,  # [CO, 3, 3, CI]
    affine_ptr,  # [2, CO] fp32: scale >= 0, shift
    out_ptr,  # [N, H, W, CO], or [N, H // 2, W // 2, CO] with POOL
    tap_ptr,  # [N, H, W, CO] with TAP, else None
    partials_ptr,  # [tiles, SPLIT, BM, BN] fp32, or None
    counters_ptr,  # [tiles] int32, zero before the launch and after it, or None
    N,
    H,
    W,
    SPLIT,  # programs that share the sum of a tile; read only where there are partials
    CI: tl.constexpr,
    CO: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    TAP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,  # a tensor has 2^31 elements or more
    UPCAST: tl.constexpr,  # in the interpreter only
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    COLUMNS: tl.constexpr = (CO + BN - 1) // BN
    STEPS: tl.constexpr = (9 * CI + BK - 1) // BK
    FLAT: tl.constexpr = CI % BK != 0  # a step runs through taps and channels, its loads have a pointer per element
    tile = tl.program_id(0)
    first = 0
    last = STEPS
    if partials_ptr is not None:
        part = tile % SPLIT
        tile = tile // SPLIT
        first = part * STEPS // SPLIT
        last = (part + 1) * STEPS // SPLIT
    if WIDE:
        tile = tile.to(tl.int64)
        N = N.to(tl.int64)
        H = H.to(tl.int64)
        W = W.to(tl.int64)
    co = tile % COLUMNS * BN + tl.arange(0, BN)
    tile_row = tile // COLUMNS
    m = tl.arange(0, BM)
    if POOL:
        # With TAP the windows that hang over count as well: their pixels are stored, they themselves are not.
        windows_h = (H + TAP) // 2
        windows_w = (W + TAP) // 2
        # The bits of m, from the highest: dh | window's upper bits | dw | window's lower 3 bits. An accumulator
        # fragment of mma holds rows r and r + 8 in one thread, and a warp's fragments lie in the upper bits, so all
        # four values of a window meet in one thread's registers: no shuffle, no shared memory.
        window = tile_row * (BM // 4) + (m % (BM // 2) // 16 * 8 + m % 8)
        dw = m // 8 % 2
        dh = m // (BM // 2)
        inside = window < N * windows_h * windows_w
        w = window % windows_w * 2 + dw
        line = window // windows_w
        h = line % windows_h * 2 + dh
        n = line // windows_h
        inside = inside & (h < H) & (w < W)
    else:
        pixel = tile_row * BM + m
        inside = pixel < N * H * W
        w = pixel % W
        line = pixel // W
        h = line % H
        n = line // H

    # Bit 3 * kh + kw says whether that tap of the pixel lies inside the image: one test per step instead of four.
    rows = tl.where(h > 0, 0b111, 0) | 0b111000 | tl.where(h < H - 1, 0b111000000, 0)
    columns = tl.where(w > 0, 0b001001001, 0) | 0b010010010 | tl.where(w < W - 1, 0b100100100, 0)
    taps = tl.where(inside, rows & columns, 0)

    # k = (3 * kh + kw) * CI + ci lies (kh * W + kw) * CI + ci = kh * (W - 3) * CI + k elements past the first tap.
    k = tl.arange(0, BK)
    x_ptrs = x_ptr + ((n * H + h) * W + w - W - 1) * CI
    weight_ptrs = weight_ptr + co[None, :] * (9 * CI) + k[:, None]
    acc = tl.full((BM, BN), 0.0, tl.float32)
    # One flat loop: a loop over taps around a loop over channels would drain the load pipeline nine times.
    for step in range(first, last):
        if FLAT:
            row = step * BK + k
            x_mask = taps[None, :] >> (row // CI)[:, None] & 1 != 0
            a = tl.load(x_ptrs[None, :] + (row // (3 * CI) * ((W - 3) * CI) + row)[:, None], mask=x_mask, other=0.0)
            a = tl.trans(a)
        else:
            x_mask = (taps & 1 << step // (CI // BK) != 0)[:, None]
            shift = step // (3 * CI // BK) * ((W - 3) * CI) + step * BK
            a = tl.load(x_ptrs[:, None] + (shift + k)[None, :], mask=x_mask, other=0.0)
        if CO % BN == 0 and 9 * CI % BK == 0:
            b = tl.load(weight_ptrs + step * BK)
        else:
            b = tl.load(weight_ptrs + step * BK, mask=(co < CO)[None, :] & (step * BK + k < 9 * CI)[:, None], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    if partials_ptr is not None:
        # The last program of a tile to arrive adds up the parts in their order, so that the bits are always the same.
        inner = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        parts_ptrs = partials_ptr + tile.to(tl.int64) * (SPLIT * BM * BN) + inner
        tl.store(parts_ptrs + part * (BM * BN), acc)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived != SPLIT - 1:
            return
        acc = tl.load(parts_ptrs, cache_modifier=".cg")
        for other in range(1, SPLIT):
            acc += tl.load(parts_ptrs + other * (BM * BN), cache_modifier=".cg")
        tl.store(counters_ptr + tile, 0)

    scale = tl.load(affine_ptr + co, mask=co < CO, other=0.0)
    offset = tl.load(affine_ptr + CO + co, mask=co < CO, other=0.0)
    if POOL:
        # tl.max drops NaN, PyTorch passes it on; a reduction with a combine function of our own costs 256 shuffles,
        # splits cost nothing.
        upper, lower = tl.split(acc.reshape(2, BM // 32, 2, 8, BN).permute(1, 2, 3, 4, 0))
        y00, y01 = tl.split(upper.permute(0, 2, 3, 1))
        y10, y11 = tl.split(lower.permute(0, 2, 3, 1))
        window = tile_row * (BM // 4) + tl.arange(0, BM // 4)
        inside = window < N * windows_h * windows_w
        out_row = window
        if TAP:
            w = window % windows_w * 2
            h = window // windows_w % windows_h * 2
            line = window // windows_w // windows_h * H + h
            right = inside & (w + 1 < W)
            below = h + 1 < H
            corner = line * W + w
            _store(tap_ptr, corner, inside, y00, co, scale, offset, CO, RELU)
            _store(tap_ptr, corner + 1, right, y01, co, scale, offset, CO, RELU)
            _store(tap_ptr, corner + W, inside & below, y10, co, scale, offset, CO, RELU)
            _store(tap_ptr, corner + W + 1, right & below, y11, co, scale, offset, CO, RELU)
            inside = right & below
            out_row = (line // H * (H // 2) + h // 2) * (W // 2) + w // 2
        y = _maximum(_maximum(y00, y10), _maximum(y01, y11))
    else:
        y = acc
        out_row = tile_row * BM + m
        inside = out_row < N * H * W
    _store(out_ptr, out_row, inside, y, co, scale, offset, CO, RELU)


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _store(
    ptr,  # [rows, CO]
    row,  # [R]
    inside,  # [R]
    y,  # R x BN accumulators, in whatever shape their pool left them
    co,  # [BN]
    scale,  # [BN]
    offset,  # [BN]
    CO: tl.constexpr,
    RELU: tl.constexpr,
):
    """The affine map, ReLU, one rounding, and the rows of one tile."""
    y = y.reshape(row.shape[0], co.shape[0])
    y = y * scale[None, :] + offset[None, :]
    if RELU:
        y = tl.where(y < 0, 0.0, y)  # keeps NaN and -0.0, as PyTorch does
    mask = inside[:, None] & (co < CO)[None, :]
    tl.store(ptr + row[:, None] * CO + co[None, :], y.to(ptr.dtype.element_ty), mask=mask)


def layout(weight: Tensor) -> Tensor:
    """Weights as the kernel reads them: OIHW ``[Cout, Cin, 3, 3]`` -> contiguous OHWI ``[Cout, 3, 3, Cin]``.

    Example:
        >>> layout(torch.ones(8, 5, 3, 3)).shape
        torch.Size([8, 3, 3, 5])
    """
    return weight.permute(0, 2, 3, 1).contiguous()


def conv3x3(
    x: Tensor,
    weight: Tensor,
    affine: Tensor,
    relu: bool = False,
    pool: bool = False,
    tap: bool = False,
    precision: str = "ieee",
) -> Any:
    """``relu(conv(x, weight) * scale + shift)``, then a 2x2/2 max-pool, in one launch.

    Args:
        x: ``[N, Cin, H, W]``, fp32, fp16 or bf16, channels_last (anything else is copied first); on a GPU, or on the
            CPU in Triton's interpreter.
        weight: ``[Cout, 3, 3, Cin]``, contiguous, the dtype of ``x`` (see :func:`layout`).
        affine: fp32 ``[2, Cout]``, contiguous: scale >= 0 and shift (see ``vgg_fast.fold``).
        relu: apply ReLU.
        pool: apply the 2x2 max-pool.
        tap: return the value before the pool as well.
        precision: how fp32 tensors are multiplied: ieee, tf32 (10 bits of each factor) or bf16x3 (16 bits, as the sum
            of two bf16 values).

    Returns:
        ``[N, Cout, H, W]`` or ``[N, Cout, H // 2, W // 2]``, channels_last, the dtype of ``x``; accumulated in fp32 and
        rounded once. With ``tap`` a pair: the value before the pool, and after it.

    Raises:
        ValueError: for a shape, dtype, layout or precision that is none of the above, naming it.

    Example (on a machine without a GPU: with ``TRITON_INTERPRET=1``):
        >>> x = torch.ones(1, 4, 6, 6)
        >>> conv3x3(x, torch.ones(8, 3, 3, 4), torch.ones(2, 8), relu=True, pool=True)[0, 0, 0]
        tensor([37., 37., 37.])
    """
    check_conv3x3(x, weight, affine, pool)
    x = x.contiguous(memory_format=torch.channels_last)
    n, cin, h, w = x.shape
    cout = weight.shape[0]

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    tapped = empty(n, cout, h, w) if tap else None
    if not n:
        out = empty(0, cout, h // 2, w // 2) if pool else empty(0, cout, h, w)
        return (tapped, out) if tap else out
    architecture = architecture_of(x.device)
    launch = launch_of(x.dtype, n, h, w, cin, cout, relu, pool, architecture, tap, precision)
    out = empty(*launch.out_size)
    partials = counters = None
    if launch.counters:
        partials = torch.empty(launch.partials, dtype=torch.float32, device=x.device)
        counters = torch.zeros(launch.counters, dtype=torch.int32, device=x.device)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        launch.kernel[launch.grid](**launch.arguments(x, weight, affine, out, tapped, partials, counters))
    return (tapped, out) if tap else out


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
