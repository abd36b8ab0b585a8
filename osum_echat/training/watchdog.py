"""Says which rank fell silent, and where.

Every rank writes (step, what it is doing, time) into a key-value store at each stage of a step. A thread on every rank
looks at its own last sign of life; when that is too old it reads all of them and names the ranks that are furthest
behind, because in a collective everybody waits and only one is the cause. It never issues a collective itself.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

from osum_echat.training.distributed import World

log = logging.getLogger(__name__)

EXIT_CODE = 75  # EX_TEMPFAIL: worth starting again


class Store(Protocol):
    """The part of `torch.distributed.Store` that is used."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...


class LocalStore:
    """A store for a single process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self._values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self._values[key]


def report(beats: dict[int, tuple[int, str, float]], now: float) -> str:
    """One line that names the ranks furthest behind. ``beats``: rank -> (step, phase, time of its last sign)."""
    first = min((step, phase_time) for step, _, phase_time in beats.values())
    step = first[0]
    behind = [rank for rank, beat in beats.items() if beat[0] == step]
    # Within a step the one that entered its phase earliest is the one that did not go on.
    oldest = min(behind, key=lambda rank: beats[rank][2])
    silent = [r for r in behind if beats[r][1] == beats[oldest][1]]
    parts = [f"rank {r}: step {s}, in {phase} for {now - t:.0f} s" for r, (s, phase, t) in sorted(beats.items())]
    names = ", ".join(f"rank {r}" for r in silent)
    return f"no progress: {names} silent at step {step} in {beats[oldest][1]!r}. " + "; ".join(parts)


class Watchdog:
    """`start` and, at the end, `close`, on all ranks; ``beat`` from the training thread meanwhile. Does nothing for
    ``seconds`` <= 0."""

    def __init__(self, world: World, store: Store, seconds: float, abort: bool = False, tell: Callable[[str], None] = log.error):
        self.world, self.store, self.seconds, self.abort, self.tell = world, store, seconds, abort, tell
        self._last = time.time()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch (all ranks call together)."""
        if self.seconds > 0:
            self.beat(0, "start")
            self.world.barrier()  # every rank has a first entry before anyone reads
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def beat(self, step: int, phase: str) -> None:
        """A sign of life: this rank is now in ``phase`` of ``step``."""
        if self.seconds <= 0:
            return
        self._last = time.time()
        with self._lock:
            self.store.set(f"beat/{self.world.rank}", json.dumps([step, phase, self._last]))

    def _watch(self) -> None:
        told_about = 0.0
        while not self._stop.wait(min(5.0, self.seconds / 4)):
            if time.time() - self._last < self.seconds or told_about == self._last:
                continue
            told_about = self._last
            try:
                with self._lock:
                    raw = {r: json.loads(self.store.get(f"beat/{r}")) for r in range(self.world.size)}
                message = report({r: (int(b[0]), str(b[1]), float(b[2])) for r, b in raw.items()}, time.time())
            except (RuntimeError, KeyError, ValueError) as error:  # the store's host is gone: still say what we know
                message = (
                    f"no progress on rank {self.world.rank} for {self.seconds:.0f} s, and the others cannot be asked: {error}"
                )
            self.tell(message)
            if self.abort:
                faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
                os._exit(EXIT_CODE)

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


def shared_store(world: World) -> Store:
    """A key-value store that all ranks reach (hosted by rank 0), or a dictionary for one process."""
    if world.size == 1:
        return LocalStore()
    import datetime
    import socket

    import torch.distributed as dist

    host, port = "", 0
    if world.is_main:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
    host, port = world.broadcast((host, port))
    return dist.TCPStore(host, port, is_master=world.is_main, wait_for_workers=False, timeout=datetime.timedelta(seconds=60))
