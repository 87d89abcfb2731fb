"""Happens-before in shared memory: vector clocks of warps and asynchronous agents, and a shadow of every granule.

Each warp counts its own epochs and knows, of every other agent, the last epoch that happened before its present (Fidge
and Mattern's vector clocks; the shadow is that of FastTrack, Flanagan and Freund, PLDI 2009). A granule remembers its
last write and the last read of every warp. An access races with a remembered one that its warp's clock does not cover.

Agents beside the warps: IN_FLIGHT stands for any asynchronous write that was issued and not yet waited for, NEVER for
memory not written at all; no clock ever covers these two. Finished copies of the async proxy are counted by the
mbarrier they report to, in a column for each: to wait for one mbarrier says nothing about the copies of another.

What a thread wrote through the generic proxy (st, cp.async) is visible to the async proxy (wgmma, TMA) only after a
``fence.proxy.async``: ``fenced`` is the clock as it stood at the last fence, handed on by barriers like the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tests.virtual_gpu.memory import Fault

_COLUMNS = 16  # mbarriers told apart
_CLOCK, _PC = 32, 8  # a shadow word: epoch << 32 | instruction << 8 | agent


class Arrived(NamedTuple):
    """Clocks ``[2, warps, agents]`` (clock and fenced) as they were when these warps arrived at a barrier."""

    warps: np.ndarray
    clocks: np.ndarray


class RaceDetector:
    def __init__(self, ctas: int, warps: int, stride: int, granule: int, describe: Callable[[int], str]) -> None:
        self.ctas, self.warps, self.granule, self.describe = ctas, warps, granule, describe
        self.in_flight, self.never, self.first_copy = warps, warps + 1, warps + 2
        self.agents = warps + 2 + _COLUMNS
        self.clock = np.zeros((ctas * warps, self.agents), np.int64)  # [warp of the chunk, agent]
        self.own = (np.arange(ctas * warps), np.arange(ctas * warps) % warps)
        self.clock[self.own] = 1
        self.fenced = np.zeros_like(self.clock)
        self.copies = np.zeros((ctas, self.agents), np.int64)  # finished copies of the async proxy
        granules = ctas * stride // granule
        self.writes = np.full(granules, 1 << _CLOCK | self.never, np.int64)
        self.reads = np.zeros((granules, warps + 1), np.int64)  # by warp; the last column counts reads in flight

    def granules(self, offsets: np.ndarray, size: int) -> np.ndarray:
        """``[n, size / granule]`` of accesses of ``size`` bytes at these byte offsets."""
        first = offsets // self.granule
        if size <= self.granule:
            return first[:, None]
        return first[:, None] + np.arange(size // self.granule)

    def read(self, offsets: np.ndarray, size: int, warps: np.ndarray, pc: int) -> None:
        cells = self.granules(offsets, size)
        self._check_writes(cells, warps, "load", self.clock)
        self.reads[cells, (warps % self.warps)[:, None]] = (self.now(warps) << _CLOCK | pc)[:, None]

    def write(self, offsets: np.ndarray, size: int, warps: np.ndarray, pc: int, differs: np.ndarray) -> None:
        """``differs``: for which threads another one of this instruction stored something else to the same place.

        Two warps may store the same value: that is how Triton writes data of which both hold a copy.
        """
        cells = self.granules(offsets, size)
        self._check_writes(cells, warps, "store", self.clock, store=True)
        self._check_reads(cells, warps)
        mark = self.now(warps) << _CLOCK | pc << _PC | warps % self.warps
        self.writes[cells] = mark[:, None]
        if differs.any():
            lane = int(differs.argmax())
            place = self._place(int(warps[lane]), int(cells[lane, 0]))
            raise Fault("race", f"two threads store different values to one place: {place}", lane)

    def issue_copy(self, offsets: np.ndarray, size: int, warps: np.ndarray, pc: int, proxy: bool = False) -> None:
        """An asynchronous write begins; ``proxy``: it is of the async proxy (TMA)."""
        cells = self.granules(offsets, size)
        self._check_writes(cells, warps, "asynchronous copy", self.fenced if proxy else self.clock, store=True)
        self._check_reads(cells, warps)
        mark = np.full(len(cells), 1 << _CLOCK | pc << _PC | self.in_flight)
        self.writes[cells] = mark[:, None]

    def finish_copy(self, offsets: np.ndarray, size: int, warps: np.ndarray, pc: int) -> None:
        """What a warp's cp.async wrote is from now on what the warp wrote."""
        cells = self.granules(offsets, size)
        self.writes[cells] = (self.now(warps) << _CLOCK | pc << _PC | warps % self.warps)[:, None]

    def copies_column(self, mbarrier: int) -> int:
        """The agent that stands for copies reporting to the n-th mbarrier."""
        return self.first_copy + mbarrier % _COLUMNS

    def finish_tma(self, offsets: np.ndarray, size: int, ctas: np.ndarray, pc: int, column: int) -> np.ndarray:
        """Copies into ``offsets [ctas, n]`` are complete; their epochs: what a warp learns from the mbarrier."""
        self.copies[ctas, column] += 1
        epochs = self.copies[ctas, column]
        mark = epochs << _CLOCK | pc << _PC | column
        self.writes[self.granules(offsets.ravel(), size)] = np.repeat(mark, offsets.shape[1])[:, None]
        return epochs

    def issue_read(self, cells: np.ndarray, warps: np.ndarray, pc: int) -> None:
        """The async proxy begins to read granules ``[n, cells]`` for warps ``[n, k]``, distinct cells in each row."""
        count = cells.shape[1]
        for column in warps.T:
            self._check_writes(cells.reshape(-1, 1), np.repeat(column, count), "asynchronous read", self.fenced)
        np.add.at(self.reads[:, -1], cells.ravel(), 1 << _CLOCK)
        self.reads[cells, -1] = self.reads[cells, -1] >> _CLOCK << _CLOCK | pc

    def finish_read(self, cells: np.ndarray, warps: np.ndarray, pc: int) -> None:
        np.subtract.at(self.reads[:, -1], cells.ravel(), 1 << _CLOCK)
        for column in warps.T:
            self.reads[cells, (column % self.warps)[:, None]] = (self.now(column) << _CLOCK | pc)[:, None]

    # Synchronisation. ``warps`` are numbers within the chunk.

    def barrier(self, warps: np.ndarray, arrived: Sequence[Arrived] = ()) -> None:
        """These warps meet, in each CTA by itself: each learns what any of them knew, and what those did who only
        ``arrived`` before."""
        if not arrived and len(warps) == len(self.clock):
            for clock in (self.clock, self.fenced):
                every = clock.reshape(self.ctas, self.warps, self.agents)
                every[:] = every.max(axis=1, keepdims=True)
        else:
            for cta in np.unique(warps // self.warps):
                here = warps[warps // self.warps == cta]
                for n, clock in enumerate((self.clock, self.fenced)):
                    known = [clock[here], *(a.clocks[n][a.warps // self.warps == cta] for a in arrived)]
                    clock[here] = np.concatenate(known).max(axis=0)
        self.tick(warps)

    def arrive(self, warps: np.ndarray) -> Arrived:
        """What these warps know now, for :meth:`barrier`: of what they do from here on the others learn nothing."""
        arrived = Arrived(warps, np.stack([self.clock[warps], self.fenced[warps]]))
        self.tick(warps)
        return arrived

    def tick(self, warps: np.ndarray) -> None:
        self.clock[warps, warps % self.warps] += 1

    def fence_proxy(self, warps: np.ndarray) -> None:
        self.fenced[warps] = self.clock[warps]
        self.tick(warps)  # what follows is of an epoch that this fence does not cover

    def acquire(self, warp: int, clocks: np.ndarray) -> None:
        """``clocks [2, agents]``: clock and fenced of those who released."""
        np.maximum(self.clock[warp], clocks[0], out=self.clock[warp])
        np.maximum(self.fenced[warp], clocks[1], out=self.fenced[warp])
        # The async proxy sees its own copies without a fence.
        self.fenced[warp, self.first_copy :] = self.clock[warp, self.first_copy :]

    def now(self, warps: np.ndarray) -> np.ndarray:
        return self.clock[warps, warps % self.warps]

    # Checks.

    def _check_writes(
        self, cells: np.ndarray, warps: np.ndarray, what: str, clock: np.ndarray, store: bool = False
    ) -> None:
        last = self.writes[cells]
        agent = last & 0xFF
        late = (last >> _CLOCK) > clock[warps[:, None], agent]
        if store:
            late &= agent != self.never
        if late.any():
            lane, column = np.argwhere(late)[0]
            self._report_write(int(last[lane, column]), int(warps[lane]), int(cells[lane, column]), what, int(lane))

    def _report_write(self, last: int, warp: int, cell: int, what: str, lane: int) -> None:
        agent, epoch, pc = last & 0xFF, last >> _CLOCK, last >> _PC & 0xFFFFFF
        place = self._place(warp, cell)
        if agent == self.never:
            raise Fault("uninitialised", f"{what} of shared memory that nobody wrote: {place}", lane)
        if agent == self.in_flight:
            message = f"{what} races with an asynchronous copy that nobody has waited for: {place}"
        elif epoch <= self.clock[warp, agent]:
            message = f"{what} by the async proxy without fence.proxy.async after a store: {place}"
            raise Fault("missing fence", f"{message}\nthe store:\n  {self.describe(pc)}", lane)
        else:
            message = f"{what} races with a store of {self._agent(agent)}, no barrier in between: {place}"
        raise Fault("race", f"{message}\nthe other access:\n  {self.describe(pc)}", lane)

    def _check_reads(self, cells: np.ndarray, warps: np.ndarray) -> None:
        last = self.reads[cells]  # [n, cells, warps + 1]
        limit = (self.clock[:, : self.warps + 1] + 1 << _CLOCK)[warps]  # epochs from here on are not covered
        late = last >= limit[:, None]
        if late.any():
            lane, column, agent = np.argwhere(late)[0]
            other = self._agent(int(agent))
            reader = (
                f"a load of {other}, no barrier in between" if agent < self.warps else "a wgmma or bulk copy's read"
            )
            message = f"store races with {reader}: {self._place(int(warps[lane]), int(cells[lane, column]))}"
            pc = int(last[lane, column, agent]) & 0xFFFFFF
            raise Fault("race", f"{message}\nthe other access:\n  {self.describe(pc)}", int(lane))

    def _agent(self, agent: int) -> str:
        return f"warp {agent}" if agent < self.warps else "the async proxy"

    def _place(self, warp: int, cell: int) -> str:
        from tests.virtual_gpu.parse import SHARED_BASE

        per_cta = len(self.writes) // self.ctas
        first = cell % per_cta * self.granule - SHARED_BASE
        return f"bytes {first}..{first + self.granule - 1} of shared memory, warp {warp % self.warps}"
