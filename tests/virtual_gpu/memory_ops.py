"""Loads, stores and atomics of threads, to global and shared memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.virtual_gpu.alu import TYPES
from tests.virtual_gpu.compile import Code, Step, op, pick
from tests.virtual_gpu.memory import LOCAL_WINDOW, SHARED_WINDOW, WORDS, Fault, one_by_one
from tests.virtual_gpu.parse import Instruction, PtxError, Symbol, Vector

_SPACES = ("global", "shared", "shared::cta", "param", "local", "const")
# Order and caching: here memory is in order, and there are no caches.
_ORDER = {"volatile", "weak", "relaxed", "acquire", "release", "acq_rel", "cta", "cluster", "gpu", "sys"}
_ORDER |= {"nc", "ca", "cg", "cs", "cv", "lu", "wb", "wt", "async"}
_WINDOWS = {SHARED_WINDOW >> 32: "shared", LOCAL_WINDOW >> 32: "local"}


def _access(code: Code, i: Instruction) -> tuple[str, int, str]:
    """(space, elements, type); space "" is generic. Refuses what it does not know."""
    space = next((p for p in i.parts if p in _SPACES), "")
    count = next((int(p[1]) for p in i.parts if p in ("v2", "v4", "v8")), 1)
    known = {*_SPACES, "v2", "v4", "v8", *_ORDER}
    unknown = [p for p in i.parts[1:-1] if p not in known and not p.startswith(("L1::", "L2::"))]
    size = count * TYPES[i.parts[-1]].itemsize
    if unknown or (size > 16 and space != "param"):
        raise PtxError(f"{i.op} is not supported")
    if space in ("shared", "shared::cta") or (not space and code.kernel.shared):
        code.touches_shared(size)
    return space.removesuffix("::cta"), count, i.parts[-1]


def resolve(m: Any, space: str, addresses: np.ndarray) -> tuple[str, np.ndarray]:
    """(space, addresses in it); a generic access of all threads must go to one space."""
    if space:
        return "global" if space == "const" else space, addresses
    windows = addresses >> np.uint64(32)
    space = _WINDOWS.get(int(windows[0]), "global")
    if space == "global":
        return space, addresses
    if (windows != windows[0]).any():
        raise Fault("generic access", f"one thread goes to {space} memory, another one elsewhere: not simulated", 0)
    return space, addresses & np.uint64(0xFFFFFFFF)


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
        where, addresses = resolve(m, space, pick(address(m), lanes))
        if where == "global":
            words = m.memory.load(addresses, size)
            if m.launch.races is not None:
                m.launch.races.access(addresses, size, m.warp_numbers(lanes), m.pc, store=False)
        elif where == "local":
            words = m.local.load(np.arange(m.threads) if lanes is None else lanes, addresses, size)
        else:
            offsets = m.shared.flat(pick(m.base, lanes), addresses, size)
            m.race.read(offsets, size, pick(m.warp_of, lanes), m.pc)
            words = m.shared.view[size][offsets // size]
        if m.observer is not None and where != "local":
            m.observe(i, where, "load", lanes, addresses, size)
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
        where, addresses = resolve(m, space, pick(address(m), lanes))
        columns = [pick(np.broadcast_to(read(m.R), m.threads), lanes) for read in reads]
        values = (
            (np.stack(columns, axis=1) if count > 1 else np.ascontiguousarray(columns[0])).view(WORDS[size]).ravel()
        )
        if where == "global":
            m.memory.store(addresses, values, size)
            if m.launch.races is not None:
                m.launch.races.access(addresses, size, m.warp_numbers(lanes), m.pc, store=True)
        elif where == "local":
            m.local.store(np.arange(m.threads) if lanes is None else lanes, addresses, values, size)
        else:
            offsets = m.shared.flat(pick(m.base, lanes), addresses, size)
            m.shared.store(offsets, values, size, pick(m.warp_of, lanes), m.race, m.pc)
        if m.observer is not None and where != "local":
            m.observe(i, where, "store", lanes, addresses, size)

    return run


_ATOMICS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda old, value: old + value,
    "inc": lambda old, value: type(old)(0) if old >= value else old + type(old)(1),
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
    fences = bool({"release", "acquire", "acq_rel"} & set(i.parts))

    def run(m: Any) -> None:
        lanes = m.lanes()
        addresses = pick(address(m), lanes)
        values = np.ascontiguousarray(pick(np.broadcast_to(read(m.R), m.threads), lanes))
        if space == "global":
            before = m.memory.atomic(addresses, values, _ATOMICS[name])
            if m.launch.races is not None:
                m.launch.races.atomic(addresses, m.warp_numbers(lanes), fences)
        else:
            offsets = m.shared.flat(pick(m.base, lanes), addresses, dtype.itemsize)
            m.race.read(offsets, dtype.itemsize, pick(m.warp_of, lanes), m.pc)  # atomics do not race with each other
            cells = m.shared.view[dtype.itemsize].view(dtype)
            before = one_by_one(cells, offsets // dtype.itemsize, values, _ATOMICS[name])
        if m.observer is not None:
            m.observe(i, space, "atomic", lanes, addresses, dtype.itemsize)
        if returns:
            m.put_lanes(i.operands[0].slot, before.view(f"u{dtype.itemsize}"), lanes)

    return run
