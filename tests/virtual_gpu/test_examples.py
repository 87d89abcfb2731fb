"""docs/virtual-gpu.md shows what its commands print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.virtual_gpu import cases
from tests.virtual_gpu.examples import box3

PAGE = (cases.ROOT / "docs" / "virtual-gpu.md").read_text()
SOURCE = cases.ROOT / "tests" / "virtual_gpu" / "examples" / "box3.cu"


@pytest.fixture(autouse=True)
def _nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    if cases.find_nvcc() is None:
        pytest.skip("no nvcc to compile the example with")
    monkeypatch.chdir(cases.ROOT)


def test_the_planted_race_is_reported_as_the_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    box3.main()
    shown = re.search(r"\$ python -m tests.virtual_gpu.examples.box3\n(.*?)```", PAGE, re.S)
    assert shown is not None

    def comparable(text: str) -> str:  # names and numbers in PTX are another nvcc's choice
        return re.sub(r"PTX line \d+: (\w+\.shared).*", r"PTX: \1", text)

    assert comparable(capsys.readouterr().out) == comparable(shown[1])


def test_the_page_shows_the_kernel() -> None:
    shown = re.search(r"```cuda\n(.*?)```", PAGE, re.S)
    assert shown is not None
    assert all(f"  {line}\n" in SOURCE.read_text() for line in shown[1].splitlines())


def test_the_cure_cures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cured = tmp_path / "box3.cu"
    cured.write_text(SOURCE.read_text().replace("line[i + 2];", "line[i + 2];\n    __syncthreads();"))
    box3.main(cured)
    assert capsys.readouterr().out == "right\n"
