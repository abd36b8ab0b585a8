"""What the model notes before it answers: two templates of one mechanism, write and parse.

A *tag* think fills a fixed sentence (words, age, gender, emotion, event, emotion of the reply); a *natural-language*
think is free text. Both stand between an opening and a closing mark in front of the reply. Parsing serves generated
text, so it must survive thinks that are cut off, out of order or misspelled: what cannot be found is None.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

ThinkForm = Literal["tag", "language"]
"""The two forms of a think: a fixed sentence filled with tags, or a sentence in natural language."""

OPEN = "<think>"
CLOSE = "<think end>"
# Generated text sometimes closes with what the system prompts call the mark.
CLOSE_MARKS = (CLOSE, "</think end>", "</think>")


@dataclass(frozen=True)
class Think:
    """A parsed think. ``raw`` is the text between the marks; a field that is absent or unknown is None; tags have no
    brackets."""

    raw: str = ""
    transcript: str | None = None
    age: str | None = None
    gender: str | None = None
    emotion: str | None = None
    event: str | None = None
    reply_emotion: str | None = None


@dataclass(frozen=True)
class ThinkTemplate:
    """How a think is written.

    Attributes:
        parts: (text in front, field name) in order; empty for a natural-language think, whose body is `Think.raw`.
        ending: text after the last field.
        brackets: tags are written as ``<TAG>``.
        unknown: what stands for a tag that is not known.
    """

    parts: tuple[tuple[str, str], ...] = ()
    ending: str = ""
    brackets: bool = True
    unknown: str = ""

    def write(self, think: Think) -> str:
        """The think with its marks, ready to stand before the reply."""
        if not self.parts:
            return f"{OPEN}{think.raw}{CLOSE}"
        body = "".join(text + self._value(name, getattr(think, name)) for text, name in self.parts)
        return f"{OPEN}{body}{self.ending}{CLOSE}"

    def parse(self, raw: str) -> Think:
        """Read the text between the marks (see `split_think`)."""
        found: list[tuple[int, int, str]] = []
        at = 0
        for name, pattern in self._patterns:
            match = pattern.search(raw, at) or pattern.search(raw)
            if match:
                found.append((match.start(), match.end(), name))
                at = match.end()
        found.sort()
        ends = [start for start, _, _ in found[1:]] + [self._ending_at(raw)]
        values = {  # nothing found leaves one end too many
            name: self._read(name, raw[begin : max(begin, end)]) for (_, begin, name), end in zip(found, ends, strict=False)
        }
        return Think(raw=raw, **values)

    def _value(self, name: str, value: str | None) -> str:
        if name == "transcript":
            return value or ""
        if value is None:
            return self.unknown
        bare = not value.startswith("<") and not value.endswith(">")
        return f"<{value}>" if self.brackets and bare else value

    def _read(self, name: str, text: str) -> str | None:
        text = text.strip()
        if name == "transcript":
            return text or None
        if text.startswith("<"):
            bracketed = re.match(r"<([^<>]*)>", text)  # none when it was cut off inside the tag
            value = bracketed.group(1) if bracketed else ""
        else:
            value = re.split(r"[,，<>]", text, maxsplit=1)[0]
        value = value.strip()
        return None if value == self.unknown.strip("<>") else value or None

    @cached_property
    def _patterns(self) -> list[tuple[str, re.Pattern[str]]]:
        return [(name, _tolerant(text)) for text, name in self.parts]

    def _ending_at(self, raw: str) -> int:
        match = _tolerant(self.ending).search(raw) if self.ending else None
        return match.start() if match else len(raw)


def _tolerant(text: str) -> re.Pattern[str]:
    """A pattern for a fixed piece of a template: any blanks, ASCII or full-width punctuation, any case."""
    words = text.strip().lstrip(",").strip()
    boundary = r"\b" if words[:1].isascii() else ""  # ", age:" must not be found inside ", language:"
    pattern = re.escape(words).replace(r"\ ", r"\s*").replace(",", "[,，]?").replace(":", r"\s*[:：]\s*")
    return re.compile(rf"[,，]?\s*{boundary}{pattern}", re.IGNORECASE)


@dataclass(frozen=True)
class SplitReply:
    """Generated text cut at the think marks. ``think`` is None without an opening mark; ``closed`` is False for a think
    that never ends."""

    think: str | None
    reply: str
    closed: bool = True


def split_think(text: str) -> SplitReply:
    """Separate think and reply. A closing mark without an opening one still separates; an unclosed think has no
    reply."""
    opened = text.lstrip().startswith(OPEN)
    ends = [(at, mark) for mark in CLOSE_MARKS if (at := text.rfind(mark)) >= 0]
    if ends:
        at, mark = max(ends)
        return SplitReply(text[:at].strip().removeprefix(OPEN), text[at + len(mark) :])
    return SplitReply(text.strip().removeprefix(OPEN), "", closed=False) if opened else SplitReply(None, text)


LANGUAGE = ThinkTemplate()

TAG_CHINESE = ThinkTemplate(
    parts=(
        ("用户说的话是:", "transcript"),
        (",年龄为:", "age"),
        (",性别为:", "gender"),
        (",情感为:", "emotion"),
        (",声音事件为:", "event"),
        (",推测使用的回复情感为:", "reply_emotion"),
    ),
    ending=",我应该综合用户的语义和副语言信息给出专业且对应的回答",
    unknown="<&&>",
)
