"""The plots of the report as SVG text: ratios, milliseconds per layer with the roofline, error against time.

Text stays text (searchable, read aloud), colours are CSS variables of the page (light and dark), and every contestant
has a marker or a hatch besides its colour. matplotlib draws; it comes with the ``peers`` extra and is imported late.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vgg_fast.bench.gpu_peers import BENCHMARK
from vgg_fast.bench.peers import CHANNELS_LAST, COMPILED, EAGER, GRAPH, OURS
from vgg_fast.bench.roofline import Ceilings

Row = Mapping[str, Any]

# Contestant -> (CSS variable, stand-in for it while drawing, hatch, marker).
_LOOKS = {
    EAGER: ("--c-eager", "#010101", "", "o"),
    CHANNELS_LAST: ("--c-last", "#010102", "//", "s"),
    COMPILED: ("--c-compile", "#010103", "..", "^"),
    "onnxruntime": ("--c-ort", "#010104", "\\\\", "v"),
    "openvino": ("--c-ov", "#010105", "xx", "D"),
    OURS: ("--c-ours", "#010106", "", "*"),
    # On a GPU; there are no engines beside them whose colours these are.
    BENCHMARK: ("--c-ort", "#010104", "\\\\", "v"),
    BENCHMARK + GRAPH: ("--c-ov", "#010105", "xx", "D"),
    f"{OURS} triton": ("--c-ours", "#010106", "//", "^"),
    f"{OURS} cuda": ("--c-ours", "#010106", "..", "s"),
    f"{OURS} cuda_wgmma": ("--c-ours", "#010106", "\\\\", "D"),
    OURS + GRAPH: ("--c-ours", "#010106", "++", "P"),
}
_OTHER = ("--c-other", "#010107", "++", "P")
_TEXT, _GRID, _PAPER = "#010108", "#010109", "#01010a"
_VARIABLES = {stand_in: name for name, stand_in, *_ in (*_LOOKS.values(), _OTHER)}
_VARIABLES |= {_TEXT: "--text", _GRID: "--grid", _PAPER: "--paper"}

TITLES = {EAGER: "PyTorch eager", CHANNELS_LAST: "PyTorch channels_last", COMPILED: "torch.compile"}
TITLES |= {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", OURS: "vgg-fast"}
TITLES |= {BENCHMARK: "cuDNN benchmark mode", BENCHMARK + GRAPH: "cuDNN benchmark mode" + GRAPH}
TITLES |= {f"{OURS}{rest}": f"vgg-fast{rest}" for rest in (" triton", " cuda", " cuda_wgmma", GRAPH)}


class PlotsUnavailable(Exception):
    """The plotting library is not installed."""


def require() -> None:
    """Says early that there will be no report.

    Raises:
        PlotsUnavailable: naming the extra that installs matplotlib.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PlotsUnavailable("the report needs matplotlib: pip install 'vgg-fast[peers]'") from error


def title(contestant: str) -> str:
    """A contestant's name for people."""
    return TITLES.get(contestant, contestant)


def problem_of(row: Row) -> str:
    """What the contestants of a row had to do, for people.

    Example:
        >>> problem_of({"problem": "features 224", "precision": "fp32", "batch": 1})
        'features 224 · fp32 · batch 1'
    """
    return f"{row['problem']} · {row['precision']} · batch {row['batch']}"


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by :func:`problem_of`, in their order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(problem_of(row), []).append(row)
    return groups


def ratios(rows: Sequence[Row]) -> str:
    """Bars: the time of vgg-fast over that of each peer, with quartiles over the rounds; one group per problem."""
    pyplot = _pyplot()
    lines: list[Row | str] = []
    for problem, group in grouped(rows).items():
        lines += [problem, *sorted((r for r in group if r["contestant"] != OURS), key=lambda r: -r["ratio_of_ours"])]
    figure, axes = pyplot.subplots(figsize=(8.6, 0.9 + 0.3 * len(lines)))
    end = max([1.0] + [row["ratio_high"] for row in rows]) * 1.12
    places, names = [], []
    for y, line in enumerate(lines):
        if isinstance(line, str):
            axes.text(0, y + 0.12, line, ha="left", va="center", weight="bold", color=_TEXT)
            continue
        places.append(y)
        names.append(title(line["contestant"]))
        middle, low, high = (line[key] for key in ("ratio_of_ours", "ratio_low", "ratio_high"))
        axes.barh(y, middle, height=0.68, **_fill(line["contestant"]))
        axes.errorbar(middle, y, xerr=[[middle - low], [high - middle]], color=_TEXT, capsize=2.5, lw=1.2)
        axes.text(high + end * 0.012, y, f"{middle:.2f}", va="center", color=_TEXT)
    axes.axvline(1, color=_TEXT, lw=1.2, ls="--", zorder=0)
    axes.set_yticks(places, names)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlim(0, end)
    axes.set_xlabel("time of vgg-fast / time of the peer, median over rounds (below 1: vgg-fast is faster)")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    return _svg(figure, "ratios", "Bars of the ratio of vgg-fast's time to each peer's; the numbers are in the table.")


def layers(rows: Sequence[Row], ceilings: Ceilings | None, identity: str) -> str:
    """Bars per convolution, ours beside channels_last, and the floor of this machine as a line across each pair.

    Args:
        rows: of one precision and batch.
        ceilings: None draws no floor.
        identity: makes the ids in the SVG unique on the page.
    """
    pyplot = _pyplot()
    problems = list(grouped(rows).values())
    figure, axes = pyplot.subplots(figsize=(8.6, 3.9))
    shown = [CHANNELS_LAST, OURS]
    width = 0.38
    for i, contestant in enumerate(shown):
        heights = [next(r["median_ms_per_image"] for r in group if r["contestant"] == contestant) for group in problems]
        places = [x + (i - 0.5) * width for x in range(len(problems))]
        axes.bar(places, heights, width, label=title(contestant), **_fill(contestant))
    if ceilings:
        floors = [floor_of(group[0], ceilings) for group in problems]
        ends = [(x - 0.46, x + 0.46) for x in range(len(problems))]
        axes.hlines(floors, *zip(*ends, strict=True), color=_PAPER, lw=4)  # a rim, to be seen on the bars
        axes.hlines(floors, *zip(*ends, strict=True), color=_TEXT, lw=1.8, label="floor of direct convolution here")
    axes.set_xticks(range(len(problems)), [group[0]["problem"].replace("+pool", "\n+pool") for group in problems])
    axes.tick_params(axis="x", length=0, labelsize=8)
    axes.set_xlim(-0.6, len(problems) - 0.4)
    axes.set_ylabel("ms per image, median")
    axes.grid(axis="y")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    return _svg(figure, identity, "Bars of milliseconds per convolution with the floor of this machine.")


def floor_of(row: Row, ceilings: Ceilings) -> float:
    """Milliseconds per image below which a layer's direct convolution cannot come."""
    return ceilings.floor_ms(row["precision"], row["gflop_per_image"], row["megabytes_per_image"])


def scatter(rows: Sequence[Row]) -> str:
    """Error against time, both logarithmic: one panel per problem and batch, one marker per contestant and precision.

    A precision lowers both, so that panels show precisions together: filled fp32, hollow the others.
    """
    pyplot = _pyplot()
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(f"{row['problem']} · batch {row['batch']}", []).append(row)
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(8.6, 0.7 + 3.1 * lines), squeeze=False)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    cells = list(grid.flat)
    styles: dict[str, str] = {}
    faces = ["full", "none", "left", "top"]  # matplotlib's fill styles, in the order in which precisions appear
    contestants: dict[str, None] = {}
    for axes, (name, points) in zip(cells, panels.items(), strict=False):
        for row in points:
            style = styles.setdefault(row["precision"], faces[len(styles) % len(faces)])
            contestants[row["contestant"]] = None
            error = max(row["relative_error"], 1e-9)
            axes.plot(row["median_ms_per_image"], error, ls="", **_marker(row["contestant"], style))
        axes.set(xscale="log", yscale="log", title=name)
        axes.set_xlabel("ms per image, median")
        axes.set_ylabel("relative error (float64 = 0)")
        axes.margins(0.15)
        _plain_ticks(axes, [row["median_ms_per_image"] for row in points])
        axes.grid()
    for axes in cells[len(panels) :]:
        axes.remove()
    new = _line()
    handles = [new(_marker(c, "full"), title(c)) for c in contestants]
    handles += [new({**_marker("", style), "marker": "o", "color": _TEXT}, p) for p, style in styles.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return _svg(figure, "scatter", "Error against time, a point per contestant; the numbers are in the table.")


def _plain_ticks(axes: Any, values: Sequence[float]) -> None:
    """A few milliseconds as people write them; a logarithmic axis within one decade would have one label or a crowd."""
    low, high = math.log10(min(values)), math.log10(max(values))
    low, high = low - 0.15 * (high - low) - 0.02, high + 0.15 * (high - low) + 0.02
    steps = [1, 2, 5] if high - low < 1.6 else [1]
    ticks = [s * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for s in steps]
    ticks = [t for t in ticks if low <= math.log10(t) <= high]
    if len(ticks) < 2:
        ticks = sorted({float(f"{10**v:.2g}") for v in (low, (low + high) / 2, high)})
    axes.set_xlim(10**low, 10**high)
    axes.set_xticks(ticks, [f"{t:.3g}" for t in ticks])
    axes.set_xticks([], minor=True)


# --- matplotlib -----------------------------------------------------------------------------------------------------


def _pyplot() -> Any:
    require()
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Reset, so that nobody's matplotlibrc shows up in a report.
    pyplot.rcdefaults()
    pyplot.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "vgg-fast",
            "font.family": ["DejaVu Sans"],  # whose widths matplotlib knows; the page asks for it first, too
            "font.size": 9.5,
            "axes.titlesize": 9.5,
            "axes.titleweight": "bold",
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "text.color": _TEXT,
            "axes.labelcolor": _TEXT,
            "axes.edgecolor": _GRID,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": _TEXT,
            "ytick.color": _TEXT,
            "grid.color": _GRID,
            "grid.linewidth": 0.6,
            "hatch.linewidth": 0.8,
            "figure.constrained_layout.use": True,
        }
    )
    return pyplot


def _fill(contestant: str) -> dict[str, Any]:
    _, colour, hatch, _ = _LOOKS.get(contestant, _OTHER)
    return {"facecolor": colour, "hatch": hatch, "edgecolor": _PAPER, "linewidth": 0}


def _marker(contestant: str, style: str) -> dict[str, Any]:
    _, colour, _, marker = _LOOKS.get(contestant, _OTHER)
    size = 12 if marker == "*" else 8
    return {
        "marker": marker,
        "color": colour,
        "fillstyle": style,
        "markersize": size,
        "markeredgewidth": 1.6,
        "markerfacecoloralt": "none",
    }


def _line() -> Any:
    from matplotlib.lines import Line2D

    return lambda marker, label: Line2D([], [], ls="", label=label, **marker)


def _svg(figure: Any, identity: str, description: str) -> str:
    from matplotlib import pyplot

    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    pyplot.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # Several drawings share the page: ids must not collide.
    svg = re.sub(r'\bid="', f'id="{identity}-', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\1#{identity}-", svg)
    for stand_in, name in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var({name})")
    label = html.escape(description, quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
