"""Torchvision and ours side by side, where torchvision is installed."""

from __future__ import annotations

import pytest
import torch

from vgg_fast import models, selection
from vgg_fast.accelerate import accelerate, restore
from vgg_fast.explain import record
from vgg_fast.models.weights import PUBLISHED, find_weights

torchvision = pytest.importorskip(
    "torchvision", reason="torchvision is not installed (it has no release for every torch): no comparison with it"
)


@pytest.mark.parametrize("name", list(models.ARCHITECTURES))
def test_same_keys_shapes_and_weights_table(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = getattr(models, name)(), getattr(torchvision.models, name)()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert [type(m).__name__ for m in ours.features] == [type(m).__name__ for m in theirs.features]
    weights = torchvision.models.get_model_weights(name)
    assert set(PUBLISHED[name]) == {w.name for w in weights}
    for member in weights:
        assert find_weights(name, member) == find_weights(name, member.name)


def test_same_seed_same_weights_same_answers() -> None:
    torch.manual_seed(0)
    ours = models.vgg11_bn(num_classes=4).eval()
    torch.manual_seed(0)
    theirs = torchvision.models.vgg11_bn(num_classes=4).eval()
    for (name, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-5)


def test_accelerate_their_model_and_take_it_back() -> None:
    torch.manual_seed(0)
    model = torchvision.models.vgg16_bn(num_classes=10).eval()
    types = [(name, type(m)) for name, m in model.named_modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        expected = model(x)
        assert accelerate(model) is model
        with record() as segments:
            y = model(x)
        fused = [segment for segment in segments if segment.kernel is not None]
        assert [len(segment.names) for segment in fused] == [44]
        assert fused[0].kernel == selection.choose(torch.float32, x.device)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        assert list(model.state_dict()) == list(state)
        restore(model)
        assert torch.equal(model(x), expected)
    assert [(name, type(m)) for name, m in model.named_modules()] == types
    assert vars(model.features).keys() == vars(torchvision.models.vgg11().features).keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
