"""What PyTorch's settings ask of fp32 (there are none of our own), and setting those of CUDA devices for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_RUNGS = {"ieee": "highest", "tf32": "high", "bf16": "medium"}


def float32_precision(of: str = "conv", device_type: str = "cpu") -> str:
    """``highest``, ``high`` or ``medium``: what PyTorch's settings ask of fp32.

    On the CPU ``torch.backends.mkldnn.conv.fp32_precision`` where it is set (ieee, tf32 or bf16; it inherits from
    ``torch.backends.fp32_precision``), else ``torch.get_float32_matmul_precision()``. On a GPU
    ``torch.backends.cudnn.conv.fp32_precision``, of which ``torch.backends.cudnn.allow_tf32`` is the older name. From
    whom it inherits (``torch.backends.cudnn``, then ``torch.backends``) PyTorch looks up itself when read: ``none``
    says that none of the three is set, as after ``allow_tf32 = False``, and convolutions are then in ieee.

    Args:
        of: ``conv``, or ``matmul`` for fully connected layers on the CPU: the setting that counts.
        device_type: ``cpu`` or ``cuda``.

    Example:
        >>> float32_precision(), float32_precision(device_type="cuda")  # PyTorch's defaults
        ('highest', 'high')
    """
    if device_type == "cuda":
        setting = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        return "high" if setting == "tf32" else "highest"
    own = _RUNGS.get(getattr(torch.backends.mkldnn, of).fp32_precision)
    try:
        return own or torch.get_float32_matmul_precision()
    except RuntimeError:  # the older setting does not answer once the newer ones were set for CUDA, say
        return "highest"


# --- on CUDA devices --------------------------------------------------------------------------------------------------

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
