"""The loader: epochs of batches for one rank, over worker processes, with one state for all of it.

Workers are torch's DataLoader processes; each is one reader with its own share (`pipeline.Reader`) and sends its state along with every
batch, so that the loader's state is always that of the last batch it handed out, whatever the workers have prepared ahead.

Ranks agree as they go: before each batch all ranks tell whether they have one left, and as long as any has, a rank without gives a
*filler* (no keys, no targets, one short silent recording). So every rank makes the same number of steps, none waits for a collective that
does not come, and nothing is lost or seen twice. Shares are equal to within a sample per list line by construction, so fillers are few.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import fsspec.asyn
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from osum_echat.data.batch import Batch, Example, collate
from osum_echat.data.config import DataConfig
from osum_echat.data.drops import DropLog, DropReport
from osum_echat.data.lists import Stream
from osum_echat.data.pipeline import Builder, Output, Reader
from osum_echat.dialogue.layout import IGNORE, Row, audio_positions

log = logging.getLogger(__name__)

FILLER_FRAMES = 32
_VERSION = 1

Agree = Callable[[bool], bool]


class Loader:
    """Iterate for the batches of one epoch; the next `iter` gives the next epoch.

    Args:
        streams: what is mixed.
        builder: makes examples of records.
        rank, world_size: this process among the data-parallel ones.
        agree: given whether this rank has a batch left, tells whether any rank has (a collective). Default: by torch.distributed when
            it is initialised and ``world_size`` > 1; else every rank ends by itself.
        pin_memory: batches in page-locked memory, for copies to a GPU that do not wait.

    Attributes:
        epoch: number of the epoch that the next batch belongs to.
        report: counts of the current (or last) epoch on this rank.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        builder: Builder,
        config: DataConfig,
        rank: int = 0,
        world_size: int = 1,
        agree: Agree | None = None,
        pin_memory: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in [0, {world_size})")
        self.streams, self.config = list(streams), config
        self.epoch = 0
        self.report = DropReport()
        self.batches_done = 0
        self.seconds = 0.0
        self._builder, self._rank, self._world_size = builder, rank, world_size
        self._agree = agree if agree is not None else _distributed_agreement(world_size)
        self._pin_memory = pin_memory
        self._log = DropLog(_rank_path(config.drops_file, rank, world_size))
        self._notes: dict[str, int] = {}
        self._start: dict[str, Any] | None = None  # state to begin the next epoch from
        self._workers: list[dict[str, Any] | None] = [None] * self._num_readers
        self._finished = [False] * self._num_readers
        self._turn = 0

    @property
    def _num_readers(self) -> int:
        """Readers of this rank."""
        return max(1, self.config.workers)

    def set_epoch(self, epoch: int) -> None:
        """Begin with this epoch; a loaded position within an epoch is given up."""
        self.epoch = epoch
        self._start = None

    def __iter__(self) -> Iterator[Batch]:
        """Batches of the epoch ``self.epoch``, from where `load_state_dict` put it; afterwards ``self.epoch`` is the next.

        Raises:
            TooManyBadSamples: see `DataConfig.max_bad_fraction`.
        """
        self._begin()
        began = time.monotonic()
        outputs = self._outputs()
        while True:
            output = self._next_output(outputs)
            batch = output.batch if output is not None else None
            if self._agree is not None and not self._agree(batch is not None):
                break
            if batch is None:
                if self._agree is None:
                    break
                batch = filler(self.config.num_mels)
            self.batches_done += 1
            self.seconds = time.monotonic() - began
            yield batch
        self.report.check(self.config.max_bad_fraction, final=True)
        log.info("epoch %d, rank %d: %d batches, %s", self.epoch, self._rank, self.batches_done, self.report.text())
        if self.report.bad:
            log.warning("epoch %d, rank %d: %d bad samples: %s", self.epoch, self._rank, self.report.bad, self.report.text())
        self.epoch += 1

    def _begin(self) -> None:
        start, self._start = self._start, None
        if start is None:
            self._workers = [None] * self._num_readers
            self._finished = [False] * self._num_readers
            self._turn = self.batches_done = 0
            self.report = DropReport()

    def _outputs(self) -> Iterator[tuple[int, Output]]:
        """(reader, output) in turns, from the reader whose turn it is; a reader's last output has no batch."""
        count = self._num_readers
        order = [(self._turn + i) % count for i in range(count) if not self._finished[(self._turn + i) % count]]
        shards = _Shares(
            self.streams,
            self._builder,
            self.config,
            self.epoch,
            [self._rank + self._world_size * reader for reader in order],
            self._world_size * count,
            [self._workers[reader] for reader in order],
        )
        if not order:
            return
        if self.config.workers == 0:
            yield from ((order[0], output) for _, output in shards)
            return
        loader = DataLoader(
            shards,
            batch_size=None,
            num_workers=len(order),
            prefetch_factor=self.config.prefetch,
            pin_memory=self._pin_memory,
            worker_init_fn=_start_worker,
        )
        for at, output in loader:
            yield order[at], output

    def _next_output(self, outputs: Iterator[tuple[int, Output]]) -> Output | None:
        """The next output that has a batch; accounts for what was left out on the way."""
        for reader, output in outputs:
            self._workers[reader] = output.state
            self._finished[reader] = output.batch is None
            self._turn = (reader + 1) % self._num_readers
            self.report.add(output.used, output.drops)
            self._log.write(output.drops)
            self._tell_notes(output.notes)
            self.report.check(self.config.max_bad_fraction)
            if output.batch is not None:
                return output
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
            "layout": self._layout(),
            "epoch": self.epoch,
            "turn": self._turn,
            "batches_done": self.batches_done,
            "workers": list(self._workers),
            "finished": list(self._finished),
            "report": self.report.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the batch after which ``state`` was taken.

        Raises:
            ValueError: the state was taken with another number of ranks, workers, another seed or other lists; the shares of the
                data would not be the same. `set_epoch` begins an epoch instead.
        """
        if state.get("version") != _VERSION:
            raise ValueError(f"data state of version {state.get('version')!r}, this program reads {_VERSION}")
        mine = self._layout()
        different = [
            f"{name} {state['layout'].get(name)!r} -> {mine[name]!r}" for name in mine if state["layout"].get(name) != mine[name]
        ]
        if different:
            raise ValueError(
                f"the data position was saved with other settings ({'; '.join(different)}) and has no meaning here: restore them, "
                "or call set_epoch to begin an epoch from its start"
            )
        self.epoch, self._turn, self.batches_done = state["epoch"], state["turn"], state["batches_done"]
        self._workers, self._finished = list(state["workers"]), list(state["finished"])
        self.report = DropReport()
        self.report.load_state_dict(state["report"])
        self._start = dict(state)

    def _layout(self) -> dict[str, Any]:
        """What the meaning of a position depends on."""
        return {
            "rank": self._rank,
            "world_size": self._world_size,
            "readers": self._num_readers,
            "seed": self.config.seed,
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


class _Shares(IterableDataset[tuple[int, Output]]):
    """The readers of a rank, one per worker process (or the only one, in this process)."""

    def __init__(
        self,
        streams: Sequence[Stream],
        builder: Builder,
        config: DataConfig,
        epoch: int,
        readers: Sequence[int],
        num_readers: int,
        states: Sequence[dict[str, Any] | None],
    ) -> None:
        self._args = (streams, builder, config, epoch)
        self._num_readers, self._readers, self._states = num_readers, list(readers), list(states)

    def __iter__(self) -> Iterator[tuple[int, Output]]:
        info = get_worker_info()
        at = info.id if info is not None else 0
        reader = Reader(*self._args, self._readers[at], self._num_readers)
        state = self._states[at]
        if state is not None:
            reader.load_state_dict(state)
        while True:
            output = reader.next()
            yield at, output
            if output.batch is None:
                return


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    fsspec.asyn.reset_lock()  # remote file systems run a thread that a fork does not copy


def filler(num_mels: int) -> Batch:
    """A batch that teaches nothing: one position without a target, one silent recording, so that every room still runs."""
    positions = audio_positions(FILLER_FRAMES)
    row = Row(
        ids_T=np.zeros(positions, np.int64),
        positions_T=np.arange(positions),
        visible_T=np.ones(positions, np.bool_),
        targets_T=np.full(positions, IGNORE, np.int64),
        text_softmax=False,
        audio=[(0, 0, positions)],
    )
    batch = collate([Example("", "", row, [torch.zeros(FILLER_FRAMES, num_mels)])], num_mels)
    batch.keys, batch.tasks, batch.tags, batch.texts, batch.streams = [], [], [], [], []
    return batch


def _distributed_agreement(world_size: int) -> Agree | None:
    if world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return None
    # A group of its own on CPU: the flag never waits behind a queue of kernels.
    group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def agree(have_batch: bool) -> bool:
        flag = torch.tensor([int(have_batch)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
        return bool(flag.item())

    return agree


def _rank_path(path: str | None, rank: int, world_size: int) -> str | None:
    return f"{path}.rank{rank}" if path is not None and world_size > 1 else path
