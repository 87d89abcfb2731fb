"""One Triton kernel for each family of instructions, for test_interpreter.py.

They use builtins of triton.language only: its own jitted functions (tl.sum, tl.zeros …) belong to the mode that Triton
was imported in, and the test loads this file once for the interpreter and once for the compiler.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def integers(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    divisor = tl.where(y == 0, 7, y)
    a = (x // divisor) * 3 + x % divisor - (x << (y & 15)) + (x >> (y & 31))
    b = (x & y) | ((x ^ (y >> 3)) & ~x) | (x > y).to(tl.int32) * 64 + tl.minimum(x, y) - tl.maximum(x, -y)
    wide = x.to(tl.int64) * y.to(tl.int64) + (x.to(tl.int8).to(tl.int64) << 8) + y.to(tl.uint16).to(tl.int64)
    high = tl.umulhi(x.to(tl.uint32, bitcast=True), y.to(tl.uint32, bitcast=True))
    tl.store(out_ptr + i, a.to(tl.int64) + b + wide + high.to(tl.int64) + wide // (divisor.to(tl.int64) * divisor))


@triton.jit
def floats(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    bounded = tl.minimum(tl.maximum(x, -4.0), 4.0)
    a = tl.exp(bounded) + tl.log(tl.abs(y) + 1.0) + tl.sqrt(tl.abs(x)) * y + tl.fma(x, y, bounded)
    b = tl.where(x < y, x / (tl.abs(y) + 0.5), tl.floor(x) - tl.ceil(y)) + x.to(tl.int32).to(tl.float32)
    tl.store(out_ptr + i, a + b.to(tl.float16).to(tl.float32))


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def reductions(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Column sums, then the largest of each row: across the lanes of a warp and across warps."""
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + r[:, None] * COLUMNS + c[None, :])
    tl.store(out_ptr + c, tl.reduce(x, 0, _add))
    tl.store(out_ptr + COLUMNS + r, tl.reduce(x, 1, _larger))


@triton.jit
def scans(x_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl.associative_scan(tl.load(x_ptr + i), 0, _add))


@triton.jit
def transposed(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows in, columns out, both in vectors: through shared memory."""
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + r[:, None] * COLUMNS + c[None, :])
    tl.store(out_ptr + c[:, None] * ROWS + r[None, :], tl.trans(x))


@triton.jit
def histogram(x_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    tl.atomic_add(out_ptr + x, 1, mask=x < 20)
    tl.atomic_max(out_ptr + 32 + x * 0, x)


@triton.jit
def collatz(x_ptr, out_ptr, LIMIT: tl.constexpr):
    """A loop whose end depends on data, with a branch inside."""
    x = tl.load(x_ptr + tl.program_id(0))
    steps = 0
    odd = 0
    while x > 1:
        if x % 2 == 0:
            x = x // 2
        else:
            x = 3 * x + 1
            odd += 1
        steps += 1
    tl.store(out_ptr + tl.program_id(0), tl.minimum(steps, LIMIT) * 1000 + odd)


@triton.jit
def matmul(
    a_ptr,  # [M, K], or [K, M] with A_TRANSPOSED
    b_ptr,  # [K, N], or [N, K] with B_TRANSPOSED
    out_ptr,  # [M, N]
    k_size,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
):
    """Pipelined, the last step masked; ``k_size`` <= K."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BK)
    accumulator = tl.full((M, N), 0, out_ptr.dtype.element_ty)
    for start in range(0, k_size, BK):
        at = start + k
        a_offsets = at[None, :] * M + m[:, None] if A_TRANSPOSED else m[:, None] * K + at[None, :]
        b_offsets = n[None, :] * K + at[:, None] if B_TRANSPOSED else at[:, None] * N + n[None, :]
        a = tl.load(a_ptr + a_offsets, mask=(at < k_size)[None, :], other=0)
        b = tl.load(b_ptr + b_offsets, mask=(at < k_size)[:, None], other=0)
        accumulator = tl.dot(a, b, accumulator, out_dtype=out_ptr.dtype.element_ty)
    tl.store(out_ptr + m[:, None] * N + n[None, :], accumulator)


@triton.jit
def two_products(a_ptr, b_ptr, c_ptr, out_ptr, SIZE: tl.constexpr):
    """(A B) C: the first product is an operand of the second without leaving the registers."""
    i = tl.arange(0, SIZE)
    square = i[:, None] * SIZE + i[None, :]
    product = tl.dot(tl.load(a_ptr + square), tl.load(b_ptr + square))
    tl.store(out_ptr + square, tl.dot(product.to(tl.float16), tl.load(c_ptr + square)))


@triton.jit
def descriptors(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Boxes through tensor maps: one row up and 16 bytes to the left, zeros outside."""
    row, column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    box = x.load([row - 1, column - 8])
    out.store([row, column], box + box)
