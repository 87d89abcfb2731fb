"""Warpgroup matrix products: asynchronous agents that read shared memory and keep their accumulators in registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.virtual_gpu import tensor
from tests.virtual_gpu.async_agents import Agent
from tests.virtual_gpu.compile import Code, Step, op
from tests.virtual_gpu.memory import Fault
from tests.virtual_gpu.parse import Instruction, PtxError, Vector
from tests.virtual_gpu.warp_ops import fragments, slots

_U64 = np.dtype("u8")


@dataclass(frozen=True)
class Form:
    """What one instruction says; ``a`` is a descriptor's register or four registers of A itself."""

    accumulators: tuple[int, ...]
    a: Any
    b: int
    n: int
    kinds: tuple[str, str, str]  # D, A, B
    signs: tuple[int, int]
    transposed: tuple[bool, bool]


class Accumulators:
    """The true values of registers that a wgmma in flight will change; who reads the register itself gets NaN."""

    def __init__(self, machine: Any, registers: tuple[int, ...]) -> None:
        self.values = [machine.R[slot] for slot in registers]
        self.pending = np.zeros(machine.threads // 128, int)  # products in flight of each warpgroup


class Product(Agent):
    """One ``wgmma.mma_async`` of some warpgroups of the chunk."""

    def __init__(self, machine: Any, form: Form, groups: np.ndarray, adds: np.ndarray, pc: int) -> None:
        self.machine, self.form, self.groups, self.adds, self.pc = machine, form, groups, adds, pc
        every = len(groups) * 128 == machine.threads
        self.lanes = None if every else (groups[:, None] * 128 + np.arange(128)).ravel()
        self.warps = groups[:, None] * 4 + np.arange(4)
        # With registers as A the values are read when the product takes place: they must not change before.
        self.b = self._descriptors(form.b)
        self.a = None if isinstance(form.a, tuple) else self._descriptors(form.a)
        self.cells = self._cells()

    def _descriptors(self, slot: int) -> np.ndarray:
        values = self.machine.R[slot].reshape(-1, 128)[self.groups]
        if (values != values[:, :1]).any():
            thread = int(self.groups[(values != values[:, :1]).any(axis=1).argmax()]) * 128
            raise Fault("descriptor", "the threads of a warpgroup give different ones", thread)
        return values[:, 0]

    def _offsets(self, descriptors: np.ndarray, mn: int, transposed: bool) -> np.ndarray:
        """Byte offsets of the 16-byte units of an operand, ``[groups, r, u]``."""
        m, same = self.machine, (descriptors == descriptors[0]).all()
        each = descriptors[:1] if same else descriptors
        addresses = np.stack([tensor.operand_addresses(int(d), mn, transposed) for d in each])
        base = m.base[self.groups * 128]
        whole = np.broadcast_to(addresses, (len(base), *addresses.shape[1:]))
        flat = np.repeat(base, addresses[0].size)
        m.lanes_now = np.repeat(self.groups * 128, addresses[0].size)
        return m.shared.flat(flat, whole.reshape(-1), 16).reshape(whole.shape)

    def _matrix(self, descriptors: np.ndarray, mn: int, transposed: bool, kind: str) -> np.ndarray:
        offsets = self._offsets(descriptors, mn, transposed)
        words = self.machine.shared.view[16][offsets >> 4].view(np.uint32)
        return tensor.operand(words.reshape(*offsets.shape, 4), kind, transposed)

    def _cells(self) -> list[np.ndarray]:
        """The granules that are read, ``[groups, n]`` for each operand in shared memory."""
        operands = [] if self.a is None else [(self.a, 64, self.form.transposed[0])]
        operands.append((self.b, self.form.n, self.form.transposed[1]))
        offsets = [self._offsets(*operand).ravel() for operand in operands]
        return [self.machine.race.granules(o, 16).reshape(len(self.groups), -1) for o in offsets]

    def issue(self) -> None:
        m, form = self.machine, self.form
        for cells in self.cells:
            m.lanes_now = np.repeat(self.groups * 128, cells.shape[1])
            m.race.issue_read(cells, self.warps, self.pc)
        held = m.accumulators.get(form.accumulators)
        if held is None:
            held = m.accumulators[form.accumulators] = Accumulators(m, form.accumulators)
        fresh = held.pending[self.groups] == 0
        if fresh.all() and self.lanes is None:
            held.values = [m.R[slot] for slot in form.accumulators]
        elif fresh.any():
            new = np.zeros(m.threads, bool)
            new[(self.groups[fresh][:, None] * 128 + np.arange(128)).ravel()] = True
            held.values = [np.where(new, m.R[s], v) for s, v in zip(form.accumulators, held.values, strict=True)]
        held.pending[self.groups] += 1
        if m.schedule == "earliest":
            self.move()
        else:
            for slot in form.accumulators:
                m.write_wgmma(slot, m.poison32, self.lanes)

    def move(self) -> None:
        m, form, held = self.machine, self.form, self.machine.accumulators[self.form.accumulators]
        count = len(self.groups)
        if self.a is None:
            a = tensor.mma_a(fragments(m, form.a, self.warps.ravel()), form.kinds[1]).reshape(count, 64, -1)
        else:
            a = self._matrix(self.a, 64, form.transposed[0], form.kinds[1])
        b = self._matrix(self.b, form.n, form.transposed[1], form.kinds[2])
        product = np.matmul(a, b.transpose(0, 2, 1))
        if form.signs[0] * form.signs[1] < 0:
            product = -product
        if form.kinds[0] == "s32":
            product = product.astype(np.int32)
        words = tensor.mma_d(product.reshape(count * 4, 16, -1), form.kinds[0])
        words = np.ascontiguousarray(words.transpose(2, 0, 1)).reshape(len(form.accumulators), -1)
        dtype = np.dtype("f4" if form.kinds[0] == "f32" else "i4")
        adds, all_add = np.repeat(self.adds, 128), bool(self.adds.all())
        for n, old in enumerate(held.values):
            value = words[n].view(dtype)
            total = (old if self.lanes is None else old[self.lanes]).view(dtype) + value
            value = (total if all_add else np.where(adds, total, value)).view(np.uint32)
            if self.lanes is not None:
                whole = old.copy()
                whole[self.lanes] = value
                value = whole
            held.values[n] = value
            if m.schedule == "earliest":
                m.write_wgmma(form.accumulators[n], value, self.lanes)
        self.moved = True

    def finish(self) -> None:
        m, form = self.machine, self.form
        if not self.moved:
            self.move()
        for cells in self.cells:
            m.race.finish_read(cells, self.warps, self.pc)
        held = m.accumulators[form.accumulators]
        held.pending[self.groups] -= 1
        over = held.pending[self.groups] == 0
        if over.any():
            lanes = (self.groups[over][:, None] * 128 + np.arange(128)).ravel()
            for slot, value in zip(form.accumulators, held.values, strict=True):
                m.write_wgmma(slot, value, None if len(lanes) == m.threads else lanes)

    def part(self, chosen: np.ndarray) -> Product:
        groups = self.groups[chosen.reshape(-1, 128)[:, 0]]
        part = object.__new__(Product)
        part.__dict__.update(self.__dict__)
        keep = np.isin(self.groups, groups)
        part.groups, part.adds, part.b, part.warps = groups, self.adds[keep], self.b[keep], self.warps[keep]
        part.a = None if self.a is None else self.a[keep]
        part.cells = [cells[keep] for cells in self.cells]
        part.lanes = (groups[:, None] * 128 + np.arange(128)).ravel()
        part.group = self.group if isinstance(self.group, int) else self.group[chosen]
        return part


def warpgroups(m: Any) -> np.ndarray:
    """Those that execute, with all their warps."""
    warps = m.warps()
    groups = np.unique(warps // 4)
    if len(groups) * 4 != len(warps):
        raise Fault("partial warpgroup", f"executed by {len(warps)} warps, not by all four of each warpgroup", 0)
    return groups


@op("wgmma.mma_async.sync.aligned")
def _wgmma(code: Code, i: Instruction) -> Step:
    shape, d, a_kind, b_kind, *more = i.parts[4:]
    if more or d not in ("f32", "s32") or a_kind not in tensor.ELEMENT_BYTES or b_kind not in tensor.ELEMENT_BYTES:
        raise PtxError(f"{i.op} is not supported")
    d_operand, a, b, scale, *constants = i.operands
    numbers = [c.value for c in constants]
    signs = (numbers.pop(0), numbers.pop(0)) if d == "f32" else (1, 1)
    in_registers = isinstance(a, Vector)
    if in_registers and len(numbers) == 1:
        numbers.insert(0, 0)
    transposed = (bool(numbers[0]), bool(numbers[1])) if numbers else (False, False)
    n = int(shape[3:].partition("k")[0].lstrip("n"))
    source = slots(a) if in_registers else a.slot
    form = Form(slots(d_operand), source, b.slot, n, (d, a_kind, b_kind), signs, transposed)
    read = code.sources(i).read(scale, np.dtype("?"))
    code.touches_shared(16)

    def run(m: Any) -> None:
        groups = warpgroups(m)
        m.check_wgmma_fence((*form.accumulators, *(form.a if in_registers else ())))
        adds = np.broadcast_to(read(m.R), m.threads).reshape(-1, 128)[groups, 0]
        m.lanes_now = None  # reports name threads of the chunk
        agent = Product(m, form, groups, adds, m.pc)
        agent.issue()
        m.agents.products.issue(agent)
        if m.observer is not None:
            m.observer.bulk(i, "load", ((0 if in_registers else 64) + n) * 32 * len(groups))

    return run


@op("wgmma.fence.sync.aligned")
def _fence(code: Code, i: Instruction) -> Step:
    return lambda m: m.wgmma_fence()


@op("wgmma.commit_group.sync.aligned")
def _commit(code: Code, i: Instruction) -> Step:
    return lambda m: m.agents.products.commit()


def _finish(agents: list[Product]) -> None:
    for agent in agents:
        agent.finish()


@op("wgmma.wait_group.sync.aligned")
def _wait(code: Code, i: Instruction) -> Step:
    return lambda m: m.agents.products.wait(i.operands[0].value, _finish)


@op("setmaxnreg.inc.sync.aligned", "setmaxnreg.dec.sync.aligned")
def _set_registers(code: Code, i: Instruction) -> Step:
    """Blocks until the CTA's other warpgroups have left enough of the registers that it began with."""
    count = i.operands[0].value
    if count % 8 or not 24 <= count <= 256:
        raise PtxError(f"{count} registers: a multiple of 8 from 24 to 256 is wanted")

    def run(m: Any) -> int | None:
        held, per_cta = m.group_registers, m.cta_threads // 128
        pool = min(256, 65536 // m.cta_threads // 8 * 8) * per_cta

        def fits(group: int) -> bool:
            first = group // per_cta * per_cta
            return held[first : first + per_cta].sum() - held[group] + count <= pool

        groups = warpgroups(m)
        free = np.zeros(m.threads, bool)
        for group in groups:
            if fits(group):
                held[group] = count
                free[group * 128 : group * 128 + 128] = True
        mask = np.ones(m.threads, bool) if m.mask is None else m.mask
        if (free == mask).all():
            return None
        if free.any():
            m.fork(m.pc, free)  # they execute it again, which changes nothing
        m.mask = mask & ~free
        return m.wait(lambda waiting: waiting & np.repeat([fits(g) for g in range(len(held))], 128))

    return run
