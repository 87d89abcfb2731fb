"""Triton's interpreter says what a kernel means, the virtual GPU what its PTX does: a kernel per instruction family."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.gpu_kernels import interpreted_file
from tests.virtual_gpu import families, launch, triton_entry
from vgg_fast import testing


@functools.cache
def interpreted() -> ModuleType:
    """A copy of families.py whose kernels are interpreted."""
    return interpreted_file(families.__file__, "interpreted_families")


def ints(*size: int, limit: int = 2**31, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit, size, generator=generator).to(torch.int32)


def small(*size: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    """Integers whose products and sums are exact in every type here."""
    return testing.integer_tensor(*size, limit=3, seed=seed).to(dtype)


def some(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 4


def product(
    dtype: torch.dtype, into: torch.dtype, a_transposed: bool = False, b_transposed: bool = False
) -> dict[str, Any]:
    k = {torch.int8: 32, torch.float32: 16}.get(dtype, 32)
    arguments = {"a_ptr": small(64, 96, dtype=dtype), "b_ptr": small(64, 96, dtype=dtype, seed=1)}
    arguments |= {"out_ptr": torch.empty(64, 64, dtype=into), "k_size": 96 - 8, "M": 64, "N": 64, "K": 96, "BK": k}
    return arguments | {"A_TRANSPOSED": a_transposed, "B_TRANSPOSED": b_transposed, "num_warps": 4, "num_stages": 3}


class Case(NamedTuple):
    kernel: str
    arguments: Callable[[], dict[str, Any]]
    opcodes: dict[int, str]  # by target: what the family is there for, separated by blanks
    grid: tuple[int, ...] = (1,)
    scratch: tuple[str, ...] = ()
    rtol: float = 0.0


def on_both(opcodes: str) -> dict[int, str]:
    return dict.fromkeys((80, 90), opcodes)


F16, F32, S8, S32 = torch.float16, torch.float32, torch.int8, torch.int32
CASES = {
    "integers": Case(
        "integers",
        lambda: {"x_ptr": ints(512), "y_ptr": ints(512, seed=1), "out_ptr": torch.empty(512).long(), "SIZE": 256},
        on_both("div.s32 shl.b32 shr.s32 xor.b32 mul.hi.u32 div.s64"),
        (2,),
    ),
    "floats": Case(
        "floats",
        lambda: {"x_ptr": some(512, seed=2), "y_ptr": some(512, seed=3), "out_ptr": torch.empty(512), "SIZE": 256},
        on_both("ex2.approx sqrt.approx div.full fma.rn.f32 cvt.rzi.s32.f32 cvt.rn.f16.f32"),
        (2,),
        rtol=2e-3,  # one value in a row rounds to another fp16
    ),
    "reductions": Case(
        "reductions",
        lambda: {"x_ptr": ints(32, 64, limit=999), "out_ptr": torch.empty(96).int(), "ROWS": 32, "COLUMNS": 64},
        on_both("shfl.sync.bfly bar.sync"),
    ),
    "scans": Case(
        "scans", lambda: {"x_ptr": ints(512), "out_ptr": torch.empty(512).int(), "SIZE": 512}, on_both("shfl.sync.up")
    ),
    "transposed": Case(
        "transposed",
        lambda: {"x_ptr": ints(64, 32), "out_ptr": torch.empty(32, 64).int(), "ROWS": 64, "COLUMNS": 32},
        on_both("st.shared ld.shared bar.sync"),
    ),
    "atomics": Case(
        "histogram",
        lambda: {"x_ptr": ints(512, limit=15) + 15, "out_ptr": torch.zeros(33).int(), "SIZE": 256},
        on_both("atom.global"),
        (2,),
        ("out_ptr",),
    ),
    "loops": Case(
        "collatz",
        lambda: {"x_ptr": torch.arange(9).int() + 27, "out_ptr": torch.empty(9).int(), "LIMIT": 100, "num_warps": 1},
        on_both("bra"),
        (9,),
    ),
    "fp16 products": Case(
        "matmul", lambda: product(F16, F32), {80: "mma.sync ldmatrix cp.async", 90: "wgmma.mma_async cp.async"}
    ),
    "fp16 products of transposed operands": Case(
        "matmul",
        lambda: product(F16, F32, a_transposed=True, b_transposed=True),
        {80: "mma.sync ldmatrix.sync.aligned.m8n8.x4.trans", 90: "wgmma.mma_async"},
    ),
    "tf32 products": Case(
        "matmul",
        lambda: product(F32, F32, b_transposed=True),
        {80: ".m16n8k8.row.col.f32.tf32.tf32.f32", 90: "k8.f32.tf32.tf32"},
    ),
    "int8 products": Case(
        "matmul",
        lambda: product(S8, S32, b_transposed=True),
        {80: ".s32.s8.s8", 90: "k32.s32.s8.s8"},
    ),
    "a product in registers": Case(
        "two_products",
        lambda: {
            **{f"{name}_ptr": small(64, 64, seed=n) for n, name in enumerate("abc")},
            **{"out_ptr": torch.empty(64, 64), "SIZE": 64, "num_warps": 4},
        },
        {80: "mma.sync", 90: "wgmma.mma_async"},
    ),
    "tensor maps": Case(
        "descriptors",
        lambda: {
            "x": TensorDescriptor.from_tensor(small(48, 72), [16, 32]),
            "out": TensorDescriptor.from_tensor(torch.empty(48, 72, dtype=F16), [16, 32]),
            **{"ROWS": 16, "COLUMNS": 32, "num_warps": 4},
        },
        {90: "cp.async.bulk.tensor.2d.shared cp.async.bulk.tensor.2d.global mbarrier.try_wait"},
        (3, 3),
    ),
}


def result(arguments: dict[str, Any]) -> Tensor:
    out = arguments.get("out_ptr", arguments.get("out"))
    return out if isinstance(out, Tensor) else out.base


@pytest.mark.parametrize(("name", "target"), [(name, target) for name in CASES for target in CASES[name].opcodes])
def test_family(name: str, target: int) -> None:
    case = CASES[name]
    expected, arguments = case.arguments(), case.arguments()
    options = ("num_warps", "num_stages")
    interpreter = getattr(interpreted(), case.kernel)
    interpreter[case.grid](**{k: v for k, v in expected.items() if k not in options})
    entry = triton_entry(getattr(families, case.kernel), arguments, target)
    opcodes = {instruction.op for instruction in entry.code.instructions}
    for wanted in case.opcodes[target].split():
        assert any(wanted in op for op in opcodes), f"{wanted} is not among {sorted(opcodes)}"
    out = "out" if "out" in arguments else "out_ptr"
    written = {"scratch": case.scratch} if case.scratch else {"outputs": [out]}
    launch(entry, case.grid, arguments, target=target, **written)
    torch.testing.assert_close(result(arguments), result(expected), rtol=case.rtol, atol=case.rtol)
