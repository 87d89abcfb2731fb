"""What every test may rely on: a fixed number of threads, and a seed."""

from __future__ import annotations

import pytest
import torch

import vgg_fast  # noqa: F401  (declares the ops)


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
