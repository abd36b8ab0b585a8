"""What the tests of the live server share: a model that says what it is given, a session with it, and sound to send."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openai")

from osum_echat.serving.backend import Ended, Event, Exchange, Heard, Refused, Sound, Text, Thought, ThoughtDone, Turn
from osum_echat.serving.realtime.events import server_event_adapter
from osum_echat.serving.realtime.session import RealtimeSession
from osum_echat.serving.realtime.settings import SessionLimits
from osum_echat.serving.vad import TurnModels

RATE = 24_000


class FakeJob:
    """Plays a script: events, and numbers of seconds to wait."""

    def __init__(self, script: Sequence[Event | float]) -> None:
        self.script = list(script)
        self.cancelled = asyncio.Event()
        self.paused: list[bool] = []

    async def __aiter__(self) -> AsyncIterator[Event]:
        for step in self.script:
            if isinstance(step, float):
                try:
                    await asyncio.wait_for(self.cancelled.wait(), step)
                except asyncio.TimeoutError:
                    continue
            if self.cancelled.is_set():
                yield Ended("cancelled")
                return
            assert not isinstance(step, float)
            yield step
        if not (self.script and isinstance(self.script[-1], Ended)):
            yield Ended("stop", codes=tuple(range(25)), tokens={"read": 10, "heard": 5, "text": 3, "speech": 25, "thought": 4})

    def cancel(self) -> None:
        self.cancelled.set()

    def slow(self, on: bool) -> None:
        self.paused.append(on)


class FakeMemory:
    closed = False

    def close(self) -> None:
        self.closed = True


class FakeBackend:
    """Answers every turn with ``script(turn)``; remembers what it was asked."""

    name = "fake"
    max_seconds = 30.0
    thinks = ("tag",)
    warnings = {"instructions": "this checkpoint follows no instructions", "tools": "it calls no tools"}  # noqa: RUF012
    codes_per_second = 25.0

    def __init__(
        self, script: Callable[[Turn], Sequence[Event | float]] | None = None, transcript: str = "what was said"
    ) -> None:
        self.script = script or answer
        self.transcript = transcript
        self.turns: list[Turn] = []
        self.jobs: list[FakeJob] = []
        self.remembered: list[list[Exchange]] = []
        self.memories: list[FakeMemory] = []
        self.refuse: Refused | None = None

    def open(self) -> FakeMemory:
        self.memories.append(FakeMemory())
        return self.memories[-1]

    async def hear(self, samples: np.ndarray) -> Heard:
        await asyncio.sleep(0)
        if len(samples) < 1600:
            raise ValueError("too short")
        return Heard(len(samples), len(samples) / 16000)

    def start(self, turn: Turn, memory: FakeMemory | None = None) -> FakeJob:
        if self.refuse is not None:
            raise self.refuse
        self.turns.append(turn)
        self.jobs.append(FakeJob(self.script(turn)))
        return self.jobs[-1]

    async def transcribe(self, heard: Heard) -> str:
        await asyncio.sleep(0)
        return self.transcript

    def remember(self, memory: FakeMemory, past: Sequence[Exchange], turn: Turn) -> None:
        self.remembered.append(list(past))


def tone(seconds: float, rate: int = 22050) -> Sound:
    return Sound(np.sin(np.arange(round(seconds * rate)) / 20).astype(np.float32) / 3, rate)


def answer(turn: Turn) -> list[Event | float]:
    events: list[Event | float] = []
    if turn.think is not None:
        events += [
            Thought("he said hello, "),
            Thought("happy"),
            ThoughtDone("he said hello, happy", {"transcript": "hello", "emotion": "happy"}),
        ]
    events += [Text("Hello "), Text("there, friend.")]
    if turn.speak:
        events += [tone(0.4), tone(0.6)]
    return events


def speech_pcm(seconds: float, loud: float = 0.5) -> bytes:
    """Sound that energy takes for speech (or silence), as the client sends it."""
    wave = np.sin(np.arange(round(seconds * RATE)) / 15) * loud
    return (wave * 32767).astype("<i2").tobytes()


def append(pcm: bytes) -> list[dict[str, Any]]:
    """The messages that bring it, in pieces of 100 ms with odd borders."""
    step = 4801
    return [
        {"type": "input_audio_buffer.append", "audio": base64.b64encode(pcm[i : i + step]).decode()}
        for i in range(0, len(pcm), step)
    ]


def spoken(seconds: float = 1.0, silence: float = 0.9) -> list[dict[str, Any]]:
    return append(speech_pcm(0.5, 0) + speech_pcm(seconds) + speech_pcm(silence, 0))


PTT: dict[str, Any] = {"type": "session.update", "session": {"type": "realtime", "audio": {"input": {"turn_detection": None}}}}
"""Push to talk: no turn detection."""
CREATE = {"type": "response.create"}
COMMIT = {"type": "input_audio_buffer.commit"}


def update(**session: Any) -> dict[str, Any]:
    return {"type": "session.update", "session": {"type": "realtime", **session}}


def said(text: str, role: str = "user", **fields: Any) -> dict[str, Any]:
    kind = {"user": "input_text", "assistant": "output_text", "system": "input_text"}[role]
    item = {"type": "message", "role": role, "content": [{"type": kind, "text": text}], **fields}
    return {"type": "conversation.item.create", "item": item}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def slow_answer(_: Any) -> list[Any]:
    """Ten words, and ten seconds of sound in two seconds."""
    pieces: list[Any] = [Text("one two three four five six seven eight nine ten")]
    for _ in range(100):
        pieces += [tone(0.1), 0.02]
    return pieces


class Client:
    """A session and everything that it has sent; every message is checked against the openai package as it comes."""

    def __init__(self, backend: FakeBackend | None = None, limits: SessionLimits | None = None, **options: Any) -> None:
        self.backend = backend or FakeBackend()
        self.sent: list[dict[str, Any]] = []
        self.arrived = asyncio.Event()
        limits = limits or SessionLimits(ahead_seconds=1000.0)
        self.session = RealtimeSession(self.backend, TurnModels.energy(), self._take, limits, **options)
        self.session.begin()

    def _take(self, text: str) -> None:
        event = json.loads(text)
        if not event["type"].startswith("x_echat."):
            server_event_adapter().validate_python(event)
        self.sent.append(event)
        self.arrived.set()

    async def send(self, *messages: dict[str, Any] | str) -> None:
        for message in messages:
            await self.session.handle(message if isinstance(message, str) else json.dumps(message))

    async def until(self, kind: str, count: int = 1, timeout: float = 60.0) -> dict[str, Any]:
        """The ``count``-th event of this kind, waiting for it."""

        async def wait() -> dict[str, Any]:
            while len(found := self.all(kind)) < count:
                self.arrived.clear()
                await self.arrived.wait()
            return found[count - 1]

        try:
            return await asyncio.wait_for(wait(), timeout)
        except asyncio.TimeoutError:
            raise AssertionError(f"no {kind}; there was {self.kinds()}") from None

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.sent if event["type"] == kind]

    def kinds(self) -> list[str]:
        """Types in order, repeated deltas once."""
        kinds: list[str] = []
        for event in self.sent:
            if not kinds or kinds[-1] != event["type"]:
                kinds.append(event["type"])
        return kinds

    def last(self) -> dict[str, Any]:
        return self.sent[-1]


async def at_rest(model: Any) -> None:
    """The engine of a `LiveModel` has done all that was submitted."""
    while model.load().waiting or model.load().positions != model.load().kept:
        await asyncio.sleep(0.02)
    await asyncio.wrap_future(model.engine.run(lambda: None))  # behind what is being done


def live(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """An async test, which may wait as long as a busy machine takes."""
    import functools
    import inspect

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 240))

    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return run
