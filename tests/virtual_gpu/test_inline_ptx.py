"""Hand-written CUDA with inline PTX, of the kind csrc/cuda holds, through nvcc and the virtual GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.virtual_gpu import KernelError, Mapped, cases, launch, ptx_entry
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


TABLES = """
__constant__ float weights[4] = {1.0f, -2.0f, 0.5f, 4.0f};
__device__ int order[4] = {3, 1, 0, 2};

extern "C" __global__ void __launch_bounds__(64) tables(const float* x, float* out, int n) {
  float mine[8];  // indexed by data: it cannot stay in registers
  for (int i = 0; i < 8; ++i) mine[i] = x[threadIdx.x + i];
  float sum = 0.0f;
#pragma unroll 1
  for (int i = 0; i < n; ++i) sum += weights[order[i & 3]] * mine[(threadIdx.x * 3 + i) & 7];
  out[threadIdx.x] = sum;
}
"""


def test_arrays_of_a_thread_and_constant_tables(tmp_path: Path) -> None:
    source = tmp_path / "tables.cu"
    source.write_text(TABLES)
    ptx = cases.nvcc_ptx(source, "80")
    assert ".local" in ptx
    assert ".const" in ptx
    x, out = testing.integer_tensor(72, limit=9), torch.empty(64)
    launch(ptx_entry(ptx), (1,), [x, out, 7], outputs=[1])
    weights, order = (1.0, -2.0, 0.5, 4.0), (3, 1, 0, 2)
    expected = [sum(weights[order[i & 3]] * x[t + (t * 3 + i & 7)].item() for i in range(7)) for t in range(64)]
    assert out.tolist() == expected


SPLIT = """
// Each block adds up a part of x; the last one to arrive adds up the parts.
extern "C" __global__ void __launch_bounds__(64) split(const float* x, float* parts, unsigned* arrived, float* out) {
  __shared__ bool last;
  parts[blockIdx.x * 64 + threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(arrived, 1) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  float sum = 0.0f;
  for (int i = 0; i < gridDim.x; ++i) sum += parts[i * 64 + threadIdx.x];
  out[threadIdx.x] = sum;
}
"""
SPLIT_ERRORS = {
    "stored without a fence": ("threadIdx.x];\n  __threadfence();", "threadIdx.x];"),
    "read without a fence": ("return;\n  __threadfence();", "return;"),
    "one block too early": ("gridDim.x - 1", "gridDim.x - 2"),
    "nobody waits": ("if (!last) return;", "if (blockIdx.x) return;"),
}


@pytest.mark.parametrize("error", [None, *SPLIT_ERRORS])
def test_ctas_that_meet_in_scratch_memory(tmp_path: Path, error: str | None) -> None:
    source = tmp_path / "split.cu"
    source.write_text(SPLIT.replace(*SPLIT_ERRORS[error]) if error else SPLIT)
    x, out = testing.integer_tensor(100 * 64, limit=9), torch.empty(64)
    arguments = [x, torch.full((100 * 64,), 7.0), torch.zeros(1, dtype=torch.int32), out]
    entry = ptx_entry(cases.nvcc_ptx(source, "80"))
    if error is None:
        launch(entry, (100,), arguments, outputs=[3], scratch=[1, 2])
        assert torch.equal(out, x.view(100, 64).sum(0))
        return
    with pytest.raises(
        KernelError, match=r"races with a (store|load) of CTA \d+, no fence and atomic in between"
    ) as caught:
        launch(entry, (100,), arguments, outputs=[3], scratch=[1, 2])
    assert caught.value.kind == "race"
    assert "split.cu:" in str(caught.value)


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
