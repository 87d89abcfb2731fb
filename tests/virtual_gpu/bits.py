"""Comparisons, conversions and bit fields: the rest of the per-thread instructions, registered in alu.ALU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.virtual_gpu.alu import (
    TYPES,
    Array,
    Compute,
    Sources,
    alu,
    bfloat16,
    flush,
    shift_left,
    shift_right,
    widen,
)
from tests.virtual_gpu.parse import Instruction, PtxError

_U32, _U64, _PRED = np.dtype("u4"), np.dtype("u8"), np.dtype("?")

# Ordered comparisons are false for NaN, those that end in u are true (and equ is not "unsigned equal").
_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_COMPARE |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
_UNORDERED = {f"{name}u" for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name: str, is_float: bool) -> Callable[[Array, Array], Array]:
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name in _UNORDERED and is_float:
        fn = _COMPARE[name[:2]]
        return lambda a, b: fn(a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne" and is_float:
        return lambda a, b: (a < b) | (a > b)
    return _COMPARE[name]


def setp(i: Instruction, source: Sources) -> list[Compute]:
    """``setp.cmp[.bool][.ftz].type p[|q], a, b[, c]``: the values of p and q (one value if there is no q)."""
    _, name, *middle, kind = i.parts
    combine = [m for m in middle if m in _COMBINE]
    if unknown := set(middle) - {*_COMBINE, "ftz"}:
        raise PtxError(f"{i.op}: .{min(unknown)} is not supported")
    half = kind.removesuffix("x2")
    is_float = half in ("f16", "bf16", "f32", "f64")
    compare = _comparison(name, is_float)
    third = source(3, _PRED) if combine else None
    fn = _COMBINE[combine[0]] if combine else None

    def combined(value: Array, R: list[np.ndarray]) -> Array:
        if third is None or fn is None:
            return value
        return fn(value, third(R))

    if half in ("f16", "bf16"):
        word = _U32 if kind.endswith("x2") else np.dtype("u2")
        a, b = source(1, word), source(2, word)

        def part(shift: int) -> Compute:
            def run(R: list[np.ndarray]) -> Array:
                x, y = (widen((np.asarray(v(R)) >> word.type(shift)).astype(np.uint16), half) for v in (a, b))
                return combined(compare(x, y), R)

            return run

        return [part(0), part(16)] if word == _U32 else [part(0)]
    a, b = (flushing(i, source(n, TYPES[kind])) for n in (1, 2))
    first: Compute = lambda R: combined(compare(a(R), b(R)), R)  # noqa: E731
    return [first, lambda R: combined(~compare(a(R), b(R)), R)]


def flushing(i: Instruction, read: Compute) -> Compute:
    """``.ftz``: subnormal fp32 operands count as zeros."""
    return (lambda R: flush(np.asarray(read(R)))) if "ftz" in i.parts and i.parts[-1] == "f32" else read


# cvt

_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_CVT_MODIFIERS = {"rn", "rz", "rna", "ftz", "sat", "satfinite", "relu", *_ROUND}


@alu("cvt", allow=" ".join(_CVT_MODIFIERS | {"tf32"}))
def _convert(i: Instruction, source: Sources) -> Compute:
    to, of, modifiers = i.parts[-2], i.parts[-1], set(i.parts[1:-2])
    if to in ("f16x2", "bf16x2"):
        high, low = source(1, TYPES["f32"]), source(2, TYPES["f32"])
        to = to.removesuffix("x2")

        def packed(R: list[np.ndarray]) -> Array:
            bits = [_to_float(np.atleast_1d(v(R)), to, modifiers).astype(np.uint32) for v in (low, high)]
            return bits[0] | bits[1] << np.uint32(16)

        return packed
    if of == "bf16":
        word = source(1, np.dtype("u2"))
        read: Compute = lambda R: (word(R).astype(np.uint32) << np.uint32(16)).view(np.float32)  # noqa: E731
    else:
        read = flushing(i, source(1, TYPES[of]))
    from_float = of in ("f16", "bf16", "f32", "f64")
    if to == "tf32":
        return lambda R: _to_tf32(np.atleast_1d(read(R)))
    if to in ("f16", "bf16", "f32", "f64"):
        integral = [m for m in modifiers if m in _ROUND]
        if integral:
            return lambda R: _to_float(_ROUND[integral[0]](read(R)), to, set())
        return lambda R: _to_float(np.atleast_1d(read(R)), to, modifiers)
    if from_float:
        rounding = next(m for m in modifiers if m in _ROUND)
        return lambda R: _to_integer(_ROUND[rounding](read(R)), TYPES[to])
    if "sat" in modifiers:
        info = np.iinfo(TYPES[to])
        return lambda R: _clip(read(R), info).astype(TYPES[to])
    return lambda R: np.asarray(read(R)).astype(TYPES[to])


def _clip(values: Array, info: Any) -> Array:
    low = max(info.min, int(np.iinfo(values.dtype).min))
    return np.clip(values, low, min(info.max, int(np.iinfo(values.dtype).max)))


def _to_float(values: Array, to: str, modifiers: set[str]) -> Array:
    """Numbers to the patterns of a float type; integers and wider floats are rounded once."""
    if "sat" in modifiers:
        values = np.where(np.isnan(values), values.dtype.type(0), np.clip(values, 0, 1))
    if "relu" in modifiers:
        values = np.where(values < 0, values.dtype.type(0), values)
    if to == "bf16":
        return bfloat16(values.astype(np.float32), truncate="rz" in modifiers)
    if "rz" in modifiers and to != "f64":
        short = values.astype(TYPES[to])
        away = np.abs(short.astype(np.float64)) > np.abs(values.astype(np.float64))
        return (np.where(away, np.nextafter(short, TYPES[to].type(0)), short)).view(f"u{TYPES[to].itemsize}")
    return values.astype(TYPES[to]).view(f"u{TYPES[to].itemsize}")


def _to_tf32(values: Array) -> Array:
    """Ties away from zero (.rna), the low 13 bits cleared."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x1000) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded, bits)


def _to_integer(values: Array, dtype: np.dtype) -> Array:
    """Out of range goes to the nearest limit, NaN to 0."""
    info = np.iinfo(dtype)
    exact = np.asarray(values, np.float64)
    top = exact >= float(info.max)
    inside = np.where(np.isnan(exact) | top, 0.0, np.maximum(exact, float(info.min)))
    whole = inside.astype(np.uint64 if dtype == np.dtype("u8") else np.int64).astype(dtype)
    return np.where(top, dtype.type(info.max), whole)


# Bit fields


@alu("bfe")
def _extract(i: Instruction, source: Sources) -> Compute:
    dtype = TYPES[i.parts[-1]]
    a, position, count = source(1, dtype), source(2, _U32), source(3, _U32)
    width = 8 * dtype.itemsize

    def run(R: list[np.ndarray]) -> Array:
        value = np.asarray(a(R))
        start, bits = (np.minimum(v(R) & np.uint32(0xFF), width).astype(np.int64) for v in (position, count))
        if dtype.kind == "u":
            return shift_right(value, start) & ~shift_left(~np.zeros_like(value), bits)
        # The sign is the topmost bit of the field, or of the register where the field reaches over it.
        unused = width - np.minimum(start + bits, width)
        return np.where(bits == 0, dtype.type(0), shift_right(shift_left(value, unused), unused + start))

    return run


@alu("bfi")
def _insert(i: Instruction, source: Sources) -> Compute:
    dtype = TYPES[i.parts[-1]]
    a, b, position, count = source(1, dtype), source(2, dtype), source(3, _U32), source(4, _U32)
    width = 8 * dtype.itemsize

    def run(R: list[np.ndarray]) -> Array:
        start, bits = (np.minimum(v(R) & np.uint32(0xFF), width).astype(np.int64) for v in (position, count))
        below = np.asarray(b(R))
        field = shift_left(~shift_left(~np.zeros_like(below), bits), start)
        return below & ~field | shift_left(np.asarray(a(R)), start) & field

    return run


@alu("lop3")
def _logic(i: Instruction, source: Sources) -> Compute:
    reads, table = [source(n, _U32) for n in (1, 2, 3)], i.operands[4].value

    def run(R: list[np.ndarray]) -> Array:
        a, b, c = (read(R) for read in reads)
        result = np.uint32(0)
        for row in range(8):
            if table >> row & 1:
                result = result | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return result

    return run


@alu("prmt")
def _permute(i: Instruction, source: Sources) -> Compute:
    a, b, selector = (source(n, _U32) for n in (1, 2, 3))

    def run(R: list[np.ndarray]) -> Array:
        both = np.asarray(b(R)).astype(np.uint64) << np.uint64(32) | np.asarray(a(R)).astype(np.uint64)
        chosen = np.asarray(selector(R)).astype(np.uint64)
        result = np.uint64(0)
        for byte in range(4):
            nibble = chosen >> np.uint64(4 * byte) & np.uint64(15)
            value = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
            sign = np.where(value & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            value = np.where(nibble & np.uint64(8), sign, value)
            result = result | value << np.uint64(8 * byte)
        return result.astype(np.uint32)

    return run


@alu("shf", allow="l r wrap clamp")
def _funnel(i: Instruction, source: Sources) -> Compute:
    low, high, count = (source(n, _U32) for n in (1, 2, 3))
    left, wrap = "l" in i.parts, "wrap" in i.parts

    def run(R: list[np.ndarray]) -> Array:
        both = np.asarray(high(R)).astype(np.uint64) << np.uint64(32) | np.asarray(low(R)).astype(np.uint64)
        by = (count(R) & np.uint32(31) if wrap else np.minimum(count(R), np.uint32(32))).astype(np.uint64)
        return ((both << by >> np.uint64(32)) if left else (both >> by)).astype(np.uint32)

    return run


@alu("popc", "clz", "brev", "bfind", allow="shiftamt")
def _scan(i: Instruction, source: Sources) -> Compute:
    dtype = TYPES[i.parts[-1]]
    a, width, name = source(1, dtype), 8 * dtype.itemsize, i.parts[0]
    if name == "bfind" and (dtype.kind == "i" or "shiftamt" in i.parts):
        raise PtxError(f"{i.op} is not supported")

    def run(R: list[np.ndarray]) -> Array:
        value = np.atleast_1d(a(R))
        bits = np.unpackbits(value.view(np.uint8).reshape(-1, dtype.itemsize), axis=1, bitorder="little")
        if name == "popc":
            return bits.sum(axis=1).astype(np.uint32)
        if name == "brev":
            return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(dtype)[:, 0]
        leading = np.where(bits.any(axis=1), bits[:, ::-1].argmax(axis=1), width)
        return (leading if name == "clz" else width - 1 - leading).astype(np.uint32)

    return run


@alu("dp4a")
def _dot(i: Instruction, source: Sources) -> Compute:
    kinds = [np.int8 if part == "s32" else np.uint8 for part in i.parts[1:]]
    a, b, c = (source(n, _U32) for n in (1, 2, 3))

    def run(R: list[np.ndarray]) -> Array:
        x, y = (np.atleast_1d(v(R)).view(k).reshape(-1, 4).astype(np.int64) for v, k in zip((a, b), kinds, strict=True))
        return ((x * y).sum(axis=1) + np.asarray(c(R)).astype(np.int64)).astype(np.uint32)

    return run
