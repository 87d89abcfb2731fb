"""Arithmetic: what each thread computes from its own registers. One builder per opcode family, by name in ALU.

A builder gets the instruction and a way to read operands (:class:`Sources`), and returns ``compute(R)``: the new value
of the destination for all threads, from the registers. Rounding is to nearest even and exact, also of ``fma``; NaN
results are whatever NumPy makes, never to be compared by their bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.virtual_gpu.parse import Immediate, Instruction, Negated, PtxError, Register, Special, Symbol

Array = Any  # NumPy array over threads, or a scalar of the same type
Compute = Callable[[list[np.ndarray]], Array]

TYPES: dict[str, Any] = {
    f"{kind}{8 * n}": np.dtype(f"{code}{n}")
    for kind, code in (("u", "u"), ("b", "u"), ("s", "i"))
    for n in (1, 2, 4, 8)
}
TYPES |= {
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "bf16": np.dtype("u2"),
    "pred": np.dtype("?"),
}
_PACKED = {"f16x2": "f16", "bf16x2": "bf16"}
WIDER = {np.dtype(f"{k}{n}"): np.dtype(f"{k}{2 * n}") for k in "ui" for n in (1, 2, 4)}


class Sources:
    """Reads operands of one instruction as a NumPy type."""

    def __init__(self, operands: tuple[Any, ...], symbols: dict[str, int], specials: Callable[[str], int]) -> None:
        self.operands, self.symbols, self.specials = operands, symbols, specials

    def __call__(self, index: int, dtype: np.dtype) -> Compute:
        return self.read(self.operands[index], dtype)

    def read(self, operand: Any, dtype: np.dtype) -> Compute:
        dtype = np.dtype(dtype)
        if isinstance(operand, Immediate):
            return _constant(_immediate(operand, dtype))
        if isinstance(operand, Symbol):
            if operand.name not in self.symbols:
                raise PtxError(f"unknown symbol {operand.name!r}")
            return _constant(np.array(self.symbols[operand.name]).astype(dtype)[()])
        if isinstance(operand, Negated):
            positive = self.read(operand.register, dtype)
            return lambda R: ~positive(R)
        if not isinstance(operand, Register | Special):
            raise PtxError(f"operand {operand} does not fit here")
        slot, size = (
            (operand.slot, _size(operand)) if isinstance(operand, Register) else (self.specials(operand.name), 4)
        )
        if size == dtype.itemsize:
            if dtype.kind in "ub":
                return lambda R: R[slot]
            return lambda R: R[slot].view(dtype)
        word = np.dtype(f"u{dtype.itemsize}")
        return lambda R: R[slot].astype(word).view(dtype)


def _size(register: Register) -> int:
    return TYPES[register.type].itemsize


def _constant(value: Any) -> Compute:
    return lambda R: value


def _immediate(operand: Immediate, dtype: np.dtype) -> Any:
    if operand.bits:
        value = np.array(operand.value, f"u{operand.bits // 8}").view(f"f{operand.bits // 8}")
        if dtype.kind == "f":
            return value.astype(dtype)[()]
        return value.view(f"u{operand.bits // 8}").astype(dtype)[()]
    if dtype.kind == "b":
        return np.bool_(operand.value)
    bits = operand.value & ((1 << 8 * dtype.itemsize) - 1)
    return np.array(bits, f"u{dtype.itemsize}").view(dtype)[()] if dtype.kind != "f" else dtype.type(operand.value)


# Floats of 16 bits are computed in float64: sums and products of two are exact there.


def widen(bits: Array, kind: str) -> Array:
    """Patterns of f16, bf16 (uint16) or f32 (uint32) as float64."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return bits.view(TYPES[kind]).astype(np.float64)


def narrow(values: Array, kind: str) -> Array:
    """float64 to the patterns of f16, bf16 or f32, rounded once to nearest even."""
    if kind != "bf16":
        return values.astype(TYPES[kind]).view(f"u{TYPES[kind].itemsize}")
    short = values.astype(np.float32)
    # Round to odd in between: cut off towards zero, and let the last bit say that something was cut off.
    away = np.abs(short) > np.abs(values)
    bits = short.view(np.uint32) - away.astype(np.uint32)
    bits |= (np.isfinite(values) & (bits.view(np.float32) != values)).astype(np.uint32)
    return bfloat16(bits.view(np.float32))


def bfloat16(values: Array, truncate: bool = False) -> Array:
    """float32 to bf16 patterns, to nearest even or towards zero."""
    bits = values.view(np.uint32)
    half = np.uint32(0) if truncate else np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    rounded = (bits + half >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def fma(a: Array, b: Array, c: Array, kind: str) -> Array:
    """float64 operands that hold values of ``kind``; the patterns of ``kind`` of a * b + c, rounded once."""
    product = a * b  # exact: at most 48 bits
    total = np.asarray(product + c)
    # Rounding twice goes wrong only where the first rounding lands on (or leaves) a tie of the second.
    doubtful = total.view(np.uint64) & np.uint64((1 << 29) - 1) == 1 << 28
    doubtful |= (np.abs(total) < 2.0**-125) & (total != 0)
    if kind == "f32" and not doubtful.any():
        return total.astype(np.float32).view(np.uint32)
    part = total - product
    error = (product - (total - part)) + (c - part)
    even = total.view(np.uint64) & np.uint64(1) == 0
    fix = even & (error != 0) & np.isfinite(total) & np.isfinite(error)
    odd = np.where(fix, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return narrow(odd, kind)


def signed_max(a: Array, b: Array) -> Array:
    """Drops NaN; +0 is more than -0."""
    return np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))


def signed_min(a: Array, b: Array) -> Array:
    return np.where((a == b) & np.signbit(a), a, np.where((a == b), b, np.fmin(a, b)))


def _nan_max(a: Array, b: Array) -> Array:
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), signed_max(a, b))


def _nan_min(a: Array, b: Array) -> Array:
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), signed_min(a, b))


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe if a.dtype.kind == "u" else (a - np.fmod(a, safe)) // safe
    return np.where(b == 0, a.dtype.type(-1) if a.dtype.kind == "i" else ~a.dtype.type(0), quotient)


def _remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))


def _mul_high(a: Array, b: Array) -> Array:
    if a.dtype in WIDER:
        wide = WIDER[a.dtype]
        return (a.astype(wide) * b.astype(wide) >> wide.type(8 * a.dtype.itemsize)).astype(a.dtype)
    ua, ub, low = a.astype(np.uint64), b.astype(np.uint64), np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    a0, a1, b0, b1 = ua & low, ua >> half, ub & low, ub >> half
    middle = (a0 * b0 >> half) + (a1 * b0 & low) + (a0 * b1 & low)
    high = a1 * b1 + (a1 * b0 >> half) + (a0 * b1 >> half) + (middle >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, ub, np.uint64(0)) - np.where(b < 0, ua, np.uint64(0))
    return high.view(a.dtype)


def shift_left(a: Array, count: Array) -> Array:
    width = 8 * a.dtype.itemsize
    return np.where(count >= width, a.dtype.type(0), a << np.minimum(count, width - 1).astype(a.dtype))


def shift_right(a: Array, count: Array) -> Array:
    width = 8 * a.dtype.itemsize
    if a.dtype.kind == "i":
        return a >> np.minimum(count, width - 1).astype(a.dtype)
    return np.where(count >= width, a.dtype.type(0), a >> np.minimum(count, width - 1).astype(a.dtype))


# Families. ``allow`` are the modifiers that may follow the opcode beside its types; others are refused at load.

ALU: dict[str, Callable[[Instruction, Sources], Compute]] = {}


def alu(*names: str, allow: str = "") -> Callable[[Any], Any]:
    def register(builder: Callable[[Instruction, Sources], Compute]) -> Any:
        def checked(instruction: Instruction, source: Sources) -> Compute:
            known = {*allow.split(), *TYPES, *_PACKED, "approx", "full", "ftz", "rn"}
            if unknown := set(instruction.parts[1:]) - known:
                raise PtxError(f"{instruction.op}: .{min(unknown)} is not supported")
            return builder(instruction, source)

        for name in names:
            ALU[name] = checked
        return builder

    return register


def flush(x: Array) -> Array:
    """Subnormal fp32 numbers as zeros of the same sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), x * np.float32(0), x)


def _flushed(fn: Callable[..., Array]) -> Callable[..., Array]:
    """``.ftz``: for inputs and results."""
    return lambda *args: flush(np.asarray(fn(*map(flush, args))))


def apply(instruction: Instruction, source: Sources, fn: Callable[..., Array], first: int = 1) -> Compute:
    """``fn`` on operands ``first`` … in the instruction's type; packed and 16-bit floats element by element."""
    kind = instruction.parts[-1]
    count = len(instruction.operands) - first
    element = _PACKED.get(kind, kind)
    if element in ("f16", "bf16"):
        word = np.dtype("u4" if kind in _PACKED else "u2")
        reads = [source(first + i, word) for i in range(count)]

        def on_half(bits: list[Array]) -> Array:
            return narrow(np.asarray(fn(*(widen(b, element) for b in bits))), element)

        if kind not in _PACKED:
            return lambda R: on_half([np.atleast_1d(read(R)) for read in reads])

        def packed(R: list[np.ndarray]) -> Array:
            bits = [np.atleast_1d(read(R)) for read in reads]
            low = on_half([b.astype(np.uint16) for b in bits]).astype(np.uint32)
            high = on_half([(b >> np.uint32(16)).astype(np.uint16) for b in bits]).astype(np.uint32)
            return low | high << np.uint32(16)

        return packed
    if "ftz" in instruction.parts and kind == "f32":
        fn = _flushed(fn)
    dtype = TYPES[kind]
    reads = [source(first + i, dtype) for i in range(count)]
    if count == 2:
        a, b = reads
        return lambda R: fn(a(R), b(R))
    return lambda R: fn(*(read(R) for read in reads))


def _simple(name: str, fn: Callable[..., Array], allow: str = "") -> None:
    alu(name, allow=allow)(lambda i, source: apply(i, source, fn))


_simple("add", np.add)
_simple("sub", np.subtract)
_simple("div", _divide)
_simple("rem", _remainder)
_simple("and", np.bitwise_and)
_simple("or", np.bitwise_or)
_simple("xor", np.bitwise_xor)
_simple("not", np.invert)
_simple("neg", np.negative)
_simple("abs", np.abs)
_simple("rcp", lambda x: x.dtype.type(1) / x)
_simple("sqrt", np.sqrt)
_simple("rsqrt", lambda x: x.dtype.type(1) / np.sqrt(x))
_simple("ex2", np.exp2)
_simple("lg2", np.log2)
_simple("sin", np.sin)
_simple("cos", np.cos)
_simple("tanh", np.tanh)
_simple("copysign", lambda sign, value: np.copysign(value, sign))


@alu("max", "min", allow="NaN")
def _extreme(i: Instruction, source: Sources) -> Compute:
    is_max = i.parts[0] == "max"
    if TYPES.get(i.parts[-1], np.dtype("f4")).kind != "f" and i.parts[-1] not in ("bf16", *_PACKED):
        return apply(i, source, np.maximum if is_max else np.minimum)
    if "NaN" in i.parts:
        return apply(i, source, _nan_max if is_max else _nan_min)
    return apply(i, source, signed_max if is_max else signed_min)


@alu("mul", "mad", allow="lo hi wide")
def _multiply(i: Instruction, source: Sources) -> Compute:
    is_mad, dtype = i.parts[0] == "mad", TYPES.get(i.parts[-1], np.dtype("f4"))
    if "wide" in i.parts:
        wide = WIDER[dtype]
        a, b = source(1, dtype), source(2, dtype)
        product: Compute = lambda R: np.multiply(a(R), b(R), dtype=wide)  # noqa: E731
    elif "hi" in i.parts:
        wide, a, b = dtype, source(1, dtype), source(2, dtype)
        product = lambda R: _mul_high(np.asarray(a(R)), np.asarray(b(R)))  # noqa: E731
    elif is_mad and dtype.kind == "f":
        return _fma(i, source)
    else:
        if not is_mad:
            return apply(i, source, np.multiply)
        wide, a, b = dtype, source(1, dtype), source(2, dtype)
        product = lambda R: a(R) * b(R)  # noqa: E731
    if not is_mad:
        return product
    c = source(3, wide)
    return lambda R: product(R) + c(R)


@alu("fma", allow="relu")
def _fma(i: Instruction, source: Sources) -> Compute:
    kind = i.parts[-1]
    element = _PACKED.get(kind, kind)
    if element == "f64" or "relu" in i.parts:
        raise PtxError(f"{i.op} is not supported")
    word = np.dtype("u2" if kind in ("f16", "bf16") else "u4")
    reads = [source(n, word) for n in (1, 2, 3)]

    def one(bits: list[Array]) -> Array:
        return fma(*(widen(b, element) for b in bits), element)

    if kind not in _PACKED:
        flush = "ftz" in i.parts
        if flush:
            small = _flushed(lambda x: x)
            clear = lambda b: small(b.view(np.float32)).view(np.uint32)  # noqa: E731
            return lambda R: clear(one([clear(np.atleast_1d(read(R))) for read in reads]))
        return lambda R: one([np.atleast_1d(read(R)) for read in reads])
    shift = np.uint32(16)

    def packed(R: list[np.ndarray]) -> Array:
        bits = [np.atleast_1d(read(R)) for read in reads]
        low, high = (one([(b >> s).astype(np.uint16) for b in bits]).astype(np.uint32) for s in (np.uint32(0), shift))
        return low | high << shift

    return packed


@alu("shl", "shr")
def _shift(i: Instruction, source: Sources) -> Compute:
    dtype = TYPES[i.parts[-1]]
    a, count, fn = source(1, dtype), source(2, np.dtype("u4")), shift_left if i.parts[0] == "shl" else shift_right
    if isinstance(i.operands[2], Immediate) and i.operands[2].value < 8 * dtype.itemsize:
        by, plain = dtype.type(i.operands[2].value), np.left_shift if i.parts[0] == "shl" else np.right_shift
        return lambda R: plain(a(R), by)
    return lambda R: fn(np.asarray(a(R)), count(R))


@alu("selp")
def _select(i: Instruction, source: Sources) -> Compute:
    word = np.dtype(f"u{TYPES[i.parts[-1]].itemsize}")
    a, b, p = source(1, word), source(2, word), source(3, np.dtype("?"))
    return lambda R: np.where(p(R), a(R), b(R))
