"""``vgg-fast verify``: every op and every kernel of this machine against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from vgg_fast import measure
from vgg_fast import verify as checks
from vgg_fast.cli._ui import (
    FAILED,
    Bar,
    check_isa,
    command,
    complain,
    dtype_name,
    finite,
    new_table,
    out,
    parse_dtypes,
    print_json,
    progress,
    show,
    user_errors,
)

_COLOURS = {"ok": "green", "MISS": "bold red", "not here": "dim"}


def _as_dict(row: checks.Row) -> dict[str, Any]:
    return {
        "op": row.op,
        "kernel": row.kernel,
        "dtype": row.dtype,
        "problems": row.problems,
        "bit_for_bit": row.exact,
        "worst_error_over_bound": finite(row.worst),
        "worst_error_over_bound_on_border": finite(row.worst_border),
        "result": row.result,
        "misses": row.misses,
        "absent": row.absent,
    }


def _short(dtype: str) -> str:
    return dtype_name(getattr(torch, dtype))


def _table(rows: list[checks.Row]) -> Table:
    table = new_table("against the reference in float64")
    for column in ("op", "kernel", "dtype"):
        table.add_column(column)
    for column in ("checked", "exact", "err/bound", "on border"):
        table.add_column(column, justify="right")
    table.add_column("result")
    for row in rows:
        ran = not row.absent
        counted = [str(row.problems), str(row.exact)] if ran else ["", ""]
        random = ran and row.problems > row.exact
        errors = [f"{value:.2f}" if random else "" for value in (row.worst, row.worst_border)]
        colour = _COLOURS[row.result]
        table.add_row(row.op, row.kernel, _short(row.dtype), *counted, *errors, f"[{colour}]{row.result}[/]")
    return table


@command
def verify(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    kernel: Annotated[list[str] | None, typer.Option(help="Only this kernel; may be given several times.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16, or several with commas.")] = "fp32,bf16,fp16",
    json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Check every op and kernel of this machine: integers bit for bit, random numbers within a derived bound."""
    check_isa()
    dtypes = parse_dtypes(dtype)
    with progress("verifying", 1) as bar, user_errors(checks.Unavailable):
        rows = checks.verify(device, only=kernel or (), dtypes=dtypes, on_progress=_advance(bar))
    if json:
        print_json({"device": device, "rows": [_as_dict(row) for row in rows], "machine": measure.machine()})
    else:
        show(_table(rows))
        for reason in dict.fromkeys(row.absent for row in rows if row.absent):
            out.print(f"not here: {reason}", markup=False)
    misses = [(row, miss) for row in rows for miss in row.misses]
    for row, miss in misses[:10]:
        complain(f"{row.op} by {row.kernel} in {row.dtype}: {miss}")
    if misses:
        complain(f"{len(misses)} results are wrong")
        raise typer.Exit(FAILED)
    if not any(row.problems for row in rows):
        complain("nothing was checked: none of these kernels runs here")
        raise typer.Exit(FAILED)


def _advance(bar: Bar) -> Callable[[int, int], None]:
    return lambda done, total: bar.at(done, total)
