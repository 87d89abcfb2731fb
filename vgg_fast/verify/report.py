"""``vgg-fast verify --report``: one HTML page of verdicts, and the same as JSON, to be sent back in an issue."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vgg_fast.bench.report import document, identity, machine_table, table
from vgg_fast.verify.verdicts import Row

_SHOWN = 20  # misses per row; a kernel that is wrong is wrong a thousand times


def row_as_json(row: Row) -> dict[str, Any]:
    """A verdict as plain data; JSON has no infinity."""
    return {
        "op": row.op,
        "kernel": row.kernel,
        "dtype": row.dtype,
        "problems": row.problems,
        "bit_for_bit": row.exact,
        "worst_error_over_bound": row.worst if math.isfinite(row.worst) else None,
        "worst_error_over_bound_on_border": row.worst_border if math.isfinite(row.worst_border) else None,
        "result": row.result,
        "misses": row.misses,
        "absent": row.absent,
        "unjudged": row.unjudged,
    }


def page(rows: Sequence[Row], machine: Mapping[str, Any], command: str, interrupted: bool) -> str:
    """The HTML page."""
    misses = sum(len(row.misses) for row in rows)
    judged = sum(row.problems for row in rows)
    verdict = f"{judged} results were checked, {misses} are wrong." if misses else f"All of {judged} results are right."
    parts = [
        identity(machine),
        f'<p class="{"bad" if misses else ""}"><strong>{verdict}</strong></p>',
        '<p class="bad"><strong>Interrupted:</strong> only a part was checked.</p>' if interrupted else "",
        f"<section><h2>Against the reference in float64</h2>{_table(rows)}</section>",
        _list("Wrong", [(row, each) for row in rows for each in row.misses[:_SHOWN]], "bad"),
        _list("Did not fit into memory", [(row, each) for row in rows for each in row.unjudged], ""),
        _list("Not here", [(row, row.absent) for row in rows if row.absent], ""),
        machine_table({**machine, "command": command}),
    ]
    return document("vgg-fast against the reference", parts)


def _table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row.absent and not row.problems:
            continue
        random = row.problems > row.exact
        errors = [f"{value:.2f}" if random else "" for value in (row.worst, row.worst_border)]
        result = f'<span class="bad">{row.result}</span>' if row.misses else row.result
        cells = [
            escape(row.kernel),
            row.dtype,
            str(row.problems),
            str(row.exact),
            *errors,
            str(len(row.misses)),
            result,
        ]
        lines.append([escape(row.op), *cells])
    columns = ("op", "kernel", "dtype", "checked", "bit for bit", "error / bound", "on the border", "wrong", "result")
    return table("", columns, lines)


def _list(title: str, found: Sequence[tuple[Row, str]], style: str) -> str:
    if not found:
        return ""
    lines = [[escape(f"{row.op} by {row.kernel} in {row.dtype}"), escape(what)] for row, what in found]
    return f'<section class="text {style}"><h2>{title}</h2>{table("", ("which", "what"), lines)}</section>'
