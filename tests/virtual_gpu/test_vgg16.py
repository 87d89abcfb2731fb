"""The script behind ``make gpu-sim``, on the first layers of a small image."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed, whose kernels are simulated")
from tests.virtual_gpu import vgg16


def test_the_layers_are_those_of_vgg16() -> None:
    """15.35 billion multiply-adds in the convolutions of a 224x224 image (arXiv:1409.1556, configuration D)."""
    macs, size = 0, 224
    for cin, cout, pool in vgg16.layers():
        macs += 9 * cin * cout * size * size
        size //= 2 if pool else 1
    assert macs == 15_346_630_656
    assert size == 7


@pytest.mark.parametrize("target", vgg16.GPUS_OF)
def test_it_checks_and_prints_every_layer(target: int, capsys: pytest.CaptureFixture[str]) -> None:
    vgg16.run(32, target, count=2)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["VGG16", "what", "layer", "3->64", "64->64", "all"]
    gflop, seconds, _, *models = (float(cell) for cell in lines[-1][1:-1])
    assert len(models) == len(vgg16.GPUS_OF[target])
    assert gflop == pytest.approx(2e-9 * 9 * 32 * 32 * 64 * (3 + 64), abs=0.006)
    assert 0 < min(models) <= max(models) < seconds * 1e6
