"""Lists on disk as sources of records: raw, shard and combine. The same record comes out of each.

A source has lines (a record of a raw list; a tar of a shard list; a jsonl with its tar of a combine list). `read` goes
through one line from any sample on, `read_one` fetches a single sample again by where it starts: that is all that
mixing, shuffling and resume need. Whoever wants a list's records, one after the other, reads
`open_source(list).records()`: this is the one way to read a record. Objects may be shared with worker processes: no
file offset is held across a fork.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, Any, NamedTuple

import numpy as np

from osum_echat.data import paths, tar
from osum_echat.data.config import ListType
from osum_echat.data.members import AUDIO, ONLY_META, from_members
from osum_echat.data.sampling import Share
from osum_echat.dialogue.record import Record, RecordError
from osum_echat.dialogue.tasks import find_task

log = logging.getLogger(__name__)

END = -1
"""``next_offset`` after the last item of a line."""
_MISSING = -2  # combine: groups are done, keys that the tar lacks are still to be told


@dataclass(slots=True)
class ListItem:
    """One sample as it lies on disk, undecoded.

    Attributes:
        line: line of the list; index: number of the sample within it; offset: byte where it starts.
        next_offset: byte where the next one starts, `END` after the last.
        source, number: file and line (from 1; 0 in a tar) to name in messages.
        fields: what `Record.from_dict` takes. None when there are only problems.
        name, members: key in the tar (a record may have another, see `convert`) and names of the members there.
        problems: why there is no record (several for the keys that a tar lacks). An item has fields or problems.
    """

    line: int
    index: int
    offset: int
    next_offset: int
    source: str
    number: int = 0
    fields: dict[str, Any] | None = None
    name: str = ""
    members: tuple[str, ...] = ()
    problems: list[RecordError] = field(default_factory=list)

    def record(self) -> Record:
        """The checked record. Raises RecordError."""
        if self.problems:
            raise self.problems[0]
        assert self.fields is not None, f"{self.source}: an item without fields or problems holds no record"
        return Record.from_dict(self.fields, self.source, self.number)


class Place(NamedTuple):
    """Where a record lies in a list, for `Source.at`: line of the list, byte in that line's file, number of the sample
    there."""

    line: int
    offset: int
    number: int


class Source(ABC):
    """A list of one form. ``name`` is its path, ``resolve`` finds the files that it names."""

    form: str

    def __init__(self, name: str) -> None:
        self.name = name
        self.resolve = paths.Resolver(name)

    @abstractmethod
    def __len__(self) -> int:
        """Lines of the list."""

    @abstractmethod
    def read(self, share: Share, offset: int = 0, index: int = 0, audio: bool = True) -> Iterator[ListItem]:
        """Items of a line, from the one that starts at ``offset`` and has number ``index``. Without ``audio``
        recordings in tars are passed over, and come as empty bytes."""

    def read_one(self, line: int, offset: int, index: int) -> ListItem:
        """The item at a place that `read` told before."""
        return next(self.read(Share(line), offset, index))

    def items(self) -> Iterator[ListItem]:
        """Everything, in the order of the list."""
        for line in range(len(self)):
            yield from self.read(Share(line))

    def records(self) -> Iterator[Record | RecordError]:
        """The records of the list, in its order, each checked and with its recordings found; why, in place of one that
        cannot be used."""
        for item in self.items():
            yield from item.problems
            if item.problems:
                continue
            try:
                yield self._found(item.record())
            except RecordError as error:
                yield error

    def places(self) -> Iterator[tuple[Place, str] | RecordError]:
        """Place and key of every record, in the order of the list, without reading a recording; why, in place of one
        that cannot be used."""
        for line in range(len(self)):
            for item in self.read(Share(line), audio=False):
                yield from item.problems
                if item.problems:
                    continue
                try:
                    yield Place(item.line, item.offset, item.index), item.record().key
                except RecordError as error:
                    yield error

    def at(self, places: Sequence[Place]) -> Iterator[Record | RecordError]:
        """The records at places that `places` told, as `records` gives them. Fast where the places of one line come
        together, in their order."""
        for line, group in itertools.groupby(places, key=lambda place: place.line):
            wanted = list(group)
            items = self.read(Share(line), wanted[0].offset, wanted[0].number)
            for place in wanted:
                item = next((item for item in items if item.index == place.number), None)
                try:
                    if item is None:
                        raise RecordError("moved", "the list was changed after its places were read", self.name, line + 1)
                    yield self._found(item.record())
                except RecordError as error:
                    yield error

    def _found(self, record: Record) -> Record:
        """The record with paths that can be opened. Raises RecordError for a recording that its task needs and that is
        not there."""
        history = tuple(replace(turn, wav=self._found_wav(record, turn.wav)) for turn in record.history)
        return replace(record, wav=self._found_wav(record, record.wav), history=history)

    def _found_wav(self, record: Record, wav: str | bytes | None) -> str | bytes | None:
        """The path of a recording, or its bytes (of one in a tar or at a URL)."""
        if not isinstance(wav, str):
            return wav
        try:
            path = self.resolve(wav)
            return paths.read_bytes(path) if paths.is_url(path) else path
        except OSError as error:
            if find_task(record.task).output.audio:
                raise record.error("audio_missing", str(error)) from error
            return wav


class RawSource(Source):
    """A jsonl list, a record a line, which names its recordings by path or URL."""

    form = "raw"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._data = paths.read_bytes(name) if paths.is_url(name) else b""
        data = self._data or _map(name)
        starts, ends = _line_spans(data)
        short = np.flatnonzero(ends - starts < 3)  # empty lines, and those of a carriage return alone
        blank = [i for i in short if not bytes(data[starts[i] : ends[i]]).strip()]
        self._numbers = np.delete(np.arange(1, len(starts) + 1), blank)
        self._starts, self._ends = np.delete(starts, blank), np.delete(ends, blank)
        self._file: tuple[int, IO[bytes]] | None = None
        if len(self._numbers):
            self._probe()

    def __len__(self) -> int:
        return len(self._numbers)

    def _probe(self) -> None:
        try:
            wav = _parse(self._line(0), self.name, 1).get("wav")
        except RecordError:  # told when the line is read
            return
        if isinstance(wav, str) and wav:
            self.resolve.probe(wav)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def _line(self, line: int) -> bytes:
        start, end = int(self._starts[line]), int(self._ends[line])
        if self._data:
            return self._data[start:end]
        if self._file is None or self._file[0] != os.getpid():  # a forked worker must not share an offset in a file
            self._file = (os.getpid(), open(self.name, "rb"))  # noqa: SIM115 - closed with this object
        self._file[1].seek(start)
        return self._file[1].read(end - start)

    def read(self, share: Share, offset: int = 0, index: int = 0, audio: bool = True) -> Iterator[ListItem]:
        if share.part or index:
            return
        number = int(self._numbers[share.line])
        item = ListItem(share.line, 0, 0, END, self.name, number)
        try:
            item.fields = _parse(self._line(share.line), self.name, number)
        except RecordError as error:
            item.problems = [error]
        yield item


class ShardSource(Source):
    """A text list of tars, or one tar; every sample is complete in its tar."""

    form = "shard"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._tars = [os.path.basename(name)] if _is_tar(name) else paths.read_lines(name)
        if self._tars:
            self.resolve.probe(self._tars[0])

    def __len__(self) -> int:
        return len(self._tars)

    def path(self, line: int) -> str:
        """The tar of a line, as it can be opened. Raises FileNotFoundError."""
        return self.resolve(self._tars[line])

    def read(self, share: Share, offset: int = 0, index: int = 0, audio: bool = True) -> Iterator[ListItem]:
        try:
            path = self.path(share.line)
            stream = paths.open_binary(path)
        except OSError as error:
            if share.part == 0:
                problem = RecordError("missing_file", str(error), self.name, share.line + 1)
                yield ListItem(share.line, index, offset, END, self.name, share.line + 1, problems=[problem])
            return
        with stream:
            for group in tar.groups(stream, offset, index, share.part, share.parts, () if audio else AUDIO):
                yield _shard_item(group, share.line, path)


def _shard_item(group: tar.TarSample, line: int, path: str) -> ListItem:
    item = ListItem(line, group.index, group.offset, group.next_offset, path, name=group.key, members=tuple(group.members))
    if group.damage is not None:
        item.problems = [RecordError(group.damage.reason, str(group.damage), path, 0, group.key)]
        return item
    try:
        item.fields = from_members(group.key, group.members, path)
    except RecordError as error:
        item.problems = [error]
    return item


class CombineSource(Source):
    """Pairs of a jsonl list and a tar of the same name: audio from the tar, everything else from the list, which people
    keep correcting.

    A line of the list names the jsonl; the tar lies in the folder that `combines_tar_root.txt` beside the list names. A
    line may also be ``<jsonl or ->|<tar>``.
    """

    form = "combine"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._lines = paths.read_lines(name)
        roots = paths.join(paths.folder(name), "combines_tar_root.txt")
        root_lines = paths.read_lines(roots) if paths.exists(roots) else []
        self._root = root_lines[0] if root_lines else None
        self._resolve_tar = paths.Resolver(roots if root_lines else name)
        if self._lines:
            with contextlib.suppress(FileNotFoundError):  # told when the line is read
                self.pair(0)
        self._read_labels: tuple[str, _Labels, list[RecordError]] | None = None

    def __len__(self) -> int:
        return len(self._lines)

    def pair(self, line: int) -> tuple[str | None, str]:
        """(jsonl or None, tar) of a line, as they can be opened. Raises FileNotFoundError."""
        text = self._lines[line]
        if "|" in text:
            side, _, archive = (part.strip() for part in text.partition("|"))
            return (None if side == "-" else self.resolve(side)), self.resolve(archive)
        side = self.resolve(text)
        stem = os.path.splitext(os.path.basename(side))[0]
        root = self._root if self._root is not None else paths.folder(side)
        return side, self._resolve_tar(paths.join(root, f"{stem}.tar"))

    def _labels(self, side: str | None) -> tuple[_Labels, list[RecordError]]:
        """The labels of a jsonl; the last one read is kept, since single samples of one tar are often fetched in a
        row."""
        if side is None:
            return {}, []
        if self._read_labels is None or self._read_labels[0] != side:
            self._read_labels = (side, *_read_labels(side))
        return self._read_labels[1], list(self._read_labels[2])

    def read(self, share: Share, offset: int = 0, index: int = 0, audio: bool = True) -> Iterator[ListItem]:
        try:
            side, archive = self.pair(share.line)
            labels, faults = self._labels(side)
            stream = paths.open_binary(archive)
        except OSError as error:
            if share.part == 0:
                problem = RecordError("missing_file", str(error), self.name, share.line + 1)
                yield ListItem(share.line, index, offset, END, self.name, share.line + 1, problems=[problem])
            return
        tells_missing = share.part == 0 and side is not None
        with stream:
            for group in (
                tar.groups(stream, offset, index, share.part, share.parts, () if audio else AUDIO) if offset != _MISSING else ()
            ):
                if group.next_offset == END and tells_missing:
                    group.next_offset = _MISSING
                index = group.index + 1
                yield _joined(group, share.line, archive, side, labels)
        if tells_missing:
            assert side is not None
            present = _keys(archive)
            absent = [key for key in labels if key not in present]
            faults += [RecordError("missing_in_tar", f"{archive} has no such key", side, labels[key][0], key) for key in absent]
            if faults:
                yield ListItem(share.line, index, _MISSING, END, side, problems=faults)


_Labels = dict[str, tuple[int, dict[str, Any]]]  # by key: line number, record


def _joined(group: tar.TarSample, line: int, archive: str, side: str | None, labels: _Labels) -> ListItem:
    """A group of a tar with the fields that the list has for it. What the list says wins; audio is the tar's."""
    item = _shard_item(group, line, archive)
    if side is None or item.problems:
        return item
    assert item.fields is not None
    if group.key not in labels:
        item.problems = [RecordError("not_in_list", f"{side} has no line for it", archive, 0, group.key)]
        return item
    item.source = side
    item.number, label = labels[group.key]
    tars = item.fields
    if "tas_tag" in label:  # the misspelt task of the published list is meant to replace the tar's
        tars.pop("task", None)
    if label.get("tar_path_key") == os.path.splitext(os.path.basename(archive))[0] and "tar_path_key" not in tars:
        # About the set, not about the sample.
        label = {name: value for name, value in label.items() if name != "tar_path_key"}
    audio = {name: value for name, value in tars.items() if isinstance(value, bytes)}
    item.fields = {**tars, **label, **audio, "key": tars["key"]}
    if item.fields.get("wav") == ONLY_META:
        del item.fields["wav"]
    return item


def _parse(line: bytes, source: str, number: int) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise RecordError("bad_json", f"not valid JSON: {error}", source, number) from error
    if not isinstance(data, dict):
        raise RecordError("bad_record", f"expected an object, found {type(data).__name__}", source, number)
    return data


def _read_labels(side: str) -> tuple[_Labels, list[RecordError]]:
    """Records of a jsonl by key, and what is wrong with other lines. Of several lines with one key the last holds."""
    labels: _Labels = {}
    faults: list[RecordError] = []
    for number, line in enumerate(paths.read_bytes(side).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            label = _parse(line, side, number)
        except RecordError as error:
            faults.append(error)
            continue
        key = label.get("key")
        if not isinstance(key, (str, int)) or key == "":
            faults.append(RecordError("missing_key", f"field 'key' must be a text, found {key!r}", side, number))
        else:
            if str(key) in labels:
                faults.append(
                    RecordError("replaced_line", f"line {number} has the same key and holds", side, labels[str(key)][0], str(key))
                )
            labels[str(key)] = (number, label)
    return labels, faults


def _keys(archive: str) -> set[str]:
    """Keys of a tar, from its headers alone; of a damaged one, those that can be read."""
    keys: set[str] = set()
    with paths.open_binary(archive) as stream:
        reader = tar.TarStream(stream)
        while True:
            try:
                header = reader.next()
            except tar.TarDamage as damage:
                if damage.reason == "truncated_tar" or not reader.resync(damage.offset):
                    return keys
                continue
            if header is None:
                return keys
            keys.add(tar.split_name(header.name)[0])


def _map(name: str) -> Any:
    """A local file's bytes, mapped. Raises ValueError when it is not there."""
    try:
        return np.memmap(name, dtype=np.uint8, mode="r") if os.path.getsize(name) else np.zeros(0, np.uint8)
    except FileNotFoundError as error:
        raise ValueError(f"list not found: {name} (seen from {os.getcwd()})") from error


def _line_spans(data: Any) -> tuple[np.ndarray, np.ndarray]:
    """First byte and end of each line, without a byte order mark at the start."""
    array = np.frombuffer(data, dtype=np.uint8)
    step = 1 << 26  # a piece at a time: the mask of a list of gigabytes is as large as the list
    found = [np.flatnonzero(array[i : i + step] == ord("\n")) + i for i in range(0, len(array), step)]
    breaks = np.concatenate(found).astype(np.int64) if found else np.zeros(0, np.int64)
    ends = np.append(breaks, len(array)) if not len(breaks) or breaks[-1] != len(array) - 1 else breaks
    starts = np.concatenate([[0], breaks + 1])[: len(ends)].astype(np.int64)
    if len(array) >= 3 and bytes(array[:3]) == b"\xef\xbb\xbf":
        starts[0] = 3
    if not len(array):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return starts, ends.astype(np.int64)


def open_source(name: str, kind: ListType = "auto") -> Source:
    """The list at ``name`` (a path or URL), or a single tar.

    ``auto`` finds the form by itself: a list whose first line is JSON is raw; one that names tars is a shard list; one
    that names record lists (or is called ``combines_list...``) is a combine list. ``shard`` means tars, combined or
    not. Raises ValueError when the list is not there or empty.
    """
    form = "raw" if kind == "raw" else _form(name)
    if kind == "shard" and form == "raw":
        form = "shard"
    source: Source
    source = RawSource(name) if form == "raw" else CombineSource(name) if form == "combine" else ShardSource(name)
    if len(source) == 0:
        raise ValueError(f"{name} is an empty list")
    return source


def _form(name: str) -> str:
    if "combines_list" in os.path.basename(name):
        return "combine"
    if _is_tar(name):
        return "shard"
    try:
        with paths.open_binary(name) as stream:
            start = stream.read(1 << 12).removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError as error:
        raise ValueError(f"list not found: {name} (seen from {os.getcwd()})") from error
    lines = [line.strip() for line in start.decode("utf-8", "replace").split("\n")]
    first = next((line for line in lines if line and not line.startswith("#")), "")
    if first.startswith("{"):
        return "raw"
    return "combine" if "|" in first or first.endswith((".list", ".jsonl", ".json")) else "shard"


def _is_tar(name: str) -> bool:
    return name.endswith((".tar", ".tar.gz", ".tar.bz2", ".tar.xz"))
