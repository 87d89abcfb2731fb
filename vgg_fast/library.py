"""Finds and loads the compiled libraries, and remembers why one is missing."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent


@functools.cache
def missing(name: str) -> str | None:
    """Loads ``_C`` (CPU kernels) or ``_C_cuda`` (GPU kernels) once; None if it is there, else the reason why not.

    Loading registers the library's implementations of the ops.
    """
    if name == "_C_cuda" and torch.version.cuda is None:
        return "this PyTorch is a build without CUDA"
    path = next(_PACKAGE.glob(f"{name}.*so"), None)
    if path is None:
        return build_info().get(name, f"{name} was not built")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{name} does not load: {error}"
    return None


@functools.cache
def build_info() -> dict[str, str]:
    """What the installation wrote down about each library: how it was built, or why it was not."""
    path = _PACKAGE / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}
