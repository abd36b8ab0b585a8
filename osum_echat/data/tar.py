"""Tar archives as streams of samples: members ``<key>.<field>``, contiguous per key.

Python's `tarfile` needs several times longer for a header than for the audio behind it, cannot start in the middle and
cannot go on after damage; the few rules that matter (ustar, GNU long names, pax path and size, base-256 sizes,
checksums) stand here instead. Writing is left to `tarfile`, with everything that differs between machines set to zero.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import IO

BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")
_ZERO = bytes(BLOCK)


class TarDamage(ValueError):
    """The archive cannot be read on from ``offset``; ``reason`` is ``truncated_tar`` or ``corrupt_tar``."""

    def __init__(self, reason: str, offset: int, detail: str) -> None:
        super().__init__(f"{detail} at byte {offset}")
        self.reason, self.offset = reason, offset


@dataclass(slots=True)
class Header:
    """One member: its name, the byte where its header (long-name headers included) starts, and where its data lie."""

    name: str
    offset: int
    data_offset: int
    size: int


@dataclass(slots=True)
class TarSample:
    """The members of one key.

    Attributes:
        index: number of the group in its archive.
        offset: byte of its first header; reading can start there.
        next_offset: byte where the next group starts, -1 at the archive's end.
        members: data by field name; empty for groups that were not wanted.
        damage: why it cannot be used, when the archive is damaged inside it.
    """

    key: str
    index: int
    offset: int
    next_offset: int = 0
    members: dict[str, bytes] = field(default_factory=dict)
    damage: TarDamage | None = None


def _number(raw: bytes) -> int:
    if raw[0] & 0x80:  # base 256, for sizes beyond 8 GiB
        return int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
    text = raw.split(b"\0", 1)[0].strip()
    return int(text, 8) if text else 0


def valid_header(block: bytes) -> bool:
    """Whether 512 bytes are a tar header: the checksum fits (signed sums of old archives included)."""
    try:
        stated = _number(block[148:156])
    except ValueError:
        return False
    outside = block[:148] + block[156:]
    return stated == sum(outside) + 256 or stated == sum(b - 256 if b > 127 else b for b in outside) + 256


class TarStream:
    """Reads headers and data forward, from any header's offset.

    Args:
        stream: a binary stream; seeking is used where it can be, else bytes are read and thrown away.
        offset: byte of the header to start at.
    """

    def __init__(self, stream: IO[bytes], offset: int = 0) -> None:
        self._stream = stream
        self._position = 0
        self._next = offset

    def _goto(self, offset: int) -> None:
        gap = offset - self._position
        if gap == 0:
            return
        if 0 < gap <= BLOCK * 4 or not self._stream.seekable():
            assert gap > 0, f"cannot go back from {self._position} to {offset} in a stream"
            while gap > 0:
                data = self._stream.read(min(gap, 1 << 20))
                if not data:
                    break
                gap -= len(data)
        else:
            self._stream.seek(offset)
        self._position = offset

    def _read(self, size: int, what: str) -> bytes:
        data = self._stream.read(size)
        start, self._position = self._position, self._position + len(data)
        while len(data) < size:  # remote streams may give less than asked
            more = self._stream.read(size - len(data))
            if not more:
                raise TarDamage("truncated_tar", start, f"the archive ends inside {what}")
            self._position += len(more)
            data += more
        return data

    def next(self) -> Header | None:
        """The next regular member, None at the end. Raises TarDamage."""
        start, long_name, long_size = self._next, None, None
        while True:
            self._goto(self._next)
            at = self._next
            block = self._stream.read(BLOCK)
            self._position += len(block)
            if not block:
                raise TarDamage("truncated_tar", at, "the archive has no end mark")
            if len(block) < BLOCK:
                if not block.strip(b"\0"):
                    return None
                raise TarDamage("truncated_tar", at, "the archive ends inside a header")
            if block == _ZERO:
                return None
            if not valid_header(block):
                raise TarDamage("corrupt_tar", at, "a header has a wrong checksum")
            kind, size = block[156:157], _number(block[124:136])
            data_offset = at + BLOCK
            if kind in (b"L", b"x"):  # the next header's name (GNU), or its attributes (pax)
                data = self._read(size, "a long name")
                if kind == b"L":
                    long_name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
                else:
                    pax = _pax(data)
                    long_name = pax.get("path", long_name)
                    long_size = int(pax["size"]) if "size" in pax else long_size
                self._next = data_offset + -(-size // BLOCK) * BLOCK
                continue
            size = long_size if long_size is not None else size
            self._next = data_offset + -(-size // BLOCK) * BLOCK
            if kind in _REGULAR:
                return Header(long_name or _name(block), start, data_offset, size)
            start, long_name, long_size = self._next, None, None  # a folder or a link

    def data(self, header: Header) -> bytes:
        """The bytes of a member. Raises TarDamage when the archive ends before."""
        self._goto(header.data_offset)
        return self._read(header.size, header.name)

    @property
    def next_offset(self) -> int:
        """Byte where the next header should be."""
        return self._next

    def resync(self, offset: int) -> bool:
        """After damage at ``offset``: go on at the next valid header behind it; False when there is none."""
        at = offset + BLOCK
        self._goto(at)
        while True:
            block = self._stream.read(BLOCK)
            self._position += len(block)
            if len(block) < BLOCK:
                return False
            if block[257:262] == b"ustar" and valid_header(block):
                self._next = at
                return True
            at += BLOCK


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0":  # POSIX: long names are split in two
        prefix = block[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> dict[str, str]:
    out: dict[str, str] = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or int(length) < 1:
            break
        entry, data = data[: int(length)], data[int(length) :]
        key, _, value = entry[len(length) + 1 :].rstrip(b"\n").partition(b"=")
        out[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    return out


def split_name(name: str) -> tuple[str, str]:
    """``dir/a.b.wav`` as key ``dir/a.b`` and field ``wav``: the last dot divides."""
    key, _, kind = name.removeprefix("./").rpartition(".")
    return key, kind


def groups(
    stream: IO[bytes], offset: int = 0, index: int = 0, part: int = 0, parts: int = 1, without: Container[str] = ()
) -> Iterator[TarSample]:
    """Samples of an archive, in order.

    Args:
        offset, index: where to start: the ``next_offset`` of a group, and its number plus one.
        part, parts: only groups whose number is ``part`` modulo ``parts`` are read; the bytes of the others are
            skipped.
        without: fields (``wav``, also of past turns: ``wav_1``) whose bytes are skipped, too; they come empty.

    A group that damage touches is yielded with ``damage`` set: it may lack members. Damage between two groups touches
    both, since the lost header may belong to either. Reading goes on at the next header that can be read. An archive
    that is damaged from its first byte on yields one group with an empty key.
    """
    tar = TarStream(stream, offset)
    group: TarSample | None = None
    suspect: TarDamage | None = None  # damage just before the next header
    while True:
        try:
            header = tar.next()
            if header is None:
                break
            key, name = split_name(header.name)
            if group is None or key != group.key:
                if group is not None:
                    # Reading on from here must meet the damage again, to find the group behind it suspect.
                    group.next_offset, index = (suspect or header).offset, group.index + 1
                    if group.index % parts == part:
                        yield group
                group = TarSample(key, index, header.offset, damage=suspect)
            suspect = None
            if group.index % parts == part:
                group.members[name] = b"" if name.split("_", 1)[0] in without else tar.data(header)
        except TarDamage as damage:
            suspect = damage
            if group is not None:
                group.damage = damage
            if damage.reason == "truncated_tar" or not tar.resync(damage.offset):
                group = group or TarSample("", index, damage.offset, damage=damage)
                break
    if group is not None and group.index % parts == part:
        group.next_offset = -1
        yield group


class TarWriter:
    """Writes samples; the same samples give the same bytes on every machine (no time, owner or mode of the day)."""

    def __init__(self, path: str) -> None:
        self._tar = tarfile.open(path, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115 - closed by close()

    def add(self, key: str, members: dict[str, bytes]) -> None:
        """Append a sample; fields in the order of their names."""
        for name in sorted(members):
            info = tarfile.TarInfo(f"{key}.{name}")
            info.size, info.mode = len(members[name]), 0o644
            self._tar.addfile(info, io.BytesIO(members[name]))

    def close(self) -> None:
        self._tar.close()

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
