"""One reader's way from lists to batches: mix, shuffle, build, pack. Exact state at every batch.

A reader is one of ``world_size x workers`` equal ones; each goes through its own share of every stream. What is held
back between batches (the shuffle buffer, the packing pool) is saved as *places* in the lists, not as data: a restart
opens each place again and rebuilds the same samples, in seconds whatever the epoch's length. That works because a
sample's randomness depends on seed, epoch and place alone.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from osum_echat.data import paths
from osum_echat.data.batch import Batch, Example, collate
from osum_echat.data.batching import Cost, plan_batch
from osum_echat.data.config import DataConfig
from osum_echat.data.drops import Drop
from osum_echat.data.lists import Cursor, Stream
from osum_echat.data.sampling import draw
from osum_echat.data.sources import ListItem
from osum_echat.dialogue.record import Record, RecordError

log = logging.getLogger(__name__)


class Builder(Protocol):
    """Turns records into examples (see `examples.ExampleBuilder`). ``mels``: bins of their features."""

    mels: int

    def build(
        self, record: Record, resolve: paths.Resolver, stream: str, rng: random.Random
    ) -> tuple[list[Example], list[RecordError]]:
        """The samples of a record (several where dialogues are expanded), and why others were left out."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where an item came from: stream, repetition of the stream, line of its table, byte and number within."""

    stream: int
    repetition: int
    line: int
    offset: int
    index: int

    def seed(self, seed: int, epoch: int) -> str:
        """What a sample's random numbers start from."""
        return f"{seed}/{epoch}/{self.stream}/{self.repetition}/{self.line}/{self.index}"


@dataclass
class ReaderStep:
    """One step of a reader: a batch (None after the last), what was used and left out since the step before, and the
    state after it."""

    batch: Batch | None
    used: int
    drops: list[Drop]
    state: dict[str, Any]
    notes: dict[str, int] = field(default_factory=dict)

    def pin_memory(self) -> ReaderStep:
        return ReaderStep(self.batch.pin_memory() if self.batch else None, self.used, self.drops, self.state, self.notes)


class Reader:
    """Batches of one reader for one epoch.

    Args:
        streams: what is mixed.
        builder: makes examples of records.
        epoch: decides the order.
        reader, readers: which share of the data is read.
    """

    def __init__(
        self, streams: Sequence[Stream], builder: Builder, config: DataConfig, epoch: int, reader: int = 0, readers: int = 1
    ) -> None:
        self._streams, self._builder, self._config, self._epoch = list(streams), builder, config, epoch
        self._cursors = [Cursor(s, epoch, reader, readers, config.split, config.shuffle) for s in streams]
        self._weights = [s.weight for s in streams]
        self._alive = [w > 0 and not c.empty for w, c in zip(self._weights, self._cursors, strict=True)]
        self._pending = list(self._alive)  # streams that the epoch must still go through once
        self._rng = random.Random(f"mix/{config.seed}/{epoch}/{reader}/{readers}")
        self._buffer: list[tuple[Place, ListItem]] = []
        # The same places, kept up to date for the state.
        self._buffer_places = np.zeros((config.shuffle_buffer + 1, 5), np.int64)
        self._pool: list[tuple[Place, int, Example, Cost]] = []
        self._drops: list[Drop] = []
        self._notes: dict[str, int] = {}

    def next(self) -> ReaderStep:
        """The next batch and the state after it; ``batch`` None at the end of the epoch."""
        config = self._config
        while len(self._pool) < config.batch.pool:
            taken = self._shuffled()
            if taken is None:
                break
            place, item = taken
            self._pool += [(place, n, example, _cost(example)) for n, example in enumerate(self._build(place, item))]
        batch, used = None, 0
        if self._pool:
            plan = plan_batch([cost for *_, cost in self._pool], config.batch)
            chosen = [i for row in plan for i in row]
            number = {i: n for n, i in enumerate(chosen)}
            batch = collate(
                [self._pool[i][2] for i in chosen],
                self._builder.mels,
                [[number[i] for i in row] for row in plan],
                config.batch.multiple_of,
            )
            self._pool = [entry for i, entry in enumerate(self._pool) if i not in number]
            used = len(chosen)
        drops, notes = self._drops, self._notes
        self._drops, self._notes = [], {}
        return ReaderStep(batch, used, drops, self.state_dict(), notes)

    def _build(self, place: Place, item: ListItem) -> list[Example]:
        """Examples of an item; a record that gives none is counted."""
        stream = self._streams[place.stream]
        try:
            record = item.record()
            for note in record.notes:
                self._notes[f"{record.source}: {note}"] = self._notes.get(f"{record.source}: {note}", 0) + 1
        except RecordError as error:
            self._drops.append(_drop(error, item))
            return []
        rng = random.Random(place.seed(self._config.seed, self._epoch))
        examples, errors = self._builder.build(record, stream.source(place.line).resolve, stream.name, rng)
        self._drops += [_drop(error, item) for error in errors]
        return examples

    def _shuffled(self) -> tuple[Place, ListItem] | None:
        """A random item of the buffer, which is filled up first; None when nothing is left."""
        size = self._config.shuffle_buffer if self._config.shuffle else 0
        while len(self._buffer) <= size:
            taken = self._mixed()
            if taken is None:
                break
            self._buffer_places[len(self._buffer)] = _numbers(taken[0])
            self._buffer.append(taken)
        if not self._buffer:
            return None
        at = self._rng.randrange(len(self._buffer)) if size else 0
        self._buffer[at], self._buffer[-1] = self._buffer[-1], self._buffer[at]
        self._buffer_places[at] = self._buffer_places[len(self._buffer) - 1]
        return self._buffer.pop()

    def _mixed(self) -> tuple[Place, ListItem] | None:
        """The next item of a stream that is drawn by weight among those that are not dry."""
        while any(self._pending):
            n = draw(self._weights, self._alive, self._rng)
            cursor = self._cursors[n]
            item = cursor.next()
            if item is None:
                self._dry(n)
            elif item.fields is None or item.problems:
                self._drops += [_drop(problem, item) for problem in item.problems]
            else:
                return Place(n, cursor.repetition, item.line, item.offset, item.index), item
        return None

    def _dry(self, n: int) -> None:
        """A stream has ended: it leaves, or begins again until the streams that leave have ended, too.

        Where all streams begin again, the epoch ends when each has been through once.
        """
        self._pending[n] = False
        leaving = [self._streams[i].config.when_dry == "leave" for i in range(len(self._streams))]
        if leaving[n]:
            self._alive[n] = False
            if any(leaving) and not any(p and leave for p, leave in zip(self._pending, leaving, strict=True)):
                self._pending = [False] * len(self._pending)
        else:
            self._cursors[n].restart()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the following batches depend on: 40 bytes a record of the shuffle buffer (80 kB with 2,000),
        and some kB."""
        return {
            "cursors": [c.state_dict() for c in self._cursors],
            "alive": list(self._alive),
            "pending": list(self._pending),
            "rng": _pack_rng(self._rng.getstate()),
            "buffer": self._buffer_places[: len(self._buffer)].copy(),
            "pool": np.array([(*_numbers(place), n) for place, n, *_ in self._pool], dtype=np.int64).reshape(-1, 6),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken: reads again what was held back then."""
        if len(state["cursors"]) != len(self._cursors):
            raise ValueError(
                f"the state has {len(state['cursors'])} streams, this config {len(self._cursors)}: use the config it was made with"
            )
        for cursor, saved in zip(self._cursors, state["cursors"], strict=True):
            cursor.load_state_dict(saved)
        self._alive, self._pending = list(state["alive"]), list(state["pending"])
        self._rng.setstate(_unpack_rng(state["rng"]))
        buffer = [Place(*row) for row in np.asarray(state["buffer"]).tolist()]
        pool = [(Place(*row[:5]), row[5]) for row in np.asarray(state["pool"]).tolist()]
        items = self._fetch({*buffer, *(place for place, _ in pool)})
        self._buffer = [(place, items[place]) for place in buffer]
        self._buffer_places = np.zeros((max(len(buffer), self._config.shuffle_buffer) + 1, 5), np.int64)
        self._buffer_places[: len(buffer)] = state["buffer"]
        built: dict[Place, list[Example]] = {}
        for place, _ in pool:
            if place not in built:
                built[place] = self._build(place, items[place])
        for place, n in pool:
            if n >= len(built[place]):
                raise ValueError(
                    f"{items[place].source}: a sample that was read before cannot be read again; the list has been changed"
                )
        self._pool = [(place, n, built[place][n], _cost(built[place][n])) for place, n in pool]
        self._drops, self._notes = [], {}

    def _fetch(self, places: set[Place]) -> dict[Place, ListItem]:
        """Items of places, read in the order in which they lie on disk."""
        out = {}
        for place in sorted(places, key=lambda p: (p.stream, p.line, p.offset)):
            item = self._streams[place.stream].read_one(place.line, place.offset, place.index)
            item.index, item.offset = place.index, place.offset
            out[place] = item
        return out


def _drop(error: RecordError, item: ListItem) -> Drop:
    drop = Drop.of(error)
    key = drop.key or str((item.fields or {}).get("key", ""))
    return Drop(key, drop.file or item.source, drop.line or item.number, drop.reason, drop.detail)


def _cost(example: Example) -> Cost:
    return Cost(example.positions, max((len(f) for f in example.feats), default=0), len(example.feats))


def _numbers(place: Place) -> tuple[int, int, int, int, int]:
    return (place.stream, place.repetition, place.line, place.offset, place.index)


def _pack_rng(state: tuple[Any, ...]) -> dict[str, Any]:
    version, words, gauss = state
    return {"version": version, "words": np.array(words, dtype=np.uint32), "gauss": gauss}


def _unpack_rng(state: Mapping[str, Any]) -> tuple[Any, ...]:
    return (state["version"], tuple(np.asarray(state["words"]).tolist()), state["gauss"])
