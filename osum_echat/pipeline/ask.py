"""What can be asked, and what comes back.

`MODES` is the one table of modes: command line, batch runs, web page and servers look a mode up here by its name and
make an `Ask` with `AskMode.ask`. An option of a request is one line in `AskOptions` (or `Options`), one field of `Ask`,
and the place where it acts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from typing_extensions import TypedDict, Unpack

from osum_echat.audio.io import Source, encode, write
from osum_echat.dialogue.tasks import TASKS, find_task
from osum_echat.dialogue.think import Think
from osum_echat.generation.events import Event, Timings
from osum_echat.token2wav.config import SAMPLE_RATE

if TYPE_CHECKING:
    from osum_echat.token2wav import Speaker

SYNTHETIC = "synthetic speech, made by OSUM-EChat"
"""Stands in the metadata of every sound file that is written."""
Kind = Literal["chat", "understand", "speak"]
Samples: TypeAlias = npt.NDArray[np.float32]
ThinkForm: TypeAlias = Literal["tag", "language"] | None
Voice: TypeAlias = "Speaker | str | Path"
StreamEvent: TypeAlias = "Event | AudioChunk"


# ---- modes -----------------------------------------------------------------------------------------------------------


class Options(TypedDict, total=False):
    """Options that every mode takes; see `Ask`."""

    seed: int
    greedy: bool
    temperature: float | None
    max_tokens: int | None
    speaker: Voice | None


class AskOptions(Options, total=False):
    """Options that choose the mode of a chat, and those of every mode; see `Ask`."""

    think: ThinkForm
    speak: bool
    interleaved: bool


@dataclass(frozen=True)
class AskMode:
    """One way to ask.

    Attributes:
        name: on the command line. title: in menus.
        kind: ``chat``, ``understand`` or ``speak``.
        output_type: kind of sequence, a key of `dialogue.tasks.OUTPUTS`.
        hears: takes a recording. reads: takes a text.
        thinks: the model thinks first. speaks: the answer is speech as well (or only). interleaved: text and speech in
            turns (6:18).
        task: task string of an understanding mode.
        then: name of the mode that says the answer, where the model answers in text only.
    """

    name: str
    title: str
    kind: Kind
    output_type: str
    hears: bool = False
    reads: bool = False
    thinks: bool = False
    speaks: bool = False
    interleaved: bool = False
    task: str | None = None
    then: str | None = None

    @property
    def aspects(self) -> tuple[str, ...]:
        """What an understanding mode finds, in plain words."""
        return tuple(_ASPECTS.get(part, part.strip("<>").lower()) for part in (self.task or "").split())

    def ask(
        self,
        wav: Source | None = None,
        text: str | None = None,
        prompt: str | None = None,
        think: ThinkForm = "tag",
        **options: Unpack[Options],
    ) -> Ask:
        """An `Ask` of this mode. What the mode does not take is left out: a text where it hears, a form of think where
        it does not think.

        Raises:
            ValueError: what the mode needs is missing.
        """
        if self.hears and wav is None:
            raise ValueError(f"{self.name} needs a recording")
        return Ask(
            wav if self.hears else None,
            text if self.reads else None,
            self.kind,
            self.task or _DEFAULT_TASK,
            prompt if self.kind == "understand" else None,
            think=think if self.thinks else None,
            speak=self.speaks and self.kind == "chat",
            interleaved=self.interleaved,
            **options,
        )


_DEFAULT_TASK = "<TRANSCRIBE>"
_ASPECTS = {  # of understanding tasks, in plain words
    "<TRANSCRIBE>": "words",
    "<ALIGN>": "times",
    "<S2TCHAT>": "answer",
    "<EMOTION>": "emotion",
    "<STYLE>": "style",
    "<CAPTION>": "sounds",
    "<GENDER>": "gender",
    "<AGE>": "age",
    "<PUNCTUATION>": "punctuation",
    "<AUDIO>": "description",
}


def short_name(task: str) -> str:
    """``<TRANSCRIBE> <AGE>`` as ``asr+age``."""
    return "+".join(part.strip("<>").lower() for part in task.split()).replace("transcribe", "asr")


def _understanding(task: str) -> AskMode:
    found = ", ".join(_ASPECTS.get(part, part.strip("<>").lower()) for part in task.split())
    return AskMode(short_name(task), f"Understand: {found}", "understand", find_task(task).output_type, hears=True, task=task)


_ROWS = (
    *(_understanding(name) for name, task in TASKS.items() if task.prompted),
    AskMode("s2t_chat", "Chat: answer in text", "chat", "s2t_chat", hears=True),
    AskMode("s2t_chat_think", "Chat: think, then answer in text", "chat", "s2t_chat_think", hears=True, thinks=True),
    AskMode("s2s", "Talk: answer in text and speech", "chat", "speech2text_token", hears=True, speaks=True),
    AskMode(
        "s2s_think",
        "Talk: think, then answer in text and speech",
        "chat",
        "speech2text_token_think",
        hears=True,
        thinks=True,
        speaks=True,
    ),
    AskMode(
        "s2s_streaming",
        "Talk: text and speech in turns",
        "chat",
        "speech2text_token_streaming",
        hears=True,
        speaks=True,
        interleaved=True,
    ),
    AskMode(
        "s2s_streaming_think",
        "Talk: think, then text and speech in turns",
        "chat",
        "speech2text_token_streaming_think",
        hears=True,
        thinks=True,
        speaks=True,
        interleaved=True,
    ),
    AskMode("tts", "Say a text", "speak", "text2token", reads=True, speaks=True),
    AskMode(
        "tts_streaming", "Say a text, speech in turns", "speak", "text2token_streaming", reads=True, speaks=True, interleaved=True
    ),
    AskMode("t2t", "Answer a text", "chat", "text2text", reads=True),
    AskMode("t2s", "Answer a text, and say the answer", "chat", "text2text", reads=True, speaks=True, then="tts"),
    AskMode(
        "t2s_streaming",
        "Answer a text, and say the answer in turns",
        "chat",
        "text2text",
        reads=True,
        speaks=True,
        interleaved=True,
        then="tts_streaming",
    ),
)
MODES: Mapping[str, AskMode] = {row.name: row for row in _ROWS}
_CHOICES = {(m.kind, m.hears, m.thinks, m.speaks, m.interleaved): m for m in _ROWS if m.kind != "understand"}


def find_mode(name: str) -> AskMode:
    """The row of a mode by its name, or of an understanding task by its task string. Raises ValueError for an unknown
    one."""
    mode = MODES.get(name) or next((m for m in MODES.values() if m.task == name), None)
    if mode is None:
        raise ValueError(f"unknown task {name!r}: use one of {', '.join(MODES)}")
    return mode


# ---- ask -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """One thing to ask; what is not given is not used.

    Attributes:
        wav: a recording. text: a written question (without a recording), or the text to say (``kind="speak"``).
        kind: ``chat`` (default), ``understand`` or ``speak``.
        task, prompt: of understanding: the task string, and an instruction instead of the task's own.
        think: let the model think first: ``tag`` or ``language``, the form that its checkpoint was trained for.
        speak: answer in speech as well. interleaved: text and speech in turns (6:18) instead of one after the other.
        seed: the same seed gives the same reply, alone and in any company (in bfloat16 but for rounding, which differs
            with the number of rows).
        greedy: take the most likely id at every step instead of sampling.
        speaker: another voice than the loaded one.
        temperature: of text and speech, instead of the checkpoint's own; 0 is greedy.
        max_tokens: ids that are generated at most (think, text and speech together; again where an answered text is
            said), instead of the checkpoint's own limit. A reply that reaches it has the finish reason ``length``.
        mode: the row of `MODES` that these come to.

    Raises:
        ValueError: for what does not go together.
    """

    wav: Source | None = None
    text: str | None = None
    kind: Kind = "chat"
    task: str = _DEFAULT_TASK
    prompt: str | None = None
    think: ThinkForm = None
    speak: bool = False
    interleaved: bool = False
    seed: int = 0
    greedy: bool = False
    speaker: Voice | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    mode: AskMode = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.think not in (None, "tag", "language"):
            raise ValueError(f"think={self.think!r}: use None, 'tag' or 'language'")
        if self.temperature is not None and not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or more")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")
        object.__setattr__(self, "mode", self._find_mode())
        if self.mode.hears and self.wav is None:
            raise ValueError(f"{self.kind} needs a recording")
        if self.mode.reads and not (self.text or "").strip():
            raise ValueError("there is neither a recording nor a text" if self.kind == "chat" else "there is no text to say")
        if self.wav is not None and self.text is not None:
            raise ValueError("give a recording or a text, not both")

    def _find_mode(self) -> AskMode:
        hears = self.kind == "understand" or self.wav is not None
        if self.think is not None and (self.kind != "chat" or not hears):
            raise ValueError("the model thinks about recordings that it answers, and about recordings only; leave think out")
        if self.kind == "understand":
            if find_task(self.task).output_type != "text":
                raise ValueError(f"{self.task} is no understanding task; use chat or speak")
            if self.speak:
                raise ValueError("an understanding task is answered in text; leave speak out, or use chat")
            return MODES.get(short_name(self.task)) or _understanding(self.task)
        if self.kind not in ("chat", "speak"):
            raise ValueError(f"kind={self.kind!r}: use chat, understand or speak")
        speaks = self.speak or self.kind == "speak"
        return _CHOICES[self.kind, hears and self.kind == "chat", self.think is not None, speaks, self.interleaved and speaks]


# ---- reply -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AudioChunk:
    """More of the reply's sound: samples [n] float32."""

    samples: Samples
    rate: int


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: the reply (the transcript, the tags, the text that was said ...), without the think.
        think: raw and parsed; None when there was none.
        speech_tokens: 25 a second, no delimiters.
        audio: samples [n] float32 at ``sample_rate``; None without speech, or without token2wav.
        finish_reason: ``stop``, ``length`` (cut off by a limit), ``cancelled`` or ``silence`` (nothing was to be heard,
            the model was not asked).
        guards: how often each guard acted.
    """

    text: str
    think: Think | None = None
    speech_tokens: tuple[int, ...] = ()
    audio: Samples | None = None
    sample_rate: int = SAMPLE_RATE
    finish_reason: str = "stop"
    guards: Mapping[str, int] = field(default_factory=dict)
    timings: Timings = field(default_factory=Timings)

    def save(self, path: str | Path) -> None:
        """Write the sound in the format of the suffix; its metadata say that it is synthetic. Raises ValueError when
        there is none."""
        if self.audio is None:
            raise ValueError("this reply has no sound")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write(path, self.audio, self.sample_rate, comment=SYNTHETIC)

    def wav(self) -> bytes:
        """The sound as `save` writes it to a wav file. Raises ValueError when there is none."""
        if self.audio is None:
            raise ValueError("this reply has no sound")
        return encode(self.audio, self.sample_rate, comment=SYNTHETIC)

    def as_json(self) -> dict[str, Any]:
        """Plain data for JSON, without the samples."""
        return {
            "text": self.text,
            "think": None if self.think is None else dataclasses.asdict(self.think),
            "speech_tokens": list(self.speech_tokens),
            "sample_rate": self.sample_rate if self.audio is not None else None,
            "finish_reason": self.finish_reason,
            "guards": dict(self.guards),
            "timings": {name: _rounded(value) for name, value in dataclasses.asdict(self.timings).items()},
        }


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
