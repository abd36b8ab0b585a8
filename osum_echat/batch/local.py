"""The engine of one process: block after block, on one device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from osum_echat.batch.work import TRIES, Outcome, Unit, Work, blocks, outcomes_of


@dataclass(frozen=True)
class LocalEngine:
    """Works in this process.

    Attributes:
        device: as of `EChat.load`.
        block_size: range of numbers that makes a block. tries: of one unit.
    """

    device: str = "auto"
    block_size: int = 64
    tries: int = TRIES

    def run(self, work: Work, units: Sequence[Unit]) -> Iterator[Outcome]:
        """See `work.Engine`. The worker is made with the first unit; without units, not at all."""
        if not units:
            return
        worker = work.open(self.device)
        for block in blocks(units, self.block_size):
            yield from outcomes_of(worker, block, self.tries)
