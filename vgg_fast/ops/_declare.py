"""What all ops are declared with, beside PyTorch's own ``register_fake``, ``register_autograd`` and ``impl``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.library

_Function = TypeVar("_Function", bound=Callable[..., Any])
_fallbacks: dict[str, Callable[..., Any]] = {}


def define(name: str, schema: str) -> None:
    """``torch.library.define`` for an op that torch.compile and torch.export may see."""
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))


def fallback(name: str) -> Callable[[_Function], _Function]:
    """Marks the Python function that stands behind an op on devices without a compiled implementation."""

    def mark(function: _Function) -> _Function:
        _fallbacks[name] = function
        return function

    return mark


def register_fallbacks(keys: list[str]) -> None:
    """Puts the functions marked so far behind these dispatch keys."""
    for name, function in _fallbacks.items():
        torch.library.impl(name, keys, function)
