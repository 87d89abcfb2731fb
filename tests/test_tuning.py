"""Timing on a GPU, without one: the contestants, the clock and the facts about the device are made up here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import stacks
import torch
from torch import Tensor

from vgg_fast import testing
from vgg_fast.accelerate import accelerate
from vgg_fast.bench import peers
from vgg_fast.gpu import tuning
from vgg_fast.gpu import winners as winners_module
from vgg_fast.gpu.tuning import MARGIN, MOST_SIZES, ROUNDS, Place, Question, Tuner, contest, disagreement
from vgg_fast.gpu.winners import Winners, cache_folder

PLACE = Place("Imagined GPU", "sm_90", 132, (("torch", "2.13"), ("kernels", "abc")))
QUESTION = Question(
    place=PLACE,
    candidates=("triton", "cuda"),
    channels=(3, 64, 64),
    program=(1, 3),
    batchnorm=(True, True),
    weights_last=(False, False),
    dtypes=("torch.float16",) * 3,
    precision="highest",
    cudnn=(True, False, False),
    input_last=False,
    size=(1, 224, 224),
)


class Gpu:
    """Contestants that take the time they are told to, on a clock that counts nothing else."""

    def __init__(self, **milliseconds: float) -> None:
        self.milliseconds = milliseconds
        self.results: dict[str, Tensor] = {}
        self.raises: dict[str, BaseException] = {}
        self.after = 0  # calls of a contestant before it raises
        self.order: list[str] = []  # of the timed calls
        self.calls_made: list[str] = []
        self.now = 0.0
        self.drift = 1.0  # by how much the device slows down with every call

    def calls(self) -> dict[str, Callable[[], Tensor]]:
        return {name: self.contestant(name) for name in self.milliseconds}

    def contestant(self, name: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            self.calls_made.append(name)
            if name in self.raises and self.calls_made.count(name) > self.after:
                raise self.raises[name]
            self.now += self.milliseconds[name] * 1e-3
            self.milliseconds = {n: t * self.drift for n, t in self.milliseconds.items()}
            return self.results.get(name, torch.ones(2))

        return call

    def clock(self, call: Callable[[], object], repeats: int) -> float:
        start = self.now
        for _ in range(repeats):
            call()
        self.order.append(self.calls_made[-1])
        return (self.now - start) / repeats

    def ask(self, tuner: Tuner, question: Question = QUESTION, may_time: bool = True) -> tuning.Verdict:
        return tuner.choose(question, self.calls(), self.clock, disagreement, may_time=may_time)


# --- who wins -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("triton", "cuda", "winner"),
    [(0.5, 0.6, "triton"), (0.6, 0.5, "cuda"), (0.98, 2.0, "reference"), (2.0, 2.0, "reference"), (0.96, 1, "triton")],
)
def test_the_fastest_wins_but_pytorch_only_loses_by_a_margin(triton, cuda, winner):
    assert 0.02 < MARGIN < 0.04
    gpu = Gpu(reference=1.0, triton=triton, cuda=cuda)
    verdict = contest(gpu.calls(), gpu.clock, disagreement)
    assert verdict.kernel == winner
    assert verdict.excluded == {}
    assert verdict.seconds == pytest.approx({"reference": 1e-3, "triton": triton * 1e-3, "cuda": cuda * 1e-3})
    assert f"triton {triton:.3g} ms" in verdict.reason


def test_rounds_are_interleaved_and_everybody_goes_first_in_turn():
    gpu = Gpu(reference=1.0, triton=0.5, cuda=0.6)
    contest(gpu.calls(), gpu.clock, disagreement)
    rounds = [gpu.order[1 + 3 * i : 4 + 3 * i] for i in range(ROUNDS)]  # the first was to learn how long a call takes
    assert all(sorted(names) == ["cuda", "reference", "triton"] for names in rounds)
    assert {names[0] for names in rounds} == {"cuda", "reference", "triton"}


def test_a_device_that_slows_down_does_not_favour_the_first():
    gpu = Gpu(reference=4.0, triton=4.0, cuda=4.0)
    gpu.drift = 1.003  # twice as slow at the end
    assert contest(gpu.calls(), gpu.clock, disagreement).kernel == "reference"


def test_long_calls_are_timed_less_often_and_short_ones_in_batches():
    long, short = Gpu(reference=500.0, triton=400.0), Gpu(reference=0.1, triton=0.05)
    contest(long.calls(), long.clock, disagreement)
    contest(short.calls(), short.clock, disagreement)
    assert len(long.order) == 1 + 2 * tuning.LEAST_ROUNDS
    assert len(short.order) == 1 + 2 * ROUNDS
    assert short.calls_made.count("triton") == 1 + 20 * ROUNDS


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (torch.tensor([1.0, 1.1]), "differs from PyTorch by 0.1"),
        (torch.tensor([1.0, float("nan")]), "differs from PyTorch by nan"),
        (torch.ones(3), r"it is \(3,\)"),
    ],
)
def test_a_wrong_result_excludes_even_the_fastest(wrong, words):
    gpu = Gpu(reference=1.0, triton=0.1, cuda=0.5)
    gpu.results["triton"] = wrong
    with pytest.warns(RuntimeWarning, match=f"'triton' is not used .*{words}"):
        verdict = gpu.ask(Tuner(Winners(None)))
    assert verdict.kernel == "cuda"
    assert set(verdict.excluded) == {"triton"}


@pytest.mark.parametrize("after", [0, 5])
@pytest.mark.parametrize("error", [RuntimeError("no kernel image"), torch.OutOfMemoryError("2 GiB")])
def test_who_raises_is_out(error, after, tmp_path):
    gpu = Gpu(reference=1.0, triton=0.1, cuda=0.5)
    gpu.raises["triton"], gpu.after = error, after
    with pytest.warns(RuntimeWarning, match=f"'triton' is not used .*{error}"):
        assert gpu.ask(Tuner(Winners(tmp_path))).kernel == "cuda"
    assert list(tmp_path.iterdir()) == []  # it may do better in the next process


def test_pytorch_itself_out_of_memory_is_no_crash_and_not_tried_again():
    gpu, tuner = Gpu(reference=1.0, triton=0.1), Tuner(Winners(None))
    gpu.raises["reference"] = torch.OutOfMemoryError("2 GiB")
    for _ in range(2):
        verdict = gpu.ask(tuner)
        assert verdict.kernel == "reference"
        assert "out of memory" in verdict.reason
    assert gpu.calls_made == ["reference"]


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 16), (torch.bfloat16, 8), (torch.float16, 11)])
def test_how_far_results_may_differ(dtype, bits):
    """64 roundings of the largest value, 2: in bf16 a quarter of it, which a tile of zeros exceeds."""
    expected = torch.linspace(-2.0, 2.0, 64, dtype=torch.float64).to(dtype).view(1, 4, 4, 4)
    inside, outside = expected.clone(), expected.clone()
    inside[0, 0, 0, 1] += 60 * 2.0 ** (1 - bits)
    outside[0, 3, 3, 3] += 70 * 2.0 ** (1 - bits)
    assert disagreement(inside, expected) is None
    assert "differs" in disagreement(outside, expected)
    if dtype is torch.float32:
        assert disagreement(outside, expected, "high") is None
    expected[0, 0, 0, 0] = float("inf")  # where PyTorch has overflowed and we have not
    assert disagreement(inside, expected) is None
    assert "differs" in disagreement(expected, inside)
    assert "differs" not in disagreement(inside.contiguous(memory_format=torch.channels_last), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_deep_network_is_no_disagreement_and_a_missing_pixel_is_one(dtype):
    """VGG16-BN's features, whose calibrated statistics amplify every rounding: as much as a kernel may have to pass."""
    model = peers.plain_features()
    x = testing.random_tensor(2, 3, 64, 64)
    peers.calibrate(model, x[:1])
    model = model.to(dtype)
    expected, _ = stacks.run(model, x.to(dtype))
    ours, segments = stacks.run(accelerate(model), x.to(dtype))
    assert [s.kernel for s in segments] == [stacks.kernel(dtype)]
    assert not torch.equal(ours, expected)
    assert disagreement(ours, expected) is None
    ours[1, :, 1, 0] = 0
    assert "differs from PyTorch" in (disagreement(ours, expected) or "")


# --- memory and disk ------------------------------------------------------------------------------------------------


def test_timed_once_then_from_memory_then_from_disk(tmp_path):
    gpu = Gpu(reference=1.0, triton=0.5, cuda=0.6)
    tuner = Tuner(Winners(tmp_path / "made" / "for it"))
    assert tuner.known(QUESTION) is None
    assert gpu.ask(tuner).kernel == "triton"
    made = len(gpu.calls_made)
    assert gpu.ask(tuner) is tuner.known(QUESTION)
    again = gpu.ask(Tuner(Winners(tmp_path / "made" / "for it")))
    assert (again.kernel, again.seconds) == ("triton", tuner.known(QUESTION).seconds)
    assert "in an earlier run" in again.reason
    assert len(gpu.calls_made) == made


CHANGES = {
    "place": PLACE._replace(versions=(("torch", "2.14"), ("kernels", "abc"))),
    "candidates": ("triton",),
    "channels": (3, 64, 128),
    "program": (1, 1),
    "batchnorm": (False, True),
    "weights_last": (True, False),
    "dtypes": ("torch.bfloat16",) * 3,
    "precision": "high",
    "cudnn": (True, True, False),
    "input_last": True,
    "size": (2, 224, 224),
}


@pytest.mark.parametrize("name", Question._fields)
def test_whatever_changes_the_time_is_part_of_the_question(name, tmp_path):
    gpu = Gpu(reference=1.0, triton=0.5, cuda=0.6)
    gpu.ask(Tuner(Winners(tmp_path)))
    made = len(gpu.calls_made)
    gpu.ask(Tuner(Winners(tmp_path)), QUESTION._replace(**{name: CHANGES[name]}))
    assert len(gpu.calls_made) > made
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "damage", ["", "{", "null", "[]", '{"question": "another", "winner": "cuda", "seconds": {"cuda": 1}}', "\x80"]
)
def test_a_damaged_file_is_told_and_replaced(damage, tmp_path):
    gpu = Gpu(reference=1.0, triton=0.5, cuda=0.6)
    gpu.ask(Tuner(Winners(tmp_path)))
    (path,) = tmp_path.iterdir()
    sound = path.read_text()
    path.write_bytes(damage.encode("latin-1"))
    made = len(gpu.calls_made)
    with pytest.warns(RuntimeWarning, match="is not legible .*; the kernels are timed again"):
        assert gpu.ask(Tuner(Winners(tmp_path))).kernel == "triton"
    assert len(gpu.calls_made) > made
    assert json.loads(path.read_text())["winner"] == json.loads(sound)["winner"]


def test_a_winner_that_is_not_there_any_more_is_timed_again(tmp_path):
    gpu = Gpu(reference=1.0, triton=0.5, cuda=0.6)
    gpu.ask(Tuner(Winners(tmp_path)))
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace('"triton"', '"titan"').replace('\\"titan\\"', '\\"triton\\"'))
    assert json.loads(path.read_text())["winner"] == "titan"
    assert gpu.ask(Tuner(Winners(tmp_path))).kernel == "triton"
    assert json.loads(path.read_text())["winner"] == "triton"


def test_a_folder_that_cannot_be_written_to_is_told_once(tmp_path):
    occupied = tmp_path / "a file"
    occupied.write_text("")
    gpu, tuner = Gpu(reference=1.0, triton=0.5, cuda=0.6), Tuner(Winners(occupied / "folder"))
    with pytest.warns(RuntimeWarning, match="cannot be written to"):
        gpu.ask(tuner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu.ask(tuner, QUESTION._replace(size=(2, 224, 224))).kernel == "triton"
    assert tuner.known(QUESTION).kernel == "triton"


def test_two_processes_that_write_the_same_answer_leave_one_whole_file(tmp_path):
    code = f"""
import runpy
from pathlib import Path
Winners = runpy.run_path({winners_module.__file__!r})["Winners"]  # without PyTorch, which takes a second to import
for i in range(300):
    Winners(Path({str(tmp_path)!r})).write("question", "triton", {{"triton": i, "reference": 2.0}})
"""
    writers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    winners = Winners(tmp_path)
    while any(writer.poll() is None for writer in writers):
        found = winners.read("question")  # warns, hence fails, on half a file
        assert found is None or found[0] == "triton"
        time.sleep(1e-3)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1


def test_the_folder_is_the_platforms():
    home = Path("/home/me")
    assert cache_folder("linux", {}, home) == home / ".cache/vgg-fast/tuning"
    assert cache_folder("linux", {"XDG_CACHE_HOME": "relative"}, home) == home / ".cache/vgg-fast/tuning"
    assert cache_folder("linux", {"XDG_CACHE_HOME": "/var/x"}, home) == Path("/var/x/vgg-fast/tuning")
    assert cache_folder("darwin", {}, home) == home / "Library/Caches/vgg-fast/tuning"
    assert cache_folder("win32", {"LOCALAPPDATA": "/local"}, home) == Path("/local/vgg-fast/tuning")


# --- when not to time -----------------------------------------------------------------------------------------------


def test_nothing_is_timed_while_a_graph_is_captured(tmp_path):
    gpu, tuner = Gpu(reference=1.0, triton=0.5, cuda=0.6), Tuner(Winners(tmp_path))
    verdict = gpu.ask(tuner, may_time=False)
    assert verdict.kernel == "reference"
    assert "CUDA graph" in verdict.reason
    assert gpu.calls_made == []
    assert gpu.ask(tuner).kernel == "triton"  # the refusal was not remembered
    assert gpu.ask(tuner, may_time=False).kernel == "triton"
    assert gpu.ask(Tuner(Winners(tmp_path)), may_time=False).kernel == "reference"  # never run in this process


def test_vgg_fast_tune():
    assert tuning.enabled({})
    assert not tuning.enabled({"VGG_FAST_TUNE": "0"})
    with pytest.raises(RuntimeError, match=r"VGG_FAST_TUNE is 'off'; it must be 0 .* or 1"):
        tuning.enabled({"VGG_FAST_TUNE": "off"})


def test_images_of_all_sizes_are_not_all_timed():
    gpu, tuner = Gpu(reference=1.0, triton=0.5), Tuner(Winners(None))
    for i in range(MOST_SIZES):
        gpu.milliseconds["triton"] = 2.0 if i < 3 else 0.5  # small maps are PyTorch's
        gpu.ask(tuner, QUESTION._replace(size=(1, 32 + 16 * i, 64)))
    made = len(gpu.calls_made)
    assert gpu.ask(tuner, QUESTION._replace(size=(1, 16, 64))).kernel == "reference"
    far = gpu.ask(tuner, QUESTION._replace(size=(4, 1000, 1000)))
    assert far.kernel == "triton"
    assert "the nearest of 16 sizes" in far.reason
    assert len(gpu.calls_made) == made
    gpu.ask(tuner, QUESTION._replace(size=(1, 16, 64), precision="high"))  # another chain
    assert len(gpu.calls_made) > made


# --- several at once, and interruptions -----------------------------------------------------------------------------


def test_threads_that_ask_at_once_time_once():
    gpu, tuner = Gpu(reference=1.0, triton=0.5, cuda=0.6), Tuner(Winners(None))
    verdicts = stacks.at_once(*[lambda: gpu.ask(tuner)] * 4)
    assert {verdict.kernel for verdict in verdicts} == {"triton"}
    alone = Gpu(reference=1.0, triton=0.5, cuda=0.6)
    contest(alone.calls(), alone.clock, disagreement)
    assert sorted(gpu.calls_made) == sorted(alone.calls_made)


def test_a_model_called_while_timing_is_not_timed_itself():
    gpu, tuner = Gpu(reference=1.0, triton=0.5), Tuner(Winners(None))
    inner: list[tuning.Verdict] = []

    def clock(call: Callable[[], object], repeats: int) -> float:
        inner.append(gpu.ask(tuner, QUESTION._replace(size=(9, 9, 9))))  # as a signal handler might
        return gpu.clock(call, repeats)

    assert tuner.choose(QUESTION, gpu.calls(), clock, disagreement).kernel == "triton"
    assert {verdict.reason for verdict in inner} == {"another problem is being timed"}


@pytest.mark.parametrize("after", [0, 5])
def test_ctrl_c_leaves_nothing_behind(after, tmp_path):
    gpu, tuner = Gpu(reference=1.0, triton=0.5), Tuner(Winners(tmp_path))
    gpu.raises["triton"], gpu.after = KeyboardInterrupt(), after
    with pytest.raises(KeyboardInterrupt):
        gpu.ask(tuner)
    assert tuner.known(QUESTION) is None
    assert list(tmp_path.iterdir()) == []
    gpu.raises.clear()
    assert gpu.ask(tuner).kernel == "triton"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_child_forked_while_timing_can_time():
    gpu, tuner = Gpu(reference=1.0, triton=0.5), Tuner(Winners(None))
    at_it, go_on = threading.Event(), threading.Event()

    def clock(call: Callable[[], object], repeats: int) -> float:
        at_it.set()
        assert go_on.wait(30)
        return gpu.clock(call, repeats)

    timing = threading.Thread(target=tuner.choose, args=(QUESTION, gpu.calls(), clock, disagreement))
    timing.start()
    assert at_it.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a deadlock ends the child
        verdict = Gpu(reference=1.0, triton=0.5).ask(tuner)
        os._exit(0 if verdict.kernel == "triton" else 1)
    go_on.set()
    timing.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
