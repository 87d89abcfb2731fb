"""Contests over more than a forward: a perceptual-loss step and a training step, against PyTorch eager."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgg_fast import testing
from vgg_fast.bench import peers
from vgg_fast.bench.contest import Contest, Disagreement, precision_name
from vgg_fast.bench.peers import CHANNELS_LAST, EAGER, OURS, Contestant
from vgg_fast.container.sequential import record

# Of our gradient's error to PyTorch's. More than for a forward: where two values in a pool are nearly equal, rounding
# decides which of them gets the gradient, and each such decision is an error of the size of the gradient itself. With
# one input that is a lottery (2e-5 or 6e-3 in fp32, for PyTorch's two memory formats as for us): the median of several.
GRADIENT_ERROR_FACTOR = 2.0
SEEDS = (1, 2, 3)

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
    images = [torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    peers.calibrate(network, images[0][:1])
    network, images = network.to(dtype).train(train), [x.to(dtype) for x in images]
    contestants = peers.contestants(network)
    wide = copy.deepcopy(network).double()
    errors: dict[str, list[float]] = {key: [] for key in contestants}
    agreements = []
    for x in images:
        exact = _flat(step(wide, x.double()))
        answers = {key: _flat(_call(step, contestant, x)()) for key, contestant in contestants.items()}
        agreements.append(peers.agreement(answers[OURS], [answers[EAGER], answers[CHANNELS_LAST]], exact))
        for key, answer in answers.items():
            errors[key].append(testing.relative_error(answer, exact))
    ours, pytorch, allowed = (
        median(getattr(one, field) for one in agreements) for field in ("ours", "pytorch", "allowed")
    )
    agreement = peers.Agreement(ours, pytorch, max(allowed, GRADIENT_ERROR_FACTOR * pytorch))
    if not agreement.agrees:
        raise Disagreement(
            f"{name} {dtype} batch {batch}: relative error {ours:.2e}, allowed {agreement.allowed:.2e} "
            f"(medians of {len(SEEDS)} inputs)"
        )
    calls = {key: _call(step, contestant, images[0]) for key, contestant in contestants.items()}
    with record() as segments:
        calls[OURS]()
    kernels = tuple(sorted({segment.kernel for segment in segments if segment.kernel is not None}))
    middle = {key: median(e) for key, e in errors.items()}
    return Contest(name, dtype, precision_name(dtype), batch, calls, middle, agreement, kernels)


def _call(step: Step, contestant: Contestant, x: Tensor) -> Callable[[], Sequence[Tensor]]:
    x = x.contiguous(memory_format=contestant.memory_format)
    return lambda: step(contestant.module, x)


def _flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])
