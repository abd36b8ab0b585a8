"""A plain client for the points: sends, collects, waits; every frame of the server is checked against the openai
package."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import soxr
from pydantic import ValidationError
from typing_extensions import Self
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Origin, Subprotocol

from osum_echat.serving.realtime.events import server_event_adapter

RATE = 24_000


class Failure(AssertionError):
    """A point does not hold; the message says what was seen."""


def check(holds: bool, message: str) -> None:
    if not holds:
        raise Failure(message)


class Target:
    """Where the server is, what speech to send to it, and how long to wait for it."""

    def __init__(self, url: str, key: str = "conformance", speech: Any = None, timeout: float = 20.0) -> None:
        self.url, self.key, self.timeout = url, key, timeout
        self.speech = default_speech() if speech is None else speech  # 24 kHz, [-1, 1]

    def open(self, path: str | None = None, **options: Any) -> Client:
        return Client(self, self.url if path is None else path, **options)


class Client:
    """One connection, as a context manager. ``seen``: every event so far, checked."""

    def __init__(
        self, target: Target, url: str, key: str | None = "", subprotocols: Sequence[str] = (), origin: str | None = None
    ) -> None:
        self.target, self.url = target, url
        self._headers = {} if key is None else {"Authorization": f"Bearer {key or target.key}"}
        self._subprotocols = [Subprotocol(p) for p in subprotocols] or None
        self._origin = None if origin is None else Origin(origin)
        self.seen: list[dict[str, Any]] = []
        self.rejected: list[str] = []
        self.closed: int | None = None
        self._news = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._socket: ClientConnection = await connect(
            self.url, additional_headers=self._headers, subprotocols=self._subprotocols, origin=self._origin, max_size=8 * 2**20
        )
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._reader.cancel()
        await self._socket.close()
        if error is None and self.rejected:
            raise Failure(f"the openai package rejects a frame: {self.rejected[0]}")

    @property
    def subprotocol(self) -> str | None:
        return self._socket.subprotocol

    async def _read(self) -> None:
        try:
            async for message in self._socket:
                event = json.loads(message)
                try:
                    server_event_adapter().validate_python(event)
                except ValidationError as fault:
                    first = fault.errors(include_url=False, include_input=False, include_context=False)[0]
                    self.rejected.append(f"{event.get('type')}: {'.'.join(map(str, first['loc']))} {first['msg']}")
                self.seen.append(event)
                self._news.set()
        except ConnectionClosed:
            pass
        self.closed = self._socket.close_code or 1006
        self._news.set()

    async def send(self, *events: dict[str, Any] | str) -> None:
        for event in events:
            await self._socket.send(event if isinstance(event, str) else json.dumps(event))

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.seen if event.get("type") == kind]

    def kinds(self, prefix: str = "") -> list[str]:
        """Types in order, of which those that repeat stand once."""
        kinds: list[str] = []
        for event in self.seen:
            if event["type"].startswith(prefix) and (not kinds or kinds[-1] != event["type"]):
                kinds.append(event["type"])
        return kinds

    async def until(self, kind: str, count: int = 1, test: Callable[[dict[str, Any]], bool] = lambda _: True) -> dict[str, Any]:
        """The ``count``-th event of a type that passes ``test``."""

        async def wait() -> dict[str, Any]:
            while True:
                found = [event for event in self.all(kind) if test(event)]
                if len(found) >= count:
                    return found[count - 1]
                if self.closed is not None:
                    raise Failure(
                        f"the server closed the connection ({self.closed}) before {kind}; there was {self.kinds()[-6:]}"
                    )
                self._news.clear()
                await self._news.wait()

        try:
            return await asyncio.wait_for(wait(), self.target.timeout)
        except asyncio.TimeoutError:
            raise Failure(f"no {kind} within {self.target.timeout:g} s; there was {self.kinds()[-6:]}") from None

    async def quiet(self, seconds: float = 0.5) -> int:
        """How many events came in this time."""
        before = len(self.seen)
        await asyncio.sleep(seconds)
        return len(self.seen) - before

    # ---- what points do again and again ------------------------------------------------------------------------------

    async def update(self, **session: Any) -> dict[str, Any]:
        """Update the session; returns what the server says it is then."""
        count = len(self.all("session.updated"))
        await self.send({"type": "session.update", "session": {"type": "realtime", **session}})
        return (await self.until("session.updated", count + 1))["session"]

    async def manual(self) -> None:
        """Push to talk."""
        await self.until("session.created")
        await self.update(audio={"input": {"turn_detection": None}})

    async def say(self, text: str, item_id: str | None = None, **fields: Any) -> str:
        """A written item; returns its id."""
        count = len(self.all("conversation.item.added"))
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
        await self.send({"type": "conversation.item.create", "item": item | ({"id": item_id} if item_id else {}), **fields})
        return (await self.until("conversation.item.added", count + 1))["item"]["id"]

    async def append(self, samples: Any, step: int = 2400) -> None:
        data = to_pcm(samples)
        for start in range(0, len(data), step * 2):
            piece = base64.b64encode(data[start : start + step * 2]).decode()
            await self.send({"type": "input_audio_buffer.append", "audio": piece})

    async def speak(self) -> None:
        """A spoken turn, with silence around it."""
        silence = np.zeros(RATE, dtype=np.float32)
        await self.append(np.concatenate([silence[: RATE // 2], self.target.speech, silence, silence[: RATE // 4]]))

    async def turn(self) -> None:
        """A spoken turn by push to talk, with the response asked for."""
        await self.append(self.target.speech)
        await self.send({"type": "input_audio_buffer.commit"}, {"type": "response.create"})

    async def fault(self, event: dict[str, Any] | str) -> dict[str, Any]:
        """Send what is wrong; returns the error."""
        count = len(self.all("error"))
        await self.send(event)
        return (await self.until("error", count + 1))["error"]


def to_pcm(samples: Any) -> bytes:
    return (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()


def read_speech(path: str) -> Any:
    """A recording at the protocol's rate."""
    from osum_echat.audio.io import read

    audio = read(path)
    return soxr.resample(audio.mono(), audio.rate, RATE).astype(np.float32)


def default_speech() -> Any:
    """2 s that a voice activity detector takes for speech: a buzz through three moving formants, in syllables. Give a
    recording for servers that want words."""
    t = np.arange(2 * RATE) / RATE
    pitch = 120 + 20 * np.sin(2 * np.pi * 0.8 * t)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    sound = np.zeros_like(t)
    for base, swing, width in ((600, 200, 90), (1300, 500, 120), (2500, 300, 160)):
        centre = base + swing * np.sin(2 * np.pi * 2.1 * t + base)
        for harmonic in range(1, 28):
            gain = np.exp(-(((harmonic * pitch - centre) / width) ** 2) / 2)
            sound += gain * np.sin(harmonic * phase) / (1 + base / 1500)
    syllables = np.clip(np.sin(2 * np.pi * 3.2 * t) * 3 + 1.6, 0, 1)
    sound *= syllables
    return (0.5 * sound / np.abs(sound).max()).astype(np.float32)
