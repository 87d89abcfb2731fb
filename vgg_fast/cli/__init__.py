"""The command line, ``vgg-fast``. One file per command.

Exit codes: 0 all is well; 1 a check failed; 2 something to put right by the user; 130 interrupted.
"""

from __future__ import annotations

from typing import Annotated

import typer

from vgg_fast import __version__
from vgg_fast.cli import bench, convert, demo, doctor, explain, verify

app = typer.Typer(
    name="vgg-fast",
    help="VGG-like convolution stacks in PyTorch, fused and fast, with the same answers.",
    no_args_is_help=True,
    add_completion=False,
    # A bug's traceback belongs into an issue as Python prints it.
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vgg-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for _command in (demo.demo, explain.explain, doctor.doctor, verify.verify, bench.bench, convert.convert):
    app.command()(_command)


def main() -> None:
    """Entry point of the ``vgg-fast`` script."""
    app()
