"""What every test may rely on: a fixed number of threads that wait asleep, and a seed."""

from __future__ import annotations

import gc
import os

# Read once, when PyTorch loads its OpenMP. Threads that spin until the others have done their share of a tiny map take
# ten times as long where another process wants the cores: test_cache.py 51 s instead of 5.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

import vgg_fast  # noqa: F401  (declares the ops)

# The longest files, with empty caches. Two workers take whole files in this order (make test), and so end together.
LONGEST = (
    *("test_machine_code", "test_triton_conv3x3", "test_gpu_kernels", "test_peers", "test_cuda_mma", "test_cli"),
    *("test_sanitize", "test_conv3x3_sm90", "test_packaging", "test_sizes", "test_memory", "test_gpu_bench"),
    *("test_report", "test_convert", "test_triton_kernels"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """What importing and collecting all files leaves is no garbage: to look through it again took 0.3 s a time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
