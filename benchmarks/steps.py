"""Contests over more than a forward: a perceptual-loss step and a training step, against PyTorch eager."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgg_fast import peers, testing
from vgg_fast.contest import Contest, Disagreement
from vgg_fast.peers import CHANNELS_LAST, EAGER, OURS, Contestant
from vgg_fast.sequential import record

# Of our gradient's error to PyTorch's. More than for a forward: where two values in a pool are nearly equal, rounding
# decides which of them gets the gradient, and each such decision is an error of the size of the gradient itself.
GRADIENT_ERROR_FACTOR = 2.0

Step = Callable[[nn.Module, Tensor], Sequence[Tensor]]


def perceptual(dtype: torch.dtype, batch: int = 1, size: int = 224) -> Contest:
    """Frozen features of an image and of a target, their squared distance, and its gradient in the image.

    Raises:
        Disagreement: our gradient is off by more than twice what PyTorch's is.
    """

    def step(model: nn.Module, x: Tensor) -> Sequence[Tensor]:
        image = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        with torch.no_grad():
            target = model(x.flip(-1))
        return torch.autograd.grad(F.mse_loss(model(image), target), [image])

    return _contest(f"perceptual step {size}", step, peers.plain_features().requires_grad_(False), dtype, batch, size)


def training(dtype: torch.dtype, batch: int = 1, size: int = 224) -> Contest:
    """Features with batch statistics, a loss, and its gradient in every weight; arguments as :func:`perceptual`.

    Raises:
        Disagreement: as :func:`perceptual`.
    """

    def step(model: nn.Module, x: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(model(x).square().mean(), list(model.parameters()))

    return _contest(f"training step {size}", step, peers.plain_features(), dtype, batch, size, train=True)


def _contest(
    name: str, step: Step, network: nn.Sequential, dtype: torch.dtype, batch: int, size: int, train: bool = False
) -> Contest:
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    peers.calibrate(network, x[:1])
    network, x = network.to(dtype).train(train), x.to(dtype)
    contestants = peers.contestants(network)
    calls = {key: _call(step, contestant, x) for key, contestant in contestants.items()}
    wide = copy.deepcopy(network).double()
    exact = _flat(step(wide, x.double()))
    del wide
    answers = {key: _flat(call()) for key, call in calls.items()}
    agreement = peers.agreement(answers[OURS], [answers[EAGER], answers[CHANNELS_LAST]], exact)
    allowed = max(agreement.allowed, GRADIENT_ERROR_FACTOR * agreement.pytorch)
    if not agreement.ours <= allowed:
        raise Disagreement(f"{name} {dtype} batch {batch}: relative error {agreement.ours:.2e}, allowed {allowed:.2e}")
    errors = {key: testing.relative_error(answer, exact) for key, answer in answers.items()}
    with record() as segments:
        calls[OURS]()
    kernels = tuple(sorted({segment.kernel for segment in segments if segment.kernel is not None}))
    return Contest(name, dtype, batch, calls, errors, agreement, kernels)


def _call(step: Step, contestant: Contestant, x: Tensor) -> Callable[[], Sequence[Tensor]]:
    x = x.contiguous(memory_format=contestant.memory_format)
    return lambda: step(contestant.module, x)


def _flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])
