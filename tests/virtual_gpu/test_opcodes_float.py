"""Float opcodes, comparisons and conversions against scalar oracles, on all combinations of edge values.

PTX ISA 9.2, 9.7.3 to 9.7.6 and 9.7.9.21. The oracles compute exactly and round once.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator
from fractions import Fraction

import pytest

from tests.virtual_gpu.scalar import EDGES, FORMATS, NAN, Form, check, edges, encode, value, width

COMPARE = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
UNSIGNED = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}


def setp(name: str, kind: str, combine: str = "") -> Form:
    """9.7.5.2 and 4.6.2: without u a comparison with NaN is false, with u it is true."""

    def compared(a: int, b: int) -> bool:
        x, y = value(a, kind), value(b, kind)
        either = x != x or y != y
        if name in ("num", "nan"):
            return either == (name == "nan")
        if kind in FORMATS and either:
            return name.endswith("u")
        return ({**COMPARE, **UNSIGNED}.get(name) or COMPARE[name[:2]])(x, y)

    fn = {"": lambda p, c: p, "and": operator.and_, "or": operator.or_, "xor": operator.xor}[combine]
    op = ".".join(filter(None, ("setp", name, combine, kind)))
    if not combine:
        return Form(op, (kind, kind), "pred", lambda a, b: int(compared(a, b)))
    return Form(op, (kind, kind, "pred"), "pred", lambda a, b, c: int(fn(compared(a, b), c != 0)))


def floats(op: str, kind: str, fn: Callable[..., float | Fraction], count: int) -> Form:
    """A float form whose oracle is exact before one rounding; packed types twice."""
    element = kind.removesuffix("x2")

    def one(*bits: int) -> int | str:
        return encode(fn(*(value(b, element) for b in bits)), element)

    def both(*bits: int) -> int:
        parts = [one(*(b >> s & 0xFFFF for b in bits)) for s in (0, 16)]
        return -1 if NAN in parts else parts[0] | parts[1] << 16

    few = edges(kind)[:16] if count == 3 else None
    if element == kind:
        return Form(f"{op}.{kind}", (kind,) * count, kind, one, (few,) * count)
    finite = [b for b in edges(kind) if all(math.isfinite(value(b >> s & 0xFFFF, element)) for s in (0, 16))]
    return Form(f"{op}.{kind}", (kind,) * count, kind, both, (finite[:5],) * count)


def quiet(fn: Callable[..., float]) -> Callable[..., float]:
    """Python raises where IEEE 754 returns Inf or NaN."""

    def safe(*numbers: float) -> float:
        try:
            return fn(*numbers)
        except ZeroDivisionError:
            a, b = numbers if len(numbers) == 2 else (1.0, *numbers)
            return math.nan if a == 0 or a != a else math.copysign(math.inf, a) * math.copysign(1, b)
        except ValueError:
            return math.nan

    return safe


def fma(a: float, b: float, c: float) -> float | Fraction:
    roughly = a * b + c
    if not (math.isfinite(a) and math.isfinite(b) and math.isfinite(c)):
        return roughly if not (math.isfinite(a) and math.isfinite(b)) else c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    return exact or roughly


def least(a: float, b: float) -> float:
    if a != a or b != b:
        return b if a != a else a
    return min(a, b) if a != b else (a if math.copysign(1, a) < 0 else b)


def largest(a: float, b: float) -> float:
    return -least(-a, -b)


def passing_nan(fn: Callable[[float, float], float]) -> Callable[[float, float], float]:
    return lambda a, b: math.nan if a != a or b != b else fn(a, b)


def flush(x: float) -> float:
    """.ftz: subnormal numbers are zeros of the same sign."""
    return math.copysign(0, x) if abs(x) < 2.0**-126 else x


def flushed_comparison(fn: Callable[[float, float], bool]) -> Callable[..., int]:
    def oracle(*bits: int) -> int:
        a, b = (flush(value(x, "f32")) for x in bits)
        return int(a == a and b == b and fn(a, b))

    return oracle


def flushed_rounding(fn: Callable[[float], int]) -> Callable[..., int | str]:
    def oracle(bits: int) -> int | str:
        x = flush(value(bits, "f32"))
        return encode(math.copysign(fn(x), x) if math.isfinite(x) else x, "f32")

    return oracle


def flushing(fn: Callable[..., float]) -> Callable[..., float]:
    """.ftz of operands and result."""

    def flushed(*numbers: float) -> float:
        bits = encode(fn(*map(flush, numbers)), "f32")
        return math.nan if isinstance(bits, str) else flush(value(bits, "f32"))

    return flushed


def convert(to: str, of: str, mode: str = "") -> Form:
    """9.7.9.21."""
    rounding = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}

    def oracle(bits: int) -> int | str:
        x = value(bits & ((1 << width(of)) - 1), of)
        if to in FORMATS:
            if mode in rounding and math.isfinite(x):
                return encode(math.copysign(rounding[mode](x), x), to)
            if mode == "sat":
                x = 0.0 if x != x else min(max(x, 0.0), 1.0) + 0.0
            return encode(x, to, mode if mode in ("rz", "rna") else "rn")
        low = -(1 << (width(to) - 1)) if to[0] == "s" else 0
        high = low + (1 << width(to)) - 1
        if of in FORMATS:
            x = 0 if x != x else x if math.isinf(x) else rounding[mode](x)
            x = int(min(max(x, low), high))
        elif mode == "sat":
            x = min(max(x, low), high)
        return x & ((1 << width(to)) - 1)

    # The sign of a saturated -0 is not written down.
    values = [bits for bits in edges(of) if value(bits, of) != 0 or not bits] if mode == "sat" else None
    return Form(".".join(filter(None, ("cvt", mode, to, of))), (of,), to, oracle, (values,))


def packing(to: str) -> Form:
    def oracle(high: int, low: int) -> int:
        parts = [encode(value(bits, "f32"), to) for bits in (low, high)]
        return parts[0] | parts[1] << 16

    finite = [b for b in EDGES["f32"] if value(b, "f32") == value(b, "f32")]
    return Form(f"cvt.rn.{to}x2.f32", ("f32", "f32"), f"{to}x2", oracle, (finite, finite))


INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")


def arithmetic() -> Iterator[Form]:
    for kind in ("f32", "f16", "f64", "f16x2"):
        yield floats("add", kind, operator.add, 2)
        yield floats("sub", kind, operator.sub, 2)
    for kind in ("f32", "f16", "f16x2"):
        yield floats("mul", kind, operator.mul, 2)
    for kind in ("f32", "f16", "bf16", "f16x2", "bf16x2"):
        yield floats("fma.rn", kind, fma, 3)
    for kind in ("f32", "f16", "bf16"):
        yield floats("neg", kind, operator.neg, 1)
        yield floats("abs", kind, abs, 1)
        for op, fn in (("min", least), ("max", largest)):
            yield floats(op, kind, fn, 2)
            yield floats(f"{op}.NaN", kind, passing_nan(fn), 2)
    yield floats("div.rn", "f32", quiet(operator.truediv), 2)
    yield floats("rcp.rn", "f32", quiet(lambda x: 1 / x), 1)
    yield floats("sqrt.rn", "f32", quiet(math.sqrt), 1)
    yield floats("add.ftz", "f32", flushing(operator.add), 2)
    yield floats("mul.ftz", "f32", flushing(operator.mul), 2)


def comparisons() -> Iterator[Form]:
    for kind in ("s16", "s32", "u32", "s64", "u64", *FORMATS):
        if kind != "tf32":
            yield from (setp(name, kind) for name in COMPARE)
    for kind in ("f32", "f16", "bf16"):
        yield from (setp(name, kind) for name in (*(f"{name}u" for name in COMPARE), "num", "nan"))
    yield from (setp(name, "u32") for name in UNSIGNED)
    for name, fn in COMPARE.items():
        yield Form(f"setp.{name}.ftz.f32", ("f32", "f32"), "pred", flushed_comparison(fn))
    yield from (setp("lt", kind, combine) for combine in ("and", "or", "xor") for kind in ("s32", "f32"))


def conversions() -> Iterator[Form]:
    for to, of in itertools.product(INTEGERS[2:], INTEGERS):
        if to != of:
            yield convert(to, of)
    for to, of in (("u8", "s32"), ("s8", "s32"), ("u16", "s32"), ("s32", "s64"), ("u32", "s64"), ("s16", "u32")):
        yield convert(to, of, "sat")
    for of in ("u16", "s32", "u32", "u64", "s64"):
        yield convert("f32", of, "rn")
    for to, of in itertools.product(("f16", "bf16"), ("u16", "s32")):
        yield convert(to, of, "rn")
    for mode in ("rni", "rzi", "rmi", "rpi"):
        yield from (convert(to, "f32", mode) for to in ("s16", "s32", "u32", "s64", "u64", "f32"))
    for to, mode in itertools.product(("f16", "bf16"), ("rn", "rz")):
        yield convert(to, "f32", mode)
    for to, of, mode in (("f32", "f16", ""), ("f32", "bf16", ""), ("f64", "f32", ""), ("f32", "f64", "rn")):
        yield convert(to, of, mode)
    yield convert("f32", "f32", "sat")
    for mode, fn in (("rmi", math.floor), ("rpi", math.ceil)):
        yield Form(f"cvt.{mode}.ftz.f32.f32", ("f32",), "f32", flushed_rounding(fn))
    yield convert("tf32", "f32", "rna")
    yield from (packing(to) for to in ("f16", "bf16"))


@pytest.mark.parametrize("form", [*arithmetic(), *comparisons(), *conversions()], ids=lambda form: form.op)
def test_opcode(form: Form) -> None:
    check(form)
