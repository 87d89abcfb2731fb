"""What the benchmark files share: options, interleaved measuring, and reports with machine, versions and commit.

    python -m pytest benchmarks/bench_*.py [--benchmark-json=FILE] [--csv=FILE]

pytest-benchmark times one test after the other: minutes lie between contestants, and on a shared machine the load of
those minutes is what it would compare. Here the first test of a problem measures *all* its contestants in turns
(vgg_fast.bench.measure.interleave), after the answers have been checked, and each test then replays its own samples
through pytest-benchmark's clock. So its table, JSON and comparisons show interleaved measurements, per image.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from vgg_fast.bench import host
from vgg_fast.bench.contest import Contest
from vgg_fast.bench.measure import Timing
from vgg_fast.bench.peers import CHANNELS_LAST, COMPILED, DTYPES, EAGER, LAYERS, OURS

_rows = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vgg-fast")
    group.addoption("--rounds", type=int, default=8, help="rounds of measuring (default: %(default)s)")
    group.addoption("--dtypes", default="fp32,bf16", help="of fp32, bf16, fp16 (default: %(default)s)")
    group.addoption("--batches", default="1", help="batch sizes (default: %(default)s)")
    group.addoption("--layers", default=",".join(e.name for e in LAYERS), help="of the per-layer benchmark")
    group.addoption("--no-compile", action="store_true", help="without torch.compile, which takes most of the time")
    group.addoption("--csv", help="write a CSV with machine, versions and commit to this file")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The contestant varies fastest, so that those of one problem run together."""
    option = metafunc.config.getoption
    known = {entry.name: entry for entry in LAYERS}
    contestants = [EAGER, CHANNELS_LAST, *([] if option("--no-compile") else [COMPILED]), OURS]
    choices: dict[str, dict[str, Any]] = {
        "layer": {name: _known(known, name, "--layers") for name in option("--layers").split(",")},
        "dtype": {name: _known(DTYPES, name, "--dtypes") for name in option("--dtypes").split(",")},
        "batch": {f"batch{b}": int(b) for b in option("--batches").split(",")},
        "contestant": {name: name for name in contestants},
    }
    for name, values in choices.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, list(values.values()), ids=list(values))


def _known(table: dict[str, Any], name: str, option: str) -> Any:
    if name not in table:
        raise pytest.UsageError(f"{option}: there is no {name!r}; choose from {', '.join(table)}")
    return table[name]


class _Clock:
    """pytest-benchmark's timer: it stands still until a sample is replayed."""

    __name__ = "replay"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, seconds: Iterator[float]) -> None:
        self.now += next(seconds)


replay_clock = _Clock()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "report" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=replay_clock))


@pytest.fixture
def compiled(request: pytest.FixtureRequest) -> bool:
    """Whether torch.compile takes part."""
    return not request.config.getoption("--no-compile")


Measured = tuple[list[dict[str, Any]], dict[str, Timing]]


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Callable[[Callable[[], Contest], tuple[Any, ...]], Measured]:
    """``measured(make, key)`` builds, checks and times the contest of ``key`` once and returns its rows and timings."""
    results: dict[tuple[Any, ...], Measured] = {}
    rows = request.config.stash.setdefault(_rows, [])

    def get(make: Callable[[], Contest], key: tuple[Any, ...]) -> Measured:
        if key not in results:
            contest = make()
            timings = contest.time(request.config.getoption("--rounds"), budget_s=10)
            results[key] = contest.rows(timings), timings
            rows.extend(results[key][0])
        return results[key]

    return get


@pytest.fixture
def report(benchmark: Any, measured: Any) -> Callable[..., None]:
    """``report(make, key, contestant)`` hands the contestant's samples to pytest-benchmark."""

    def run(make: Callable[[], Contest], key: tuple[Any, ...], contestant: str) -> None:
        rows, timings = measured(make, key)
        row = next(row for row in rows if row["contestant"] == contestant)
        benchmark.group = f"{row['problem']} {row['dtype']} batch {row['batch']}, per image"
        benchmark.extra_info.update({k: v for k, v in row.items() if v is not None})
        seconds = itertools.cycle([ms / 1e3 for ms in timings[contestant].milliseconds])
        benchmark.pedantic(replay_clock.replay, args=(seconds,), rounds=len(timings[contestant].milliseconds))

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["vgg_fast"] = host.describe()


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--csv")
    if path:
        rows: list[dict[str, Any]] = session.config.stash.get(_rows, [])
        host.write_csv(path, rows)


def pytest_report_header() -> str:
    here = host.describe()
    return f"vgg-fast: {here['cpu']}, {here['threads']} threads, torch {torch.__version__}, commit {here['commit']}"
