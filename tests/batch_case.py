"""Work for tests of the engines that needs no model: it doubles numbers, and misbehaves where it is told to."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from osum_echat.batch.work import Outcome, Unit

T = TypeVar("T")
PATIENT = {  # Ray's own limits are for machines that do nothing else
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_gcs_server_request_timeout_seconds": "300",
}


def patiently(start: Callable[[], T], tries: int = 6) -> T:
    """What ``start`` starts. Ray gives a node 30 s to come up, which a busy machine may not have: then it is started again."""
    os.environ.update(PATIENT)
    # Else Ray asks the network in which cloud it is.
    (Path.home() / "ray_bootstrap_config.yaml").write_text("provider: {type: local}\n")
    for _ in range(tries - 1):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return start()


@dataclass(frozen=True)
class Doubling:
    """Each payload, twice, with a file that holds it.

    Attributes:
        log: folder in which each worker writes what it was given, a line a block; None for none.
        kills: payloads at which the worker's process ends. raises: payloads that spoil their block. refuses: why it cannot be opened.
        gate: file that must be there before a block with a payload of ``held`` is done.
    """

    log: str | None = None
    kills: frozenset[int] = frozenset()
    raises: frozenset[int] = frozenset()
    refuses: str = ""
    gate: str | None = None
    held: frozenset[int] = frozenset()

    def open(self, device: str) -> DoublingWorker:
        if self.refuses:
            raise ValueError(self.refuses)
        return DoublingWorker(self, device)


class DoublingWorker:
    def __init__(self, work: Doubling, device: str) -> None:
        self.work, self.device = work, device

    def run(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        work = self.work
        if work.log is not None:
            with (Path(work.log) / f"{os.getpid()}").open("a", encoding="utf-8") as file:
                file.write(" ".join(str(unit.number) for unit in units) + "\n")
        for unit in reversed(units):  # any order is allowed
            if unit.payload in work.kills:
                os._exit(1)
            if unit.payload in work.raises:
                raise RuntimeError(f"payload {unit.payload}")
            while work.gate is not None and unit.payload in work.held and not os.path.exists(work.gate):
                time.sleep(0.02)
            if unit.payload < 0:
                yield Outcome(unit.number, error="negative")
            else:
                yield Outcome(unit.number, {"twice": 2 * unit.payload, "device": self.device}, {"a/b.bin": bytes([unit.payload])})
