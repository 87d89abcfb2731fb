"""``accelerate``, ``restore`` and ``refresh``: other people's models, in place and reversibly.

No layer is replaced, renamed or removed. Only the class of the containers changes, from ``nn.Sequential`` to
:class:`~vgg_fast.FusedSequential`; so state_dict, names, hooks, optimizers and references stay as they were.
"""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
from torch import nn

from vgg_fast import selection
from vgg_fast.container.sequential import FusedSequential, drop_cache, set_backend

M = TypeVar("M", bound=nn.Module)


def accelerate(model: M, backend: str = "auto") -> M:
    """Lets every ``nn.Sequential`` of a model run 3x3 convolutions and dense layers fused; changes the model in place.

    A container of exactly the type ``nn.Sequential`` changes its class; a subclass may have a forward of its own and is
    left alone. May be called again, also with another backend. :func:`vgg_fast.explain` shows what runs fused.

    Args:
        model: any module.
        backend: ``auto``, or a backend or kernel that must run: a forward that it cannot run raises RuntimeError. On a
            GPU ``cuda`` is the backend (on Hopper kernel ``cuda_wgmma``), ``=cuda`` its kernel of that name.

    Returns:
        The same object.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: there is no backend of that name.

    Warns:
        UserWarning: the model has no ``nn.Conv2d`` at all, as a Keras model has none.

    Example:
        >>> model = accelerate(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()))
        >>> type(model).__name__
        'FusedSequential'
    """
    _check_module(model, "accelerate")
    kernels = (*selection.GPU_KERNELS, *selection.cpu_kernels(), *selection.linear_kernels())
    known = dict.fromkeys(("auto", *selection.BACKENDS, *kernels))
    if backend not in (*known, *map(selection.exactly, selection.GPU_KERNELS)):
        raise ValueError(f"there is no backend {backend!r}; choose one of {', '.join(known)}")
    if not any(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()):
        warnings.warn(
            f"accelerate: {type(model).__name__} contains no torch.nn.Conv2d, so there is nothing to fuse. A Keras "
            "model has layers of its own even with the torch backend: convert its weights with `vgg-fast convert` "
            "and load them into vgg_fast.vggnet().",
            UserWarning,
            stacklevel=2,
        )
    for module in model.modules():
        if type(module) is nn.Sequential:
            module.__class__ = FusedSequential
        if isinstance(module, FusedSequential):
            set_backend(module, backend)
    return model


def restore(model: M) -> M:
    """Undoes :func:`accelerate`: every FusedSequential becomes an ``nn.Sequential`` again, in place.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.

    Example:
        >>> type(restore(accelerate(nn.Sequential(nn.Conv2d(3, 8, 3))))).__name__
        'Sequential'
    """
    _check_module(model, "restore")
    for module in model.modules():
        if type(module) is FusedSequential:
            drop_cache(module)
            set_backend(module, "auto")
            module.__class__ = nn.Sequential  # type: ignore[assignment]
    return model


def refresh(model: M) -> M:
    """Forgets the packed weights of a model, so that the next forward packs them again.

    Never needed for training, loading, moving or averaging weights, which are all noticed. Needed after an edit of *few
    elements* behind PyTorch's back (through ``.data``, a numpy view or a raw pointer), which the fingerprint may miss.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.

    Example:
        >>> conv = nn.Conv2d(3, 8, 3, padding=1)
        >>> conv.weight.data[0, 0, 0, 0] = 1.0
        >>> _ = refresh(accelerate(nn.Sequential(conv)))
    """
    _check_module(model, "refresh")
    for module in model.modules():
        if isinstance(module, FusedSequential):
            drop_cache(module)
    return model


def _check_module(model: object, who: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who} takes a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"{who} cannot change a ScriptModule; call it before torch.jit.script or torch.jit.trace")
