"""Memory that sessions have given back goes to the system.

The C library (glibc) keeps what was freed between blocks that are in use. What the server itself uses stays the same
(389 MiB of mini's after 54, 108 and 130 sessions, none open), but without this the process grew from 923 to 961 MiB
meanwhile, of which a trim gave 153 back (benchmarks/results/2026-11-28-live-avx2.md).
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
import time
from collections.abc import Callable

EVERY_S = 60.0


@functools.lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's function; None where the C library is another."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return found


def trim() -> None:
    """Give back whole pages that are free; some ten milliseconds, without Python's lock."""
    function = _malloc_trim()
    if function is not None:
        function(0)


class Trimmer:
    """Calls ``work`` in a thread of its own after a session, once in ``every`` seconds at most."""

    def __init__(
        self, every: float = EVERY_S, work: Callable[[], None] = trim, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._every, self._work, self._clock = every, work, clock
        self._last = -math.inf

    def session_ended(self) -> None:
        now = self._clock()
        if now - self._last >= self._every:
            self._last = now
            threading.Thread(target=self._work, name="osum-echat-trim", daemon=True).start()
