"""Integer and bit opcodes against scalar oracles, on all combinations of edge values (PTX ISA 9.2, 9.7.1, 9.7.7)."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator

import pytest

from tests.virtual_gpu.scalar import Form, check, edges, value, width


def integers(op: str, kind: str, fn: Callable[..., int], count: int = 2, result: str = "", **more: object) -> Form:
    """An integer form whose oracle works on values and wraps."""
    into = result or kind

    def oracle(*bits: int) -> int:
        return fn(*(value(b, kind) for b in bits)) & ((1 << width(into)) - 1)

    return Form(f"{op}.{kind}", (kind,) * count, into, oracle, **more)


def divided(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


def shift(kind: str, left: bool) -> Form:
    def oracle(a: int, count: int) -> int:
        count = min(count, width(kind))
        return (a << count if left else value(a, kind) >> count) & ((1 << width(kind)) - 1)

    return Form(f"{'shl' if left else 'shr'}.{kind}", (kind, "u32"), kind, oracle)


def bfe(kind: str) -> Form:
    """The ISA's own pseudo code, 9.7.1.20."""

    def oracle(a: int, b: int, c: int) -> int:
        msb, position, length = width(kind) - 1, b & 0xFF, c & 0xFF
        sign = 0 if kind[0] == "u" or length == 0 else a >> min(position + length - 1, msb) & 1
        result = 0
        for i in range(msb + 1):
            bit = a >> (position + i) & 1 if i < length and position + i <= msb else sign
            result |= bit << i
        return result

    return Form(f"bfe.{kind}", (kind, "u32", "u32"), kind, oracle)


def bfi(kind: str) -> Form:
    """9.7.1.21."""

    def oracle(a: int, b: int, c: int, d: int) -> int:
        position, length, size = c & 0xFF, d & 0xFF, width(kind)
        for i in range(length):
            if position + i < size:
                b = b & ~(1 << (position + i)) | (a >> i & 1) << (position + i)
        return b

    few = edges(kind)[::3]
    return Form(f"bfi.{kind}", (kind, kind, "u32", "u32"), kind, oracle, (few, few, None, None))


def prmt(a: int, b: int, c: int) -> int:
    both, result = a | b << 32, 0
    for i in range(4):
        selector = c >> (4 * i) & 15
        byte = both >> (8 * (selector & 7)) & 0xFF
        result |= ((0xFF if byte >> 7 else 0) if selector & 8 else byte) << (8 * i)
    return result


def funnel(left: bool, wrap: bool) -> Form:
    def oracle(low: int, high: int, count: int) -> int:
        n = count & 31 if wrap else min(count, 32)
        both = high << 32 | low
        return (both << n >> 32 if left else both >> n) & 0xFFFFFFFF

    return Form(f"shf.{'l' if left else 'r'}.{'wrap' if wrap else 'clamp'}.b32", ("b32", "b32", "u32"), "b32", oracle)


def dot(kinds: tuple[str, str]) -> Form:
    def oracle(a: int, b: int, c: int) -> int:
        byte = {"s32": "s8", "u32": "u8"}
        pairs = [(value(a >> i & 0xFF, byte[kinds[0]]), value(b >> i & 0xFF, byte[kinds[1]])) for i in (0, 8, 16, 24)]
        return (sum(x * y for x, y in pairs) + c) & 0xFFFFFFFF

    return Form("dp4a." + ".".join(kinds), ("b32",) * 3, "b32", oracle)


NONZERO = {kind: [b for b in edges(kind) if b and b != (1 << width(kind)) - 1] for kind in ("u32", "s32", "u64", "s64")}
SELECTORS = [0x5410, 0x7632, 0x0123, 0x89AB, 0xFEDC, 0x3333]


def forms() -> Iterator[Form]:
    for kind in ("s16", "s32", "s64", "u32"):
        yield integers("add", kind, operator.add)
        yield integers("sub", kind, operator.sub)
        yield integers("mul.lo", kind, operator.mul)
    for kind in ("u16", "s16", "u32", "s32"):
        yield integers("mul.wide", kind, operator.mul, result=f"{kind[0]}{2 * width(kind)}")
    for kind in ("u16", "s32", "u32", "s64", "u64"):
        yield integers("mul.hi", kind, lambda a, b, size=int(kind[1:]): a * b >> size)
    for kind in ("s32", "s64"):
        yield integers("mad.lo", kind, lambda a, b, c: a * b + c, 3)
        yield integers("abs", kind, abs, 1)
    yield Form("mad.wide.u16", ("u16", "u16", "u32"), "u32", lambda a, b, c: (a * b + c) % 2**32)
    yield Form("mad.wide.s32", ("s32", "s32", "s64"), "s64", lambda a, b, c: (s32(a) * s32(b) + c) % 2**64)
    for kind, divisors in NONZERO.items():  # by 0 anything may come out, and the smallest by -1 overflows
        yield integers("div", kind, divided, values=(None, divisors))
        yield integers("rem", kind, lambda a, b: a - divided(a, b) * b, values=(None, divisors))
    for kind in ("u16", "s32", "u32", "s64"):
        yield integers("min", kind, min)
        yield integers("max", kind, max)
    for kind in ("s16", "s32", "s64"):
        yield integers("neg", kind, operator.neg, 1)
    for kind in ("b16", "b32", "b64"):
        yield integers("and", kind, operator.and_)
        yield integers("or", kind, operator.or_)
        yield integers("xor", kind, operator.xor)
        yield integers("not", kind, operator.invert, 1)
        yield shift(kind, left=True)
        yield Form(f"selp.{kind}", (kind, kind, "pred"), kind, lambda a, b, c: a if c else b)
    for kind in ("u16", "s16", "u32", "s32", "u64", "s64", "b32"):
        yield shift(kind, left=False)
    for kind in ("u32", "s32", "u64", "s64"):
        yield bfe(kind)
    for kind in ("b32", "b64"):
        size = width(kind)
        yield bfi(kind)
        yield integers("popc", kind, int.bit_count, 1, result="u32")
        yield integers("clz", kind, lambda a, size=size: size - a.bit_length(), 1, result="u32")
        yield integers("brev", kind, lambda a, size=size: int(f"{a:0{size}b}"[::-1], 2), 1)
    yield integers("bfind", "u32", lambda a: a.bit_length() - 1, 1)
    yield Form("prmt.b32", ("b32", "b32", "b32"), "b32", prmt, (None, None, SELECTORS))
    for left, wrap in itertools.product((True, False), repeat=2):
        yield funnel(left, wrap)
    for kinds in itertools.product(("s32", "u32"), repeat=2):
        yield dot(kinds)


def s32(bits: int) -> int:
    return int(value(bits, "s32"))


@pytest.mark.parametrize("form", list(forms()), ids=lambda form: form.op)
def test_opcode(form: Form) -> None:
    check(form)
