"""The items of a dialogue, as the client sees them and as the model is given them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from osum_echat.serving.backend import Exchange, Heard

Status = Literal["completed", "incomplete", "in_progress"]


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(10)}"


@dataclass
class Item:
    """One item.

    Attributes:
        raw: what the client sent, for kinds that the model does not use (function calls, ...): echoed as it is.
        text: written text, transcript of the user's speech (None: not known yet), or the text of the answer.
        spoken: it is sound: input_audio of the user, output_audio of the assistant.
        heard: what the model heard. codes, word_ends, seconds: of the answer's sound.
        said: the part of ``text`` that was heard before the answer was cut; None: all of it.
        committed: when the turn was committed, by the session's clock; None for items that a client wrote.
        findings: tags and thought, additive.
    """

    id: str
    role: str = "user"
    text: str | None = None
    spoken: bool = False
    status: Status = "completed"
    heard: Heard | None = None
    codes: tuple[int, ...] = ()
    word_ends: tuple[int, ...] = ()
    seconds: float = 0.0
    said: str | None = None
    kept_codes: int | None = None
    committed: float | None = None
    findings: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] | None = None

    @property
    def content_type(self) -> str:
        if self.role == "assistant":
            return "output_audio" if self.spoken else "output_text"
        return "input_audio" if self.spoken else "input_text"

    def as_json(self, empty: bool = False) -> dict[str, Any]:
        """The item of the Realtime API. ``empty``: as it is announced, before there is content."""
        if self.raw is not None:
            return {**self.raw, "id": self.id, "object": "realtime.item"}
        content: list[dict[str, Any]] = []
        if not empty and not (self.role == "assistant" and self.text is None):
            content = [{"type": self.content_type, "transcript" if self.spoken else "text": self.shown}]
        item = {"id": self.id, "object": "realtime.item", "type": "message", "role": self.role, "status": self.status}
        return {**item, "content": content, **({"x_echat": self.findings} if self.findings else {})}

    @property
    def shown(self) -> str | None:
        return self.text if self.said is None else self.said

    def cut(self, seconds: float, codes_per_second: float) -> float:
        """Only the first ``seconds`` of this answer were heard. Returns what it was cut to (never more than there
        is)."""
        seconds = min(max(seconds, 0.0), self.seconds)
        codes = round(seconds * codes_per_second)
        self.kept_codes = min(codes, len(self.codes))
        self.said = said_until(self.text or "", self.word_ends, len(self.codes), codes, self.status == "completed")
        return seconds


def said_until(text: str, word_ends: Sequence[int], total: int, codes: int, complete: bool) -> str:
    """The beginning of ``text`` that had been said after so many of its codes.

    Where it is known which word ends where, words are kept whose larger part was said; else the text is cut in
    proportion, at a border of words where it has blanks. ``complete``: ``total`` codes say the whole text; else the
    text goes on, and 4 codes a letter are the measure.
    """
    if codes <= 0:
        return ""
    words = list(re.finditer(r"\S+", text))
    if word_ends and len(word_ends) <= len(words):
        starts = [0, *word_ends[:-1]]
        count = sum(codes * 2 >= start + end for start, end in zip(starts, word_ends, strict=True))
        if codes >= word_ends[-1] and len(word_ends) < len(words):
            count = len(word_ends)
        return text[: words[count - 1].end()] if count else ""
    whole = total if complete else max(total, 4 * len(text))
    end = len(text) if codes >= whole else int(len(text) * codes / max(whole, 1))
    if end < len(text) and " " in text:
        end = max((m.end() for m in words if m.end() <= end), default=0)
    return text[:end].rstrip()


class Conversation:
    """Items in order."""

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def find(self, item_id: str) -> Item | None:
        return next((item for item in self.items if item.id == item_id), None)

    def before(self, item: Item) -> str | None:
        """Id of the item in front."""
        at = self.items.index(item)
        return self.items[at - 1].id if at else None

    def add(self, item: Item, after: str | None = None) -> None:
        """At the end, or behind ``after`` (``root``: in front of all). Raises KeyError for an unknown one."""
        if after is None:
            self.items.append(item)
        elif after == "root":
            self.items.insert(0, item)
        else:
            found = self.find(after)
            if found is None:
                raise KeyError(after)
            self.items.insert(self.items.index(found) + 1, item)

    def remove(self, item: Item) -> None:
        self.items.remove(item)

    def system_text(self) -> str:
        """What system messages say."""
        return "\n".join(i.text for i in self.items if i.role in ("system", "developer") and i.raw is None and i.text)

    def exchanges(self) -> tuple[list[Exchange], list[Item]]:
        """Past exchanges, and the user's items that wait for an answer. Items that follow one another are one turn."""
        past: list[Exchange] = []
        asked: list[Item] = []
        for item in self.items:
            if item.raw is not None or item.role not in ("user", "assistant"):
                continue
            if item.role == "user":
                asked.append(item)
                continue
            reply = (item.shown or "").strip()
            if not reply:
                continue
            codes = item.codes if item.kept_codes is None else item.codes[: item.kept_codes]
            past.append(_exchange(asked, reply, codes))
            asked = []
        return past, asked

    def last_asked(self) -> list[Item]:
        """The user's items of the last exchange, which are answered once more when nothing new was asked."""
        last: list[Item] = []
        for item in reversed(self.items):
            if item.raw is None and item.role == "user":
                last.insert(0, item)
            elif last and item.role == "assistant":
                break
        return last


def _exchange(asked: Sequence[Item], reply: str, codes: tuple[int, ...]) -> Exchange:
    heard = tuple(item.heard for item in asked if item.heard is not None)
    text = "\n".join(item.text for item in asked if item.heard is None and item.text)
    # A turn of the model is a recording or a text: of several recordings the last is the one that was answered.
    return Exchange(heard[-1:], "" if heard else text, reply, codes)


def from_client(raw: dict[str, Any], item_id: str) -> Item:
    """An item as a client creates it; recordings are put in by the session. Raises ValueError for what no item can
    be."""
    if raw.get("type") != "message":
        return Item(item_id, raw=dict(raw))
    role = raw.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise ValueError(f"role {role!r} is not one of user, assistant, system")
    parts = raw.get("content") or []
    texts = [part.get("text") or part.get("transcript") or "" for part in parts]
    spoken = any(part.get("type") in ("input_audio", "output_audio", "audio") for part in parts)
    status: Status = "incomplete" if raw.get("status") == "incomplete" else "completed"
    return Item(
        item_id, role=role, text="\n".join(t for t in texts if t) or (None if spoken else ""), spoken=spoken, status=status
    )
