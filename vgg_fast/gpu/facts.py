"""The GPU of this machine: why there is none, what it is, and how fast its clocks run while it works.

Whatever asks the driver is a few lines; what is made of its answers is plain functions of text.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


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


def describe(device: torch.device) -> dict[str, Any]:
    """What a number measured on ``device`` means nothing without; empty for the CPU, which measure.machine() has."""
    if device.type != "cuda":
        return {}
    found = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "gpu": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "gpu_memory_gb": round(total / 1e9, 1),
        "gpu_memory_free_gb": round(free / 1e9, 1),
        "l2_mb": round(getattr(found, "L2_cache_size", 0) / 2**20, 1),
        "driver": next(iter(_smi(device, "driver_version")), None),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton,
    }


# --- what fp32 may be -----------------------------------------------------------------------------------------------


FLOAT32 = {"fp32": "ieee", "tf32": "tf32"}  # what fp32 tensors are computed in, by the names of reports


@contextmanager
def float32(setting: str | None) -> Iterator[None]:
    """PyTorch's setting of fp32 convolutions and products on CUDA devices for a while.

    Args:
        setting: ``ieee`` or ``tf32``; None leaves it as it is.

    Example:
        >>> with float32("ieee"):
        ...     torch.backends.cudnn.allow_tf32
        False
    """
    if setting is None:
        yield
        return
    convolutions, products = float32_name(), torch.get_float32_matmul_precision()
    try:
        _allow_tf32(setting == "tf32")
        torch.set_float32_matmul_precision("high" if setting == "tf32" else "highest")
        yield
    finally:
        _allow_tf32(convolutions == "tf32")
        torch.set_float32_matmul_precision(products)


def _allow_tf32(allowed: bool) -> None:
    """By the older name, and where that leaves the newer ones open (torch 2.14) by those, too.

    Whoever sets only one of them makes PyTorch raise where the other is read, by Inductor for example.
    """
    cudnn: Any = torch.backends.cudnn
    cudnn.allow_tf32 = allowed
    if allowed:
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32"


def float32_name() -> str:
    """``fp32`` or ``tf32``: what PyTorch computes fp32 convolutions in on CUDA devices now.

    Example:
        >>> with float32("tf32"):
        ...     float32_name()
        'tf32'
    """
    cudnn: Any = torch.backends.cudnn
    return "tf32" if cudnn.conv.fp32_precision == "tf32" else "fp32"


# --- clocks ---------------------------------------------------------------------------------------------------------

_FIELDS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit")
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # before driver 535 the latter

# nvml.h, nvmlClocksEventReason*. Idle (1) is no brake, and a display's clock (0x100) none that matters here.
_BRAKES = {
    0x2: "application clocks are set",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "too hot (driver)",
    0x40: "too hot (hardware)",
    0x80: "power brake",
}


@dataclass(frozen=True)
class Clocks:
    """What nvidia-smi said while the GPU worked; None where it said nothing.

    Attributes:
        sm_mhz, sm_max_mhz, memory_mhz: clocks.
        celsius, watts, watts_limit: as named.
        held_back: what keeps the clock down, for people; empty if nothing does.
    """

    sm_mhz: float | None
    sm_max_mhz: float | None
    memory_mhz: float | None
    celsius: float | None
    watts: float | None
    watts_limit: float | None
    held_back: tuple[str, ...]

    def __str__(self) -> str:
        parts = []
        if self.sm_mhz is not None:
            parts.append(f"{self.sm_mhz:.0f} MHz" + (f" of {self.sm_max_mhz:.0f}" if self.sm_max_mhz else ""))
        if self.watts is not None:
            parts.append(f"{self.watts:.0f} W" + (f" of {self.watts_limit:.0f}" if self.watts_limit else ""))
        if self.celsius is not None:
            parts.append(f"{self.celsius:.0f} degrees")
        brakes = f"; held back by: {', '.join(self.held_back)}" if self.held_back else ""
        return (", ".join(parts) or "nvidia-smi says nothing of clocks") + brakes


def parse_clocks(line: str) -> Clocks | None:
    """A line of ``nvidia-smi --query-gpu=... --format=csv,noheader,nounits``; None if it is not one.

    Example:
        >>> str(parse_clocks("1755, 1980, 2619, 61, 688.4, 700.0, 0x0000000000000004"))
        '1755 MHz of 1980, 688 W of 700, 61 degrees; held back by: power cap'
    """
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(_FIELDS) + 1:
        return None
    sm, sm_max, memory, celsius, watts, limit = (_number(cell) for cell in cells[:-1])
    try:
        mask = int(cells[-1], 16)
    except ValueError:
        mask = 0  # "[N/A]": a virtual GPU, a slice of one
    brakes = tuple(text for bit, text in _BRAKES.items() if mask & bit)
    return Clocks(sm, sm_max, memory, celsius, watts, limit, brakes)


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def clocks_under(call: Callable[[], object], device: torch.device, least_s: float = 0.2) -> Clocks | None:
    """Clocks while ``call`` runs again and again: an idle GPU turns them down within moments.

    Args:
        call: work of some milliseconds at most, already warm.
        device: for the CPU there is nothing to ask, and None is the answer.
        least_s: seconds of work before the question.
    """
    if device.type != "cuda":
        return None
    for reasons in _REASONS:
        command = _smi_command(device, ",".join((*_FIELDS, reasons)))
        if found := parse_clocks(said_under(call, command, device, least_s)):
            return found
    return None


def said_under(call: Callable[[], object], command: Sequence[str], device: torch.device, least_s: float) -> str:
    """The first line that ``command`` prints while ``call`` keeps running; empty if it cannot be started or fails."""
    keep_busy(call, device, least_s)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return ""
    while process.poll() is None:
        call()
        synchronize(device)
    out, _ = process.communicate()
    return out.partition("\n")[0] if process.returncode == 0 else ""


def keep_busy(call: Callable[[], object], device: torch.device, seconds: float) -> None:
    """Calls again and again: an idle GPU turns its clocks up only after some tenths of a second of work."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        call()
        synchronize(device)


def synchronize(device: torch.device) -> None:
    """Waits for what was queued on ``device``; the CPU has no queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _smi_command(device: torch.device, fields: str) -> list[str]:
    # By UUID: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER make PyTorch's numbers other than nvidia-smi's.
    uuid = torch.cuda.get_device_properties(device).uuid
    return ["nvidia-smi", "-i", f"GPU-{uuid}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]


def _smi(device: torch.device, fields: str) -> list[str]:
    try:
        done = subprocess.run(_smi_command(device, fields), capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []
