"""What `auto` asks before it takes a kernel on a GPU: everything that a time depends on, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from stacks import changed, stack
from torch import Tensor, nn

from vgg_fast import gpu, selection
from vgg_fast.container import choice
from vgg_fast.container.chains import Plan
from vgg_fast.gpu.tuning import Place, Question, Tuner, Verdict
from vgg_fast.gpu.winners import Winners
from vgg_fast.ops import _self_test

CPU = torch.device("cpu")
PLACE = Place("Imagined GPU", "sm_90", 132, (("torch", "2.13"),))


def question(model: nn.Sequential, x: torch.Tensor, dtype: torch.dtype = torch.float32, **extra: object) -> Question:
    plan = Plan(tuple(model))
    arguments = {"place": PLACE, "candidates": ("triton",), **extra}
    chain, tensors = plan.parts[0], plan.sources[0].read()
    return choice.question_of(chain=chain, tensors=tensors, x=x, dtype=dtype, **arguments)


def image(*size: int) -> torch.Tensor:
    return torch.zeros(size or (2, 3, 12, 10))


def test_the_question():
    assert question(stack(bn=True), image()) == Question(
        place=PLACE,
        candidates=("triton",),
        channels=(3, 8, 8, 16),
        program=(1, 3, 3),
        batchnorm=(True, True, True),
        weights_last=(False, False, False),
        dtypes=("torch.float32",) * 3,
        precision="high",
        cudnn=(True, False, False),
        input_last=False,
        size=(2, 12, 10),
    )
    assert question(stack(), image()) == question(stack(), torch.ones(2, 3, 12, 10))  # values do not matter


CHANGES: dict[str, Callable[[], Question]] = {
    "place": lambda: question(stack(), image(), place=PLACE._replace(device="Another GPU")),
    "candidates": lambda: question(stack(), image(), candidates=("triton", "cuda")),
    "channels": lambda: question(changed(stack(), **{"5": nn.Conv2d(8, 24, 3, padding=1)}), image()),
    "program": lambda: question(stack()[:-1], image()),
    "batchnorm": lambda: question(stack(bn=True), image()),
    "weights_last": lambda: question(stack().to(memory_format=torch.channels_last), image()),
    "dtypes": lambda: question(stack(), image(), torch.float16)._replace(precision="high"),
    "input_last": lambda: question(stack(), image().contiguous(memory_format=torch.channels_last)),
    "size": lambda: question(stack(), image(1, 3, 12, 10)),
}


@pytest.mark.parametrize("field", CHANGES)
def test_what_changes_the_question(field):
    before, after = question(stack(), image()), CHANGES[field]()
    assert [name for name in Question._fields if getattr(before, name) != getattr(after, name)] == [field]


def test_settings_of_cudnn_are_part_of_the_question():
    before = question(stack(), image())
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        after = question(stack(), image())
        half = question(stack(), image(), torch.float16)
    assert (before.precision, after.precision, half.precision) == ("high", "highest", "")
    assert (before.cudnn, after.cudnn) == ((True, False, False), (True, True, False))
    assert question(stack(), image()) == before


def test_versions_name_what_a_time_depends_on():
    versions = dict(gpu.versions())
    assert list(versions) == ["torch", "cuda", "triton", "kernels"]
    assert versions["torch"] == torch.__version__
    assert len(versions["kernels"]) == 16


# --- on an imagined GPU ---------------------------------------------------------------------------------------------


class Chain:
    """A chain on the CPU, whose kernels `fast` and `slow` are the children themselves, timed by their names."""

    def __init__(self, *candidates: str) -> None:
        self.model, self.x, self.ran, self.is_captured = stack(bn=True), image(), [], False
        self.device = choice.Device(PLACE, lambda dtype: candidates, self.clock, lambda: self.is_captured)
        self.tuner = Tuner(Winners(None))

    def clock(self, call: Callable[[], object], repeats: int) -> float:
        self.ran.append("children")
        call()
        return {"fast": 1e-3, "children": 2e-3, "slow": 3e-3}[self.ran[-1]]

    def run(self, name: str) -> Tensor | str:
        self.ran.append(name)
        with torch.no_grad():
            return "its weights are not plain" if name == "unfit" else self.model(self.x)

    def ask(self) -> Verdict:
        plan = Plan(tuple(self.model))
        tensors = plan.sources[0].read()
        with torch.no_grad():
            return choice.on_gpu(
                plan.parts[0], self.model, tensors, self.x, torch.float32, self.run, self.device, self.tuner
            )


@pytest.mark.parametrize(
    ("candidates", "winner"), [(("slow", "fast"), "fast"), (("slow",), "reference"), ((), "reference")]
)
def test_the_faster_of_kernels_and_children(candidates, winner):
    chain = Chain(*candidates)
    verdict = chain.ask()
    assert verdict.kernel == winner
    assert set(verdict.seconds) == ({"reference", *candidates} if candidates else set())
    assert torch.equal(chain.x, image())  # in-place ReLUs of the children have not touched it
    asked = len(chain.ran)
    assert chain.ask().kernel == winner
    assert len(chain.ran) == asked


def test_a_kernel_that_cannot_run_the_weights_is_out():
    chain = Chain("unfit", "fast")
    with pytest.warns(RuntimeWarning, match="'unfit' is not used .*RuntimeError: its weights are not plain"):
        assert chain.ask().kernel == "fast"


def test_neither_captured_graphs_nor_the_switch_run_anything(monkeypatch):
    chain = Chain("fast")
    chain.is_captured = True
    assert "CUDA graph" in chain.ask().reason
    monkeypatch.setenv("VGG_FAST_TUNE", "0")
    chain.is_captured = False
    assert "VGG_FAST_TUNE=0" in chain.ask().reason
    monkeypatch.setenv("VGG_FAST_TUNE", "no")
    with pytest.raises(RuntimeError, match="VGG_FAST_TUNE is 'no'"):
        chain.ask()
    assert chain.ran == []


def test_an_input_that_pytorch_refuses_is_left_to_it():
    chain = Chain("fast")
    chain.x = image(2, 5, 12, 10)
    assert "PyTorch's own layers raise RuntimeError" in chain.ask().reason


class Hopper:
    """A backend's name on an H100: which kernel it stands for, and what their self tests say."""

    def __init__(self, monkeypatch, *broken: str) -> None:
        monkeypatch.setattr(selection, "_switched_off", {})
        self.broken, self.tried = broken, []
        self.problem = selection.Problem(torch.float16, "cuda", "sm_90")

    def choose(self) -> str:
        off, kernels = selection.switched_off(CPU), selection.kernels_of("cuda", self.problem)
        return next((kernel for kernel in kernels if kernel not in off), kernels[0])

    def fault(self, kernel: str) -> str | None:
        self.tried.append(kernel)
        reason = "3 of 384 values differ" if kernel in self.broken else None
        return _self_test.fault(kernel, torch.float16, CPU, lambda: reason)


def test_a_kernel_that_fails_at_its_first_use_is_replaced_in_the_same_call(monkeypatch):
    hopper = Hopper(monkeypatch, "cuda_wgmma")
    with pytest.warns(RuntimeWarning, match="'cuda_wgmma' failed its self test on cpu, so it is not used: 3 of 384"):
        assert choice.tested(hopper.choose, hopper.fault) == "cuda"
    assert choice.tested(hopper.choose, hopper.fault) == "cuda"
    assert hopper.tried == ["cuda_wgmma", "cuda"]
    told = selection.passed_over("cuda", "cuda", hopper.problem, CPU)
    assert told == "runs 'cuda' in place of 'cuda_wgmma', which failed its self test on cpu: 3 of 384 values differ"
    assert selection.passed_over("cuda", "=cuda", hopper.problem, CPU) == ""
    assert selection.passed_over("cuda_wgmma", "cuda", hopper.problem, CPU) == ""
