"""``vgg-fast bench``: how long the contestants take on this machine, after their answers have been checked."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from vgg_fast import gpu, selection
from vgg_fast.accelerate import accelerate
from vgg_fast.bench import contest, failures, gpu_peers, host, peers, plots, roofline
from vgg_fast.bench import report as html_report
from vgg_fast.bench.contest import Contest
from vgg_fast.bench.peers import EAGER, OURS
from vgg_fast.bench.roofline import Ceilings
from vgg_fast.cli._ui import (
    FAILED,
    UserError,
    check_backend,
    check_isa,
    check_report,
    check_size,
    check_writable,
    command,
    complain,
    dtype_name,
    new_table,
    out,
    parse_device,
    parse_dtypes,
    parse_positive,
    print_json,
    progress,
    show,
    to_json,
    user_errors,
    write_text,
)


@dataclass(frozen=True)
class Precision:
    """What activations and weights are, and for fp32 on a GPU what they are computed in (:data:`gpu.FLOAT32`)."""

    name: str
    dtype: torch.dtype
    setting: str | None = None


def precisions(text: str, device: torch.device) -> list[Precision]:
    """``fp16,tf32`` -> what they mean on a device."""
    result = {}
    for name in (part.strip() for part in text.split(",")):
        if device.type != "cuda" and name == "tf32":
            raise UserError("tf32 is what a GPU computes fp32 tensors in; the CPU has fp32, bf16 and fp16")
        (dtype,) = parse_dtypes("fp32" if name == "tf32" else name)
        setting = gpu.FLOAT32.get(name) if device.type == "cuda" and dtype == torch.float32 else None
        short = name if name == "tf32" else dtype_name(dtype)
        result[short] = Precision(short, dtype, setting)
    return list(result.values())


Problems = Iterator[tuple[str, Precision, Callable[[], Contest]]]


def contests(
    wanted: list[Precision], batches: list[int], size: int, whole: bool, layers: bool, options: dict[str, Any]
) -> Problems:
    """(what it is called, in which precision, how to make it) for every problem that was asked for."""
    for precision in wanted:
        for batch in batches:
            where = f"{precision.name}, batch {batch}"
            if whole:
                make = partial(contest.features, precision.dtype, batch, size, **options)
                yield f"features, {where}", precision, make
            for each in peers.LAYERS if layers else ():
                make = partial(contest.layer, each, precision.dtype, batch, **options)
                yield f"{each.name}, {where}", precision, make


@dataclass
class Measured:
    """What has been measured so far; all that a report needs. The machine is looked at first: it may get lost."""

    device: torch.device
    machine: dict[str, Any] = field(init=False)
    ceilings: Ceilings | None = None
    measured: Ceilings | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    launches: list[dict[str, Any]] = field(default_factory=list)
    clocks: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[tuple[str, str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    interrupted: bool = False

    def __post_init__(self) -> None:
        self.machine = {**host.describe(), **gpu.describe(self.device)}

    def results(self) -> html_report.Results:
        """As the report takes it."""
        taken = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "device"}
        return html_report.Results(command=shlex.join(["vgg-fast", *sys.argv[1:]]), **taken)

    def find_ceilings(self) -> None:
        """Of the data sheet where this GPU has one in the table, measured in any case."""
        self.ceilings = roofline.measure_ceilings(device=self.device)
        if self.device.type == "cuda" and (known := roofline.data_sheet(torch.cuda.get_device_name(self.device))):
            self.ceilings, self.measured = known, self.ceilings

    def run(self, what: str, make: Callable[[], Contest], rounds: int, on_round: Callable[[], None]) -> None:
        """One problem: made, checked, timed. What is wrong, does not fit or fails says so, and the rest goes on.

        Raises:
            RuntimeError: CUDA answers nothing any more.
        """
        try:
            each = make()
            self.left_out += [(who, what, why) for who, why in each.left_out.items()]
            ours = each.calls[OURS]
            if self.device.type != "cpu":
                gpu.keep_busy(ours, self.device, 0.3)  # it was idle while the CPU computed in float64
            timings = each.time(rounds, on_round=on_round)
            self.rows += each.rows(timings)
            if each.gflop is None:
                self.launches += each.launches()
            if clocks := gpu.clocks_under(ours, self.device):
                where = {"problem": each.name, "precision": each.precision, "batch": each.batch}
                self.clocks.append({**where, **asdict(clocks), "held_back": ", ".join(clocks.held_back)})
        except contest.Disagreement as error:
            self.failures.append(f"wrong answer: {error}")
        except Exception as error:
            if failures.out_of_memory(error):
                self.left_out.append(("everybody", what, "out of memory"))
            elif self.device.type == "cpu":
                raise  # a bug; on a GPU there are drivers, compilers and kernels never run there before
            else:
                self.failures.append(f"{what} raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
                if failures.device_lost(error):
                    raise
        finally:
            with suppress(RuntimeError):  # of a GPU that is lost
                failures.free_memory()


def _table(rows: list[dict[str, Any]]) -> Table:
    titles = {EAGER: "eager", OURS: "vgg-fast"}
    names = dict.fromkeys(row["contestant"] for row in rows)
    shown = [*(name for name in names if name != OURS), OURS]
    table = new_table("ms per image: median (min)")
    for column in ("problem", "dtype", "batch"):
        table.add_column(column)
    for name in shown:
        table.add_column(titles.get(name, name), justify="right")
    table.add_column("ratio", justify="right")
    table.add_column("kernel")
    problems: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        problems.setdefault((row["problem"], row["precision"], row["batch"]), {})[row["contestant"]] = row
    for (problem, precision, batch), by_name in problems.items():
        found = [by_name.get(name) for name in shown]
        times = [(r["median_ms_per_image"], r["min_ms_per_image"]) if r else None for r in found]
        cells = ["{} ({})".format(*map(html_report.milliseconds, pair)) if pair else "" for pair in times]
        ratio = by_name[OURS]["ratio_to_best_peer"]
        colour = "green" if ratio < 1 else "red"
        kernel = by_name[OURS]["kernel"] or "none"
        table.add_row(problem, precision, str(batch), *cells, f"[{colour}]{ratio:.2f}[/]", kernel)
    return table


@command
def bench(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    layers: Annotated[
        bool | None,
        typer.Option("--layers/--no-layers", help="Only each convolution by itself, at 224x224; or not on a GPU, too."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch size, or several with commas. [default: 1; cuda: 1,32]")] = "",
    dtype: Annotated[
        str,
        typer.Option(help="fp32, bf16, fp16, on a GPU tf32. [default: fp32,bf16; cuda: fp16,bf16,tf32]"),
    ] = "",
    size: Annotated[int, typer.Option(help="Height and width of the images (not of --layers).")] = 224,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of measuring; fewer if the machine is slow.")] = 10,
    compile: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Also torch.compile; it takes long. [cuda: yes]"),
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, or the backend or kernel that has to run.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Also write a CSV with machine, versions and commit.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write an HTML report with plots, all in one file, and the JSON beside it.")
    ] = None,
) -> None:
    """VGG16-BN features: PyTorch eager, channels_last, torch.compile and vgg-fast in turns, answers checked first.

    With --device cuda also each convolution by itself, cuDNN's benchmark mode, our kernels by name and CUDA graphs.
    """
    check_isa()
    check_size(size)
    where = parse_device(device)
    on_gpu = where.type == "cuda"
    wanted = precisions(dtype or ("fp16,bf16,tf32" if on_gpu else "fp32,bf16"), where)
    batches = parse_positive(batch or ("1,32" if on_gpu else "1"), "--batch")
    if report is not None:
        with user_errors(plots.PlotsUnavailable):
            plots.require()
    check_report(report)
    check_writable(csv)
    check_backend(backend, [precision.dtype for precision in wanted], where)
    options: dict[str, Any] = {"accelerator": partial(accelerate, backend=backend), "device": where}
    options["compiled"] = on_gpu if compile is None else compile
    options["engines"] = _engines(where, backend) if on_gpu else {}
    todo = list(contests(wanted, batches, size, not layers, on_gpu if layers is None else layers, options))
    measured = Measured(where)
    try:
        _measure(measured, todo, rounds, options["compiled"], report)
    except KeyboardInterrupt:
        measured.interrupted = True
    _write(measured, csv, report)
    if measured.interrupted:
        kept = [str(file) for file in (report, csv) if file is not None]
        raise KeyboardInterrupt("interrupted" + f"; {', '.join(kept)}: what was measured until then" * bool(kept))
    _print(measured, json)
    for failure in measured.failures:
        complain(f"not timed: {failure}")
    if measured.failures:
        raise typer.Exit(FAILED)


def _engines(device: torch.device, backend: str) -> dict[str, contest.Engine]:
    architecture = selection.problem_on(torch.float16, device).architecture
    return gpu_peers.engines(gpu_peers.kernels_on(architecture), backend)


def _measure(
    measured: Measured,
    todo: list[tuple[str, Precision, Callable[[], Contest]]],
    rounds: int,
    compiled: bool,
    report: Path | None,
) -> None:
    with progress("bench", len(todo) * (rounds + 2)) as bar:
        if report is not None:
            bar.say("measuring the roofline")
            measured.find_ceilings()
        for number, (what, precision, make) in enumerate(todo):
            bar.say(f"{what}: checking{' and compiling' if compiled else ''}, then measuring")
            with gpu.float32(precision.setting):
                try:
                    measured.run(what, make, rounds, bar.step)
                except RuntimeError as error:
                    if not failures.device_lost(error):
                        raise
                    measured.left_out += [("everybody", w, "the GPU gave up before") for w, _, _ in todo[number + 1 :]]
                    return
            bar.at((number + 1) * (rounds + 2), len(todo) * (rounds + 2))
            if report is not None:  # should the process be ended before its time, this is left
                write_text(report.with_suffix(".json"), to_json(html_report.as_json(measured.results())))


def _write(measured: Measured, csv: Path | None, report: Path | None) -> None:
    results = measured.results()
    if csv is not None:
        with user_errors(OSError):
            host.write_csv(csv, measured.rows)
    if report is not None:
        write_text(report.with_suffix(".json"), to_json(html_report.as_json(results)))
        write_text(report, html_report.page(results))


def _print(measured: Measured, json: bool) -> None:
    results = measured.results()
    if json:
        print_json(html_report.as_json(results))
        return
    if measured.rows:
        show(_table(measured.rows))
    for who, what, why in measured.left_out:
        out.print(f"left out: {plots.title(who)}, {what}: {why}", markup=False)
    here = results.machine
    gpu = f"{here['gpu']}, " if measured.device.type == "cuda" else ""
    out.print(
        f"{gpu}{here['cpu']}, {here['threads']} threads, torch {here['torch']}, commit {here['commit'] or 'unknown'}. "
        "Ratio: ours to the fastest of the others, below 1 is faster. All answers were checked first."
    )
