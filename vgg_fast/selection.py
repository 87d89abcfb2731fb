"""Which kernel runs a problem on a device, and why not another.

Selection is a pure function of the dtype and the flags of an architecture, so tests can ask what a machine would choose
that nobody here has. A backend or kernel that is named runs or raises; only ``auto`` may fall back to plain PyTorch. On
a GPU it says which kernels are to be timed (:func:`candidates`); the timing is :mod:`vgg_fast.gpu.tuning`'s.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch

from vgg_fast import library
from vgg_fast.precision import float32_precision

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

# The kernels of the GPU backends. That of a backend's own name is for fp16, bf16 and true fp32; others take fp32 at the
# precision that their name ends on. With `_wgmma` they are the same but for Hopper's wgmma, where a layer allows it.
GPU_KERNELS = {
    "triton": "triton",
    "triton_tf32": "triton",
    "triton_bf16x3": "triton",
    "cuda": "cuda",
    "cuda_wgmma": "cuda",
    "cuda_tf32": "cuda",
    "cuda_wgmma_tf32": "cuda",
}
_EXACT = {f"={kernel}": kernel for kernel in GPU_KERNELS}


def exactly(kernel: str) -> str:
    """The name of a kernel for :func:`select` where a backend has the same: ``=cuda`` is that kernel on any GPU.

    Example:
        >>> exactly("cuda"), exactly("avx2_f32")
        ('=cuda', 'avx2_f32')
    """
    return f"={kernel}" if kernel in GPU_KERNELS else kernel


def objections(kernel: str, problem: Problem) -> list[str]:
    """Why one of :data:`GPU_KERNELS` does not take what its backend takes; a pure function.

    Example:
        >>> objections("cuda_wgmma", Problem(torch.float16, "cuda", "sm_100"))
        ["kernel 'cuda_wgmma' is for sm_90 alone, this GPU is sm_100: take 'cuda'"]
    """
    owner = GPU_KERNELS[kernel]
    if kernel == owner:
        return []
    of_16_bits = kernel == "cuda_wgmma"
    taken = (torch.bfloat16, torch.float16) if of_16_bits else (torch.float32,)
    reasons = []
    if problem.dtype not in taken:
        listed = " and ".join(_DTYPES[dtype] for dtype in taken)
        reasons.append(f"kernel {kernel!r} takes {listed}, not {problem.dtype}: take {owner!r}")
    anywhere = kernel.replace("_wgmma", "")
    if kernel != anywhere and problem.device_type == "cuda" and problem.architecture != "sm_90":
        reasons.append(f"kernel {kernel!r} is for sm_90 alone, this GPU is {problem.architecture}: take {anywhere!r}")
    return reasons


def kernels_of(backend: str, problem: Problem) -> list[str]:
    """The kernels that the name of a backend or CPU kernel stands for, the best first; a pure function.

    On a GPU fp32 follows PyTorch's setting, and Hopper has a kernel to stand in for the one of its own.

    Example:
        >>> kernels_of("cuda", Problem(torch.float16, "cuda", "sm_90"))
        ['cuda_wgmma', 'cuda']
    """
    if backend == REFERENCE:
        return [backend]
    if backend not in GPU_KERNELS:
        name, dtype = "auto" if backend == "cpu" else backend, _DTYPES[problem.dtype]
        return [torch.ops.vgg_fast.cpu_select(dtype, problem.precision, name, problem.architecture)]
    rung = "_tf32" if problem.dtype is torch.float32 and problem.precision != "highest" else ""
    on_hopper = backend == "cuda" and not objections(f"cuda_wgmma{rung}", problem)
    return [*([f"cuda_wgmma{rung}"] if on_hopper else []), f"{backend}{rung}"]


def select(problem: Problem, backend: str = "auto", switched_off: Collection[str] = ()) -> str:
    """Name of the kernel that runs ``problem``: a CPU micro-kernel, one of :data:`GPU_KERNELS`, or ``reference``.

    Args:
        problem: what is to be run, the architecture included.
        backend: ``auto`` (on a GPU the reference: what is faster there is a matter of timing), a name of
            :data:`BACKENDS`, which on a GPU stands for several kernels (:func:`kernels_of`), or the name of a kernel
            (:func:`exactly`).
        switched_off: kernels that failed their self test; a backend's name passes over them while there are others.

    Raises:
        RuntimeError: the backend named cannot run the problem (with the reasons), or there is none of that name.

    Example:
        >>> select(Problem(torch.float64, "cpu", "avx2 fma f16c"))
        'reference'
    """
    if backend == "auto":
        for candidate in BACKENDS.values():
            if candidate.automatic and not candidate.unsupported(problem):
                return kernels_of(candidate.name, problem)[0]
    name = _EXACT.get(backend, backend)
    owner = name if name in BACKENDS else GPU_KERNELS.get(name, "cpu" if name in cpu_kernels() else None)
    if owner is None:
        known = ", ".join(dict.fromkeys(["auto", *BACKENDS, *GPU_KERNELS, *cpu_kernels()]))
        raise RuntimeError(f"there is no backend {backend!r}; choose one of {known}")
    reasons = BACKENDS[owner].unsupported(problem) + (objections(name, problem) if name in GPU_KERNELS else [])
    if reasons:
        raise RuntimeError(f"backend {backend!r} cannot run this: {'; '.join(reasons)}")
    if name in GPU_KERNELS and backend not in BACKENDS:
        return name
    kernels = kernels_of(name, problem)
    return next((kernel for kernel in kernels if kernel not in switched_off), kernels[0])


def layout(kernel: str) -> str:
    """What tells packed weights apart: all kernels of a GPU read the same ones."""
    return "cuda" if kernel in GPU_KERNELS else kernel


def candidates(problem: Problem) -> list[str]:
    """The kernels that ``auto`` has to time against PyTorch before it takes one: of the GPU backends that can run it.

    Example:
        >>> candidates(Problem(torch.float32, "cpu", "avx2 fma f16c"))
        []
    """
    able = [b.name for b in BACKENDS.values() if not b.automatic and not b.unsupported(problem)]
    return [kernel for backend in able for kernel in kernels_of(backend, problem)]


def cpu_kernels() -> list[str]:
    """Names of the compiled CPU micro-kernels, best first; empty without the compiled library."""
    return [] if library.missing("_C") else torch.ops.vgg_fast.cpu_kernels().split()


def linear_kernels() -> list[str]:
    """Names of the compiled CPU kernels for fully connected layers, best first; empty without the compiled library."""
    return [] if library.missing("_C") else torch.ops.vgg_fast.cpu_linear_kernels().split()


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
    isa, precision = os.environ.get("VGG_FAST_ISA"), float32_precision(device_type=device.type)
    kernel = _choose(dtype, device, backend, isa, precision, switched_off(device))
    if (kernel, device) in _switched_off:
        raise RuntimeError(f"kernel {kernel!r} is switched off on {device}: {_switched_off[kernel, device]}")
    return kernel


# VGG_FAST_ISA and the precision are read again inside; as arguments they make the cache notice a change.
@functools.lru_cache(maxsize=256)
def _choose(
    dtype: torch.dtype, device: torch.device, backend: str, isa: str | None, precision: str, without: frozenset[str]
) -> str:
    return select(problem_on(dtype, device), backend, without)


def candidates_on(dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """:func:`candidates` on a GPU of this machine, without what failed its self test there; cheap to call again."""
    names = _candidates_on(dtype, device, float32_precision(device_type=device.type))
    return tuple([name for name in names if (name, device) not in _switched_off]) if _switched_off else names


@functools.lru_cache(maxsize=256)
def _candidates_on(dtype: torch.dtype, device: torch.device, precision: str) -> tuple[str, ...]:
    return tuple(candidates(problem_on(dtype, device)))


# GPU kernels that disagreed with PyTorch on a device, and how; see vgg_fast/ops/_self_test.py.
_switched_off: dict[tuple[str, torch.device], str] = {}


def switched_off(device: torch.device) -> frozenset[str]:
    """The kernels that failed their self test on a device."""
    return frozenset([kernel for kernel, where in list(_switched_off) if where == device])


def passed_over(kernel: str, backend: str, problem: Problem, device: torch.device) -> str:
    """Why a backend's name stands for ``kernel`` on a device where it should for another; empty if it should not."""
    kernels = kernels_of(backend, problem) if backend in BACKENDS else [kernel]
    better = [(name, why_switched_off(name, device)) for name in kernels[: kernels.index(kernel)]]
    told = [f"{name!r}, which failed its self test on {device}: {why}" for name, why in better]
    return f"runs {kernel!r} in place of {' and '.join(told)}" if told else ""


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
    """One line of :func:`backends`; an available one has a reason, too, where one of its kernels is switched off."""

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
            lacking = ["there is no CUDA device", *backend.unsupported(Problem(torch.float32, "cuda", "sm_80"))]
            failed = {}
        else:
            device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
            lacking = backend.unsupported(problem_on(torch.float32, device))
            off = {kernel: why for (kernel, where), why in _switched_off.items() if where == device}
            failed = {kernel: why for kernel, why in off.items() if kernel.startswith(backend.name)}
        reasons = lacking + [f"{kernel}: {why}" for kernel, why in failed.items()]
        available = not lacking and backend.name not in failed
        result.append(BackendStatus(backend.name, backend.what, available, "; ".join(reasons)))
    return result
