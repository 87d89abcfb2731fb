"""The race detector against an oracle on random programs: it reports something if and only if two accesses conflict
that nothing orders, a load has no store before it, or TMA writes what a thread stored without a fence in between; and
that with every schedule.

The oracle knows no clocks. It draws the graph of what happens before what, takes its transitive closure, and looks at
every pair of accesses.
"""

from __future__ import annotations

import random
from functools import cache
from itertools import combinations
from typing import NamedTuple

import pytest

from tests.virtual_gpu import KernelError
from tests.virtual_gpu.async_agents import SCHEDULES
from tests.virtual_gpu.snippets import run

WARPS, CELLS = 4, 3
PARTS = ("signal", "bulk")  # of an mbarrier's event


class Op(NamedTuple):
    """One instruction of a warp: st, ld or cp (cp.async) of the cell ``n``, commit, wait for all but ``n`` groups;
    fence.proxy.async; or its part in the ``event``-th meeting of the program: sync or arrive at barrier ``n`` of
    ``threads``, signal or await of the event's mbarrier, or a bulk copy into cell ``n`` that reports to it."""

    kind: str
    n: int = 0
    threads: int = 0
    event: int = -1


Program = list[list[Op]]  # by warp


def random_program(rng: random.Random) -> Program:
    """All warps come to their meetings in the same order, so none waits for ever."""
    program: Program = [[] for _ in range(WARPS)]
    pairs = list(combinations(range(WARPS), 2))
    for event in range(rng.randint(2, 7)):
        for warp in program:
            warp += rng.choices(
                [Op(kind, cell) for kind in ("st", "ld", "ld", "cp") for cell in range(CELLS)]
                + [Op("commit"), Op("commit"), Op("wait", 0), Op("wait", 0), Op("wait", 1), Op("fence"), Op("fence")],
                k=rng.randint(0, 4),
            )
        first, second = rng.sample(range(WARPS), 2)
        kind = rng.choice(["all", "all", "pair", "arrive", "signal", "bulk"])
        if kind == "all":
            for warp in program:
                warp.append(Op("sync", 0, 32 * WARPS, event))
        elif kind == "pair":  # barriers 1 to 6, one for each pair
            number = 1 + pairs.index((min(first, second), max(first, second)))
            for member in (first, second):
                program[member].append(Op("sync", number, 64, event))
        elif kind in PARTS:
            if kind == "bulk" and rng.random() < 0.7:
                program[first].append(Op("fence"))
            program[first].append(Op(kind, rng.randrange(CELLS) if kind == "bulk" else 0, event=event))
            program[rng.choice([first, second])].append(Op("await", event=event))
        else:  # who only arrives may come again before the other: a barrier of its own, 7 to 13
            program[first].append(Op("arrive", 7 + event, 64, event))
            program[second].append(Op("sync", 7 + event, 64, event))
    return program


def wrong_access(program: Program) -> tuple[int, int] | None:
    """(warp, position) of an access that is wrong, None for a right program."""
    edges: dict[object, set[object]] = {}
    accesses: list[tuple[object, Op, tuple[int, int]]] = []
    fences: list[object] = []
    for w, warp in enumerate(program):
        groups: list[list[object]] = [[]]  # copies in flight, by commit group; the last one is open
        before: object = ("start", w)
        for position, op in enumerate(warp):
            here: object = (w, position)
            edges.setdefault(before, set()).add(here)
            before = here
            if op.kind in ("st", "ld"):
                accesses.append((here, op, (w, position)))
            elif op.kind in ("cp", "bulk"):  # it writes at some time after this
                copy = ("copy", w, position)
                edges.setdefault(here, set()).add(copy)
                accesses.append((copy, op, (w, position)))
                if op.kind == "cp":
                    groups[-1].append(copy)
                else:  # the thread arrives, and the copy reports
                    edges[copy] = {("event", op.event)}
                    edges[here].add(("event", op.event))
            elif op.kind == "fence":
                fences.append(here)
            elif op.kind == "commit":
                groups.append([])
            elif op.kind == "wait":
                for group in groups[: len(groups) - 1 - op.n]:
                    for copy in group:
                        edges.setdefault(copy, set()).add(here)
            else:
                edges.setdefault(here, set()).add(("event", op.event))
                if op.kind in ("sync", "await"):
                    before = ("after", w, position)
                    edges.setdefault(here, set()).add(before)
                    edges.setdefault(("event", op.event), set()).add(before)

    @cache
    def later(node: object) -> frozenset[object]:
        return frozenset().union(*({n} | later(n) for n in edges.get(node, ())))

    for (a, op_a, _), (b, op_b, place) in combinations(accesses, 2):
        conflict = op_a.n == op_b.n and {op_a.kind, op_b.kind} != {"ld"}
        if conflict and b not in later(a) and a not in later(b):
            return place
        if conflict and {op_a.kind, op_b.kind} in ({"st", "bulk"}, {"cp", "bulk"}):
            store, bulk = (b, a) if op_a.kind == "bulk" else (a, b)
            fenced = any(fence in later(store) and bulk in later(fence) for fence in fences)
            if bulk in later(store) and not fenced:
                return place
    for load, op, place in accesses:
        stores = (node for node, other, _ in accesses if other.kind != "ld" and other.n == op.n)
        if op.kind == "ld" and not any(load in later(store) for store in stores):
            return place
    return None


def repaired(program: Program) -> Program:
    """Without the accesses that are wrong."""
    while place := wrong_access(program):
        wrong = program[place[0]][place[1]]
        program = [
            [op for p, op in enumerate(warp) if (w, p) != place and not (op.event >= 0 and op.event == wrong.event)]
            for w, warp in enumerate(program)
        ]
    return program


def ptx(program: Program) -> str:
    lines = ["and.b32 %r0, %tid, 31; shl.b32 %r0, %r0, 2; add.u32 %r0, %r0, smem; setp.eq.u32 %p2, %tid, 0;"]
    counts = {op.event: 32 if op.kind == "signal" else 1 for warp in program for op in warp if op.kind in PARTS}
    lines += [f"@%p2 mbarrier.init.shared::cta.b64 [smem+{4096 + 8 * n}], {count};" for n, count in counts.items()]
    lines.append("bar.sync 0;")
    for w, warp in enumerate(program):
        lines.append(f"setp.ne.u32 %p1, %warp, {w}; @%p1 bra past_{w};")
        for position, op in enumerate(warp):
            place, mbarrier = f"[%r0+{128 * op.n}]", f"[smem+{4096 + 8 * op.event}]"
            lines.append(
                {
                    "st": f"st.shared.u32 {place}, {1000 * w + position};",
                    "ld": f"ld.shared.u32 %r1, {place};",
                    "cp": f"cp.async.ca.shared.global {place}, [%x], 4;",
                    "commit": "cp.async.commit_group;",
                    "wait": f"cp.async.wait_group {op.n};",
                    "sync": f"bar.sync {op.n}, {op.threads};",
                    "arrive": f"bar.arrive {op.n}, {op.threads};",
                    "signal": f"mbarrier.arrive.shared::cta.b64 _, {mbarrier};",
                    "fence": "fence.proxy.async.shared::cta;",
                    "bulk": f"setp.eq.u32 %p1, %tid, {32 * w};"
                    f"@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, {mbarrier}, 128;"
                    "@%p1 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes "
                    f"[smem+{128 * op.n}], [%xs], 128, {mbarrier};",
                    "await": f"try_{w}_{op.event}: mbarrier.try_wait.parity.shared::cta.b64 %p1, {mbarrier}, 0;"
                    f"@!%p1 bra try_{w}_{op.event};",
                }[op.kind]
            )
        lines.append(f"st.global.u32 [%out], {w}; ret; past_{w}:")
    return "\n".join(lines)


def verdict(program: Program, schedule: str, seed: int) -> str:
    """The kind of the report, or nothing."""
    try:
        out = run(ptx(program), threads=32 * WARPS, schedule=schedule, seed=seed)
    except KernelError as error:
        return error.kind
    assert out.tolist() == [thread // 32 for thread in range(32 * WARPS)]
    return ""


def variants(rng: random.Random) -> list[Program]:
    """As it came, repaired, and repaired but with one meeting called off, or without fences."""
    program = random_program(rng)
    right = repaired(program)
    events = sorted({op.event for warp in right for op in warp if op.event >= 0})
    gone = rng.choice(events or [-2])  # a repair may have taken them all
    kept = (lambda op: True, lambda op: op.event != gone, lambda op: op.kind != "fence")
    return [program, *([[op for op in warp if keep(op)] for warp in right] for keep in kept)]


@pytest.mark.parametrize("part", range(4))
def test_reports_if_and_only_if_something_is_wrong(part: int) -> None:
    seen = {True: 0, False: 0}
    for seed in range(20 * part, 20 * part + 20):
        for program in variants(random.Random(seed)):
            wrong = wrong_access(program) is not None
            seen[wrong] += 1
            for schedule in SCHEDULES:
                kind = verdict(program, schedule, seed)
                assert kind in (("race", "uninitialised", "missing fence") if wrong else ("",)), (
                    seed,
                    schedule,
                    ptx(program),
                )
    assert min(seen.values()) >= 20, seen


@pytest.mark.parametrize(
    ("program", "wrong"),
    [
        ([[Op("st")], [Op("ld")], [], []], True),
        ([[Op("st"), Op("sync", 1, 64, 0)], [Op("sync", 1, 64, 0), Op("ld")], [], []], False),
        ([[Op("st"), Op("arrive", 7, 64, 0)], [Op("sync", 7, 64, 0), Op("ld")], [], []], False),
        ([[Op("arrive", 7, 64, 0), Op("ld")], [Op("st"), Op("sync", 7, 64, 0)], [], []], True),
        # What follows an arrival is not ordered by it, though the barrier completes later still.
        ([[Op("st"), Op("arrive", 7, 64, 0), Op("ld")], [Op("sync", 7, 64, 0), Op("st")], [], []], True),
        ([[Op("st"), Op("signal", 0, 0, 0)], [Op("await", 0, 0, 0), Op("ld")], [], []], False),
        ([[Op("st"), Op("signal", 0, 0, 0), Op("ld")], [Op("await", 0, 0, 0), Op("st")], [], []], True),
        ([[Op("signal", 0, 0, 0), Op("ld")], [Op("st"), Op("await", 0, 0, 0)], [], []], True),
        ([[Op("cp"), Op("commit"), Op("wait"), Op("ld")], [], [], []], False),
        ([[Op("cp"), Op("wait"), Op("ld")], [], [], []], True),  # not committed
        ([[Op("cp"), Op("commit"), Op("cp", 1), Op("commit"), Op("wait", 1), Op("ld")], [], [], []], False),
        ([[Op("cp"), Op("commit"), Op("cp", 1), Op("commit"), Op("wait", 1), Op("ld", 1)], [], [], []], True),
        ([[Op("st"), Op("fence"), Op("bulk", 0, 0, 0)], [Op("await", 0, 0, 0), Op("ld")], [], []], False),
        ([[Op("st"), Op("bulk", 0, 0, 0)], [Op("await", 0, 0, 0), Op("ld")], [], []], True),  # no fence
        ([[Op("bulk", 0, 0, 0), Op("ld")], [Op("await", 0, 0, 0)], [], []], True),
        ([[Op("ld"), Op("st")], [], [], []], True),  # of what nobody has stored
    ],
)
def test_the_oracle_and_the_detector_on_programs_that_one_can_see_through(program: Program, wrong: bool) -> None:
    assert (wrong_access(program) is not None) == wrong
    for schedule in SCHEDULES:
        assert bool(verdict(program, schedule, 0)) == wrong
