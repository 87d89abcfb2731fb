"""The power-on self test of GPU kernels: before a kernel's first use on a device, bit for bit against PyTorch.

Nobody can try every GPU, driver and compiler that a kernel may meet. So chains of tiny convolutions are run first:
borders, odd sizes, ReLU, pool, taps, three channels, channels that fill no block, a grid so small that sums are split;
and for the CUDA C++ library what it takes for each of its kernels to be chosen (:data:`CHAINS`). Values are small
integers with at most four weights per filter, so that every order of summation is exact in every dtype and precision,
and the kernel must have the bits of the reference, computed on the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from vgg_fast import reference, selection
from vgg_fast.locks import ForkLock
from vgg_fast.reference import Step

Run = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], Sequence[int], str], list[Tensor]]

REPORT = "run `vgg-fast verify --device cuda` and report what it prints, together with `vgg-fast doctor`"
NONE, RELU, POOL, TAP = Step.NONE, Step.RELU, Step.POOL, Step.TAP


class Chain(NamedTuple):
    """A network that reaches kernels which the others do not.

    Attributes:
        channels: of the image and of every convolution's output.
        program: of ``conv_stack``.
        size: of an image.
        fills: whether there are half as many images as multiprocessors, which gives each of these a large tile; else
            there are two.
    """

    channels: tuple[int, ...]
    program: tuple[int, ...]
    size: tuple[int, int]
    fills: bool = False

    def images(self, multiprocessors: int) -> list[int]:
        """Which of two different images stands at each place: in an order that repeats nothing."""
        return [i.bit_count() % 2 for i in range(max(2, multiprocessors // 2 if self.fills else 2))]


# tests/test_self_test.py holds which kernels these reach on which GPU. Triton's are compiled one by one at their first
# use, seconds each: they are given the first chain.
CHAINS = {
    "borders": Chain((3, 16, 24, 40, 32), (RELU, RELU | POOL | TAP, NONE, RELU | POOL), (13, 11)),
    "pixels that are not whole vectors": Chain((5, 24, 20, 7), (RELU | POOL | TAP, NONE, RELU | POOL | TAP), (13, 11)),
    "a first block": Chain((3, 64, 64, 128, 128), (RELU, RELU | POOL | TAP, RELU, RELU | POOL | TAP), (28, 20)),
    "a full GPU": Chain((64, 56, 248), (RELU | POOL, RELU | POOL), (32, 32), fills=True),
    # Blocks of 16 rows, then of 14; whole tiles, and half ones for the rest of the first grid.
    "a full Hopper": Chain((64, 64, 256), (RELU | POOL, RELU | POOL), (44, 32), fills=True),
}
_passed: set[tuple[str, torch.dtype, torch.device]] = set()
_lock = ForkLock()


def require(kernel: str, dtype: torch.dtype, device: torch.device, run: Run) -> None:
    """Lets a kernel of convolutions run on a device that it has passed its test on; the first call tests it.

    Args:
        kernel: of ``selection.GPU_KERNELS``.
        dtype, device: of the tensors it is to run on.
        run: ``run(x, weights, affines, program, kernel)`` gives the taps and the result.

    Raises:
        RuntimeError: it failed, now or before; or the device has no memory left to test it with, some 100 MB.

    Warns:
        RuntimeWarning: it failed now; how, and what to do.
    """
    reason = fault(kernel, dtype, device, lambda: failure(kernel, dtype, device, run))
    if reason is not None:
        raise RuntimeError(f"kernel {kernel!r} is switched off on {device}: {reason}")


def fault(kernel: str, dtype: torch.dtype, device: torch.device, test: Callable[[], str | None]) -> str | None:
    """Why a kernel may not be used on a device, or None; ``test()`` says so at the first call, with a warning.

    Not while a CUDA graph is being captured, when nothing may be read back: then it is tested at a later call.
    """
    if (kernel, dtype, device) in _passed:
        return None
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    with _lock.held():
        reason = selection.why_switched_off(kernel, device)
        if reason is not None:
            return reason
        if (kernel, dtype, device) not in _passed:
            reason = test()
            if reason is not None:
                selection.switch_off(kernel, device, reason)
                failed = f"kernel {kernel!r} failed its self test on {device}, so it is not used"
                warnings.warn(f"vgg_fast: {failed}: {reason}. {REPORT}", RuntimeWarning, stacklevel=3)
                return reason
            _passed.add((kernel, dtype, device))
        return None


def chains_of(kernel: str) -> dict[str, Chain]:
    """The chains that a kernel of ``selection.GPU_KERNELS`` is tested with."""
    return {name: chain for name, chain in CHAINS.items() if name == "borders" or kernel.startswith("cuda")}


def failure(kernel: str, dtype: torch.dtype, device: torch.device, run: Run) -> str | None:
    """How a kernel fails the test, or None; arguments as for :func:`require`."""
    on_gpu = device.type == "cuda"
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
    # Whatever mode the first caller is in.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False), torch.device("cpu"):
        for name, chain in chains_of(kernel).items():
            if wrong := _chain_failure(chain, kernel, dtype, device, run, chain.images(multiprocessors)):
                return f"{name}: {wrong}"
    return None


def _chain_failure(
    chain: Chain, kernel: str, dtype: torch.dtype, device: torch.device, run: Run, images: list[int]
) -> str | None:
    x, weights, affines = _inputs(chain, dtype)
    expected = reference.conv_stack_taps(x.double(), [w.double() for w in weights], affines, chain.program)
    packed = [w.permute(0, 2, 3, 1).contiguous().to(device) for w in weights]
    try:
        results = run(x.to(device)[images], packed, [a.to(device) for a in affines], chain.program, kernel)
        results = [y.cpu() for y in results]  # waits, so that what fails on the device fails here
    except Exception as error:
        if "out of memory" in str(error):  # says nothing of the kernel, which is tested at the next call
            raise
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if len(results) != len(expected):
        return f"{len(results)} results instead of {len(expected)}"
    for i, (result, wanted) in enumerate(zip(results, expected, strict=True), 1):
        if different := difference(result, wanted.to(dtype)[images]):
            return f"{f'tap {i}' if i < len(results) else 'the result'} is wrong: {different}"
    return None


def difference(result: Tensor, expected: Tensor) -> str | None:
    """Where and how two tensors differ, NaN from everything; None where they do not."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return f"{tuple(result.shape)} {result.dtype} instead of {tuple(expected.shape)} {expected.dtype}"
    wrong = result.double() != expected.double()
    if not wrong.any():
        return None
    first = tuple(wrong.nonzero()[0].tolist())
    values = f"{result[first].item()} instead of {expected[first].item()}"
    return f"{int(wrong.sum())} of {wrong.numel()} values differ, the first at {first}: {values}"


def pool_failure(dtype: torch.dtype, device: torch.device, run: Callable[[Tensor], Tensor]) -> str | None:
    """How a 2x2 max-pool fails on odd sizes in both memory formats, or None."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        x = _integers(2, 20, 9, 7, limit=9, seed=3).to(dtype)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            try:
                result = run(x.to(device).contiguous(memory_format=memory_format)).cpu()
            except Exception as error:
                return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            if different := difference(result, reference.maxpool2x2(x)):
                return different
    return None


def _inputs(chain: Chain, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Two images, weights ``[Cout, Cin, 3, 3]`` and affine maps, without PyTorch's random numbers: the user's stay."""
    x = _integers(2, chain.channels[0], *chain.size, limit=1, seed=1).to(dtype)
    weights, affines = [], []
    for seed, (cin, cout) in enumerate(pairwise(chain.channels)):
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
