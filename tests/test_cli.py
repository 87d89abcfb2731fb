"""The command line as a user meets it: results, JSON, one-line errors, Ctrl-C."""

from __future__ import annotations

import csv
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

from vgg_fast import __version__, selection
from vgg_fast.bench import peers
from vgg_fast.cli import app, photos
from vgg_fast.cli.demo import top5_agree
from vgg_fast.gpu import winners
from vgg_fast.models.weights import save_weights

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    problem = result.exception if not isinstance(result.exception, SystemExit) else None
    assert result.exit_code == code, f"{result.output}\n{problem!r}"
    return result


def run_json(*arguments: object, code: int = 0):
    return json.loads(run(*arguments, "--json", code=code).stdout)


def user_error(*arguments: object) -> str:
    """The one line on stderr that exit code 2 comes with."""
    result = run(*arguments, code=2)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def photo(tmp_path):
    """A picture that is not square, with structure at every scale."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 300), torch.linspace(0, 1, 420), indexing="ij")
    noise = torch.rand(300, 420, 3, generator=torch.Generator().manual_seed(0))
    pixels = torch.stack([x, y, (20 * x * y).sin().abs()], 2) * 0.8 + noise * 0.2
    path = tmp_path / "photo.png"
    Image.fromarray((pixels * 255).byte().numpy()).save(path)
    return path


def test_version_and_commands():
    assert run("--version").stdout.strip() == f"vgg-fast {__version__}"
    for command in ("demo", "explain", "doctor", "verify", "bench", "convert"):
        assert command in run("--help").stdout
        run(command, "--help")


# --- demo -----------------------------------------------------------------------------------------------------------


def test_demo(photo):
    """Both dtypes on one photograph, and every number that JSON promises."""
    report = run_json("demo", photo, "--rounds", 1)
    assert report["images"] == [str(photo)]
    assert report["machine"]["torch"] == torch.__version__
    assert [result["dtype"] for result in report["results"]] == ["fp32", "bf16"]
    for result, dtype in zip(report["results"], (torch.float32, torch.bfloat16), strict=True):
        assert result["kernels"] == sorted({selection.choose(dtype, CPU), selection.choose_linear(dtype, CPU)})
        assert result["passed"]
        assert result["top5_agree"]
        error = result["relative_error"]
        assert 0 < error["ours"] <= error["allowed"] == peers.ERROR_FACTOR[dtype] * error["pytorch"]
        for five in (result["exact_top5"], result["pytorch_top5"], result["ours_top5"]):
            assert len(five) == 1
            assert len(set(five[0])) == 5
        for part in ("model", "features"):
            assert set(result["ms_per_image"][part]) == {"eager", "channels_last", "vgg_fast"}
            assert all(0 < t["min"] <= t["median"] for t in result["ms_per_image"][part].values())
            assert result["speedup_over_best"][part] > 0
    # In fp32 neighbouring logits of 1000 classes are thousands of errors apart.
    assert report["results"][0]["ours_top5"] == report["results"][0]["exact_top5"]


@pytest.fixture
def weight_file(tmp_path):
    """A ten-class vgg16_bn in 60 MB instead of 550: a dense layer's storage is one row or column, seen as a matrix."""
    state = peers.plain_features().state_dict(prefix="features.")
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, 25088, generator=generator) / 25088**0.5
    column = torch.randn(4096, 1, generator=generator) / 4096
    state |= {"classifier.0.weight": row.expand(4096, -1), "classifier.0.bias": torch.ones(4096)}
    state |= {"classifier.3.weight": column.expand(-1, 4096), "classifier.3.bias": torch.zeros(4096)}
    state |= {
        "classifier.6.weight": torch.randn(10, 4096, generator=generator),
        "classifier.6.bias": torch.arange(10.0),
    }
    path = tmp_path / "ten_classes.pth"
    torch.save(state, path)
    return path


def test_demo_with_weights_of_a_file(photo, weight_file):
    out = run("demo", photo, "--weights", weight_file, "--dtype", "bf16", "--rounds", 1).stdout
    assert "photo.png" in out
    assert selection.choose(torch.bfloat16, CPU) in out
    assert "agree" in out
    assert "speed-up" in out
    assert "random" not in out, "the weights are the user's"


def test_demo_fails_if_the_answers_do_not_agree(photo, weight_file):
    """Broken weights: NaN agrees with nothing, and JSON has no NaN."""
    state = torch.load(weight_file, weights_only=True)
    state["classifier.6.bias"][3] = float("nan")
    torch.save(state, weight_file)
    result = run("demo", photo, "--weights", weight_file, "--dtype", "bf16", "--rounds", 1, "--json", code=1)
    assert "differ" in result.stderr
    (report,) = json.loads(result.stdout)["results"]
    assert not report["passed"]
    assert report["relative_error"]["ours"] is None


def test_top5_may_differ_where_classes_are_closer_than_the_error():
    exact = torch.tensor([[9.0, 8, 7, 6, 5, 5 - 1e-6, 1]], dtype=torch.float64)
    swapped = exact[:, [0, 1, 2, 3, 5, 4, 6]]
    assert top5_agree(exact, exact, 0)
    assert top5_agree(swapped, exact, 1e-6)
    assert not top5_agree(swapped, exact, 1e-7)
    assert not top5_agree(exact.flip(1), exact, 0.1)
    assert top5_agree(exact[:, :3], exact[:, :3], 0), "fewer than five classes"
    assert not top5_agree(exact * float("nan"), exact * float("nan"), 1)


def test_photographs_are_prepared_as_torchvision_does(photo):
    """Against PyTorch's own antialiased resize; Pillow rounds to whole numbers twice."""
    pixels = torch.from_numpy(numpy.array(Image.open(photo))).permute(2, 0, 1)[None] / 255
    resized = F.interpolate(pixels, size=(256, 358), mode="bilinear", antialias=True)  # int(256 * 420 / 300) = 358
    cropped = resized[0, :, 16:240, 67:291]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (cropped - mean[:, None, None]) / std[:, None, None]
    actual = photos.read(photo)
    assert actual.shape == (3, 224, 224)
    assert (actual - expected).abs().max() <= 1.5 / 255 / 0.224


def test_shipped_photographs():
    pytest.importorskip("skimage", reason="scikit-image, which ships the photographs, is not installed")
    assert [path.name for path in photos.shipped()] == ["astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg"]
    for path in photos.shipped():
        image = photos.read(path)
        assert image.std() > 0.3, f"{path} is not a photograph"


def test_without_photographs_the_user_is_told_what_to_do():
    with pytest.raises(photos.PhotoError, match="name image files"):
        photos.shipped([("no_such_package", "data", ["a.png"])])


def test_demo_wants_images(tmp_path, photo):
    assert "no such file" in user_error("demo", tmp_path / "none.jpg")
    assert "folder" in user_error("demo", tmp_path)
    assert "not an image" in user_error("demo", __file__)
    data = photo.read_bytes()
    photo.write_bytes(data[: len(data) // 2])
    assert str(photo) in user_error("demo", photo)
    strip = tmp_path / "strip.png"
    Image.new("RGB", (1000, 2)).save(strip)
    assert "1000x2" in user_error("demo", strip)


# --- the other commands ---------------------------------------------------------------------------------------------


def test_explain_our_models():
    out = run("explain", "vgg11", "--size", 64, "--dtype", "bf16").stdout
    assert selection.choose(torch.bfloat16, CPU) in out
    assert "features.0" in out
    assert "AdaptiveAvgPool2d is not a type that is fused" in out


def test_explain_a_model_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "own_model.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2))\n"
        "def broken():\n"
        "    raise ValueError('no licence')\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    out = run("explain", "own_model:make", "--size", 9, "--channels", 1).stdout
    assert "stride=(2, 2)" in out
    assert "2 of 3 layers" in out
    assert "does not take an image of 1x3x9x9" in user_error("explain", "own_model:make", "--size", 9)
    assert "ValueError: no licence" in user_error("explain", "own_model:broken")
    assert "is a int" in user_error("explain", "own_model:number")
    assert "no attribute 'nothing'" in user_error("explain", "own_model:nothing")
    assert "no_such_module" in user_error("explain", "no_such_module:make")
    assert "not a torch.nn.Module" in user_error("explain", "os:getcwd")
    sys.modules.pop("own_model")


def test_doctor():
    report = run_json("doctor")
    found = {finding["what"]: finding for finding in report["findings"]}
    assert torch.__version__ in found["PyTorch"]["found"]
    assert found["compiled CPU kernels"]["state"] == "ok"
    assert found["CPU flags"]["found"] in (torch.ops.vgg_fast.cpu_flags(), "none that a kernel asks for")
    for kernel in selection.cpu_kernels():
        assert found[f"kernel {kernel}"]["state"] in ("ok", "absent")
    assert found["auto, fp32 on the CPU"]["found"] == selection.choose(torch.float32, CPU)
    assert {"GPU", "nvcc", "Triton", "C++ compiler"} <= set(found) | ({"GPU"} if "GPU 0" in found else set())
    for finding in report["findings"]:
        assert finding["found"], f"{finding['what']}: a reason or a description is missing"
    assert "portable_f32" in run("doctor").stdout


def test_doctor_under_a_cap(monkeypatch):
    monkeypatch.setenv("VGG_FAST_ISA", "portable")
    found = {finding["what"]: finding for finding in run_json("doctor")["findings"]}
    assert found["auto, bf16 on the CPU"]["found"] == "portable_f32"
    assert found["kernel avx2_f32"]["state"] == "absent"
    assert "avx2" in found["kernel avx2_f32"]["found"]


def test_doctor_on_timings(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    folder = winners.default_folder()
    winners.Winners(folder).write("question", "triton", {"triton": 1.0})
    for value, state, words in (("1", "ok", f"1 kept in {folder}"), ("0", "absent", "all is left to PyTorch")):
        monkeypatch.setenv("VGG_FAST_TUNE", value)
        found = {finding["what"]: finding for finding in run_json("doctor")["findings"]}["GPU timings"]
        assert found["state"] == state
        assert words in found["found"]
    monkeypatch.setenv("VGG_FAST_TUNE", "maybe")
    found = {finding["what"]: finding for finding in run_json("doctor", code=1)["findings"]}["VGG_FAST_TUNE"]
    assert "it must be 0" in found["found"]


def test_a_wrong_cap_is_named(monkeypatch):
    monkeypatch.setenv("VGG_FAST_ISA", "sse9")
    found = {finding["what"]: finding for finding in run_json("doctor", code=1)["findings"]}
    assert found["VGG_FAST_ISA"]["state"] == "problem"
    assert "sse9" in found["VGG_FAST_ISA"]["found"]
    for command in ("demo", "verify", "bench", "explain"):
        assert "sse9" in user_error(command)


def test_verify():
    report = run_json("verify", "--kernel", "portable_f32", "--dtype", "fp32")
    names = ("linear", "conv3x3", "conv_stack")
    assert [(row["op"], row["result"]) for row in report["rows"]] == [(name, "ok") for name in names]
    for row in report["rows"]:
        assert 0 < row["bit_for_bit"] < row["problems"]
        assert 0 < row["worst_error_over_bound"] <= 1
    assert "'neon'" in user_error("verify", "--kernel", "neon")
    assert "'fp8'" in user_error("verify", "--dtype", "fp8")


def test_verify_of_nothing_is_no_success(monkeypatch):
    monkeypatch.setenv("VGG_FAST_ISA", "portable")
    result = run("verify", "--kernel", "avx2_f32", "--dtype", "fp32", code=1)
    assert "not here" in result.stdout
    assert "nothing was checked" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_verify_cuda_without_a_gpu():
    assert "no CUDA device" in user_error("verify", "--device", "cuda")


def test_bench(tmp_path):
    table = tmp_path / "times.csv"
    options = ("--size", 32, "--rounds", 1, "--dtype", "fp32", "--batch", "1,2", "--csv", table)
    report = run_json("bench", *options)
    rows = report["rows"]
    assert report["failures"] == []
    assert [(row["batch"], row["contestant"]) for row in rows] == [
        (batch, name) for batch in (1, 2) for name in ("eager", "channels_last", "vgg_fast")
    ]
    assert rows[2]["kernel"] == selection.choose(torch.float32, CPU)
    assert rows[2]["ratio_to_best_peer"] > 0
    written = list(csv.DictReader(table.open()))
    assert [row["contestant"] for row in written] == [row["contestant"] for row in rows]
    assert written[0]["cpu"] == report["machine"]["cpu"]


def test_bench_of_a_named_kernel_as_a_table():
    out = run("bench", "--size", 32, "--rounds", 1, "--dtype", "fp32", "--backend", "portable_f32").stdout
    assert "portable_f32" in out
    assert "features 32" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--size", 31], "at least 32"),
        (["bench", "--batch", "0"], "--batch"),
        (["bench", "--batch", "two"], "'two'"),
        (["bench", "--dtype", "fp8"], "fp32, bf16, fp16"),
        (["bench", "--csv", "/no/such/folder/a.csv"], "/no/such/folder"),
        (["bench", "--backend", "neon"], "no backend 'neon'"),
        (["demo", "--backend", "triton", "--dtype", "fp32"], "triton"),
        (["demo", "--dtype", "int8"], "'int8'"),
        (["demo", "--weights", "/no/such/file.pth"], "/no/such/file.pth"),
        (["explain", "resnet50"], "vgg16_bn"),
        (["explain", "vgg11", "--size", 16], "--size 16"),
        (["explain", "vgg11", "--dtype", "fp32,bf16"], "one dtype"),
        (["convert", "/no/such/model.h5", "a.pth"], "/no/such/model.h5"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_one_clear_line(arguments, message):
    assert message in user_error(*arguments)


def test_convert(tmp_path):
    source, target = tmp_path / "a.pth", tmp_path / "a.safetensors"
    save_weights(torch.nn.Linear(2, 3), source)
    assert "2 tensors, 9 parameters" in run("convert", source, target).stdout
    assert "--force" in user_error("convert", source, target)
    run("convert", source, target, "--force")
    source.write_bytes(b"nothing of the kind")
    assert str(source) in user_error("convert", source, target, "--force")


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------


def test_ctrl_c_is_clean():
    """In a real terminal, in the middle of the work, which the progress bar shows."""
    terminal, theirs = pty.openpty()
    # Shells let what they start in the background ignore Ctrl-C, and all that this starts inherits it.
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{listening}; from vgg_fast.cli import main; main()", "verify"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    try:
        said = read_until(terminal, b"verifying", seconds=120)
        process.send_signal(signal.SIGINT)
        stdout, _ = process.communicate(timeout=60)
        said += read_until(terminal, None, seconds=10)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert process.returncode == 130
    assert stdout == b""
    assert b"interrupted" in said
    assert b"Traceback" not in said
    assert said.rindex(b"\x1b[?25h") > said.rindex(b"\x1b[?25l"), "the cursor is shown again"


def read_until(terminal: int, word: bytes | None, seconds: float) -> bytes:
    """What a terminal says, up to a word or to its end."""
    said, end = b"", time.monotonic() + seconds
    while (word is None or word not in said) and time.monotonic() < end:
        if not select.select([terminal], [], [], 0.2)[0]:
            continue
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # Linux, once the other end is closed
            piece = b""
        if not piece:
            break
        said += piece
    assert word is None or word in said, said.decode(errors="replace")
    return said
