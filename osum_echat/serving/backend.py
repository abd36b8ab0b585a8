"""What the session machine needs of a model, without a model: turns go in, events come out.

`live.LiveModel` is the real one; tests of the protocol bring their own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]
ThinkForm: TypeAlias = Literal["tag", "language"] | None


class Refused(RuntimeError):
    """The model cannot take this now; the message is a sentence for the client. ``code``: for programs."""

    def __init__(self, message: str, code: str = "server_full") -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, eq=False)
class Heard:
    """A recording as the model has heard it. ``features`` is the model's own business."""

    features: Any
    seconds: float
    positions: int = 0


@dataclass(frozen=True)
class Exchange:
    """One past turn: what was said or written, and what of the answer was said (and heard: it may have been cut)."""

    heard: tuple[Heard, ...]
    user_text: str
    reply_text: str
    codes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Turn:
    """One thing to answer.

    Attributes:
        past: earlier exchanges, oldest first.
        heard: the recording, or None; ``text``: the written question instead. say: a text to say, instead of both.
        speak: in sound as well. think: the form of the thought. voice: a name; unknown ones mean the usual voice.
        max_tokens, temperature: None leaves the checkpoint's own.
        instructions: of the session; used where the checkpoint can follow them.
    """

    past: tuple[Exchange, ...] = ()
    heard: Heard | None = None
    text: str = ""
    say: str = ""
    speak: bool = True
    think: ThinkForm = None
    voice: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int = 0
    instructions: str = ""


@dataclass(frozen=True)
class Thought:
    """More of the thought."""

    text: str


@dataclass(frozen=True)
class ThoughtDone:
    """The thought is complete. ``tags``: transcript, age, gender, emotion, event, as far as it says them."""

    raw: str
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Text:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class Sound:
    """More of the answer's sound."""

    samples: Samples
    rate: int


@dataclass(frozen=True)
class Ended:
    """The last event.

    Attributes:
        reason: ``stop``, ``length``, ``cancelled``, ``silence`` or ``failed`` (``message`` says why).
        codes: speech codes of the answer, 25 a second. word_ends: number of codes after each word of the text, where
            that is known.
        tokens: ids read, and ids generated as text and as speech. timings: seconds, by name. guards: how often each
            acted.
    """

    reason: Literal["stop", "length", "cancelled", "failed", "silence"]
    codes: tuple[int, ...] = ()
    word_ends: tuple[int, ...] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    guards: Mapping[str, int] = field(default_factory=dict)
    message: str = ""


Event: TypeAlias = Thought | ThoughtDone | Text | Sound | Ended


class Job(Protocol):
    """An answer in the making; iterate over its events once, `Ended` is the last."""

    def __aiter__(self) -> AsyncIterator[Event]: ...

    def cancel(self) -> None:
        """Stop within a step. Events that were made before may still come; the iteration ends."""

    def slow(self, on: bool) -> None:
        """Make no more for now: enough is waiting to be played."""


class Memory(Protocol):
    """What the model keeps of one dialogue between its turns."""

    def close(self) -> None: ...


class Backend(Protocol):
    """A model that several sessions share. Methods are called on the event loop."""

    name: str
    max_seconds: float
    """Of a recording."""
    thinks: Sequence[str]
    """Forms of thought that it has learnt."""
    warnings: Mapping[str, str]
    """What clients may ask for and it cannot do, by the name of the session's field; said once."""
    codes_per_second: float

    def open(self) -> Memory: ...

    async def hear(self, samples: Samples) -> Heard:
        """Encode 16 kHz samples. Raises ValueError for what cannot be used, Refused when there is no room."""
        ...

    def start(self, turn: Turn, memory: Memory | None = None) -> Job:
        """Raises Refused."""
        ...

    async def transcribe(self, heard: Heard) -> str: ...

    def remember(self, memory: Memory, past: Sequence[Exchange], turn: Turn) -> None:
        """The dialogue stands so now: prepare for its next turn while nobody waits."""
