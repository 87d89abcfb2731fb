"""``vgg-fast verify``: every op and every kernel of this machine against the reference."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from vgg_fast import gpu
from vgg_fast.bench import host, peers
from vgg_fast.cli._ui import (
    FAILED,
    Bar,
    check_isa,
    check_report,
    command,
    complain,
    dtype_name,
    new_table,
    out,
    parse_device,
    parse_dtypes,
    print_json,
    progress,
    show,
    to_json,
    user_errors,
    write_text,
)
from vgg_fast.verify import checks
from vgg_fast.verify import report as parity_report
from vgg_fast.verify.verdicts import Row

_COLOURS = {"ok": "green", "MISS": "bold red", "no memory": "yellow", "not here": "dim"}


def _short(dtype: str) -> str:
    return dtype_name(getattr(torch, dtype))


def _table(rows: list[Row]) -> Table:
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
    layers: Annotated[
        bool | None, typer.Option(help="Also VGG16's layers at 224x224, batch 1 and 32; on a GPU unless refused.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML page, and the JSON beside it.")] = None,
) -> None:
    """Check every op and kernel of this machine: integers bit for bit, random numbers within a derived bound."""
    check_isa()
    dtypes, where = parse_dtypes(dtype), parse_device(device)
    check_report(report)
    real = peers.LAYERS if layers or (layers is None and where.type == "cuda") else ()
    interrupted, machine = False, {**host.describe(), **gpu.describe(where)}
    with progress("verifying", 1) as bar, user_errors(gpu.Unavailable):
        try:
            rows = checks.verify(device, only=kernel or (), dtypes=dtypes, layers=real, on_progress=_advance(bar))
        except checks.Interrupted as stopped:
            rows, interrupted = stopped.rows, True
    plain = [parity_report.row_as_json(row) for row in rows]
    found = {"device": device, "interrupted": interrupted, "machine": machine, "rows": plain}
    if report is not None:
        command_line = shlex.join(["vgg-fast", *sys.argv[1:]])
        write_text(report.with_suffix(".json"), to_json(found))
        write_text(report, parity_report.page(rows, machine, command_line, interrupted))
    if interrupted:
        kept = f"; {report} has what was checked until then" if report is not None else ""
        raise KeyboardInterrupt(f"interrupted{kept}")
    if json:
        print_json(found)
    else:
        show(_table(rows))
        for reason in dict.fromkeys(row.absent for row in rows if row.absent):
            out.print(f"not here: {reason}", markup=False)
        for row in rows:
            for what in row.unjudged:
                out.print(f"not checked: {row.op} by {row.kernel} in {row.dtype}, {what}", markup=False)
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
