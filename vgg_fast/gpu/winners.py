"""The winners of the timings on a GPU, on disk: one small file per question, in the user's cache folder.

One file per question needs no lock: a file is complete before it gets its name, and of several processes that answer
the same question the last one wins. Nothing here may stop a forward: what cannot be read is timed again, what cannot be
written is kept in memory, and a warning says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path


def cache_folder(platform: str, environment: Mapping[str, str], home: Path) -> Path:
    """Where a platform wants an application's caches: ``~/.cache/vgg-fast/tuning`` on Linux.

    Args:
        platform: as ``sys.platform``.
        environment: as ``os.environ``; ``XDG_CACHE_HOME`` or ``LOCALAPPDATA`` counts.
        home: of the user.

    Example:
        >>> cache_folder("linux", {"XDG_CACHE_HOME": "/var/tmp"}, Path("/home/me")).as_posix()
        '/var/tmp/vgg-fast/tuning'
    """
    if platform == "win32":
        base = Path(environment.get("LOCALAPPDATA") or home / "AppData/Local")
    elif platform == "darwin":
        base = home / "Library/Caches"
    else:
        named = Path(environment.get("XDG_CACHE_HOME", ""))
        base = named if named.is_absolute() else home / ".cache"  # the standard: a relative one does not count
    return base / "vgg-fast" / "tuning"


def default_folder() -> Path | None:
    """:func:`cache_folder` of this user; None for one without a home."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return cache_folder(sys.platform, os.environ, home)


class Winners:
    """A folder of files, each with the question it answers, the winner, and the times.

    Args:
        folder: made when something is written; None keeps nothing.

    Example:
        >>> Winners(None).read("anything") is None
        True
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._told = False

    def path(self, question: str) -> Path | None:
        """The file of a question."""
        name = hashlib.sha256(question.encode()).hexdigest()[:32] + ".json"
        return None if self.folder is None else self.folder / name

    def read(self, question: str) -> tuple[str, dict[str, float]] | None:
        """``(winner, seconds of each contestant)``, or None where nothing (legible) is known.

        Warns:
            RuntimeWarning: there is a file, and it is damaged; it is replaced once the question is answered again.
        """
        path = self.path(question)
        if path is None:
            return None
        try:
            content = json.loads(path.read_text())
            winner, seconds = content["winner"], {str(k): float(v) for k, v in content["seconds"].items()}
            if content["question"] != question or winner not in seconds:
                raise ValueError("it answers another question")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            _warn(f"{path} is not legible ({type(error).__name__}: {error}); the kernels are timed again")
            return None
        return winner, seconds

    def write(self, question: str, winner: str, seconds: Mapping[str, float]) -> None:
        """Keeps an answer.

        Warns:
            RuntimeWarning: once, if the folder cannot be written to; the answers then last as long as the process.
        """
        path = self.path(question)
        if path is None:
            return
        text = json.dumps({"question": question, "winner": winner, "seconds": dict(seconds)}, indent=1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(".tmp", dir=path.parent)
            try:
                with open(handle, "w") as file:
                    file.write(text)
                os.replace(temporary, path)
            except BaseException:  # Ctrl-C included: nothing half-written, and nothing left lying about
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            if not self._told:
                _warn(f"{path.parent} cannot be written to ({error}); kernels are timed again in every process")
            self._told = True


def _warn(text: str) -> None:
    warnings.warn(f"vgg_fast: {text}", RuntimeWarning, stacklevel=2)
