"""Each convolution of VGG16-BN at 224x224 with its batch-norm, ReLU and pool; see conftest.py for how it is timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from vgg_fast.bench import contest
from vgg_fast.bench.peers import Layer


def test_conv3x3(
    report: Callable[..., None],
    layer: Layer,
    dtype: torch.dtype,
    batch: int,
    contestant: str,
    compiled: bool,
) -> None:
    make = partial(contest.layer, layer, dtype, batch, compiled=compiled)
    report(make, (layer.name, dtype, batch), contestant)
