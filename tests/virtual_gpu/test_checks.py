"""Every check finds what it is for, and the report says where: one small wrong kernel each, beside the right one."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.virtual_gpu import KernelError, Mapped, PtxError, launch, machine, ptx_entry
from tests.virtual_gpu.async_agents import SCHEDULES
from tests.virtual_gpu.snippets import run, snippet

COPY = "ld.global.u32 %r1, [%x]; st.global.u32 [%out], %r1;"

# A value through shared memory to the thread opposite, in another warp.
OPPOSITE = "xor.b32 %r2, %at, 128;"
EXCHANGE = f"ld.global.u32 %r1, [%x]; st.shared.u32 [%at], %r1; bar.sync 0; {OPPOSITE} ld.shared.u32 %r3, [%r2];"
STORE = "st.global.u32 [%out], %r3;"
ASYNC = (
    f"cp.async.ca.shared.global [%at], [%x], 4; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0; {OPPOSITE}"
)
ASYNC += " ld.shared.u32 %r3, [%r2];"

# One thread copies 256 bytes with the async proxy, everybody waits for the mbarrier behind it.
BULK = """
mov.b32 %r10, smem; add.u32 %r11, %r10, 4096;
setp.eq.u32 %p1, %tid, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r11], 1;
bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r11], 256;
@%p1 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r10], [%xs], 256, [%r11];
{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r11], 0; @!done bra again; }
ld.shared.u32 %r3, [%at]; st.global.u32 [%out], %r3;
"""

# The first warp hands values to the second, and goes on.
HANDOVER = """
ld.global.u32 %r1, [%x]; setp.ge.u32 %p1, %tid, 32; xor.b32 %r2, %at, 128;
@%p1 bra second;
st.shared.u32 [%at], %r1; bar.arrive 1, 64; st.global.u32 [%out], %r1; ret;
second: bar.sync 1, 64; ld.shared.u32 %r3, [%r2]; st.global.u32 [%out], %r3;
"""

HANDOVER_AND_BACK = """
setp.lt.u32 %p1, %tid, 32; xor.b32 %r2, %at, 128;
@%p1 bra first;
st.shared.u32 [%at], %tid; bar.sync 1, 64; st.global.u32 [%out], %tid; ret;
first: bar.arrive 1, 64; ld.shared.u32 %r3, [%r2]; st.global.u32 [%out], %r3;
"""

# Two copies, each with an mbarrier of its own; the second copy is read.
TWO_BULKS = """
mov.b32 %r10, smem; add.u32 %r11, %r10, 4096; add.u32 %r12, %r10, 256; add.u32 %r13, %r11, 8;
setp.eq.u32 %p1, %tid, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r11], 1; @%p1 mbarrier.init.shared::cta.b64 [%r13], 1;
bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r11], 256;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r13], 256;
@%p1 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r12], [%xs], 256, [%r13];
@%p1 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r10], [%xs], 256, [%r11];
{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r13], 0; @!done bra again; }
ld.shared.u32 %r3, [%at+256]; st.global.u32 [%out], %r3;
"""

RIGHT = {
    "handover": HANDOVER,
    "two bulk copies": TWO_BULKS,
    "copy": COPY,
    "exchange": EXCHANGE + STORE,
    "cp.async": ASYNC + STORE,
    "bulk copy": BULK,
}

# name: (kernel, kind of the error, what its report says)
WRONG = {
    "load past the end": (COPY.replace("[%x]", "[%x+4]"), "out of bounds", "byte 256 of it"),
    "load before the start": (COPY.replace("[%x]", "[%x+-4]"), "out of bounds", "byte -4 of it"),
    "store past the end": (COPY.replace("[%out]", "[%out+4]"), "out of bounds", "nearest is argument 1"),
    "misaligned": (COPY.replace("[%x]", "[%x+2]"), "misaligned", "not a multiple of 4"),
    "store to an input": (COPY.replace("[%out]", "[%x]"), "read only", "argument 0 .element 0."),
    "output read before it is written": (COPY.replace("[%x]", "[%out]"), "uninitialised", "element 0"),
    "element left out": (f"setp.ne.u32 %p1, %tid, 7; @%p1 bra on; ret; on: {COPY}", "never written", "element 7"),
    "element written again": (COPY * 2, "written twice", "element 0"),
    "element written by two threads": (COPY.replace("[%out]", "[%outs]"), "written twice", "two threads"),
    "shared memory past the end": (EXCHANGE.replace("[%r2]", "[%r2+8192]"), "out of bounds", "the CTA has 8192"),
    "shared memory misaligned": (EXCHANGE.replace("[%at]", "[%at+1]"), "misaligned", "shared memory"),
    "shared memory nobody wrote": (EXCHANGE.replace("[%r2]", "[%r2+512]"), "uninitialised", "nobody wrote"),
    "no barrier after a store": (EXCHANGE.replace("bar.sync 0;", ""), "race", "a store of warp 1"),
    "no barrier before the next store": (
        EXCHANGE + STORE + "st.shared.u32 [%at], %r3;", "race", "a load of warp 1",
    ),
    "two values for one place": (EXCHANGE.replace(".u32 [%at]", ".u32 [smem]"), "race", "two threads"),
    "a barrier of one warp only": (EXCHANGE.replace("bar.sync 0", "bar.sync %warp, 32"), "race", "no barrier"),
    "no wait for cp.async": (ASYNC.replace("wait_group 0", "wait_group 1"), "race", "nobody has waited for"),
    "no barrier after the wait": (ASYNC.replace("bar.sync 0;", ""), "race", "asynchronous copy|a store of"),
    "cp.async over what is being read": (
        EXCHANGE + "cp.async.ca.shared.global [%at], [%x], 4;", "race", "a load of warp 1",
    ),
    "mbarrier not initialised": (BULK.replace("@%p1 mbarrier.init", "@!%p1 bra over; over: //"), "mbarrier", "not"),
    "no wait for the mbarrier": (re.sub(r"\{.*\}", "", BULK), "race", "nobody has waited for|store of the async proxy"),
    "mbarrier expects too much": (BULK.replace("], 256;", "], 272;"), "deadlock", "0 arrivals and 16 bytes"),
    "mbarrier expects too little": (BULK.replace("], 256;", "], 240;"), "deadlock", "-16 bytes"),
    "wait for the wrong phase": (BULK.replace("[%r11], 0; @!", "[%r11], 1; @!"), "race deadlock", "async|phase 1"),
    "wait for another copy's mbarrier": (TWO_BULKS.replace("done, [%r13]", "done, [%r11]"), "race", "asy?nc"),
    "who only arrives learns nothing": (HANDOVER_AND_BACK, "race uninitialised", "a store of warp 1|nobody"),
    "too many arrivals": (BULK + "mbarrier.arrive.shared::cta.b64 _, [%r11];", "mbarrier", "more arrivals than the 1"),
    "barrier that half of the threads never reach": (
        "setp.lt.u32 %p1, %tid, 32; @%p1 bar.sync 1, 64; bar.sync 0;" + COPY, "deadlock", "32 threads .* wait",
    ),
    "atomic on what another warp stores": (
        "st.shared.u32 [%at], 0; atom.shared.add.u32 %r1, [smem+128], 1;", "race", "a store of warp 1",
    ),
    "warp instruction by half a warp": (
        "setp.lt.u32 %p1, %tid, 16; @%p1 redux.sync.add.s32 %r1, %tid, 65535;", "partial warp", "16 of 32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_pass(name: str, schedule: str) -> None:
    out = run(RIGHT[name], schedule=schedule)
    swaps = name in ("exchange", "cp.async")
    low = name == "handover"
    assert out.tolist() == [i ^ 32 if swaps else i % 32 if low else i for i in range(64)]


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_caught(name: str) -> None:
    body, kind, report = WRONG[name]
    for schedule in SCHEDULES:
        with pytest.raises(KernelError, match=report) as error:
            run(body, schedule=schedule)
        assert error.value.kind in kind, schedule


def test_a_loop_without_end_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_JUMPS", 1000)
    with pytest.raises(KernelError, match="endless loop: 1000 jumps and no end"):
        run("again: add.u32 %r1, %r1, 1; bra again;")


# What the async proxy reads must be fenced by who wrote it.
TMA_STORE = """
ld.global.u32 %r1, [%x]; st.shared.u32 [%at], %r1;
fence.proxy.async.shared::cta;
bar.sync 0;
setp.eq.u32 %p1, %tid, 0; mov.b32 %r10, smem; mov.b32 %r11, 0; mov.b64 %rd1, out_ptr;
@%p1 cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%rd1, {%r11}], [%r10];
cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;
"""


def test_a_missing_proxy_fence_is_caught() -> None:
    x = torch.arange(64, dtype=torch.int32)
    for schedule in SCHEDULES:
        out = torch.zeros_like(x)
        options: dict[str, Any] = {"outputs": [1], "shared_bytes": 8192, "schedule": schedule}
        launch(snippet(TMA_STORE), (1,), [x, Mapped(out, box=(64,))], **options)
        assert torch.equal(out, x)
        unfenced = snippet(TMA_STORE.replace("fence.proxy.async.shared::cta;", ""))
        with pytest.raises(KernelError, match=r"without fence.proxy.async after a store(.|\n)*st.shared") as error:
            launch(unfenced, (1,), [x, Mapped(out, box=(64,))], **options)
        assert error.value.kind == "missing fence"


REGISTERS = """
setp.ge.u32 %p1, %tid, 256;
@%p1 bra producer;
setmaxnreg.inc.sync.aligned.u32 240;
bra.uni done;
producer: setmaxnreg.dec.sync.aligned.u32 24;
done: st.global.u32 [%out], %tid;
"""


def test_registers_are_moved_between_warpgroups() -> None:
    """384 threads begin with 168 registers each; two warpgroups can have 240 where the third keeps 24."""
    for schedule in SCHEDULES:
        assert run(REGISTERS, threads=384, schedule=schedule).tolist() == list(range(384))
        with pytest.raises(KernelError, match=r"128 threads of CTA .* wait(.|\n)*setmaxnreg.inc") as error:
            run(REGISTERS.replace("u32 24;", "u32 32;"), threads=384, schedule=schedule)
        assert error.value.kind == "deadlock"
    with pytest.raises(KernelError, match="not by all four of each warpgroup") as error:
        run(REGISTERS.replace("256;", "288;"), threads=384)
    assert error.value.kind == "partial warpgroup"
    with pytest.raises(PtxError, match="23 registers: a multiple of 8"):
        run(REGISTERS.replace("u32 24;", "u32 23;"), threads=384)


def test_a_report_names_both_lines_of_a_race() -> None:
    with pytest.raises(KernelError) as error:
        run(WRONG["no barrier after a store"][0])
    assert "thread 0, at\n  PTX line 24: ld.shared.u32 %r3, [%r2]" in str(error.value)
    assert "the other access:\n  PTX line 24: st.shared.u32 [%at], %r1" in str(error.value)
    assert error.value.instruction is not None
    assert error.value.instruction.op == "ld.shared.u32"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%at], 128;", r"PTX line 24: .*tcgen05"),
        ("add.rz.f32 %r1, %r2, %r3;", r"PTX line 24: .*\.rz is not supported"),
        ("mov.u32 %r1, %clock;", r"PTX line 24: .*%clock is not supported"),
        ("ld.global.v8.u32 {%r1, %r2}, [%x];", r"PTX line 24: .*is not supported"),
        ("add.u32 %r1, %r2, %nobody;", r"PTX line 24: .*%nobody"),
        ("bra nowhere;", "no label 'nowhere'"),
        ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%r1}, {%r2}, {%r3}, {%r4};", "PTX line 24: .*not supported"),
        # Operands that would be taken for the size of the source.
        ("cp.async.cg.shared.global [%at], [%x], 16, %p1;", "PTX line 24: .*not supported"),
        ("cp.async.cg.shared.global.L2::cache_hint [%at], [%x], 16, %rd1;", "PTX line 24: .*not supported"),
        ("wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8.satfinite {%r1}, %rd1, %rd2, 1;", "PTX line 24: .*not"),
    ],
)
def test_what_is_unknown_is_refused_at_load(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        run(body)


def test_an_entry_is_found_by_a_part_of_its_name() -> None:
    with pytest.raises(PtxError, match="0 entries fit 'nobody'; there are: a, b"):
        ptx_entry(".visible .entry a()\n{ ret; }\n.visible .entry b()\n{ ret; }\n", "nobody")
