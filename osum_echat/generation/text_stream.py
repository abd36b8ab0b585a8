"""Ids to text as they come: whole characters only, and the think apart from the reply.

A byte-level tokenizer cuts characters into several ids, so text is held back until it is whole; a mark of the think may
be cut too, so text that could be the start of a mark is held back until it is decided. What is yielded, concatenated,
is what decoding everything at once gives.
"""

from __future__ import annotations

from typing import Literal

from osum_echat.dialogue import think
from osum_echat.dialogue.tokens import Tokenizer, decode
from osum_echat.generation.events import TextDelta, ThinkDelta

_UNFINISHED = "\ufffd"
_LONGEST_CHARACTER = 8
"""Ids that may pass without a whole character; after that, the bytes are taken to be broken."""


class Detokenizer:
    """Incremental decoding of one row. Only the last few ids are decoded again at a step, so its cost does not grow."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._settled = 0
        """Number of ids whose text has been handed out; the id before them is kept as context for blanks."""

    def push(self, token: int) -> str:
        """Text that is complete now; often empty."""
        self._ids.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        """What is left, broken characters included."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        start = max(self._settled - _LONGEST_CHARACTER, 0)
        known = decode(self._tokenizer, self._ids[start : self._settled]) if self._settled else ""
        text = decode(self._tokenizer, self._ids[start:])
        held_too_long = len(self._ids) - self._settled > _LONGEST_CHARACTER
        if len(text) <= len(known) or (text.endswith(_UNFINISHED) and not final and not held_too_long):
            return ""
        self._settled = len(self._ids)
        return text[len(known) :]


class TextStream:
    """Text of one row, divided into think and reply. ``think`` and ``reply`` hold everything so far; ``opened``: there
    is a think.

    A text that does not begin with the opening mark is a reply.
    """

    def __init__(self, tokenizer: Tokenizer, expect_think: bool) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._expect_think = expect_think
        self._held = ""
        self._state: Literal["start", "think", "reply"] = "start"
        self.opened = False
        self.think = ""
        self.reply = ""

    @property
    def waiting_for_close(self) -> bool:
        """A think is open, or expected and not begun."""
        return self._state == "think" or (self._state == "start" and self._expect_think)

    def push(self, token: int) -> list[ThinkDelta | TextDelta]:
        return self._route(self._detokenizer.push(token), final=False)

    def finish(self) -> list[ThinkDelta | TextDelta]:
        return self._route(self._detokenizer.finish(), final=True)

    def _route(self, new: str, final: bool) -> list[ThinkDelta | TextDelta]:
        self._held += new
        out: list[ThinkDelta | TextDelta] = []
        if self._state == "start":
            text = self._held.lstrip()
            if text.startswith(think.OPEN):
                self._state, self._held, self.opened = "think", text[len(think.OPEN) :], True
            elif think.OPEN.startswith(text) and not final:
                return out
            else:
                self._state = "reply"
        if self._state == "think":
            found = [(at, mark) for mark in think.CLOSE_MARKS if (at := self._held.find(mark)) >= 0]
            if found:
                at, mark = min(found)
                self._say(out, ThinkDelta(self._held[:at]))
                self._state, self._held = "reply", self._held[at + len(mark) :]
            else:
                keep = 0 if final else max(overlap(self._held, mark) for mark in think.CLOSE_MARKS)
                ready = len(self._held) - keep
                self._say(out, ThinkDelta(self._held[:ready]))
                self._held = self._held[ready:]
        if self._state == "reply":
            self._say(out, TextDelta(self._held))
            self._held = ""
        return out

    def _say(self, out: list[ThinkDelta | TextDelta], delta: ThinkDelta | TextDelta) -> None:
        if not delta.text:
            return
        if isinstance(delta, ThinkDelta):
            self.think += delta.text
        else:
            self.reply += delta.text
        out.append(delta)


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``mark`` (but not all of it)."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
