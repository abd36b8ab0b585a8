"""Utterances for token2wav training: read from record lists, checked once, batched by a plan that is a function of the
seed.

Lists are of any form that the project reads (raw, shard, combine; `data.sources`); recordings of tars are held in
memory as the bytes that they are there. What the four trainings use of ``extra``: ``speech_token`` (25 Hz ids),
``phones`` (``[[phone, end in seconds], ...]``) and ``voice``. Records that a training cannot use are left out, counted
by reason and named in the log; a file that cannot be read later, during training, is counted the same way.
"""

from __future__ import annotations

import glob
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from osum_echat.audio import io
from osum_echat.audio.io import AudioError
from osum_echat.config import InputFile
from osum_echat.data.sources import open_source
from osum_echat.dialogue.record import Record, RecordError

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class ListConfig:
    """Which records take part."""

    lists: list[InputFile] = field(default_factory=list)  # of any form, patterns allowed
    valid_lists: list[InputFile] = field(default_factory=list)  # held-out records; if empty, `held_out` of `lists`
    held_out: int = 32
    # Of extra; what they hold, joined by "/", names the voice.
    voice_fields: list[str] = field(default_factory=lambda: ["voice"])
    voices: list[str] | None = None  # only records of these voices
    min_seconds: float = 0.5
    max_seconds: float = 15.0
    max_records: int | None = None  # of more, so many are taken evenly from all over the lists
    max_valid: int | None = 200  # likewise

    def __post_init__(self) -> None:
        if not self.lists:
            raise ValueError("data.lists is empty: name at least one record list, for example data.lists=[train.jsonl]")


@dataclass(frozen=True)
class Utterance:
    """One usable record: ``wav`` is a path or the bytes of a file. Times in seconds; ``start`` and ``end``: the part of
    the recording to use."""

    key: str
    wav: Path | bytes
    text: str
    seconds: float
    voice: str | None = None
    phones: tuple[tuple[str, float], ...] = ()  # (name, end)
    tokens: tuple[int, ...] = ()
    start: float | None = None
    end: float | None = None

    def samples_16k(self) -> np.ndarray:
        """The recording [n] float32 at 16 kHz. Raises AudioError."""
        return io.to_mono_16k(self.wav, self.start, self.end)


class Skips:
    """Counts what was left out, by reason, with one example each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, reason: str, example: str) -> None:
        if reason not in self.counts:
            self.examples[reason] = example
            log.info("left out: %s (%s)", reason, example)
        self.counts[reason] += 1

    def __str__(self) -> str:
        return ", ".join(f"{n} x {reason} (e.g. {self.examples[reason]})" for reason, n in self.counts.items()) or "none"


def read_lists(lists: Sequence[Path], cfg: ListConfig, need: Sequence[str] = ()) -> list[Utterance]:
    """The usable utterances of some record lists.

    ``need`` names what a record must carry: "phones", "tokens", "voice", "text". Raises ValueError when a list is
    missing or nothing is left.
    """
    skips = Skips()
    out: list[Utterance] = []
    for path in _expanded(lists):
        for record in open_source(str(path)).records():
            if isinstance(record, RecordError):
                skips.add("audio cannot be read" if record.reason == "audio_missing" else "not a readable record", str(record))
            elif (utterance := _parse(record, cfg, need, skips)) is not None:
                out.append(utterance)
    if skips.counts:
        log.info("records left out of %s: %s", ", ".join(map(str, lists)), skips)
    if not out:
        raise ValueError(f"no usable record in {', '.join(map(str, lists))}; left out: {skips}")
    return out


def _expanded(lists: Sequence[Path]) -> Iterator[Path]:
    """The files that the names and patterns stand for, in a fixed order."""
    for path in lists:
        found = sorted(glob.glob(str(path)))
        if not found:
            raise ValueError(f"record list not found: {path}")
        yield from map(Path, found)


def _parse(record: Record, cfg: ListConfig, need: Sequence[str], skips: Skips) -> Utterance | None:
    where, extra = f"{record.source}:{record.line} key {record.key!r}", record.extra
    try:
        if record.wav is None:
            raise ValueError("it has no recording")
        phones = tuple((str(name), float(end)) for name, end in extra.get("phones") or ())
    except (TypeError, ValueError) as error:
        skips.add("not a readable record", f"{where}: {error}")
        return None
    voice = "/".join(str(extra[name]) for name in cfg.voice_fields if extra.get(name) is not None) or None
    if cfg.voices is not None and voice not in cfg.voices:
        return None  # a choice, not a fault
    wav = Path(record.wav) if isinstance(record.wav, str) else record.wav
    try:
        seconds = _seconds(wav, record.start, record.end)
    except AudioError as error:
        skips.add("audio cannot be read", f"{where}: {error}")
        return None
    if not cfg.min_seconds <= seconds <= cfg.max_seconds:
        skips.add(f"not between {cfg.min_seconds:g} and {cfg.max_seconds:g} s", f"{where}: {seconds:.2f} s")
        return None
    utterance = Utterance(record.key, wav, record.txt, seconds, voice, phones, record.speech_token, record.start, record.end)
    for name in need:
        if not getattr(utterance, name):
            skips.add(f"has no {name}", where)
            return None
    return utterance


def _seconds(wav: Path | bytes, start: float | None, end: float | None) -> float:
    whole = io.duration(wav)
    return min(whole, whole if end is None else end) - (start or 0.0)


def _spread(found: list[Utterance], most: int | None) -> list[Utterance]:
    """At most so many, evenly from all over the lists: their beginning may be of one voice."""
    if most is None or len(found) <= most:
        return found
    return [found[i * len(found) // most] for i in range(most)]


def train_and_valid(cfg: ListConfig, need: Sequence[str] = ()) -> tuple[list[Utterance], list[Utterance]]:
    """The two sets; without ``valid_lists`` every k-th record of the lists is held out."""
    train = read_lists(cfg.lists, cfg, need)
    if cfg.valid_lists:
        valid = read_lists(cfg.valid_lists, cfg, need)
    else:
        every = max(2, len(train) // max(1, cfg.held_out))
        valid, train = train[::every][: cfg.held_out], [u for i, u in enumerate(train) if i % every or i // every >= cfg.held_out]
    train, valid = _spread(train, cfg.max_records), _spread(valid, cfg.max_valid)
    log.info(
        "training on %d records (%.2f h), held out %d (%.2f h)",
        len(train),
        sum(u.seconds for u in train) / 3600,
        len(valid),
        sum(u.seconds for u in valid) / 3600,
    )
    if not train or not valid:
        raise ValueError(f"{len(train)} records to train on and {len(valid)} held out: both are needed, give more records")
    return train, valid


class Batches:
    """Which utterances step k holds: a function of (seed, k).

    Every epoch is a new permutation; inside pools of ``pool`` batches utterances are sorted by length, so that a batch
    pads little, and the batches are shuffled again.
    """

    def __init__(self, seconds: Sequence[float], size: int, seed: int, pool: int = 16) -> None:
        if not seconds:
            raise ValueError("no utterances to batch")
        self.seconds = np.asarray(seconds)
        self.size = min(size, len(seconds))
        self.seed = seed
        self.pool = pool
        self.per_epoch = len(seconds) // self.size
        self._epoch = -1
        self._plan: list[np.ndarray] = []

    def __call__(self, step: int) -> list[int]:
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._make(epoch)
        return [int(i) for i in self._plan[index]]

    def _make(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.seconds))[: self.per_epoch * self.size]
        batches: list[np.ndarray] = []
        for pool in np.split(order, range(self.pool * self.size, len(order), self.pool * self.size)):
            pool = pool[np.argsort(self.seconds[pool], kind="stable")]
            batches.extend(np.split(pool, range(self.size, len(pool), self.size)))
        return [batches[i] for i in rng.permutation(len(batches))]


class Features(Generic[T]):
    """What is computed of each utterance once and kept in memory; utterances whose audio fails are counted and left out
    of their batch."""

    def __init__(self, utterances: Sequence[Utterance], compute: Callable[[Utterance], T]) -> None:
        self.utterances = utterances
        self.skips = Skips()
        self._compute = compute
        self._kept: dict[int, T | None] = {}

    def __len__(self) -> int:
        return len(self.utterances)

    def get(self, index: int) -> T | None:
        """The features of one utterance, None when they cannot be had."""
        if index not in self._kept:
            utterance = self.utterances[index]
            try:
                self._kept[index] = self._compute(utterance)
            except (OSError, RuntimeError, ValueError) as error:
                self.skips.add(type(error).__name__, f"{utterance.key}: {error}")
                self._kept[index] = None
        return self._kept[index]

    def batch(self, indices: Sequence[int]) -> list[T]:
        """The features of several; at least one, else RuntimeError."""
        found = [f for i in indices if (f := self.get(i)) is not None]
        if not found:
            keys = ", ".join(self.utterances[i].key for i in indices)
            raise RuntimeError(f"no utterance of this batch could be read ({keys}): {self.skips}")
        return found

    def pairs(self) -> Iterator[tuple[Utterance, T]]:
        """Utterances with their features; those whose audio fails are left out."""
        for index, utterance in enumerate(self.utterances):
            if (found := self.get(index)) is not None:
                yield utterance, found

    def __iter__(self) -> Iterator[T]:
        return (found for _, found in self.pairs())


def pad(sequences: Sequence[Any], multiple: int = 1, value: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Arrays [T, ...] as one array [B, T', ...] and lengths [B]; T' is rounded up to a multiple (fewer shapes for
    compiled kernels)."""
    lengths = np.array([len(s) for s in sequences])
    longest = -(-int(lengths.max()) // multiple) * multiple
    first = np.asarray(sequences[0])
    out = np.full((len(sequences), longest, *first.shape[1:]), value, dtype=first.dtype)
    for row, sequence in zip(out, sequences, strict=True):
        row[: len(sequence)] = sequence
    return out, lengths
