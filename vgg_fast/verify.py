"""Every op and every kernel of this machine against the reference: what ``vgg-fast verify`` runs.

Integer-valued inputs have to come out bit for bit, except from kernels that do not sum up plain products (Winograd's).
Random ones have to lie, element by element, within the bound that :mod:`vgg_fast.testing` derives, the border judged by
itself: a similarity over a whole map would not see one wrong corner.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vgg_fast import fold, library, ops, reference, selection, testing
from vgg_fast.reference import Step

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EPILOGUES = ((False, False), (True, False), (False, True), (True, True))
_FORMATS = (torch.contiguous_format, torch.channels_last)


class Unavailable(RuntimeError):
    """A device or kernel was named that is not here."""


@dataclass(frozen=True)
class Ops:
    """The callables to be verified, by default the registered ops; a test puts a wrong one in their place."""

    conv3x3: Callable[..., Tensor] = ops.conv3x3.conv3x3
    maxpool2x2: Callable[..., Tensor] = ops.maxpool2x2.maxpool2x2
    pack: Callable[..., tuple[Tensor, Tensor]] = torch.ops.vgg_fast.pack
    conv_stack: Callable[..., Tensor] = torch.ops.vgg_fast.conv_stack
    linear: Callable[..., Tensor] = torch.ops.vgg_fast.linear


@dataclass
class Row:
    """What became of one op on one kernel in one dtype.

    Attributes:
        op: ``conv3x3``, ``conv_stack`` (with ``pack``), ``maxpool2x2`` or ``linear``.
        kernel: the kernel that was named in the call.
        dtype: as ``float32``.
        problems: how many results were judged.
        exact: how many of them bit for bit.
        worst: largest error over its bound, away from the border; at most 1 where all is well.
        worst_border: the same on the border.
        misses: one sentence per wrong result.
        absent: why this kernel does not run here; empty if it does.
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

    @property
    def result(self) -> str:
        """``ok``, ``MISS``, or ``not here``."""
        return "MISS" if self.misses else "not here" if self.absent else "ok"

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """An op that raises is one more miss, and no reason to leave the others unchecked."""
        try:
            yield
        except Exception as error:
            self.problems += 1
            self.misses.append(f"{what}: raised {type(error).__name__}: {str(error).splitlines()[0]}")

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


def _difference(actual: Tensor, expected: Tensor) -> str:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"{tuple(actual.shape)} {actual.dtype} instead of {tuple(expected.shape)} {expected.dtype}"
    wrong = ~((actual == expected) | (actual.isnan() & expected.isnan()))
    first = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{int(wrong.sum())} of {wrong.numel()} elements differ, the first at {first}: "
        f"{actual[first].item()} instead of {expected[first].item()}"
    )


def kernels(device: str) -> list[str]:
    """Names of the kernels that ``device`` (``cpu`` or ``cuda``) may have; which of them run here is another matter."""
    if device == "cuda":
        return ["triton", "cuda"]
    return list(dict.fromkeys(selection.cpu_kernels() + selection.linear_kernels())) or [selection.REFERENCE]


def verify(
    device: str = "cpu",
    *,
    only: Sequence[str] = (),
    shapes: Sequence[testing.Shape] = testing.SHAPES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    checked: Ops | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Checks the ops on every kernel of a device.

    Args:
        device: ``cpu`` or ``cuda``.
        only: names of kernels; empty for all that the device has.
        shapes: problems, by default the whole table.
        dtypes: of the activations.
        checked: what to check, by default the registered ops.
        on_progress: called with (steps done, steps in all).

    Returns:
        One :class:`Row` per op, kernel and dtype, those that do not run here with the reason.

    Raises:
        Unavailable: another device, one that is not there, or a kernel that does not exist on it.

    Example:
        >>> rows = verify(shapes=[testing.shape("one_row")], dtypes=[torch.float32])
        >>> {row.result for row in rows} <= {"ok", "not here"}
        True
    """
    checked = checked or Ops()
    where = _device(device)
    names = kernels(where.type)
    for name in only:
        if name not in names:
            raise Unavailable(f"there is no kernel {name!r} on {where.type}; its kernels are {', '.join(names)}")
    rows: list[Row] = []
    total, done = len(dtypes) * len(shapes), 0
    for dtype in dtypes:
        name = _name(dtype)
        pool = Row("maxpool2x2", "reference" if where.type == "cpu" and library.missing("_C") else where.type, name)
        pairs = []
        for kernel in only or names:
            if where.type == "cpu" and kernel in selection.linear_kernels():
                rows.append(_check_linear(checked, dtype, where, kernel))
            if where.type == "cpu" and kernel not in (selection.cpu_kernels() or names):
                continue  # a kernel of fully connected layers only
            absent = _absent(dtype, where, kernel)
            conv, stack = (Row(op, kernel, name, absent=absent) for op in ("conv3x3", "conv_stack"))
            rows += [conv, stack]
            if not absent:
                pairs.append((conv, stack))
        if not only:
            rows.append(pool)
        for shape in shapes:
            problems = [_Problem(shape, dtype, integers) for integers in (True, False)]
            for conv, stack in pairs:
                for problem in problems:
                    _check_conv3x3(checked, problem, where, conv)
                    with stack.attempt(f"{shape.name}, pack"):
                        _check_step(checked, problem, where, stack)
                with stack.attempt(f"{shape.name}, a chain of three"):
                    _check_chain(checked, shape, dtype, where, stack)
            if not only:
                with pool.attempt(shape.name):
                    _check_maxpool(checked, shape, dtype, where, pool)
            done += 1
            if on_progress:
                on_progress(done, total)
    return rows


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise Unavailable(f"there are no kernels for device {name!r}; choose cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        build = "" if torch.version.cuda else " (and this PyTorch is a build without CUDA)"
        raise Unavailable(f"there is no CUDA device on this machine{build}; --device cpu verifies the CPU kernels")
    return torch.device(name)


def _absent(dtype: torch.dtype, device: torch.device, kernel: str) -> str:
    """Why a kernel does not run this dtype here, in a line; empty if it does."""
    try:
        selection.choose(dtype, device, kernel)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Answers:
    """What has to come out of a problem, for every epilogue, and within which bound; in float64."""

    def __init__(self, y: Tensor, bound: Tensor) -> None:
        self.by_epilogue = {}
        for relu, pool in _EPILOGUES:
            if pool and min(y.shape[2:]) < 2:
                continue
            expected = F.relu(y) if relu else y
            # The largest bound in a window holds for its largest element, too; ReLU only shrinks errors.
            self.by_epilogue[relu, pool] = (
                (reference.maxpool2x2(expected), reference.maxpool2x2(bound)) if pool else (expected, bound)
            )


class _Problem:
    """Inputs of one shape and the right answers, made once for all kernels: convolutions in float64 are slow."""

    def __init__(self, shape: testing.Shape, dtype: torch.dtype, integers: bool) -> None:
        self.shape, self.integers = shape, integers
        x, self.weight, self.bias = testing.conv_inputs(shape, dtype, integers)
        self.inputs = {f: x.contiguous(memory_format=f) for f in _FORMATS}
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
        self._x, self._answers = x, dict[tuple[str, bool, float], _Answers]()
        self._exact = {"conv": (y, affine)}
        mean, var, gamma, beta = (v.double()[:, None, None] for v in self.norm)
        y = (y - mean) * torch.rsqrt(var + self.bn_eps) * gamma + beta
        _, affine = fold.batchnorm_affine(channels, self.bias, *self.norm, self.bn_eps)
        self._exact["step"] = y, affine

    @property
    def norm(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The batch-norm's vectors in the order of ``pack``."""
        return self.bn_mean, self.bn_var, self.bn_weight, self.bn_bias

    def answers(self, op: str, kernel: str) -> _Answers:
        """What ``op`` (``conv`` or ``step``) has to give; the bound depends on how the kernel adds up."""
        direct = testing.is_direct(kernel, *self._x.shape[1:])
        key = op, direct, testing.product_error(kernel, self._x.dtype)
        if key not in self._answers:
            y, affine = self._exact[op]
            self._answers[key] = _Answers(y, testing.conv_bound(self._x, self.weight, affine, kernel=kernel))
        return self._answers[key]

    def judge(self, row: Row, op: str, run: Callable[[Tensor, bool, bool], Tensor]) -> None:
        """Lets ``run(x, relu, pool)`` solve the problem with every epilogue and in both memory formats."""
        exact = self.integers and testing.is_direct(row.kernel, *self._x.shape[1:])
        for (relu, pool), (expected, bound) in self.answers(op, row.kernel).by_epilogue.items():
            for memory_format, x in self.inputs.items():
                what = f"{self.shape.name}, {'integers' if self.integers else 'random'}, relu={relu}, pool={pool}"
                what += ", channels_last" if memory_format is torch.channels_last else ""
                with row.attempt(what):
                    actual = run(x, relu, pool)
                    if exact:
                        row.equal(actual, expected.to(x.dtype), what)
                    else:
                        row.within(actual, expected, bound, what)


def _check_conv3x3(checked: Ops, problem: _Problem, device: torch.device, row: Row) -> None:
    weight, bias = problem.weight.to(device), problem.bias.to(device)

    def run(x: Tensor, relu: bool, pool: bool) -> Tensor:
        return checked.conv3x3(x.to(device), weight, bias, relu, pool, row.kernel)

    problem.judge(row, "conv", run)


def _check_step(checked: Ops, problem: _Problem, device: torch.device, row: Row) -> None:
    """A chain of one, with batch-norm."""
    tensors = (t.to(device) for t in (problem.weight, problem.bias, *problem.norm))
    packed, affine = checked.pack(*tensors, problem.bn_eps, row.kernel)

    def run(x: Tensor, relu: bool, pool: bool) -> Tensor:
        last = x.is_contiguous(memory_format=torch.channels_last)
        return checked.conv_stack(x.to(device), [packed], [affine], [_step(relu, pool)], row.kernel, last)

    problem.judge(row, "step", run)


def _step(relu: bool, pool: bool) -> int:
    return (Step.RELU if relu else Step.NONE) | (Step.POOL if pool else Step.NONE)


def _check_chain(checked: Ops, shape: testing.Shape, dtype: torch.dtype, device: torch.device, row: Row) -> None:
    """A chain of three has the bits of the same steps taken one by one."""
    pooled = min(shape.h, shape.w) >= 2
    program = [_step(True, False), _step(True, pooled), _step(False, False)]
    x, first, bias = (t.to(device) for t in testing.conv_inputs(shape, dtype))
    weights, affines = [], []
    for i in range(3):
        scale = (2 / (9 * shape.cout)) ** 0.5
        later = testing.random_tensor(shape.cout, shape.cout, 3, 3, seed=7 + i) * scale
        weight = later.to(dtype).to(device) if i else first
        packed, affine = checked.pack(weight, bias, None, None, None, None, 0.0, row.kernel)
        weights.append(packed)
        affines.append(affine)
    chain = checked.conv_stack(x, weights, affines, program, row.kernel, False)
    for i, step in enumerate(program):
        x = checked.conv_stack(x, weights[i : i + 1], affines[i : i + 1], [step], row.kernel, False)
    row.equal(chain, x.cpu(), f"{shape.name} chain of three against its steps")


def _check_linear(checked: Ops, dtype: torch.dtype, device: torch.device, kernel: str) -> Row:
    row = Row("linear", kernel, _name(dtype))
    try:
        selection.choose_linear(dtype, device, kernel)
    except RuntimeError as error:
        row.absent = str(error).splitlines()[0]
        return row
    for name, integers, relu in itertools.product(testing.LINEARS, (True, False), (False, True)):
        x, weight, bias = testing.linear_inputs(name, dtype, integers)
        what = f"{name}, {'integers' if integers else 'random'}, relu={relu}"
        with row.attempt(what):
            packs = dtype == torch.float32 and kernel in ops.linear.PACKING
            packed = torch.ops.vgg_fast.linear_pack(weight, kernel) if packs else weight
            actual = checked.linear(x, packed, bias, relu, kernel)
            expected = reference.linear(x.double(), weight.double(), bias.double(), relu)
            if integers:
                row.equal(actual, expected.to(dtype), what)
            else:
                row.within(actual, expected, testing.linear_bound(x, weight, bias, kernel), what)
    return row


def _check_maxpool(checked: Ops, shape: testing.Shape, dtype: torch.dtype, device: torch.device, row: Row) -> None:
    """Random values, ties, and NaN and infinities sprinkled over them."""
    if min(shape.h, shape.w) < 2:
        return
    size = (shape.n, shape.cin, shape.h, shape.w)
    special = testing.random_tensor(*size, dtype=dtype)
    special.view(-1)[::7] = math.nan
    special.view(-1)[::5] = math.inf
    special.view(-1)[::3] = -math.inf
    inputs = {
        "random": testing.random_tensor(*size, dtype=dtype),
        "ties": testing.integer_tensor(*size, limit=1, dtype=dtype),
        "NaN and infinities": special,
    }
    for what, x in inputs.items():
        expected = reference.maxpool2x2(x)
        for memory_format in _FORMATS:
            actual = checked.maxpool2x2(x.contiguous(memory_format=memory_format).to(device))
            row.equal(actual, expected, f"{shape.name} {what}")
