"""Torchvision and ours side by side, where torchvision is installed."""

from __future__ import annotations

import pytest
import torch

from vgg_fast import models
from vgg_fast.weights import PUBLISHED, find_weights

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
