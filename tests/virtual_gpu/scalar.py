"""What the scalar oracles of the opcode tests share: number formats by definition, edge values, a kernel of one opcode.

Values are Python integers, floats (every format up to f64 is exact in them) or fractions, rounded once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch

from tests.virtual_gpu import launch, ptx_entry

# (precision with the hidden bit, smallest normal exponent, width)
FORMATS = {"f16": (11, -14, 16), "bf16": (8, -126, 16), "f32": (24, -126, 32), "f64": (53, -1022, 64)}
FORMATS["tf32"] = (11, -126, 32)  # in the upper 19 bits of f32
NAN = "NaN"  # of any payload and sign


def width(kind: str) -> int:
    return FORMATS[kind][2] if kind in FORMATS else 1 if kind == "pred" else int(kind.lstrip("usb").removesuffix("x2"))


def value(bits: int, kind: str) -> int | float:
    """What a pattern means. Every float of up to 64 bits is a Python float."""
    if kind in FORMATS:
        precision, lowest, size = FORMATS["f32" if kind == "tf32" else kind]
        sign, exponent = bits >> (size - 1), bits >> (precision - 1) & ((1 << (size - precision)) - 1)
        fraction = bits & ((1 << (precision - 1)) - 1)
        if exponent == (1 << (size - precision)) - 1:
            return math.nan if fraction else -math.inf if sign else math.inf
        significand = fraction + (1 << (precision - 1) if exponent else 0)
        return math.copysign(math.ldexp(significand, max(exponent, 1) - 1 + lowest - precision + 1), -sign or 1)
    return bits - (1 << width(kind)) if kind[0] == "s" and bits >> (width(kind) - 1) else bits


def encode(number: float | Fraction, kind: str, mode: str = "rn") -> int | str:
    """The nearest pattern of a format: to even, towards zero (rz), or ties away from zero (rna)."""
    precision, lowest, size = FORMATS[kind]
    if kind == "tf32":
        bits = encode_into(number, precision, lowest, 19, mode)
        return bits if bits == NAN else bits << 13
    return encode_into(number, precision, lowest, size, mode)


def encode_into(number: float | Fraction, precision: int, lowest: int, size: int, mode: str) -> int | str:
    sign = 1 << (size - 1) if number < 0 or (number == 0 and math.copysign(1, number) < 0) else 0
    infinity = ((1 << (size - precision)) - 1) << (precision - 1)
    if number != number:
        return NAN
    if number in (math.inf, -math.inf):
        return sign | infinity
    if number == 0:
        return sign
    exact = abs(Fraction(number))
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    exponent = max(exponent - (exact < Fraction(2) ** exponent), lowest)
    scaled = exact / Fraction(2) ** (exponent - precision + 1)
    whole, rest = divmod(scaled, 1)
    up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and (mode == "rna" or whole % 2 == 1))
    bits = ((exponent - lowest) << (precision - 1)) + int(whole) + (up and mode != "rz")
    return sign | min(bits, infinity - (mode == "rz"))


EDGES: dict[str, list[int]] = {
    "16": [0, 1, 2, 5, 15, 16, 17, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xABCD, 0xFFFF],
    "32": [0, 1, 2, 7, 31, 32, 33, 0x7F, 0x80, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xDEADBEEF, 0xFFFFFFFF],
    "64": [0, 1, 3, 63, 64, 0xFFFFFFFF, 1 << 32, 0x123456789ABCDEF0, (1 << 63) - 1, 1 << 63, (1 << 64) - 1],
    # zeros, denormals, the smallest normal, 1 and neighbours, 3, 0.5, -2.5, the largest, Inf, NaN
    "f16": [
        *(0, 0x8000, 1, 0x83FF, 0x0400, 0x3C00, 0x3C01, 0xBBFF),
        *(0x4200, 0x3800, 0xC100, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00),
    ],
    "bf16": [
        *(0, 0x8000, 1, 0x807F, 0x0080, 0x3F80, 0x3F81, 0xBF7F),
        *(0x4040, 0x3F00, 0xC020, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0),
    ],
    "f32": [
        *(0, 0x80000000, 1, 0x807FFFFF, 0x00800000, 0x3F800000, 0x3F800001, 0xBF7FFFFF),
        *(0x40400000, 0x3F000000, 0xC0200000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000),
        # integers' limits; ties and overflow of a rounding to f16, then to bf16; 2^24 + 2
        *(0x4EFFFFFF, 0x4F000000, 0xCF000000, 0x4F800000, 0x3F801000, 0x3F803000, 0x477FF000, 0x33000000),
        *(0x3F808000, 0x3F818000, 0x7F7F8000, 0x4B800001),
    ],
    "f64": [
        *(0, 1 << 63, 1, 0x3FF0000000000000, 0x3FF0000010000000, 0x7FEFFFFFFFFFFFFF, 0xC000000000000001),
        *(0x7FF << 52, 0x7FF8 << 48),
    ],
}


def edges(kind: str) -> list[int]:
    """Patterns of a type that have gone wrong before, somewhere."""
    if kind.endswith("x2"):
        of = EDGES[kind[:-2]]
        return [low | high << 16 for low, high in zip(of, of[5:] + of[:5], strict=True)]
    if kind in EDGES:
        return EDGES[kind]
    if kind == "pred":
        return [0, 1]
    size = width(kind)
    return sorted({bits & ((1 << size) - 1) for bits in EDGES[str(max(size, 16))]})


class Form(NamedTuple):
    """An opcode with the types of its sources and of its result; the oracle takes patterns and returns one."""

    op: str
    sources: tuple[str, ...]
    result: str
    oracle: Callable[..., int | str]
    values: tuple[list[int] | None, ...] = ()  # instead of the edges


def kernel(form: Form) -> str:
    """The form as PTX: a thread for each element of its sources, which are 8 bytes apart; predicates are 0 or 1."""
    sources = dict(zip("abcd", form.sources, strict=False))
    lines = [
        *("mov.u32 %n, %tid.x", "mov.u32 %cta, %ctaid.x", "mov.u32 %size, %ntid.x"),
        *("mad.lo.s32 %n, %cta, %size, %n", "mul.wide.u32 %at, %n, 8"),
    ]
    declarations = [".b32 %n, %cta, %size", ".b64 %at"]
    for name, kind in (*sources.items(), ("r", form.result)):
        declarations += [f".b64 %to_{name}", f".b{word(kind)} %word_{name}"]
        if kind == "pred":
            declarations.append(f".pred %pred_{name}")
        lines += [f"ld.param.b64 %to_{name}, [{name}]", f"add.s64 %to_{name}, %to_{name}, %at"]
        if name != "r":
            lines.append(f"ld.global.b{word(kind)} %word_{name}, [%to_{name}]")
            if kind == "pred":
                lines.append(f"setp.ne.b16 %pred_{name}, %word_{name}, 0")
    operands = [f"%{'pred' if kind == 'pred' else 'word'}_{name}" for name, kind in sources.items()]
    into = "%pred_r" if form.result == "pred" else "%word_r"
    lines.append(f"{form.op} {into}, {', '.join(operands)}")
    if form.result == "pred":
        lines.append("selp.b16 %word_r, 1, 0, %pred_r")
    lines += [f"st.global.b{word(form.result)} [%to_r], %word_r", "ret"]
    body = "".join(f"{line};\n" for line in [*(f".reg {d}" for d in declarations), *lines])
    parameters = ", ".join(f".param .b64 {name}" for name in (*sources, "r"))
    return f".version 8.6\n.target sm_90a\n.address_size 64\n.visible .entry kernel({parameters})\n{{\n{body}}}\n"


def word(kind: str) -> int:
    """Bits of the register that holds a type."""
    return 32 if kind.endswith("x2") else max(width(kind), 16)


def run(form: Form, columns: list[np.ndarray]) -> np.ndarray:
    """The results of the form for columns of ``uint64``."""
    count = len(columns[0])
    padded = -(-count // 128) * 128
    tensors = [torch.zeros(padded, dtype=torch.int64) for _ in range(len(columns) + 1)]
    for tensor, column in zip(tensors, columns, strict=False):
        tensor[:count] = torch.from_numpy(column.view(np.int64))
    launch(ptx_entry(kernel(form)), [padded // 128], tensors, scratch=[len(columns)], block=[128])
    return tensors[-1][:count].numpy().view(np.uint64)


def check(form: Form) -> None:
    """Runs the form on all combinations of its values and compares every result with the oracle."""
    chosen = [*form.values, *[None] * len(form.sources)]
    lists = [given or edges(kind) for kind, given in zip(form.sources, chosen, strict=False)]
    cases = list(itertools.product(*lists))
    got = run(form, [np.array(column, np.uint64) for column in zip(*cases, strict=True)])
    mask = (1 << (32 if form.result.endswith("x2") else width(form.result))) - 1
    wrong = []
    for case, bits in zip(cases, got.tolist(), strict=True):
        expected = form.oracle(*case)
        if not (math.isnan(value(bits & mask, form.result)) if isinstance(expected, str) else bits & mask == expected):
            shown = expected if isinstance(expected, str) else hex(expected)
            wrong.append(f"{', '.join(map(hex, case))} -> {bits & mask:#x} instead of {shown}")
    assert not wrong, f"{form.op}: {len(wrong)} of {len(cases)} wrong: {'; '.join(wrong[:5])}"
