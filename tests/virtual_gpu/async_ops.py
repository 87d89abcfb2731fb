"""Builders of the asynchronous instructions: cp.async, mbarrier, bulk and tensor copies, wgmma, and their fences."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.virtual_gpu.async_agents import Copy, finish_copies
from tests.virtual_gpu.compile import Code, Step, op, pick
from tests.virtual_gpu.memory import WORDS
from tests.virtual_gpu.parse import Immediate, Instruction, PtxError

_U32 = np.dtype("u4")


@op("cp.async.ca.shared", "cp.async.cg.shared", "cp.async.ca.shared::cta", "cp.async.cg.shared::cta")
def _copy(code: Code, i: Instruction) -> Step:
    # A predicate (ignore-src) or a cache policy may stand where the size of the source does.
    other = "L2::cache_hint" in i.parts or (len(i.operands) > 3 and getattr(i.operands[3], "type", "") == "pred")
    if other or "global" not in i.parts or not isinstance(i.operands[2], Immediate):
        raise PtxError(f"{i.op} is not supported")
    size = i.operands[2].value
    if size not in ((16,) if "cg" in i.parts else (4, 8, 16)):
        raise PtxError(f"cp.async of {size} bytes")
    target, source = code.address(i, i.operands[0]), code.address(i, i.operands[1])
    given = code.sources(i)(3, _U32) if len(i.operands) > 3 else None
    code.touches_shared(size)

    def run(m: Any) -> None:
        lanes = m.lanes()
        addresses, into = pick(source(m), lanes), pick(target(m), lanes)
        offsets = m.shared.flat(pick(m.base, lanes), into, size)
        words = np.zeros(len(offsets), WORDS[size])
        count = None if given is None else pick(np.broadcast_to(given(m.R), m.threads), lanes)
        if count is None or (count == size).all():
            words = m.memory.load(addresses, size)
            from_global = lanes
        else:
            full = count == size
            _partial(m, words, addresses, count, size)
            if full.any():
                m.lanes_now = np.flatnonzero(full) if lanes is None else lanes[full]
                words[full] = m.memory.load(addresses[full], size)
                m.lanes_now = lanes
            from_global, addresses = (np.flatnonzero(full) if lanes is None else lanes[full]), addresses[full]
        m.race.issue_copy(offsets, size, pick(m.warp_of, lanes), m.pc)
        m.agents.issue_copy(Copy(m, lanes, offsets, words, m.pc))
        if m.observer is not None:
            m.observe(i, "shared", "async", lanes, into, size)
            if len(addresses):
                m.observe(i, "global", "async", from_global, addresses, size)

    return run


def _partial(m: Any, words: np.ndarray, addresses: np.ndarray, count: np.ndarray, size: int) -> None:
    """Lanes that read less than the whole and more than nothing: the rest is zero."""
    raw = words.view(np.uint8).reshape(-1, size)
    for lane in np.flatnonzero((count > 0) & (count < size)):
        source = addresses[lane] + np.arange(count[lane], dtype=np.uint64)
        raw[lane, : count[lane]] = m.memory.load(source, 1)


@op("cp.async.commit_group")
def _commit(code: Code, i: Instruction) -> Step:
    return lambda m: m.agents.copies.commit()


@op("cp.async.wait_group", "cp.async.wait_all")
def _wait(code: Code, i: Instruction) -> Step:
    allowed = -1 if i.parts[2] == "wait_all" else i.operands[0].value
    return lambda m: m.agents.copies.wait(allowed, finish_copies)
