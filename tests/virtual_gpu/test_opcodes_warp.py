"""Instructions that look at more than one thread or at memory, against scalar oracles (PTX ISA 9.2, 9.7.9, 9.7.13)."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.virtual_gpu import KernelError
from tests.virtual_gpu.snippets import run

THREADS = 64
X = torch.randint(-(2**31), 2**31, [THREADS], generator=torch.Generator().manual_seed(1)).to(torch.int32)
LOAD, STORE = "ld.global.b32 %r1, [%x];", "st.global.b32 [%out], %r0;"


def unsigned(value: int) -> int:
    return value & 0xFFFFFFFF


def shuffled(mode: str, lane: int, by: int, c: int) -> tuple[int, bool]:
    """The ISA's pseudo code, 9.7.9.6: the source lane, and the predicate."""
    segment, limit = c >> 8 & 31, c & 31
    highest, lowest = lane & segment | limit & ~segment, lane & segment
    source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": lowest | by & ~segment}[mode]
    inside = source >= highest if mode == "up" else source <= highest
    return (source if inside else lane), inside


@pytest.mark.parametrize("clamp", [0, 31, 0x181F, 0x1807])
@pytest.mark.parametrize("by", [0, 1, 5, 31])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode: str, by: int, clamp: int) -> None:
    both = f"{LOAD} shfl.sync.{mode}.b32 %r0|%p1, %r1, {by}, {clamp}, -1; selp.b32 %r2, 1, 0, %p1;"
    got = run(f"{both} {STORE}", X).tolist()
    inside = run(f"{both} st.global.b32 [%out], %r2;", X).tolist()
    for thread in range(THREADS):
        source, expected = shuffled(mode, thread % 32, by, clamp)
        assert got[thread] == X[thread // 32 * 32 + source]
        assert inside[thread] == expected


def test_shfl_by_each_threads_own_lane() -> None:
    got = run(f"{LOAD} and.b32 %r2, %r1, 31; shfl.sync.idx.b32 %r0, %r1, %r2, 31, -1; {STORE}", X).tolist()
    assert got == [X[t // 32 * 32 + int(X[t]) % 32] for t in range(THREADS)]


def test_a_shuffle_from_a_thread_that_left_is_reported() -> None:
    odd = "and.b32 %r2, %tid, 1; setp.eq.u32 %p1, %r2, 0;"
    with pytest.raises(KernelError, match="shuffle"):
        run(f"{odd} {LOAD} @%p1 shfl.sync.down.b32 %r0, %r1, 1, 31, -1; {STORE}", X)


def test_movmatrix() -> None:
    """Row r of the 8 x 8 halves lies in lanes 4 r to 4 r + 3, two to a lane."""
    got = run(f"{LOAD} movmatrix.sync.aligned.m8n8.trans.b16 %r0, %r1; {STORE}", X).tolist()
    for warp in range(2):
        halves = [unsigned(int(x)) >> shift & 0xFFFF for x in X[32 * warp : 32 * warp + 32] for shift in (0, 16)]
        for lane in range(32):
            row, column = lane // 4, lane % 4 * 2
            low, high = (halves[(column + i) * 8 + row] for i in range(2))
            assert unsigned(got[32 * warp + lane]) == low | high << 16


def test_a_movmatrix_of_a_part_of_a_warp_is_reported() -> None:
    odd = "and.b32 %r2, %tid, 1; setp.eq.u32 %p1, %r2, 0;"
    with pytest.raises(KernelError, match="partial warp"):
        run(f"{odd} {LOAD} @%p1 movmatrix.sync.aligned.m8n8.trans.b16 %r0, %r1; {STORE}", X)


@pytest.mark.parametrize("limit", [0, 1, 32, 40, 64])
@pytest.mark.parametrize("mode", ["all", "any", "uni", "ballot"])
def test_vote(mode: str, limit: int) -> None:
    kind = "b32 %r0" if mode == "ballot" else "pred %p2"
    result = "" if mode == "ballot" else "selp.b32 %r0, -1, 0, %p2;"
    got = run(f"setp.lt.u32 %p1, %tid, {limit}; vote.sync.{mode}.{kind}, %p1, -1; {result} {STORE}").tolist()
    for warp in range(2):
        votes = [t < limit for t in range(32 * warp, 32 * warp + 32)]
        ballot = sum(v << lane for lane, v in enumerate(votes))
        expected = {
            "all": -all(votes),
            "any": -any(votes),
            "uni": -(all(votes) or not any(votes)),
            "ballot": ballot - (ballot >> 31 << 32),
        }[mode]
        assert got[32 * warp : 32 * warp + 32] == [expected] * 32


REDUCTIONS = {
    "add.s32": sum,
    "min.s32": min,
    "max.s32": max,
    "min.u32": lambda values: min(map(unsigned, values)),
    "max.u32": lambda values: max(map(unsigned, values)),
    "and.b32": lambda values: bits(operator.and_, values),
    "or.b32": lambda values: bits(operator.or_, values),
    "xor.b32": lambda values: bits(operator.xor, values),
}


def bits(fn: Callable[[int, int], int], values: list[int]) -> int:
    result = values[0]
    for value in values[1:]:
        result = fn(result, value)
    return result


@pytest.mark.parametrize("op", REDUCTIONS)
def test_redux(op: str) -> None:
    got = run(f"{LOAD} redux.sync.{op} %r0, %r1, -1; {STORE}", X).tolist()
    for warp in range(2):
        expected = REDUCTIONS[op](X[32 * warp : 32 * warp + 32].tolist())
        assert set(map(unsigned, got[32 * warp : 32 * warp + 32])) == {unsigned(expected)}


def test_elect_takes_one_thread_of_each_warp() -> None:
    got = run(f"elect.sync %r1|%p1, -1; selp.b32 %r0, 1, 0, %p1; {STORE}").reshape(2, 32)
    assert got.sum(dim=1).tolist() == [1, 1]


WIDTHS = [("u8", 1), ("s8", 1), ("u16", 2), ("s16", 2), ("b32", 4), ("u64", 8)]


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("kind", "size"), WIDTHS, ids=[kind for kind, _ in WIDTHS])
def test_loads_extend_and_stores_cut_off(kind: str, size: int, space: str) -> None:
    """Of each thread's 8 bytes ``size`` are loaded into 64 bits, or stored."""
    x = torch.randint(-(2**63), 2**63 - 1, [THREADS], generator=torch.Generator().manual_seed(2))
    raw = [value.to_bytes(8, "little", signed=True) for value in x.tolist()]
    through = "ld.global.b64 %rd1, [%x]; st.shared.b64 [%at], %rd1;" if space == "shared" else ""
    source = "%at" if space == "shared" else "%x"
    got = run(f"{through} ld.{space}.{kind} %rd0, [{source}]; st.global.b64 [%out], %rd0;", x)
    assert got.tolist() == [signed64(int.from_bytes(b[:size], "little", signed=kind[0] == "s")) for b in raw]
    stored = run(
        f"ld.global.b64 %rd0, [%x]; st.global.{kind} [%out], %rd0;", x, torch.zeros_like(x), outputs=[], scratch=[1]
    )
    assert stored.tolist() == [signed64(int.from_bytes(b[:size], "little")) for b in raw]


def signed64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("kind", "count"), [("b32", 2), ("b32", 4), ("b64", 2), ("b16", 4), ("b16", 2)])
def test_vectors(kind: str, count: int, space: str) -> None:
    """A vector goes through shared memory and back, its elements the other way round."""
    registers = [f"%{({'b16': 'h', 'b32': 'r', 'b64': 'rd'})[kind]}{n}" for n in range(count)]
    there, back = ", ".join(registers), ", ".join(reversed(registers))
    x = torch.randint(-(2**15), 2**15, [THREADS, int(kind[1:]) // 16 * count], dtype=torch.int16)
    body = f"ld.global.v{count}.{kind} {{{there}}}, [%x];"
    if space == "shared":
        body += f"st.shared.v{count}.{kind} [%at], {{{there}}}; ld.shared.v{count}.{kind} {{{there}}}, [%at];"
    got = run(f"{body} st.global.v{count}.{kind} [%out], {{{back}}};", x)
    assert torch.equal(got, x.view(THREADS, count, -1).flip(1).reshape(x.shape))


MOVES = {
    "b64 to two b32": ("mov.b64 {%r1, %r0}, %rd1; mov.b64 %rd0, {%r0, %r1};", [1, 0], 32),
    "b64 to four b16": ("mov.b64 {%h0, %h1, %h2, %h3}, %rd1; mov.b64 %rd0, {%h3, %h0, %h2, %h1};", [3, 0, 2, 1], 16),
    "b64 to the upper half": ("mov.b64 {_, %r0}, %rd1; mov.b64 %rd0, {%r0, %r0};", [1, 1], 32),
}


@pytest.mark.parametrize("case", MOVES.values(), ids=MOVES)
def test_moves_of_vectors(case: tuple[str, list[int], int]) -> None:
    body, order, part = case
    x = torch.randint(-(2**63), 2**63 - 1, [THREADS])
    parts = x.view(torch.int32 if part == 32 else torch.int16).view(THREADS, -1)
    got = run(f"ld.global.b64 %rd1, [%x]; {body} st.global.b64 [%out], %rd0;", x)
    assert torch.equal(got.view(parts.dtype).view(THREADS, -1), parts[:, order])


ATOMICS: dict[str, Callable[[list[int]], int]] = {
    "add.u32": lambda v: sum(v),
    "max.s32": max,
    "min.s32": min,
    "max.u32": lambda v: max(map(unsigned, v)),
    "or.b32": lambda v: bits(operator.or_, v),
    "and.b32": lambda v: bits(operator.and_, v),
}


@pytest.mark.parametrize("op", ATOMICS)
@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics(op: str, space: str) -> None:
    """All threads on one cell, whose first value is that of x[0]: the result, and that every step was returned once."""
    cell = torch.full([THREADS], int(X[0]), dtype=torch.int32)
    value = f"ld.global.b32 %r2, [%x]; atom.{space}.{op} %r3, "
    if space == "shared":
        first = "ld.global.b32 %r1, [%xs]; mov.b32 %r4, smem; st.shared.b32 [%at], %r1; bar.sync 0;"
        got = run(f"{first} {value} [%r4], %r2; bar.sync 0; ld.shared.b32 %r0, [%r4]; {STORE}", X)
    else:
        got = run(f"{value} [%outs], %r2;", X, cell, outputs=[], scratch=[1])[:1]
    expected = ATOMICS[op]([int(X[0]), *X.tolist()])
    assert set(map(unsigned, got.tolist())) == {unsigned(expected)}


def test_atomics_return_what_was_there_before() -> None:
    cells = torch.zeros(THREADS, dtype=torch.int32)
    order = run(f"atom.global.add.u32 %r0, [%xs], 1; {STORE}", cells, outputs=[1], scratch=[0])
    assert sorted(order.tolist()) == list(range(THREADS))
    assert cells[0] == THREADS


def test_threads_of_a_warp_go_their_own_ways_and_meet_again() -> None:
    """Thread t adds t + 1 numbers, every third one leaves early, the rest meet at the barrier of the warp."""
    body = """
        mov.b32 %r0, 0; mov.b32 %r1, 0;
        again:
        add.u32 %r0, %r0, %r1; add.u32 %r1, %r1, 1; setp.le.u32 %p1, %r1, %tid;
        @%p1 bra again;
        rem.u32 %r2, %tid, 3; setp.ne.u32 %p2, %r2, 0;
        @!%p2 bra early;
        mul.lo.u32 %r0, %r0, 2;
        early:
    """
    got = run(f"{body} {STORE}").tolist()
    assert got == [t * (t + 1) // 2 * (2 if t % 3 else 1) for t in range(THREADS)]


APPROXIMATE = {  # the function, its domain, and the ISA's bound on the (relative, absolute) error: 9.7.3
    "ex2.approx.ftz.f32": (lambda x: 2.0**x, (-20, 20), (2**-22, 0)),
    "lg2.approx.f32": (math.log2, (0.01, 100), (2**-22, 2**-22)),
    "rcp.approx.ftz.f32": (lambda x: 1 / x, (0.01, 100), (2**-23, 0)),
    "rsqrt.approx.f32": (lambda x: x**-0.5, (0.01, 100), (2**-22, 0)),
    "sqrt.approx.f32": (math.sqrt, (0.01, 100), (2**-22, 0)),
    "sin.approx.f32": (math.sin, (-3, 3), (0, 2**-20)),
    "cos.approx.f32": (math.cos, (-3, 3), (0, 2**-20)),
    "tanh.approx.f32": (math.tanh, (-4, 4), (2**-11, 0)),
}


@pytest.mark.parametrize("op", APPROXIMATE)
def test_approximations(op: str) -> None:
    fn, (low, high), (relative, absolute) = APPROXIMATE[op]
    x = torch.linspace(low, high, THREADS)
    got = run(f"ld.global.f32 %r1, [%x]; {op} %r0, %r1; {STORE}", x)
    expected = Tensor([fn(value) for value in x.tolist()])
    torch.testing.assert_close(got, expected, rtol=relative, atol=max(absolute, 1e-12))
