"""The power-on self test of GPU kernels: it passes the reference, and finds whatever is wrong with a kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.virtual_gpu import cuda_cases
from tests.virtual_gpu.sm90 import HEIGHTS
from vgg_fast import reference, selection
from vgg_fast.kernels.configs import Architecture
from vgg_fast.ops._self_test import CHAINS, chains_of, failure, pool_failure, require

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Change = Callable[[list[Tensor]], list[Tensor]]


class Kernel:
    """The reference as a GPU kernel, with a fault of one's choice."""

    def __init__(self, change: Change = lambda results: results) -> None:
        self.change, self.calls = change, 0

    def __call__(self, x, weights, affines, program, kernel):
        self.calls += 1
        plain = [weight.permute(0, 3, 1, 2) for weight in weights]
        return self.change(reference.conv_stack_taps(x, plain, affines, program))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_passes(dtype):
    """In every dtype: the values are exact in it, so that a kernel has to have these bits."""
    for kernel, chains in (("triton", 1), ("cuda", len(CHAINS))):
        sound = Kernel()
        assert failure(kernel, dtype, CPU, sound) is None
        assert sound.calls == len(chains_of(kernel)) == chains


@pytest.mark.parametrize("where", [(0, 0, 0, 0), (1, 23, 12, 10), (1, 7, 0, 10), (0, 11, 6, 5)])
@pytest.mark.parametrize("which", [0, 1], ids=["tap 1", "the result"])
def test_one_wrong_pixel_is_found(which, where):
    def change(results: list[Tensor]) -> list[Tensor]:
        y = results[which]
        position = tuple(min(i, size - 1) for i, size in zip(where, y.shape, strict=True))
        y[position] += 1.0
        return results

    reason = failure("imagined", torch.float16, CPU, Kernel(change)) or ""
    assert f"borders: {['tap 1', 'the result'][which]} is wrong: 1 of {[6864, 384][which]} values differ" in reason


def test_other_faults_are_named():
    def fault(change: Change) -> str | None:
        return failure("imagined", torch.float32, CPU, Kernel(change))

    def raises(results: list[Tensor]) -> list[Tensor]:
        raise RuntimeError("no kernel image is available\nfor this device")

    assert fault(raises) == "borders: RuntimeError: no kernel image is available"
    assert "1 results instead of 2" in fault(lambda results: results[1:])
    assert "tap 1 is wrong: (2, 24, 13, 10)" in fault(lambda results: [results[0][..., :-1], results[1]])
    assert "torch.float64 instead of" in fault(lambda results: [results[0].double(), results[1]])
    assert "nan instead of" in fault(lambda results: [results[0] * float("nan"), results[1]])


# Compute capability and multiprocessors: A100, RTX 4090, H100 SXM and PCIe, B200, RTX 5090.
GPUS = [Architecture(*gpu) for gpu in ((80, 108), (89, 128), (90, 132), (90, 114), (100, 148), (120, 170))]


def test_what_it_covers_of_triton():
    """A pool, a tap, odd sizes, Cin = 3, a Cout that fills no block of 16; and on today's GPUs a split sum."""
    from vgg_fast.kernels.stack import Problem, launches_of

    (chain,) = chains_of("triton").values()
    assert {int(step) for step in chain.program} == {0, 1, 3, 7}
    assert chain.channels[0] == 3
    assert any(c % 16 for c in chain.channels[1:])
    for gpu in GPUS:
        for dtype in DTYPES:
            problem = Problem((2, 3, *chain.size), chain.channels[1:], chain.program, dtype, "ieee", CPU)
            launches = launches_of(problem, gpu)
            assert any(launch.counters for launch in launches), (gpu, dtype)
            assert any(not launch.counters for launch in launches), (gpu, dtype)


def names_of(layer: cuda_cases.LayerPlan) -> set[str]:
    """What one layer of a chain runs."""
    if layer.in_next:
        return set()
    if layer.with_previous:
        return {"block1"}
    if layer.kernel == cuda_cases.HOPPER:
        cut = layer.hopper
        parts = {"whole": cut.whole > 0, "half": cut.items > cut.whole, "split": cut.split > 1}
        return {f"wgmma {cut.rows}, {part}" for part, is_there in parts.items() if is_there}
    if layer.kernel == cuda_cases.TENSOR_CORES:
        return {f"mma {cuda_cases.TILES[layer.plan.tile]}", *(["mma, split"] if layer.plan.split > 1 else [])}
    by_sectors = layer.args.cin * (4 if layer.args.dtype == 0 else 2) % 32 == 0
    return {"plain by sectors" if by_sectors else "plain", *(["plain, tap and pool"] if layer.step & 6 == 6 else [])}


def reached(kernel: str, dtype: torch.dtype, gpu: Architecture) -> set[str]:
    """The kernels of csrc/cuda that the self test makes a GPU run, with their tiles."""
    found: set[str] = set()
    for chain in chains_of(kernel).values():
        size = len(chain.images(gpu.multiprocessors)), chain.channels[0], *chain.size
        layers = cuda_cases.plan_chain(size, chain.channels[1:], chain.program, dtype, kernel, gpu)
        found = found.union(*map(names_of, layers))
    return found


MMA = {"mma 256x128", "mma 128x64", "mma 256x64", "mma, split"}
PLAIN = {"plain", "plain, tap and pool"}


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_every_cuda_kernel_that_a_gpu_may_be_given_is_tested(gpu):
    """Through the planners that choose on the GPU itself; a new kernel or tile has to be added to these sets."""
    assert MMA - {"mma, split"} == {f"mma {tile}" for tile in cuda_cases.TILES}
    assert reached("cuda", torch.float32, gpu) == PLAIN | {"plain by sectors"}
    assert reached("cuda_tf32", torch.float32, gpu) == PLAIN | MMA
    on_hopper = {f"wgmma {rows}, {part}" for rows in HEIGHTS for part in ("whole", "half")} | {"wgmma 14, split"}
    on_hopper = on_hopper if gpu.sm == 90 else set()
    assert reached("cuda_wgmma_tf32", torch.float32, gpu) == PLAIN | MMA | on_hopper
    for dtype in (torch.float16, torch.bfloat16):
        assert reached("cuda", dtype, gpu) == PLAIN | MMA | {"block1"}
        assert reached("cuda_wgmma", dtype, gpu) == PLAIN | MMA | {"block1"} | on_hopper


def test_a_kernel_is_tested_once_per_device_and_dtype():
    kernel = Kernel()
    for _ in range(2):
        require("imagined sound kernel", torch.float32, CPU, kernel)
        require("imagined sound kernel", torch.float16, CPU, kernel)
    assert kernel.calls == 2
    assert selection.why_switched_off("imagined sound kernel", CPU) is None


def refused(dtype: torch.dtype, kernel: Kernel) -> None:
    with pytest.raises(
        RuntimeError, match="is switched off on cpu: borders: the result is wrong: 384 of 384 values differ"
    ):
        require("imagined broken kernel", dtype, CPU, kernel)


def test_a_kernel_that_fails_is_switched_off_and_says_what_to_do():
    kernel = Kernel(lambda results: [results[0], results[1] + 1])
    with pytest.warns(RuntimeWarning, match=r"'imagined broken kernel' failed its self test on cpu.*vgg-fast verify"):
        refused(torch.float32, kernel)
    assert "384 of 384" in selection.why_switched_off("imagined broken kernel", CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in DTYPES:  # what fails in one dtype is not trusted in another
            refused(dtype, kernel)
    assert kernel.calls == 1


def test_a_full_device_says_nothing_of_a_kernel():
    def full(results: list[Tensor]) -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            require("imagined kernel on a full device", torch.float16, CPU, Kernel(full))
    assert selection.why_switched_off("imagined kernel on a full device", CPU) is None
    require("imagined kernel on a full device", torch.float16, CPU, Kernel())


def test_it_works_in_whatever_mode_the_first_call_is_made_and_leaves_the_random_state():
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        assert failure("imagined", torch.float32, CPU, Kernel()) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_the_pool_is_tested_in_both_memory_formats():
    def only_contiguous(x: Tensor) -> Tensor:
        y = reference.maxpool2x2(x)
        return y if x.is_contiguous() else y.flip(3)

    for dtype in DTYPES:
        assert pool_failure(dtype, CPU, reference.maxpool2x2) is None
        assert "values differ, the first at" in (pool_failure(dtype, CPU, only_contiguous) or "")
    assert pool_failure(torch.float32, CPU, lambda x: x.no_such_thing) == (
        "AttributeError: 'Tensor' object has no attribute 'no_such_thing'"
    )
