"""The GPU of this machine: why there is none, what it is, and which software drives it."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import torch

from vgg_fast.gpu.nvidia_smi import driver_version

_PACKAGE = Path(__file__).parents[1]


def lacking() -> str | None:
    """Why nothing runs on a CUDA device here, in one sentence with what to do; None where something does.

    Example:
        >>> lacking() is None or "CUDA" in lacking()
        True
    """
    error = None
    if torch.version.cuda is not None:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as reason:
            error = str(reason)
    return explain_lack(torch.version.cuda, torch.version.hip, error)


def explain_lack(cuda: str | None, hip: str | None, error: str | None) -> str | None:
    """:func:`lacking` from what PyTorch says of itself.

    Args:
        cuda, hip: ``torch.version.cuda`` and ``torch.version.hip``.
        error: what ``torch.cuda.init()`` raised, or None.

    Example:
        >>> explain_lack("13.0", None, "No CUDA GPUs are available")
        'no CUDA device: there is a driver, but it shows no GPU; look at nvidia-smi and at CUDA_VISIBLE_DEVICES'
    """
    if hip is not None:
        return f"no CUDA device: this PyTorch is a build for AMD GPUs (ROCm {hip}), the GPU kernels are for NVIDIA's"
    if cuda is None:
        return "no CUDA device: this PyTorch is a build without CUDA; install one with it (pip install torch, on Linux)"
    if error is None:
        return None
    if "no NVIDIA driver" in error:
        return "no CUDA device: there is no NVIDIA driver on this machine; install it, then nvidia-smi shows the GPU"
    if "driver" in error and "too old" in error:
        return f"no CUDA device: the NVIDIA driver is too old for this PyTorch's CUDA {cuda}; install a newer driver"
    if "No CUDA GPUs" in error:
        return "no CUDA device: there is a driver, but it shows no GPU; look at nvidia-smi and at CUDA_VISIBLE_DEVICES"
    return f"no CUDA device: CUDA {cuda} does not start: {error.splitlines()[0]}"


class Unavailable(RuntimeError):
    """A device or kernel was named that is not here."""


def named(name: str) -> torch.device:
    """``cpu``, or ``cuda`` (the current one).

    Raises:
        Unavailable: there is no such device, or no kernel for it.

    Example:
        >>> named("cpu")
        device(type='cpu')
    """
    if name not in ("cpu", "cuda"):
        raise Unavailable(f"there are no kernels for device {name!r}; choose cpu or cuda")
    if name == "cuda" and (reason := lacking()):
        raise Unavailable(reason)
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def describe(device: torch.device) -> dict[str, Any]:
    """What a number measured on ``device`` means nothing without; empty for the CPU, which bench/host.py describes."""
    if device.type != "cuda":
        return {}
    found = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "gpu": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "gpu_memory_gb": round(total / 1e9, 1),
        "gpu_memory_free_gb": round(free / 1e9, 1),
        "l2_mb": round(getattr(found, "L2_cache_size", 0) / 2**20, 1),
        "driver": driver_version(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _triton() or None,
    }


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
        ("triton", _triton()),
        ("kernels", kernels.hexdigest()[:16]),
    )


def _triton() -> str:
    """Its version; empty where it is not installed."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""
