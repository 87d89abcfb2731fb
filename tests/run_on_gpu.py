"""``make gpu-test``: all that a machine with a GPU can check, one step after another, and which of them failed.

Exit codes: 0 all is well; 1 a step failed or could not be run; 2 there is no GPU.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vgg_fast import gpu

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "build"
NO_SANITIZER = (
    "compute-sanitizer is not installed: it comes with the CUDA toolkit (its folder on the PATH, or CUDA_HOME set)"
)
_LOST = 97  # an exit code that neither pytest nor Python has

Run = Callable[[Sequence[str], Mapping[str, str]], int]


def find_sanitizer() -> str | None:
    """compute-sanitizer: on the PATH, in $CUDA_HOME or in /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.path.join(home, part) for home in homes if home for part in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def steps(sanitizer: str | None) -> dict[str, list[str] | None]:
    """What each step runs; None where it cannot."""
    python = [sys.executable, "-m"]
    vgg_fast = [sys.executable, "-c", "from vgg_fast.cli import main; main()"]
    kernels = [*python, "pytest", "-m", "gpu", "tests/test_gpu_kernels.py"]
    result: dict[str, list[str] | None] = {"tests": [*python, "pytest", "tests"]}
    for tool in ("memcheck", "racecheck"):
        options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", str(_LOST)]
        result[tool] = [sanitizer, *options, *kernels] if sanitizer else None
    for name in ("verify", "bench"):
        result[name] = [*vgg_fast, name, "--device", "cuda", "--report", str(REPORTS / f"{name}-gpu.html")]
    return result


def run_all(lacking: str | None, sanitizer: str | None, run: Run) -> int:
    """Runs every step, whatever becomes of the others.

    Args:
        lacking: why there is no GPU, or None.
        sanitizer: the path of compute-sanitizer, or None.
        run: runs a command with these additions to the environment and returns its exit code.

    Returns:
        The exit code.
    """
    if lacking is not None:
        print(f"make gpu-test is for a machine with an NVIDIA GPU: {lacking}", file=sys.stderr)
        return 2
    failed = {}
    for name, command in steps(sanitizer).items():
        if command is None:
            failed[name] = NO_SANITIZER
            continue
        print(f"\n=== {name}: {shlex.join(command)}", flush=True)
        # PyTorch's cache of memory would hide an access past the end of a tensor from memcheck.
        code = run(command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if command[0] == sanitizer else {})
        if code:
            failed[name] = f"exit code {code}"
    print(f"\nThe reports of verify and bench are in {REPORTS}; please send them back in an issue.")
    for name, reason in failed.items():
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    REPORTS.mkdir(exist_ok=True)
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode


if __name__ == "__main__":
    sys.exit(run_all(gpu.lacking(), find_sanitizer(), _run))
