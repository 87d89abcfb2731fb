"""Which kernel runs a problem on a device, and why not another.

Selection is a pure function of the dtype and the flags of an architecture, so tests can ask what a machine would choose
that nobody here has. A backend or kernel that is named runs or raises; only ``auto`` may fall back to plain PyTorch.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vgg_fast import library

REFERENCE = "reference"
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Problem:
    """What a backend has to know to say yes or no.

    Attributes:
        dtype: of the activations.
        device_type: ``cpu`` or ``cuda``.
        architecture: CPU flags separated by blanks, or the GPU's compute capability as ``sm_90``.
        precision: what fp32 tensors are content with: ``highest``, ``high`` or ``medium``.
    """

    dtype: torch.dtype
    device_type: str
    architecture: str
    precision: str = "highest"


def _reasons(problem: Problem, device_type: str, *others: str | None) -> list[str]:
    """The reasons every backend may have, then its own; None is no reason."""
    wrong_device = (
        None if problem.device_type == device_type else f"it runs on {device_type}, not {problem.device_type}"
    )
    wrong_dtype = None if problem.dtype in _DTYPES else f"it takes {', '.join(_DTYPES.values())}, not {problem.dtype}"
    return [reason for reason in (wrong_device, wrong_dtype, *others) if reason]


def _too_old(problem: Problem, least: int) -> str | None:
    if problem.device_type != "cuda" or int(problem.architecture.removeprefix("sm_")) >= least:
        return None
    return f"it needs sm_{least} or newer, this GPU is {problem.architecture}"


def _cpu_unsupported(problem: Problem) -> list[str]:
    return _reasons(problem, "cpu", library.missing("_C"))


def _triton_unsupported(problem: Problem) -> list[str]:
    lacking = None if importlib.util.find_spec("triton") else "Triton is not installed (pip install triton)"
    return _reasons(problem, "cuda", lacking, _too_old(problem, 80))


def _cuda_unsupported(problem: Problem) -> list[str]:
    return _reasons(problem, "cuda", library.missing("_C_cuda"), _too_old(problem, 80))


@dataclass(frozen=True)
class Backend:
    """One row of :data:`BACKENDS`: name, description, whether ``auto`` may take it, why it cannot run a problem."""

    name: str
    what: str
    automatic: bool
    unsupported: Callable[[Problem], list[str]]


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", "C++ micro-kernels: portable, AVX2, AVX-512, AMX", True, _cpu_unsupported),
        # Plain kernels so far: cuDNN is faster, and `auto` must never make anybody slower.
        Backend("triton", "Triton kernels", False, _triton_unsupported),
        Backend("cuda", "CUDA C++ kernels", False, _cuda_unsupported),
        Backend(REFERENCE, "plain PyTorch", True, lambda problem: []),
    )
}


def select(problem: Problem, backend: str = "auto") -> str:
    """Name of the kernel that runs ``problem``: a CPU micro-kernel, ``triton``, ``cuda`` or ``reference``.

    Args:
        problem: what is to be run, the architecture included.
        backend: ``auto``, a name of :data:`BACKENDS`, or the name of a CPU micro-kernel.

    Raises:
        RuntimeError: the backend named cannot run the problem (with the reasons), or there is none of that name.

    Example:
        >>> select(Problem(torch.float64, "cpu", "avx2 fma f16c"))
        'reference'
    """
    if backend == "auto":
        for candidate in BACKENDS.values():
            if candidate.automatic and not candidate.unsupported(problem):
                return _kernel(candidate.name, problem)
    owner = backend if backend in BACKENDS else "cpu" if backend in cpu_kernels() else None
    if owner is None:
        known = ", ".join(["auto", *BACKENDS, *cpu_kernels()])
        raise RuntimeError(f"there is no backend {backend!r}; choose one of {known}")
    reasons = BACKENDS[owner].unsupported(problem)
    if reasons:
        raise RuntimeError(f"backend {backend!r} cannot run this: {'; '.join(reasons)}")
    return _kernel(backend, problem)


def _kernel(backend: str, problem: Problem) -> str:
    if backend in BACKENDS and backend != "cpu":
        return backend
    name = "auto" if backend == "cpu" else backend
    return torch.ops.vgg_fast.cpu_select(_DTYPES[problem.dtype], problem.precision, name, problem.architecture)


def cpu_kernels() -> list[str]:
    """Names of the compiled CPU micro-kernels, best first; empty without the compiled library."""
    return [] if library.missing("_C") else torch.ops.vgg_fast.cpu_kernels().split()


def linear_kernels() -> list[str]:
    """Names of the compiled CPU kernels for fully connected layers, best first; empty without the compiled library."""
    return [] if library.missing("_C") else torch.ops.vgg_fast.cpu_linear_kernels().split()


_RUNGS = {"ieee": "highest", "tf32": "high", "bf16": "medium"}


def float32_precision(of: str = "conv") -> str:
    """``highest``, ``high`` or ``medium``: what PyTorch's settings ask of fp32 on the CPU.

    ``torch.backends.mkldnn.conv.fp32_precision`` where it is set (ieee, tf32 or bf16; it inherits from
    ``torch.backends.fp32_precision``), else ``torch.get_float32_matmul_precision()``.

    Args:
        of: ``conv``, or ``matmul`` for fully connected layers: the setting of ``torch.backends.mkldnn`` that counts.

    Example:
        >>> float32_precision()
        'highest'
    """
    own = getattr(torch.backends.mkldnn, of).fp32_precision
    return _RUNGS.get(own) or torch.get_float32_matmul_precision()


def problem_on(dtype: torch.dtype, device: torch.device) -> Problem:
    """The problem of running ``dtype`` on this machine's ``device``."""
    if device.type == "cpu":
        architecture = "" if library.missing("_C") else torch.ops.vgg_fast.cpu_flags()
    elif device.type == "cuda":
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    else:
        architecture = ""
    return Problem(dtype, device.type, architecture, float32_precision())


def choose(dtype: torch.dtype, device: torch.device, backend: str = "auto") -> str:
    """:func:`select` for this machine; cheap to call again.

    Raises:
        RuntimeError: as :func:`select`; also if ``VGG_FAST_ISA`` has a value it cannot have.
    """
    return _choose(dtype, device, backend, os.environ.get("VGG_FAST_ISA"), float32_precision())


# VGG_FAST_ISA and the precision are read again inside; as arguments they make the cache notice a change.
@functools.lru_cache(maxsize=256)
def _choose(dtype: torch.dtype, device: torch.device, backend: str, isa: str | None, precision: str) -> str:
    return select(problem_on(dtype, device), backend)


def select_linear(problem: Problem, backend: str = "auto") -> str:
    """Name of the kernel that runs a fully connected layer; arguments as :func:`select`.

    Only the CPU has such kernels; ``reference`` stands for PyTorch's own elsewhere. A kernel of the convolutions that
    fully connected layers have not leaves the choice open.

    Raises:
        RuntimeError: the kernel named cannot run the problem.

    Example:
        >>> select_linear(Problem(torch.float64, "cpu", "avx2 fma f16c"))
        'reference'
    """
    if backend in BACKENDS and backend != "cpu":
        return REFERENCE
    reasons = _cpu_unsupported(problem)
    if reasons and backend == "auto":
        return REFERENCE
    if reasons:
        raise RuntimeError(f"backend {backend!r} cannot run this: {'; '.join(reasons)}")
    name = backend if backend in linear_kernels() else "auto"
    dtype, precision = _DTYPES[problem.dtype], problem.precision
    return torch.ops.vgg_fast.cpu_linear_select(dtype, precision, name, problem.architecture)


def choose_linear(dtype: torch.dtype, device: torch.device, backend: str = "auto") -> str:
    """:func:`select_linear` for this machine; cheap to call again."""
    return _choose_linear(dtype, device, backend, os.environ.get("VGG_FAST_ISA"), float32_precision("matmul"))


@functools.lru_cache(maxsize=256)
def _choose_linear(dtype: torch.dtype, device: torch.device, backend: str, isa: str | None, precision: str) -> str:
    return select_linear(replace(problem_on(dtype, device), precision=precision), backend)


def why_reference(dtype: torch.dtype, device: torch.device) -> str:
    """Why no fused kernel is chosen for this dtype and device, in one sentence."""
    problem = problem_on(dtype, device)
    parts = []
    for backend in BACKENDS.values():
        if backend.name == REFERENCE:
            continue
        reasons = backend.unsupported(problem)
        if not reasons:
            reasons = [f"not chosen automatically yet, ask for backend={backend.name!r}"]
        parts.append(f"{backend.name}: {'; '.join(reasons)}")
    return " | ".join(parts)


@dataclass(frozen=True)
class BackendStatus:
    """One line of :func:`backends`."""

    name: str
    what: str
    available: bool
    reason: str


def backends() -> list[BackendStatus]:
    """What this machine offers, and the reason for what it lacks.

    Example:
        >>> [b.name for b in backends()]
        ['cpu', 'triton', 'cuda', 'reference']
    """
    result = []
    for backend in BACKENDS.values():
        on_gpu = backend.name in ("triton", "cuda")
        if on_gpu and not torch.cuda.is_available():
            without_gpu = backend.unsupported(Problem(torch.float32, "cuda", "sm_80"))
            reasons = ["there is no CUDA device", *without_gpu]
        else:
            reasons = backend.unsupported(problem_on(torch.float32, torch.device("cuda" if on_gpu else "cpu")))
        result.append(BackendStatus(backend.name, backend.what, not reasons, "; ".join(reasons)))
    return result
