"""Turns are fair, statistics are what they say, and every number comes with its machine and commit."""

from __future__ import annotations

import csv
import gc
import subprocess
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from vgg_fast import models
from vgg_fast.accelerate import accelerate
from vgg_fast.bench import contest, host, peers
from vgg_fast.bench.measure import Timing, interleave, ratio_to_best

TINY = peers.Layer("tiny", 16, 32, 12, True)


def test_contestants_take_turns_and_nobody_is_always_last():
    order: list[str] = []
    interleave({name: partial(order.append, name) for name in "abc"}, rounds=6, warmup=1, turn_ms=0)
    rounds = [order[i : i + 6] for i in range(3, len(order), 6)]  # after one warm-up call of each
    assert len(rounds) == 6
    for turns in rounds:
        # One call that is not timed, then the timed one.
        assert turns[::2] == turns[1::2]
        assert sorted(turns[::2]) == ["a", "b", "c"]
    assert {turns[0] for turns in rounds} == {"a", "b", "c"}
    assert {turns[-1] for turns in rounds} == {"a", "b", "c"}


def test_short_calls_are_repeated_until_a_turn_is_long_enough():
    calls = 0

    def short() -> None:
        nonlocal calls
        calls += 1
        time.sleep(1e-3)

    # A turn that no delay of a busy machine makes one call long.
    timing = interleave({"short": short}, rounds=1, warmup=1, turn_ms=100)["short"]
    assert calls >= 4
    assert len(timing.milliseconds) == 1
    assert 1 <= timing.minimum < 100, "milliseconds per call, not per turn"


def test_slower_is_slower():
    timings = interleave(
        {"a": partial(time.sleep, 0.002), "b": partial(time.sleep, 0.02)}, rounds=4, warmup=1, turn_ms=0
    )
    assert timings["a"].minimum >= 2
    assert timings["b"].minimum >= 20
    assert ratio_to_best(timings, "b") > 1 > ratio_to_best(timings, "a")


def test_budget_ends_the_measuring_after_three_rounds():
    heard = []
    timings = interleave({"a": int}, rounds=50, budget_s=0, on_round=lambda: heard.append(None))
    assert len(timings["a"].milliseconds) == 3
    assert len(heard) == 4, "after the warm-up and after each round"


def test_garbage_is_not_collected_in_anybodys_turn():
    seen = []
    assert gc.isenabled()
    interleave({"a": lambda: seen.append(gc.isenabled())}, rounds=1, warmup=1, turn_ms=0)
    assert seen == [True, False, False]  # the warm-up, and the turn
    assert gc.isenabled()


@pytest.mark.parametrize(("rounds", "warmup"), [(0, 1), (1, 0)])
def test_nothing_to_measure_is_an_error(rounds, warmup):
    with pytest.raises(ValueError, match="at least 1"):
        interleave({"a": int}, rounds=rounds, warmup=warmup)


def test_statistics():
    timing = Timing((3.0, 1.0)) + Timing((10.0,))
    assert (timing.median, timing.minimum) == (3.0, 1.0)
    others = {"slow": Timing((9.0,)), "fast": Timing((6.0,)), "ours": timing}
    assert ratio_to_best(others, "ours") == 0.5
    with pytest.raises(ValueError, match="nobody"):
        ratio_to_best({"ours": timing}, "ours")


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def test_commit_is_that_of_our_own_checkout(tmp_path):
    assert host.commit(tmp_path) is None
    git(tmp_path, "init")
    (tmp_path / "readme").write_text("someone's project")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "theirs")
    assert host.commit(tmp_path) is None, "a repository that is not ours, around an installed package"
    (tmp_path / "setup.py").touch()
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "ours")
    commit = host.commit(tmp_path)
    assert commit is not None
    assert len(commit) == 40
    (tmp_path / "setup.py").write_text("# edited")
    assert host.commit(tmp_path) == f"{commit}-dirty"


def test_csv_rows_carry_the_machine(tmp_path):
    path = tmp_path / "times.csv"
    host.write_csv(path, [{"contestant": "a", "ms": 1.5}, {"contestant": "b", "extra": "x"}])
    rows = list(csv.DictReader(path.open()))
    assert [row["contestant"] for row in rows] == ["a", "b"]
    assert rows[0]["ms"] == "1.5"
    assert rows[1]["ms"] == ""
    for row in rows:
        assert row["torch"] == torch.__version__
        assert row["threads"] == str(torch.get_num_threads())
        assert {"cpu", "cpu_flags", "commit", "date", "python", "vgg_fast"} <= set(row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_contest_checks_and_times_everybody(dtype):
    result = contest.layer(TINY, dtype, batch=3)
    assert result.name == "tiny+pool"
    assert result.agreement.agrees
    timings = result.time(rounds=2)
    rows = result.rows(timings)
    assert [row["contestant"] for row in rows] == [peers.EAGER, peers.CHANNELS_LAST, peers.OURS]
    assert rows[-1]["kernel"] == " ".join(result.kernels) != ""
    assert rows[-1]["ratio_to_best_peer"] > 0
    assert [row["ratio_to_best_peer"] for row in rows[:-1]] == [None, None]
    assert all(0 < row["min_ms_per_image"] <= row["median_ms_per_image"] for row in rows)


def test_a_contest_times_the_kernel_that_was_named():
    result = contest.layer(TINY, torch.float32, accelerator=partial(accelerate, backend="portable_f32"))
    assert result.kernels == ("portable_f32",)


class Spoiled(nn.Module):
    """An accelerated model with something done to its output."""

    def __init__(self, model: nn.Module, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.model, self.spoil = accelerate(model), spoil

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.spoil(self.model(x))


def test_a_contest_with_one_wrong_corner_is_not_timed():
    def corner(y: torch.Tensor) -> torch.Tensor:
        # A twentieth in one of 1152 elements is 2e-3 of the norm, which bf16 allows: it takes the elementwise bound.
        y = y.clone()
        y[-1, -1, -1, -1] += 0.05
        return y

    with pytest.raises(contest.Disagreement, match="1 of 1152 elements are off, 1 of them on the border"):
        contest.layer(TINY, torch.bfloat16, accelerator=partial(Spoiled, spoil=corner))


def test_an_error_beyond_the_ladder_is_not_timed():
    with pytest.raises(contest.Disagreement, match=r"relative error .* allowed"):
        contest.features(torch.float32, size=32, accelerator=partial(Spoiled, spoil=lambda y: y * (1 + 1e-4)))


def test_copies_share_the_parameters_and_leave_the_model_alone():
    model = peers.plain_layer(TINY)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = peers.contestants(model)
    assert type(model) is nn.Sequential
    assert type(made[peers.OURS].module) is not nn.Sequential
    assert made[peers.OURS].module[0].weight is model[0].weight
    assert made[peers.CHANNELS_LAST].module[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_calibration_gives_sound_activations():
    """Unit variance behind the last batch-norm on images that look nothing like noise."""
    model = peers.plain_features()
    images = torch.rand(2, 3, 64, 64) * torch.linspace(0, 5, 64)
    peers.calibrate(model, images)
    assert not any(m.training for m in model.modules())
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    with torch.no_grad():
        last = model[:42](images)  # up to the last batch-norm, before its ReLU
    assert last.std().item() == pytest.approx(1, abs=0.1)
    assert last.mean().item() == pytest.approx(0, abs=0.1)


def test_plain_vgg16_bn_has_torchvisions_names_and_shapes():
    with torch.device("meta"):
        plain, named = peers.plain_vgg16_bn(), models.vgg16_bn()
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (plain, named)]
    assert shapes[0] == shapes[1]
    types = {type(m) for m in plain.modules()}
    assert all(t.__module__.startswith("torch.nn.modules") for t in types), "plain PyTorch"


def test_float64_is_the_model_itself():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    x = torch.randn(2, 3, 5, 5)
    exact = peers.in_float64(model, x)
    assert exact.dtype == torch.float64
    assert model[0].weight.dtype == torch.float32
    torch.testing.assert_close(model(x).double(), exact, rtol=1e-5, atol=1e-6)


def test_agreement_is_judged_by_pytorchs_larger_error():
    exact = torch.ones(4, dtype=torch.float64)
    off = [torch.full((4,), 1 + e) for e in (1e-3, 1e-2)]
    assert peers.agreement(torch.full((4,), 1.015), off, exact).agrees
    assert not peers.agreement(torch.full((4,), 1.025), off, exact).agrees
    assert not peers.agreement(torch.full((4,), float("nan")), off, exact).agrees
