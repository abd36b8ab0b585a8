"""What tests of the evaluation share: a pipeline that gives prepared answers, recordings, small sets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from osum_echat.audio import io as audio_io
from osum_echat.dialogue.think import Think
from osum_echat.evaluation.items import Item
from osum_echat.evaluation.results import Result
from osum_echat.evaluation.scorers import Score, Tools, make
from osum_echat.evaluation.suite import Part, Suite
from osum_echat.pipeline import Ask, Reply
from osum_echat.pipeline.parts import NotLearnt

SAID = {"gender": "male", "age": "adult", "emotion": "sad", "event": "none"}
TEXT = "my dog ran away"
ANSWER = "I am so sorry, sir."


def item(id: str = "a", text: str = TEXT, wav: Any = b"", **labels: str) -> Item:
    return Item(id, text, wav, {**SAID, **labels}, replies=(ANSWER,))


def think(transcript: str = TEXT, **tags: str) -> Think:
    return Think(raw="x", transcript=transcript, **{**SAID, **tags})


def result(id: str = "a", text: str = ANSWER, part: str = "", **fields: Any) -> Result:
    return Result(id, part, text=text, **fields)


def thinking(id: str = "a", text: str = ANSWER, transcript: str = TEXT, **tags: str) -> Result:
    return result(id, text, think=dataclasses.asdict(think(transcript, **tags)))


def suite(*scorers: str, **fields: Any) -> Suite:
    """A suite of one part, ``p``."""
    return Suite("try", normalizer="own", parts={"p": Part(scorers=list(scorers))}, **fields)


def tools(*items: Item, **fields: Any) -> Tools:
    return Tools(fields.pop("suite", suite()), items, **fields)


def score(spec: str, one: Item, answer: Result, kit: Tools | None = None) -> Score | None:
    """What one scorer says."""
    (scorer,) = make([spec], kit or tools(one)).values()
    return scorer.score(one, answer)


def write_wav(path: Path, seconds: float = 1.0, rate: int = 16_000, level: float = 0.3, hertz: float = 220.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    audio_io.write(path, level * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate), rate)
    return path


def write_list(path: Path, wav: Path, count: int = 6, **extra: Any) -> Path:
    """A raw list of labelled recordings."""
    emotions = ("sad", "happy", "angry")
    rows = [
        {
            "key": f"k{n}",
            "wav": str(wav),
            "txt": f"sentence number {n}",
            "extra": {**SAID, "emotion": emotions[n % 3], "replies": [f"answer {n}"], **extra},
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Parrot:
    """A pipeline that answers by a function and remembers what it was asked."""

    def __init__(self, answer: Callable[[Ask, int], Reply] | Sequence[Reply]) -> None:
        self.answer, self.asked = answer, list[Ask]()

    def batch(self, asks: Sequence[Ask], size: int = 16) -> list[Reply]:
        out = []
        for ask in asks:
            out.append(self.answer(ask, len(self.asked)) if callable(self.answer) else self.answer[len(self.asked)])
            self.asked.append(ask)
        return out


class Talker(Parrot):
    """The same with sessions: ``past_turns`` before a turn at most, more are refused."""

    def __init__(self, answer: Callable[[Ask, int], Reply] | Sequence[Reply], past_turns: int = 5) -> None:
        super().__init__(answer)
        self.past_turns, self.sessions = past_turns, list[list[Ask]]()

    def session(self) -> Talker:
        self.sessions.append([])
        return self

    def chat(self, **options: Any) -> Reply:
        past = self.sessions[-1]
        if len(past) > self.past_turns:
            raise NotLearnt(f"this checkpoint has not learnt dialogues with {len(past)} past turns")
        past.append(Ask(**options))
        return self.batch([past[-1]])[0]


class Listener:
    """A recogniser that hears one sentence in whatever has sound."""

    name = "listener"

    def __init__(self, hears: str) -> None:
        self.hears, self.levels = hears, list[float]()

    def transcribe(self, samples_16k: np.ndarray, language: str = "en") -> str:
        assert samples_16k.dtype == np.float32
        self.levels.append(float(np.abs(samples_16k).max()))
        return self.hears
