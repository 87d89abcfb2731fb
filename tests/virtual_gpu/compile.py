"""Instructions -> closures ("steps") over a machine. An unknown opcode is an error here, before anything runs.

A step takes the machine, does its work for the threads that execute, and returns None to go on with the next
instruction, or the pc to go on at. Builders of steps register themselves in OPS by a prefix of the opcode: moves and
control flow here, the others in memory_ops.py, warp_ops.py, async_ops.py, bulk.py and wgmma.py. Plain arithmetic is in
alu.py and bits.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.virtual_gpu.alu import ALU, TYPES, Sources
from tests.virtual_gpu.bits import setp
from tests.virtual_gpu.memory import LOCAL_WINDOW, SHARED_WINDOW, Fault, addresses_of
from tests.virtual_gpu.parse import Instruction, Kernel, Memory, PtxError, Register, Vector

PARAMETER_BASE = 0x5000_0000_0000  # where parameters lie in the generic address space: tensor maps are found there

Step = Callable[[Any], int | None]
OPS: dict[str, Callable[[Any, Instruction], Step]] = {}

_SPECIALS = {f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"}
_SPECIALS |= {"%laneid", "%warpid", "%nwarpid", "%clusterid.x", "%cluster_ctarank", "%cluster_ctaid.x"}
_SPECIALS |= {"%cluster_nctaid.x", *(f"%lanemask_{kind}" for kind in ("eq", "lt", "le", "gt", "ge"))}


def op(*prefixes: str) -> Callable[[Any], Any]:
    """Registers a builder for all opcodes that begin with one of these, unless a longer prefix is registered."""

    def register(builder: Any) -> Any:
        OPS.update(dict.fromkeys(prefixes, builder))
        return builder

    return register


class Code:
    """A kernel ready to run: one step for each instruction.

    Attributes:
        granule: the bytes of shared memory that are watched as one: no access is narrower.
        warpgroups: whether four warps must stay together.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.name, self.instructions = kernel, kernel.name, kernel.instructions
        self.registers = list(kernel.registers)
        self.specials: dict[str, int] = {}
        self.granule = 16
        self.warpgroups = any(i.parts[0] == "wgmma" for i in kernel.instructions)
        self.parameters = {p.name: p.offset for p in kernel.parameters}
        self.symbols = kernel.shared | kernel.local
        self.symbols |= {name: PARAMETER_BASE + offset for name, offset in self.parameters.items()}
        self.symbols |= dict(zip(kernel.constants, addresses_of(kernel.constants.values()), strict=True))
        self.steps: list[Step] = []
        for instruction in self.instructions:
            try:
                self.steps.append(self._step(instruction))
            except (PtxError, KeyError) as error:
                raise PtxError(f"PTX line {instruction.line}: {instruction.text}: {error}") from None
        self.steps.append(lambda m: m.exit())

    def _step(self, i: Instruction) -> Step:
        for length in range(len(i.parts), 0, -1):
            if builder := OPS.get(".".join(i.parts[:length])):
                return self._predicated(i, builder(self, i))
        if i.parts[0] not in ALU:
            raise PtxError(f"unknown opcode {i.op!r}")
        compute = ALU[i.parts[0]](i, self.sources(i))
        return self._predicated(i, self.assign(i.operands[0], compute))

    def _predicated(self, i: Instruction, run: Step) -> Step:
        if i.predicate is None or i.target >= 0:
            return run
        slot, negated, following = i.predicate.slot, i.negated, i.index + 1

        def guarded(m: Any) -> int | None:
            chosen = ~m.R[slot] if negated else m.R[slot]
            outer = m.mask
            if outer is not None:
                chosen = chosen & outer
            count = np.count_nonzero(chosen)
            if not count:
                return None
            m.mask = None if count == m.threads else chosen
            result = run(m)
            if result is None or result == following:
                m.mask = outer
                return None
            if count < (m.threads if outer is None else np.count_nonzero(outer)):
                m.fork(following, ~chosen if outer is None else outer & ~chosen)
            return result

        return guarded

    def sources(self, i: Instruction) -> Sources:
        return Sources(i.operands, self.symbols, self.special)

    def special(self, name: str) -> int:
        """The slot that holds a special register."""
        if name not in _SPECIALS:
            raise PtxError(f"special register {name} is not supported")
        if name not in self.specials:
            self.specials[name] = len(self.registers)
            self.registers.append("b32")
        return self.specials[name]

    def assign(self, operand: Register, compute: Callable[[Any], Any]) -> Step:
        """A step that puts the result of ``compute`` into a register, as wide as the register is."""
        slot, dtype = operand.slot, TYPES[operand.type]
        word = np.dtype(f"u{dtype.itemsize}") if dtype.kind != "b" else dtype

        def run(m: Any) -> None:
            value = np.asarray(compute(m.R))
            if value.dtype != word:
                same = value.dtype.itemsize == word.itemsize and word.kind != "b"
                value = value.view(word) if same else value.astype(word)
            if value.shape != (m.threads,):
                value = np.broadcast_to(value, m.threads).copy()
            m.R[slot] = value if m.mask is None else np.where(m.mask, value, m.R[slot])

        return run

    def address(self, i: Instruction, operand: Memory) -> Callable[[Any], np.ndarray]:
        """The addresses of all threads, from the machine."""
        if isinstance(operand.base, Register):
            slot = operand.base.slot
            if not operand.offset:
                return lambda m: m.R[slot]
            size = TYPES[operand.base.type].itemsize
            offset = np.array(operand.offset & ((1 << 8 * size) - 1), f"u{size}")[()]
            return lambda m: m.R[slot] + offset
        read = self.sources(i).read(operand.base, np.dtype("u8"))
        return lambda m: np.full(m.threads, read(m.R) + np.uint64(operand.offset))

    def touches_shared(self, size: int) -> None:
        self.granule = min(self.granule, size)


def pick(values: np.ndarray, lanes: np.ndarray | None) -> np.ndarray:
    return values if lanes is None else values[lanes]


# Moves, predicates


@op("mov")
def _move(code: Code, i: Instruction) -> Step:
    target, value = i.operands
    source, kind = code.sources(i), TYPES[i.parts[-1]]
    if isinstance(value, Vector):
        part = kind.itemsize // len(value.items)
        reads = [source.read(item, np.dtype(f"u{part}")) for item in value.items]

        def pack(R: list[np.ndarray]) -> np.ndarray:
            columns = np.broadcast_arrays(*(read(R) for read in reads))
            return np.stack(np.atleast_2d(columns), axis=-1).view(f"u{kind.itemsize}")[..., 0]

        return code.assign(target, pack)
    if isinstance(target, Vector):
        part = np.dtype(f"u{kind.itemsize // len(target.items)}")
        read = source.read(value, np.dtype(f"u{kind.itemsize}"))

        def unpack(m: Any) -> None:
            parts = np.broadcast_to(read(m.R), m.threads).copy().view(part).reshape(m.threads, -1)
            for column, item in enumerate(target.items):
                if item is not None:
                    m.put(item.slot, np.ascontiguousarray(parts[:, column]))

        return unpack
    if isinstance(value, Register) and value.type == target.type:
        old, new = value.slot, target.slot

        def copy(m: Any) -> None:  # arrays are never changed in place: sharing one is a copy
            m.R[new] = m.R[old] if m.mask is None else np.where(m.mask, m.R[old], m.R[new])

        return copy
    return code.assign(
        target, source.read(value, TYPES[target.type] if kind.kind == "b" else np.dtype(f"u{kind.itemsize}"))
    )


@op("cvta")
def _generic(code: Code, i: Instruction) -> Step:
    read = code.sources(i)(1, np.dtype("u8"))
    windows = {"shared": SHARED_WINDOW, "shared::cta": SHARED_WINDOW, "local": LOCAL_WINDOW}
    window = np.uint64(next((windows[p] for p in i.parts if p in windows), 0))
    if "to" in i.parts:
        return code.assign(i.operands[0], lambda R: read(R) - window)
    return code.assign(i.operands[0], lambda R: read(R) + window)


@op("setp")
def _set_predicate(code: Code, i: Instruction) -> Step:
    computes = setp(i, code.sources(i))
    if not isinstance(i.operands[0], Vector):
        return code.assign(i.operands[0], computes[0])
    steps = [code.assign(p, c) for p, c in zip(i.operands[0].items, computes, strict=True) if p is not None]

    def run(m: Any) -> None:
        for step in steps:
            step(m)

    return run


@op("not.pred", "and.pred", "or.pred", "xor.pred")
def _logic(code: Code, i: Instruction) -> Step:
    fn = {"not": np.logical_not, "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[i.parts[0]]
    reads = [code.sources(i).read(operand, np.dtype("?")) for operand in i.operands[1:]]
    return code.assign(i.operands[0], lambda R: fn(*(read(R) for read in reads)))


# Control flow


@op("bra")
def _branch(code: Code, i: Instruction) -> Step:
    if i.predicate is None:
        return lambda m: i.target
    slot, target = i.predicate.slot, i.target
    if i.negated:
        return lambda m: m.branch(target, ~m.R[slot])
    return lambda m: m.branch(target, m.R[slot])


@op("ret", "exit")
def _exit(code: Code, i: Instruction) -> Step:
    return lambda m: m.exit()


@op("trap")
def _trap(code: Code, i: Instruction) -> Step:
    def run(m: Any) -> None:
        m.lanes()
        raise Fault("trap", "the kernel gave up by itself", 0)

    return run


@op("bar.sync", "bar.arrive", "barrier.sync", "barrier.arrive", "barrier.cta.sync", "barrier.cta.arrive")
def _barrier(code: Code, i: Instruction) -> Step:
    reads = [code.sources(i).read(operand, np.dtype("u4")) for operand in i.operands]
    arrive = "arrive" in i.parts

    def run(m: Any) -> int:
        number, wanted = [m.uniform(read(m.R)) for read in reads] + [0] * (2 - len(reads))
        return m.barrier(number, wanted, arrive)

    return run


@op("bar.warp.sync", "fence.mbarrier_init", "griddepcontrol")
@op("fence.proxy.tensormap", "prefetch", "prefetchu", "nanosleep")
def _nothing(code: Code, i: Instruction) -> Step:
    """Threads of a warp meet again by themselves, and memory here is in order: nothing to do."""
    return lambda m: None


@op("membar", "fence.acq_rel", "fence.sc", "fence.acquire", "fence.release")
def _fence(code: Code, i: Instruction) -> Step:
    """Memory here is in order: only the race detector between CTAs has to know."""
    return lambda m: m.global_fence()
