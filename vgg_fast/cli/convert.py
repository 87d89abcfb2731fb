"""``vgg-fast convert``: weight files from one format into another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vgg_fast.cli._ui import command, out, progress, user_errors
from vgg_fast.models.convert import convert as convert_file
from vgg_fast.models.weights import WeightsError


@command
def convert(
    source: Annotated[Path, typer.Argument(help=".keras, .weights.h5, legacy .h5, .pth, .pt or .safetensors")],
    target: Annotated[Path, typer.Argument(help=".pth, .pt or .safetensors")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Turn the weights of a Keras VGG into a state_dict, or .pth into .safetensors and back."""
    with progress(f"converting {source.name}"), user_errors(WeightsError, ImportError, OSError):
        report = convert_file(source, target, force=force)
    lines = [f"{report.source} ({report.source_format}) -> {report.target}"]
    lines.append(f"{report.tensors} tensors, {report.parameters:,} parameters")
    if report.build:
        lines.append(f"they fit {report.build}")
    for line in (*lines, *report.notes):
        out.print(line, markup=False, soft_wrap=True)
