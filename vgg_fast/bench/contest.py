"""One benchmark problem from beginning to end: build it, check every answer, time the contestants in turns.

Shared by ``vgg-fast bench`` and benchmarks/, so that a number in a terminal and a number in a CSV mean the same.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vgg_fast import fold, gpu, testing
from vgg_fast.bench import failures, measure, peers
from vgg_fast.bench.measure import Timing
from vgg_fast.bench.peers import CHANNELS_LAST, EAGER, OURS, Agreement, Contestant, Layer


class Disagreement(Exception):
    """Our answer is off by more than it may be, so there is nothing to time."""


class Unsuitable(Exception):
    """Why a contestant cannot take part in this contest."""


# (plain network, input) -> the call to be timed, for a contestant that is not PyTorch; or it raises Unsuitable.
Engine = Callable[[nn.Sequential, Tensor], Callable[[], Tensor]]

_CPU = torch.device("cpu")

# A peer whose error is more than this many times eager PyTorch's computes something else, and may not set the pace.
PEER_ERROR_FACTOR = 4.0


@dataclass(frozen=True)
class Contest:
    """A problem with its contestants, whose answers have been checked.

    Attributes:
        name: such as ``conv1_2+pool`` or ``features 224``.
        dtype: of weights and input.
        precision: the dtype for people, with what fp32 is computed in: :func:`precision_name`.
        batch: images.
        calls: contestant -> what to time.
        errors: contestant -> relative error against float64.
        agreement: ours judged by PyTorch's own.
        kernels: that our contestant runs; empty if nothing was fused.
        left_out: contestant -> why it does not take part.
        gflop: of one image, the operations of direct convolution; None where nobody counted them.
        megabytes: of one image: input, output and its share of the weights; None as above.
    """

    name: str
    dtype: torch.dtype
    precision: str
    batch: int
    calls: Mapping[str, Callable[[], object]]
    errors: dict[str, float]
    agreement: Agreement
    kernels: tuple[str, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    gflop: float | None = None
    megabytes: float | None = None

    def time(
        self, rounds: int = 10, budget_s: float = 20.0, on_round: Callable[[], None] | None = None
    ) -> dict[str, Timing]:
        """Milliseconds per image of every contestant, measured in turns (:func:`vgg_fast.bench.measure.interleave`)."""
        timings = measure.interleave(self.calls, rounds=rounds, budget_s=budget_s, on_round=on_round)
        return {name: Timing(tuple(ms / self.batch for ms in t.milliseconds)) for name, t in timings.items()}

    def launches(self) -> list[dict[str, Any]]:
        """One row per contestant: milliseconds until a call returns, and until its work is done.

        On a CPU they are the same. On a GPU the first is Python's, PyTorch's and the driver's part: where it is nearly
        as large as the second the GPU waits for it, and a CUDA graph would help.
        """
        result = []
        for name, call in self.calls.items():
            returns, done = measure.enqueue(call)
            numbers = {"returns_ms": round(returns, 4), "done_ms": round(done, 4)}
            where = {"problem": self.name, "precision": self.precision, "batch": self.batch}
            result.append({**where, "contestant": name, **numbers})
        return result

    def rows(self, timings: dict[str, Timing]) -> list[dict[str, Any]]:
        """One row per contestant for JSON, CSV and the report; ``ratio_to_best_peer`` on ours alone.

        ``ratio_of_ours`` and its quartiles are taken round by round (our time over this contestant's in the same
        round), so that what disturbs the machine for a while cancels out.
        """
        return [
            {
                "problem": self.name,
                "dtype": str(self.dtype).removeprefix("torch."),
                "precision": self.precision,
                "batch": self.batch,
                "contestant": name,
                "kernel": " ".join(self.kernels) if name == OURS else "",
                "median_ms_per_image": round(timing.median, 7),
                "min_ms_per_image": round(timing.minimum, 7),
                "rounds": len(timing.milliseconds),
                "ratio_to_best_peer": round(measure.ratio_to_best(_rivals(timings), OURS), 4) if name == OURS else None,
                **_ratios(timings[OURS], timing),
                "relative_error": self.errors[name],
                "gflop_per_image": self.gflop,
                "megabytes_per_image": self.megabytes,
            }
            for name, timing in timings.items()
        ]


def _rivals(timings: Mapping[str, Timing]) -> dict[str, Timing]:
    """Ours, and whom it has to beat: not our own kernels by name, nor replays, which do less than a call."""
    return {n: t for n, t in timings.items() if n == OURS or not (n.startswith(OURS) or n.endswith(peers.GRAPH))}


def precision_name(dtype: torch.dtype, device: torch.device = _CPU) -> str:
    """``fp32``, ``bf16``, ``fp16``; ``fp32 high`` where PyTorch's float32 precision has been lowered to that.

    On a GPU fp32 is ``fp32`` or ``tf32``, by PyTorch's setting for convolutions on CUDA devices.

    Example:
        >>> precision_name(torch.bfloat16)
        'bf16'
    """
    short = next((name for name, value in peers.DTYPES.items() if value is dtype), str(dtype))
    if device.type == "cuda":
        return gpu.float32_name() if dtype == torch.float32 else short
    setting = torch.get_float32_matmul_precision()
    return f"{short} {setting}" if dtype == torch.float32 and setting != "highest" else short


def _ratios(ours: Timing, theirs: Timing) -> dict[str, float]:
    ratios = [a / b for a, b in zip(ours.milliseconds, theirs.milliseconds, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"ratio_of_ours": round(middle, 4), "ratio_low": round(low, 4), "ratio_high": round(high, 4)}


def layer(
    which: Layer,
    dtype: torch.dtype,
    batch: int = 1,
    engines: Mapping[str, Engine] | None = None,
    device: torch.device = _CPU,
    **options: Any,
) -> Contest:
    """A contest over one convolution with its batch-norm, ReLU and perhaps pool.

    Args:
        which: of :data:`vgg_fast.bench.peers.LAYERS`, or any other.
        dtype: of weights and input.
        batch: images.
        engines: contestants that are not PyTorch as it is, by name.
        device: where it runs; what is exact comes from the CPU.
        options: of :func:`vgg_fast.bench.peers.contestants`.

    Raises:
        Disagreement: our answer lies outside its bound, in total or in any one element.

    Example:
        >>> layer(peers.Layer("tiny", 3, 8, 6, True), torch.float32).name
        'tiny+pool'
    """
    model = peers.plain_layer(which)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, which.cin, which.size, which.size, generator=generator)
    if which.cin > 3:
        x = x.relu()  # half of it zeros, as behind a ReLU: the power that a processor draws depends on it
    peers.calibrate(model, x[:1])
    model, x = model.to(dtype), x.to(dtype)
    name = f"{which.name}+pool" if which.pool else which.name
    contest, answer, exact = _contest(name, model, x, engines, options, device)
    contest = replace(contest, gflop=which.gflop, megabytes=_megabytes(which, dtype, batch))
    try:
        bound = _bound(model, x[_ends(batch)], which.pool, contest.kernels)
        testing.assert_within(answer, exact, bound, f"{name} {dtype}")
    except AssertionError as error:
        raise Disagreement(str(error)) from error
    return contest


def features(dtype: torch.dtype, batch: int = 1, size: int = 224, **others: Any) -> Contest:
    """A contest over the convolutional part of VGG16-BN; arguments as :func:`layer`.

    Raises:
        Disagreement: our error is larger than the precision ladder allows.
    """
    return _network("features", peers.plain_features(), dtype, batch, size, **others)


def model(dtype: torch.dtype, batch: int = 1, size: int = 224, **others: Any) -> Contest:
    """A contest over all of VGG16-BN, its dense layers included; arguments as :func:`layer`.

    Raises:
        Disagreement: our error is larger than the precision ladder allows.
    """
    return _network("model", peers.plain_vgg16_bn(), dtype, batch, size, **others)


def _network(
    part: str,
    network: nn.Sequential,
    dtype: torch.dtype,
    batch: int,
    size: int,
    engines: Mapping[str, Engine] | None = None,
    device: torch.device = _CPU,
    **options: Any,
) -> Contest:
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    convolutions = network.get_submodule("features") if hasattr(network, "features") else network
    peers.calibrate(convolutions, x[:1])
    return _contest(f"{part} {size}", network.to(dtype), x.to(dtype), engines, options, device, layered=True)[0]


def _contest(
    name: str,
    network: nn.Sequential,
    x: Tensor,
    engines: Mapping[str, Engine] | None,
    options: dict[str, Any],
    device: torch.device,
    layered: bool = False,
) -> tuple[Contest, Tensor, Tensor]:
    """The contest, and for the first and last image our answer and the exact one; layered: of more than one layer."""
    on_cpu = device.type == "cpu"
    placed, inputs = (network, x) if on_cpu else (copy.deepcopy(network).to(device), x.to(device))
    precision = precision_name(x.dtype, device)
    contestants: dict[str, Contestant] = peers.contestants(placed, **options)
    calls = {key: contestant.on(inputs) for key, contestant in contestants.items()}
    left_out = {}
    for key, engine in (engines or {}).items():
        try:
            calls[key] = engine(placed, inputs)
        except Unsuitable as reason:
            left_out[key] = str(reason)
        except Exception as error:
            left_out[key] = _why(error)
    calls[OURS] = calls.pop(OURS)  # last, as in every table
    # Both ends of the batch: float64 takes seconds per image, and position in a batch is what could go wrong.
    ends = _ends(len(x))
    exact = peers.in_float64(network, x[ends])
    answers = {}
    for key, call in list(calls.items()):
        try:
            answers[key] = call()[ends].cpu()
        except Exception as error:
            if key in (EAGER, CHANNELS_LAST, OURS):
                raise
            left_out[key] = _why(error)
            del calls[key]
    tf32 = partial(peers.in_tf32, network, x[ends]) if layered else None
    # A tensor core may cut operands off where this machine's PyTorch rounds them, or uses no tensor core.
    cut = partial(peers.in_tf32, network, x[ends], cut=True) if precision == "tf32" else None
    agreement = peers.agreement(answers[OURS], [answers[EAGER], answers[CHANNELS_LAST]], exact, tf32, cut)
    if not agreement.agrees:
        raise Disagreement(
            f"{name} {precision} batch {len(x)}: relative error {agreement.ours:.2e}, allowed {agreement.allowed:.2e} "
            f"(PyTorch's own is {agreement.pytorch:.2e})"
        )
    errors = {key: testing.relative_error(answer, exact) for key, answer in answers.items()}
    for key in [key for key in calls if key not in (EAGER, CHANNELS_LAST, OURS)]:
        if not errors[key] <= max(PEER_ERROR_FACTOR * agreement.pytorch, agreement.allowed):  # also NaN
            left_out[key] = f"wrong answer: relative error {errors.pop(key):.2e}, eager's is {agreement.pytorch:.2e}"
            del calls[key]
    # On a GPU the batch decides which kernel is the fastest.
    kernels = peers.kernels_used(contestants[OURS].module, inputs[:1] if on_cpu else inputs)
    contest = Contest(name, x.dtype, precision, len(x), calls, errors, agreement, kernels, left_out)
    return contest, answers[OURS], exact


def _why(error: Exception) -> str:
    """What is said of a contestant that raised.

    Raises:
        Exception: the error itself, if nobody can go on after it.
    """
    if failures.device_lost(error):
        raise error
    if failures.out_of_memory(error):
        failures.free_memory()
        return "out of memory"
    return f"it raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _megabytes(which: Layer, dtype: torch.dtype, batch: int) -> float:
    out = which.cout * which.size**2 / (4 if which.pool else 1)
    numbers = which.cin * which.size**2 + out + 9 * which.cin * which.cout / batch
    return numbers * dtype.itemsize / 1e6


def _ends(batch: int) -> list[int]:
    return [0] if batch == 1 else [0, batch - 1]


def _bound(block: nn.Sequential, x: Tensor, pool: bool, kernels: Sequence[str]) -> Tensor:
    """Elementwise, of convolution and batch-norm with fp32 accumulation and one rounding."""
    conv, norm = block[0], block[1]
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    vectors = (conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    _, affine = fold.batchnorm_affine(conv.out_channels, *vectors, bn_eps=norm.eps)
    kernel = kernels[0] if kernels else ""
    return testing.conv_bound(x, conv.weight.detach(), affine, pool=pool, kernel=kernel)
