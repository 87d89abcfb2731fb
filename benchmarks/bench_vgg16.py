"""VGG16-BN at 224x224, its convolutional part and all of it; see conftest.py for how it is timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from vgg_fast.bench import contest


@pytest.mark.parametrize("part", ["features", "model"])
def test_vgg16(
    report: Callable[..., None],
    part: str,
    dtype: torch.dtype,
    batch: int,
    contestant: str,
    compiled: bool,
) -> None:
    make = partial(getattr(contest, part), dtype, batch, compiled=compiled)
    report(make, (part, dtype, batch), contestant)
