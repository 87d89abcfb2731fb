"""Triton's own side of the kernels: examples, and offsets past 2^31. What they compute is in test_gpu_kernels.py, the
machine code in test_machine_code.py."""

from __future__ import annotations

import doctest
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from gpu_kernels import Huge, interpreted

from vgg_fast import reference, testing
from vgg_fast.kernels import configs, support


def test_examples() -> None:
    for module in (interpreted("conv3x3"), interpreted("maxpool2x2"), configs, support):
        failed, attempted = doctest.testmod(module)
        assert failed == 0
        assert attempted > 0


@pytest.mark.parametrize(
    ("dtype", "capability", "reasons"),
    [
        (torch.float16, (8, 0), 0),
        (torch.bfloat16, (12, 0), 0),
        (torch.float32, None, 0),
        (torch.float16, (7, 5), 1),
        (torch.float64, (9, 0), 1),
        (torch.int8, (7, 0), 2),
    ],
)
def test_unsupported(dtype: torch.dtype, capability: tuple[int, int] | None, reasons: int) -> None:
    assert len(support.unsupported(dtype, capability)) == reasons


def test_the_package_imports_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import vgg_fast.kernels.support"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def start_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the interpreter number a grid's programs from a given one on."""
    from triton.runtime.interpreter import interpreter_builder

    def start(first: int) -> None:
        def set_grid_idx(x: int, y: int, z: int) -> None:
            interpreter_builder.grid_idx = (first + x, y, z)

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)

    return start


def test_conv3x3_past_2_31_elements(start_at: Callable[[int], None]) -> None:
    module, huge = interpreted("conv3x3"), Huge()
    c = huge.channels
    weight = testing.integer_tensor(c, c, 3, 3, limit=2, dtype=torch.float16)
    affine = torch.stack([torch.ones(c), torch.zeros(c)])
    size = (1, huge.height, huge.width, c, c)
    launch = module.launch_of(torch.float16, *size, False, False, module.Architecture(80, 108))
    assert launch.options["WIDE"]
    start_at(launch.grid[0] - 2)
    launch.kernel[(2,)](**launch.arguments(huge.x, module.layout(weight), affine, huge.out))
    expected = reference.conv3x3(huge.last.float(), weight.float()).half()
    assert torch.equal(huge.out_pixels(huge.height, huge.width)[:, :, -1, -128:], expected[:, :, -1, -128:])


def test_maxpool2x2_past_2_31_elements(start_at: Callable[[int], None]) -> None:
    module, huge = interpreted("maxpool2x2"), Huge()
    constants = module.constants(huge.channels)
    height, width = huge.height // 2, huge.width // 2
    start_at(-(-height * width // constants["BR"]) - 2)
    module._maxpool2x2_kernel[(2,)](huge.x, huge.out, height * width, huge.height, huge.width, **constants)
    expected = reference.maxpool2x2(huge.last)
    assert torch.equal(huge.out_pixels(height, width)[:, :, -1, -16:], expected[:, :, -1, -16:])
