"""What nvidia-smi says: the driver's version, and how fast the GPU's clocks run while it works.

Whatever asks is a few lines; what is made of the answers is plain functions of text.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vgg_fast.gpu.stream import keep_busy, synchronize

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
        command = _command(device, ",".join((*_FIELDS, reasons)))
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


def _command(device: torch.device, fields: str) -> list[str]:
    # By UUID: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER make PyTorch's numbers other than nvidia-smi's.
    uuid = torch.cuda.get_device_properties(device).uuid
    return ["nvidia-smi", "-i", f"GPU-{uuid}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]


def driver_version(device: torch.device) -> str | None:
    """Of NVIDIA's driver; None if nvidia-smi does not say."""
    try:
        done = subprocess.run(_command(device, "driver_version"), capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None) if done.returncode == 0 else None
