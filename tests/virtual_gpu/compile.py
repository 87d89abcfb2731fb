"""Instructions -> closures ("steps") over a machine. An unknown opcode is an error here, before anything runs.

A step takes the machine, does its work for the threads that execute, and returns None to go on with the next
instruction, or the pc to go on at. Builders of steps register themselves in OPS by a prefix of the opcode: control flow
and memory here, warps in warp_ops.py, asynchronous ones in async_ops.py, bulk.py and wgmma.py. Plain arithmetic is in
alu.py and bits.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.virtual_gpu.alu import ALU, TYPES, Sources
from tests.virtual_gpu.bits import setp
from tests.virtual_gpu.memory import SHARED_WINDOW, WORDS, Fault, one_by_one
from tests.virtual_gpu.parse import Instruction, Kernel, Memory, PtxError, Register, Symbol, Vector

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
        self.symbols = kernel.shared | {name: PARAMETER_BASE + offset for name, offset in self.parameters.items()}
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


# Loads and stores

_SPACES = ("global", "shared", "shared::cta", "param", "local", "const")
_ORDER = {
    "volatile",
    "relaxed",
    "acquire",
    "release",
    "acq_rel",
    "cta",
    "cluster",
    "gpu",
    "sys",
    "weak",
    "nc",
    "ca",
    "cg",
}
_ORDER |= {"cs", "cv", "lu", "wb", "wt", "async"}


def _access(code: Code, i: Instruction) -> tuple[str, int, str]:
    """(space, elements, type); space "" is generic. Refuses what it does not know."""
    space = next((p for p in i.parts if p in _SPACES), "")
    count = next((int(p[1]) for p in i.parts if p in ("v2", "v4", "v8")), 1)
    known = {*_SPACES, "v2", "v4", "v8", *_ORDER}
    unknown = [p for p in i.parts[1:-1] if p not in known and not p.startswith(("L1::", "L2::"))]
    size = count * TYPES[i.parts[-1]].itemsize
    if unknown or space in ("local", "const") or (size > 16 and space != "param"):
        raise PtxError(f"{i.op} is not supported")
    if space in ("shared", "shared::cta") or (not space and code.kernel.shared):
        code.touches_shared(size)
    return space.removesuffix("::cta"), count, i.parts[-1]


def in_shared(space: str, addresses: np.ndarray) -> np.ndarray | None:
    """Addresses within shared memory, None if this access goes to global memory."""
    if space == "shared":
        return addresses
    if space == "global" or not ((addresses >> np.uint64(32)) == SHARED_WINDOW >> 32).all():
        return None
    return addresses & np.uint64(0xFFFFFFFF)


@op("ld")
def _load(code: Code, i: Instruction) -> Step:
    space, count, kind = _access(code, i)
    targets = i.operands[0].items if isinstance(i.operands[0], Vector) else (i.operands[0],)
    element = TYPES[kind]
    size = count * element.itemsize
    if space == "param":
        return _load_parameter(code, i, targets, element)
    address = code.address(i, i.operands[1])

    def run(m: Any) -> None:
        lanes = m.lanes()
        addresses = pick(address(m), lanes)
        shared = in_shared(space, addresses)
        if shared is None:
            words = m.memory.load(addresses.astype(np.uint64, copy=False), size)
        else:
            offsets = m.shared.flat(pick(m.base, lanes), shared, size)
            m.race.read(offsets, size, pick(m.warp_of, lanes), m.pc)
            words = m.shared.view[size][offsets // size]
        if m.observer is not None:
            m.observe(i, "global" if shared is None else "shared", "load", lanes, addresses, size)
        elements = words.view(element).reshape(-1, count)
        for column, target in enumerate(targets):
            if target is not None:
                wide = TYPES[target.type].itemsize
                value = np.ascontiguousarray(elements[:, column])
                m.put_lanes(target.slot, extended(value, wide), lanes)

    return run


def extended(value: np.ndarray, size: int) -> np.ndarray:
    """As the unsigned word of a register of ``size`` bytes; signed types are extended by their sign."""
    if value.dtype.itemsize == size:
        return value.view(f"u{size}")
    return value.astype(f"i{size}" if value.dtype.kind == "i" else f"u{size}").view(f"u{size}")


def _load_parameter(code: Code, i: Instruction, targets: tuple[Any, ...], element: np.dtype) -> Step:
    memory = i.operands[1]
    if not isinstance(memory.base, Symbol):
        raise PtxError("parameters are read by their names only")
    start = code.parameters[memory.base.name] + memory.offset

    def run(m: Any) -> None:
        for n, target in enumerate(targets):
            at = start + n * element.itemsize
            value = np.frombuffer(m.launch.parameters, element, 1, at)
            m.put(target.slot, np.full(m.threads, extended(value, TYPES[target.type].itemsize)))

    return run


@op("st")
def _store(code: Code, i: Instruction) -> Step:
    space, count, kind = _access(code, i)
    items = i.operands[1].items if isinstance(i.operands[1], Vector) else (i.operands[1],)
    word = np.dtype(f"u{TYPES[kind].itemsize}")
    size = count * word.itemsize
    address, reads = code.address(i, i.operands[0]), [code.sources(i).read(item, word) for item in items]

    def run(m: Any) -> None:
        lanes = m.lanes()
        addresses = pick(address(m), lanes)
        columns = [pick(np.broadcast_to(read(m.R), m.threads), lanes) for read in reads]
        values = (
            (np.stack(columns, axis=1) if count > 1 else np.ascontiguousarray(columns[0])).view(WORDS[size]).ravel()
        )
        shared = in_shared(space, addresses)
        if shared is None:
            m.memory.store(addresses.astype(np.uint64, copy=False), values, size)
        else:
            offsets = m.shared.flat(pick(m.base, lanes), shared, size)
            m.shared.store(offsets, values, size, pick(m.warp_of, lanes), m.race, m.pc)
        if m.observer is not None:
            m.observe(i, "global" if shared is None else "shared", "store", lanes, addresses, size)

    return run


_ATOMICS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda old, value: old + value,
    "exch": lambda old, value: value,
    "max": max,
    "min": min,
    "and": lambda old, value: old & value,
    "or": lambda old, value: old | value,
}


@op("atom", "red")
def _atomic(code: Code, i: Instruction) -> Step:
    name = next((p for p in i.parts if p in _ATOMICS), "")
    unknown = set(i.parts[1:-1]) - {"global", "shared", "shared::cta", name, *_ORDER}
    dtype = TYPES[i.parts[-1]]
    if unknown or not name or dtype.itemsize < 4:
        raise PtxError(f"{i.op} is not supported")
    space, returns = ("shared" if "shared" in i.op else "global"), i.parts[0] == "atom"
    memory, operand = i.operands[returns], i.operands[returns + 1]
    address, read = code.address(i, memory), code.sources(i).read(operand, dtype)

    def run(m: Any) -> None:
        lanes = m.lanes()
        addresses = pick(address(m), lanes)
        values = np.ascontiguousarray(pick(np.broadcast_to(read(m.R), m.threads), lanes))
        if space == "global":
            before = m.memory.atomic(addresses, values, _ATOMICS[name])
        else:
            offsets = m.shared.flat(pick(m.base, lanes), addresses, dtype.itemsize)
            cells = m.shared.view[dtype.itemsize].view(dtype)
            before = one_by_one(cells, offsets // dtype.itemsize, values, _ATOMICS[name])
        if m.observer is not None:
            m.observe(i, space, "atomic", lanes, addresses, dtype.itemsize)
        if returns:
            m.put_lanes(i.operands[0].slot, before.view(f"u{dtype.itemsize}"), lanes)

    return run


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
    if "shared" not in i.parts and "shared::cta" not in i.parts:
        return code.assign(i.operands[0], read)
    window = np.uint64(SHARED_WINDOW)
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


@op("bar.warp.sync", "membar", "fence.acq_rel", "fence.sc", "fence.mbarrier_init", "griddepcontrol", "setmaxnreg")
@op("fence.proxy.tensormap", "prefetch", "prefetchu", "nanosleep", "fence.acquire", "fence.release")
def _nothing(code: Code, i: Instruction) -> Step:
    """Threads of a warp meet again by themselves, and memory here is in order: nothing to do."""
    return lambda m: None
