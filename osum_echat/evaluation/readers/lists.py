"""This project's own lists in every form, single tars, and items files."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from osum_echat.data import paths
from osum_echat.data.sources import open_source
from osum_echat.dialogue.record import Record, RecordError
from osum_echat.dialogue.tasks import find_task
from osum_echat.evaluation.items import Entry, Item, ItemError, item_from, labels_of, place_in_dialogue, read_lines

_MARKS = {"<EMOTION>": "emotion", "<AGE>": "age", "<GENDER>": "gender", "<CAPTION>": "event"}
_WRITTEN_AS = {"emotion": ("emotion", "q_emotion"), "age": ("age",), "gender": ("gender",), "event": ("event", "caption")}


def read_list(path: str) -> Iterator[Entry]:
    """Items of a raw, shard or combine list, or of one tar."""
    resolve = paths.Resolver(path)
    for record in open_source(path).records():
        yield _fault(record) if isinstance(record, RecordError) else _checked(item_of(record), resolve)


def _fault(error: RecordError) -> ItemError:
    return ItemError(error.reason, error.detail, error.source, error.line, error.key)


def _checked(item: Item, resolve: paths.Resolver) -> Entry:
    """The item with what its ``extra`` names: its place in a conversation, and the voice to copy (``prompt_wav``,
    ``prompt_text``)."""
    replies, prompt = item.extra.get("replies"), item.extra.get("prompt_wav")
    try:
        if replies is not None and not isinstance(replies, list):
            raise ValueError(f"field 'replies' must be a list, found {replies!r:.60}")
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(f"field 'prompt_wav' must be a text, found {prompt!r:.60}")
        dialogue_id, turn = place_in_dialogue(item.extra)
        voice = resolve(prompt) if prompt else None
    except FileNotFoundError as error:
        return item.error("missing_file", f"prompt_wav: {error}")
    except ValueError as error:
        return item.error("bad_field", str(error))
    said = str(item.extra.get("prompt_text") or "")
    return dataclasses.replace(item, dialogue_id=dialogue_id, turn=turn, prompt_wav=voice, prompt_text=said)


def item_of(record: Record) -> Item:
    """A record as an item: what is said, how, and which replies fit.

    In records of dialogue ``txt`` is the reply, what is said stands in ``extra`` (``q_txt``, ``question``). In those of
    understanding ``txt`` is the words and the tags that the task asks for. An ``answer`` in ``extra`` is the item's.
    """
    extra: dict[str, Any] = dict(record.extra)
    known: dict[str, Any] = {"emotion": record.emotion, "gender": record.gender}
    for kind, names in _WRITTEN_AS.items():
        known[kind] = next((extra[name] for name in names if extra.get(name)), known.get(kind))
    output = find_task(record.task).output
    said = extra.get("q_txt") or extra.get("question")
    if output.name == "text" and record.wav is not None:
        words, tags = _words_and_tags(record)
        known = {**known, **tags}
        said = said or words
    elif output.reply_text and (output.audio or output.instruction) and said:
        extra.setdefault("reference_reply", record.txt)
    answer, replies = extra.pop("answer", None), extra.get("replies")
    return Item(
        id=record.key,
        text=str(said or record.txt),
        wav=record.wav,
        labels=labels_of(known),
        replies=tuple(map(str, replies)) if isinstance(replies, list) else (),
        answer=None if answer is None else str(answer),
        extra={**extra, **({"lang": record.lang} if record.lang else {})},
        start=record.start,
        end=record.end,
        source=record.source,
        line=record.line,
    )


def _words_and_tags(record: Record) -> tuple[str, dict[str, str]]:
    """``words <HAPPY>`` of a task ``<TRANSCRIBE> <EMOTION>`` apart. Marks of the task that are no label (style) are
    passed over."""
    marks = [mark for mark in record.task.split() if mark != "<TRANSCRIBE>"]
    words, tags = record.txt, list[str]()
    while words.rstrip().endswith(">") and "<" in words and len(tags) < len(marks):
        words, _, tag = words.rstrip().rpartition("<")
        tags.insert(0, tag.rstrip(">"))
    if len(tags) != len(marks):
        return record.txt, {}
    return words.strip(), {_MARKS[mark]: tag for mark, tag in zip(marks, tags, strict=True) if mark in _MARKS}


def read_items(path: str) -> Iterator[Entry]:
    """Items as `items.Item` writes them; recordings are found as those of lists are."""
    resolve = paths.Resolver(path)
    for number, value in read_lines(Path(path)):
        if isinstance(value, ItemError):
            yield value
            continue
        try:
            for name in ("wav", "prompt_wav"):
                if isinstance(value.get(name), str) and value[name]:
                    value[name] = resolve(value[name])
            yield item_from(value, path, number)
        except ItemError as error:
            yield error
        except FileNotFoundError as error:
            yield ItemError("missing_file", str(error), path, number, str(value.get("id", "")))


def write_tar(path: Path, items: Sequence[Item]) -> None:
    """Write items as one gzipped tar (audio given as bytes of an ogg file). The same items give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("wb") as file,
        gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for item in items:
            extra = json.dumps(_extra(item), ensure_ascii=False).encode()
            members = [(f"{item.id}.txt", item.text.encode()), (f"{item.id}.extra", extra)]
            if isinstance(item.wav, bytes):
                members.append((f"{item.id}.ogg", item.wav))
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def _extra(item: Item) -> dict[str, Any]:
    """What `read_list` reads out of ``extra`` again."""
    out = dict(item.extra) | ({"answer": item.answer} if item.answer is not None else {})
    return out | ({"dialogue_id": item.dialogue_id, "turn": item.turn} if item.dialogue_id else {})
