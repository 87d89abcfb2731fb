"""The benchmark suite, kept alive by its smallest case."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from vgg_fast import selection

ROOT = Path(__file__).parents[1]


def test_one_layer_through_pytest_benchmark(tmp_path):
    table, report = tmp_path / "times.csv", tmp_path / "times.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_conv3x3.py"]
    command += ["--layers=conv5_3", "--dtypes=fp32", "--no-compile", "--rounds=3"]
    # As from a shell: pytest-benchmark measures nothing in what it takes for a worker of pytest-xdist.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, f"--csv={table}", f"--benchmark-json={report}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout

    rows = {row["contestant"]: row for row in csv.DictReader(table.open())}
    assert list(rows) == ["eager", "channels_last", "vgg_fast"]
    assert rows["vgg_fast"]["kernel"] == selection.choose(torch.float32, torch.device("cpu"))
    assert rows["vgg_fast"]["torch"] == torch.__version__

    written = json.loads(report.read_text())
    assert written["machine_info"]["vgg_fast"]["threads"] >= 1
    assert {bench["group"] for bench in written["benchmarks"]} == {"conv5_3+pool float32 batch 1, per image"}
    for bench in written["benchmarks"]:
        row = rows[bench["extra_info"]["contestant"]]
        # pytest-benchmark reports the interleaved samples, in seconds.
        assert bench["stats"]["rounds"] == 3
        assert abs(bench["stats"]["median"] * 1e3 - float(row["median_ms_per_image"])) < 1e-3
