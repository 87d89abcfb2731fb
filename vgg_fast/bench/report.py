"""The benchmark report: one HTML file with plots and tables that needs nothing but a browser."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from vgg_fast.bench import plots, scaling
from vgg_fast.bench.peers import OURS
from vgg_fast.bench.plots import Row
from vgg_fast.bench.roofline import Ceilings


@dataclass(frozen=True)
class Results:
    """What a report shows.

    Attributes:
        rows: of :meth:`vgg_fast.bench.contest.Contest.rows`; those with ``gflop_per_image`` are single layers.
        machine: of :func:`vgg_fast.bench.host.describe`, and whatever else belongs beside it.
        ceilings: of this machine, or None.
        measured: ceilings measured on a GPU whose ``ceilings`` are its data sheet's.
        launches: of :meth:`vgg_fast.bench.contest.Contest.launches`.
        clocks: per problem what :class:`vgg_fast.gpu.Clocks` says, with ``problem`` and ``precision``.
        left_out: (contestant, problem, reason).
        failures: problems that were not timed because our answer was wrong.
        command: that made the report.
        interrupted: it is a part of what was to be measured.
    """

    rows: Sequence[Row]
    machine: Mapping[str, Any]
    ceilings: Ceilings | None = None
    left_out: Sequence[tuple[str, str, str]] = ()
    failures: Sequence[str] = ()
    command: str = ""
    measured: Ceilings | None = None
    launches: Sequence[Row] = ()
    clocks: Sequence[Mapping[str, Any]] = ()
    interrupted: bool = False
    whole: list[Row] = field(init=False)
    layers: list[Row] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "whole", [r for r in self.rows if r["gflop_per_image"] is None])
        object.__setattr__(self, "layers", [r for r in self.rows if r["gflop_per_image"] is not None])


def as_json(results: Results) -> dict[str, Any]:
    """All of it as plain data; layers with their share of either roofline."""
    rows = [{**row, **shares(row, results)} for row in results.rows]
    ceilings = {"used": results.ceilings, "measured": results.measured}
    return {
        "interrupted": results.interrupted,
        "command": results.command,
        "machine": dict(results.machine),
        "ceilings": {name: asdict(value) for name, value in ceilings.items() if value},
        "rows": rows,
        "launches": list(results.launches),
        "clocks": list(results.clocks),
        "left_out": [dict(zip(("contestant", "problem", "reason"), each, strict=True)) for each in results.left_out],
        "failures": list(results.failures),
    }


def shares(row: Row, results: Results) -> dict[str, float]:
    """A layer's floor over its time, for the ceilings there are; empty for what is not a layer."""
    if row["gflop_per_image"] is None:
        return {}
    named = {"share_of_roofline": results.ceilings, "share_of_measured_roofline": results.measured}
    time = row["median_ms_per_image"]
    return {name: round(plots.floor_of(row, each) / time, 4) for name, each in named.items() if each and time}


def write(path: str | os.PathLike[str], results: Results) -> None:
    """Writes the report as one self-contained file.

    Args:
        path: replaced if it exists.
        results: at least the rows of one problem make a plot; without any there is only the machine.

    Raises:
        PlotsUnavailable: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    Path(path).write_text(page(results), encoding="utf-8")


def page(results: Results) -> str:
    """The HTML of :func:`write`."""
    parts = [_head(results), *_notices(results)]
    if results.whole:
        parts += [
            "<section><h2>How long vgg-fast takes, compared with each peer</h2>",
            _figure(
                plots.ratios(results.whole),
                "Bars: median of the ratio taken round by round. Whiskers: its quartiles. Left of the dashed line "
                "vgg-fast is faster.",
            ),
            _times(results.whole),
            "</section><section><h2>Error against time</h2>",
            _figure(
                plots.scatter(results.whole),
                "Relative error of the answer (norm) against the same weights and input in float64. Lower left is "
                "better. For the numbers see the table above.",
            ),
            "</section>",
        ]
    for number, (name, rows) in enumerate(_by_precision(results.layers).items()):
        parts += [
            f"<section><h2>Layer by layer: {escape(name)}</h2>",
            _figure(plots.layers(rows, results.ceilings, f"layers{number}"), _about_floor(results.ceilings)),
            _layer_table(rows, results),
            "</section>",
        ]
    parts += [_scaling(results.whole), _launches(results), _clocks(results), _left_out(results), _machine(results)]
    return document("vgg-fast and its peers", parts)


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page of these pieces of HTML, with the style inside; empty pieces are left out."""
    head = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<main>
<h1>{escape(title)}</h1>"""
    return "\n".join([head, *(part for part in parts if part), "</main></html>"])


def identity(machine: Mapping[str, Any]) -> str:
    """Where, with which software and when, as a paragraph."""
    cap = f", capped to {machine['isa_cap']}" if machine.get("isa_cap") else ""
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    gpu = f"{machine['gpu']}, " if machine.get("capability") else ""
    summary = f"{gpu}{machine['cpu']}, {threads}{cap}, PyTorch {machine['torch']}, vgg-fast {machine['vgg_fast']}"
    commit = escape(str(machine["commit"] or "unknown"))
    return f"<p>{escape(summary)}. {escape(str(machine['date']))}, commit <code>{commit}</code>.</p>"


def _head(results: Results) -> str:
    return f"""{identity(results.machine)}
<p>All contestants ran in one process with the same number of threads and took turns, round by round. Every answer was
checked against float64 before anything was timed. Times on a shared machine drift; ratios within a run do not.</p>"""


def _notices(results: Results) -> list[str]:
    interrupted = ['<p class="bad"><strong>Interrupted:</strong> only a part of what was to be measured is here.</p>']
    return (interrupted if results.interrupted else []) + [
        f'<p class="bad"><strong>Not timed:</strong> {escape(failure)}</p>' for failure in results.failures
    ]


def _figure(svg: str, caption: str) -> str:
    return f'<figure><div class="wide" tabindex="0">{svg}</div><figcaption>{escape(caption)}</figcaption></figure>'


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], ours: Sequence[bool] = ()) -> str:
    """Cells are HTML; the first one of a row is its header, all from the third on are numbers."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = []
    for i, (first, *rest) in enumerate(rows):
        mark = ' class="ours"' if i < len(ours) and ours[i] else ""
        body.append(f'<tr{mark}><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>")
    return (
        f'<div class="wide" tabindex="0"><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def milliseconds(value: float) -> str:
    """Two decimals, and more for what a GPU does in microseconds.

    Example:
        >>> milliseconds(12.345), milliseconds(0.0123456)
        ('12.35', '0.0123')
    """
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _times(rows: Sequence[Row]) -> str:
    lines, ours = [], []
    for problem, group in plots.grouped(rows).items():
        for row in group:
            mine = row["contestant"] == OURS
            kernel = f" <small>{escape(row['kernel'] or 'nothing fused')}</small>" if mine else ""
            quartiles = f"{row['ratio_low']:.2f}&#8239;&ndash;&#8239;{row['ratio_high']:.2f}"
            cells = [milliseconds(row["median_ms_per_image"]), milliseconds(row["min_ms_per_image"])]
            cells += ["", ""] if mine else [f"{row['ratio_of_ours']:.2f}", quartiles]
            error = f"{row['relative_error']:.1e}"
            lines.append([escape(problem), escape(plots.title(row["contestant"])) + kernel, *cells, error])
            ours.append(mine)
    columns = ("problem", "contestant", "median ms", "min ms", "ratio of vgg-fast", "quartiles", "relative error")
    return table("Milliseconds per image", columns, lines, ours)


def _by_precision(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row['precision']}, batch {row['batch']}", []).append(row)
    return groups


def _about_floor(ceilings: Ceilings | None) -> str:
    if ceilings is None:
        return "Each convolution of VGG16-BN at 224x224 with its batch-norm, ReLU and pool."
    peaks = ", ".join(f"{name} {gflops:,.0f} GFLOP/s" for name, gflops in ceilings.gflops.items())
    return (
        "Each convolution of VGG16-BN at 224x224 with its batch-norm, ReLU and pool. The line is the roofline: the "
        f"larger of arithmetic and memory traffic at the ceilings {peaks}, {ceilings.gbytes:.1f} GB/s, {ceilings.how}. "
        "It is the floor of direct convolution with its maps in memory at those ceilings: Winograd (fewer "
        "multiplications), AMX standing in for fp32, maps that stay in a cache and a kernel better than torch.mm may "
        "go below it."
    )


def _layer_table(rows: Sequence[Row], results: Results) -> str:
    ceilings = results.ceilings
    shown = list(dict.fromkeys(row["contestant"] for row in rows))
    lines = []
    for group in plots.grouped(rows).values():
        by_name = {row["contestant"]: row for row in group}
        ours = by_name[OURS]
        cells = [f"{by_name[name]['median_ms_per_image']:.4g}" if name in by_name else "" for name in shown]
        gflops = ours["gflop_per_image"] / ours["median_ms_per_image"] * 1e3
        cells += [f"{gflops:,.0f}"]
        cells += [f"{plots.floor_of(ours, ceilings):.4g}"] if ceilings else []
        cells += [f"{share:.0%}" for share in shares(ours, results).values()]
        cells += [f"{ours['ratio_to_best_peer']:.2f}", f"{ours['relative_error']:.1e}"]
        lines.append([escape(ours["problem"]), escape(ours["kernel"] or "nothing fused"), *cells])
    columns = ["layer", "kernel", *(f"{plots.title(name)} ms" for name in shown), "vgg-fast GFLOP/s"]
    columns += ["floor ms", "floor / vgg-fast"] if ceilings else []
    columns += ["measured floor / vgg-fast"] if results.measured else []
    columns += ["ratio to the best peer", "relative error"]
    return table("Median milliseconds per image and layer", columns, lines)


def _scaling(rows: Sequence[Row]) -> str:
    found = scaling.summaries(rows)
    if not found:
        return ""
    batches = list(dict.fromkeys(batch for each in found for batch in each.milliseconds))
    lines = [
        [each.precision, escape(plots.title(each.contestant)), f"{each.speedup:.2f}"]
        + [f"{each.milliseconds[batch]:.2f}" if batch in each.milliseconds else "" for batch in batches]
        + [f"{each.growth:.3f}"]
        for each in found
    ]
    columns = ["precision", "contestant", "1 thread / all", *(f"batch {batch}" for batch in batches), "growth"]
    caption = (
        "Time with one thread over that with all; median ms per image by batch; the largest over that of a smaller"
    )
    ours = [each.contestant == OURS for each in found]
    return f"<section><h2>Threads and batches</h2>{table(caption, columns, lines, ours)}</section>"


def _launches(results: Results) -> str:
    """Where the second time is hardly longer than the first, the GPU waits for the calls."""
    if not results.launches:
        return ""
    lines = []
    for row in results.launches:
        cells = [f"{row[key]:.4g}" for key in ("returns_ms", "done_ms")]
        share = f"{row['returns_ms'] / row['done_ms']:.0%}" if row["done_ms"] else ""
        lines.append([escape(plots.problem_of(row)), escape(plots.title(row["contestant"])), *cells, share])
    columns = ("problem", "contestant", "ms until it returns", "ms until it is done", "share")
    about = "Ten calls in a row without waiting: what Python, PyTorch and the driver take, and the whole, per call"
    return f"<section><h2>Launch overhead</h2>{table(about, columns, lines)}</section>"


def _clocks(results: Results) -> str:
    if not results.clocks:
        return ""
    keys = [key for key in results.clocks[0] if key not in ("problem", "precision", "batch")]
    lines = [
        [escape(plots.problem_of(each)), *(escape("" if each[key] is None else str(each[key])) for key in keys)]
        for each in results.clocks
    ]
    columns = ["problem", *(key.replace("_", " ") for key in keys)]
    about = "Asked of nvidia-smi right after each problem was timed, while vgg-fast's call went on"
    return f'<section class="text"><h2>Clocks</h2>{table(about, columns, lines)}</section>'


def _left_out(results: Results) -> str:
    if not results.left_out:
        return ""
    lines = [[escape(plots.title(who)), escape(what), escape(why)] for who, what, why in results.left_out]
    found = table("", ("contestant", "problem", "reason"), lines)
    return f'<section class="text"><h2>Who was left out, and why</h2>{found}</section>'


def _ceiling_facts(what: str, ceilings: Ceilings) -> dict[str, str]:
    facts = {f"{what} {name}": f"{value:,.0f} GFLOP/s" for name, value in ceilings.gflops.items()}
    return {**facts, f"{what} memory": f"{ceilings.gbytes:.1f} GB/s", f"{what}s": ceilings.how}


def _machine(results: Results) -> str:
    facts = {**results.machine}
    if results.ceilings:
        facts |= _ceiling_facts("ceiling", results.ceilings)
    if results.measured:
        facts |= _ceiling_facts("measured ceiling", results.measured)
    if results.command:
        facts["command"] = results.command
    return machine_table(facts)


def machine_table(facts: Mapping[str, Any]) -> str:
    """A section that lists what is known of the machine and of the run."""
    lines = [[escape(str(k)), escape("none" if v is None else str(v))] for k, v in facts.items()]
    return f'<section class="text"><h2>Machine and versions</h2>{table("", ("what", "value"), lines)}</section>'


# Colours after Okabe and Ito, darker on paper and lighter on black until each has a contrast of 3 against it.
_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --text: #1b1f24; --dim: #57606a; --grid: #d0d7de;
  --ours-row: #fff3e6; --bad: #b3261e; --c-eager: #6e7781; --c-last: #0072b2; --c-compile: #00855f;
  --c-ort: #a8588a; --c-ov: #8a7400; --c-ours: #d04a00; --c-other: #4b5563; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --text: #e6e9ed; --dim: #a3adb8; --grid: #3a424b;
  --ours-row: #3a2614; --bad: #ff8a80; --c-eager: #9aa4ae; --c-last: #56b4e9; --c-compile: #2fc79a; --c-ort: #e09cc5;
  --c-ov: #e0d040; --c-ours: #ff8a3d; --c-other: #b0bac5; } }
body { margin: 0; background: var(--paper); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
p { max-width: 46rem; }
code { overflow-wrap: anywhere; }
figure { margin: 0 0 1.25rem; }
figcaption { color: var(--dim); font-size: .875rem; max-width: 46rem; }
.wide { overflow-x: auto; }
.wide:focus-visible { outline: 2px solid var(--c-last); }
svg text { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; stroke-linejoin: round; }
svg { display: block; width: 100%; min-width: 40rem; height: auto; }
table { border-collapse: collapse; font-size: .875rem; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; }
caption:empty { display: none; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--grid); text-align: right; vertical-align: top; }
thead th { border-bottom: 2px solid var(--dim); vertical-align: bottom; }
th[scope=row], td:nth-child(2), th:nth-child(1), th:nth-child(2) { text-align: left; }
th[scope=row] { font-weight: 400; }
th[scope=row], td { white-space: nowrap; }
tr.ours { background: var(--ours-row); font-weight: 600; }
.text td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.text thead th { text-align: left; }
small { color: var(--dim); font-weight: 400; }
.bad { color: var(--bad); }
@media print { .wide { overflow: visible; } svg { min-width: 0; } section { break-inside: avoid; } }
"""
