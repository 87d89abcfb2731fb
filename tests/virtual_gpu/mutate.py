"""Small wrongs, one at a time, in PTX that compilers made: the mutation suite asks that the virtual GPU sees them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.virtual_gpu import KernelError
from tests.virtual_gpu.compile import Code
from tests.virtual_gpu.launch import Entry
from tests.virtual_gpu.parse import Instruction, parse
from vgg_fast import reference

NOTHING = "bar.warp.sync -1;"


@dataclass(frozen=True)
class Mutant:
    """``name`` is what is wrong and with which instruction: its opcode and its number among those of that opcode."""

    name: str
    line: int
    text: str  # of the line, instead of what it was


def apply(wrongs: Iterable[Mutant], entry: Entry) -> Entry:
    """The kernel with all these wrongs in it."""
    lines = entry.ptx.splitlines()
    for mutant in wrongs:
        lines[mutant.line - 1] = mutant.text
    ptx = "\n".join(_alone(lines, entry.code.name))
    return replace(entry, code=Code(parse(ptx)[entry.code.name]), ptx=ptx)


def survives(mutant: Mutant, run: Callable[..., Mapping[str, Tensor]], expected: Tensor) -> bool:
    """Whether a kernel passes for right with this wrong in it.

    Args:
        run: launches the kernel after ``change=``; gives ``out`` and ``pooled``.
        expected: of ``out``.
    """
    try:
        results = run(change=functools.partial(apply, [mutant]))
    except (KernelError, AssertionError):
        return False
    return torch.equal(results["out"], expected) and torch.equal(results["pooled"], reference.maxpool2x2(expected))


def _alone(lines: list[str], name: str) -> Iterator[str]:
    """Without the other kernels, which take their time to parse; every line keeps its number."""
    ours = True
    for line in lines:
        if match := re.search(r"\.entry\s+([\w$]+)", line):
            ours = match[1] == name
        yield line if ours or re.match(r"\s*\.file\b", line) else ""


# Which of the instructions of an opcode are changed, of ``n``. Barriers, waits and fences: all of them, one by one.
ALL, ENDS, LAST, HALVES = (
    lambda n: range(n),
    lambda n: {0, n - 1},
    lambda n: {n - 1},  # where a tile hangs over, it does so at its end
    lambda n: {0, n // 2},
)

# Opcode, what to call it, how (a pattern in the line, and its replacement), and to which.
_DROP = (r"^.*$", NOTHING)
MUTATIONS: tuple[tuple[str, str, tuple[str, str], Callable[[int], Collection[int]]], ...] = (
    ("bar.sync", "drop", _DROP, ALL),
    ("cp.async.commit_group", "drop", _DROP, ALL),
    ("cp.async.wait_group", "weaken", (r"(\d+)\s*;", "wait+1;"), ALL),
    ("wgmma.wait_group", "weaken", (r"(\d+)\s*;", "wait+1;"), ALL),
    ("wgmma.commit_group", "drop", _DROP, ALL),
    ("wgmma.fence", "drop", _DROP, ALL),
    ("fence.proxy.async", "drop", _DROP, ALL),
    ("cp.async.bulk.commit_group", "drop", _DROP, ALL),
    ("cp.async.bulk.wait_group", "weaken", (r"(\d+)\s*;", "wait+1;"), ALL),
    (
        "mbarrier.try_wait",
        "wrong phase of",
        (r"(.*), (%r\d+);", r"{ .reg .b32 other; not.b32 other, \2; \1, other; }"),
        ALL,
    ),
    ("mbarrier.arrive.expect_tx", "expect more in", (r"(\d+);$", "bytes+16;"), ENDS),
    ("mbarrier.arrive.expect_tx", "expect less in", (r"(\d+);$", "bytes-16;"), ENDS),
    ("mbarrier.arrive.shared", "drop", _DROP, ALL),
    ("mbarrier.init", "one more arrival in", (r", 1;", ", 2;"), ENDS),
    ("cp.async.cg", "no zero-fill in", (r"(0x10|16), %r\d+;", "16;"), ENDS),
    ("cp.async.cg", "source + 16 of", (r"\[ ?(%rd\d+)(?: \+ 0 )?\]", r"[\1+16]"), HALVES),
    ("cp.async.cg", "destination + 16 of", (r"\[ ?(%r\d+)(?: \+ 0 )?\]", r"[\1+16]"), HALVES),
    ("cp.async.bulk.tensor", "drop", _DROP, ENDS),
    ("cp.async.bulk.tensor", "destination + 128 of", (r"\[(%r\d+)\], \[(%rd)", r"[\1+128], [\2"), ENDS),
    ("ldmatrix", "address + 16 of", (r"\[(%r\d+)(?:\+(\d+))?\]", "shared+16"), HALVES),
    ("stmatrix", "address + 16 of", (r"\[(%r\d+)(?:\+(\d+))?\]", "shared+16"), HALVES),
    ("st.shared", "address + 16 of", (r"\[ ?(%r\d+) ?(?:\+ ?(\d+))? ?\]", "shared+16"), HALVES),
    ("ld.shared", "address + 16 of", (r"\[ ?(%r\d+) ?(?:\+ ?(\d+))? ?\]", "shared+16"), HALVES),
    ("st.global", "no mask on", (r"^\s*@!?%p\d+ ", ""), LAST),
    ("st.global", "address + 16 of", (r"\[ ?(%rd\d+) ?(?:\+ ?(\d+))? ?\]", r"[\1+16]"), HALVES),
    ("ld.global", "no mask on", (r"^\s*@!?%p\d+ ", ""), LAST),
    ("ld.global", "address + 16 of", (r"\[ ?(%rd\d+) ?(?:\+ ?(\d+))? ?\]", r"[\1+16]"), HALVES),
    ("atom.global", "relax", (r"\.acq_rel", ".relaxed"), ALL),
    ("mma.sync", "drop", _DROP, ENDS),
    ("wgmma.mma_async", "drop", _DROP, ENDS),
)


def _replacement(template: str, match: re.Match[str]) -> str:
    """The numbers that a template names; other templates are those of ``re``."""
    if template in ("wait+1;", "bytes+16;", "bytes-16;"):
        return f"{int(match[1]) + int(template[4 if template[0] == 'w' else 5 : -1])};"
    if template == "shared+16":
        return f"[{match[1]}+{int(match[2] or 0) + 16}]"
    return match.expand(template)


def mutants(entry: Entry) -> Iterator[Mutant]:
    lines = entry.ptx.splitlines()
    for opcode, what, (pattern, template), which in MUTATIONS:
        found = [i for i in entry.code.instructions if i.op.startswith(opcode)]
        for number in sorted(which(len(found))) if found else ():
            if mutant := _mutant(lines, found[number], f"{what} {opcode} #{number}", pattern, template):
                yield mutant


def _mutant(lines: list[str], instruction: Instruction, name: str, pattern: str, template: str) -> Mutant | None:
    line = lines[instruction.line - 1]
    changed = re.sub(pattern, lambda match: _replacement(template, match), line, count=1)
    return Mutant(name, instruction.line, changed) if changed != line else None
