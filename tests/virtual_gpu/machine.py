"""Runs a chunk of CTAs: one dispatch of an instruction serves every thread that is at it.

Threads at the same pc form a group, ``mask`` says which (None: all). The group with the lowest pc runs until it
branches apart, passes another group, or blocks; groups that meet become one. A thread blocks at a barrier or at an
mbarrier whose phase is not complete. Only when every group is blocked must a copy by the async proxy take place: that
is its latest legal moment. When all is blocked and no copy is left, it is a deadlock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.virtual_gpu.async_agents import Agents
from tests.virtual_gpu.compile import Code
from tests.virtual_gpu.memory import Fault, GlobalMemory, LocalMemory, SharedMemory
from tests.virtual_gpu.parse import SIZES, Instruction
from tests.virtual_gpu.race import Arrived, RaceDetector

_JUMPS = 1_000_000  # a chunk of a large layer makes some thousands
GONE = -1  # what a step returns when its threads left the group: blocked or exited
_POISON = {1: np.uint8(0xFF), 2: np.uint16(0xFFFF), 4: np.uint32(0xFFFFFFFF), 8: np.uint64(0xFFFFFFFFFFFFFFFF)}


class KernelError(Exception):
    """A kernel did what it must not do, or a deadlock. ``kind`` is the class of error, the text is the report."""

    def __init__(self, kind: str, message: str, instruction: Instruction | None = None) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.instruction = kind, instruction


@dataclass
class Waiting:
    """Threads that cannot go on: at a named barrier, or until ``ready`` tells true for some of them."""

    pc: int  # where they go on
    mask: np.ndarray
    at: int  # the instruction that blocks
    barrier: int = -1
    wanted: int = 0  # threads the barrier waits for; 0: all of the CTA
    ready: Callable[[np.ndarray], np.ndarray] | None = None
    arrived: Arrived | None = None  # of those who do not wait


class Machine:
    """State of one chunk: registers ``R[slot][thread]``, memories, clocks, and who is where."""

    def __init__(
        self,
        code: Code,
        ctas: np.ndarray,  # [C, 3] positions in the grid
        threads: int,
        shared_bytes: int,
        memory: GlobalMemory,
        launch: Any,
        first_cta: int,  # how many CTAs of the launch other chunks run before
    ) -> None:
        self.code, self.memory, self.launch = code, memory, launch
        self.ctas, self.cta_threads, self.first_cta = ctas, threads, first_cta
        self.threads, self.cta_warps = len(ctas) * threads, threads // 32
        self.shared = SharedMemory(len(ctas), shared_bytes)
        self.local = LocalMemory(self.threads, code.kernel.local_bytes)
        thread = np.arange(self.threads)
        self.cta_of, self.warp_of = thread // threads, thread // 32
        self.base = self.cta_of * self.shared.stride
        self.race = RaceDetector(
            len(ctas), self.cta_warps, self.shared.stride, code.granule, lambda pc: str(code.instructions[pc])
        )
        self.observer, self.schedule = launch.observer, launch.schedule
        self.agents = Agents(self, launch.schedule, launch.random)
        self.mbarriers: dict[int, Any] = {}  # by shared address
        self.accumulators: dict[tuple[int, ...], Any] = {}  # of wgmma in flight, by their registers
        self._at_fence: list[np.ndarray] | None = None  # the registers as wgmma.fence saw them
        self.R = self._registers()
        self.poison32 = np.full(self.threads, _POISON[4])
        self.mask: np.ndarray | None = None
        self.pc = 0
        self._jumps = 0
        self.lanes_now: np.ndarray | None = None  # of the access in progress, for reports
        self._live = np.ones(self.threads, bool)
        self._ready: list[tuple[int, np.ndarray | None]] = [(0, None)]
        self._waiting: list[Waiting] = []
        self._side = np.ones(self.threads, bool)  # with a random schedule: the warps that run first

    def _registers(self) -> list[np.ndarray]:
        poison: dict[str, np.ndarray] = {}
        for kind in set(self.code.registers):
            value = np.bool_(False) if kind == "pred" else _POISON[SIZES[kind]]
            poison[kind] = np.full(self.threads, value)
        registers = [poison[kind] for kind in self.code.registers]
        tid = np.arange(self.threads) % self.cta_threads
        shape, grid = self.launch.block, self.launch.grid
        axes = (tid % shape[0], tid // shape[0] % shape[1], tid // shape[0] // shape[1])
        values: dict[str, Any] = {"%laneid": tid % 32, "%warpid": tid // 32, "%nwarpid": self.cta_warps}
        values |= {"%clusterid.x": 0, "%cluster_ctarank": 0, "%cluster_ctaid.x": 0, "%cluster_nctaid.x": 1}
        for axis, name in enumerate("xyz"):
            values |= {f"%tid.{name}": axes[axis], f"%ntid.{name}": shape[axis], f"%nctaid.{name}": grid[axis]}
            values[f"%ctaid.{name}"] = self.ctas[self.cta_of, axis]
        for name, slot in self.code.specials.items():
            if name.startswith("%lanemask_"):
                bits = np.uint64(1) << (tid % 32).astype(np.uint64)
                lower = bits - np.uint64(1)
                every = {"eq": bits, "lt": lower, "le": lower | bits, "gt": ~(lower | bits), "ge": ~lower}
                registers[slot] = every[name[-2:]].astype(np.uint32)
            else:
                registers[slot] = np.broadcast_to(values[name], self.threads).astype(np.uint32)
        return registers

    # What the steps of compile.py use.

    def lanes(self) -> np.ndarray | None:
        """Indices of the threads that execute, None for all."""
        self.lanes_now = None if self.mask is None else np.flatnonzero(self.mask)
        return self.lanes_now

    def warps(self) -> np.ndarray:
        """Those that execute, with all their threads: instructions of the kind ``.sync.aligned``."""
        if self.mask is None:
            return np.arange(self.threads // 32)
        counts = self.mask.reshape(-1, 32).sum(axis=1)
        if (counts % 32).any():
            warp, self.lanes_now = int(np.flatnonzero(counts % 32)[0]), None
            raise Fault("partial warp", f"executed by {counts[warp]} of 32 threads", warp * 32)
        return np.flatnonzero(counts)

    def active_warps(self) -> np.ndarray:
        """Those of which at least one thread executes."""
        if self.mask is None:
            return np.arange(self.threads // 32)
        return np.flatnonzero(self.mask.reshape(-1, 32).any(axis=1))

    def warp_numbers(self, lanes: np.ndarray | None) -> np.ndarray:
        """The warp of each executing thread, counted over the grid."""
        return self.first_cta * self.cta_warps + (self.warp_of if lanes is None else self.warp_of[lanes])

    def global_fence(self) -> None:
        if self.launch.races is not None:
            self.launch.races.fence(np.unique(self.warp_numbers(self.lanes())))

    def _met(self, warps: np.ndarray, arrived: Sequence[Arrived] = ()) -> None:
        """A barrier orders what these warps did to shared memory, and what they know of other CTAs."""
        self.race.barrier(warps, arrived)
        if self.launch.races is not None:
            self.launch.races.barrier(self.first_cta * self.cta_warps + warps)

    def put(self, slot: int, values: np.ndarray) -> None:
        """Full-width values into a register of the executing threads."""
        self.R[slot] = values if self.mask is None else np.where(self.mask, values, self.R[slot])

    def put_lanes(self, slot: int, values: np.ndarray, lanes: np.ndarray | None) -> None:
        """Values of the executing threads only, ``[len(lanes)]``."""
        if lanes is None:
            self.R[slot] = values
        else:
            register = self.R[slot].copy()
            register[lanes] = values
            self.R[slot] = register

    def write_wgmma(self, slot: int, values: np.ndarray, lanes: np.ndarray | None) -> None:
        """Full-width values into accumulators: no wgmma.fence is needed for what wgmma itself writes."""
        if lanes is None:
            self.R[slot] = values
        else:
            mask = np.zeros(self.threads, bool)
            mask[lanes] = True
            self.R[slot] = np.where(mask, values, self.R[slot])
        if self._at_fence is not None:
            self._at_fence[slot] = self.R[slot]

    def wgmma_fence(self) -> None:
        self._at_fence = list(self.R)

    def check_wgmma_fence(self, slots: tuple[int, ...]) -> None:
        """Registers of a wgmma must be as the last wgmma.fence saw them, or written by wgmma since."""
        before = self._at_fence
        changed = [slot for slot in slots if before is None or self.R[slot] is not before[slot]]
        if changed and before is not None and self.mask is not None:
            # Another warpgroup's change makes another array of a register: compare the values of this one.
            changed = [slot for slot in changed if (self.R[slot] != before[slot])[self.mask].any()]
        if changed:
            raise Fault("missing fence", "registers were changed after the last wgmma.fence", 0)

    def branch(self, target: int, taken: np.ndarray) -> int:
        """Threads in ``taken`` (full width) go to ``target``, the others on."""
        if self.mask is not None:
            taken = taken & self.mask
        count = int(np.count_nonzero(taken))
        total = self.threads if self.mask is None else int(np.count_nonzero(self.mask))
        if count == total:
            return target
        if count:
            self._ready.append((target, taken))
            self._ready.append((self.pc + 1, ~taken if self.mask is None else self.mask & ~taken))
            return GONE
        return self.pc + 1

    def fork(self, pc: int, mask: np.ndarray) -> None:
        """These threads leave the group and go on at ``pc`` by themselves."""
        self._ready.append((pc, mask))

    def uniform(self, value: np.ndarray) -> int:
        """The value of the first thread; threads with another one leave the group and execute the instruction later."""
        if value.ndim == 0:
            return int(value)
        active = np.ones(self.threads, bool) if self.mask is None else self.mask
        first = value[active.argmax()]
        same = active & (value == first)
        if (same != active).any():
            self.fork(self.pc, active & ~same)
            self.mask = same
        return int(first)

    def observe(
        self, i: Instruction, space: str, kind: str, lanes: np.ndarray | None, addresses: np.ndarray, size: int
    ) -> None:
        threads = np.arange(self.threads) if lanes is None else lanes
        self.observer.memory(i, space, kind, threads, addresses.astype(np.int64), size)

    def exit(self) -> int:
        self._live &= False if self.mask is None else ~self.mask
        for number in {w.barrier for w in self._waiting if w.barrier >= 0}:
            self._complete_barrier(number)
        return GONE

    def barrier(self, number: int, wanted: int, arrive: bool = False) -> int:
        """``bar.sync`` and ``bar.arrive``; who arrives only goes on at once."""
        if self.mask is None and not arrive and wanted in (0, self.cta_threads):
            self._met(np.arange(self.threads // 32))
            if self.schedule != "random":
                return self.pc + 1
        mask = np.ones(self.threads, bool) if self.mask is None else self.mask
        arrived = self.race.arrive(self.active_warps()) if arrive else None
        self._waiting.append(Waiting(self.pc + 1, mask, self.pc, number, wanted, arrived=arrived))
        self._complete_barrier(number)
        return self.pc + 1 if arrive else GONE

    def wait(self, ready: Callable[[np.ndarray], np.ndarray]) -> int:
        """Blocks the executing threads; those for which ``ready`` becomes true execute the instruction again."""
        mask = np.ones(self.threads, bool) if self.mask is None else self.mask
        self._waiting.append(Waiting(self.pc, mask, self.pc, ready=ready))
        return GONE

    def _complete_barrier(self, number: int) -> None:
        here = [w for w in self._waiting if w.barrier == number]
        arrived = sum(w.mask.reshape(-1, self.cta_threads).sum(axis=1) for w in here)
        wanted = max(w.wanted for w in here) or self._live.reshape(-1, self.cta_threads).sum(axis=1)
        full = np.flatnonzero((arrived >= wanted) & (arrived > 0))
        if not full.size:
            return
        inside = np.isin(self.cta_of, full)
        waiting = np.logical_or.reduce([w.mask & inside for w in here if not w.arrived] or [np.zeros_like(inside)])
        met = np.flatnonzero(waiting.reshape(-1, 32).any(axis=1))
        self._met(met, [w.arrived for w in here if w.arrived])
        for w in here:
            if not w.arrived:
                self._ready.append((w.pc, w.mask & inside))
            w.mask = w.mask & ~inside
        self._waiting = [w for w in self._waiting if w.mask.any()]
        if self.schedule == "random":
            size = 128 if self.code.warpgroups else 32
            self._side = np.repeat(self.agents.random.random(self.threads // size) < 0.5, size)

    # The scheduler.

    def run(self) -> None:
        """Until every thread has exited.

        Raises:
            KernelError: for the first thing the kernel does wrong.
        """
        try:
            with np.errstate(all="ignore"):
                while self._ready or self._waiting:
                    if self._ready:
                        self._advance(*self._pick())
                    else:
                        self._unblock()
                self.agents.drain()
                for barrier in self.mbarriers.values():
                    barrier.check_over(np.arange(len(self.ctas)))
        except Fault as fault:
            raise self._report(fault) from None

    def _pick(self) -> tuple[int, np.ndarray | None, int]:
        """The group to run: (pc, mask, the pc at which it must stop because another group is there)."""
        groups = self._ready
        if self.schedule == "random":
            self.agents.roll()
            full = [(pc, np.ones(self.threads, bool) if mask is None else mask) for pc, mask in groups]
            for side in (self._side, ~self._side):
                groups = [(pc, mask & side) for pc, mask in full if (mask & side).any()]
                rest = [(pc, mask & ~side) for pc, mask in full if (mask & ~side).any()]
                if groups:
                    break
        else:
            rest = []
        pc = min(group[0] for group in groups)
        masks = [mask for at, mask in groups if at == pc]
        others = [group for group in groups if group[0] != pc]
        self._ready = others + rest
        mask = masks[0] if len(masks) == 1 else np.logical_or.reduce(masks)
        if mask is not None and mask.all():
            mask = None
        return pc, mask, min((group[0] for group in others), default=len(self.code.steps) + 1)

    def _advance(self, pc: int, mask: np.ndarray | None, stop: int) -> None:
        self.mask = mask
        steps, observer = self.code.steps, self.observer
        while True:
            self.pc = pc
            if observer is not None and pc < len(self.code.instructions):
                observer.issue(self.code.instructions[pc], len(self.active_warps()))
            following = steps[pc](self)
            if following is None:
                pc += 1
            elif following == GONE:
                return
            else:
                pc = following
                self._jumps += 1
                if self._jumps > _JUMPS:
                    raise Fault(
                        "endless loop", f"{_JUMPS} jumps and no end: it may wait for another CTA, or for nothing"
                    )
            if pc >= stop:
                self._ready.append((pc, self.mask))
                return

    def _unblock(self) -> None:
        """Nobody can run: whoever's mbarrier is complete by now goes on, else an agent must act."""
        released = False
        for w in self._waiting:
            if w.ready is not None:
                free = w.mask & w.ready(w.mask)
                if free.any():
                    released = True
                    self._ready.append((w.pc, free))
                    w.mask = w.mask & ~free
        self._waiting = [w for w in self._waiting if w.mask.any()]
        if not released and not self.agents.act():
            raise self._deadlock()

    def _deadlock(self) -> KernelError:
        lines = []
        for w in self._waiting:
            first = int(np.flatnonzero(w.mask)[0])
            count = int(w.mask.reshape(-1, self.cta_threads)[self.cta_of[first]].sum())
            does = "have arrived" if w.arrived else "wait"
            of = f"{count} threads of CTA {self.place(first)} {does} (the first is {first % self.cta_threads})"
            lines.append(f"{of} at\n  {self.code.instructions[w.at]}")
            if w.ready is not None:
                lines += [b.state(self.cta_of[first]).lstrip("\n") for b in self.mbarriers.values()]
        last = self._waiting[0].at
        return KernelError("deadlock", "nobody can go on\n" + "\n".join(lines), self.code.instructions[last])

    def place(self, thread: int) -> str:
        return str(tuple(int(i) for i in self.ctas[self.cta_of[thread]]))

    def _report(self, fault: Fault) -> KernelError:
        instruction = self.code.instructions[self.pc]
        where = self.code.name
        count = self.threads if self.lanes_now is None else len(self.lanes_now)
        if fault.thread is not None and fault.thread < count:
            thread = fault.thread if self.lanes_now is None else int(self.lanes_now[fault.thread])
            where += f", CTA {self.place(thread)}, thread {thread % self.cta_threads}"
        return KernelError(fault.kind, f"{fault}\nin {where}, at\n  {instruction}", instruction)
