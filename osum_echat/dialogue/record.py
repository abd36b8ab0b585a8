"""One line of a data list: the record, the same for raw lists, tars and combined sets, checked once when it is read.

    {"key": "a1", "wav": "wav/a1.wav", "txt": "...", "task": "<TRANSCRIBE>", "extra": {"age": "<ADULT>", "speech_token": [1, 2]}}

Past turns of a dialogue are ``wav_1, txt_1, wav_2, txt_2 ...`` (as tar members are named), their speech
``extra.speech_token_1`` ...
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DEFAULT_TASK = "<TRANSCRIBE>"
_TEXT_FIELDS = ("lang", "speaker", "emotion", "gender")
_TASK_MISSPELT = "tas_tag"  # in the published combine list


class RecordError(ValueError):
    """A record that cannot be used. ``reason`` is a short name to count by; the message names file, line and key."""

    def __init__(self, reason: str, detail: str, source: str = "", line: int = 0, key: str = "") -> None:
        place = f"{source}:{line}" if line else source
        super().__init__(": ".join(part for part in (place, f"key {key!r}" if key else "", detail) if part))
        self.reason, self.detail, self.source, self.line, self.key = reason, detail, source, line, key


@dataclass(frozen=True)
class Turn:
    """A past exchange: the user's recording (path or bytes), the reply as text and as speech codes."""

    wav: str | bytes | None
    txt: str = ""
    speech_token: tuple[int, ...] = ()


@dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
        wav: path or URL of the recording, its bytes (from a tar), or None for tasks on text alone.
        extra: further fields as they were written (speech codes too; see `speech_token`).
        start, end: seconds; the part of the recording to use.
        history: past turns, oldest first.
        source, line: where it was read, for messages.
        notes: what was assumed while reading, for warnings.
    """

    key: str
    wav: str | bytes | None = None
    txt: str = ""
    task: str = DEFAULT_TASK
    extra: Mapping[str, Any] = field(default_factory=dict)
    start: float | None = None
    end: float | None = None
    lang: str | None = None
    speaker: str | None = None
    emotion: str | None = None
    gender: str | None = None
    history: tuple[Turn, ...] = ()
    source: str = ""
    line: int = 0
    notes: tuple[str, ...] = ()

    @property
    def speech_token(self) -> tuple[int, ...]:
        """Speech codes of the reply; empty when there are none."""
        return self._codes("speech_token")

    @property
    def word_lengths(self) -> tuple[int, ...]:
        """How many speech codes each word of the reply has (`interleave.split_words`); empty when not known."""
        return self._codes("word_lengths")

    def _codes(self, name: str) -> tuple[int, ...]:
        return parse_codes(self.extra.get(name), name, self.source, self.line, self.key)

    def error(self, reason: str, detail: str) -> RecordError:
        """A `RecordError` about this record."""
        return RecordError(reason, detail, self.source, self.line, self.key)

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "", line: int = 0) -> Record:
        """Read one line of a list. Raises RecordError."""
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RecordError("bad_json", f"not valid JSON: {error}", source, line) from error
        return cls.from_dict(data, source, line)

    @classmethod
    def from_dict(cls, data: Any, source: str = "", line: int = 0) -> Record:
        """Check ``data`` (wav values may be bytes). Raises RecordError for a missing or wrong field; unknown fields are
        kept in extra."""
        if not isinstance(data, Mapping):
            raise RecordError("bad_record", f"expected an object, found {type(data).__name__}", source, line)
        key = data.get("key")
        if not isinstance(key, (str, int)) or isinstance(key, bool) or key == "":
            raise RecordError("missing_key", f"field 'key' must be a text, found {key!r}", source, line)
        key = str(key)

        def text(name: str, default: str | None) -> str | None:
            value = data.get(name)
            if value is None:
                return default
            if not isinstance(value, str):
                raise RecordError("bad_field", f"field {name!r} must be a text, found {value!r}", source, line, key)
            return value

        notes: list[str] = []
        task = text("task", None)
        if task is None and _TASK_MISSPELT in data:
            task = text(_TASK_MISSPELT, None)
            notes.append(f"field {_TASK_MISSPELT!r} read as 'task'")
        extra = _extra(data, source, line, key)
        history, gap = _history(data, extra, source, line, key)
        if gap:
            notes.append(f"past turn {gap} is missing, so the dialogue is read without its past")
        record = cls(
            key=key,
            wav=_wav(data.get("wav"), "wav", source, line, key),
            txt=text("txt", "") or "",
            task=DEFAULT_TASK if task is None else task.strip(),
            extra=extra,
            start=_seconds(data, "start", source, line, key),
            end=_seconds(data, "end", source, line, key),
            **{name: text(name, None) for name in _TEXT_FIELDS},
            history=history,
            source=source,
            line=line,
            notes=tuple(notes),
        )
        if record.start is not None and record.end is not None and record.end <= record.start:
            raise record.error("bad_segment", f"end={record.end} is not after start={record.start}")
        for name in ("speech_token", "word_lengths"):
            record._codes(name)
        return record

    def to_dict(self) -> dict[str, Any]:
        """The record as it is written; `from_dict` reads it back equal (but for source, line and notes)."""
        out: dict[str, Any] = {"key": self.key, "wav": self.wav, "txt": self.txt, "task": self.task}
        for name in ("start", "end", *_TEXT_FIELDS):
            if getattr(self, name) is not None:
                out[name] = getattr(self, name)
        for n, turn in enumerate(self.history, start=1):
            out[f"wav_{n}"] = turn.wav
            out[f"txt_{n}"] = turn.txt
        extra = {k: v for k, v in self.extra.items() if k != "history"}
        for n, turn in enumerate(self.history, start=1):
            if turn.speech_token:
                extra[f"speech_token_{n}"] = list(turn.speech_token)
        out["extra"] = extra
        return out


def parse_codes(value: Any, name: str, source: str = "", line: int = 0, key: str = "") -> tuple[int, ...]:
    """A list of whole numbers, or of strings of digits, as a tuple; None is empty. Raises RecordError."""
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise RecordError("bad_codes", f"{name} must be a list of whole numbers, found {value!r:.80}", source, line, key)
    if set(map(type, value)) == {int} and min(value) >= 0:  # the usual case, in a twentieth of the time
        return tuple(value)
    codes = []
    for item in value:
        if isinstance(item, str) and item.strip().isdecimal():
            codes.append(int(item))
        elif isinstance(item, int) and not isinstance(item, bool) and item >= 0:
            codes.append(item)
        else:
            raise RecordError("bad_codes", f"{name} holds {item!r:.80}, expected whole numbers from 0", source, line, key)
    return tuple(codes)


_KNOWN = {"key", "wav", "txt", "task", "extra", "start", "end", "history", _TASK_MISSPELT, *_TEXT_FIELDS}


def _extra(data: Mapping[str, Any], source: str, line: int, key: str) -> dict[str, Any]:
    extra = data.get("extra")
    if isinstance(extra, (str, bytes)):
        try:
            extra = json.loads(extra) if extra.strip() else {}
        except json.JSONDecodeError as error:
            raise RecordError("bad_extra", f"field 'extra' is not valid JSON: {error}", source, line, key) from error
    if extra is None:
        extra = {}
    if not isinstance(extra, Mapping):
        raise RecordError("bad_extra", f"field 'extra' must be an object, found {extra!r:.80}", source, line, key)
    extra = dict(extra)
    for name in data:  # a field that is not part of the schema belongs to extra; what extra says wins
        if name not in _KNOWN and not _turn_number(name):
            extra.setdefault(name, data[name])
    return extra


def _wav(value: Any, name: str, source: str, line: int, key: str) -> str | bytes | None:
    if value is None or value == "":
        return None
    if isinstance(value, (str, bytes)):
        return value
    raise RecordError("bad_field", f"field {name!r} must be a path, found {value!r:.80}", source, line, key)


def _seconds(data: Mapping[str, Any], name: str, source: str, line: int, key: str) -> float | None:
    value = data.get(name)
    if value is None:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise RecordError("bad_segment", f"field {name!r} must be seconds from 0, found {value!r}", source, line, key)
    return seconds


def _turn_number(name: str) -> int:
    """n of ``wav_<n>`` or ``txt_<n>``, else 0."""
    stem, _, number = name.rpartition("_")
    return int(number) if stem in ("wav", "txt") and number.isdecimal() else 0


def _history(data: Mapping[str, Any], extra: Mapping[str, Any], source: str, line: int, key: str) -> tuple[tuple[Turn, ...], int]:
    """Past turns from ``wav_<n>``/``txt_<n>`` (n from 1), or from a list ``history`` of objects with wav, txt,
    speech_token.

    Also the number of a turn that is missing between others, 0 for none; with a gap there are no turns, as in the
    published reader.
    """
    written = data.get("history", extra.get("history"))
    if written:
        if not isinstance(written, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in written):
            raise RecordError("bad_history", "field 'history' must be a list of objects", source, line, key)
        turns = [(t.get("wav"), t.get("txt"), t.get("speech_token")) for t in written]
    else:
        last = max((_turn_number(name) for name in data), default=0)
        turns = [(data.get(f"wav_{n}"), data.get(f"txt_{n}"), extra.get(f"speech_token_{n}")) for n in range(1, last + 1)]
    out = []
    for n, (wav, txt, codes) in enumerate(turns, start=1):
        if wav is None and txt is None:
            return (), n
        if not isinstance(txt or "", str):
            raise RecordError("bad_history", f"txt of past turn {n} is not a text", source, line, key)
        speech = parse_codes(codes, f"speech_token_{n}", source, line, key)
        out.append(Turn(_wav(wav, f"wav_{n}", source, line, key), txt or "", speech))
    return tuple(out), 0
