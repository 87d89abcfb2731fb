"""What PyTorch's settings ask of fp32: read from the settings of PyTorch, never from ones of our own."""

from __future__ import annotations

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
