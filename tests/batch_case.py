"""Work for tests of the engines that needs no model: it doubles numbers, and misbehaves where it is told to."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from osum_echat.batch.work import Outcome, Unit


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
