"""Happens-before between CTAs in the scratch tensors of a launch: split-K, last-arriver epilogues, flags.

A CTA is one agent here (race.py knows its warps, for shared memory). What it wrote before a fence is published by its
next atomic, and who meets that atomic on the same address knows it after a fence of its own: the release and acquire
patterns of the PTX memory model (ISA 8.8). ``.release``, ``.acquire`` and ``.acq_rel`` on the atomic do for a fence.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.virtual_gpu.memory import GLOBAL_BASE, Allocation, Fault

_WORD = 4  # bytes watched as one
_EPOCH, _PC = 40, 20  # a shadow word: epoch << 40 | instruction << 20 | CTA + 1


class GlobalRaces:
    def __init__(self, ctas: int, scratch: list[Allocation], describe: Callable[[int], str]) -> None:
        self.scratch, self.describe = scratch, describe
        self.epoch = np.ones(ctas, np.int64)
        # [CTA, CTA]: what each knows, what its last fence published, what it has met and not yet fenced.
        self.known, self.published, self.met = (np.zeros((ctas, ctas), np.int32) for _ in range(3))
        self.locations: dict[int, np.ndarray] = {}
        self.shadows = {a.start: np.zeros((2, a.size // _WORD + 1), np.int64) for a in scratch}  # last write, last read

    def fence(self, ctas: np.ndarray) -> None:
        for cta in ctas:
            np.maximum(self.known[cta], self.met[cta], out=self.known[cta])
            self.published[cta] = self.known[cta]
            self.published[cta, cta] = self.epoch[cta]
            self.epoch[cta] += 1

    def atomic(self, addresses: np.ndarray, ctas: np.ndarray, fences: bool) -> None:
        """In the order in which they take place; ``fences``: the instruction has its own order."""
        for address, cta in zip(addresses.tolist(), ctas.tolist(), strict=True):
            if fences:
                self.fence(np.array([cta]))
            place = self.locations.setdefault(address, np.zeros(len(self.epoch), np.int32))
            np.maximum(self.met[cta], place, out=self.met[cta])
            np.maximum(place, self.published[cta], out=place)
            if fences:
                np.maximum(self.known[cta], self.met[cta], out=self.known[cta])

    def access(self, addresses: np.ndarray, size: int, ctas: np.ndarray, pc: int, store: bool) -> None:
        """A plain access; raises where one of another CTA is not ordered before it."""
        offsets = addresses.view(np.int64) - GLOBAL_BASE
        for a in self.scratch:
            inside = (offsets >= a.start) & (offsets < a.start + a.size)
            if inside.any():
                first = (offsets[inside] - a.start) // _WORD
                words = first[:, None] + np.arange(max(1, size // _WORD))
                self._check(a, words, ctas[inside], np.flatnonzero(inside), pc, store)

    def _check(
        self, a: Allocation, words: np.ndarray, ctas: np.ndarray, lanes: np.ndarray, pc: int, store: bool
    ) -> None:
        shadow = self.shadows[a.start]
        for kind, last in enumerate(shadow[: 1 + store, words]):
            other = (last & (1 << _PC) - 1) - 1
            late = (other >= 0) & (other != ctas[:, None]) & ((last >> _EPOCH) > self.known[ctas[:, None], other])
            if late.any():
                lane, column = np.argwhere(late)[0]
                what = f"{'store' if store else 'load'} of byte {int(words[lane, column]) * _WORD} of {a.name} by CTA"
                then = f"a {('store', 'load')[kind]} of CTA {int(other[lane, column])}, no fence and atomic in between"
                text = self.describe(int(last[lane, column]) >> _PC & (1 << _PC) - 1)
                message = f"{what} {int(ctas[lane])} races with {then}\nthe other access:\n  {text}"
                raise Fault("race", message, int(lanes[lane]))
        shadow[int(not store)][words] = (self.epoch[ctas] << _EPOCH | pc << _PC | ctas + 1)[:, None]
