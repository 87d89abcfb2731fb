"""A chain of 3x3 convolutions as one call: a plan made once per problem, then nothing but launches.

    workspace   | values of even steps | values of odd steps | partial sums of split convolutions |

Step i writes its values into one half and reads those of step i - 1 from the other. The workspace is one allocation per
call, from PyTorch's allocator: so calls on several streams or threads do not meet, a CUDA graph gets memory of its own,
and nothing is kept between calls. The counters of split convolutions are zeroed by one memset per call (where there are
any) and put back to zero by each launch: kept from call to call they would be shared between streams and graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .configs import Architecture
from .conv3x3 import Launch, architecture_of, launch_of
from .launch import Launcher, aligned, current_stream, on_device, prepare
from .support import check_conv3x3

__all__ = ["conv_stack", "traced"]

RELU, POOL, TAP = 1, 2, 4  # the bits of a program's entries, as in vgg_fast.reference.Step
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PAGE = 256  # bytes; what PyTorch's allocator aligns to


class _Step(NamedTuple):
    """One launch: where its values go, and how.

    Attributes:
        launch: of the kernel.
        kernel_tap: whether the kernel itself writes the tap, beside the pooled values.
        tap: whether there is one; without a pool the tap is what the next step reads.
        offset: of its values in the workspace; None for the last step.
    """

    launch: Launcher
    kernel_tap: bool
    tap: bool
    offset: int | None


class Problem(NamedTuple):
    """What a plan is made for: all that decides what is launched.

    Attributes:
        size: of the input, ``(N, Cin, H, W)``.
        couts: of the convolutions.
        program: bits of what follows each.
        dtype, precision, device: as for :func:`conv_stack`.
    """

    size: tuple[int, int, int, int]
    couts: tuple[int, ...]
    program: tuple[int, ...]
    dtype: torch.dtype
    precision: str
    device: torch.device


class Layout(NamedTuple):
    """What a chain needs beside its tensors; bytes, but for the counters.

    Attributes:
        offsets: in the workspace, of the values of every step but the last.
        partials: offset of the partial sums.
        workspace: in all.
        counters: int32 elements.
    """

    offsets: list[int]
    partials: int
    workspace: int
    counters: int


def layout_of(launches: Sequence[Launch], dtype: torch.dtype) -> Layout:
    """The layout for these steps.

    Example:
        >>> problem = Problem((1, 3, 8, 8), (16, 16, 16), (0, 2, 0), torch.float16, "ieee", torch.device("cpu"))
        >>> layout_of(launches_of(problem), torch.float16).offsets
        [0, 2048]
    """
    sizes = [-(-torch.Size(launch.out_size).numel() * dtype.itemsize // _PAGE) * _PAGE for launch in launches[:-1]]
    even, odd = (max(sizes[half::2], default=0) for half in (0, 1))
    workspace = even + odd + 4 * max(launch.partials for launch in launches)
    counters = max(launch.counters for launch in launches)
    return Layout([i % 2 * even for i in range(len(sizes))], even + odd, workspace, counters)


class Plan:
    """The launches of a chain, and the layout of its workspace."""

    def __init__(self, problem: Problem) -> None:
        launches = launches_of(problem)
        self.layout = layout_of(launches, problem.dtype)
        offsets = [*self.layout.offsets, None]
        self.steps = [
            _Step(_prepared(launch, problem.dtype), bool(bits & TAP and bits & POOL), bool(bits & TAP), offset)
            for launch, bits, offset in zip(launches, problem.program, offsets, strict=True)
        ]
        n, _, h, w = problem.size
        self.out_size, self.taps = launches[-1].out_size, []
        for cout, bits in zip(problem.couts, problem.program, strict=True):
            if bits & TAP:
                self.taps.append((n, cout, h, w))
            h, w = (h // 2, w // 2) if bits & POOL else (h, w)

    def run(self, x: Tensor, weights: Sequence[Tensor], affines: Sequence[Tensor]) -> list[Tensor]:
        """The taps, then the result; ``x`` channels_last, everything aligned, and its device the current one."""
        device, dtype = x.device, x.dtype
        results = [
            torch.empty(size, dtype=dtype, device=device, memory_format=torch.channels_last)
            for size in (*self.taps, self.out_size)
        ]
        layout = self.layout
        workspace = torch.empty(layout.workspace, dtype=torch.uint8, device=device)
        counters = torch.zeros(layout.counters, dtype=torch.int32, device=device) if layout.counters else None
        base = workspace.data_ptr()
        scratch = base + layout.partials, None if counters is None else counters.data_ptr()
        stream = current_stream(device)
        source, taps = x.data_ptr(), iter(results)
        for step, weight, affine in zip(self.steps, weights, affines, strict=True):
            tap = next(taps).data_ptr() if step.tap else None
            if step.offset is None:
                target = results[-1].data_ptr()
            else:
                target = base + step.offset if step.kernel_tap or tap is None else tap
            own_tap = tap if step.kernel_tap else None
            step.launch(stream, source, weight.data_ptr(), affine.data_ptr(), target, own_tap, *scratch)
            source = target
        if self.steps[-1].tap and not self.steps[-1].kernel_tap:
            results[-2].copy_(results[-1])  # an operator may not return one tensor twice
        return results


def launches_of(problem: Problem, architecture: Architecture | None = None) -> list[Launch]:
    """What each step launches, on the problem's device or on another architecture.

    Raises:
        ValueError: for a precision that does not go with the dtype, or a map too small to be pooled.
    """
    n, cin, h, w = problem.size
    architecture = architecture or architecture_of(problem.device)
    launches = []
    for cout, bits in zip(problem.couts, problem.program, strict=True):
        relu, pool = bool(bits & RELU), bool(bits & POOL)
        if pool and min(h, w) < 2:
            raise ValueError(f"conv_stack (triton): a {h}x{w} map is smaller than 2x2")
        kernel_tap = pool and bool(bits & TAP)
        launches.append(
            launch_of(
                problem.dtype, n, h, w, cin, cout, relu, pool, architecture, tap=kernel_tap, precision=problem.precision
            )
        )
        cin, (h, w) = cout, launches[-1].out_size[2:]
    return launches


def _prepared(launch: Launch, dtype: torch.dtype) -> Launcher:
    pointers = {
        "x_ptr": dtype,
        "weight_ptr": dtype,
        "affine_ptr": torch.float32,
        "out_ptr": dtype,
        "tap_ptr": dtype if launch.options["TAP"] else None,
        "partials_ptr": torch.float32 if launch.partials else None,
        "counters_ptr": torch.int32 if launch.counters else None,
    }
    run = prepare(launch.kernel, launch.grid, pointers, launch.options)
    if launch.partials:
        return run
    # What a kernel compiled for None gets must be None.
    return lambda stream, x, weight, affine, out, tap, *_: run(stream, x, weight, affine, out, tap, None, None)


def _check(x: Tensor, weights: Sequence[Tensor], affines: Sequence[Tensor], program: Sequence[int]) -> None:
    """Raise ValueError for what cannot be run, naming it. For every call, so what is right costs few comparisons."""
    if not len(weights) == len(affines) == len(program) or not program:
        raise ValueError(
            f"conv_stack (triton): {len(weights)} weights, {len(affines)} affines and {len(program)} program entries; "
            "there must be as many of each, and one at least"
        )
    device, dtype, cin = x.device, x.dtype, x.shape[1] if x.dim() == 4 else 0
    if not cin or dtype not in _DTYPES or not min(x.shape[2:]):
        check_conv3x3(x, weights[0], affines[0], pool=False)
    for i, (weight, affine) in enumerate(zip(weights, affines, strict=True)):
        cout = weight.shape[0] if weight.dim() else 0
        fit = cout and weight.shape == (cout, 3, 3, cin) and affine.shape == (2, cout)
        kinds = weight.dtype == dtype and affine.dtype == torch.float32 and weight.device == affine.device == device
        if not (fit and kinds and weight.is_contiguous() and affine.is_contiguous()):
            check_conv3x3(x.new_empty((1, cin, 1, 1)) if i else x, weight, affine, pool=False)
        cin = cout


_plans: dict[Problem, Plan] = {}
_MOST_PLANS = 256


def _plan(problem: Problem) -> Plan:
    plan = _plans.get(problem)
    if plan is None:
        if problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"conv_stack (triton): a CUDA graph is being captured, and an input of {problem.size} was not run "
                "before; run it once first, so that the kernels are there"
            )
        plan = _plans[problem] = Plan(problem)
        for old in list(_plans)[:-_MOST_PLANS]:
            _plans.pop(old, None)
    return plan


def conv_stack(
    x: Tensor, weights: Sequence[Tensor], affines: Sequence[Tensor], program: Sequence[int], precision: str = "ieee"
) -> list[Tensor]:
    """A chain of :func:`vgg_fast.kernels.conv3x3.conv3x3`, ``program[i]`` saying what follows the i-th convolution.

    Args:
        x: ``[N, Cin, H, W]``, fp32, fp16 or bf16, channels_last (anything else is copied first); on a GPU, or on the
            CPU in Triton's interpreter.
        weights: ``[Cout_i, 3, 3, Cout_{i-1}]`` each, contiguous, the dtype of ``x``.
        affines: contiguous fp32 ``[2, Cout_i]`` each: scale >= 0 and shift (see ``vgg_fast.fold``).
        program: as many entries of RELU | POOL | TAP; with TAP the value before the pool is returned as well.
        precision: of fp32 tensors: ``ieee``, ``tf32`` or ``bf16x3``.

    Returns:
        The taps in order, then the result: channels_last, the dtype of ``x``. Values between the steps are rounded to
        that dtype, so the bits are those of single calls.

    Raises:
        ValueError: for a shape, dtype, layout or device that is none of the above, naming it.
        RuntimeError: a CUDA graph is being captured, and this problem was not run before.

    Example (on a machine without a GPU: with ``TRITON_INTERPRET=1``):
        >>> x, weight, affine = torch.ones(1, 4, 6, 6), torch.ones(8, 3, 3, 4), torch.ones(2, 8)
        >>> [tuple(y.shape) for y in conv_stack(x, [weight], [affine], [RELU | POOL | TAP])]
        [(1, 8, 6, 6), (1, 8, 3, 3)]
    """
    _check(x, weights, affines, program)
    x = aligned(x.contiguous(memory_format=torch.channels_last))
    if not x.shape[0]:
        # Nothing to launch; the sizes are those of one image.
        return [y[:0] for y in conv_stack(x.new_zeros(1, *x.shape[1:]), weights, affines, program, precision)]
    couts = tuple(weight.shape[0] for weight in weights)
    problem = Problem(tuple(x.shape), couts, tuple(program), x.dtype, precision, x.device)  # type: ignore[arg-type]
    with on_device(x.device):
        return _plan(problem).run(x, [aligned(weight) for weight in weights], [aligned(affine) for affine in affines])


def traced(
    x: Tensor,
    weights: Sequence[Tensor],
    affines: Sequence[Tensor],
    program: Sequence[int],
    precision: str = "ieee",
    architecture: Architecture | None = None,
) -> list[Tensor]:
    """:func:`conv_stack` as torch.compile should see it: the kernels themselves, and a tensor for every value.

    Inductor then plans the memory, and launches without Python.

    Args:
        x, weights, affines, program, precision: as for :func:`conv_stack`; may be fake tensors.
        architecture: of the GPU; by default that of the device of ``x``.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    couts = tuple(weight.shape[0] for weight in weights)
    problem = Problem(tuple(x.shape), couts, tuple(program), x.dtype, precision, x.device)  # type: ignore[arg-type]
    results = []
    for launch, bits, weight, affine in zip(launches_of(problem, architecture), program, weights, affines, strict=True):
        size = (*launch.out_size[:2], *x.shape[2:])
        tap = _empty(size, x) if launch.options["TAP"] else None
        out = _empty(launch.out_size, x)
        partials = x.new_empty(launch.partials, dtype=torch.float32) if launch.partials else None
        counters = x.new_zeros(launch.counters, dtype=torch.int32) if launch.counters else None
        arguments = launch.arguments(x, weight, affine, out, tap, partials, counters)
        torch.library.wrap_triton(launch.kernel)[launch.grid](**arguments)
        if bits & TAP:
            results.append(out if tap is None else tap)
        x = out
    return [*results, x.clone() if results and x is results[-1] else x]


def _empty(size: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
