"""Data yamls, and the streams that are mixed: which lists, how often, in which order an epoch goes through them.

seed: 3
asr: {path: data/asr/shards_list.txt, weight: 2.7}     # twice; relative to this file, then to where one stands
chat: {path: data/chat/combines_list.txt}              # once
rare: {path: data/rare/data.list, weight: 0.25}        # a random quarter, the same one in every epoch
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from osum_echat.config import ConfigError, find_path, read_yaml
from osum_echat.data import paths
from osum_echat.data.config import ListType, StreamConfig
from osum_echat.data.sampling import Share, Shares, epoch_order, weighted_lines
from osum_echat.data.sources import END, ListItem, Source, open_source

_PASS_STRIDE = 1_000_003  # seeds of the repetitions of a restarted stream lie far from those of the next epochs


@dataclass(frozen=True)
class ListEntry:
    """One entry of a data yaml."""

    name: str
    path: str
    weight: float = 1.0
    type: ListType = "auto"


def read_data_yaml(path: str, seed: int = 0) -> tuple[list[ListEntry], int]:
    """Entries of a data yaml, and its ``seed`` (default: the one given).

    Raises:
        ConfigError: an entry is not ``name: {path, weight}``.
    """
    data = read_yaml(path)
    seed = data.pop("seed", seed)
    if not isinstance(seed, int):
        raise ConfigError(f"{path}: seed must be a whole number, found {seed!r}")
    entries = []
    for name, entry in data.items():
        if isinstance(entry, str):
            entry = {"path": entry}
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise ConfigError(f"{path}: {name} must be a mapping with a path, such as {name}: {{path: list.txt, weight: 1}}")
        unknown = set(entry) - {"path", "weight", "type"}
        if unknown:
            raise ConfigError(
                f"{path}: {name} has unknown key(s) {', '.join(sorted(map(str, unknown)))}; known: path, weight, type"
            )
        weight = entry.get("weight", 1)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight < 0:
            raise ConfigError(f"{path}: {name}.weight must be a number >= 0, found {weight!r}")
        kind = entry.get("type", "auto")
        if kind not in ("auto", "raw", "shard"):
            raise ConfigError(f"{path}: {name}.type must be auto, raw or shard, found {kind!r}")
        entries.append(ListEntry(str(name), find_path(entry["path"], Path(path).parent), float(weight), kind))
    return entries, seed


class Stream:
    """The lists of one stream as one table of lines, weights applied.

    Args:
        name: s2t, t2s, s2s, t2t, or any other name.
        config: where its lists are.
        seed: used for the random part of lists with a weight below 1, unless the data yaml has its own, and for the
            order.
    """

    def __init__(self, name: str, config: StreamConfig, seed: int = 0) -> None:
        self.name, self.config = name, config
        if os.path.splitext(config.list)[1] in (".yaml", ".yml"):
            entries, seed = read_data_yaml(config.list, seed)
            resolve = paths.Resolver(config.list)
            entries = [ListEntry(e.name, _resolved(resolve, e.path), e.weight, e.type) for e in entries if e.weight > 0]
        else:
            entries = [ListEntry(name, config.list, type=config.type)]
        self.seed = seed
        self.sources: list[Source] = []
        tables = [np.zeros((0, 2), np.int32)]
        for entry in entries:
            kind = entry.type if entry.type != "auto" else config.type
            source = open_source(entry.path, kind)
            lines = weighted_lines(len(source), entry.weight, random.Random(f"{seed}/{entry.name}"))
            tables.append(np.stack([np.full(len(lines), len(self.sources), np.int32), np.asarray(lines, np.int32)], axis=1))
            self.sources.append(source)
        self._table = np.concatenate(tables)

    def __len__(self) -> int:
        """Lines of all lists, repetitions counted."""
        return len(self._table)

    @property
    def weight(self) -> float:
        return float(len(self)) if self.config.weight is None else self.config.weight

    def shares(self, epoch: int, repetition: int, reader: int, readers: int, split: int, shuffle: bool) -> Shares:
        """What ``reader`` reads in an epoch, in order; ``line`` counts through the table."""
        order = epoch_order(len(self), epoch, self.seed + repetition * _PASS_STRIDE, split, shuffle)
        return Shares(order, reader, readers)

    def source(self, line: int) -> Source:
        return self.sources[self._table[line, 0]]

    def read(self, share: Share, offset: int = 0, index: int = 0) -> Iterator[ListItem]:
        """Items of a line of the table; ``ListItem.line`` is the table's."""
        source, line = self._table[share.line]
        for item in self.sources[source].read(Share(int(line), share.part, share.parts), offset, index):
            item.line = share.line
            yield item

    def read_one(self, line: int, offset: int, index: int) -> ListItem:
        """One item again (see `Source.read_one`)."""
        source, list_line = self._table[line]
        item = self.sources[source].read_one(int(list_line), offset, index)
        item.line = line
        return item


def _resolved(resolve: paths.Resolver, path: str) -> str:
    try:
        return resolve(path)
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from error


class Cursor:
    """A place in a stream: which repetition, which line, which sample in it. Iterates over items; can be saved and
    moved.

    After each item the cursor stands behind it.
    """

    def __init__(self, stream: Stream, epoch: int, reader: int, readers: int, split: int = 1, shuffle: bool = True) -> None:
        self.stream = stream
        self._args = (reader, readers, split, shuffle)
        self._epoch = epoch
        self.repetition = self.position = self.offset = self.index = 0
        self._items: Iterator[ListItem] | None = None
        self._load()

    def _load(self) -> None:
        self._shares = self.stream.shares(self._epoch, self.repetition, *self._args)
        self._items = None

    @property
    def empty(self) -> bool:
        """Nothing to read in any repetition."""
        return not self._shares

    def restart(self) -> None:
        """Begin again, in another order."""
        self.repetition += 1
        self.position = self.offset = self.index = 0
        self._load()

    def next(self) -> ListItem | None:
        """The next item, None when the stream is dry."""
        while self.position < len(self._shares):
            if self._items is None:
                self._items = self.stream.read(self._shares[self.position], self.offset, self.index)
            item = next(self._items, None)
            if item is not None and item.next_offset != END:
                self.offset, self.index = item.next_offset, item.index + 1
                return item
            self.position, self.offset, self.index, self._items = self.position + 1, 0, 0, None
            if item is not None:
                return item
        return None

    def state_dict(self) -> dict[str, int]:
        return {"repetition": self.repetition, "position": self.position, "offset": self.offset, "index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.repetition, self.position = state["repetition"], state["position"]
        self.offset, self.index = state["offset"], state["index"]
        self._load()
