"""What PyTorch computes fp32 in on CUDA devices: the setting for a while, and its name in reports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vgg_fast.precision import float32_precision

FLOAT32 = {"fp32": "ieee", "tf32": "tf32"}  # what fp32 tensors are computed in, by the names of reports


@contextmanager
def float32(setting: str | None) -> Iterator[None]:
    """PyTorch's setting of fp32 convolutions and products on CUDA devices for a while.

    Args:
        setting: ``ieee`` or ``tf32``; None leaves it as it is.

    Example:
        >>> with float32("ieee"):
        ...     torch.backends.cudnn.allow_tf32
        False
    """
    if setting is None:
        yield
        return
    convolutions, products = float32_name(), torch.get_float32_matmul_precision()
    try:
        _allow_tf32(setting == "tf32")
        torch.set_float32_matmul_precision("high" if setting == "tf32" else "highest")
        yield
    finally:
        _allow_tf32(convolutions == "tf32")
        torch.set_float32_matmul_precision(products)


def _allow_tf32(allowed: bool) -> None:
    """By the older name, and where that leaves the newer ones open (torch 2.14) by those, too.

    Whoever sets only one of them makes PyTorch raise where the other is read, by Inductor for example.
    """
    cudnn: Any = torch.backends.cudnn
    cudnn.allow_tf32 = allowed
    if allowed:
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32"


def float32_name() -> str:
    """``fp32`` or ``tf32``: what PyTorch computes fp32 convolutions in on CUDA devices now.

    Example:
        >>> with float32("tf32"):
        ...     float32_name()
        'tf32'
    """
    return "tf32" if float32_precision(device_type="cuda") == "high" else "fp32"
