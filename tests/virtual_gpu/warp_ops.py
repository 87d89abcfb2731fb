"""Instructions that a warp executes together: shuffles and votes, ldmatrix and stmatrix, mma.sync.

Neighbouring ``mma.sync`` whose fragments form a grid (every A with every B) are one matrix product per warp: NumPy then
multiplies 64x16 by 16x32 instead of sixteen times 16x16 by 16x8. The order of every sum stays the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.virtual_gpu import tensor
from tests.virtual_gpu.compile import Code, Step, op
from tests.virtual_gpu.memory import Fault
from tests.virtual_gpu.parse import Instruction, PtxError, Register, Vector

_U32 = np.dtype("u4")


def slots(operand: Any) -> tuple[int, ...]:
    """Of a vector of registers."""
    if not isinstance(operand, Vector) or not all(isinstance(item, Register) for item in operand.items):
        raise PtxError("expected a vector of registers")
    return tuple(item.slot for item in operand.items)


def fragments(m: Any, registers: tuple[int, ...], warps: np.ndarray) -> np.ndarray:
    """``uint32 [warps, 32, registers]``."""
    stacked = np.stack([m.R[slot] for slot in registers], axis=-1).reshape(-1, 32, len(registers))
    return stacked if len(warps) == len(stacked) else stacked[warps]


def spread(m: Any, registers: tuple[int, ...], values: np.ndarray, lanes: np.ndarray | None) -> None:
    """The inverse of :func:`fragments`, for the warps that execute."""
    for n, slot in enumerate(registers):
        m.put_lanes(slot, np.ascontiguousarray(values[:, :, n]).reshape(-1), lanes)


@op("shfl.sync")
def _shuffle(code: Code, i: Instruction) -> Step:
    mode, source = i.parts[2], code.sources(i)
    outputs = i.operands[0].items if isinstance(i.operands[0], Vector) else (i.operands[0],)
    value, lane, clamp = (source(n, _U32) for n in (1, 2, 3))

    def run(m: Any) -> None:
        own = np.arange(32)
        values = np.broadcast_to(value(m.R), m.threads).reshape(-1, 32)
        by = (np.broadcast_to(lane(m.R), m.threads).reshape(-1, 32) & 31).astype(np.int64)
        c = np.broadcast_to(clamp(m.R), m.threads).reshape(-1, 32).astype(np.int64)
        segment, limit = c >> 8 & 31, c & 31
        low = own & segment
        high = low | limit & ~segment
        source_lane = {"up": own - by, "down": own + by, "bfly": own ^ by, "idx": low | by & ~segment}[mode]
        inside = source_lane >= high if mode == "up" else source_lane <= high
        source_lane = np.where(inside, source_lane, own)
        if m.mask is not None:
            active = m.mask.reshape(-1, 32)
            if (active & ~np.take_along_axis(active, source_lane, 1)).any():
                raise Fault("partial warp", "a shuffle reads from a thread that does not execute it")
        m.put(outputs[0].slot, np.take_along_axis(values, source_lane, 1).reshape(-1))
        if len(outputs) > 1 and outputs[1] is not None:
            m.put(outputs[1].slot, inside.reshape(-1).copy())

    return run


@op("vote.sync", "activemask")
def _vote(code: Code, i: Instruction) -> Step:
    mode = i.parts[2] if i.parts[0] == "vote" else "active"
    read = code.sources(i)(1, np.dtype("?")) if mode != "active" else None

    def run(m: Any) -> None:
        active = (np.ones(m.threads, bool) if m.mask is None else m.mask).reshape(-1, 32)
        votes = active if read is None else np.broadcast_to(read(m.R), m.threads).reshape(-1, 32) & active
        if mode in ("ballot", "active"):
            result = (votes.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(axis=1).astype(np.uint32)
        else:
            every, some = (votes == active).all(axis=1), votes.any(axis=1)
            result = {"all": every, "any": some, "uni": every | ~some}[mode]
        m.put(i.operands[0].slot, np.repeat(result, 32))

    return run


@op("redux.sync")
def _reduce(code: Code, i: Instruction) -> Step:
    names = {"add": np.add, "min": np.minimum, "max": np.maximum}
    names |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    read, fn = code.sources(i)(1, np.dtype("i4" if i.parts[-1] == "s32" else "u4")), names[i.parts[2]]

    def run(m: Any) -> None:
        m.warps()
        values = np.broadcast_to(read(m.R), m.threads).reshape(-1, 32)
        m.put(i.operands[0].slot, np.repeat(fn.reduce(values, axis=1, dtype=values.dtype), 32).view(np.uint32))

    return run


@op("elect.sync")
def _elect(code: Code, i: Instruction) -> Step:
    lane, leader = i.operands[0].items

    def run(m: Any) -> None:
        active = (np.ones(m.threads, bool) if m.mask is None else m.mask).reshape(-1, 32)
        first = active.argmax(axis=1)
        if lane is not None:
            m.put(lane.slot, np.repeat(first, 32).astype(np.uint32))
        m.put(leader.slot, (first[:, None] == np.arange(32)).reshape(-1))

    return run


@op("ldmatrix.sync.aligned.m8n8", "stmatrix.sync.aligned.m8n8")
def _matrix(code: Code, i: Instruction) -> Step:
    if i.parts[-1] != "b16" or not {"shared", "shared::cta"} & set(i.parts):
        raise PtxError(f"{i.op} is not supported")
    count, trans = int(next(p for p in i.parts if p in ("x1", "x2", "x4"))[1]), "trans" in i.parts
    is_load = i.parts[0] == "ldmatrix"
    memory, vector = (i.operands[1], i.operands[0]) if is_load else i.operands
    address, registers = code.address(i, memory), slots(vector)
    code.touches_shared(16)

    def run(m: Any) -> None:
        warps, lanes = m.warps(), m.lanes()
        m.lanes_now = np.repeat(warps * 32, 8 * count)  # reports: whole warps
        every = address(m).astype(np.int64).reshape(-1, 32)[warps]
        rows = tensor.ldmatrix_addresses(every, count)  # [warps, count, 8]
        owner = np.repeat(warps, 8 * count)
        offsets = m.shared.flat(m.base[::32][owner], rows.reshape(-1), 16)
        if m.observer is not None:
            threads = (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)
            m.observer.memory(i, "shared", "load" if is_load else "store", threads, rows.reshape(-1), 16)
        cells = m.shared.view[16]
        if is_load:
            m.race.read(offsets, 16, owner, m.pc)
            data = cells[offsets >> 4].view(np.uint16).reshape(-1, count, 8, 8)
            spread(m, registers, tensor.ldmatrix(data, trans), lanes)
        else:
            data = np.ascontiguousarray(tensor.stmatrix(fragments(m, registers, warps), trans))
            m.shared.store(offsets, data.reshape(-1, 8).view(np.complex128).ravel(), 16, owner, m.race, m.pc)

    return run


@op("movmatrix.sync.aligned.m8n8.trans.b16")
def _transpose(code: Code, i: Instruction) -> Step:
    target, source = (operand.slot for operand in i.operands)

    def run(m: Any) -> None:
        warps, lanes = m.warps(), m.lanes()
        rows = tensor.stmatrix(fragments(m, (source,), warps), trans=False)
        spread(m, (target,), tensor.ldmatrix(rows, trans=True), lanes)

    return run


_K = {"f16": 16, "bf16": 16, "tf32": 8, "s8": 32, "u8": 32}  # per 16 bytes x 2 of A


@op("mma.sync.aligned")
def _mma(code: Code, i: Instruction) -> Step:
    shape, *layout, d, a, b, c = [p for p in i.parts[3:] if p != "satfinite"]
    if not shape.startswith("m16n8k") or layout != ["row", "col"] or c != d or d not in tensor.ACCUMULATORS:
        raise PtxError(f"{i.op} is not supported")
    if a not in tensor.ELEMENT_BYTES or b not in tensor.ELEMENT_BYTES:
        raise PtxError(f"{i.op}: operand type .{a} is not supported")
    saturate = "satfinite" in i.parts
    single = [slots(operand) for operand in i.operands]

    length, grid = _grid(code, i)

    def run(m: Any) -> int | None:
        warps, lanes = m.warps(), m.lanes()
        if grid is None:
            values = [fragments(m, registers, warps) for registers in single[1:]]
            spread(m, single[0], tensor.mma(*values, (a, b, d), saturate), lanes)
            return None
        _mma_grid(m, grid, a, b, warps, lanes)
        if m.observer is not None:
            for n in range(1, length):
                m.observer.issue(code.instructions[i.index + n], len(warps))
        return i.index + length

    return run


Grid = tuple[list[tuple[int, ...]], list[tuple[int, ...]], dict[tuple[int, int], tuple[Any, Any]]]


def _grid(code: Code, i: Instruction) -> tuple[int, Grid | None]:
    """(length, grid) of the longest run of fp32 mma's from here that is every A with every B."""
    best: tuple[int, Grid | None] = (1, None)
    rows: dict[tuple[int, ...], int] = {}
    columns: dict[tuple[int, ...], int] = {}
    tiles: dict[tuple[int, int], tuple[Any, Any]] = {}
    written: set[int] = set()
    groupable = ".f32.f16.f16" in i.op or ".f32.bf16.bf16" in i.op
    for n, other in enumerate(code.instructions[i.index :]):
        if other.op != i.op or other.predicate or not groupable:
            break
        d, a, b, c = (slots(operand) for operand in other.operands)
        if written & {*a, *b, *c}:
            break
        place = (rows.setdefault(a, len(rows)), columns.setdefault(b, len(columns)))
        if place in tiles:
            break
        tiles[place] = (d, c)
        written |= set(d)
        if len(tiles) == len(rows) * len(columns):
            best = (n + 1, (list(rows), list(columns), dict(tiles)))
    return best


def _mma_grid(m: Any, grid: Grid, a: str, b: str, warps: np.ndarray, lanes: np.ndarray | None) -> None:
    rows, columns, tiles = grid
    count = len(warps)
    left = tensor.mma_a(np.concatenate([fragments(m, registers, warps) for registers in rows]), a)
    left = left.reshape(len(rows), count, 16, -1).swapaxes(0, 1).reshape(count, 16 * len(rows), -1)
    right = tensor.mma_b(np.concatenate([fragments(m, registers, warps) for registers in columns]), b)
    right = right.reshape(len(columns), count, -1, 8).transpose(1, 2, 0, 3).reshape(count, left.shape[2], -1)
    product = np.matmul(left, right).reshape(count * len(rows), 16, -1)
    # [warp, row tile, lane, column tile, register] with the threads of a register side by side
    sums = tensor.mma_d(product, "f32").reshape(count, len(rows), 32, len(columns), 4).transpose(1, 3, 4, 0, 2)
    sums = np.ascontiguousarray(sums).view(np.float32).reshape(len(rows), len(columns), 4, count * 32)
    for (row, column), (d, c) in tiles.items():
        for n in range(4):
            old = m.R[c[n]] if lanes is None else m.R[c[n]][lanes]
            m.put_lanes(d[n], (old.view(np.float32) + sums[row, column, n]).view(np.uint32), lanes)
