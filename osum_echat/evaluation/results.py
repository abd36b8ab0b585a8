"""What a system made of the items: ``results.jsonl``, one object a line, written as answers come and read again by
every later step.

    {"suite": "speech", "part": "say", "id": "a1", "text": "...", "think": {...}, "tags": {...}, "wav": "wav/say/a1.wav",
     "timings": {...}, "finish": "stop", "guards": {...}, "speech_tokens": [...]}

A file that another system wrote needs ``id`` and ``text`` (``key`` and ``response`` are read as these) and, for spoken
replies, ``wav``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from osum_echat.batch.output import Lines as Lines
from osum_echat.evaluation.items import ItemError, read_lines

FILE = "results.jsonl"


@dataclass
class Result:
    """An answer. ``error`` instead of one when the system could not be asked, ``refused`` when it was the system that
    would not.

    Attributes:
        think: fields of the parsed think, ``raw`` among them; empty without one.
        tags: labels that the system named, by kind.
        wav: its spoken reply, as an absolute path or relative to the results file.
        finish: why it ended: ``stop``, ``length`` (cut off), ``cancelled``.
        heard_emotion: the emotion in the spoken reply's audio, where a recogniser of emotion heard it.
        refused: the error is that the system has not learnt what was asked, or not at this length.
    """

    id: str
    part: str = ""
    suite: str = ""
    text: str = ""
    think: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    wav: str | None = None
    timings: dict[str, Any] = field(default_factory=dict)
    finish: str = "stop"
    guards: dict[str, int] = field(default_factory=dict)
    speech_tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    heard_emotion: str | None = None
    error: str | None = None
    refused: bool = False

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"suite": self.suite, "part": self.part, "id": self.id}
        if self.error is not None:
            return out | {"error": self.error} | ({"refused": True} if self.refused else {})
        return out | {name: getattr(self, name) for name in _WRITTEN if getattr(self, name) not in (None, {}, [])}


_WRITTEN = ("text", "think", "tags", "wav", "timings", "finish", "guards", "speech_tokens", "seconds", "heard_emotion")
_KINDS: dict[str, Any] = {
    "text": str,
    "wav": str,
    "finish": str,
    "heard_emotion": str,
    "think": dict,
    "tags": dict,
    "timings": dict,
    "guards": dict,
    "speech_tokens": list,
    "seconds": (int, float),
}
_ALSO = {"id": ("key",), "text": ("response", "prediction"), "finish": ("finish_reason",), "wav": ("audio", "response_audio")}


def result_from(data: Mapping[str, Any], source: Path, line: int, suite: str = "") -> Result:
    """Read a line. Raises ItemError when it has no id, or says that it belongs to another suite."""
    values = dict(data)
    for name, others in _ALSO.items():
        for other in others:
            if name not in values and other in values:
                values[name] = values[other]
    id = values.get("id")
    if not isinstance(id, (str, int)) or isinstance(id, bool) or id == "":
        raise ItemError("missing_id", f"field 'id' must be a text, found {id!r}", str(source), line)
    of = values.get("suite") or ""
    if suite and of and of != suite:
        raise ItemError("other_suite", f"this result is of suite {of!r}, not {suite!r}", str(source), line, str(id))
    think = values.get("think") or {}
    if isinstance(think, str):
        think = {"raw": think}
    values["think"] = think
    for name, kind in _KINDS.items():
        if values.get(name) is not None and (not isinstance(values[name], kind) or isinstance(values[name], bool)):
            wanted = "a number" if kind == (int, float) else kind.__name__
            raise ItemError(
                "bad_field", f"field {name!r} must be {wanted}, found {values[name]!r:.60}", str(source), line, str(id)
            )
    if not isinstance(values.get("refused", False), bool):
        raise ItemError(
            "bad_field", f"field 'refused' must be true or false, found {values['refused']!r:.60}", str(source), line, str(id)
        )
    infinite = [name for name, value in {**values, **(values.get("timings") or {})}.items() if value in (math.inf, -math.inf)]
    if infinite:
        raise ItemError("bad_field", f"field {infinite[0]!r} is too large for a number", str(source), line, str(id))
    kept = {name: values[name] for name in (*_WRITTEN, "error", "refused") if values.get(name) is not None}
    return Result(**{**kept, "id": str(id), "part": str(values.get("part") or ""), "suite": str(of), "think": dict(think)})


def read_results(path: Path, suite: str = "") -> tuple[list[Result], list[ItemError]]:
    """Results of a file and what is wrong with its other lines; of several with one id the last counts. Raises
    ValueError without it."""
    found: dict[tuple[str, str], Result] = {}
    faults: list[ItemError] = []
    for number, value in read_lines(path):
        try:
            if isinstance(value, ItemError):
                raise value
            result = result_from(value, path, number, suite)
        except ItemError as error:
            faults.append(error)
            continue
        if result.wav and not Path(result.wav).is_absolute():
            result.wav = str(path.parent / result.wav)
        if result.wav and not Path(result.wav).is_file():
            faults.append(
                ItemError("missing_file", f"{result.wav} is not there; the text alone is scored", str(path), number, result.id)
            )
            result.wav = None
        found[result.part, result.id] = result
    return list(found.values()), faults
