"""What a number means nothing without: the machine it was measured on, the versions, the commit."""

from __future__ import annotations

import contextlib
import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vgg_fast import library

_ROOT = Path(__file__).parents[2]


def describe() -> dict[str, str | int | None]:
    """What a number means nothing without: processor, flags, threads, versions, commit.

    Example:
        >>> describe()["threads"] == torch.get_num_threads()
        True
    """
    from vgg_fast import __version__

    return {
        "cpu": cpu_name(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "cpu_flags": "" if library.missing("_C") else torch.ops.vgg_fast.cpu_flags(),
        "isa_cap": os.environ.get("VGG_FAST_ISA") or None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vgg_fast": __version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    """The processor's name for people, or at least its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Those this process may use, where the system can tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit(root: Path = _ROOT) -> str | None:
    """The git commit of this package's checkout ``root``, with ``-dirty`` after uncommitted changes; or None."""
    # An installed package often lies in somebody else's repository (their project's .venv), whose commit says nothing.
    if not (root / ".git").exists() or not (root / "setup.py").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}-dirty" if changes else head


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows with the columns of :func:`describe` after their own, for files of several machines to be joined.

    Args:
        path: replaced if it exists.
        rows: any mappings; a key that a row lacks is left empty.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> import tempfile; path = tempfile.mkdtemp() + "/times.csv"
        >>> write_csv(path, [{"contestant": "ours", "median_ms": 1.5}]); open(path).readline().startswith("contestant,")
        True
    """
    here = describe()
    columns = list(dict.fromkeys([key for row in rows for key in row] + list(here)))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({**here, **row} for row in rows)
