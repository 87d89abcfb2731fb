"""The comparison with other engines: the same answers, the cap obeyed, and a reason wherever somebody stays away."""

from __future__ import annotations

import copy
import csv
import importlib
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import engines, steps
from benchmarks import peers as command
from vgg_fast import testing
from vgg_fast.accelerate import accelerate
from vgg_fast.bench import contest, peers, scaling
from vgg_fast.bench.contest import Unsuitable

ROOT = Path(__file__).parents[1]
EXTRA = "pip install 'vgg-fast[peers]'"


def small_vgg(pool_to: int = 4) -> nn.Sequential:
    """All kinds of layers that a VGG has."""
    features = nn.Sequential(*peers.plain_layer(peers.Layer("a", 3, 16, 16, True)), nn.Conv2d(16, 8, 3, padding=1))
    features.append(nn.ReLU())
    features.append(nn.MaxPool2d(2, 2))
    head = nn.Sequential(nn.Linear(8 * 16, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 5))
    model = nn.Sequential(features, nn.AdaptiveAvgPool2d((pool_to, pool_to)), nn.Flatten(), head).eval()
    peers.calibrate(model, torch.randn(2, 3, 16, 16))
    return model


CALLS = [engines.onnxruntime_call, engines.openvino_call]


def require(call) -> None:
    pytest.importorskip("onnx", reason=EXTRA)
    pytest.importorskip(call.__name__.removesuffix("_call"), reason=EXTRA)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("batch", [1, 3])
def test_engines_give_the_same_answer(call, batch):
    require(call)
    model, x = small_vgg(), torch.randn(batch, 3, 16, 16)
    exact = peers.in_float64(model, x)
    answer = call(model, x, threads=1)()
    assert answer.shape == exact.shape
    assert testing.relative_error(answer, exact) < 1e-6, "true fp32, no bf16 behind our back"


def test_openvino_in_bf16():
    require(engines.openvino_call)
    model, x = small_vgg().bfloat16(), torch.randn(1, 3, 16, 16).bfloat16()
    exact = peers.in_float64(model, x)
    if "BF16" not in importlib.import_module("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(Unsuitable, match="not in bf16"):
            engines.openvino_call(model, x, threads=1)
        return
    answer = engines.openvino_call(model, x, threads=1)()
    assert 1e-5 < testing.relative_error(answer, exact) < 5e-2


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc here to count threads with")
def test_onnxruntime_has_the_threads_that_were_asked_for():
    require(engines.onnxruntime_call)
    model, x = small_vgg(), torch.randn(1, 3, 16, 16)
    engines.onnxruntime_call(model, x, threads=1)()  # whatever the library starts only once
    before = len(os.listdir("/proc/self/task"))
    three = engines.onnxruntime_call(model, x, threads=3)
    assert len(os.listdir("/proc/self/task")) - before == 2, "the caller is one of the three"
    assert three().shape == (1, 5)


def test_openvino_with_other_threads_than_asked_for_stays_away():
    require(engines.openvino_call)
    model, x = small_vgg(), torch.randn(1, 3, 16, 16)
    with pytest.raises(Unsuitable, match=r"it takes \d+ threads, not 100000"):
        engines.openvino_call(model, x, threads=100_000)


def test_onnxruntime_says_why_not():
    require(engines.onnxruntime_call)
    model, x = small_vgg(), torch.randn(1, 3, 16, 16)
    with pytest.raises(Unsuitable, match="no convolution in bfloat16"):
        engines.onnxruntime_call(model.bfloat16(), x.bfloat16(), 1)
    if torch.cpu._is_avx512_supported():
        with pytest.raises(Unsuitable, match="keeps it from using AVX-512"):
            engines.onnxruntime_call(model.float(), x, 1, cap="avx2")
    assert engines.onnxruntime_call(model.float(), x, 1, cap="avx512")().shape == (1, 5)


def test_openvino_is_judged_by_what_it_says_it_runs():
    def objections(implementation, actual="f32", wanted="f32", cap=None):
        return list(engines.openvino_objections([("Convolution", implementation, actual)], wanted, cap))

    assert objections("brgconv_avx512_f32") == []
    assert objections("brgconv_avx512_f32", cap="avx512") == []
    assert objections("jit_avx2_f32", cap="avx2") == []
    assert "above the cap avx512" in objections("brgconv_avx512_amx_bf16", "bf16", "bf16", "avx512")[0]
    assert "above the cap avx2" in objections("gemm_mlas_f32", cap="avx2")[0]
    assert "in f32, not in bf16" in objections("brgconv_avx2_f32", "f32", "bf16", "avx2")[0]
    assert objections("brgconv_avx512_amx_bf16", "bf16", "f32")


def test_who_is_not_installed_says_so(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    for engine in engines.engines(1, None).values():
        with pytest.raises(Unsuitable, match=re.escape(EXTRA)):
            engine(small_vgg(), torch.randn(1, 3, 16, 16))
    assert engines.versions() == {}


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 3, 3, padding="same"), nn.MaxPool2d(3, 2), nn.AdaptiveAvgPool2d(7), nn.Sigmoid()], ids=str
)
def test_a_layer_that_the_graph_lacks_is_named(layer):
    pytest.importorskip("onnx", reason=EXTRA)
    with pytest.raises(Unsuitable, match=re.escape(type(layer).__name__)):
        engines.to_onnx(nn.Sequential(layer), torch.zeros(1, 3, 16, 16))


# --- contests with engines ------------------------------------------------------------------------------------------


def engine(spoil=lambda y: y):
    def make(network, x):
        with torch.no_grad():
            y = spoil(network(x))
        return lambda: y

    return make


def never(network, x):
    raise Unsuitable("it has better things to do")


def test_engines_take_part_or_stay_away_with_a_reason():
    others = {"good": engine(), "wrong": engine(lambda y: y * 1.001), "nan": engine(lambda y: y / 0), "away": never}
    result = contest.features(torch.float32, batch=2, size=32, engines=others)
    assert list(result.calls) == [peers.EAGER, peers.CHANNELS_LAST, "good", peers.OURS]
    assert set(result.left_out) == {"wrong", "nan", "away"}
    assert "wrong answer: relative error 1.00e-03" in result.left_out["wrong"]
    assert result.left_out["away"] == "it has better things to do"
    rows = {row["contestant"]: row for row in result.rows(result.time(rounds=3))}
    assert set(rows) == set(result.calls)
    for row in rows.values():
        assert row["ratio_low"] <= row["ratio_of_ours"] <= row["ratio_high"]
    assert rows[peers.OURS]["ratio_of_ours"] == 1


def test_ratios_are_taken_round_by_round():
    """A disturbance that hits both in one round leaves the ratio as it is."""
    result = contest.features(torch.float32, size=32)
    ours, eager = contest.Timing((1.0, 10.0, 1.0, 1.0)), contest.Timing((2.0, 20.0, 2.0, 2.0))
    rows = result.rows({peers.EAGER: eager, peers.OURS: ours})
    assert [rows[0][key] for key in ("ratio_low", "ratio_of_ours", "ratio_high")] == [0.5, 0.5, 0.5]


def test_pytorchs_own_setting_decides_what_fp32_may_be_off():
    exact = torch.ones(4, dtype=torch.float64)
    ours, theirs = torch.full((4,), 1 + 2e-5), [torch.full((4,), 1 + 1e-6)]
    assert not peers.agreement(ours, theirs, exact).agrees
    torch.set_float32_matmul_precision("high")
    try:
        assert contest.precision_name(torch.float32) == "fp32 high"
        assert contest.precision_name(torch.bfloat16) == "bf16"
        assert peers.agreement(ours, theirs, exact).agrees
        assert not peers.agreement(ours * (1 + 2e-5), theirs, exact).agrees
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_network_at_high_may_be_off_a_sixteenth_of_tf32():
    """Three bf16 products pass, one does not, though it would pass for a rounding of bf16 (`medium`)."""

    def judged(kernel: str) -> contest.Contest:
        return contest.features(torch.float32, size=64, accelerator=partial(accelerate, backend=kernel))

    torch.set_float32_matmul_precision("high")
    try:
        accepted = judged("amx_bf16x3").agreement
        assert 3e-5 / 2 < accepted.ours < accepted.allowed < 1e-2
        with pytest.raises(contest.Disagreement, match="relative error"):
            judged("amx_bf16")
    except RuntimeError as error:
        assert "needs the CPU flags" in str(error)  # noqa: PT017
        pytest.skip(str(error))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_tf32_is_what_the_bound_stands_on():
    """Rounding the operands of one layer costs what the unit roundoff 2^-11 says; the network's error is larger."""
    x = torch.randn(1, 3, 32, 32)
    one, network = peers.plain_layer(peers.Layer("one", 3, 16, 32, False)), peers.plain_features()
    for model in (one, network):
        peers.calibrate(model, x)
    before = copy.deepcopy(one.state_dict())
    errors = [testing.relative_error(peers.in_tf32(m, x), peers.in_float64(m, x)) for m in (one, network)]
    assert 2.0**-13 < errors[0] < 2.0**-11
    assert 2 * errors[0] < errors[1] < 1
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("make", [steps.perceptual, steps.training])
def test_steps_compare_gradients(make):
    result = make(torch.float32, 1, 32)
    assert list(result.calls) == [peers.EAGER, peers.CHANNELS_LAST, peers.OURS]
    assert max(result.errors.values()) < 1e-2
    gradients = result.calls[peers.OURS]()
    assert [g.shape for g in gradients] == (
        [(1, 3, 32, 32)] if make is steps.perceptual else [p.shape for p in peers.plain_features().parameters()]
    )
    # The bias of a convolution before batch statistics has no gradient: ours is 0, PyTorch's the rounding of one.
    assert all(g.abs().max() > 0 for g in gradients if make is steps.perceptual or g.dim() == 4)


# --- threads and batches --------------------------------------------------------------------------------------------


def test_scaling_measures_what_it_says():
    torch.set_num_threads(2)
    result = scaling.features(torch.float32, [1, 2, 4], 32)
    assert list(result.contests) == [(1, 1), (2, 1), (2, 2), (2, 4)]
    for (threads, batch), each in result.contests.items():
        assert each.kernels
        for call in each.calls.values():
            assert len(call()) == batch
            assert torch.get_num_threads() == threads
    torch.set_num_threads(2)
    rows = result.rows(result.time(rounds=2))
    assert torch.get_num_threads() == 2
    assert {(row["threads"], row["batch"], row["contestant"]) for row in rows} == {
        (*place, name) for place in result.contests for name in (peers.CHANNELS_LAST, peers.OURS)
    }
    assert [s.contestant for s in scaling.summaries(rows)] == [peers.CHANNELS_LAST, peers.OURS]


def test_scaling_is_summed_up():
    def row(threads: int, batch: int, ms: float) -> dict[str, object]:
        place = {"problem": "scaling 224, threads", "precision": "fp32", "contestant": "ours", "threads": threads}
        return {**place, "batch": batch, "median_ms_per_image": ms}

    (found,) = scaling.summaries([row(1, 1, 80.0), row(4, 1, 25.0), row(4, 2, 20.0), row(4, 3, 22.0), row(4, 4, 21.0)])
    assert (found.threads, found.speedup, found.growth) == (4, 80 / 25, 22 / 20)
    assert found.milliseconds == {1: 25.0, 2: 20.0, 3: 22.0, 4: 21.0}
    assert "3.20 times as fast with 4 threads" in str(found)
    assert "grows to 1.100" in str(found)


# --- the command ----------------------------------------------------------------------------------------------------


def run(*arguments: object, code: int = 0, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in engines.CAPS["avx2"]}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", *map(str, arguments)],
        cwd=ROOT,
        env={**clean, **environment, "NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_command_from_end_to_end(tmp_path):
    table, page = tmp_path / "out" / "peers.csv", tmp_path / "out" / "peers.html"
    options = ("--size", 32, "--rounds", 2, "--no-layers", "--no-compile", "--perceptual", "--dtype", "fp32,bf16")
    text = run(*options, "--threads", 1, "--csv", table, "--report", page)
    rows = list(csv.DictReader(table.open()))
    problems = {(row["problem"], row["precision"]) for row in rows}
    assert problems == {(p, d) for p in ("features 32", "perceptual step 32") for d in ("fp32", "bf16")}
    assert {row["threads"] for row in rows} == {"1"}
    for name in (engines.ONNXRUNTIME, engines.OPENVINO):
        assert name in {row["contestant"] for row in rows} or f"left out: {name}: " in text
    for row in rows:
        assert float(row["relative_error"]) < (1e-3 if row["precision"] == "fp32" else 1.0)
        assert float(row["fp32_gflops"]) > 0
        assert row["commit"] == "" or len(row["commit"]) >= 40
    assert "features 32 · bf16 · batch 1" in page.read_text()


@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="the processor has no AVX2 to be capped to")
def test_a_cap_binds_everybody(tmp_path):
    """Asked of each library itself: oneDNN (in PyTorch and in OpenVINO) names the code that it runs."""
    options = (
        "--size",
        32,
        "--rounds",
        1,
        "--no-layers",
        "--no-compile",
        "--dtype",
        "fp32",
        "--isa",
        "avx2",
        "--threads",
        1,
    )
    text = run(*options, "--csv", tmp_path / "a.csv", "--report", tmp_path / "a.html", ONEDNN_VERBOSE="1")
    executed = re.findall(r"^onednn_verbose,.*exec,cpu,convolution,([^,]*)", text, re.M)
    assert executed, "oneDNN did not say what it ran"
    assert not [name for name in executed if re.search("avx512|avx10|amx", name)]
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert {row["isa_cap"] for row in rows} == {"avx2"}
    assert {row["kernel"] for row in rows if row["contestant"] == peers.OURS} == {"avx2_winograd_f32"}
    if torch.cpu._is_avx512_supported() and "onnxruntime not installed" not in text:
        assert "left out: onnxruntime: " in text
    assert "avx2" in (tmp_path / "a.html").read_text()


def test_a_cap_sets_pytorchs_own_kernels_and_compiler():
    code = (
        "import torch, torch._inductor.cpu_vec_isa as isa;"
        "print(torch.backends.cpu.get_cpu_capability(), isa.pick_vec_isa())"
    )
    env = {**os.environ, **engines.CAPS["avx2"]}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "512" not in done.stdout
    assert "AMX" not in done.stdout.upper()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--isa", "sse9"], "avx2, avx512, amx"),
        (["--dtype", "fp8"], "fp32, high, bf16, fp16"),
        (["--part", "head"], "features, model, none"),
        (["--batch", "0"], "'0'"),
        (["--size", "16"], "32"),
    ],
)
def test_bad_options_are_named(arguments, message):
    assert message in run(*arguments, code=2)


def test_a_cap_on_some_of_them_only_is_refused():
    message = run("--size", 32, code=2, ONEDNN_MAX_CPU_ISA="AVX2")
    assert "ONEDNN_MAX_CPU_ISA" in message
    assert "--isa" in message


def test_the_command_knows_all_caps_and_precisions():
    assert tuple(engines.CAPS) == command.CAPS
    kinds = dict.fromkeys(("features", "model", "scaling", "perceptual", "train", "layers"), False) | {"features": True}
    made = []
    for what, make in command.problems(list(command.PRECISIONS), [2], 32, kinds, {}, partial(dict)):
        assert isinstance(make, partial)
        made.append((what, make.args[0], torch.get_float32_matmul_precision()))
    assert [m[1:] for m in made] == [
        (torch.float32, "highest"),
        (torch.float32, "high"),
        (torch.bfloat16, "highest"),
        (torch.float16, "highest"),
    ]
    assert torch.get_float32_matmul_precision() == "highest"
