"""Which kernel is fastest on a GPU, by measurement: timed once per problem, remembered in memory and on disk.

``auto`` on a GPU may never be slower than what the user had, so PyTorch's own layers (cuDNN in the caller's memory
format) take part, a kernel of ours must win by :data:`MARGIN`, and its result must agree. The clock, the contestants
and the facts about the device are arguments, so that the rules can be tested where there is no GPU.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vgg_fast.gpu.winners import Winners
from vgg_fast.locks import ForkLock
from vgg_fast.selection import REFERENCE

MARGIN = 0.03  # by which a kernel must beat PyTorch: the noise of a median of seven on a GPU whose clocks move
ROUNDS, LEAST_ROUNDS = 7, 3
SECONDS = 1.0  # of timing, after which LEAST_ROUNDS are enough: large batches in fp32 take half a second a call
SAMPLE = 2e-3  # seconds that one sample should last: two thousand times the resolution of a CUDA event
MOST_REPEATS = 20
MOST_SIZES = 16  # of input per chain; see Tuner

Call = Callable[[], Tensor]
Clock = Callable[[Callable[[], object], int], float]


class Place(NamedTuple):
    """What a time depends on besides the problem: the device and the software."""

    device: str
    capability: str
    multiprocessors: int
    versions: tuple[tuple[str, str], ...]


class Question(NamedTuple):
    """A problem to be timed, in full: equal questions have equal answers.

    Attributes:
        place: where.
        candidates: the kernels that can run it, PyTorch's own layers aside.
        channels: of the input, then of every convolution's output.
        program: of ``conv_stack``.
        batchnorm: per convolution, whether batch norm follows.
        weights_last: per convolution, whether its weight is channels_last.
        dtypes: of the input, of the computation, of the weights.
        precision: of fp32, as in ``selection.Problem``.
        cudnn: its settings that change what it does.
        input_last: whether the input is channels_last.
        size: of the input, ``(N, H, W)``.
    """

    place: Place
    candidates: tuple[str, ...]
    channels: tuple[int, ...]
    program: tuple[int, ...]
    batchnorm: tuple[bool, ...]
    weights_last: tuple[bool, ...]
    dtypes: tuple[str, ...]
    precision: str
    cudnn: tuple[bool, ...]
    input_last: bool
    size: tuple[int, int, int]


class Verdict(NamedTuple):
    """An answer.

    Attributes:
        kernel: the winner, ``reference`` for PyTorch's own layers.
        reason: in words, with the times.
        seconds: a call takes, of every contestant that was timed.
        excluded: why the others were not.
    """

    kernel: str
    reason: str
    seconds: dict[str, float]
    excluded: dict[str, str]


def enabled(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether kernels may be timed: not with ``VGG_FAST_TUNE=0``, under which ``auto`` on a GPU is plain PyTorch.

    Raises:
        RuntimeError: the variable is neither 0 nor 1.

    Example:
        >>> enabled({}), enabled({"VGG_FAST_TUNE": "0"})
        (True, False)
    """
    value = environment.get("VGG_FAST_TUNE", "1")
    if value not in ("0", "1"):
        raise RuntimeError(f"VGG_FAST_TUNE is {value!r}; it must be 0 (plain PyTorch on a GPU) or 1 (timed kernels)")
    return value == "1"


def untimed(reason: str) -> Verdict:
    """PyTorch's own layers, for want of a timing."""
    return Verdict(REFERENCE, reason, {}, {})


# --- one contest ----------------------------------------------------------------------------------------------------


def contest(calls: Mapping[str, Call], clock: Clock, agree: Callable[[Tensor, Tensor], str | None]) -> Verdict:
    """Times kernels against PyTorch, in turns; who raises or disagrees is out.

    Args:
        calls: by kernel name, that of PyTorch's own layers under ``reference``.
        clock: ``clock(call, repeats)`` makes that many calls, and returns the seconds that one of them took.
        agree: ``agree(result, expected)`` is None, or says how a result differs from that of PyTorch.

    Raises:
        Exception: what the reference raises.

    Example:
        >>> calls = {"reference": lambda: torch.zeros(1), "triton": lambda: torch.zeros(1)}
        >>> contest(calls, lambda call, repeats: 1.0 if call is calls["triton"] else 2.0, disagreement).reason
        'timed: triton 1e+03 ms, PyTorch 2e+03 ms'
    """
    expected = calls[REFERENCE]()
    excluded: dict[str, str] = {}
    for name in [name for name in calls if name != REFERENCE]:
        try:
            difference = agree(calls[name](), expected)
        except Exception as error:
            difference = _failure(error)
        if difference is not None:
            excluded[name] = difference
    del expected
    names = [name for name in calls if name not in excluded]
    if names == [REFERENCE]:
        return Verdict(REFERENCE, _words(REFERENCE, {}, excluded), {}, excluded)
    # Once more for warming up, each on its own: cuDNN may be looking for its own fastest algorithm.
    calls[REFERENCE]()
    once = clock(calls[REFERENCE], 1)
    repeats = max(1, min(MOST_REPEATS, round(SAMPLE / max(once, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in names}
    rounds, spent = 0, 0.0
    while rounds < ROUNDS and (rounds < LEAST_ROUNDS or spent < SECONDS):
        # Each round begins with another one: who runs behind whom, and in which clock state, evens out.
        first = rounds % len(names)
        for name in [*names[first:], *names[:first]]:
            if name in excluded:
                continue
            try:
                samples[name].append(clock(calls[name], repeats))
            except Exception as error:
                if name == REFERENCE:
                    raise
                excluded[name] = _failure(error)
                continue
            spent += samples[name][-1] * repeats
        rounds += 1
    seconds = {name: statistics.median(values) for name, values in samples.items() if name not in excluded}
    return Verdict(winner := _winner(seconds), _words(winner, seconds, excluded), seconds, excluded)


def _winner(seconds: Mapping[str, float]) -> str:
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[best] <= (1 - MARGIN) * seconds[REFERENCE] else REFERENCE


def _failure(error: Exception) -> str:
    kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    return f"{kind}: {next(iter(str(error).splitlines()), '')}"


def _words(winner: str, seconds: Mapping[str, float], excluded: Mapping[str, str]) -> str:
    times = ", ".join(
        f"{'PyTorch' if name == REFERENCE else name} {value * 1e3:.3g} ms"
        for name, value in sorted(seconds.items(), key=lambda item: item[1])
    )
    out = "; ".join(f"{name} is out ({reason})" for name, reason in excluded.items())
    if winner == REFERENCE and len(seconds) > 1:
        times += f" (a kernel of ours has to win by {MARGIN:.0%})"
    return f"timed: {'; '.join(part for part in (times, out) if part)}"


_ROUNDINGS = 64
# Units in the last place of what values are rounded to at their coarsest; accumulation is fp32 everywhere.
_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def disagreement(result: Tensor, expected: Tensor, precision: str = "highest") -> str | None:
    """How a result differs from PyTorch's by more than roundings may; None where it does not.

    Allowed are 64 roundings of the largest value. A network of 13 layers amplifies them: on VGG16-BN's features with
    random weights and calibrated statistics PyTorch itself is 24 (fp16), 23 (bf16) and 17 (tf32) of them away from
    float32, without batch norm three. A tile of zeros is above; what is smaller is for the self test, which compares
    bits.

    Args:
        result, expected: of one shape, dtype and memory format.
        precision: of fp32; anything but ``highest`` means operands of 11 bits.

    Example:
        >>> disagreement(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.5]))
        'it differs from PyTorch by 0.5, where values reach 1 and 0.00098 is allowed'
    """
    if result.shape != expected.shape or result.dtype != expected.dtype or result.stride() != expected.stride():
        ours, theirs = (f"{tuple(t.shape)} {t.dtype} {t.stride()}" for t in (result, expected))
        return f"it is {ours}, PyTorch's {theirs}"
    fp32 = 2.0**-16 if precision == "highest" else 2.0**-11
    # Where PyTorch overflows nothing can be compared: we round later than it does.
    finite = expected.isfinite()
    wide = expected.float().where(finite, 0.0)
    error = float((result.float().where(finite, 0.0) - wide).abs().max())
    scale = float(wide.abs().max())
    bound = _ROUNDINGS * _ROUNDOFF.get(result.dtype, fp32) * scale
    if error <= bound:  # false for NaN
        return None
    return f"it differs from PyTorch by {error:.3g}, where values reach {scale:.3g} and {bound:.2g} is allowed"


# --- memory ---------------------------------------------------------------------------------------------------------

_lock = ForkLock()  # held while timing: two contests at once would time each other


class Tuner:
    """Answers each question once: from memory, from disk, or by a contest.

    A chain that has been timed for :data:`MOST_SIZES` sizes of input takes the answer of the nearest of them for every
    further one: code that feeds images of all sizes would otherwise spend its time on timing.

    Args:
        winners: the answers on disk.
    """

    def __init__(self, winners: Winners) -> None:
        self.winners = winners
        self._verdicts: dict[Question, Verdict] = {}
        self._sizes: dict[Question, list[Question]] = {}
        self._timing_thread: int | None = None

    def known(self, question: Question) -> Verdict | None:
        """The answer in memory, cheaply: for every forward."""
        return self._verdicts.get(question)

    def choose(
        self,
        question: Question,
        calls: Mapping[str, Call],
        clock: Clock,
        agree: Callable[[Tensor, Tensor], str | None],
        *,
        may_time: bool = True,
    ) -> Verdict:
        """The answer.

        Args:
            question: the problem.
            calls, clock, agree: for :func:`contest`.
            may_time: False inside the capture of a CUDA graph: only what this process has run before is there then,
                compiled and packed, and an answer that is not in memory is ``reference``.
        """
        verdict = self._verdicts.get(question)
        if verdict is None and not may_time:
            return untimed("a CUDA graph is being captured, and this problem was not run before: run it once first")
        verdict = verdict or self._nearest(question) or self._from_disk(question)
        if verdict is not None:
            return verdict
        if self._timing_thread == threading.get_ident():  # a signal handler that runs a model, say
            return untimed("another problem is being timed")
        with _lock.held():
            verdict = self._verdicts.get(question)  # another thread may have timed it while we waited
            if verdict is not None:
                return verdict
            self._timing_thread = threading.get_ident()
            try:
                return self._time(question, calls, clock, agree)
            finally:
                self._timing_thread = None

    def _time(
        self,
        question: Question,
        calls: Mapping[str, Call],
        clock: Clock,
        agree: Callable[[Tensor, Tensor], str | None],
    ) -> Verdict:
        try:
            verdict = contest(calls, clock, agree)
        except torch.OutOfMemoryError as error:
            # Not asked again in this process: the attempt itself is what takes the memory.
            return self._keep(question, untimed(_failure(error)))
        except Exception as error:
            return untimed(f"PyTorch's own layers raise {_failure(error)}")
        for name, reason in verdict.excluded.items():
            warnings.warn(f"vgg_fast: kernel {name!r} is not used for {question.size}: {reason}", RuntimeWarning, 2)
        if not verdict.excluded:  # else it may be better tomorrow
            self.winners.write(_text(question), verdict.kernel, verdict.seconds)
        return self._keep(question, verdict)

    def _from_disk(self, question: Question) -> Verdict | None:
        found = self.winners.read(_text(question))
        if found is None or found[0] not in (REFERENCE, *question.candidates):
            return None
        winner, seconds = found
        return self._keep(question, Verdict(winner, f"{_words(winner, seconds, {})}, in an earlier run", seconds, {}))

    def _keep(self, question: Question, verdict: Verdict) -> Verdict:
        self._verdicts[question] = verdict
        self._sizes.setdefault(_without_size(question), []).append(question)
        return verdict

    def _nearest(self, question: Question) -> Verdict | None:
        others = self._sizes.get(_without_size(question), [])
        if len(others) < MOST_SIZES:
            return None
        n, h, w = question.size
        nearest = min(others, key=lambda other: abs(other.size[0] * other.size[1] * other.size[2] - n * h * w))
        verdict = self._verdicts[nearest]
        return verdict._replace(reason=f"{verdict.reason}, for {nearest.size}, the nearest of {len(others)} sizes")


def _without_size(question: Question) -> Question:
    return question._replace(size=(0, 0, 0))


def _text(question: Question) -> str:
    return json.dumps(question._asdict(), sort_keys=True)
