"""Test sets: recordings with what was said, how, and which answers fit.

A set is a raw list (``*.jsonl``) or one tar of the shard form (``<key>.ogg|wav|flac``, ``.txt``, ``.extra``), plain or gzipped, so that a
set is one file that travels. Fields used: ``txt`` (the words, or the text to say), ``extra``: age, gender, emotion, event, topic, replies (answers that fit,
when a rule says so).
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TAGS = ("gender", "age", "emotion", "event")
_AUDIO = {".ogg", ".wav", ".flac", ".opus"}


@dataclass(frozen=True)
class Item:
    """One test recording (or a text to say: ``wav`` None)."""

    key: str
    txt: str
    wav: str | bytes | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    replies: Sequence[str] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


def read_set(path: str | Path, limit: int | None = None) -> list[Item]:
    """Items of a list or tar, in their order. Raises ValueError for a file that is missing or holds none."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"test set not found: {path}")
    records = _from_tar(path) if ".tar" in path.suffixes else _from_list(path)
    items = [_item(record) for record in records[:limit]]
    if not items:
        raise ValueError(f"test set {path} holds no record")
    return items


def _item(record: Mapping[str, Any]) -> Item:
    extra = record.get("extra") or {}
    tags = {name: str(extra[name]).strip("<>") for name in TAGS if extra.get(name) is not None}
    return Item(record["key"], record["txt"], record.get("wav"), tags, tuple(extra.get("replies", ())), extra)


def _from_list(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for record in records:  # as in data lists: relative to the list when it is there, else to where we are
        wav = record.get("wav")
        if isinstance(wav, str) and (path.parent / wav).exists():
            record["wav"] = str(path.parent / wav)
    return records


def _from_tar(path: Path) -> list[dict[str, Any]]:
    records: dict[str, dict[str, Any]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            source = archive.extractfile(member)
            if source is None:
                continue
            key, _, kind = member.name.rpartition(".")
            record = records.setdefault(key, {"key": key, "txt": ""})
            data = source.read()
            if f".{kind}" in _AUDIO:
                record["wav"] = data
            elif kind == "extra":
                record["extra"] = json.loads(data)
            else:
                record[kind] = data.decode("utf-8")
    return list(records.values())


def write_tar(path: Path, items: Sequence[Item]) -> None:
    """Write items as one gzipped tar (audio given as bytes of an ogg file). The same items give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("wb") as file,
        gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for item in items:
            extra = json.dumps(dict(item.extra), ensure_ascii=False).encode()
            members = [(f"{item.key}.txt", item.txt.encode()), (f"{item.key}.extra", extra)]
            if isinstance(item.wav, bytes):
                members.append((f"{item.key}.ogg", item.wav))
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
