"""The whole package on a real GPU, and what ``make gpu-test`` does where there is none."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from tests import run_on_gpu
from vgg_fast import gpu, selection, testing
from vgg_fast.accelerate import accelerate
from vgg_fast.bench import contest, gpu_peers, peers
from vgg_fast.verify.checks import verify

LACKING = gpu.lacking()


@pytest.fixture
def cuda() -> torch.device:
    if LACKING is not None:
        pytest.skip(LACKING)
    return torch.device("cuda")


@pytest.mark.gpu
def test_every_kernel_is_right_on_this_gpu(cuda):
    """Small shapes; vgg-fast verify adds VGG16's own layers."""
    rows = verify("cuda", layers=[peers.Layer("small", 64, 64, 28, True)], batches=[1, 5])
    assert not [miss for row in rows for miss in row.misses]
    ran = {row.kernel for row in rows if row.op == "conv_stack" and row.dtype == "float32" and row.problems}
    for backend in selection.backends():
        if backend.name in ("triton", "cuda") and backend.available:
            assert {backend.name, f"{backend.name}_tf32"} <= ran


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_contestants_agree_on_this_gpu(cuda, dtype):
    result = contest.layer(peers.LAYERS[4], dtype, 2, gpu_peers.engines(), device=cuda)
    assert peers.OURS in result.calls
    assert not [reason for reason in result.left_out.values() if "wrong answer" in reason]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_an_accelerated_model_can_be_recorded_into_a_cuda_graph(cuda, backend):
    s = testing.shape("block")
    model = nn.Sequential(nn.Conv2d(s.cin, s.cout, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)).eval().to(cuda).half()
    x, _, _ = testing.conv_inputs(s, torch.float16)
    x = x.to(cuda)
    try:
        kernels = peers.kernels_used(accelerate(model, backend=backend), x)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    assert kernels == (selection.choose(x.dtype, x.device, backend),)
    replay = gpu_peers.graph(lambda network, x: peers.Contestant(network, torch.contiguous_format).on(x), model, x)
    with torch.no_grad():
        expected = model(x)
    assert torch.equal(replay(), expected)
    assert torch.equal(replay(), expected)


# --- make gpu-test --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(LACKING is None, reason="this machine has a CUDA device")
def test_without_a_gpu_make_gpu_test_says_so():
    done = subprocess.run(
        [sys.executable, "-m", "tests.run_on_gpu"], cwd=run_on_gpu.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == f"make gpu-test is for a machine with an NVIDIA GPU: {LACKING}\n"


def test_every_step_runs_whatever_becomes_of_the_others(capsys):
    commands = []

    def run(command, environment):
        commands.append((command, environment))
        return 99 if "racecheck" in command or "tests" in command else 0

    assert run_on_gpu.run_all(None, "/cuda/bin/compute-sanitizer", run) == 1
    assert len(commands) == 5
    for command, environment in commands:
        assert bool(environment) == (command[0] == "/cuda/bin/compute-sanitizer")
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["FAILED tests", "FAILED racecheck"]


def test_a_missing_sanitizer_is_a_failure_and_no_reason_to_stop(capsys):
    commands = []
    assert run_on_gpu.run_all(None, None, lambda command, _: commands.append(command) or 0) == 1
    assert len(commands) == 3
    assert capsys.readouterr().err.count("compute-sanitizer is not installed: it comes with the CUDA toolkit") == 2


def test_all_well_is_exit_code_0():
    assert run_on_gpu.run_all(None, "sanitizer", lambda command, environment: 0) == 0
