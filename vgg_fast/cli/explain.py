"""``vgg-fast explain``: which layers of a model run fused, by which kernel, and why the others do not."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from vgg_fast import models
from vgg_fast.accelerate import accelerate
from vgg_fast.cli._ui import UserError, check_isa, check_size, command, dtype_name, out, parse_dtypes, progress
from vgg_fast.explain import Explanation
from vgg_fast.explain import explain as explain_model

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    **{name: getattr(models, name) for name in models.ARCHITECTURES},
    "VggNet": models.VggNet,
    "vggnet": models.vggnet,
}


def find_builder(name: str) -> Callable[..., Any]:
    """One of our builders, or ``module:callable`` of the user's own, importable from the working directory.

    Raises:
        UserError: there is nothing of that name.
    """
    if name in BUILDERS:
        return BUILDERS[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(f"there is no model {name!r}; choose from {', '.join(BUILDERS)}, or give module:callable")
    # As python -m does it: a script's own folder comes first.
    sys.path.insert(0, str(Path.cwd()))
    try:
        value: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            value = getattr(value, part)
    except ModuleNotFoundError as error:
        raise UserError(f"{name}: {error} (looked in {Path.cwd()} and the installed packages)") from error
    except AttributeError as error:
        raise UserError(f"{name}: {error}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(value):
        raise UserError(f"{name} is a {type(value).__name__}; it must be a function or class that returns a model")
    return value


def build(name: str, dtype: torch.dtype) -> nn.Module:
    """The model, accelerated, in evaluation mode.

    Raises:
        UserError: it cannot be built without arguments, or is not a module.
    """
    builder = find_builder(name)
    try:
        model = builder if isinstance(builder, nn.Module) else builder()
    except Exception as error:  # whatever the user's own code raises
        raise UserError(f"{name}() failed with {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{name}() returned a {type(model).__name__}, not a torch.nn.Module")
    return accelerate(model).eval().to(dtype)


@torch.inference_mode()
def explanation(model: nn.Module, dtype: torch.dtype, size: int, channels: int = 3) -> Explanation:
    """Of one square image.

    Raises:
        UserError: the model does not take it.
    """
    try:
        return explain_model(model, torch.randn(1, channels, size, size).to(dtype))
    except (RuntimeError, ValueError, TypeError) as error:
        image = f"1x{channels}x{size}x{size} {dtype_name(dtype)}"
        raise UserError(f"the model does not take an image of {image}: {error}") from error


@command
def explain(
    model: Annotated[str, typer.Argument(help="vgg11 … vgg19_bn, VggNet, vggnet, or module:callable.")] = "vgg16_bn",
    size: Annotated[int, typer.Option(help="Height and width of the example image.")] = 224,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    channels: Annotated[int, typer.Option(min=1, help="Channels of the example image.")] = 3,
) -> None:
    """Show which layers of a model run fused, by which kernel, and why the others do not."""
    check_isa()
    if model in BUILDERS:
        check_size(size)
    dtypes = parse_dtypes(dtype)
    if len(dtypes) > 1:
        raise UserError(f"--dtype {dtype}: explain takes one dtype")
    with progress(f"building and running {model}"):
        rows = explanation(build(model, dtypes[0]), dtypes[0], size, channels)
    out.print(str(rows), markup=False, soft_wrap=True)
