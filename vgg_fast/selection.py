"""Which kernel runs a problem on a device, and why not another.

Selection is a pure function of the dtype and the flags of an architecture, so tests can ask what a machine would choose
that nobody here has. A backend or kernel that is named runs or raises; only ``auto`` may fall back to plain PyTorch. On
a GPU it says which kernels are to be timed (:func:`candidates`); the timing is :mod:`vgg_fast.gpu.tuning`'s.
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
        precision: what fp32 tensors are content with: ``highest``, ``high`` or ``medium``; on a GPU ``highest`` is
            PyTorch's ``ieee`` and ``high`` its ``tf32``.
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


def _rocm() -> str | None:
    return "this PyTorch is built for ROCm, where nothing of ours was ever tried" if torch.version.hip else None


def _too_old(problem: Problem, least: int) -> str | None:
    if problem.device_type != "cuda" or int(problem.architecture.removeprefix("sm_")) >= least:
        return None
    return f"it needs sm_{least} or newer, this GPU is {problem.architecture}"


def _cpu_unsupported(problem: Problem) -> list[str]:
    return _reasons(problem, "cpu", library.missing("_C"))


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not imported for that."""
    return importlib.util.find_spec("triton") is not None


def _triton_unsupported(problem: Problem) -> list[str]:
    lacking = None if has_triton() else "Triton is not installed (pip install triton)"
    return _reasons(problem, "cuda", _rocm() or lacking, _too_old(problem, 80))


def _cuda_unsupported(problem: Problem) -> list[str]:
    return _reasons(problem, "cuda", _rocm() or library.missing("_C_cuda"), _too_old(problem, 80))


@dataclass(frozen=True)
class Backend:
    """One row of :data:`BACKENDS`: name, description, whether ``auto`` takes it untimed, why it cannot run."""

    name: str
    what: str
    automatic: bool
    unsupported: Callable[[Problem], list[str]]


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", "C++ micro-kernels: portable, AVX2, AVX-512, AMX", True, _cpu_unsupported),
        # On a GPU `auto` must never make anybody slower than cuDNN: it takes what was timed (vgg_fast.gpu.tuning).
        Backend("triton", "Triton kernels", False, _triton_unsupported),
        Backend("cuda", "CUDA C++ kernels", False, _cuda_unsupported),
        Backend(REFERENCE, "plain PyTorch", True, lambda problem: []),
    )
}

# The kernels of the GPU backends. A backend's own name is its kernel for fp16, bf16 and true fp32; the others take fp32
# tensors at the precision that their name ends on.
GPU_KERNELS = {
    "triton": "triton",
    "triton_tf32": "triton",
    "triton_bf16x3": "triton",
    "cuda": "cuda",
    "cuda_tf32": "cuda",
}


def select(problem: Problem, backend: str = "auto") -> str:
    """Name of the kernel that runs ``problem``: a CPU micro-kernel, one of :data:`GPU_KERNELS`, or ``reference``.

    Args:
        problem: what is to be run, the architecture included.
        backend: ``auto`` (on a GPU the reference: what is faster there is a matter of timing), a name of
            :data:`BACKENDS`, or the name of a kernel. The name of a GPU backend follows PyTorch's setting for fp32.

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
    owner = backend if backend in BACKENDS else GPU_KERNELS.get(backend, "cpu" if backend in cpu_kernels() else None)
    if owner is None:
        known = ", ".join(dict.fromkeys(["auto", *BACKENDS, *GPU_KERNELS, *cpu_kernels()]))
        raise RuntimeError(f"there is no backend {backend!r}; choose one of {known}")
    reasons = BACKENDS[owner].unsupported(problem)
    if backend in GPU_KERNELS and backend != owner and problem.dtype is not torch.float32:
        reasons.append(f"kernel {backend!r} takes float32, not {problem.dtype}: take {owner!r}")
    if reasons:
        raise RuntimeError(f"backend {backend!r} cannot run this: {'; '.join(reasons)}")
    return _kernel(backend, problem)


def _kernel(backend: str, problem: Problem) -> str:
    if backend in ("triton", "cuda") and problem.dtype is torch.float32 and problem.precision != "highest":
        return f"{backend}_tf32"
    if backend in GPU_KERNELS or backend == REFERENCE:
        return backend
    name = "auto" if backend == "cpu" else backend
    return torch.ops.vgg_fast.cpu_select(_DTYPES[problem.dtype], problem.precision, name, problem.architecture)


def layout(kernel: str) -> str:
    """What tells packed weights apart: all kernels of a GPU read the same ones."""
    return "cuda" if kernel in GPU_KERNELS else kernel


def candidates(problem: Problem) -> list[str]:
    """The kernels that ``auto`` has to time against PyTorch before it takes one: of the GPU backends that can run it.

    Example:
        >>> candidates(Problem(torch.float32, "cpu", "avx2 fma f16c"))
        []
    """
    return [_kernel(b.name, problem) for b in BACKENDS.values() if not b.automatic and not b.unsupported(problem)]


def cpu_kernels() -> list[str]:
    """Names of the compiled CPU micro-kernels, best first; empty without the compiled library."""
    return [] if library.missing("_C") else torch.ops.vgg_fast.cpu_kernels().split()


def linear_kernels() -> list[str]:
    """Names of the compiled CPU kernels for fully connected layers, best first; empty without the compiled library."""
    return [] if library.missing("_C") else torch.ops.vgg_fast.cpu_linear_kernels().split()


_RUNGS = {"ieee": "highest", "tf32": "high", "bf16": "medium"}


def float32_precision(of: str = "conv", device_type: str = "cpu") -> str:
    """``highest``, ``high`` or ``medium``: what PyTorch's settings ask of fp32.

    On the CPU ``torch.backends.mkldnn.conv.fp32_precision`` where it is set (ieee, tf32 or bf16; it inherits from
    ``torch.backends.fp32_precision``), else ``torch.get_float32_matmul_precision()``. On a GPU
    ``torch.backends.cudnn.conv.fp32_precision``, of which ``torch.backends.cudnn.allow_tf32`` is the older name.

    Args:
        of: ``conv``, or ``matmul`` for fully connected layers on the CPU: the setting that counts.
        device_type: ``cpu`` or ``cuda``.

    Example:
        >>> float32_precision(), float32_precision(device_type="cuda")  # PyTorch's defaults
        ('highest', 'high')
    """
    if device_type == "cuda":
        setting = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        return "high" if setting == "tf32" else "highest"
    own = _RUNGS.get(getattr(torch.backends.mkldnn, of).fp32_precision)
    try:
        return own or torch.get_float32_matmul_precision()
    except RuntimeError:  # the older setting does not answer once the newer ones were set for CUDA, say
        return "highest"


def problem_on(dtype: torch.dtype, device: torch.device) -> Problem:
    """The problem of running ``dtype`` on this machine's ``device``."""
    if device.type == "cpu":
        architecture = "" if library.missing("_C") else torch.ops.vgg_fast.cpu_flags()
    elif device.type == "cuda":
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    else:
        architecture = ""
    return Problem(dtype, device.type, architecture, float32_precision(device_type=device.type))


def choose(dtype: torch.dtype, device: torch.device, backend: str = "auto") -> str:
    """:func:`select` for this machine; cheap to call again.

    Raises:
        RuntimeError: as :func:`select`; also if ``VGG_FAST_ISA`` has a value it cannot have, or if the kernel failed
            its self test on this device.
    """
    kernel = _choose(dtype, device, backend, os.environ.get("VGG_FAST_ISA"), float32_precision(device_type=device.type))
    if (kernel, device) in _switched_off:
        raise RuntimeError(f"kernel {kernel!r} is switched off on {device}: {_switched_off[kernel, device]}")
    return kernel


# VGG_FAST_ISA and the precision are read again inside; as arguments they make the cache notice a change.
@functools.lru_cache(maxsize=256)
def _choose(dtype: torch.dtype, device: torch.device, backend: str, isa: str | None, precision: str) -> str:
    return select(problem_on(dtype, device), backend)


def candidates_on(dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """:func:`candidates` on a GPU of this machine, without what failed its self test there; cheap to call again."""
    names = _candidates_on(dtype, device, float32_precision(device_type=device.type))
    return tuple([name for name in names if (name, device) not in _switched_off]) if _switched_off else names


@functools.lru_cache(maxsize=256)
def _candidates_on(dtype: torch.dtype, device: torch.device, precision: str) -> tuple[str, ...]:
    return tuple(candidates(problem_on(dtype, device)))


# GPU kernels that disagreed with PyTorch on a device, and how; see vgg_fast/ops/_self_test.py.
_switched_off: dict[tuple[str, torch.device], str] = {}


def switch_off(kernel: str, device: torch.device, reason: str) -> None:
    """Lets :func:`choose` refuse a kernel on a device from now on."""
    _switched_off[kernel, device] = reason


def why_switched_off(kernel: str, device: torch.device) -> str | None:
    """The reason given to :func:`switch_off`, or None."""
    return _switched_off.get((kernel, device))


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
            reasons = ["an op called by itself is not timed; accelerate() does that, or name the backend"]
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
            device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
            failed = [f"{kernel}: {why}" for (kernel, where), why in _switched_off.items() if where == device]
            own = [why for why in failed if why.startswith(backend.name)]
            reasons = backend.unsupported(problem_on(torch.float32, device)) + own
        result.append(BackendStatus(backend.name, backend.what, not reasons, "; ".join(reasons)))
    return result
