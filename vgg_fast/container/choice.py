"""What ``auto`` takes on a GPU for a chain of convolutions: puts :mod:`vgg_fast.gpu.tuning` its question."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vgg_fast import gpu, selection
from vgg_fast.container.chains import Chain
from vgg_fast.gpu.tuning import Clock, Place, Question, Tuner, Verdict, disagreement, enabled, untimed
from vgg_fast.gpu.winners import Winners, default_folder
from vgg_fast.ops import _self_test, conv_stack
from vgg_fast.ops._layout import suggests_channels_last

_tuner = Tuner(Winners(default_folder()))


class Device(NamedTuple):
    """A GPU as far as the choice is concerned.

    Attributes:
        place: its name, capability and software.
        candidates: the kernels that can run a dtype on it.
        clock: see :func:`vgg_fast.gpu.clock`.
        capturing: whether a CUDA graph is being captured.
    """

    place: Place
    candidates: Callable[[torch.dtype], tuple[str, ...]]
    clock: Clock
    capturing: Callable[[], bool]


@functools.cache
def device_of(device: torch.device) -> Device:
    """A device of this machine."""
    candidates = partial(selection.candidates_on, device=device)
    return Device(Place(*gpu.place(device.index)), candidates, gpu.clock(device), partial(gpu.capturing, device))


def by_name(dtype: torch.dtype, device: torch.device, backend: str) -> tuple[str, str]:
    """The kernel that a name stands for, and why it is not the one that comes first; on a GPU one that has passed its
    self test.

    Raises:
        RuntimeError: as :func:`selection.choose`.
    """
    if device.type != "cuda":
        return selection.choose(dtype, device, backend), ""
    choose = partial(selection.choose, dtype, device, backend)
    kernel = tested(choose, partial(_fault, dtype=dtype, device=device))
    if not selection.switched_off(device):
        return kernel, ""
    return kernel, selection.passed_over(kernel, backend, selection.problem_on(dtype, device), device)


def tested(choose: Callable[[], str], fault: Callable[[str], str | None]) -> str:
    """What ``choose`` chooses, again where ``fault`` has just switched that off."""
    kernel = choose()
    return kernel if fault(kernel) is None else choose()


def _fault(kernel: str, dtype: torch.dtype, device: torch.device) -> str | None:
    if kernel not in selection.GPU_KERNELS:
        return None
    failure = partial(_self_test.failure, kernel, dtype, device, conv_stack.run)
    return _self_test.fault(kernel, dtype, device, failure)


def on_gpu(
    chain: Chain,
    children: Sequence[nn.Module],
    tensors: Sequence[Tensor],
    x: Tensor,
    dtype: torch.dtype,
    run: Callable[[str], Tensor | str],
    device: Device | None = None,
    tuner: Tuner = _tuner,
) -> Verdict:
    """The kernel for a chain and an input on a GPU, with the reason.

    Args:
        chain: what is to run.
        children: that it stands for; the first is a convolution, so running them leaves ``x`` as it is.
        tensors: its parameters and statistics.
        x: ``[N, C, H, W]`` on the device.
        dtype: to compute in.
        run: runs the chain by the kernel of that name; a reason (str) why it cannot counts as a failure.
        device: by default that of ``x``.
        tuner: keeps the answers.

    Raises:
        RuntimeError: ``VGG_FAST_TUNE`` has a value it cannot have.
    """
    if not enabled():
        return untimed("VGG_FAST_TUNE=0: kernels are not timed, and an untimed one could be slower than PyTorch")
    device = device or device_of(x.device)
    names = device.candidates(dtype)
    if not names:
        return untimed(selection.why_reference(dtype, x.device))
    question = question_of(device.place, names, chain, tensors, x, dtype)
    known = tuner.known(question)
    if known is not None:
        return known

    def reference() -> Tensor:
        y = x
        for child in children:
            y = child(y)
        return y

    def kernel(name: str) -> Tensor:
        y = run(name)
        if isinstance(y, str):
            raise RuntimeError(y)
        return y

    calls: dict[str, Callable[[], Tensor]] = {
        selection.REFERENCE: reference,
        **{name: partial(kernel, name) for name in names},
    }
    agree = partial(disagreement, precision=question.precision)
    return tuner.choose(question, calls, device.clock, agree, may_time=not device.capturing())


def question_of(
    place: Place,
    candidates: tuple[str, ...],
    chain: Chain,
    tensors: Sequence[Tensor],
    x: Tensor,
    dtype: torch.dtype,
) -> Question:
    """All that the time of a chain depends on; asked before every forward, hence without loops in Python but one.

    Args:
        place: of the device.
        candidates: the kernels that may be timed.
        chain, tensors, x, dtype: as for :func:`on_gpu`.
    """
    weights = [tensor for tensor in tensors if tensor.dim() == 4]
    n, channels, height, width = x.shape
    cudnn = torch.backends.cudnn
    return Question(
        place=place,
        candidates=candidates,
        channels=(channels, *[weight.shape[0] for weight in weights]),
        program=tuple(chain.program),
        batchnorm=tuple([run.bn is not None for run in chain.runs]),
        weights_last=tuple([weight.stride(1) == 1 for weight in weights]),
        dtypes=(str(x.dtype), str(dtype), str(weights[0].dtype)),
        precision=selection.float32_precision(device_type="cuda") if dtype is torch.float32 else "",
        cudnn=(cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        input_last=suggests_channels_last(x),
        size=(n, height, width),
    )
