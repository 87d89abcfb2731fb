"""Global and shared memory: flat byte arrays behind the checks that hardware does not make.

Global addresses are ``GLOBAL_BASE`` + offset into one buffer, every tensor between two guard zones. Shared memory is
one row per CTA of the chunk. Both are read and written by vectors of addresses; a check looks at all of them at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.virtual_gpu.parse import SHARED_BASE

GLOBAL_BASE = 0x7000_0000_0000
SHARED_WINDOW = 0x6000_0000_0000  # where shared memory lies in the generic address space
LOCAL_WINDOW = 0x4000_0000_0000  # and where that of a thread lies
_GUARD = 4096
_ALIGN = 512  # as PyTorch's allocator aligns
POISON = 0xFF  # a NaN in every float type

# NumPy copies 16-byte items fastest as complex numbers; their bits are never looked at.
WORDS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


class Fault(Exception):
    """The kernel did something wrong. ``kind`` is one word for tests, the message is the report."""

    def __init__(self, kind: str, message: str, thread: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.thread = thread  # within the chunk


@dataclass(frozen=True)
class Allocation:
    """One tensor: ``role`` is input (read only), output (written exactly once) or scratch (anything)."""

    name: str
    role: str
    start: int
    size: int
    itemsize: int


def _views(data: np.ndarray) -> dict[int, np.ndarray]:
    return {size: data.view(word) for size, word in WORDS.items()}


def addresses_of(contents: Iterable[bytes]) -> Iterator[int]:
    """Where a :class:`GlobalMemory` puts these if they are allocated first, in this order."""
    memory = GlobalMemory()
    for data in contents:
        yield memory.allocate("", "input", np.frombuffer(data, np.uint8), 1)


class GlobalMemory:
    """The tensors of a launch; allocate all of them, then :meth:`seal`."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self._contents: list[np.ndarray] = []
        self._end = _GUARD

    def allocate(self, name: str, role: str, contents: np.ndarray, itemsize: int, skew: int = 0) -> int:
        """Address of a new allocation with these bytes (uint8), ``skew`` behind a well aligned address."""
        start = -(-self._end // _ALIGN) * _ALIGN + skew
        self.allocations.append(Allocation(name, role, start, contents.size, itemsize))
        self._contents.append(contents)
        self._end = start + contents.size + _GUARD
        return GLOBAL_BASE + start

    def seal(self) -> None:
        size = -(-self._end // 16) * 16
        data = np.full(size, POISON, np.uint8)
        known = np.zeros(size, np.uint8)  # 1 where a byte may be read
        for a, contents in zip(self.allocations, self._contents, strict=True):
            if a.role != "output":
                data[a.start : a.start + a.size] = contents
                known[a.start : a.start + a.size] = 1
        self._contents.clear()
        self.data, self.view, self.known = data, _views(data), _views(known)
        self._owner = np.zeros(size // 2 + 1, np.int32)  # which lane wrote here last; for stores of one instruction
        self._starts = [a.start for a in self.allocations]

    def contents(self, index: int) -> np.ndarray:
        a = self.allocations[index]
        return self.data[a.start : a.start + a.size]

    def _locate(self, offsets: np.ndarray, size: int, what: str) -> Allocation | None:
        """The one allocation that all accesses hit, None if they hit several; raises where one hits none."""
        if int(np.bitwise_or.reduce(offsets)) & (size - 1):
            bad = int(np.flatnonzero(offsets & (size - 1))[0])
            address = GLOBAL_BASE + int(offsets[bad])
            raise Fault("misaligned", f"{what} of {size} bytes at {address:#x}: not a multiple of {size}", bad)
        low, high = int(offsets.min()), int(offsets.max())
        index = bisect_right(self._starts, low) - 1
        if index >= 0:
            a = self.allocations[index]
            if high + size <= a.start + a.size:
                return a
        where = np.searchsorted(self._starts, offsets, "right") - 1
        ends = np.array([a.start + a.size for a in self.allocations] + [-1])
        bad_lanes = np.flatnonzero(offsets + size > ends[where])
        if bad_lanes.size:
            bad = int(bad_lanes[0])
            raise Fault("out of bounds", self._describe(int(offsets[bad]), size, what), bad)
        return None

    def _describe(self, offset: int, size: int, what: str) -> str:
        nearest = min(self.allocations, key=lambda a: max(a.start - offset, offset - a.start - a.size))
        distance = offset - nearest.start
        return (
            f"{what} of {size} bytes at {GLOBAL_BASE + offset:#x} lies in no tensor; the nearest is {nearest.name} "
            f"({nearest.size} bytes), byte {distance} of it"
        )

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """The words at these addresses, of the type ``WORDS[size]``."""
        offsets = addresses.view(np.int64) - GLOBAL_BASE
        found = self._locate(offsets, size, "load")
        index = offsets // size
        if found is None or found.role == "output":
            known = self.known[size][index].view(np.uint8)
            if not known.all():
                bad = int(np.flatnonzero(known == 0)[0]) // size
                address = GLOBAL_BASE + int(offsets[bad])
                message = (
                    f"load of {size} bytes at {address:#x}: byte {self._name(int(offsets[bad]))} was never written"
                )
                raise Fault("uninitialised", message, bad)
        return self.view[size][index]

    def store(self, addresses: np.ndarray, values: np.ndarray, size: int) -> None:
        offsets = addresses.view(np.int64) - GLOBAL_BASE
        found = self._locate(offsets, size, "store")
        index = offsets // size
        where = np.zeros(0, np.int64) if found else np.searchsorted(self._starts, offsets, "right") - 1
        roles = {found.role} if found else {self.allocations[i].role for i in np.unique(where)}
        if "input" in roles:
            bad = next(i for i, o in enumerate(offsets) if self._at(int(o)).role == "input")
            message = (
                f"store to byte {self._name(int(offsets[bad]))}, which is an input (name it in outputs or scratch)"
            )
            raise Fault("read only", message, bad)
        if "output" in roles:
            self._once(offsets, index, size, scratch="scratch" in roles)
        self.view[size][index] = values

    def _once(self, offsets: np.ndarray, index: np.ndarray, size: int, scratch: bool) -> None:
        if scratch:  # only those that go to outputs
            where = np.searchsorted(self._starts, offsets, "right") - 1
            keep = np.array([a.role == "output" for a in self.allocations])[where]
            offsets, index = offsets[keep], index[keep]
        known = self.known[size][index].view(np.uint8)
        if known.any():
            bad = int(np.flatnonzero(known)[0]) // size
            raise Fault("written twice", f"second store to byte {self._name(int(offsets[bad]))}", bad)
        lane = np.arange(len(offsets), dtype=np.int32)
        self._owner[offsets >> 1] = lane
        other = self._owner[offsets >> 1]
        if size > 1 and (other != lane).any():
            bad = int(np.flatnonzero(other != lane)[0])
            message = f"two threads of one instruction store to byte {self._name(int(offsets[bad]))}"
            raise Fault("written twice", message, bad)
        self.known[size][index] = np.full(size, 1, np.uint8).view(WORDS[size])[0]

    def atomic(self, addresses: np.ndarray, values: np.ndarray, update: Callable[[Any, Any], Any]) -> np.ndarray:
        """The old values; lane after lane, so that each sees those before it."""
        size = values.dtype.itemsize
        offsets = addresses.view(np.int64) - GLOBAL_BASE
        for a in {self._at(int(o)) for o in offsets}:
            if a.role != "scratch":
                raise Fault("read only", f"atomic on {a.name}, which is an {a.role} (name it in scratch)")
        self._locate(offsets, size, "atomic")
        return one_by_one(self.view[size].view(values.dtype), offsets // size, values, update)

    def _at(self, offset: int) -> Allocation:
        return self.allocations[bisect_right(self._starts, offset) - 1]

    def _name(self, offset: int) -> str:
        a = self._at(offset)
        return f"{offset - a.start} of {a.name} (element {(offset - a.start) // a.itemsize})"

    def check_complete(self) -> None:
        """Raises where an output has a byte that nobody wrote."""
        for a in self.allocations:
            missing = np.flatnonzero(self.known[1][a.start : a.start + a.size] == 0)
            if missing.size:
                elements = np.unique(missing // a.itemsize)
                message = f"{elements.size} elements of {a.name} were never written, the first is element {elements[0]}"
                raise Fault("never written", message)


def one_by_one(
    cells: np.ndarray, index: np.ndarray, values: np.ndarray, update: Callable[[Any, Any], Any]
) -> np.ndarray:
    """``cells[i] = update(cells[i], value)`` in turn; what was there before each."""
    before = np.empty_like(values)
    for lane, i in enumerate(index):
        before[lane] = cells[i]
        cells[i] = update(cells[i], values[lane])
    return before


class LocalMemory:
    """What each thread has for itself: arrays that the compiler could not keep in registers."""

    def __init__(self, threads: int, size: int) -> None:
        self.size, self.stride = size, -(-size // 16) * 16
        self.view = _views(np.full(threads * self.stride, POISON, np.uint8))
        self.known = _views(np.zeros(threads * self.stride, np.uint8))

    def _index(self, threads: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        offsets = addresses.astype(np.int64)
        bad = np.flatnonzero((offsets % size != 0) | (offsets < 0) | (offsets + size > self.size))
        if bad.size:
            kind = "misaligned" if offsets[bad[0]] % size else "out of bounds"
            message = f"{size} bytes at byte {offsets[bad[0]]} of local memory; the thread has {self.size}"
            raise Fault(kind, message, int(bad[0]))
        return (threads * self.stride + offsets) // size

    def load(self, threads: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        index = self._index(threads, addresses, size)
        missing = np.flatnonzero((self.known[size][index].view(np.uint8) == 0).reshape(-1, size).any(axis=1))
        if missing.size:
            message = f"load of local memory that nobody wrote: byte {int(addresses[missing[0]])}"
            raise Fault("uninitialised", message, int(missing[0]))
        return self.view[size][index]

    def store(self, threads: np.ndarray, addresses: np.ndarray, values: np.ndarray, size: int) -> None:
        index = self._index(threads, addresses, size)
        self.view[size][index] = values
        self.known[size][index] = np.full(size, 1, np.uint8).view(WORDS[size])[0]


class SharedMemory:
    """``ctas`` rows of shared memory; addresses are those within a CTA, rows are given by ``base`` (see flat)."""

    def __init__(self, ctas: int, size: int) -> None:
        self.end = SHARED_BASE + size
        self.stride = -(-self.end // 1024) * 1024
        self.data = np.full(ctas * self.stride, POISON, np.uint8)
        self.view = _views(self.data)

    def store(self, offsets: np.ndarray, values: np.ndarray, size: int, warps: np.ndarray, race: Any, pc: int) -> None:
        view = self.view[size]
        view[offsets // size] = values
        differs = (view[offsets // size].view(np.uint8) != values.view(np.uint8)).reshape(-1, size).any(axis=1)
        race.write(offsets, size, warps, pc, differs)

    def poison(self, offsets: np.ndarray, size: int) -> None:
        self.view[size][offsets // size] = np.full(size, POISON, np.uint8).view(WORDS[size])[0]

    def flat(self, base: np.ndarray, addresses: np.ndarray, size: int, align: int = 0) -> np.ndarray:
        """Byte offsets into ``data``; ``base`` is ``cta * stride`` of each access.

        Raises:
            Fault: where an access leaves the CTA's shared memory, or is not aligned to ``align`` (default: its size).
        """
        align = align or size
        offsets = addresses.astype(np.int64)
        if int(np.bitwise_or.reduce(offsets, axis=None)) & (align - 1):
            bad = int(np.flatnonzero(offsets & (align - 1))[0])
            raise Fault("misaligned", f"{size} bytes of shared memory at {int(offsets[bad]):#x}", bad)
        if int(offsets.min()) < SHARED_BASE or int(offsets.max()) + size > self.end:
            bad = int(np.flatnonzero((offsets < SHARED_BASE) | (offsets + size > self.end))[0])
            at, end = int(offsets.flat[bad]) - SHARED_BASE, self.end - SHARED_BASE
            message = f"{size} bytes at byte {at} of shared memory; the CTA has {end}"
            raise Fault("out of bounds", message, bad)
        return base + offsets
