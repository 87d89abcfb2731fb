"""What the choice of a kernel needs of a GPU: its name, versions and clock, whether a graph is being captured."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parents[1]


def capturing(device: torch.device) -> bool:
    """Whether what is queued on this device now goes into a CUDA graph: nothing may wait for the device then."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def clock(device: torch.device) -> Callable[[Callable[[], object], int], float]:
    """A clock for :func:`vgg_fast.gpu.tuning.contest`: CUDA events on the current stream, around calls back to back.

    So a call counts for as long as the GPU or the CPU needs, whichever is longer: what a user sees of it.
    """

    def seconds(call: Callable[[], object], repeats: int) -> float:
        stream = torch.cuda.current_stream(device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        for _ in range(repeats):
            call()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats

    return seconds


@functools.cache
def place(index: int) -> tuple[str, str, int, tuple[tuple[str, str], ...]]:
    """Name, compute capability and multiprocessors of a device, and :func:`versions`: what times depend on."""
    properties = torch.cuda.get_device_properties(index)
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    found = (("driver", str(driver)), ("cudnn", str(torch.backends.cudnn.version())), *versions())
    return properties.name, f"sm_{properties.major}{properties.minor}", properties.multi_processor_count, found


@functools.cache
def versions() -> tuple[tuple[str, str], ...]:
    """Of PyTorch, its CUDA, Triton, and of our kernels: a hash of their sources, so that no version has to be raised.

    Example:
        >>> [name for name, _ in versions()]
        ['torch', 'cuda', 'triton', 'kernels']
    """
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    kernels = hashlib.sha256()
    package = importlib.util.find_spec("vgg_fast.kernels")  # elsewhere than we are in an editable installation
    for folder in (package.submodule_search_locations or ()) if package else ():
        for path in sorted(Path(folder).glob("*.py")):
            kernels.update(path.read_bytes())
    for library in _PACKAGE.glob("_C_cuda.*so"):
        status = library.stat()
        kernels.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return (
        ("torch", torch.__version__),
        ("cuda", str(torch.version.cuda)),
        ("triton", triton),
        ("kernels", kernels.hexdigest()[:16]),
    )
