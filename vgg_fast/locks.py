"""A lock that a forked child finds open."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator


class ForkLock:
    """A lock that its holder may take again (a signal handler may run a model, too), and that forked children renew.

    The thread that holds it in the parent does not exist in the child. For module level: it is never forgotten.

    Example:
        >>> lock = ForkLock()
        >>> with lock.held(), lock.held():
        ...     pass
    """

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds it for a while."""
        with self._lock:  # the same one at the end, even in a child that was forked meanwhile
            yield
