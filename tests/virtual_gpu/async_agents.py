"""What goes on beside the threads: asynchronous copies and matrix products, in groups that a thread waits for.

An agent *moves* its data at some moment between its issue and the wait, and is *finished* by the wait. The schedule
says when it moves: ``latest`` in the wait itself, ``earliest`` at once, ``random`` in between. Until it has moved, its
destination is poisoned with NaN, and until it is finished the race detector lets nobody touch what it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tests.virtual_gpu.memory import WORDS, Fault

SCHEDULES = ("latest", "earliest", "random")


class Agent:
    """Something in flight for some threads.

    Attributes:
        lanes: the threads that issued it, None for all.
        group: the group it belongs to, a number or one for each of ``lanes``.
    """

    lanes: np.ndarray | None
    group: Any
    moved = False

    def move(self) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        raise NotImplementedError

    def part(self, chosen: np.ndarray) -> Agent:
        """The same agent for some of its threads: ``chosen`` is a mask over ``lanes``."""
        raise NotImplementedError


class Queue:
    """Agents of one kind in order of issue, and how many groups each thread has committed."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.agents: list[Any] = []
        self.committed: Any = 0  # one number while all threads agree, else one for each

    def issue(self, agent: Agent) -> None:
        lanes = agent.lanes
        agent.group = self.committed if isinstance(self.committed, int) or lanes is None else self.committed[lanes]
        self.agents.append(agent)

    def commit(self) -> None:
        mask = self.machine.mask
        if mask is not None and isinstance(self.committed, int):
            self.committed = np.full(self.machine.threads, self.committed)
        self.committed = self.committed + (1 if mask is None else mask)

    def wait(self, allowed: int, finish: Callable[[list[Any]], None]) -> None:
        """Finishes all but the last ``allowed`` groups of the executing threads; -1: also what is not committed."""
        mask, limit = self.machine.mask, self.committed - allowed
        done, left = [], []
        for agent in self.agents:
            over = agent.group < (limit if isinstance(limit, int) or agent.lanes is None else limit[agent.lanes])
            if mask is not None:
                over = over & (mask if agent.lanes is None else mask[agent.lanes])
            if np.all(over):
                done.append(agent)
            elif not np.any(over):
                left.append(agent)
            else:
                done.append(agent.part(over))
                left.append(agent.part(~over))
        self.agents = left
        finish(done)


class Copy(Agent):
    """One ``cp.async`` of many threads: words on their way to shared memory."""

    def __init__(self, machine: Any, lanes: np.ndarray | None, offsets: np.ndarray, words: np.ndarray, pc: int) -> None:
        self.machine, self.lanes, self.offsets, self.words, self.pc = machine, lanes, offsets, words, pc
        self.warps = machine.warp_of if lanes is None else machine.warp_of[lanes]
        self.size = words.dtype.itemsize

    def move(self) -> None:
        self.machine.shared.view[self.size][self.offsets // self.size] = self.words
        self.moved = True

    def part(self, chosen: np.ndarray) -> Copy:
        lanes = np.flatnonzero(chosen) if self.lanes is None else self.lanes[chosen]
        part = Copy(self.machine, lanes, self.offsets[chosen], self.words[chosen], self.pc)
        part.moved, part.group = self.moved, self.group if isinstance(self.group, int) else self.group[chosen]
        return part


def finish_copies(agents: Iterable[Copy]) -> None:
    """Many at once: they are short and numerous."""
    by_size: dict[int, list[Copy]] = {}
    for agent in agents:
        by_size.setdefault(agent.size, []).append(agent)
    for size, copies in by_size.items():
        machine = copies[0].machine
        offsets = np.concatenate([c.offsets for c in copies])
        words = np.concatenate([c.words for c in copies if not c.moved] or [np.empty(0, WORDS[size])])
        if len(words) == len(offsets):
            machine.shared.view[size][offsets // size] = words
        else:
            for copy in copies:
                if not copy.moved:
                    copy.move()
        pcs = np.repeat([c.pc for c in copies], [len(c.offsets) for c in copies])
        machine.race.finish_copy(offsets, size, np.concatenate([c.warps for c in copies]), pcs)


class Agents:
    """All that is in flight in a chunk of CTAs."""

    def __init__(self, machine: Any, schedule: str, random: np.random.Generator) -> None:
        self.machine, self.schedule, self.random = machine, schedule, random
        self.copies, self.products, self.stores = Queue(machine), Queue(machine), Queue(machine)
        self.bulk: list[Any] = []  # copies that an mbarrier counts

    def issue_copy(self, agent: Copy) -> None:
        if self.schedule == "earliest":
            agent.move()
        else:
            self.machine.shared.poison(agent.offsets, agent.size)
        self.copies.issue(agent)

    def issue_store(self, agent: Agent) -> None:
        if self.schedule == "earliest":
            agent.move()
        self.stores.issue(agent)

    def roll(self) -> None:
        """With a random schedule, now and then something happens; in each queue things happen in order."""
        for queue in (self.copies, self.products, self.stores):
            waiting = [agent for agent in queue.agents if not agent.moved]
            for agent in waiting[: self.random.integers(0, 3)]:
                agent.move()
        while self.bulk and self.random.random() < 0.3:
            self.bulk.pop(self.random.integers(len(self.bulk))).finish()

    def act(self) -> bool:
        """Everybody waits: the oldest copy that an mbarrier counts takes place. False where there is none."""
        if self.bulk:
            self.bulk.pop(0).finish()
            return True
        return False

    def drain(self) -> None:
        """The kernel is over: what an mbarrier counts happens all the same, but who reads must have been waited for."""
        while self.act():
            pass
        if self.stores.agents:
            raise Fault("race", "the CTA ends while a bulk copy may still read its shared memory: no wait_group")
