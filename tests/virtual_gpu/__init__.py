"""A virtual GPU: runs the PTX of Triton and nvcc on the CPU and checks every access; see docs/virtual-gpu.md."""

from tests.virtual_gpu.launch import Entry, Mapped, launch, ptx_entry, triton_entry
from tests.virtual_gpu.machine import KernelError
from tests.virtual_gpu.parse import PtxError

__all__ = ["Entry", "KernelError", "Mapped", "PtxError", "launch", "ptx_entry", "triton_entry"]
