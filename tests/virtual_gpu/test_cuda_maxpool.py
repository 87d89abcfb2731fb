"""maxpool2x2 of csrc/cuda and its backward: nvcc's PTX on the virtual GPU, and how it uses memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.virtual_gpu import cases
from tests.virtual_gpu.counters import Counters
from tests.virtual_gpu.cuda_cases import maxpool2x2
from vgg_fast import testing

# Sizes and memory format; each with the form of the kernel that it takes.
FORMS = {
    "channels": ((2, 32, 6, 8), torch.channels_last),
    "columns": ((2, 3, 6, 64), torch.contiguous_format),
    "odd channels": ((1, 16, 7, 9), torch.channels_last),
    "one by one": ((2, 3, 5, 6), torch.contiguous_format),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", ["80", "90"])
def test_forward_and_backward(target: str, form: str, dtype: torch.dtype) -> None:
    if cases.find_nvcc() is None:
        pytest.skip("no nvcc to compile csrc/cuda with")
    size, memory_format = FORMS[form]
    x = testing.integer_tensor(*size, limit=3, dtype=dtype).contiguous(memory_format=memory_format)
    x[0, 0, 0, 1] = x[0, 0, 1, 0] = float("nan")
    x.requires_grad_()
    expected = F.max_pool2d(x, 2)
    grad = testing.random_tensor(*expected.shape, dtype=dtype).contiguous(memory_format=memory_format)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    counters = Counters(), Counters()
    actual = maxpool2x2(x.detach(), target=target, observer=counters[0])
    torch.testing.assert_close(actual, expected.detach(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(maxpool2x2(x.detach(), grad, target, observer=counters[1]), expected_grad)
    if form in ("channels", "columns"):
        for c in counters:
            wide = {row.op for row in c.rows.values() if row.op.startswith(("ld.global", "st.global"))}
            assert wide, "nothing was loaded"
            assert all(".v2." in op or ".v4." in op for op in wide), wide
            assert c.total.sectors == c.total.sectors_ideal > 0
