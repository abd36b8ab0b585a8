"""What comes out of decoding, as it happens. Concatenated deltas are the reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from osum_echat.generation.config import Reason


@dataclass(frozen=True)
class ThinkDelta:
    """More of the think, without its marks."""

    text: str


@dataclass(frozen=True)
class TextDelta:
    """More of the reply's text."""

    text: str


@dataclass(frozen=True)
class SpeechToken:
    """The next 40 ms of the reply's speech: a code [0, S). Delimiters are not told."""

    code: int


@dataclass(frozen=True)
class Timings:
    """Seconds since the request was handed over. None: it never came to that.

    Attributes:
        prefill: until the prompt was read.
        first_token: until the first id was chosen.
        think: until the think was closed.
        first_speech: until the first speech code.
        total: until the end.
        think_tokens: ids of the think, marks included.
        synthesis: seconds that making sound of the speech took, by itself; part of total.
    """

    prefill: float = 0.0
    first_token: float | None = None
    think: float | None = None
    first_speech: float | None = None
    total: float = 0.0
    think_tokens: int = 0
    synthesis: float | None = None


@dataclass(frozen=True)
class Done:
    """The last event of a row.

    Attributes:
        reason: ``stop`` the model ended it, ``length`` a limit did, ``cancelled`` the caller did, ``silence`` the
            recording has nothing in it, so the model was not asked.
        text_ids: all text ids, think and its marks included, without the end.
        generated: every id in order, all kinds.
        guards: how often each guard acted (names of `Guards`, and ``word`` for the cap on the codes of a word); those
            that never did are left out.
    """

    reason: Reason
    text_ids: tuple[int, ...] = ()
    generated: tuple[int, ...] = ()
    guards: Mapping[str, int] = field(default_factory=dict)
    timings: Timings = field(default_factory=Timings)


Event: TypeAlias = ThinkDelta | TextDelta | SpeechToken | Done


def speech_codes(events: Sequence[Any]) -> tuple[int, ...]:
    """The speech of a row: the codes of its `SpeechToken`s."""
    return tuple(event.code for event in events if isinstance(event, SpeechToken))
