"""Items of the empathy suite from any labelled list.

EChat-eval tests one label at a time and several together (arXiv 2508.09600). So each labelled recording becomes one
item for each of its labels, in the group of that label and with that label alone, and one item of group ``multi`` with
all of them when there are two or more. Labels that call for nothing (a neutral emotion, no event) make no item of their
own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from osum_echat.evaluation.items import Entry, Item

MULTI = "multi"
MADE_OF = "made_of"
"""Field in ``extra``: id of the recording that an item was made of; an answer with that id is an answer to all of its
items."""
NOTHING = {"emotion": {"neutral", "other"}, "event": {"none"}}


def by_label(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The items of one labelled set. An item that has a group already was made before and passes as it is; one without
    a label is a fault."""
    for entry in entries:
        if not isinstance(entry, Item) or entry.group:
            yield entry
            continue
        telling = {kind: label for kind, label in entry.labels.items() if label not in NOTHING.get(kind, ())}
        if not telling:
            yield entry.error("no_label", "no label that could shape an answer (emotion, age, gender, event)")
            continue
        for kind, label in telling.items():
            yield _of(entry, kind, {kind: label})
        if len(telling) > 1:
            yield _of(entry, MULTI, telling)


def _of(entry: Item, group: str, labels: dict[str, str]) -> Item:
    return dataclasses.replace(
        entry, id=f"{entry.id}/{group}", labels=labels, group=group, extra={**entry.extra, MADE_OF: entry.id}
    )


def write_items(path: Path, entries: Sequence[Entry]) -> tuple[int, int]:
    """Write items as one jsonl file; recordings that came as bytes become files beside it. Returns (items, entries left
    out)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written: dict[int, str] = {}
    items = [entry for entry in entries if isinstance(entry, Item)]
    with path.open("w", encoding="utf-8") as out:
        for item in items:
            if isinstance(item.wav, bytes):
                if id(item.wav) not in written:
                    name = f"{path.stem}_audio/{quote(item.id.rpartition('/')[0] or item.id, safe='')}{_suffix(item.wav)}"
                    (path.parent / name).parent.mkdir(exist_ok=True)
                    (path.parent / name).write_bytes(item.wav)
                    written[id(item.wav)] = name
                item = dataclasses.replace(item, wav=written[id(item.wav)])
            out.write(json.dumps(item.to_dict(), ensure_ascii=False) + "\n")
    return len(items), len(entries) - len(items)


def _suffix(data: bytes) -> str:
    for magic, suffix in ((b"RIFF", ".wav"), (b"OggS", ".ogg"), (b"fLaC", ".flac"), (b"ID3", ".mp3")):
        if data.startswith(magic):
            return suffix
    return ".audio"
