"""What an engine needs to know: units of work, who does them, and what comes of them.

    work     knows how to make a worker; it is pickled and sent to where the work is done
    worker   holds what is slow to load (the model) and works on one block of units after the other
    unit     one record: its number in the list, its key, and what the worker needs to find it
    outcome  one unit's result, with the files that belong to it, or why there is none

Blocks are cut by the number of the unit, so that the same list gives the same blocks (and, in them, the same batches)
in every engine, with any number of workers, whatever was lost on the way.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

log = logging.getLogger(__name__)
TRIES = 3
"""How often a unit is tried before it is counted as failed."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One record to work on.

    Attributes:
        number: its place in the list, from 0; no two units of a run share it.
        key: its name, for messages.
        payload: what the worker needs; anything that can be pickled, and small: recordings are read by the worker.
    """

    number: int
    key: str
    payload: Any = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a unit.

    Attributes:
        number: of the unit.
        value: its result, plain data for JSON; None when there is none.
        files: content of the files that belong to it, by path relative to the folder of the results.
        error: why there is no result.
    """

    number: int
    value: Any = None
    files: dict[str, bytes] = field(default_factory=dict)
    error: str | None = None


class Worker(Protocol):
    """Works on blocks, in one process, on one device."""

    def run(self, units: Sequence[Unit]) -> Iterable[Outcome]:
        """The outcomes of a block, in any order, each unit once. What is wrong with one record (not audio, too long) is
        that unit's outcome; an exception says that the block cannot be done as it is, and each of its units is then
        tried alone."""


class Work(Protocol):
    """Makes workers; can be pickled."""

    def open(self, device: str) -> Worker:
        """Load what the work needs on ``device``. Raises ValueError, with a sentence for the user, when it cannot be
        done at all."""


class Engine(Protocol):
    """Runs work over units."""

    def run(self, work: Work, units: Sequence[Unit]) -> Iterator[Outcome]:
        """The outcome of every unit, once each, as they come.

        Raises:
            ValueError: the work cannot be done at all; the message is the worker's.
        """


def blocks(units: Iterable[Unit], size: int) -> Iterator[list[Unit]]:
    """Units, sorted by number, in blocks of those whose numbers are in one range of ``size``; a block lacks the units
    that are not asked for."""
    for _, block in itertools.groupby(units, key=lambda unit: unit.number // size):
        yield list(block)


def outcomes_of(worker: Worker, block: Sequence[Unit], tries: int = TRIES) -> Iterator[Outcome]:
    """The outcome of every unit of a block. If an exception ends the block, those that are left are tried alone,
    until each has had ``tries`` in all, the block included."""
    left = {unit.number: unit for unit in block}
    try:
        for outcome in worker.run(block):
            del left[outcome.number]
            yield outcome
        assert not left, f"the worker said nothing about {sorted(left)}"
        return
    except Exception as error:  # noqa: BLE001 - the block's end, not the run's
        log.warning(
            "a block of %d records failed (%s: %s); %d are tried alone", len(block), type(error).__name__, error, len(left)
        )
    for unit in left.values():
        yield _alone(worker, unit, tries)


def _alone(worker: Worker, unit: Unit, tries: int) -> Outcome:
    why = ""
    for _ in range(tries - 1):  # the block was the first
        try:
            [outcome] = worker.run([unit])
            return outcome
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            log.warning("%s failed alone", unit.key, exc_info=error)
    return Outcome(unit.number, error=f"given up after {tries} tries: {why}")
