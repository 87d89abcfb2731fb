"""What `auto` asks before it takes a kernel on a GPU: everything that a time depends on, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from stacks import changed, stack
from torch import nn

from vgg_fast import choice, gpu
from vgg_fast.chains import Plan
from vgg_fast.tuning import Place, Question

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
