"""What the commands share: errors in one line, a clean Ctrl-C, progress on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from vgg_fast import gpu, library, selection
from vgg_fast.bench.peers import DTYPES

P = ParamSpec("P")
T = TypeVar("T")

_CPU = torch.device("cpu")

FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130  # 130 = 128 + SIGINT, as shells have it

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class UserError(Exception):
    """Something the user can put right: shown as one line without a traceback, exit code 2."""


def complain(message: str) -> None:
    """One line on stderr, never wrapped, so that it can be searched for and piped."""
    err.print(Text.assemble(("error: ", "bold red"), " ".join(message.split())), soft_wrap=True)


def command(function: Callable[P, T]) -> Callable[P, T]:
    """What every command does with UserError and Ctrl-C.

    Here and not in ``main``, because what typer itself does on Ctrl-C differs between its versions.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            complain(str(error))
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt as stopped:
            err.print(str(stopped) or "interrupted", markup=False)
            raise typer.Exit(INTERRUPTED) from None

    return run


@contextlib.contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Exceptions of these kinds inside are the user's to put right."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error


class Bar:
    """A progress bar on stderr that vanishes at the end; nothing at all where stderr is no terminal."""

    def __init__(self, progress: Progress, what: str, total: float | None) -> None:
        self._progress = progress
        self._task = progress.add_task(what, total=total)

    def step(self, what: str | None = None) -> None:
        """One step further; ``what`` says what comes next."""
        self._progress.update(self._task, advance=1, description=what)

    def at(self, done: int, total: int) -> None:
        """``done`` of ``total`` steps."""
        self._progress.update(self._task, completed=done, total=total)

    def say(self, what: str) -> None:
        """What is being done now."""
        self._progress.update(self._task, description=what)


@contextlib.contextmanager
def progress(what: str, total: float | None = None) -> Iterator[Bar]:
    """A :class:`Bar` with ``total`` steps, or a spinner without."""
    columns = [SpinnerColumn(), TextColumn("{task.description}")]
    counted = [BarColumn(), MofNCompleteColumn()] if total else []
    with Progress(
        *columns, *counted, TimeElapsedColumn(), console=err, transient=True, disable=not err.is_terminal
    ) as display:
        yield Bar(display, what, total)


def new_table(title: str) -> Table:
    """An empty table in our style, narrow enough for 80 columns."""
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def show(table: Table) -> None:
    """On stdout; a file or a pipe has no width to keep to."""
    (out if out.is_terminal else Console(width=200, highlight=False)).print(table)


def to_json(value: Any) -> str:
    """No NaN, which is not JSON."""
    return json.dumps(value, indent=1, allow_nan=False)


def print_json(value: Any) -> None:
    """Pure JSON on stdout: no colours, no wrapping, no NaN."""
    typer.echo(to_json(value))


def parse_dtypes(text: str) -> list[torch.dtype]:
    """``fp32,bf16`` -> dtypes; also PyTorch's own names."""
    result = []
    for name in text.split(","):
        name = name.strip()
        full = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
        dtype = DTYPES.get(name) or full.get(name)
        if dtype is None:
            raise UserError(f"there is no dtype {name!r} here; choose from {', '.join(DTYPES)}, separated by commas")
        if dtype not in result:
            result.append(dtype)
    return result


def dtype_name(dtype: torch.dtype) -> str:
    """``fp32``, ``bf16``, ``fp16``."""
    return next(name for name, value in DTYPES.items() if value is dtype)


def parse_positive(text: str, what: str) -> list[int]:
    """``1,8`` -> [1, 8]."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise UserError(f"{what} takes whole numbers from 1, separated by commas, not {text!r}")
    return list(dict.fromkeys(values))


def check_size(size: int) -> None:
    """Five pools halve the side five times."""
    if size < 32:
        raise UserError(f"--size {size} is too small: VGG's five pools need at least 32 pixels a side")


def check_backend(backend: str, dtypes: Iterable[torch.dtype], device: torch.device = _CPU) -> None:
    """An unknown backend, or one that cannot run these: said now, and not after the work."""
    if backend != "auto":
        with user_errors(RuntimeError):
            for dtype in dtypes:
                selection.choose(dtype, device, backend)


def parse_device(name: str) -> torch.device:
    """``cpu``, or ``cuda`` where there is such a device."""
    with user_errors(gpu.Unavailable):
        return gpu.named(name)


def check_writable(*files: Path | None) -> None:
    """Said now, and not after minutes of work."""
    for file in files:
        if file is not None:
            with user_errors(OSError):
                file.open("a").close()


def check_report(report: Path | None) -> None:
    """Whether both files of a report can be written: the page, and the JSON beside it."""
    if report is not None and report.suffix == ".json":
        raise UserError(f"--report {report}: name the HTML page; the JSON goes beside it, under the same name")
    if report is not None:
        check_writable(report, report.with_suffix(".json"))


def write_text(file: Path, text: str) -> None:
    """All of the file or nothing: whoever is interrupted again keeps what was there."""
    with user_errors(OSError):
        part = file.with_name(file.name + ".part")
        part.write_text(text, encoding="utf-8")
        part.replace(file)


def check_isa() -> None:
    """VGG_FAST_ISA has a value that it can have; otherwise the first kernel would say so in the middle of the work."""
    if library.missing("_C") is None:
        with user_errors(RuntimeError):
            torch.ops.vgg_fast.cpu_flags()
