"""What tests compile, once: kept in build/compiled under a hash of all that went into it, for other files, the other
worker, processes of their own and the next session."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parents[1] / "build" / "compiled"


@functools.cache
def version(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout


def compiled(command: Sequence[str | Path], read: Iterable[Path], suffix: str) -> Path:
    """The file that a compiler makes.

    Args:
        command: compiler, options and sources; ``-o`` and the file are added.
        read: every file of this checkout that the compiler may read, sources and headers.
        suffix: of the file.

    Raises:
        subprocess.CalledProcessError: it does not compile; the compiler has said why on stderr.
    """
    words = list(map(str, command))
    what = hashlib.sha256(repr((words, version(words[0]), torch.__version__)).encode())
    for path in sorted(set(read)):
        what.update(f"\0{path}\0".encode() + path.read_bytes())
    FOLDER.mkdir(parents=True, exist_ok=True)
    target = FOLDER / (what.hexdigest()[:32] + suffix)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who needs the same file waits for it, and leaves the core to others
        if not target.exists():
            unfinished = target.with_suffix(".unfinished" + suffix)
            subprocess.run([*words, "-o", str(unfinished)], check=True)
            os.replace(unfinished, target)
    return target
