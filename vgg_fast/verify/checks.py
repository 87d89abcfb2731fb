"""Every op and every kernel of this machine against the reference: what ``vgg-fast verify`` runs.

Integer-valued inputs have to come out bit for bit, except from kernels that do not sum up plain products (Winograd's).
Random ones have to lie, element by element, within the bound that :mod:`vgg_fast.testing` derives, the border judged by
itself: a similarity over a whole map would not see one wrong corner.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vgg_fast import gpu, library, ops, reference, selection, testing
from vgg_fast.bench import peers
from vgg_fast.bench.peers import Layer
from vgg_fast.reference import Step
from vgg_fast.verify.layers import Network
from vgg_fast.verify.verdicts import FORMATS, DeviceLost, Problem, Row


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in the middle; ``rows`` hold what was checked until then."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__()
        self.rows = rows


def gradient(pool: Callable[[Tensor], Tensor], grad: Tensor, x: Tensor) -> Tensor:
    """The gradient in ``x`` of ``pool(x)``, by autograd, where ``grad`` is that in its result."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(pool(x), x, grad)[0]


_BACKWARD = partial(gradient, ops.maxpool2x2.maxpool2x2)


@dataclass(frozen=True)
class Ops:
    """The callables to be verified, by default the registered ops; a test puts a wrong one in their place."""

    conv3x3: Callable[..., Tensor] = ops.conv3x3.conv3x3
    maxpool2x2: Callable[..., Tensor] = ops.maxpool2x2.maxpool2x2
    maxpool2x2_backward: Callable[..., Tensor] = _BACKWARD
    pack: Callable[..., tuple[Tensor, Tensor]] = torch.ops.vgg_fast.pack
    conv_stack: Callable[..., Tensor] = torch.ops.vgg_fast.conv_stack
    conv_stack_taps: Callable[..., list[Tensor]] = torch.ops.vgg_fast.conv_stack_taps
    linear: Callable[..., Tensor] = torch.ops.vgg_fast.linear


def kernels(device: str) -> list[str]:
    """Names of the kernels that ``device`` (``cpu`` or ``cuda``) may have; which of them run here is another matter."""
    if device == "cuda":
        return list(selection.GPU_KERNELS)
    return list(dict.fromkeys(selection.cpu_kernels() + selection.linear_kernels())) or [selection.REFERENCE]


def verify(
    device: str = "cpu",
    *,
    only: Sequence[str] = (),
    shapes: Sequence[testing.Shape] = testing.SHAPES,
    dtypes: Sequence[torch.dtype] = tuple(peers.DTYPES.values()),
    layers: Sequence[Layer] = (),
    batches: Sequence[int] = (1, 32),
    checked: Ops | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Checks the ops on every kernel of a device.

    Args:
        device: ``cpu`` or ``cuda``.
        only: names of kernels; empty for all that the device has.
        shapes: problems, by default the whole table.
        dtypes: of the activations.
        layers: of a network, checked at their real size, one by one and as a chain; ``peers.LAYERS`` are VGG16's.
        batches: of images for ``layers``.
        checked: what to check, by default the registered ops.
        on_progress: called with (steps done, steps in all).

    Returns:
        One :class:`Row` per op, kernel and dtype, those that do not run here with the reason.

    Raises:
        gpu.Unavailable: another device, one that is not there, or a kernel that does not exist on it.
        Interrupted: Ctrl-C; it has the rows.

    Example:
        >>> rows = verify(shapes=[testing.shape("one_row")], dtypes=[torch.float32])
        >>> {row.result for row in rows} <= {"ok", "not here"}
        True
    """
    where = gpu.named(device)
    names = kernels(where.type)
    for name in only:
        if name not in names:
            raise gpu.Unavailable(f"there is no kernel {name!r} on {where.type}; its kernels are {', '.join(names)}")
    run = _Run(checked or Ops(), where, only or names, not only, layers, batches)
    total, done = len(dtypes) * (len(shapes) + len(layers) * len(batches)), 0
    try:
        for dtype in dtypes:
            for _ in run.steps(dtype, shapes):
                done += 1
                if on_progress:
                    on_progress(done, total)
    except KeyboardInterrupt:
        raise Interrupted(run.rows) from None
    except DeviceLost as error:
        for row in run.rows:
            if not row.problems and not row.absent:
                row.absent = f"not reached: the GPU gave up at {error}"
    return run.rows


class _Run:
    """What belongs together while one device is verified; :attr:`rows` grow as it goes on."""

    def __init__(
        self,
        checked: Ops,
        device: torch.device,
        names: Sequence[str],
        pools: bool,
        layers: Sequence[Layer],
        batches: Sequence[int],
    ) -> None:
        self.checked, self.device, self.names, self.pools = checked, device, names, pools
        self.layers, self.batches = layers, batches
        self.rows: list[Row] = []

    def steps(self, dtype: torch.dtype, shapes: Sequence[testing.Shape]) -> Iterator[None]:
        """Checks everything in one dtype; yields after every shape and layer."""
        checked, where = self.checked, self.device
        pairs, networks = [], []
        for kernel in self.names:
            if where.type == "cpu" and kernel in selection.linear_kernels():
                self.rows.append(_check_linear(checked, dtype, where, kernel))
            if where.type == "cpu" and kernel not in (selection.cpu_kernels() or self.names):
                continue  # a kernel of fully connected layers only
            absent = _absent(dtype, where, kernel)
            made = [Row(op, kernel, _name(dtype), absent=absent) for op in ("conv3x3", "conv_stack")]
            made += [
                Row(f"layers, batch {n}", kernel, _name(dtype), absent=absent) for n in self.batches if self.layers
            ]
            self.rows += made
            if broken := selection.why_switched_off(kernel, where):  # by its self test, in this dtype or an earlier one
                made[0].true(False, f"switched off: {broken}")
            elif not absent:
                pairs.append((made[0], made[1]))
                networks += list(zip(made[2:], self.batches, strict=False))
        pools = _pools(checked, where, _name(dtype)) if self.pools else []
        self.rows += [row for row, _ in pools]
        for shape in shapes:
            problems = [Problem(shape, dtype, integers) for integers in (True, False)]
            for conv, stack in pairs:
                for problem in problems:
                    _check_conv3x3(checked, problem, where, conv)
                    with stack.attempt(f"{shape.name}, pack"):
                        _check_step(checked, problem, where, stack)
                with stack.attempt(f"{shape.name}, a chain of three"):
                    _check_chain(checked, shape, dtype, where, stack)
            for row, pool in pools:
                with row.attempt(shape.name):
                    _check_maxpool(pool, shape, dtype, where, row)
            yield
        network = Network(checked, self.layers, dtype, where)
        for position in range(len(self.layers)):
            network.prepare(position)
            for n in self.batches:
                for row, batch in networks:
                    if batch == n:
                        network.check_layer(position, n, row)
                yield
        for row, batch in networks:
            network.check_chain(batch, row)


# What is right for each op of the pool, and who has kernels for it on a GPU.
_POOLS: dict[str, Callable[..., Tensor]] = {
    "maxpool2x2": reference.maxpool2x2,
    "maxpool2x2_backward": partial(gradient, reference.maxpool2x2),
}
_POOL_KERNELS = [("maxpool2x2", "triton"), ("maxpool2x2", "cuda"), ("maxpool2x2_backward", "cuda")]


def _pools(checked: Ops, device: torch.device, dtype: str) -> list[tuple[Row, Callable[..., Tensor]]]:
    """Rows of the pool, and what to call: the ops; on a GPU also the kernels of each family, whichever the ops take."""
    name = "reference" if device.type == "cpu" and library.missing("_C") else device.type
    name = "auto" if device.type == "cuda" else name
    result = [(Row(op, name, dtype), getattr(checked, op)) for op in _POOLS]
    for op, kernel in _POOL_KERNELS if device.type == "cuda" else ():
        row = Row(op, kernel, dtype, absent=_absent(torch.float32, device, kernel))
        pool = getattr(checked, op)  # of an absent row nothing is called
        if kernel == "triton" and not row.absent:
            from vgg_fast.kernels.maxpool2x2 import maxpool2x2

            pool = maxpool2x2
        elif not row.absent:
            pool = getattr(torch.ops.vgg_fast_cuda, op)
        result.append((row, pool))
    return result


def _absent(dtype: torch.dtype, device: torch.device, kernel: str) -> str:
    """Why a kernel does not run this dtype here, in a line; empty if it does."""
    try:
        chosen = selection.choose(dtype, device, selection.exactly(kernel))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "" if chosen == kernel else f"{chosen} runs in its place"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_conv3x3(checked: Ops, problem: Problem, device: torch.device, row: Row) -> None:
    weight, bias = problem.weight.to(device), problem.bias.to(device)

    def run(x: Tensor, relu: bool, pool: bool) -> Tensor:
        return checked.conv3x3(x.to(device), weight, bias, relu, pool, row.kernel)

    problem.judge(row, "conv", run)


def _check_step(checked: Ops, problem: Problem, device: torch.device, row: Row) -> None:
    """A chain of one, with batch-norm."""
    tensors = (t.to(device) for t in (problem.weight, problem.bias, *problem.norm))
    packed, affine = checked.pack(*tensors, problem.bn_eps, row.kernel)

    def run(x: Tensor, relu: bool, pool: bool) -> Tensor:
        last = x.is_contiguous(memory_format=torch.channels_last)
        return checked.conv_stack(x.to(device), [packed], [affine], [_step(relu, pool)], row.kernel, last)

    problem.judge(row, "step", run)

    def run_taps(x: Tensor, relu: bool, pool: bool) -> list[Tensor]:
        program = [_step(relu, pool) | Step.TAP]
        return checked.conv_stack_taps(x.to(device), [packed], [affine], program, row.kernel, True)

    problem.judge_taps(row, run_taps)


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


def _check_maxpool(
    pool: Callable[..., Tensor], shape: testing.Shape, dtype: torch.dtype, device: torch.device, row: Row
) -> None:
    """Random values, ties, and NaN and infinities sprinkled over them; for the gradient, random ones of the result."""
    if row.absent or min(shape.h, shape.w) < 2:
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
    grad = testing.random_tensor(shape.n, shape.cin, shape.h // 2, shape.w // 2, seed=1, dtype=dtype)
    for what, x in inputs.items():
        tensors = [x] if row.op == "maxpool2x2" else [grad, x]
        expected = _POOLS[row.op](*tensors)
        for memory_format in FORMATS:
            actual = pool(*(t.contiguous(memory_format=memory_format).to(device) for t in tensors))
            row.equal(actual, expected, f"{shape.name} {what}")
