"""What the tensor-core instructions compute, as pure functions on NumPy arrays: no memory, no time, no checks.

Registers are ``uint32 [warps, 32, registers]``, as many warps as execute the instruction at once. All layouts follow
from one fact: a register of a warp, over its lanes, is a block of 8 rows of 16 bytes, lane ``4 * row + word``.

    mma A  [16, k]   register = 2 * (16-byte column) + (row >= 8)           PTX ISA 9.2, 9.7.14.5.3 to .11
    mma B  [k, 8]    register = 16-byte column; its rows are the columns of B
    C, D   [16, n]   register = 4 * (column / 8) + 2 * (row >= 8) + column % 2, two columns to a lane

Sums run in fp32 (exact for integers) in the order of NumPy's matmul. The hardware's order and its rounding inside a sum
are not documented, so results are compared within error bounds, never bit for bit with a GPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Halves = NDArray[np.uint16]
Floats = NDArray[np.float32]
Addresses = NDArray[np.int64]

ELEMENT_BYTES = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1}
ACCUMULATORS = {"f32": np.float32, "f16": np.float16, "s32": np.int32}


def decode(packed: NDArray[Any], kind: str) -> Floats:
    """Elements of a packed operand, lowest bits first: unsigned ``[..., n]`` -> ``float32 [..., elements]``."""
    packed = np.ascontiguousarray(packed)
    if kind == "f16":
        return packed.view(np.float16).astype(np.float32)
    if kind == "bf16":
        return (packed.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if kind == "tf32":
        return (packed.view(np.uint32) & 0xFFFFE000).view(np.float32)  # the tensor core reads 10 bits of the mantissa
    if kind in ("s8", "u8"):
        return packed.view(np.int8 if kind == "s8" else np.uint8).astype(np.float32)
    raise ValueError(f"operand type .{kind} is not simulated; those that are: {', '.join(ELEMENT_BYTES)}")


def mma_a(registers: Words, kind: str) -> Floats:
    """Fragments of A as matrices: ``[warps, 32, 2 * kb]`` -> ``float32 [warps, 16, k]``."""
    warps, _, count = registers.shape
    blocks = registers.reshape(warps, 8, 4, count // 2, 2)  # row, word, 16-byte column, upper half
    return decode(blocks.transpose(0, 4, 1, 3, 2).reshape(warps, 16, count * 2), kind)


def mma_b(registers: Words, kind: str) -> Floats:
    """Fragments of B as matrices: ``[warps, 32, kb]`` -> ``float32 [warps, k, 8]``."""
    warps, _, count = registers.shape
    rows = registers.reshape(warps, 8, 4, count).transpose(0, 1, 3, 2).reshape(warps, 8, count * 4)
    return decode(rows, kind).transpose(0, 2, 1)


def mma_c(registers: Words, kind: str) -> NDArray[Any]:
    """Accumulators as matrices: ``[warps, 32, n / 2]`` -> ``[warps, 16, n]``, float32 (int32 for s32).

    ``n`` is 8 for mma. wgmma's are the same with a longer n: 16 rows to each of its four warps (9.7.15.5.1.1.1). Those
    of type f16 come two to a register.
    """
    elements: NDArray[Any] = np.ascontiguousarray(registers).view(_accumulator(kind))
    warps, _, count = elements.shape
    blocks = elements.reshape(warps, 8, 4, count // 4, 2, 2)  # row, word, column / 8, upper half, column % 2
    matrix = blocks.transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, count * 2)
    return matrix.astype(np.float32) if kind == "f16" else matrix


def mma_d(matrix: NDArray[Any], kind: str, saturate: bool = False) -> Words:
    """The inverse of :func:`mma_c`, rounding to the accumulators' type; integers wrap unless ``saturate``."""
    dtype = _accumulator(kind)
    if kind == "s32":
        low, high = -(2**31), 2**31 - 1
        matrix = np.clip(matrix, low, high) if saturate else matrix.astype(np.int64)
    warps, _, n = matrix.shape
    blocks = matrix.reshape(warps, 2, 8, n // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5)
    with np.errstate(over="ignore"):  # beyond 65504 f16 is Inf, as on the hardware
        return blocks.astype(dtype, order="C").reshape(warps, 32, n // 2).view(np.uint32)


def _accumulator(kind: str) -> type:
    if kind not in ACCUMULATORS:
        raise ValueError(f"accumulators of type .{kind} are not simulated; those that are: {', '.join(ACCUMULATORS)}")
    return ACCUMULATORS[kind]


def mma(a: Words, b: Words, c: Words, kinds: tuple[str, str, str], saturate: bool = False) -> Words:
    """``mma.sync.m16n8k*.row.col``: D = A B + C. The number of registers says which k.

    Args:
        a, b, c: ``[warps, 32, registers]``: A has 2 or 4, B half of that, C 4 (2 for f16).
        kinds: the types of A, B and C = D.
        saturate: ``.satfinite`` of the integer forms.
    """
    if a.shape[2] not in (2, 4) or b.shape[2] * 2 != a.shape[2]:
        raise ValueError(f"mma: A has {a.shape[2]} registers and B {b.shape[2]}; m16n8k* has 2 and 1 or 4 and 2")
    with np.errstate(invalid="ignore", over="ignore"):  # Inf * 0 is NaN: a result, no accident
        product = np.matmul(mma_a(a, kinds[0]), mma_b(b, kinds[1]))
        if kinds[2] == "s32":
            product = product.astype(np.int64)  # |product| < 2^24: exact in fp32
        return mma_d(mma_c(c, kinds[2]) + product, kinds[2], saturate)


def ldmatrix_addresses(addresses: Addresses, matrices: int) -> Addresses:
    """The rows that ``ldmatrix`` and ``stmatrix`` touch: ``[warps, 32]`` by lane -> ``[warps, matrices, 8]``.

    Each row is 16 bytes; only the first ``8 * matrices`` lanes' addresses count (9.7.14.5.15).
    """
    return addresses[:, : 8 * matrices].reshape(len(addresses), matrices, 8)


def ldmatrix(rows: Halves, trans: bool) -> Words:
    """``ldmatrix.m8n8.b16``: rows ``uint16 [warps, matrices, 8, 8]`` -> registers ``[warps, 32, matrices]``."""
    warps, matrices = rows.shape[:2]
    words = np.ascontiguousarray(rows.swapaxes(2, 3) if trans else rows).view(np.uint32)
    return np.ascontiguousarray(words.transpose(0, 2, 3, 1)).reshape(warps, 32, matrices)


def stmatrix(registers: Words, trans: bool) -> Halves:
    """``stmatrix.m8n8.b16``, the inverse: ``[warps, 32, matrices]`` -> rows ``uint16 [warps, matrices, 8, 8]``."""
    warps, _, matrices = registers.shape
    words = np.ascontiguousarray(registers.reshape(warps, 8, 4, matrices).transpose(0, 3, 1, 2))
    rows = words.view(np.uint16)
    return rows.swapaxes(2, 3) if trans else rows


def swizzle(address: Any, width: int, base_offset: int = 0) -> Any:
    """Shared-memory addresses of 16-byte units under ``width``-byte swizzling (0: none): bits 4.. ^= bits 7..

    The pattern is one of absolute addresses, so it is the same for TMA and for wgmma (5.5.7, 9.7.15.5.1.2).
    ``base_offset`` is the descriptor's: bits 7 to 9 of where a pattern starts that is not aligned to its own size.
    """
    if width not in (0, 32, 64, 128):
        raise ValueError(f"swizzle width is {width} bytes; it must be 0, 32, 64 or 128")
    units = width // 16 - 1 if width else 0
    return address ^ ((((address >> 7) - base_offset) & units) << 4)


@lru_cache(maxsize=4096)
def operand_addresses(descriptor: int, mn: int, transposed: bool) -> Addresses:
    """Where a wgmma operand lies in shared memory, as addresses of 16-byte units, read-only.

    Fields of the descriptor: 9.7.15.5.1.2.2; strides: 9.7.15.5.1.2.1. An atom is ``width`` bytes wide and 8 rows deep.

    Args:
        descriptor: the 64-bit value.
        mn: rows of A or columns of B. The sequential axis is 32 bytes long in every wgmma.
        transposed: the operand is MN-major (16-bit types only): ``imm-trans-a`` or ``-b`` of the instruction.

    Returns:
        K-major: ``[mn, 2]``; MN-major: ``[k = 16, mn / 8]``.
    """
    start, leading, stride = ((descriptor >> low & 0x3FFF) << 4 for low in (0, 16, 32))
    width = (0, 128, 64, 32)[descriptor >> 62 & 3]
    per_atom = (width or 16) // 16  # units
    rows, units = (16, mn // 8) if transposed else (mn, 2)
    row, unit = np.arange(rows), np.arange(units)  # a swizzled K-major operand stays inside its atom
    deeper, further = (leading, stride) if transposed and not width else (stride, leading)
    line = row % 8 * per_atom * 16 + row // 8 * deeper
    column = unit % per_atom * 16 + unit // per_atom * further
    address = swizzle(start + line[:, None] + column, width, descriptor >> 49 & 7)
    address.flags.writeable = False
    return address


def operand(units: Words, kind: str, transposed: bool) -> Floats:
    """The matrices read at :func:`operand_addresses`: ``uint32 [groups, x, y, 4]`` -> ``float32 [groups, mn, k]``."""
    groups, rows, count, _ = units.shape
    if transposed and ELEMENT_BYTES[kind] != 2:
        raise ValueError(f"wgmma: operands of type .{kind} cannot be MN-major; only f16 and bf16 can (9.7.15.5.2)")
    matrix = decode(units.reshape(groups, rows, count * 4), kind)
    return matrix.transpose(0, 2, 1) if transposed else matrix
