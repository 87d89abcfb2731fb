"""What a report says of a Triton kernel, and what launch refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import triton
import triton.language as tl

from tests.virtual_gpu import KernelError, launch, snippets
from tests.virtual_gpu.cases import ROOT


@triton.jit
def reversed_without_mask(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + (N - 1 - i))
    tl.store(out_ptr + i, value, mask=i < N)


def run(n: int, x: torch.Tensor, out: torch.Tensor, **options: object) -> None:
    arguments = {"x_ptr": x, "out_ptr": out, "N": n, "BLOCK": 128, "num_warps": 4}
    launch(reversed_without_mask, (-(-n // 128),), arguments, **({"outputs": ["out_ptr"]} | options))


def test_a_report_names_the_line_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    x, out = torch.arange(256.0), torch.empty(256)
    run(256, x, out)
    assert torch.equal(out, x.flip(0))
    with pytest.raises(KernelError) as error:
        run(200, x[:200].clone(), torch.empty(200))
    number = next(n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if "tl.load" in line)
    expected = f"tests/virtual_gpu/test_reports.py:{number}: value = tl.load(x_ptr + (N - 1 - i))"
    assert expected in str(error.value)
    assert "CTA (1, 0, 0), thread 72, at" in str(error.value)
    assert "the nearest is x_ptr (800 bytes), byte -4 of it" in str(error.value)


def test_a_tensor_keeps_its_alignment() -> None:
    """Triton is told that a pointer is aligned only where it is, and vector access to others is reported."""
    x, out = torch.arange(257.0), torch.empty(256)
    run(256, x[1:], out)
    assert torch.equal(out, x[1:].flip(0))
    vectors = "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%x]; st.global.v4.u32 [%out], {%r1, %r2, %r3, %r4};"
    with pytest.raises(KernelError, match="misaligned: load of 16 bytes"):
        snippets.run(vectors, x[1:], out)


def test_what_launch_refuses() -> None:
    x, out = torch.arange(256.0), torch.empty(256)
    with pytest.raises(ValueError, match="schedule 'soon'; expected one of latest, earliest, random"):
        run(256, x, out, schedule="soon")
    with pytest.raises(ValueError, match=r"a \(256,\) tensor on cpu with strides \(2,\); expected a dense one"):
        run(256, torch.empty(512)[::2], out)
    with pytest.raises(ValueError, match="no tensor is called 'result'; there are x_ptr, out_ptr"):
        run(256, x, out, outputs=["result"])
    with pytest.raises(ValueError, match="snippet has 2 parameters, 1 were given"):
        launch(snippets.snippet(""), (1,), [x])
    with pytest.raises(ValueError, match="target 100 is not simulated; expected one of 80, 86, 89, 90"):
        run(256, x, out, target=100)
