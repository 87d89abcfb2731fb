"""Hand-written CUDA with inline PTX, of the kind csrc/cuda holds, through nvcc and the virtual GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.virtual_gpu import Mapped, cases, launch, ptx_entry
from tests.virtual_gpu.async_agents import SCHEDULES
from vgg_fast import testing

EXAMPLES = cases.ROOT / "tests" / "virtual_gpu" / "examples"
M, N, K = 128, 192, 232


@pytest.fixture(autouse=True)
def _nvcc() -> None:
    if cases.find_nvcc() is None:
        pytest.skip("no nvcc to compile the examples with")


def matrices(k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a = testing.integer_tensor(M, k, limit=4)
    b = testing.integer_tensor(N, k, limit=2, seed=1)
    return a.half(), b.half(), (a @ b.T).half()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sm_80(schedule: str) -> None:
    a, b, expected = matrices(K // 32 * 32)
    c = torch.empty_like(expected)
    entry = ptx_entry(cases.nvcc_ptx(EXAMPLES / "gemm_sm80.cu", "80"))
    launch(entry, (M // 64, N // 64), [a, b, c, N, a.shape[1]], outputs=[2], schedule=schedule)
    assert torch.equal(c, expected)


def test_a_fatbin_is_opened(tmp_path: Path) -> None:
    """An object file as build.py makes it: machine code, and PTX of one architecture."""
    target = tmp_path / "gemm.o"
    codes = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_80,code=compute_80"]
    subprocess.run([cases.find_nvcc(), *codes, "-c", "-o", target, EXAMPLES / "gemm_sm80.cu"], check=True)
    a, b, expected = matrices(64)
    c = torch.empty_like(expected)
    launch(ptx_entry(target, "gemm"), (M // 64, N // 64), [a, b, c, N, 64], outputs=[2])
    assert torch.equal(c, expected)


def run_sm_90(name: str, **options: Any) -> None:
    a, b, expected = matrices(K)
    c = torch.empty_like(expected)
    maps = [Mapped(t, box=(64, 64), options={"swizzle": 128}) for t in (a, b)]
    ptx = cases.nvcc_ptx(EXAMPLES / "gemm_sm90.cu", "90a")
    entry = ptx_entry(ptx, name)
    launch(entry, (M // 64, N // 64), [*maps, c, N, K], outputs=[2], shared_bytes=2 * 2 * 8192, **options)
    assert torch.equal(c, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["gemm_shared", "gemm_registers"])
def test_sm_90(name: str, schedule: str) -> None:
    run_sm_90(name, schedule=schedule)
