"""What has to come out of a problem, within which bound, and the verdict on what did: shared by all that verify."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vgg_fast import fold, reference, testing
from vgg_fast.bench import failures

EPILOGUES = ((False, False), (True, False), (False, True), (True, True))  # (relu, pool)
FORMATS = (torch.contiguous_format, torch.channels_last)


class DeviceLost(RuntimeError):
    """After an illegal access or the like every further call of this process fails, whatever it does."""


@dataclass
class Row:
    """What became of one op on one kernel in one dtype.

    Attributes:
        op: ``conv3x3``, ``conv_stack`` (with ``pack`` and taps), ``maxpool2x2`` and its ``_backward``, ``linear``, or a
            network's layers.
        kernel: the kernel that was named in the call.
        dtype: as ``float32``.
        problems: how many results were judged.
        exact: how many of them bit for bit.
        worst: largest error over its bound, away from the border; at most 1 where all is well.
        worst_border: the same on the border.
        misses: one sentence per wrong result.
        absent: why this kernel does not run here; empty if it does.
        unjudged: one sentence per problem that did not fit into memory; no miss.
    """

    op: str
    kernel: str
    dtype: str
    problems: int = 0
    exact: int = 0
    worst: float = 0.0
    worst_border: float = 0.0
    misses: list[str] = field(default_factory=list)
    absent: str = ""
    unjudged: list[str] = field(default_factory=list)

    @property
    def result(self) -> str:
        """``ok``, ``MISS``, ``no memory`` (for any of its problems) or ``not here``."""
        if self.misses:
            return "MISS"
        if self.absent:
            return "not here"
        return "no memory" if self.unjudged and not self.problems else "ok"

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """An op that raises is one more miss, and no reason to leave the others unchecked.

        Raises:
            DeviceLost: the GPU will answer nothing any more.
        """
        try:
            yield
        except DeviceLost:
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            if failures.out_of_memory(error):
                self.unjudged.append(f"{what}: out of memory")
                failures.free_memory()
                return
            self.problems += 1
            self.misses.append(f"{what}: raised {said}")
            if failures.device_lost(error):
                raise DeviceLost(f"{self.op} by {self.kernel}, {what}: {said}") from error

    def equal(self, actual: Tensor, expected: Tensor, what: str) -> None:
        """Judges bit for bit; NaN equals NaN, and -0.0 equals 0.0 (which of them a sum of zero is, nobody promises)."""
        self.problems += 1
        self.exact += 1
        actual = actual.cpu()
        same = actual.shape == expected.shape and actual.dtype == expected.dtype
        if same and torch.allclose(actual, expected, rtol=0, atol=0, equal_nan=True):
            return
        self.misses.append(f"{what}: {_difference(actual, expected)}")

    def within(self, actual: Tensor, expected: Tensor, bound: Tensor, what: str) -> None:
        """Judges by the elementwise ``bound``; ``expected`` in float64."""
        self.problems += 1
        actual = actual.cpu()
        if actual.shape == expected.shape:
            ratio = ((actual.double() - expected).abs() / bound).nan_to_num(nan=math.inf)
            border = torch.zeros_like(ratio, dtype=torch.bool)
            border[..., (0, -1), :] = True
            border[..., (0, -1)] = True
            self.worst = max(self.worst, ratio.masked_fill(border, 0).max().item())
            self.worst_border = max(self.worst_border, ratio.masked_fill(~border, 0).max().item())
        try:
            testing.assert_within(actual, expected, bound, what)
        except AssertionError as error:
            self.misses.append(str(error))

    def true(self, holds: bool, what: str) -> None:
        """Judges a statement that must hold."""
        self.problems += 1
        self.exact += 1
        if not holds:
            self.misses.append(what)


def _difference(actual: Tensor, expected: Tensor) -> str:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"{tuple(actual.shape)} {actual.dtype} instead of {tuple(expected.shape)} {expected.dtype}"
    wrong = ~((actual == expected) | (actual.isnan() & expected.isnan()))
    first = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{int(wrong.sum())} of {wrong.numel()} elements differ, the first at {first}: "
        f"{actual[first].item()} instead of {expected[first].item()}"
    )


class Answers:
    """What has to come out of a problem, for every epilogue, and within which bound; in float64."""

    def __init__(self, y: Tensor, bound: Tensor) -> None:
        self.by_epilogue = {}
        for relu, pool in EPILOGUES:
            if pool and min(y.shape[2:]) < 2:
                continue
            expected = F.relu(y) if relu else y
            # The largest bound in a window holds for its largest element, too; ReLU only shrinks errors.
            self.by_epilogue[relu, pool] = (
                (reference.maxpool2x2(expected), reference.maxpool2x2(bound)) if pool else (expected, bound)
            )


class Problem:
    """Inputs of one shape and the right answers, made once for all kernels: convolutions in float64 are slow."""

    def __init__(self, shape: testing.Shape, dtype: torch.dtype, integers: bool) -> None:
        self.shape, self.integers = shape, integers
        x, self.weight, self.bias = testing.conv_inputs(shape, dtype, integers)
        self.inputs = {f: x.contiguous(memory_format=f) for f in FORMATS}
        channels = shape.cout
        if integers:
            # A standard deviation of 1 and scales of 1/2, 1 and 2 of either sign: nothing is rounded.
            sign = 1.0 - 2.0 * (torch.arange(channels) % 2)
            self.bn_weight = sign * 2.0 ** testing.integer_tensor(channels, limit=1, seed=3)
            self.bn_var, self.bn_eps = torch.ones(channels), 0.0
            self.bn_mean, self.bn_bias = (testing.integer_tensor(channels, limit=4, seed=s) for s in (4, 5))
        else:
            self.bn_weight, self.bn_mean, self.bn_bias, variance = (
                testing.random_tensor(channels, seed=s) for s in (3, 4, 5, 6)
            )
            self.bn_var, self.bn_eps = variance.abs() + 0.1, 1e-5
        y = F.conv2d(x.double(), self.weight.double(), self.bias.double(), padding=1)
        affine = torch.stack([torch.ones(channels), self.bias.float()])
        self._x, self._answers = x, dict[tuple[str, bool, float], Answers]()
        self._exact = {"conv": (y, affine)}
        mean, var, gamma, beta = (v.double()[:, None, None] for v in self.norm)
        y = (y - mean) * torch.rsqrt(var + self.bn_eps) * gamma + beta
        _, affine = fold.batchnorm_affine(channels, self.bias, *self.norm, self.bn_eps)
        self._exact["step"] = y, affine

    @property
    def norm(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The batch-norm's vectors in the order of ``pack``."""
        return self.bn_mean, self.bn_var, self.bn_weight, self.bn_bias

    def answers(self, op: str, kernel: str) -> Answers:
        """What ``op`` (``conv`` or ``step``) has to give; the bound depends on how the kernel adds up."""
        direct = testing.is_direct(kernel, *self._x.shape[1:])
        key = op, direct, testing.product_error(kernel, self._x.dtype)
        if key not in self._answers:
            y, affine = self._exact[op]
            self._answers[key] = Answers(y, testing.conv_bound(self._x, self.weight, affine, kernel=kernel))
        return self._answers[key]

    def judge(self, row: Row, op: str, run: Callable[[Tensor, bool, bool], Tensor]) -> None:
        """Lets ``run(x, relu, pool)`` solve the problem with every epilogue and in both memory formats."""
        for (relu, pool), (expected, bound) in self.answers(op, row.kernel).by_epilogue.items():
            for memory_format, x in self.inputs.items():
                what = self._what(relu, pool)
                what += ", channels_last" if memory_format is torch.channels_last else ""
                with row.attempt(what):
                    self._judge(row, run(x, relu, pool), expected, bound, what)

    def judge_taps(self, row: Row, run: Callable[[Tensor, bool, bool], Sequence[Tensor]]) -> None:
        """Lets ``run(x, relu, pool)`` give the value before the pool, too: [tap, result]."""
        by_epilogue = self.answers("step", row.kernel).by_epilogue
        for relu, pool in by_epilogue:
            what = f"{self._what(relu, pool)}, tap"
            with row.attempt(what):
                tap, result = run(self.inputs[torch.channels_last], relu, pool)
                self._judge(row, tap, *by_epilogue[relu, False], what)
                self._judge(row, result, *by_epilogue[relu, pool], f"{what} and result")

    def _what(self, relu: bool, pool: bool) -> str:
        return f"{self.shape.name}, {'integers' if self.integers else 'random'}, relu={relu}, pool={pool}"

    def _judge(self, row: Row, actual: Tensor, expected: Tensor, bound: Tensor, what: str) -> None:
        if self.integers and testing.is_direct(row.kernel, *self._x.shape[1:]):
            row.equal(actual, expected.to(self._x.dtype), what)
        else:
            row.within(actual, expected, bound, what)
