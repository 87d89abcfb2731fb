"""Tensor-core instructions against scalar oracles: the formulas of the PTX ISA, element by element."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import numpy as np
import pytest

from tests.virtual_gpu import tensor

EPS32 = 2.0**-23

# PTX ISA 9.2, 9.7.14.5.3 to .11: (row, column) of element i of lane (g, t) of A, and row of B, whose column is g.
FRAGMENTS: dict[str, tuple[int, Callable[[int, int, int], tuple[int, int]], Callable[[int, int], int]]] = {
    "m16n8k4.tf32": (4, lambda g, t, i: (g + 8 * i, t), lambda t, i: t),
    "m16n8k8.tf32": (8, lambda g, t, i: (g + 8 * (i % 2), t + 4 * (i >= 2)), lambda t, i: t + 4 * i),
    "m16n8k8.f16": (8, lambda g, t, i: (g + 8 * (i >= 2), t * 2 + (i & 1)), lambda t, i: t * 2 + i),
    "m16n8k16.f16": (
        16,
        lambda g, t, i: (g if i < 2 or 4 <= i < 6 else g + 8, t * 2 + (i & 1) + 8 * (i >= 4)),
        lambda t, i: t * 2 + (i & 1) + 8 * (i >= 2),
    ),
    "m16n8k16.s8": (16, lambda g, t, i: (g + 8 * (i >= 4), t * 4 + (i & 3)), lambda t, i: t * 4 + i),
    "m16n8k32.s8": (
        32,
        lambda g, t, i: (g if i < 4 or 8 <= i < 12 else g + 8, t * 4 + (i & 3) + 16 * (i >= 8)),
        lambda t, i: t * 4 + (i & 3) + 16 * (i >= 4),
    ),
}
SHAPE_OF = {"bf16": "f16", "u8": "s8"}
MMA = [
    ("m16n8k4", ("tf32", "tf32", "f32")),
    ("m16n8k8", ("tf32", "tf32", "f32")),
    ("m16n8k8", ("f16", "f16", "f32")),
    ("m16n8k8", ("bf16", "bf16", "f32")),
    ("m16n8k16", ("f16", "f16", "f32")),
    ("m16n8k16", ("f16", "f16", "f16")),
    ("m16n8k16", ("bf16", "bf16", "f32")),
    ("m16n8k16", ("s8", "s8", "s32")),
    ("m16n8k32", ("s8", "u8", "s32")),
]
EDGES = {  # +-0, Inf, NaN, the smallest denormal, the largest finite value, 1
    "f16": [0, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0x0001, 0x7BFF, 0x3C00],
    "bf16": [0, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x0001, 0x7F7F, 0x3F80],
    "tf32": [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x00002000, 0x7F7FE000, 0x3F800FFF],
    "s8": [0, 0x80, 0x7F, 0xFF, 1],
    "u8": [0, 0x80, 0x7F, 0xFF, 1],
}
EDGES["f32"] = [*EDGES["tf32"], 1]


def value(bits: int, kind: str) -> float:
    """What an element means; every format by its own definition."""
    if kind in ("s8", "s32", "u8"):
        width = 32 if kind == "s32" else 8
        return float(bits - (1 << width) if kind[0] == "s" and bits >> (width - 1) else bits)
    if kind == "f16":
        return struct.unpack("<e", struct.pack("<H", bits))[0]
    shift, keep = {"bf16": (16, ~0), "tf32": (0, ~0x1FFF), "f32": (0, ~0)}[kind]
    return struct.unpack("<f", struct.pack("<I", bits << shift & keep & 0xFFFFFFFF))[0]


def elements(words: np.ndarray, kind: str) -> list[int]:
    """Bits of the elements that a vector of registers holds, low to high."""
    bits = {"f16": 16, "bf16": 16, "s8": 8, "u8": 8}.get(kind, 32)
    return [int(w) >> low & ((1 << bits) - 1) for w in words for low in range(0, 32, bits)]


def values(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Registers of ordinary values: integers of all bits, floats of 12 bits in [-8, 8]."""
    if kind in ("s8", "u8", "s32"):
        return rng.integers(0, 2**32, shape, dtype=np.uint64).astype(np.uint32)
    count = shape[-1] * (1 if kind in ("tf32", "f32") else 2)
    floats = (rng.integers(-2048, 2049, (*shape[:-1], count)) / 256).astype(np.float32)
    if kind == "f16":
        return floats.astype(np.float16).view(np.uint32)
    return (
        (floats.view(np.uint32) >> 16).astype(np.uint16).view(np.uint32) if kind == "bf16" else floats.view(np.uint32)
    )


def of_edges(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    per_word = {"f16": 2, "bf16": 2, "s8": 4, "u8": 4}.get(kind, 1)
    drawn = rng.choice(np.array(EDGES[kind], dtype=np.uint32), (*shape[:-1], shape[-1] * per_word))
    return drawn.astype({1: np.uint32, 2: np.uint16, 4: np.uint8}[per_word]).view(np.uint32)


def assert_close(got: float, terms: list[float], kind: str) -> None:
    """One element against its terms, c among them: exact for integers, else within the rounding of the sum."""
    if kind == "s32":
        assert got == value(int(sum(terms)) & 0xFFFFFFFF, "s32")
        return
    limit = 65520.0 if kind == "f16" else 3.4028236e38  # halfway to the first value that does not exist
    magnitude = sum(abs(term) for term in terms if math.isfinite(term))
    if magnitude >= limit:
        return  # in some order a partial sum overflows, and Inf - Inf is NaN: nothing is promised
    expected = sum(terms)
    if math.isnan(expected):
        assert math.isnan(got)
    elif math.isinf(expected):
        assert got == expected
    else:
        bound = len(terms) * (EPS32 * magnitude + 2.0**-149)
        bound += abs(expected) * 2.0**-11 + 2.0**-25 if kind == "f16" else 0
        assert abs(got - expected) <= bound


@pytest.mark.parametrize("make", [values, of_edges], ids=["ordinary", "edges"])
@pytest.mark.parametrize(("shape", "kinds"), MMA, ids=lambda p: p if isinstance(p, str) else "-".join(p))
def test_mma(shape: str, kinds: tuple[str, str, str], make: Callable) -> None:
    rng = np.random.default_rng(1)
    k, of_a, of_b = FRAGMENTS[f"{shape}.{SHAPE_OF.get(kinds[0], kinds[0])}"]
    registers = k * tensor.ELEMENT_BYTES[kinds[0]] // 8
    warps = 2
    a, b = make(rng, (warps, 32, registers), kinds[0]), make(rng, (warps, 32, registers // 2), kinds[1])
    make_c = values if kinds[2] == "s32" else make
    c = make_c(rng, (warps, 32, 2 if kinds[2] == "f16" else 4), kinds[2])
    got = tensor.mma(a, b, c, kinds)
    assert got.shape == c.shape
    assert got.dtype == np.uint32
    for warp in range(warps):
        a_matrix, b_matrix = np.full((16, k), np.nan), np.full((k, 8), np.nan)
        for lane in range(32):
            g, t = lane >> 2, lane % 4
            for i, bits in enumerate(elements(a[warp, lane], kinds[0])):
                a_matrix[of_a(g, t, i)] = value(bits, kinds[0])
            for i, bits in enumerate(elements(b[warp, lane], kinds[1])):
                b_matrix[of_b(t, i), g] = value(bits, kinds[1])
        for lane in range(32):
            g, t = lane >> 2, lane % 4
            into = elements(c[warp, lane], kinds[2])
            for i, bits in enumerate(elements(got[warp, lane], kinds[2])):
                row, column = g + 8 * (i >= 2), t * 2 + (i & 1)  # 9.7.14.5, accumulators of every m16n8
                products = [float(x) * float(y) for x, y in zip(a_matrix[row], b_matrix[:, column], strict=True)]
                assert_close(value(bits, kinds[2]), [*products, value(into[i], kinds[2])], kinds[2])


def test_mma_products_of_16_bits_are_exact() -> None:
    """One product of 11-bit mantissas per sum: nothing may round."""
    a = np.zeros((1, 32, 4), np.float16).repeat(2, axis=2)
    a[:, :, :2] = np.float16(1 + 2**-10)  # rows 0-7, columns 0-7
    b = np.zeros((1, 32, 4), np.float16)
    b[0, ::4, 0] = np.float16(1 + 2**-10)  # row 0 of B
    d = tensor.mma(a.view(np.uint32), b.view(np.uint32), np.zeros((1, 32, 4), np.uint32), ("f16", "f16", "f32"))
    assert (d.view(np.float32)[0, :, :2] == (1 + 2**-10) ** 2).all()
    assert (d.view(np.float32)[0, :, 2:] == 0).all()


def test_integer_accumulators_wrap_or_saturate() -> None:
    a = np.full((1, 32, 4), 0x7F7F7F7F, np.uint32)
    b = np.full((1, 32, 2), 0x7F7F7F7F, np.uint32)
    c = np.full((1, 32, 4), 0x7FFFFFFF, np.uint32)
    kinds = ("s8", "s8", "s32")
    assert (tensor.mma(a, b, c, kinds) == 0x7FFFFFFF + 32 * 127 * 127).all()
    assert (tensor.mma(a, b, c, kinds, saturate=True) == 0x7FFFFFFF).all()


def test_unknown_forms_are_refused_by_name() -> None:
    a, b, c = (np.zeros((1, 32, n), np.uint32) for n in (4, 2, 4))
    with pytest.raises(ValueError, match=r"\.e4m3 is not simulated; those that are: f16"):
        tensor.mma(a, b, c, ("e4m3", "e4m3", "f32"))
    with pytest.raises(ValueError, match=r"\.f64 are not simulated; those that are: f32"):
        tensor.mma(a, b, c, ("f16", "f16", "f64"))
    with pytest.raises(ValueError, match="A has 4 registers and B 4"):
        tensor.mma(a, c, c, ("f16", "f16", "f32"))


@pytest.mark.parametrize("matrices", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True], ids=["", "trans"])
def test_ldmatrix_and_stmatrix(matrices: int, trans: bool) -> None:
    """9.7.14.5.15: lane 8 j + r has the address of row r of matrix j; lane (g, t) gets its elements (g, 2 t + {0, 1}),
    with .trans those of the transposed matrix."""
    memory = np.arange(2 * 32 * 8, dtype=np.uint16).reshape(2 * 32, 8)  # rows of 8 elements, each value once
    addresses = np.random.default_rng(2).permutation(64).reshape(2, 32).astype(np.int64)
    rows = tensor.ldmatrix_addresses(addresses, matrices)
    assert rows.shape == (2, matrices, 8)
    got = tensor.ldmatrix(memory[rows], trans)
    for warp in range(2):
        for lane in range(32):
            g, t = lane >> 2, lane % 4
            for j in range(matrices):
                for i, element in enumerate(elements(got[warp, lane, j : j + 1], "f16")):
                    row, column = (2 * t + i, g) if trans else (g, 2 * t + i)
                    assert element == memory[addresses[warp, 8 * j + row], column]
    np.testing.assert_array_equal(tensor.stmatrix(got, trans), memory[rows])


def canonical(mn: int, k: int, t: int, width: int, transposed: bool, leading: int, stride: int) -> int:
    """Offset in elements of element (mn, k), before swizzling: the canonical layouts of 9.7.15.5.1.2.1.1, whose
    notation is that of CuTe; ``t`` elements are 16 bytes, and so are the units of ``leading`` and ``stride``."""
    s = max(1, width // 16)
    if transposed:  # ((T, s, m), (8, k)) : ((1, T, LBO), (sT, SBO)), without swizzling SBO and LBO change places
        leading, stride = (leading, stride) if width else (stride, leading)
        return mn % t + mn // t % s * t + mn // (t * s) * leading * t + k % 8 * s * t + k // 8 * stride * t
    # ((8, m), (T, 2k)) : ((sT, SBO), (1, T)), without swizzling LBO instead of T
    return mn % 8 * s * t + mn // 8 * stride * t + k % t + k // t * (t if width else leading * t)


def bits_of(start: int, leading: int, stride: int, width: int, base_offset: int = 0) -> int:
    """9.7.15.5.1.2.2."""
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[width]
    return start >> 4 | leading << 16 | stride << 32 | base_offset << 49 | mode << 62


WGMMA_OPERANDS = [
    (kind, width, transposed)
    for kind in ("f16", "bf16", "tf32", "s8")
    for width in (0, 32, 64, 128)
    for transposed in (False, True)
    if not transposed or kind in ("f16", "bf16")
]


@pytest.mark.parametrize(("kind", "width", "transposed"), WGMMA_OPERANDS)
def test_wgmma_operand(kind: str, width: int, transposed: bool) -> None:
    """An operand laid out by the canonical formula, found again through its descriptor."""
    mn, size = 64, tensor.ELEMENT_BYTES[kind]
    k, t, s = 32 // size, 16 // size, max(1, width // 16)
    if transposed:
        atoms = mn // t // s
        leading, stride = (8 * s, 8 * s * atoms) if width else (8 * mn // t, 8)
    else:
        leading, stride = (1 if width else mn, 8 * s)
    # Where K-major rows are wider than this k, the second part of the atom: start addresses inside an atom are legal.
    start = 2048 + (32 if width > 32 and not transposed else 0)
    memory = np.zeros(16384, np.uint8)
    matrix = np.random.default_rng(3).integers(0, 256, (mn, k, size), dtype=np.uint8)
    for row in range(mn):
        for column in range(k):
            address = start + size * canonical(row, column, t, width, transposed, leading, stride)
            bit4 = address ^ (address >> 7 & (width // 16 - 1 if width else 0)) << 4  # Swizzle<B, 4, 3>
            memory[bit4 : bit4 + size] = matrix[row, column]
    addresses = tensor.operand_addresses(bits_of(start, leading, stride, width), mn, transposed)
    assert (addresses % 16 == 0).all()
    units = memory[addresses[..., None] + np.arange(16)].view(np.uint32)
    got = tensor.operand(units[None], kind, transposed)
    expected = tensor.decode(matrix.reshape(mn, -1).view(np.uint32), kind)
    np.testing.assert_array_equal(got[0], expected)


def test_the_base_offset_moves_the_swizzling_pattern() -> None:
    """A tile that begins 3 * 128 bytes past a 1024-byte boundary, base offset 3: as one that begins at the boundary."""
    aligned = tensor.operand_addresses(bits_of(1024, 1, 64, 128), 64, False)
    moved = tensor.operand_addresses(bits_of(1024 + 3 * 128, 1, 64, 128, base_offset=3), 64, False)
    np.testing.assert_array_equal(aligned + 3 * 128, moved)


def test_operands_of_32_bits_cannot_be_mn_major() -> None:
    with pytest.raises(ValueError, match=r"type \.tf32 cannot be MN-major"):
        tensor.operand(np.zeros((1, 8, 8, 4), np.uint32), "tf32", transposed=True)


@pytest.mark.parametrize("kind", ["f32", "f16", "s32"])
def test_wgmma_accumulators(kind: str) -> None:
    """9.7.15.5.1.1.1, figure 149: warp w of the group has rows 16 w.., register pairs go through n in steps of 8."""
    n = 24
    registers = values(np.random.default_rng(4), (4, 32, n // (4 if kind == "f16" else 2)), kind)
    matrix = tensor.mma_c(registers, kind).reshape(64, n)
    for warp in range(4):
        for lane in range(32):
            for i, bits in enumerate(elements(registers[warp, lane], kind)):
                row, column = 16 * warp + (lane >> 2) + 8 * (i // 2 % 2), 8 * (i // 4) + lane % 4 * 2 + (i & 1)
                assert matrix[row, column] == value(bits, kind)
    np.testing.assert_array_equal(tensor.mma_d(matrix.reshape(4, 16, n), kind), registers)
