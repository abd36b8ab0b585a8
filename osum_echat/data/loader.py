"""The loader: epochs of batches for one rank, over worker processes, with one state for all of it.

Workers are torch's DataLoader processes; each runs one reader with its own share (`pipeline.Reader`) and sends its
state along with every batch, so that the loader's state is always that of the last batch it handed out, whatever the
workers have prepared ahead. The order of batches is round robin over readers, in one process or in several.

A rank ends its epoch when its own share is read; that another rank has more, and what happens then, is the training
loop's affair (`training.steps`). Shares are equal to within a sample per list line by construction.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import multiprocessing.connection
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import fsspec.asyn
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from osum_echat.data.batch import Batch
from osum_echat.data.config import DataConfig
from osum_echat.data.drops import DropLog, DropReport
from osum_echat.data.examples import ExampleBuilder
from osum_echat.data.lists import Stream
from osum_echat.data.reader import Builder, Reader, ReaderStep
from osum_echat.dialogue.dialect import Dialect
from osum_echat.dialogue.tokens import Tokenizer
from osum_echat.dialogue.vocabulary import Vocabulary

log = logging.getLogger(__name__)

_VERSION = 1


class Loader:
    """Iterate for the batches of one epoch; the next `iter` gives the next epoch.

    Args:
        streams: what is mixed.
        builder: makes examples of records.
        rank, world_size: this process among the data-parallel ones.
        pin_memory: batches in page-locked memory, for copies to a GPU that do not wait.
        repeat: every epoch is the same as the first (held-out data: figures of different epochs can be compared).

    Attributes:
        report: counts of the current (or last) epoch on this rank.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        builder: Builder,
        config: DataConfig,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        repeat: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in [0, {world_size})")
        self.streams, self.config = list(streams), config
        self._epoch, self._ended = 0, False
        self.report = DropReport()
        self.batches_done = 0
        self._builder, self._rank, self._world_size = builder, rank, world_size
        self._pin_memory, self._repeat = pin_memory, repeat
        self._log = DropLog(_rank_path(config.drops_file, rank, world_size))
        self._notes: dict[str, int] = {}
        self._shares = _Shares(self.streams, builder, config)
        self._workers: DataLoader[tuple[int, ReaderStep]] | None = None
        self._resumed = False  # the next epoch begins where a loaded state says
        self._fresh()

    def _fresh(self) -> None:
        """Readers of an epoch from its start: one per worker."""
        count = max(1, self.config.workers)
        self._num_readers = count * self._world_size
        self._readers = [_ReaderState(self._rank + self._world_size * worker) for worker in range(count)]
        self._turn = self.batches_done = 0
        self.report = DropReport()

    def set_epoch(self, epoch: int) -> None:
        """Begin with this epoch; a loaded position within an epoch is given up."""
        self._epoch = epoch
        self._ended = self._resumed = False
        self._fresh()

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next batch belongs to."""
        return self._epoch + self._ended

    def __iter__(self) -> Iterator[Batch]:
        """Batches of the epoch ``self.epoch``, from where `load_state_dict` put it; afterwards ``self.epoch`` is the
        next.

        Until then `state_dict` says the end of this epoch: with several ranks one may be through while others are not.

        Raises:
            TooManyBadSamples: see `DataConfig.max_bad_fraction`.
        """
        if not self._resumed:
            self.set_epoch(self.epoch)
        self._resumed = False
        outputs = self._outputs()
        while (batch := self._next_batch(outputs)) is not None:
            self.batches_done += 1
            yield batch
        self.report.check(self.config.max_bad_fraction, final=True)
        level = logging.WARNING if self.report.bad else logging.INFO
        log.log(level, "epoch %d, rank %d: %d batches, %s", self._epoch, self._rank, self.batches_done, self.report.text())
        self._ended = True

    def _outputs(self) -> Iterator[tuple[int, ReaderStep]]:
        """(index of the reader, output) in turns, from the reader whose turn it is; a reader's last output has no
        batch."""
        count = len(self._readers)
        order = [(self._turn + i) % count for i in range(count) if not self._readers[(self._turn + i) % count].finished]
        if not order:
            return
        todo = [self._readers[i] for i in order]
        epoch = 0 if self._repeat else self._epoch
        if self.config.workers == 0:
            outputs: Iterable[tuple[int, ReaderStep]] = self._shares.run(epoch, list(enumerate(todo)), self._num_readers)
        else:
            outputs = self._from_workers(epoch, todo)
        for at, output in outputs:
            yield order[at], output

    def _from_workers(self, epoch: int, todo: Sequence[_ReaderState]) -> Iterator[tuple[int, ReaderStep]]:
        """One worker process a reader. They are kept for the next epoch: starting them takes a second, opening lists
        included."""
        if self._workers is None or len(todo) > self._workers.num_workers:
            self._shares.orders = [multiprocessing.Pipe(duplex=False) for _ in todo]
            self._workers = DataLoader(
                self._shares,
                batch_size=None,
                num_workers=len(todo),
                prefetch_factor=self.config.prefetch,
                pin_memory=self._pin_memory,
                worker_init_fn=_start_worker,
                persistent_workers=not self._repeat,
                # Of its own: the seed that torch draws for workers must not move the training's random state.
                generator=torch.Generator(),
            )
        # Workers first: a restored reader's state is larger than what a pipe holds, so `send` waits until a worker
        # reads.
        running = iter(self._workers)
        for at, (_, orders) in enumerate(self._shares.orders):
            orders.send((epoch, [(at, todo[at])] if at < len(todo) else [], self._num_readers))
        return running

    def _next_batch(self, outputs: Iterator[tuple[int, ReaderStep]]) -> Batch | None:
        """The next batch, None at the end; accounts for what was left out on the way."""
        for at, output in outputs:
            reader = self._readers[at]
            reader.state, reader.finished = output.state, output.batch is None
            self._turn = (at + 1) % len(self._readers)
            self.report.add(output.used, output.drops)
            self._log.write(output.drops)
            self._tell_notes(output.notes)
            self.report.check(self.config.max_bad_fraction)
            if output.batch is not None:
                return output.batch
        return None

    def _tell_notes(self, notes: Mapping[str, int]) -> None:
        """What was assumed about a file's records, said once per file."""
        for note, count in notes.items():
            if note not in self._notes:
                log.warning("%s", note)
            self._notes[note] = self._notes.get(note, 0) + count

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last batch that was handed out, on this rank."""
        return {
            "version": _VERSION,
            "settings": self._settings(),
            "rank": self._rank,
            "world_size": self._world_size,
            "epoch": self._epoch,
            "turn": self._turn,
            "batches_done": self.batches_done,
            "num_readers": self._num_readers,
            "readers": [vars(reader).copy() for reader in self._readers],
            "report": self.report.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the batch after which ``state`` was taken.

        Another number of workers than before is taken from the next epoch on; until then the shares stay as they were.

        Raises:
            ValueError: the state is of another number of ranks (see `load_state_dicts`), another seed or other lists,
                so that its position means nothing here. `set_epoch` begins an epoch instead.
        """
        if (state["rank"], state["world_size"]) != (self._rank, self._world_size):
            raise ValueError(
                f"data state of rank {state['rank']}/{state['world_size']} given to rank {self._rank}/{self._world_size}: "
                "give the states of all ranks to load_state_dicts"
            )
        self._check(state)
        self._load(state, state["readers"], state["turn"])
        self.batches_done = state["batches_done"]
        self.report.load_state_dict(state["report"])

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> str:
        """Go on with the states of all ranks of a run that had another number of them. Returns what happens, as a
        sentence.

        The rest of the epoch is read in the old shares, dealt to the new ranks: nothing is lost or seen twice. Where
        there are now more ranks than shares, some have nothing until the next epoch.
        """
        if len(states) == self._world_size:
            self.load_state_dict(states[self._rank])
            return "the data position of each rank is restored"
        for state in states:
            self._check(state)
        readers = [reader for state in states for reader in state["readers"]]
        self._load(states[0], readers[self._rank :: self._world_size], 0)
        return (
            f"the rest of data epoch {self.epoch} is read in the {len(readers)} shares of the {len(states)} ranks before, dealt to "
            f"{self._world_size} ranks; no sample is lost or seen twice"
        )

    def _load(self, state: Mapping[str, Any], readers: Sequence[Mapping[str, Any]], turn: int) -> None:
        self._epoch, self._num_readers, self._turn = state["epoch"], state["num_readers"], turn
        self._readers = [_ReaderState(**reader) for reader in readers]
        self.batches_done = 0
        self.report = DropReport()
        self._ended, self._resumed = False, True

    def _check(self, state: Mapping[str, Any]) -> None:
        if state.get("version") != _VERSION:
            raise ValueError(f"data state of version {state.get('version')!r}, this program reads {_VERSION}")
        before, mine = state["settings"], self._settings()
        different = [f"{name}: {before.get(name)!r}, now {mine[name]!r}" for name in mine if before.get(name) != mine[name]]
        if different:
            raise ValueError(
                f"the data position was saved with other settings ({'; '.join(different)}) and means nothing here: restore them, "
                "or call set_epoch to begin an epoch from its start"
            )

    def _settings(self) -> dict[str, Any]:
        """What the meaning of a position depends on."""
        config = self.config
        return {
            "seed": config.seed,
            "split": config.split,
            "shuffle": config.shuffle,
            "lines": {s.name: len(s) for s in self.streams},
        }

    def describe(self) -> str:
        """The mix, for a run's first page."""
        total = sum(s.weight for s in self.streams) or 1.0
        lines = [
            f"  {s.name:6} {100 * s.weight / total:5.1f} %  {len(s)} list lines in {len(s.sources)} lists, when dry: {s.config.when_dry}"
            for s in self.streams
        ]
        return "\n".join(
            [f"data of rank {self._rank}/{self._world_size}, {self.config.workers} workers, seed {self.config.seed}:", *lines]
        )


@dataclass
class _ReaderState:
    """A reader of this rank: its number among all, where it stands (None: at the start), and whether it has ended."""

    number: int
    state: dict[str, Any] | None = None
    finished: bool = False


class _Shares(IterableDataset[tuple[int, ReaderStep]]):
    """Readers of a rank: each in a worker process of its own, or all in this process, taking turns.

    ``orders``: the two ends of a pipe for each worker; each epoch it is told there which readers to run.
    """

    def __init__(self, streams: Sequence[Stream], builder: Builder, config: DataConfig) -> None:
        self._args = (streams, builder, config)
        self.orders: list[tuple[Connection, Connection]] = []

    def __iter__(self) -> Iterator[tuple[int, ReaderStep]]:
        info = get_worker_info()
        parent = multiprocessing.parent_process()
        assert info is not None and parent is not None, "in this process, call run"
        orders, _ = self.orders[info.id]
        multiprocessing.connection.wait([orders, parent.sentinel])
        if not orders.poll():
            raise SystemExit(0)  # who gives orders was killed; a worker that waited on would stay for ever
        return self.run(*orders.recv())

    def run(self, epoch: int, readers: Sequence[tuple[int, _ReaderState]], num_readers: int) -> Iterator[tuple[int, ReaderStep]]:
        """(place in ``readers``, output) of an epoch, in turns."""
        running = {at: self._open(saved, epoch, num_readers) for at, saved in readers}
        while running:
            for at, reader in list(running.items()):
                output = reader.next()
                if output.batch is None:
                    del running[at]
                yield at, output

    def _open(self, saved: _ReaderState, epoch: int, num_readers: int) -> Reader:
        reader = Reader(*self._args, epoch, saved.number, num_readers)
        if saved.state is not None:
            reader.load_state_dict(saved.state)
        return reader


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    fsspec.asyn.reset_lock()  # remote file systems run a thread that a fork does not copy


def build_loader(
    config: DataConfig,
    tokenizer: Tokenizer,
    vocab: Vocabulary,
    dialect: Dialect | None = None,
    mels: int = 80,
    rank: int = 0,
    world_size: int = 1,
    train: bool = True,
    pin_memory: bool = False,
) -> Loader:
    """The loader of a config.

    Args:
        train: False: held-out data, in the order of the lists, without augmentation, every stream once; the same
            whatever seed and epoch.
        dialect, mels: of the model that the batches are for, from its config (``dialect`` and ``encoder.mels``).

    Raises:
        ValueError: no streams, or a list that is not there or empty.
    """
    if not config.streams:
        raise ValueError("data.streams is empty: name at least one list, such as data.streams={s2t: {list: conf/data_s2t.yaml}}")
    if not train:
        streams_once = {name: dataclasses.replace(stream, when_dry="leave") for name, stream in config.streams.items()}
        config = dataclasses.replace(config, seed=0, shuffle=False, split=1, streams=streams_once)
    streams = [Stream(name, stream, config.seed) for name, stream in config.streams.items()]
    streams = [stream for stream in streams if len(stream)]
    if not streams:
        raise ValueError("every stream of data.streams is empty: raise a weight in its data yaml")
    builder = ExampleBuilder(config, tokenizer, vocab, train, dialect, mels)
    return Loader(streams, builder, config, rank, world_size, pin_memory, repeat=not train)


def _rank_path(path: str | None, rank: int, world_size: int) -> str | None:
    return f"{path}.rank{rank}" if path is not None and world_size > 1 else path
