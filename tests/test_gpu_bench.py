"""What ``verify`` and ``bench --device cuda`` do where there is a GPU, with the CPU in its place: everything but the
clock of the device runs here as it runs there."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from functools import partial

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from vgg_fast import gpu
from vgg_fast.bench import contest, gpu_peers, host, peers, report, roofline
from vgg_fast.bench.peers import GRAPH, OURS
from vgg_fast.cli import app
from vgg_fast.cli.bench import Measured
from vgg_fast.verify import report as parity_report
from vgg_fast.verify.verdicts import Row

CPU = torch.device("cpu")
TINY = peers.Layer("tiny", 16, 32, 12, True)
no_gpu = pytest.mark.skipif(gpu.lacking() is None, reason="this machine has a CUDA device")


# --- why there is no GPU --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "hip", "error", "said"),
    [
        (None, None, None, "a build without CUDA"),
        (None, "6.4", None, "AMD GPUs"),
        # As torch 2.14 words them.
        ("13.0", None, "Found no NVIDIA driver on your system. Please check that you have", "no NVIDIA driver"),
        ("13.0", None, "The NVIDIA driver on your system is too old (found version 11040)", "too old for .* CUDA 13.0"),
        ("13.0", None, "No CUDA GPUs are available", "CUDA_VISIBLE_DEVICES"),
        ("13.0", None, "Unexpected error 999\nat somewhere", "does not start: Unexpected error 999$"),
    ],
)
def test_the_reason_why_there_is_no_gpu(cuda, hip, error, said):
    sentence = gpu.explain_lack(cuda, hip, error)
    assert sentence.startswith("no CUDA device: ")
    assert re.search(said, sentence)
    assert "\n" not in sentence


def test_with_a_gpu_nothing_is_lacking():
    assert gpu.explain_lack("13.0", None, None) is None


@no_gpu
@pytest.mark.parametrize("command", ["verify", "bench"])
def test_without_a_gpu_one_sentence_and_exit_code_2(command):
    result = CliRunner().invoke(app, [command, "--device", "cuda"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [f"error: {gpu.lacking()}"]


# --- clocks ---------------------------------------------------------------------------------------------------------


def test_clocks_of_nvidia_smi():
    clocks = gpu.parse_clocks("1755, 1980, 2619, 61, 688.40, 700.00, 0x0000000000000024")
    assert (clocks.sm_mhz, clocks.sm_max_mhz, clocks.celsius, clocks.watts_limit) == (1755, 1980, 61, 700)
    assert clocks.held_back == ("power cap", "too hot (driver)")
    idle = gpu.parse_clocks("210, 2520, 405, 31, [N/A], [Not Supported], 0x0000000000000001")
    assert idle.watts is None
    assert idle.held_back == ()
    assert gpu.parse_clocks("0, 0, 0, 0, 0, 0, [N/A]").held_back == ()
    for nonsense in ("", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", "1, 2, 3"):
        assert gpu.parse_clocks(nonsense) is None
    assert gpu.clocks_under(int, CPU) is None


def test_the_question_is_asked_while_the_work_goes_on():
    calls = []
    slow = [sys.executable, "-c", "import time; time.sleep(0.3); print('1, 2'); print('second GPU')"]
    assert gpu.said_under(partial(calls.append, None), slow, CPU, least_s=0.0) == "1, 2"
    assert len(calls) > 100, "until the answer came"
    assert gpu.said_under(int, ["no-such-program"], CPU, 0.0) == ""
    assert gpu.said_under(int, [sys.executable, "-c", "print('error'); raise SystemExit(6)"], CPU, 0.0) == ""


# --- roofline -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fp16", "gbytes"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e3, 2039),
        ("NVIDIA H100 80GB HBM3", 989.4e3, 3352),
        ("NVIDIA H200", 989.4e3, 4800),
        ("NVIDIA L4", 121e3, 300),
        ("NVIDIA GeForce RTX 4090", 165.2e3, 1008),
        ("NVIDIA B200", 2250e3, 8000),
    ],
)
def test_data_sheets(name, fp16, gbytes):
    known = roofline.data_sheet(name)
    assert (known.gflops["fp16"], known.gbytes) == (fp16, gbytes)
    assert known.gflops["fp16"] == known.gflops["bf16"]
    assert name in known.how
    # Every tensor core since Ampere takes a tf32 product in the time of two of fp16.
    assert known.gflops["tf32"] == pytest.approx(fp16 / 2, rel=0.03)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "Tesla T4",
        "",
    ],
)
def test_a_gpu_that_only_resembles_one_is_measured(name):
    assert roofline.data_sheet(name) is None


# --- contestants ----------------------------------------------------------------------------------------------------


def test_the_contestants_of_a_gpu():
    """All run here but the graphs, which say why not."""
    assert gpu_peers.kernels_on("sm_90") == ["triton", "cuda_wgmma", "cuda"]
    assert gpu_peers.kernels_on("sm_120") == ["triton", "cuda"]
    before = torch.backends.cudnn.benchmark
    engines = gpu_peers.engines(["portable_f32", "triton"])
    result = contest.layer(TINY, torch.float32, 3, engines, device=CPU)
    ours = f"{OURS} portable_f32"
    assert list(result.calls) == [peers.EAGER, peers.CHANNELS_LAST, gpu_peers.BENCHMARK, ours, OURS]
    assert set(result.left_out) == {gpu_peers.BENCHMARK + GRAPH, OURS + GRAPH, f"{OURS} triton"}
    assert result.left_out[OURS + GRAPH] == "CUDA graphs are of CUDA devices"
    assert "triton" in result.left_out[f"{OURS} triton"]
    assert torch.backends.cudnn.benchmark == before, "the others' turns do not see it"
    rows = {row["contestant"]: row for row in result.rows(result.time(rounds=3))}
    # Our own kernels by name are no rivals, whichever is faster.
    rivals = [rows[name]["median_ms_per_image"] for name in (peers.EAGER, peers.CHANNELS_LAST, gpu_peers.BENCHMARK)]
    expected = rows[OURS]["median_ms_per_image"] / min(rivals)
    assert rows[OURS]["ratio_to_best_peer"] == pytest.approx(expected, rel=1e-3)
    launches = result.launches()
    assert [row["contestant"] for row in launches] == list(result.calls)
    assert all(0 < row["returns_ms"] <= row["done_ms"] for row in launches)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "=cuda"), (torch.float32, "=cuda_tf32")])
def test_a_kernel_by_name_is_that_kernel_where_a_backend_stands_for_another(dtype, name):
    """On Hopper the backend `cuda` would be a second row of cuda_wgmma(_tf32); fp32 is in tf32 by default."""
    network, x = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)).to(dtype), torch.ones(1, 3, 8, 8, dtype=dtype)
    with pytest.raises(contest.Unsuitable, match=f"backend '{name}' cannot run this: it runs on cuda, not cpu"):
        gpu_peers.by_kernel("cuda", network, x)


def test_a_contestant_that_raises_is_left_out_and_the_rest_goes_on():
    def broken(network, x):
        def call():
            raise RuntimeError("no kernel image is available\nfor this GPU")

        return call

    result = contest.layer(TINY, torch.float32, engines={"broken": broken})
    assert result.left_out == {"broken": "it raised RuntimeError: no kernel image is available"}
    assert peers.EAGER in result.calls


def test_tf32_may_be_off_by_what_cut_operands_make():
    assert peers.round_to_tf32(torch.tensor([1 + 2.0**-10 - 2.0**-23, -1 - 2.0**-11]), cut=True).tolist() == [1, -1]
    exact = torch.ones(4, dtype=torch.float64)
    answers = [torch.full((4,), 1 + 1e-7)]  # PyTorch without tensor cores

    def judged(error, cut):
        return peers.agreement(torch.full((4,), 1 + error), answers, exact, cut=lambda: exact * (1 + cut)).agrees

    assert judged(1.2e-3, cut=1e-3)
    assert not judged(1.3e-3, cut=1e-3)


@pytest.mark.parametrize("setting", ["ieee", "tf32", None])
def test_settings_of_fp32_can_be_read_by_every_name_and_are_put_back(setting):
    def read():
        backends = torch.backends
        return gpu.float32_name(), backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    before = read()
    with gpu.float32(setting):
        expected = {"ieee": ("fp32", False, "highest"), "tf32": ("tf32", True, "high"), None: before}[setting]
        assert read() == expected
        assert torch.backends.cuda.matmul.allow_tf32 == (expected[2] == "high")
    assert read() == before


def test_names_of_precisions():
    with gpu.float32("tf32"):
        assert contest.precision_name(torch.float32, torch.device("cuda")) == "tf32"
        assert contest.precision_name(torch.float16, torch.device("cuda")) == "fp16"
        with gpu.float32(None):
            assert gpu.float32_name() == "tf32"
    with gpu.float32("ieee"):
        assert contest.precision_name(torch.float32, torch.device("cuda")) == "fp32"
    result = CliRunner().invoke(app, ["bench", "--dtype", "tf32"])
    assert result.exit_code == 2
    assert "the CPU has fp32, bf16 and fp16" in result.stderr


# --- what goes wrong on the way -------------------------------------------------------------------------------------


def test_what_fails_on_a_gpu_is_written_down_and_the_rest_goes_on():
    measured = Measured(torch.device("meta"))  # any device but the CPU

    def raising(message):
        raise RuntimeError(message)

    measured.run("first", partial(raising, "CUDA out of memory. Tried to allocate 2 GiB"), 1, lambda: None)
    measured.run("second", partial(raising, "PTX JIT failed\nlog"), 1, lambda: None)
    measured.run("third", partial(contest.layer, TINY, torch.float32), 1, lambda: None)
    assert measured.left_out == [("everybody", "first", "out of memory")]
    assert measured.failures == ["second raised RuntimeError: PTX JIT failed"]
    assert {row["problem"] for row in measured.rows} == {"tiny+pool"}
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measured.run(
            "fourth", partial(raising, "CUDA error: an illegal memory access was encountered"), 1, lambda: None
        )
    assert len(measured.failures) == 2


def test_a_batch_beyond_all_memory_says_so(tmp_path):
    path = tmp_path / "bench.html"
    options = ["bench", "--size", "32", "--rounds", "1", "--dtype", "fp32", "--batch", f"{2**40},1"]
    done = CliRunner().invoke(app, [*options, "--report", str(path)])
    assert done.exit_code == 0, done.output
    assert f"left out: everybody, features, fp32, batch {2**40}: out of memory" in done.stdout.replace("\n", " ")
    found = json.loads(path.with_suffix(".json").read_text())
    assert found["left_out"][0]["reason"] == "out of memory"
    assert {row["batch"] for row in found["rows"]} == {1}
    assert "out of memory" in path.read_text()


@pytest.fixture
def interrupt_when():
    """Ctrl-C for this process as soon as a condition holds."""
    waiting = []
    # Shells let what they start in the background ignore Ctrl-C; Python then installs no handler of its own.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def when(condition):
        def wait():
            while not condition():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        waiting.append(threading.Thread(target=wait, daemon=True))
        waiting[-1].start()

    yield when
    for thread in waiting:
        thread.join(timeout=1)
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_keeps_a_partial_report(tmp_path, interrupt_when):
    path = tmp_path / "bench.html"
    written = path.with_suffix(".json")
    interrupt_when(lambda: written.exists() and written.stat().st_size)  # the first of sixty problems is done
    batches = ",".join(map(str, range(1, 61)))
    options = ["bench", "--size", "32", "--rounds", "1", "--dtype", "fp32", "--batch", batches]
    done = CliRunner().invoke(app, [*options, "--report", str(path)])
    assert done.exit_code == 130, done.output
    assert str(path) in done.stderr.replace("\n", "")
    found = json.loads(written.read_text())
    assert found["interrupted"]
    assert 1 <= len({row["batch"] for row in found["rows"]}) < 60
    assert "<strong>Interrupted:</strong>" in path.read_text()


def test_verify_writes_a_report(tmp_path):
    path = tmp_path / "verify.html"
    options = ["verify", "--kernel", "portable_f32", "--dtype", "fp32", "--report", str(path)]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    found = json.loads(path.with_suffix(".json").read_text())
    assert {row["op"] for row in found["rows"]} == {"linear", "conv3x3", "conv_stack"}
    assert not found["interrupted"]
    assert "results are right" in path.read_text()
    wrong = CliRunner().invoke(app, [*options[:-1], str(tmp_path / "verify.json")])
    assert wrong.exit_code == 2
    assert "name the HTML page" in wrong.stderr


# --- the pages ------------------------------------------------------------------------------------------------------


def test_the_page_of_verdicts_shows_what_is_wrong_absent_and_too_large():
    rows = [
        Row("conv3x3", "triton", "float16", 40, 20, 0.3, 7.5, misses=["ragged <b>: 3 of 9 elements"] * 30),
        Row("layers, batch 32", "cuda", "float32", 12, 3, 0.5, 0.5, unjudged=["conv1_2, batch 32: out of memory"]),
        Row("conv3x3", "cuda_tf32", "float16", absent="kernel 'cuda_tf32' takes float32"),
    ]
    page = parity_report.page(rows, host.describe(), "vgg-fast verify --device cuda", interrupted=True)
    assert "52 results were checked, 30 are wrong." in page
    assert page.count("ragged &lt;b&gt;") == 20, "a kernel that is wrong is wrong often"
    for text in ("Interrupted:", "conv1_2, batch 32: out of memory", "takes float32", "7.50", "--device cuda"):
        assert text in page
    assert parity_report.row_as_json(Row("conv3x3", "cuda", "float16", worst=float("inf")))["result"] == "ok"


def gpu_row(contestant, ms, precision="fp16"):
    ours = contestant == OURS
    return {
        **{"problem": "conv3_2", "dtype": "float16", "precision": precision, "batch": 32, "contestant": contestant},
        **{"kernel": "cuda" if ours else "", "median_ms_per_image": ms, "min_ms_per_image": ms, "rounds": 9},
        **{"ratio_to_best_peer": 0.8 if ours else None, "ratio_of_ours": 0.004 / ms, "ratio_low": 0.004 / ms},
        **{"ratio_high": 0.004 / ms, "relative_error": 1e-4, "gflop_per_image": 3.7, "megabytes_per_image": 3.3},
    }


def test_shares_of_the_roofline_launches_and_clocks_are_in_the_report():
    names = [peers.EAGER, peers.CHANNELS_LAST, gpu_peers.BENCHMARK, f"{OURS} triton", OURS + GRAPH, OURS]
    rows = [gpu_row(name, ms) for name, ms in zip(names, (0.02, 0.01, 0.009, 0.006, 0.0045, 0.005), strict=True)]
    whole = [{**row, "problem": "features 224", "gflop_per_image": None, "megabytes_per_image": None} for row in rows]
    sheet = roofline.data_sheet("NVIDIA H100 80GB HBM3")
    clocks = {"problem": "conv3_2", "precision": "fp16", "batch": 32, "sm_mhz": 1755.0, "held_back": "power cap"}
    launches = [{**clocks, "contestant": OURS, "returns_ms": 0.15, "done_ms": 0.2}]
    results = report.Results(
        [*rows, *whole],
        {**host.describe(), "gpu": "NVIDIA H100 80GB HBM3", "capability": "9.0"},
        sheet,
        measured=roofline.Ceilings({"fp32": 6e4, "fp16": 8e5}, 3000.0, "measured"),
        launches=launches,
        clocks=[clocks],
    )
    found = report.as_json(results)
    ours = found["rows"][len(names) - 1]
    # 3.7 GFLOP at 989.4 TFLOP/s take 3.74 us, at 800 TFLOP/s 4.625 us.
    assert ours["share_of_roofline"] == pytest.approx(3.74 / 5, abs=0.001)
    assert ours["share_of_measured_roofline"] == pytest.approx(4.625 / 5, abs=0.001)
    assert "share_of_roofline" not in found["rows"][-1]
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))
    page = report.page(results)
    for text in (
        "75%",
        "92%",
        "NVIDIA H100",
        "power cap",
        "Launch overhead",
        "vgg-fast, CUDA graph",
        "vgg-fast triton",
    ):
        assert text in page
    looks = [page.count(f">{peers_title}<") for peers_title in ("cuDNN benchmark mode", "vgg-fast triton")]
    assert all(count >= 2 for count in looks), "in the plots' labels as well as in the tables"


def test_the_share_of_tf32_is_of_its_own_peak():
    row = gpu_row(OURS, 0.1, "tf32")
    results = report.Results([row], host.describe(), roofline.data_sheet("NVIDIA A100-SXM4-80GB"))
    assert report.shares(row, results) == {"share_of_roofline": round(3.7 / 156e3 * 1e3 / 0.1, 4)}
