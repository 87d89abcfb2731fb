"""``vgg-fast doctor``: what this machine has, what runs on it, what is missing, why, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from rich.text import Text

from vgg_fast import __version__, gpu, library, selection
from vgg_fast.bench import host
from vgg_fast.bench.peers import DTYPES
from vgg_fast.cli._ui import FAILED, command, dtype_name, print_json, progress, show
from vgg_fast.gpu import tuning, winners

OK, ABSENT, PROBLEM = "ok", "absent", "problem"
_COLOURS = {OK: "green", ABSENT: "yellow", PROBLEM: "bold red"}
_LEAST_TORCH = (2, 10)
_REINSTALL = "pip install --force-reinstall --no-deps vgg-fast (in a checkout: pip install --no-deps -e .)"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        what: the thing looked for.
        state: ``ok``; ``absent``, without which the rest works; ``problem``, which stands in the way.
        found: what it is, or why it is not there.
        advice: what to do about it; empty where nothing has to be done.
    """

    what: str
    state: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Looks at everything; takes a second, because compilers are asked for their versions."""
    findings = [*_versions(), *_processor(), *_libraries()]
    if not any(finding.what == "VGG_FAST_ISA" and finding.state == PROBLEM for finding in findings):
        findings += [*_kernels(), *_choices(), *_backends()]
    return [*findings, *_gpu(), *_timings(), *_compilers(), *_optional()]


def _versions() -> Iterator[Finding]:
    commit = host.commit()
    yield Finding("vgg-fast", OK, __version__ + (f", commit {commit}" if commit else ""))
    yield Finding("Python", OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    version = torch.__version__
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    found = f"{version}, {build}, {torch.get_num_threads()} threads"
    if numbers < _LEAST_TORCH:
        yield Finding("PyTorch", PROBLEM, found, "vgg-fast needs 2.10 or newer: pip install --upgrade torch")
    else:
        yield Finding("PyTorch", OK, found)


def _flags() -> tuple[str, str]:
    """(CPU flags, why they cannot be had)."""
    if reason := library.missing("_C"):
        return "", f"unknown: {reason}"
    try:
        return torch.ops.vgg_fast.cpu_flags(), ""
    except RuntimeError as error:
        return "", str(error).splitlines()[0]


def _processor() -> Iterator[Finding]:
    flags, reason = _flags()
    cap = os.environ.get("VGG_FAST_ISA")
    yield Finding("processor", OK, f"{host.cpu_name()}, {os.cpu_count()} cores")
    if cap and reason and not library.missing("_C"):
        yield Finding("VGG_FAST_ISA", PROBLEM, reason, "unset VGG_FAST_ISA, or set it to one of these")
        return
    if cap:
        yield Finding("VGG_FAST_ISA", OK, f"{cap}: kernels above it are not used", "unset it to use all of this CPU")
    else:
        yield Finding("VGG_FAST_ISA", OK, "not set: no kernel is forbidden")
    if reason:
        yield Finding("CPU flags", ABSENT, reason)
    else:
        yield Finding("CPU flags", OK, flags or "none that a kernel asks for")


def _libraries() -> Iterator[Finding]:
    for name, what in (("_C", "compiled CPU kernels"), ("_C_cuda", "compiled CUDA kernels")):
        reason = library.missing(name)
        if reason is None:
            yield Finding(what, OK, library.build_info().get(name, "there"))
        elif "does not load" in reason:
            yield Finding(what, PROBLEM, reason, f"build it again for this PyTorch: {_REINSTALL}")
        elif name == "_C":
            advice = f"until then layers run as in PyTorch: install a C++ compiler, then {_REINSTALL}"
            yield Finding(what, ABSENT, reason, advice)
        elif torch.version.cuda is None:
            yield Finding(what, ABSENT, reason, "only needed on a GPU: install a CUDA build of PyTorch")
        else:
            yield Finding(what, ABSENT, reason, f"install nvcc (or set CUDA_HOME), then {_REINSTALL}")


def _kernels() -> Iterator[Finding]:
    cpu = torch.device("cpu")
    for kernel in selection.cpu_kernels():
        runs, reasons = [], {}
        for name, dtype in DTYPES.items():
            try:
                selection.choose(dtype, cpu, kernel)
                runs.append(name)
            except RuntimeError as error:
                reasons[str(error).splitlines()[0]] = name
        if runs:
            yield Finding(f"kernel {kernel}", OK, f"runs {', '.join(runs)}")
        else:
            # Flags matter more than dtypes: the reason of the dtype that it is made for.
            wanted = next((reason for reason in reasons if "tensors only" not in reason), next(iter(reasons)))
            yield Finding(f"kernel {kernel}", ABSENT, wanted)


def _choices() -> Iterator[Finding]:
    """What auto takes."""
    cpu = torch.device("cpu")
    for dtype in DTYPES.values():
        what = f"auto, {dtype_name(dtype)} on the CPU"
        try:
            kernel = selection.choose(dtype, cpu)
        except RuntimeError as error:
            yield Finding(what, PROBLEM, str(error).splitlines()[0])
            continue
        if kernel == selection.REFERENCE:
            yield Finding(what, ABSENT, f"plain PyTorch ({selection.why_reference(dtype, cpu)})")
        else:
            yield Finding(what, OK, kernel)


def _gpu() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            capability = "{}.{}".format(*torch.cuda.get_device_capability(i))
            yield Finding(f"GPU {i}", OK, f"{torch.cuda.get_device_name(i)}, compute capability {capability}")
    else:
        yield Finding("GPU", ABSENT, gpu.lacking() or "CUDA starts, but PyTorch counts no device")


def _timings() -> Iterator[Finding]:
    """Where the winners of the timings on a GPU are kept."""
    what, folder = "GPU timings", winners.default_folder()
    try:
        switched_on = tuning.enabled()
    except RuntimeError as error:
        yield Finding("VGG_FAST_TUNE", PROBLEM, str(error), "unset it, or set it to 0 or 1")
        return
    if not switched_on:
        yield Finding(what, ABSENT, "VGG_FAST_TUNE=0: on a GPU all is left to PyTorch unless a backend is named")
    elif folder is None:
        yield Finding(what, ABSENT, "there is no home folder to keep them in: kernels are timed in every process")
    else:
        yield Finding(what, OK, f"{len(list(folder.glob('*.json')))} kept in {folder}")


def _backends() -> Iterator[Finding]:
    for backend in selection.backends():
        if backend.name in ("triton", "cuda"):
            parts = [backend.what] if backend.available else []
            found = "; without ".join([*parts, *([backend.reason] if backend.reason else [])])
            yield Finding(f"backend {backend.name}", OK if backend.available else ABSENT, found)


def _compilers() -> Iterator[Finding]:
    named = os.environ.get("CXX", "").split()[:1]
    compiler = next((path for name in (*named, "c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler:
        yield Finding("C++ compiler", OK, f"{compiler}: {_first_line(compiler)}")
    else:
        advice = "only needed to build vgg-fast from source: apt install g++, or set CXX"
        yield Finding("C++ compiler", ABSENT, "no $CXX, c++, g++ or clang++ on the PATH", advice)
    nvcc = find_nvcc()
    if nvcc:
        yield Finding("nvcc", OK, f"{nvcc}: {_first_line(nvcc, 'release')}")
    else:
        where = "not on the PATH, in CUDA_HOME, or among the nvidia packages of this Python"
        yield Finding("nvcc", ABSENT, where, "only needed to build the CUDA kernels from source")


def find_nvcc() -> str | None:
    """The CUDA compiler that an installation would take, in the order of csrc/cuda/build.py (which is not installed):
    in $CUDA_HOME or $CUDA_PATH, on the PATH, in /usr/local/cuda, from a PyPI package."""
    candidates = [Path(os.environ[name]) / "bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    candidates += [Path(folder) / "nvidia/cu13/bin/nvcc" for folder in sys.path]
    return next((str(path) for path in candidates if path.is_file()), None)


def _first_line(program: str, containing: str = "") -> str:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"does not run: {error}"
    lines = [line.strip() for line in done.stdout.splitlines() if containing in line]
    return lines[0] if lines else f"--version says nothing (exit code {done.returncode})"


def _optional() -> Iterator[Finding]:
    packages = (
        ("triton", "triton", "Triton", "for the Triton kernels: pip install triton"),
        ("h5py", "h5py", "h5py", "to convert Keras weights: pip install 'vgg-fast[keras]'"),
        ("skimage", "scikit-image", "scikit-image", "for the demo's photographs: pip install scikit-image"),
    )
    for module, distribution, what, advice in packages:
        if importlib.util.find_spec(module) is None:
            yield Finding(what, ABSENT, "not installed", advice)
        else:
            yield Finding(what, OK, importlib.metadata.version(distribution))


@command
def doctor(json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False) -> None:
    """Report what this machine has, which kernels run on it, what is missing, why, and what to do about it."""
    with progress("looking around"):
        findings = examine()
    if json:
        print_json({"findings": [asdict(finding) for finding in findings]})
    else:
        table = Table(show_header=False, box=None)
        for finding in findings:
            found = Text(finding.found)
            if finding.advice:
                found.append(f"\n-> {finding.advice}", style="italic")
            table.add_row(finding.what, Text(finding.state, style=_COLOURS[finding.state]), found)
        show(table)
    if any(finding.state == PROBLEM for finding in findings):
        raise typer.Exit(FAILED)
