"""A stand-in for the GPU behind Triton: kernels are compiled for real, and launches written down instead of run.

For a process of its own, as Triton keeps what it compiles by device number. It replaces Triton's driver (a foreign
interface, which it also documents), nothing of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Launched(NamedTuple):
    """One launch: the compiled kernel, where, and its arguments by name."""

    compiled: Any
    grid: tuple[int, int, int]
    stream: int
    arguments: dict[str, Any]


class RecordingDriver:
    """What Triton's runtime asks of a driver (``triton/backends/driver.py``)."""

    def __init__(self, capability: int, shared_bytes: int = 166912) -> None:
        self.launched: list[Launched] = []
        self.target = GPUTarget("cuda", capability, 32)
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (1, 2, 128, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": shared_bytes},
        )

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return -1  # which no launch may show: the stream is PyTorch's, and passed along

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: int, function: int, packed: Any, *rest: Any) -> None:
            assert function == 2, "what load_binary returned"
            names: Sequence[str] = source.fn.arg_names
            arguments = dict(zip(names, rest[3:], strict=True))  # behind launch metadata and the two hooks
            self.launched.append(Launched(source, (x, y, z), stream, arguments))

        return launch

    def install(self) -> RecordingDriver:
        driver.set_active(self)
        return self
