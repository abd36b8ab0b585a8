"""A record as members of a tar and back, without losing a field, a type or a byte.

Text fields are members of their own, as users know them (``txt, task, lang, speaker, emotion, gender, duration,
extra``), audio keeps its format (``wav, flac, mp3 ...``), past turns are ``wav_1, txt_1 ...``. What fits none of these
(other fields, or a known one that is not a text) goes as JSON into one member ``fields``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from osum_echat.dialogue.record import RecordError

AUDIO = ("wav", "flac", "mp3", "m4a", "ogg", "opus", "wma")
REST = "fields"
ONLY_META = "only-meta"  # what combined lists write for a recording that is in the tar
_TEXT = ("txt", "task", "lang", "speaker", "emotion", "gender", "duration")
_TURN_TEXT = re.compile(r"txt_\d+")
_TURN_AUDIO = re.compile(rf"({'|'.join(AUDIO)})_(\d+)")


def audio_fields(record: Mapping[str, Any]) -> list[str]:
    """Names of the fields that point to recordings: ``wav`` and ``wav_<n>``, when they hold something."""
    return [name for name in record if (name == "wav" or re.fullmatch(r"wav_\d+", name)) and record[name]]


def to_members(name: str, record: Mapping[str, Any], audio: Mapping[str, tuple[str, bytes]]) -> dict[str, bytes]:
    """Members of a record.

    Args:
        name: the key in the tar; a record whose own key differs (a duplicate, a number) takes that along as a field.
        record: one object of a list.
        audio: for each field that points to a recording: (format such as ``wav``, its bytes).
    """
    members: dict[str, bytes] = {}
    rest: dict[str, Any] = {}
    for field, value in record.items():
        if field in audio or (field == "wav" and value == ONLY_META) or (field == "key" and value == name):
            continue
        if isinstance(value, str) and (field in (*_TEXT, "extra") or _TURN_TEXT.fullmatch(field)):
            members[field] = value.encode("utf-8", "surrogatepass")
        elif field == "extra" and isinstance(value, Mapping):
            members[field] = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
        else:
            rest[field] = value
    for field, (kind, data) in audio.items():
        turn = field.removeprefix("wav")
        assert kind in AUDIO, f"{record.get('key')}: unknown audio format {kind}"
        members[kind + turn] = data
    if rest:
        members[REST] = json.dumps(rest, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return members


def from_members(key: str, members: Mapping[str, bytes], source: str = "") -> dict[str, Any]:
    """The record of a tar's members, with audio as bytes under ``wav`` and ``wav_<n>`` (give it to `Record.from_dict`).

    Raises:
        RecordError: a text is not UTF-8, or JSON is broken.
    """
    record: dict[str, Any] = {"key": key}
    for name, data in members.items():
        turn = _TURN_AUDIO.fullmatch(name)
        if name in AUDIO:
            record.setdefault("wav", data)
        elif turn:
            record.setdefault(f"wav_{turn[2]}", data)
        elif name == REST or name == "extra":
            try:
                value = json.loads(data.decode("utf-8", "surrogatepass")) if data.strip() else {}
            except ValueError as error:
                raise RecordError(f"bad_{name}", f"member {name!r} is not valid JSON: {error}", source, 0, key) from error
            if name == "extra":
                record["extra"] = value
            elif isinstance(value, dict):
                record.update(value)
        else:
            try:
                record[name] = data.decode("utf-8", "surrogatepass")
            except UnicodeDecodeError as error:
                if name not in _TEXT and not _TURN_TEXT.fullmatch(name):
                    continue  # some other tool's binary member
                raise RecordError("bad_text", f"member {name!r} is not UTF-8: {error}", source, 0, key) from error
    return record


def audio_member(names: Iterable[str], field: str) -> str:
    """The member that holds field ``wav`` or ``wav_<n>``, such as ``flac`` or ``flac_1``."""
    turn = field.removeprefix("wav")
    return next(name for name in names if name.endswith(turn) and name.removesuffix(turn) in AUDIO)
