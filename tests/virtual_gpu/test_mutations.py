"""The mutation suite: every small wrong in real PTX is seen, by a check or in the result, or waived with its reason."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed, whose kernels are mutated")
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.virtual_gpu import Entry, KernelError, Mapped, cases, launch, ptx_entry, triton_entry
from tests.virtual_gpu.mutate import Mutant, apply, mutants
from tests.virtual_gpu.tma_gemm import gemm
from vgg_fast import reference, testing
from vgg_fast.kernels.configs import Config
from vgg_fast.kernels.conv3x3 import launch_of


def conv3x3(target: int, pool: bool, split: int, change: Callable[[Entry], Entry]) -> Tensor:
    """Tiles of 64 pixels, the last not full, nine k-steps."""
    x, weight, affine, _ = _convolution(pool)
    tile = Config(64, 64, 32, 4, 3, split)
    launched = launch_of(x.dtype, 3, 8, 8, 32, 56, True, pool, cases.ARCHITECTURES[target], config=tile)
    return cases.triton_conv3x3(x, weight, affine, target=target, change=change, launched=launched)


@functools.cache
def _convolution(pool: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, bias = testing.conv_inputs(testing.Shape("", 3, 32, 56, 8, 8, ""), torch.float16, integers=True)
    affine = torch.stack([torch.arange(len(bias)) % 5, bias]).float()
    expected = reference.conv3x3_affine(x.float(), weight.float(), affine, relu=True, pool=pool).half()
    x = x.contiguous(memory_format=torch.channels_last)
    return x, weight.permute(0, 2, 3, 1).contiguous(), affine, expected


def cuda_gemm(target: str, name: str, change: Callable[[Entry], Entry]) -> Tensor:
    """examples/gemm_sm80.cu or gemm_sm90.cu; see test_inline_ptx.py."""
    a, b, _ = _deep_matrices()
    c = torch.empty(128, 64, dtype=torch.float16)
    source = cases.ROOT / "tests" / "virtual_gpu" / "examples" / f"gemm_sm{target[:2]}.cu"
    arguments = [Mapped(t, box=(64, 64), options={"swizzle": 128}) for t in (a, b)] if target == "90a" else [a, b]
    entry = change(ptx_entry(cases.nvcc_ptx(source, target), name))
    launch(entry, (2, 1), [*arguments, c, 64, a.shape[1]], outputs=[2], shared_bytes=32768 if target == "90a" else 0)
    return c


def tma_gemm(change: Callable[[Entry], Entry]) -> Tensor:
    """Four tiles that hang over on all sides, four k-steps in three stages."""
    a, b, _ = _matrices()
    c = torch.empty(len(a), len(b), dtype=torch.float16)
    blocks = {"a": [128, 64], "b": [64, 64], "c": [128, 64]}
    arguments: dict[str, Any] = {
        name: TensorDescriptor(t, list(t.shape), [t.shape[1], 1], blocks[name])
        for name, t in {"a": a, "b": b, "c": c}.items()
    }
    arguments |= {"K": a.shape[1], "BM": 128, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3}
    launch(change(triton_entry(gemm, arguments, 90)), (2, 2), arguments, outputs=["c"])
    return c


@functools.cache
def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    a = testing.integer_tensor(200, 232, limit=4)
    b = testing.integer_tensor(104, 232, limit=2, seed=1)
    return a.half(), b.half(), (a @ b.T).half()


@functools.cache
def _deep_matrices() -> tuple[Tensor, Tensor, Tensor]:
    """Seven k-steps of 64: nvcc unrolls loops by four, and both the loop and what is left over shall run."""
    a, b = testing.integer_tensor(128, 448, limit=4), testing.integer_tensor(64, 448, limit=1, seed=1)
    return a.half(), b.half(), (a @ b.T).half()


@dataclass(frozen=True)
class Waiver:
    """Mutants that may live, and why. ``all_at_once``: each does the others' work, so together they must not live."""

    why: str
    names: tuple[str, ...]
    all_at_once: bool = False


PIPELINE = (
    Waiver("the first copies only fill stages that nobody has read yet", ("drop bar.sync #0",)),
    Waiver(
        "copies of x and of the weights become one group; the waits count groups from the last one",
        ("drop cp.async.commit_group #0",),
    ),
)

SM_80_PIPELINE = (
    *PIPELINE,
    Waiver(
        "the loop begins with a stage that the end of the iteration before has waited for",
        ("drop bar.sync #2", "weaken cp.async.wait_group #1"),
    ),
    Waiver(
        "two equal waits in a row",
        ("weaken cp.async.wait_group #2", "weaken cp.async.wait_group #3"),
        all_at_once=True,
    ),
    Waiver("the copies past the last step, zeros that nobody reads", ("weaken cp.async.wait_group #4",)),
)

NOT_FILLED_AGAIN = Waiver("the last step's stage is not filled again", ("drop mbarrier.arrive.shared #2",))


@dataclass(frozen=True)
class Subject:
    run: Callable[[Callable[[Entry], Entry]], Tensor]
    expected: Callable[[], Tensor]
    waivers: tuple[Waiver, ...]


SUBJECTS = {
    "conv3x3 sm_80 pooled": Subject(
        functools.partial(conv3x3, 80, True, 1), lambda: _convolution(True)[3], SM_80_PIPELINE
    ),
    "conv3x3 sm_90": Subject(
        functools.partial(conv3x3, 90, False, 1),
        lambda: _convolution(False)[3],
        (
            *PIPELINE,
            Waiver(
                "the epilogue stores where the same warp's last copies went, in a stage whose readers have met since",
                ("drop bar.sync #3",),
            ),
            Waiver(
                "the copies past the last step, zeros over which the same warp stores",
                ("weaken cp.async.wait_group #1",),
            ),
        ),
    ),
    "conv3x3 sm_80, three programs share a sum": Subject(
        functools.partial(conv3x3, 80, False, 3), lambda: _convolution(False)[3], SM_80_PIPELINE
    ),
    "CUDA gemm sm_80": Subject(functools.partial(cuda_gemm, "80", "gemm"), lambda: _deep_matrices()[2], ()),
    "CUDA gemm sm_90a": Subject(
        functools.partial(cuda_gemm, "90a", "gemm_shared"),
        lambda: _deep_matrices()[2],
        (
            NOT_FILLED_AGAIN,
            Waiver(
                "since the first fence only wgmma has changed its registers",
                ("drop wgmma.fence #1", "drop wgmma.fence #2"),
            ),
        ),
    ),
    "CUDA gemm sm_90a, A in registers": Subject(
        functools.partial(cuda_gemm, "90a", "gemm_registers"), lambda: _deep_matrices()[2], (NOT_FILLED_AGAIN,)
    ),
    "gemm sm_90 by TMA": Subject(
        tma_gemm,
        lambda: _matrices()[2],
        (
            Waiver(
                "any of them tells the other warps that the mbarriers are initialised",
                tuple(f"drop bar.sync #{n}" for n in range(6)),
                all_at_once=True,
            ),
            Waiver("every warp has just waited for the mbarrier itself", ("drop bar.sync #6",)),
            Waiver(
                "any of them keeps the copies of the next step behind the products that read the stage before",
                ("drop bar.sync #7", "drop bar.sync #8", "drop bar.sync #9"),
                all_at_once=True,
            ),
            Waiver("nothing follows", ("drop bar.sync #12",)),
        ),
    ),
}


def survives(subject: Subject, wrongs: list[Mutant]) -> bool:
    try:
        return torch.equal(subject.run(functools.partial(apply, wrongs)), subject.expected())
    except KernelError:
        return False


@pytest.mark.parametrize("name", SUBJECTS)
def test_mutants_are_killed(name: str) -> None:
    if name.startswith("CUDA") and cases.find_nvcc() is None:
        pytest.skip("no nvcc to compile the examples with")
    subject = SUBJECTS[name]
    entries: list[Entry] = []
    assert torch.equal(subject.run(lambda entry: entries.append(entry) or entry), subject.expected())
    every = {mutant.name: mutant for mutant in mutants(entries[0])}
    assert len(every) >= 15, "next to nothing to mutate: the compiler writes other code than it used to"
    survivors = {name for name, mutant in every.items() if survives(subject, [mutant])}
    assert survivors == {name for waiver in subject.waivers for name in waiver.names}
    for waiver in subject.waivers:
        if waiver.all_at_once:
            assert not survives(subject, [every[name] for name in waiver.names]), waiver.why
