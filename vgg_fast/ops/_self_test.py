"""The power-on self test of GPU kernels: before a kernel's first use on a device, bit for bit against PyTorch.

Nobody can try every GPU, driver and compiler that a kernel may meet. So a chain of four tiny convolutions is run first:
borders, odd sizes, ReLU, pool, taps, three channels, channels that fill no block, a grid so small that sums are split.
Its values are small integers with at most four weights per filter, so that every order of summation is exact in every
dtype and precision, and the kernel must have the bits of the reference, computed on the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vgg_fast import reference, selection
from vgg_fast.locks import ForkLock
from vgg_fast.reference import Step

Run = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], Sequence[int], str], list[Tensor]]

REPORT = "run `vgg-fast verify --device cuda` and report what it prints, together with `vgg-fast doctor`"
CHANNELS = (3, 16, 24, 40, 32)
PROGRAM = (Step.RELU, Step.RELU | Step.POOL | Step.TAP, Step.NONE, Step.RELU | Step.POOL)
_passed: set[tuple[str, torch.dtype, torch.device]] = set()
_lock = ForkLock()


def require(kernel: str, dtype: torch.dtype, device: torch.device, run: Run) -> None:
    """Lets a kernel run on a device that it has passed its test on; the first call tests it.

    Not while a CUDA graph is being captured, when nothing may be read back: such a kernel is tested at a later call.

    Args:
        kernel: of ``selection.GPU_KERNELS``.
        dtype, device: of the tensors it is to run on.
        run: ``run(x, weights, affines, program, kernel)`` gives the taps and the result.

    Raises:
        RuntimeError: it failed, now or before.

    Warns:
        RuntimeWarning: it failed now; how, and what to do.
    """
    if (kernel, dtype, device) in _passed:
        return
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    with _lock.held():
        reason = selection.why_switched_off(kernel, device)
        if reason is None and (kernel, dtype, device) not in _passed:
            reason = failure(kernel, dtype, device, run)
            if reason is None:
                _passed.add((kernel, dtype, device))
                return
            selection.switch_off(kernel, device, reason)
            warnings.warn(
                f"vgg_fast: kernel {kernel!r} failed its self test on {device}, so it is not used: {reason}. {REPORT}",
                RuntimeWarning,
                stacklevel=2,
            )
    if reason is not None:
        raise RuntimeError(f"kernel {kernel!r} is switched off on {device}: {reason}")


def failure(kernel: str, dtype: torch.dtype, device: torch.device, run: Run) -> str | None:
    """How a kernel fails the test, or None; arguments as for :func:`require`."""
    # Whatever mode the first caller is in.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False), torch.device("cpu"):
        x, weights, affines = _inputs(dtype)
        expected = reference.conv_stack_taps(x.double(), [w.double() for w in weights], affines, PROGRAM)
        packed = [w.permute(0, 2, 3, 1).contiguous().to(device) for w in weights]
        try:
            results = run(x.to(device), packed, [a.to(device) for a in affines], PROGRAM, kernel)
            results = [y.cpu() for y in results]  # waits, so that what fails on the device fails here
        except Exception as error:
            return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if len(results) != len(expected):
        return f"{len(results)} results instead of {len(expected)}"
    for name, result, wanted in zip(("the tap", "the result"), results, expected, strict=True):
        if result.shape != wanted.shape or result.dtype != dtype:
            return f"{name} is {tuple(result.shape)} {result.dtype}, not {tuple(wanted.shape)} {dtype}"
        wrong = result.double() != wanted  # true for NaN
        if wrong.any():
            first = tuple(wrong.nonzero()[0].tolist())
            values = f"{result[first].item()} instead of {wanted[first].item()}"
            return f"{int(wrong.sum())} of {wrong.numel()} values of {name} are wrong, the first at {first}: {values}"
    return None


def _inputs(dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Image, weights ``[Cout, Cin, 3, 3]`` and affine maps, without PyTorch's random numbers: the user's stay his."""
    x = _integers(2, CHANNELS[0], 13, 11, limit=1, seed=1).to(dtype)
    weights, affines = [], []
    for seed, (cin, cout) in enumerate(pairwise(CHANNELS)):
        weight = torch.zeros(cout, cin * 9, dtype=dtype)
        at = torch.arange(cout)[:, None]
        # Four taps of each filter at places that differ; the largest value is 1, 5, 21, 85, 341: exact in 8 bits or,
        # the last, after the ReLU and pool of values that are.
        weight[at, (at * 5 + torch.tensor([0, 7, 13, 22]) * (2 * seed + 1)) % (cin * 9)] = 1.0
        weight *= 1 - 2 * (torch.arange(cin * 9) % 2)
        weights.append(weight.view(cout, cin, 3, 3))
        affines.append(torch.stack([torch.ones(cout), _integers(cout, limit=1, seed=seed)]))
    return x, weights, affines


def _integers(*size: int, limit: int, seed: int) -> Tensor:
    count = torch.Size(size).numel()
    values = (torch.arange(count) * 2654435761 + seed * 40503) // 65536 % (2 * limit + 1) - limit
    return values.float().view(size)
