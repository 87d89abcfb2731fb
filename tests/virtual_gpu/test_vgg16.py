"""The script behind ``make gpu-sim``, on the first layers of a small image."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton", reason="Triton is not installed, whose kernels are simulated")
from tests.virtual_gpu import predicted, vgg16
from tests.virtual_gpu.counters import GPUS


def test_the_layers_are_those_of_vgg16() -> None:
    """15.35 billion multiply-adds in the convolutions of a 224x224 image (arXiv:1409.1556, configuration D)."""
    every = list(predicted.layers())
    assert sum(layer.flops(1) for layer in every) == 2 * 15_346_630_656
    assert [layer.size for layer in every if layer.pool] == [224, 112, 56, 28, 14]


@pytest.mark.parametrize("target", vgg16.GPUS_OF)
def test_it_checks_and_prints_every_layer(target: int, capsys: pytest.CaptureFixture[str]) -> None:
    vgg16.run(32, target, count=2)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["VGG16", "what", "layer", "3->64", "64->64", "all"]
    gflop, seconds, _, *models = (float(cell) for cell in lines[-1][1:-1])
    assert len(models) == len(vgg16.GPUS_OF[target])
    assert gflop == pytest.approx(2e-9 * 9 * 32 * 32 * 64 * (3 + 64), abs=0.006)
    assert 0 < min(models) <= max(models) < seconds * 1e6


@pytest.mark.parametrize("gpu", ["A100", "H100"])
@pytest.mark.parametrize(
    ("layer", "batch"),
    [(predicted.Layer(64, 128, 28, True), 8), (predicted.Layer(64, 128, 14, False), 4)],
    ids=["", "tiles of two images"],
)
def test_a_sample_stands_for_a_launch(gpu: str, layer: predicted.Layer, batch: int) -> None:
    """What each resource needs, scaled from eight tiles, against the complete launch, in the tiles of a large batch."""
    config = predicted.prediction(layer, 1024, gpu, tiles=1)[1]
    sample, _ = predicted.prediction(layer, batch, gpu, config=config)
    complete, _ = predicted.prediction(layer, batch, gpu, tiles=None, config=config)
    assert sample.busy == complete.busy
    for resource, seconds in complete.times.items():
        assert sample.times[resource] == pytest.approx(seconds, rel=0.03), resource
    counters, *_ = predicted.simulate(layer, batch, config, predicted.TARGET_OF[gpu], None)
    touched = counters.read.bytes + counters.written.bytes
    assert complete.times["HBM"] == pytest.approx(touched / GPUS[gpu].hbm)


def test_the_paper_roofline() -> None:
    """Batch 32 at 312 TFLOP/s and 1.5 TB/s, by hand: 3148 us of products, 3600 us with the pools as launches of their
    own, 3274 us with nothing but the first convolution bound by memory."""
    limits = predicted.paper(32, dataclasses.replace(GPUS["A100"], hbm=1.5e12))
    by_hand = {"A": 5911e-6, "B": 3600e-6, "C": 3274e-6, "D": 3148e-6}
    assert limits == pytest.approx(by_hand, rel=1e-3)


def test_the_report_names_every_layer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    few = [predicted.Layer(3, 64, 32, False), predicted.Layer(64, 64, 32, True)]
    monkeypatch.setattr(predicted, "layers", lambda: iter(few))
    predicted.report([2], ["A100", "H200"])
    text = capsys.readouterr().out
    assert all(str(layer) in text for layer in few)
    assert text.count("paper: A ") == 2
