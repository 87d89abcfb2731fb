"""``vgg-fast demo``: real photographs through a plain PyTorch VGG16-BN and through the same model accelerated."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from torch import Tensor, nn

from vgg_fast.accelerate import accelerate
from vgg_fast.bench import host, measure, peers
from vgg_fast.bench.measure import Timing
from vgg_fast.bench.peers import CHANNELS_LAST, EAGER, OURS, Agreement, Contestant
from vgg_fast.cli import photos
from vgg_fast.cli._ui import (
    FAILED,
    Bar,
    check_backend,
    check_isa,
    command,
    complain,
    dtype_name,
    new_table,
    out,
    parse_dtypes,
    print_json,
    progress,
    show,
    user_errors,
)
from vgg_fast.models.weights import WeightsError, fitted_state, read_weights

_BUDGET_S = 6.0  # per part and dtype, so that the whole demo stays under a minute on two cores
_STEPS = 4  # per dtype, besides the rounds: float64, answers, two warm-ups


@dataclass(frozen=True)
class Result:
    """What one dtype gave.

    Attributes:
        dtype: of weights and images.
        kernels: which ran; empty if nothing was fused.
        exact_top5, pytorch_top5, ours_top5: class indices, one list per image; exact is in float64.
        agreement: of the logits.
        allowed_logit_error: how far a logit of ours may be off, in absolute terms.
        top5_agree: see :func:`top5_agree`.
        timings: part (``model``, ``features``) -> contestant -> milliseconds per image at batch 1.
    """

    dtype: torch.dtype
    kernels: tuple[str, ...]
    exact_top5: list[list[int]]
    pytorch_top5: list[list[int]]
    ours_top5: list[list[int]]
    agreement: Agreement
    allowed_logit_error: float
    top5_agree: bool
    timings: dict[str, dict[str, Timing]]

    @property
    def passed(self) -> bool:
        """The answers agree."""
        return self.agreement.agrees and self.top5_agree

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "dtype": dtype_name(self.dtype),
            "kernels": self.kernels,
            "exact_top5": self.exact_top5,
            "pytorch_top5": self.pytorch_top5,
            "ours_top5": self.ours_top5,
            "relative_error": {k: v if math.isfinite(v) else None for k, v in asdict(self.agreement).items()},
            "top5_agree": self.top5_agree,
            "passed": self.passed,
            "ms_per_image": {
                part: {name: {"median": t.median, "min": t.minimum} for name, t in timings.items()}
                for part, timings in self.timings.items()
            },
            "speedup_over_best": {
                part: 1 / measure.ratio_to_best(timings, OURS) for part, timings in self.timings.items()
            },
        }


def best(logits: Tensor) -> Tensor:
    """Indices of the five largest (all, where there are fewer classes) of ``[N, classes]``, in order."""
    return logits.topk(min(5, logits.shape[1])).indices


def top5_agree(ours: Tensor, exact: Tensor, allowed: float) -> bool:
    """Whether every class in our five best belongs there, logits ``[N, classes]``, up to errors of ``allowed``.

    If no logit is off by more than e, the class that we rank k-th has a true logit of at least the true k-th largest
    one minus 2e. Where two classes are closer than that, either order is right.
    """
    found, wanted = (exact.gather(1, best(logits)) for logits in (ours, exact))
    return bool((found >= wanted - 2 * allowed).all())


def compare(
    model: nn.Sequential, images: Tensor, dtype: torch.dtype, rounds: int, bar: Bar, backend: str = "auto"
) -> Result:
    """Answers, errors and times of one dtype.

    Args:
        model: plain VGG16-BN in evaluation mode, of this dtype.
        images: ``[N, 3, 224, 224]`` of this dtype.
        rounds: of measuring.
        bar: told about each step.
        backend: as for ``accelerate``.
    """
    name = dtype_name(dtype)
    bar.say(f"{name}: the answers in float64")
    exact = peers.in_float64(model, images)
    bar.step(f"{name}: the answers of PyTorch and of vgg-fast")
    whole = peers.contestants(model, accelerator=partial(accelerate, backend=backend))
    # Image by image, as they are timed.
    answers = {k: torch.cat([c.on(image[None])() for image in images]) for k, c in whole.items()}
    agreement = peers.agreement(answers[OURS], [answers[EAGER], answers[CHANNELS_LAST]], exact)
    pytorch_off = max(float((answers[k].double() - exact).abs().max()) for k in (EAGER, CHANNELS_LAST))
    allowed = peers.ERROR_FACTOR[dtype] * pytorch_off
    kernels = peers.kernels_used(whole[OURS].module, images[:1])
    timings = {}
    for part in ("model", "features"):
        bar.step(f"{name}: ms per image, {part}")
        contestants = whole if part == "model" else {k: _features(c) for k, c in whole.items()}
        timings[part] = _time(contestants, images, rounds, bar)
    bar.step()
    return Result(
        dtype,
        kernels,
        best(exact).tolist(),
        best(answers[EAGER]).tolist(),
        best(answers[OURS]).tolist(),
        agreement,
        allowed,
        top5_agree(answers[OURS], exact, allowed),
        timings,
    )


def _features(contestant: Contestant) -> Contestant:
    return Contestant(contestant.module.get_submodule("features"), contestant.memory_format)


def _time(contestants: dict[str, Contestant], images: Tensor, rounds: int, bar: Bar) -> dict[str, Timing]:
    """Batch 1, another photograph in each round."""
    calls = {name: [c.on(image[None]) for image in images] for name, c in contestants.items()}
    turn = 0

    def next_photo() -> None:
        nonlocal turn
        turn += 1
        if turn > 1:  # the first time is after the warm-up
            bar.step()

    def on_current(name: str) -> Tensor:
        return calls[name][turn % len(images)]()

    return measure.interleave(
        {name: lambda name=name: on_current(name) for name in calls},  # type: ignore[misc]
        rounds=rounds,
        warmup=1,  # everything has run before, for the answers
        budget_s=_BUDGET_S,
        on_round=next_photo,
    )


def build(weights: Path | None, images: Tensor) -> nn.Sequential:
    """The plain model: with the weights of a file, or random ones made sound by calibrating on the images."""
    if weights is None:
        model = peers.plain_vgg16_bn()
        peers.calibrate(model.features, images)  # type: ignore[arg-type]
        return model
    with user_errors(WeightsError):
        state = read_weights(weights)
        last = state.get("classifier.6.weight")
        model = peers.plain_vgg16_bn(num_classes=1000 if last is None else len(last), seed=None)
        model.load_state_dict(fitted_state(model, state, str(weights)))
    return model


def _show(paths: list[Path], results: list[Result], weights: Path | None) -> None:
    for result in results:
        name = dtype_name(result.dtype)
        table = new_table(f"five best classes, {name}")
        for column in ("photograph", "float64", "PyTorch", "vgg-fast"):
            table.add_column(column)
        columns = (result.exact_top5, result.pytorch_top5, result.ours_top5)
        for path, *fives in zip(paths, *columns, strict=True):
            table.add_row(escape(path.name), *(" ".join(map(str, five)) for five in fives))
        show(table)
        if result.exact_top5 != result.ours_top5 and result.top5_agree:
            gap = f"{2 * result.allowed_logit_error:.2g}"
            out.print(f"(classes whose logits are less than {gap} apart may change places in {name})")
    table = new_table("agreement: relative error of the logits against float64")
    for column in ("dtype", "PyTorch", "vgg-fast", "allowed", "five best", "verdict", "kernel"):
        table.add_column(column)
    for result in results:
        a = result.agreement
        table.add_row(
            dtype_name(result.dtype),
            *(f"{error:.1e}" for error in (a.pytorch, a.ours, a.allowed)),
            "agree" if result.top5_agree else "DIFFER",
            "[green]ok[/]" if result.passed else "[red]MISS[/]",
            ", ".join(result.kernels) or "none",
        )
    show(table)
    table = new_table("ms per image, batch 1: median (min)")
    for column in ("dtype", "part", "PyTorch eager", "channels_last", "vgg-fast", "speed-up"):
        table.add_column(column, justify="left" if column in ("dtype", "part") else "right")
    for result in results:
        for part, timings in result.timings.items():
            cells = (f"{timings[k].median:.1f} ({timings[k].minimum:.1f})" for k in (EAGER, CHANNELS_LAST, OURS))
            speedup = 1 / measure.ratio_to_best(timings, OURS)
            table.add_row(dtype_name(result.dtype), part, *cells, f"[bold]{speedup:.2f}x[/]")
    show(table)
    out.print(
        f"{host.cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}. "
        "Speed-up over the faster of the two eager forms."
        + ("" if weights else " The weights are random: the classes mean nothing, their agreement does.")
    )
    for result in results:
        if not result.kernels:
            out.print(f"{dtype_name(result.dtype)}: no fused kernel ran; vgg-fast doctor says what is missing")


@command
def demo(
    images: Annotated[
        list[Path] | None, typer.Argument(help="Image files; by default photographs that scikit-image ships.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16, or several with commas.")] = "fp32,bf16",
    weights: Annotated[
        Path | None, typer.Option(help="State dict of torchvision's vgg16_bn: .pth or .safetensors.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of measuring; fewer if the machine is slow.")] = 8,
    backend: Annotated[str, typer.Option(help="auto, or the backend or kernel that has to run.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Real photographs through a plain PyTorch VGG16-BN and the same model accelerated: same answers, less time."""
    check_isa()
    dtypes = parse_dtypes(dtype)
    with user_errors(photos.PhotoError):
        paths = images or photos.shipped()
        pixels = photos.read_all(paths)
    check_backend(backend, dtypes)
    results = []
    with progress("building VGG16-BN in plain PyTorch", len(dtypes) * (2 * rounds + _STEPS) + 1) as bar:
        model = build(weights, pixels)
        bar.step()
        for each in dtypes:
            # A copy: what is rounded to bf16 once would stay so in the dtypes after it.
            of_dtype = model if each is torch.float32 else copy.deepcopy(model).to(each)
            results.append(compare(of_dtype, pixels.to(each), each, rounds, bar, backend))
    if json:
        print_json(
            {
                "images": [str(path) for path in paths],
                "weights": str(weights) if weights else "random, calibrated on the images",
                "results": [result.as_dict() for result in results],
                "machine": host.describe(),
            }
        )
    else:
        _show(paths, results, weights)
    if not all(result.passed for result in results):
        complain("the answers differ by more than allowed")
        raise typer.Exit(FAILED)
