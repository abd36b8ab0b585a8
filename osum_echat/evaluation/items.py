"""An item: one thing that a system is asked in an evaluation, with what is known of the right answer.

    {"id": "a1", "wav": "wav/a1.wav", "text": "i lost my dog", "labels": {"emotion": "sad"}, "group": "emotion"}

The same form serves every suite. `readers` make items from lists and public sets; a file of such lines is itself a form
of data ("items").
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from osum_echat.audio import io as audio_io
from osum_echat.evaluation.labels import KINDS, canonical


class ItemError(ValueError):
    """An entry that cannot be used; the message names file and line. ``reason`` is a short name to count by."""

    def __init__(self, reason: str, detail: str, source: str = "", line: int = 0, id: str = "") -> None:
        place = f"{source}:{line}" if line else source
        super().__init__(": ".join(part for part in (place, f"id {id!r}" if id else "", detail) if part))
        self.reason, self.source, self.line, self.id = reason, source, line, id


@dataclass(frozen=True)
class Item:
    """One item.

    Attributes:
        id: unique in its set. wav: the recording that the system hears: a path, the bytes of a file, or None for a
            written task.
        text: what is said in the recording, or the question or text to say.
        labels: what is known of how it is said, by kind (`labels.KINDS`), in canonical names.
        group: the part of the set that it belongs to (a benchmark's subset, the label that it tests).
        replies: answers that a rule allows. answer: the right answer (multiple choice: its letter).
        prompt_wav, prompt_text: the voice to copy (speech suites).
        extra: further fields, as they were written. source, line: where it was read.
        start, end: the part of ``wav`` to hear, seconds.
        dialogue_id, turn: which conversation it belongs to, and its place there, counted from 1; the turns before it
            stand in front when it is asked. An empty ``dialogue_id``: it stands by itself.
    """

    id: str
    text: str = ""
    wav: str | bytes | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    group: str = ""
    replies: tuple[str, ...] = ()
    answer: str | None = None
    prompt_wav: str | None = None
    prompt_text: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    start: float | None = None
    end: float | None = None
    dialogue_id: str = ""
    turn: int = 1
    source: str = ""
    line: int = 0

    def error(self, reason: str, detail: str) -> ItemError:
        return ItemError(reason, detail, self.source, self.line, self.id)

    def has(self, need: str) -> bool:
        """Whether a field that a suite needs is there: ``wav``, ``text``, ``label.emotion``, ``extra.NAME`` and so
        on."""
        kind, _, name = need.partition(".")
        if kind == "label":
            return name in self.labels
        if kind == "extra":
            return self.extra.get(name) is not None
        return bool(getattr(self, need))

    def recording(self) -> Any:
        """What a pipeline can hear. Raises ItemError without one, AudioError for a segment that is not there."""
        if self.wav is None:
            raise self.error("no_recording", "there is no recording")
        if self.start is None and self.end is None:
            return self.wav
        audio = audio_io.read(self.wav, self.start, self.end)
        return (audio.mono(), audio.rate)

    def to_dict(self) -> dict[str, Any]:
        """As it is written; a recording in bytes is left out."""
        out: dict[str, Any] = {"id": self.id, "text": self.text}
        if isinstance(self.wav, str):
            out["wav"] = self.wav
        for name in ("group", "answer", "prompt_wav", "prompt_text", "start", "end"):
            if getattr(self, name):
                out[name] = getattr(self, name)
        for name in ("labels", "extra"):
            if getattr(self, name):
                out[name] = dict(getattr(self, name))
        if self.dialogue_id:
            out |= {"dialogue_id": self.dialogue_id, "turn": self.turn}
        return out | ({"replies": list(self.replies)} if self.replies else {})


Entry: TypeAlias = Item | ItemError
"""What readers give: an item, or what was wrong with the entry that should have been one."""


def labels_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Labels among ``values`` (other fields are ignored), in canonical names."""
    return {kind: canonical(kind, values[kind]) for kind in KINDS if values.get(kind) not in (None, "", "<&&>")}


_FIELDS = frozenset(Item.__dataclass_fields__) - {"source", "line"}


def place_in_dialogue(values: Mapping[str, Any]) -> tuple[str, int]:
    """``dialogue_id`` and ``turn`` of an entry. Raises ValueError for a turn that is no number from 1 on."""
    named = values.get("dialogue_id")
    if named in (None, ""):
        return "", 1
    turn = values.get("turn", 1)
    if isinstance(turn, bool) or not str(turn).isdecimal() or int(turn) < 1:
        raise ValueError(f"field 'turn' must be a number from 1 on, found {turn!r}")
    return str(named), int(turn)


def item_from(data: Any, source: str = "", line: int = 0) -> Item:
    """Read a line of an items file. Raises ItemError."""
    if not isinstance(data, dict):
        raise ItemError("bad_item", f"expected an object, found {type(data).__name__}", source, line)
    id = data.get("id")
    if not isinstance(id, (str, int)) or isinstance(id, bool) or id == "":
        raise ItemError("missing_id", f"field 'id' must be a text, found {id!r}", source, line)
    for name, kind in (("text", str), ("wav", str), ("labels", dict), ("replies", list), ("extra", dict), ("prompt_wav", str)):
        if data.get(name) is not None and not isinstance(data[name], kind):
            raise ItemError(
                "bad_field", f"field {name!r} must be {kind.__name__}, found {data[name]!r:.60}", source, line, str(id)
            )
    unknown = {name: value for name, value in data.items() if name not in _FIELDS}
    try:
        dialogue_id, turn = place_in_dialogue(data)
    except ValueError as error:
        raise ItemError("bad_field", str(error), source, line, str(id)) from error
    return Item(
        id=str(id),
        text=data.get("text") or "",
        wav=data.get("wav") or None,
        labels=labels_of(data.get("labels") or {}),
        group=str(data.get("group") or ""),
        replies=tuple(map(str, data.get("replies") or ())),
        answer=None if data.get("answer") is None else str(data["answer"]),
        prompt_wav=data.get("prompt_wav"),
        prompt_text=str(data.get("prompt_text") or ""),
        extra={**(data.get("extra") or {}), **unknown},
        start=data.get("start"),
        end=data.get("end"),
        dialogue_id=dialogue_id,
        turn=turn,
        source=source,
        line=line,
    )


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | ItemError]]:
    """Objects of a jsonl file with their line numbers; a line that is no object is an ItemError. Raises ValueError
    without the file."""
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, parse_constant=_no_number)
        except ValueError as error:
            yield number, ItemError("bad_json", f"not valid JSON: {error}", str(path), number)
            continue
        if isinstance(value, dict):
            yield number, value
        else:
            yield number, ItemError("bad_item", f"expected an object, found {type(value).__name__}", str(path), number)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")
