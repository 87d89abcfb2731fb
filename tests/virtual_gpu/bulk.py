"""mbarriers, and the copies of the async proxy that they count: cp.async.bulk and cp.async.bulk.tensor (TMA)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.virtual_gpu import tma
from tests.virtual_gpu.async_agents import Agent
from tests.virtual_gpu.compile import PARAMETER_BASE, Code, Step, op, pick
from tests.virtual_gpu.memory import WORDS, Fault
from tests.virtual_gpu.parse import SHARED_BASE, Immediate, Instruction, Memory, PtxError

_U32 = np.dtype("u4")


class Mbarrier:
    """The mbarriers of all CTAs at one shared address.

    A phase is complete when ``pending`` arrivals and ``bytes`` of copies are both down to zero. ``clocks`` collects
    what those who arrive know; ``done`` is what it was when the last phase completed: what a waiting thread learns.
    """

    def __init__(self, machine: Any, address: int, column: int) -> None:
        ctas, agents = len(machine.ctas), machine.race.agents
        self.machine, self.address, self.column = machine, address, column
        self.valid = np.zeros(ctas, bool)
        self.initialised = np.zeros((ctas, 2), np.int64)  # by which warp, in which epoch
        self.expected, self.pending, self.bytes, self.phase = (np.zeros(ctas, np.int64) for _ in range(4))
        self.clocks, self.done = np.zeros((ctas, 2, agents), np.int64), np.zeros((ctas, 2, agents), np.int64)

    def init(self, lanes: np.ndarray, count: np.ndarray) -> None:
        ctas, warps = self.machine.cta_of[lanes], self.machine.warp_of[lanes]
        self.valid[ctas], self.bytes[ctas], self.phase[ctas] = True, 0, 0
        self.expected[ctas] = self.pending[ctas] = count
        self.clocks[ctas] = self.done[ctas] = 0
        self.initialised[ctas] = np.stack([warps, self.machine.race.now(warps)], axis=1)

    def check_usable(self, lanes: np.ndarray) -> None:
        """These threads may use it: it is initialised, and they know so."""
        ctas, race = self.machine.cta_of[lanes], self.machine.race
        if not self.valid[ctas].all():
            raise Fault("mbarrier", f"{self.name()} is not initialised", 0)
        warp, epoch = self.initialised[ctas].T
        late = np.flatnonzero(race.clock[self.machine.warp_of[lanes], warp % race.warps] < epoch)
        if late.size:
            by = f"warp {warp[late[0]] % race.warps} initialised it, no barrier in between"
            raise Fault("race", f"{self.name()} is used, but {by}", int(late[0]))

    def arrive(self, lanes: np.ndarray, count: np.ndarray, expect: np.ndarray) -> None:
        """``expect`` more bytes, then ``count`` arrivals, of each of these threads."""
        m = self.machine
        ctas, warps = m.cta_of[lanes], m.warp_of[lanes]
        np.add.at(self.bytes, ctas, expect)
        np.subtract.at(self.pending, ctas, count)
        if (self.pending[ctas] < 0).any():
            bad = int(np.flatnonzero(self.pending[ctas] < 0)[0])
            raise Fault("mbarrier", f"more arrivals than the {self.expected[ctas[bad]]} of {self.name()}", bad)
        if count.any():
            each = np.unique(warps)
            for warp in each:
                clocks = np.stack([m.race.clock[warp], m.race.fenced[warp]])
                np.maximum(self.clocks[warp // m.cta_warps], clocks, out=self.clocks[warp // m.cta_warps])
            m.race.tick(each)
        self._complete()

    def complete_bytes(self, ctas: np.ndarray, count: int, epochs: np.ndarray) -> None:
        self.bytes[ctas] -= count
        self.clocks[ctas, 0, self.column] = epochs
        self._complete()

    def _complete(self) -> None:
        over = np.flatnonzero(self.valid & (self.pending == 0) & (self.bytes == 0))
        self.phase[over] += 1
        self.pending[over] = self.expected[over]
        self.done[over] = self.clocks[over]

    def acquire(self, warps: np.ndarray) -> None:
        for warp in warps:
            self.machine.race.acquire(warp, self.done[warp // self.machine.cta_warps])

    def name(self) -> str:
        return f"the mbarrier at byte {self.address - SHARED_BASE} of shared memory"

    def state(self, cta: int) -> str:
        missing = f"{self.pending[cta]} arrivals and {self.bytes[cta]} bytes of copies"
        return f"\n  {self.name()} is in phase {self.phase[cta]} and misses {missing}"

    def check_over(self, ctas: np.ndarray) -> None:
        """These CTAs are done with it."""
        wrong = ctas[self.valid[ctas] & (self.bytes[ctas] != 0)]
        if wrong.size:
            cta, count = int(wrong[0]), int(self.bytes[wrong[0]])
            what = f"{count} bytes that never came" if count > 0 else f"{-count} bytes less than came"
            place = self.machine.place(cta * self.machine.cta_threads)
            raise Fault("byte count", f"at the end of CTA {place} {self.name()} expects {what}")


def _each(m: Any, addresses: np.ndarray, lanes: np.ndarray | None, checked: bool = True) -> Any:
    """(mbarrier, threads) for every address that the executing threads name."""
    threads = np.arange(m.threads) if lanes is None else lanes
    named = np.broadcast_to(addresses, m.threads)[threads].astype(np.int64)
    for address in np.unique(named):
        here = threads[named == address]
        m.shared.flat(m.base[here], np.full(len(here), address), 8)
        barrier = m.mbarriers.get(int(address))
        if barrier is None:
            column = m.race.copies_column(len(m.mbarriers))
            barrier = m.mbarriers[int(address)] = Mbarrier(m, int(address), column)
        if checked:
            barrier.check_usable(here)
        yield barrier, here


@op("mbarrier.init", "mbarrier.inval")
def _init(code: Code, i: Instruction) -> Step:
    address = code.address(i, i.operands[0])
    read = code.sources(i)(1, _U32) if i.parts[1] == "init" else None

    def run(m: Any) -> None:
        for barrier, threads in _each(m, address(m), m.lanes(), checked=False):
            if read is None:
                barrier.check_over(m.cta_of[threads])
                barrier.valid[m.cta_of[threads]] = False
            else:
                barrier.init(threads, np.broadcast_to(read(m.R), m.threads)[threads])

    return run


_ARRIVE = {"arrive", "expect_tx", "shared", "shared::cta", "b64", "release", "relaxed", "cta"}


@op("mbarrier.arrive", "mbarrier.expect_tx")
def _arrive(code: Code, i: Instruction) -> Step:
    if unknown := set(i.parts[1:]) - _ARRIVE:
        raise PtxError(f"{i.op}: .{min(unknown)} is not supported")
    expects, arrives = "expect_tx" in i.parts, "arrive" in i.parts
    at = next(n for n, operand in enumerate(i.operands) if isinstance(operand, Memory))
    address, state = code.address(i, i.operands[at]), i.operands[0] if at else None
    read = code.sources(i)(at + 1, _U32) if len(i.operands) > at + 1 else lambda R: np.uint32(1)

    def run(m: Any) -> None:
        lanes = m.lanes()
        for barrier, threads in _each(m, address(m), lanes):
            number = np.broadcast_to(read(m.R), m.threads)[threads].astype(np.int64)
            if state is not None:  # the token is the number of the phase
                token = np.broadcast_to(barrier.phase.astype(np.uint64)[m.cta_of], m.threads)[threads]
                m.put_lanes(state.slot, token, None if len(threads) == m.threads else threads)
            count = np.full(len(threads), int(arrives)) if expects else number
            barrier.arrive(threads, count, number if expects else np.zeros(len(threads), np.int64))

    return run


@op("mbarrier.try_wait", "mbarrier.test_wait")
def _wait(code: Code, i: Instruction) -> Step:
    address, read = code.address(i, i.operands[1]), code.sources(i)(2, _U32)
    parity, target = "parity" in i.parts, i.operands[0]

    def run(m: Any) -> int | None:
        lanes, wanted = m.lanes(), np.broadcast_to(read(m.R), m.threads)
        barriers = list(_each(m, address(m), lanes))

        def ready(mask: np.ndarray) -> np.ndarray:
            free = np.zeros(m.threads, bool)
            for barrier, threads in barriers:
                phase = barrier.phase[m.cta_of[threads]]
                free[threads] = (phase & 1 != wanted[threads] & 1) if parity else (phase > wanted[threads])
            return free & mask

        mask = np.ones(m.threads, bool) if m.mask is None else m.mask
        free = ready(mask)
        if (free != mask).any():
            blocked = mask & ~free
            if free.any():
                m.fork(m.pc, free)
            m.mask = blocked
            return m.wait(ready)
        for barrier, threads in barriers:
            barrier.acquire(np.unique(m.warp_of[threads]))
        m.put(target.slot, np.ones(m.threads, bool))
        return None

    return run


@op("fence.proxy.async")
def _fence_proxy(code: Code, i: Instruction) -> Step:
    return lambda m: m.race.fence_proxy(m.active_warps())


class BulkLoad:
    """Bytes on their way to shared memory, for one or more CTAs; ``finish`` tells the mbarrier."""

    def __init__(self, m: Any, lanes: np.ndarray, offsets: np.ndarray, words: np.ndarray, barrier: Mbarrier) -> None:
        self.m, self.ctas, self.barrier, self.pc = m, m.cta_of[lanes], barrier, m.pc
        self.offsets, self.words, self.unit = offsets, words, words.dtype.itemsize
        m.race.issue_copy(offsets.ravel(), self.unit, np.repeat(m.warp_of[lanes], offsets.shape[1]), m.pc, proxy=True)
        if m.schedule != "earliest":
            m.shared.poison(offsets, self.unit)

    def finish(self) -> None:
        self.m.shared.view[self.unit][self.offsets // self.unit] = self.words
        epochs = self.m.race.finish_tma(self.offsets, self.unit, self.ctas, self.pc, self.barrier.column)
        self.barrier.complete_bytes(self.ctas, self.offsets.shape[1] * self.unit, epochs)


class BulkStore(Agent):
    """Bytes on their way from shared to global memory."""

    def __init__(self, m: Any, lanes: np.ndarray, offsets: np.ndarray, moves: tma.Copies) -> None:
        self.m, self.lanes, self.offsets, self.unit = m, lanes, offsets, moves.unit
        self.targets, self.inside = moves.global_address, moves.inside
        self.pc, self.warps = m.pc, m.warp_of[lanes][:, None]
        granules = m.race.granules(offsets.ravel(), moves.unit).reshape(len(lanes), -1)
        self.cells = np.stack([np.unique(row) for row in granules])
        m.lanes_now = np.repeat(lanes, self.cells.shape[1])
        m.race.issue_read(self.cells, self.warps, m.pc)

    def move(self) -> None:
        self.moved = True
        if not self.inside.any():
            return
        words = self.m.shared.view[self.unit][self.offsets // self.unit]
        waiting, self.m.pc = self.m.pc, self.pc  # what is wrong with the store is reported where it was issued
        self.m.lanes_now = np.repeat(self.lanes, self.inside.sum(axis=1))
        self.m.memory.store(self.targets[self.inside].astype(np.uint64), words[self.inside], self.unit)
        self.m.pc = waiting

    def finish(self) -> None:
        if not self.moved:
            self.move()
        self.m.race.finish_read(self.cells, self.warps, self.pc)

    def part(self, chosen: np.ndarray) -> BulkStore:
        part = object.__new__(BulkStore)
        part.__dict__.update(self.__dict__)
        part.lanes, part.offsets, part.targets = self.lanes[chosen], self.offsets[chosen], self.targets[chosen]
        part.inside, part.warps, part.cells = self.inside[chosen], self.warps[chosen], self.cells[chosen]
        part.group = self.group if isinstance(self.group, int) else self.group[chosen]
        return part


def _issue_load(m: Any, lanes: np.ndarray, offsets: np.ndarray, words: np.ndarray, barriers: Any) -> None:
    for barrier, threads in barriers:
        here = np.isin(lanes, threads)
        load = BulkLoad(m, lanes[here], offsets[here], words[here], barrier)
        if m.schedule == "earliest":
            load.finish()
        else:
            m.agents.bulk.append(load)


@op("cp.async.bulk.tensor")
def _tensor(code: Code, i: Instruction) -> Step:
    loads = "mbarrier::complete_tx::bytes" in i.parts
    unknown = {p for p in i.parts[4:] if not p[0].isdigit() and not p.startswith(("shared::c", "L2::"))}
    unknown -= {"global", "mbarrier::complete_tx::bytes", "bulk_group", "tile", "im2col"}
    if unknown or (loads and "multicast::cluster" in i.op):
        raise PtxError(f"{i.op} is not supported")
    box, shared = (i.operands[1], i.operands[0]) if loads else (i.operands[0], i.operands[1])
    into, handle = code.address(i, shared), code.address(i, Memory(box.base, box.offset))
    coordinates = [code.sources(i).read(c, np.dtype("i4")) for c in box.coordinates]
    barrier_address = code.address(i, i.operands[2]) if loads else None
    im2col = i.operands[3].items if "im2col" in i.parts and loads else ()  # offsets of the pixels, in u16
    pixel_offsets = [code.sources(i).read(item, np.dtype("u2")) for item in im2col]
    code.touches_shared(16)

    def run(m: Any) -> None:
        lanes = np.arange(m.threads) if m.lanes() is None else m.lanes_now
        offset = m.uniform(handle(m)) - PARAMETER_BASE
        lanes = lanes if m.mask is None else np.flatnonzero(m.mask)
        if offset not in m.launch.tensor_maps:
            raise Fault("tensor map", f"no tensor map at byte {offset} of the parameters", 0)
        tensor_map = m.launch.tensor_maps[offset]
        at, offsets_at = (
            np.stack([np.broadcast_to(read(m.R), m.threads)[lanes] for read in reads], axis=1).astype(np.int64)
            if reads
            else None
            for reads in (coordinates, pixel_offsets)
        )
        shared_at = into(m)[lanes].astype(np.int64)
        moves = tma.copies(tensor_map, at, shared_at, offsets_at)
        base = m.base[lanes][:, None]
        if (shared_at % 128).any():
            raise Fault("misaligned", f"box at byte {int(shared_at[0]) - SHARED_BASE} of shared memory: 128 bytes", 0)
        flat = np.broadcast_to(base, moves.shared_address.shape).ravel()
        m.lanes_now = np.repeat(lanes, moves.inside.shape[1])
        offsets = m.shared.flat(flat, moves.shared_address.ravel(), moves.unit).reshape(moves.inside.shape)
        if barrier_address is None:
            m.agents.issue_store(BulkStore(m, lanes, offsets, moves))
            if m.observer is not None:
                inside = moves.global_address[moves.inside]
                m.observer.bulk(i, "store", moves.inside.size * moves.unit, inside, moves.unit)
            return
        words = np.zeros(moves.inside.shape, WORDS[moves.unit])
        if moves.inside.any():
            words[moves.inside] = m.memory.load(moves.global_address[moves.inside].astype(np.uint64), moves.unit)
        m.lanes_now = np.repeat(lanes, moves.inside.shape[1])
        _issue_load(m, lanes, offsets, words, list(_each(m, barrier_address(m), lanes)))
        if m.observer is not None:
            inside = moves.global_address[moves.inside]
            m.observer.bulk(i, "async", moves.inside.size * moves.unit, inside, moves.unit)

    return run


@op("cp.async.bulk.shared::cta.global", "cp.async.bulk.shared::cluster.global")
def _bulk(code: Code, i: Instruction) -> Step:
    if "mbarrier::complete_tx::bytes" not in i.parts or "multicast::cluster" in i.op:
        raise PtxError(f"{i.op} is not supported")
    into, source, barrier_address = (code.address(i, i.operands[n]) for n in (0, 1, 3))
    size = code.sources(i)(2, _U32)
    code.touches_shared(16)

    def run(m: Any) -> None:
        count = m.uniform(np.asarray(size(m.R)))
        lanes = np.arange(m.threads) if m.lanes() is None else m.lanes_now
        if count % 16:
            raise Fault("misaligned", f"a bulk copy of {count} bytes: not a multiple of 16", 0)
        steps = np.arange(0, count, 16)
        m.lanes_now = np.repeat(lanes, len(steps))
        targets = pick(into(m), lanes).astype(np.int64)[:, None] + steps
        base = np.broadcast_to(m.base[lanes][:, None], targets.shape)
        offsets = m.shared.flat(base.ravel(), targets.ravel(), 16).reshape(targets.shape)
        addresses = pick(source(m), lanes)[:, None] + steps.astype(np.uint64)
        words = m.memory.load(addresses.ravel(), 16).reshape(targets.shape)
        _issue_load(m, lanes, offsets, words, list(_each(m, barrier_address(m), lanes)))
        if m.observer is not None:
            m.observer.bulk(i, "async", words.size * 16, addresses.ravel().astype(np.int64))

    return run


@op("cp.async.bulk.commit_group")
def _commit(code: Code, i: Instruction) -> Step:
    return lambda m: m.agents.stores.commit()


def _finish(agents: list[BulkStore]) -> None:
    for agent in agents:
        agent.finish()


@op("cp.async.bulk.wait_group")
def _wait_group(code: Code, i: Instruction) -> Step:
    if not isinstance(i.operands[0], Immediate):
        raise PtxError(f"{i.op} is not supported")
    return lambda m: m.agents.stores.wait(i.operands[0].value, _finish)
