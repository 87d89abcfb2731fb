"""``vgg-fast bench``: how long the contestants take on this machine, after their answers have been checked."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from vgg_fast import contest, measure, peers, plots, roofline
from vgg_fast import report as html_report
from vgg_fast.accelerate import accelerate
from vgg_fast.cli._ui import (
    FAILED,
    check_backend,
    check_isa,
    check_size,
    command,
    complain,
    dtype_name,
    new_table,
    out,
    parse_dtypes,
    parse_positive,
    print_json,
    progress,
    show,
    user_errors,
)
from vgg_fast.contest import Contest
from vgg_fast.peers import CHANNELS_LAST, COMPILED, EAGER, OURS


def contests(
    dtypes: list[torch.dtype], batches: list[int], size: int, layers: bool, options: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], Contest]]]:
    """(what it is called, how to make it) for every problem that was asked for."""
    for dtype in dtypes:
        for batch in batches:
            where = f"{dtype_name(dtype)}, batch {batch}"
            if layers:
                for each in peers.LAYERS:
                    yield f"{each.name}, {where}", partial(contest.layer, each, dtype, batch, **options)
            else:
                yield f"features, {where}", partial(contest.features, dtype, batch, size, **options)


def _table(rows: list[dict[str, Any]], compiled: bool) -> Table:
    shown = [EAGER, CHANNELS_LAST, *([COMPILED] if compiled else []), OURS]
    titles = {EAGER: "eager", OURS: "vgg-fast"}
    table = new_table("ms per image: median (min)")
    for column in ("problem", "dtype", "batch"):
        table.add_column(column)
    for name in shown:
        table.add_column(titles.get(name, name), justify="right")
    table.add_column("ratio", justify="right")
    table.add_column("kernel")
    problems: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        problems.setdefault((row["problem"], row["dtype"], row["batch"]), {})[row["contestant"]] = row
    for (problem, dtype, batch), by_name in problems.items():
        cells = [f"{r['median_ms_per_image']:.2f} ({r['min_ms_per_image']:.2f})" for r in (by_name[n] for n in shown)]
        ratio = by_name[OURS]["ratio_to_best_peer"]
        colour = "green" if ratio < 1 else "red"
        kernel = by_name[OURS]["kernel"] or "none"
        table.add_row(
            problem, dtype_name(getattr(torch, dtype)), str(batch), *cells, f"[{colour}]{ratio:.2f}[/]", kernel
        )
    return table


@command
def bench(
    layers: Annotated[bool, typer.Option("--layers", help="Each convolution by itself, at 224x224.")] = False,
    batch: Annotated[str, typer.Option(help="Batch size, or several with commas.")] = "1",
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16, or several with commas.")] = "fp32,bf16",
    size: Annotated[int, typer.Option(help="Height and width of the images (not with --layers).")] = 224,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of measuring; fewer if the machine is slow.")] = 10,
    compile: Annotated[bool, typer.Option("--compile", help="Also torch.compile; it compiles for long.")] = False,
    backend: Annotated[str, typer.Option(help="auto, or the backend or kernel that has to run.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Also write a CSV with machine, versions and commit.")] = None,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML report with plots, all in one file.")] = None,
) -> None:
    """VGG16-BN features: PyTorch eager, channels_last, torch.compile and vgg-fast in turns, answers checked first."""
    check_isa()
    check_size(size)
    dtypes, batches = parse_dtypes(dtype), parse_positive(batch, "--batch")
    if report is not None:
        with user_errors(plots.PlotsUnavailable):
            plots.require()
    for file in (csv, report):
        if file is not None:
            with user_errors(OSError):  # now, and not after minutes of measuring
                file.open("a").close()
    check_backend(backend, dtypes)
    options = {"compiled": compile, "accelerator": partial(accelerate, backend=backend)}
    todo = list(contests(dtypes, batches, size, layers, options))
    rows: list[dict[str, Any]] = []
    failures = []
    ceilings = roofline.measure_ceilings() if report is not None else None
    with progress("bench", len(todo) * (rounds + 2)) as bar:
        for number, (what, make) in enumerate(todo):
            bar.say(f"{what}: checking{' and compiling' if compile else ''}")
            try:
                each = make()
            except contest.Disagreement as error:
                failures.append(str(error))
                continue
            bar.step(f"{what}: measuring")
            rows += each.rows(each.time(rounds, on_round=bar.step))
            bar.at((number + 1) * (rounds + 2), len(todo) * (rounds + 2))
    if csv is not None:
        with user_errors(OSError):
            measure.write_csv(csv, rows)
    if report is not None:
        command_line = shlex.join(["vgg-fast", *sys.argv[1:]])
        results = html_report.Results(rows, measure.machine(), ceilings, failures=failures, command=command_line)
        with user_errors(OSError):
            html_report.write(report, results)
    if json:
        print_json({"rows": rows, "failures": failures, "machine": measure.machine()})
    else:
        if rows:
            show(_table(rows, compile))
        here = measure.machine()
        out.print(
            f"{here['cpu']}, {here['threads']} threads, torch {here['torch']}, commit {here['commit'] or 'unknown'}. "
            "Ratio: ours to the fastest of the others, below 1 is faster. All answers were checked first."
        )
    for failure in failures:
        complain(f"not timed, because the answer is wrong: {failure}")
    if failures:
        raise typer.Exit(FAILED)
