"""Contestants beyond PyTorch as it is: cuDNN's benchmark mode, our kernels by name, and anybody's CUDA graph.

Each is an :data:`~vgg_fast.bench.contest.Engine`; all but the graphs run on a CPU as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from vgg_fast import selection
from vgg_fast.accelerate import accelerate
from vgg_fast.bench import peers
from vgg_fast.bench.contest import Engine, Unsuitable
from vgg_fast.bench.peers import GRAPH, OURS
from vgg_fast.precision import float32_precision

BENCHMARK = "cudnn.benchmark"


def engines(kernels: Sequence[str] = ("triton", "cuda"), backend: str = "auto") -> dict[str, Engine]:
    """All of them by name.

    Args:
        kernels: of ours, each a contestant of its own (:func:`kernels_on`).
        backend: of ours in the CUDA graph.

    Example:
        >>> list(engines(["triton"]))
        ['cudnn.benchmark', 'cudnn.benchmark, CUDA graph', 'vgg_fast triton', 'vgg_fast, CUDA graph']
    """
    result: dict[str, Engine] = {BENCHMARK: cudnn_benchmark, BENCHMARK + GRAPH: partial(graph, cudnn_benchmark)}
    result |= {f"{OURS} {kernel}": partial(by_kernel, kernel) for kernel in kernels}
    return {**result, OURS + GRAPH: partial(graph, partial(ours, backend))}


def kernels_on(architecture: str) -> list[str]:
    """What of ours is timed by name on a GPU, by the names for 16-bit tensors (:func:`by_kernel`).

    Example:
        >>> kernels_on("sm_80"), kernels_on("sm_90")
        (['triton', 'cuda'], ['triton', 'cuda_wgmma', 'cuda'])
    """
    problem = selection.Problem(torch.float16, "cuda", architecture)
    return [kernel for backend in ("triton", "cuda") for kernel in selection.kernels_of(backend, problem)]


def cudnn_benchmark(network: nn.Sequential, x: Tensor) -> Callable[[], Tensor]:
    """channels_last, cuDNN trying its algorithms in the first call and taking the fastest."""
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = x.contiguous(memory_format=torch.channels_last)

    def call() -> Tensor:
        # A setting of the whole process, which the others' turns must not see.
        torch.backends.cudnn.benchmark = True
        try:
            with torch.no_grad():
                return last(x)
        finally:
            torch.backends.cudnn.benchmark = False

    return call


def ours(backend: str, network: nn.Sequential, x: Tensor) -> Callable[[], Tensor]:
    """The accelerated network on one backend or kernel.

    Raises:
        Unsuitable: the backend does not run this, or runs nothing fused.
    """
    model = accelerate(copy.deepcopy(network), backend=backend)
    try:
        kernels = peers.kernels_used(model, x)
    except RuntimeError as error:
        raise Unsuitable(str(error).splitlines()[0]) from error
    if not kernels:
        raise Unsuitable("it runs nothing fused")
    return peers.Contestant(model, torch.contiguous_format).on(x)


def by_kernel(kernel: str, network: nn.Sequential, x: Tensor) -> Callable[[], Tensor]:
    """The accelerated network on one of :func:`kernels_on`; arguments and errors as of :func:`ours`.

    Where fp32 is to be computed in tf32, on the kernel that does what this one does for 16-bit tensors.
    """
    in_tf32 = x.dtype is torch.float32 and float32_precision(device_type="cuda") != "highest"
    name = f"{kernel}_tf32" if in_tf32 and f"{kernel}_tf32" in selection.GPU_KERNELS else kernel
    return ours(selection.exactly(name), network, x)


def graph(of: Engine, network: nn.Sequential, x: Tensor) -> Callable[[], Tensor]:
    """The call of another contestant, recorded into a CUDA graph and replayed; always on the same input.

    Raises:
        Unsuitable: not on a CUDA device, or what the other does cannot be recorded.
    """
    if x.device.type != "cuda":
        raise Unsuitable("CUDA graphs are of CUDA devices")
    call = of(network, x)
    with torch.cuda.device(x.device):
        # As PyTorch's notes on CUDA graphs have it: warm up on another stream, then record.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        recorded = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(recorded):
                y = call()
        except RuntimeError as error:
            raise Unsuitable(f"cannot be recorded: {str(error).splitlines()[0]}") from error

    def replay() -> Tensor:
        recorded.replay()
        return y

    return replay
