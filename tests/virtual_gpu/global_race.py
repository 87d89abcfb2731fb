"""Happens-before between CTAs in the scratch tensors of a launch: split-K, last-arriver epilogues, flags.

The agents are the warps of the whole grid. What a warp wrote before a fence is published by its next atomic, and who
meets that atomic on the same address knows it after a fence of its own: the release and acquire patterns of the PTX
memory model (ISA 8.8). ``.release``, ``.acquire`` and ``.acq_rel`` on the atomic do for a fence. A barrier tells the
warps of a CTA what the others know and have fenced (so all may fence, meet, and one of them publish, as in many CUDA
programs); accesses of one CTA are taken as ordered among themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.virtual_gpu.memory import GLOBAL_BASE, Allocation, Fault

_WORD = 4  # bytes watched as one
_EPOCH, _PC = 40, 20  # a shadow word: epoch << 40 | instruction << 20 | warp + 1


class GlobalRaces:
    def __init__(self, ctas: int, warps: int, scratch: list[Allocation], describe: Callable[[int], str]) -> None:
        self.scratch, self.describe, self.warps = scratch, describe, warps
        agents = ctas * warps
        self.epoch = np.ones(agents, np.int64)
        # [warp, warp]: what each knows, what its last fence published, what it has met and not yet fenced.
        self.known, self.published, self.met = (np.zeros((agents, agents), np.int32) for _ in range(3))
        self.busy = np.zeros(ctas, bool)  # those whose warps may know different things
        self.locations: dict[int, np.ndarray] = {}
        self.shadows = {a.start: np.zeros((2, a.size // _WORD + 1), np.int64) for a in scratch}  # last write, last read

    def barrier(self, warps: np.ndarray) -> None:
        """These warps, of one CTA or of several, have met those of their CTA."""
        for cta in np.unique(warps // self.warps):
            if self.busy[cta]:
                here = warps[warps // self.warps == cta]
                together = self.known[here].max(axis=0)
                together[here] = self.epoch[here]
                self.known[here] = together
                self.published[here] = self.published[here].max(axis=0)
                self.met[here] = self.met[here].max(axis=0)
                self.epoch[here] += 1
                self.busy[cta] = len(here) < self.warps

    def fence(self, warps: np.ndarray) -> None:
        self.busy[warps // self.warps] = True
        for warp in warps:
            np.maximum(self.known[warp], self.met[warp], out=self.known[warp])
            self.published[warp] = self.known[warp]
            self.published[warp, warp] = self.epoch[warp]
            self.epoch[warp] += 1

    def atomic(self, addresses: np.ndarray, warps: np.ndarray, fences: bool) -> None:
        """In the order in which they take place; ``fences``: the instruction has its own order."""
        self.busy[warps // self.warps] = True
        for address, warp in zip(addresses.tolist(), warps.tolist(), strict=True):
            if fences:
                self.fence(np.array([warp]))
            place = self.locations.setdefault(address, np.zeros(len(self.epoch), np.int32))
            np.maximum(self.met[warp], place, out=self.met[warp])
            np.maximum(place, self.published[warp], out=place)
            if fences:
                np.maximum(self.known[warp], self.met[warp], out=self.known[warp])

    def access(self, addresses: np.ndarray, size: int, warps: np.ndarray, pc: int, store: bool) -> None:
        """A plain access; raises where one of another CTA is not ordered before it."""
        offsets = addresses.view(np.int64) - GLOBAL_BASE
        for a in self.scratch:
            inside = (offsets >= a.start) & (offsets < a.start + a.size)
            if inside.any():
                first = (offsets[inside] - a.start) // _WORD
                words = first[:, None] + np.arange(max(1, size // _WORD))
                self._check(a, words, warps[inside], np.flatnonzero(inside), pc, store)

    def _check(
        self, a: Allocation, words: np.ndarray, warps: np.ndarray, lanes: np.ndarray, pc: int, store: bool
    ) -> None:
        shadow, ctas = self.shadows[a.start], warps // self.warps
        self.busy[ctas] = True
        for kind, last in enumerate(shadow[: 1 + store, words]):
            other = (last & (1 << _PC) - 1) - 1
            apart = (other >= 0) & (other // self.warps != ctas[:, None])
            late = apart & ((last >> _EPOCH) > self.known[warps[:, None], other])
            if late.any():
                lane, column = np.argwhere(late)[0]
                what = f"{'store' if store else 'load'} of byte {int(words[lane, column]) * _WORD} of {a.name} by CTA"
                cta = int(other[lane, column]) // self.warps
                then = f"a {('store', 'load')[kind]} of CTA {cta}, no fence and atomic in between"
                text = self.describe(int(last[lane, column]) >> _PC & (1 << _PC) - 1)
                message = f"{what} {int(ctas[lane])} races with {then}\nthe other access:\n  {text}"
                raise Fault("race", message, int(lanes[lane]))
        shadow[int(not store)][words] = (self.epoch[warps] << _EPOCH | pc << _PC | warps + 1)[:, None]
