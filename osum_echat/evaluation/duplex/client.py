"""A paced client of the Realtime API: sends a recording at the speed at which it was spoken, and plays what comes.

As the API asks of clients on a WebSocket, an answer that is interrupted (``input_audio_buffer.speech_started`` while it
plays) is stopped, what was not played is forgotten, and the server is told how much was heard
(``conversation.item.truncate``).
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import websockets
from websockets.asyncio.client import ClientConnection, connect

from osum_echat.evaluation.duplex.timeline import Samples, Timeline

RATE = 24_000
_AUDIO = ("response.output_audio.delta", "response.audio.delta")
_TEXT = (
    "response.output_audio_transcript.delta",
    "response.audio_transcript.delta",
    "response.output_text.delta",
    "response.text.delta",
)
_SECRET = ("delta", "audio")


class LiveError(ValueError):
    """The server could not be reached, or ended the conversation; the message says what it said."""


@dataclass(frozen=True)
class Settings:
    """How a conversation is held.

    Attributes:
        url: ``ws://host:port/v1/realtime``; ``?model=`` may follow. key: of the server, as a bearer token.
        session: fields of ``session.update`` laid over those of the client (instructions, voice, turn detection).
        chunk: seconds of sound in a message. tail: seconds of quiet after the last answer before the end.
        patience: seconds after the end of the input at most.
    """

    url: str
    key: str | None = None
    session: Mapping[str, Any] = field(default_factory=dict)
    chunk: float = 0.02
    tail: float = 1.5
    patience: float = 30.0


@dataclass
class Recording:
    """What came of a conversation: times are seconds since it began."""

    timeline: Timeline
    events: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0

    def times(self, *kinds: str) -> list[float]:
        """When events of these types came."""
        return [event["t"] for event in self.events if event["from"] == "server" and event["type"] in kinds]

    def cancelled(self) -> set[str]:
        """Responses that the server did not bring to their end."""
        done = [event.get("response", {}) for event in self.events if event["type"] == "response.done"]
        return {str(response.get("id")) for response in done if response.get("status") in ("cancelled", "incomplete")}


class Conversation:
    """One conversation on one connection."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.recording = Recording(Timeline(RATE))
        self._began: float | None = None
        self._open_responses: set[str] = set()
        self._ignored: set[str] = set()  # responses that were interrupted
        self._playing: tuple[str, str] = ("", "")  # response, item
        self._item_started: dict[str, float] = {}
        self._texts: dict[str, str] = {}

    @property
    def now(self) -> float:
        """Seconds since the recording began, by the clock of the event loop."""
        return 0.0 if self._began is None else asyncio.get_running_loop().time() - self._began

    async def hold(self, samples: Samples) -> Recording:
        """Play ``samples`` [n] at 24 kHz to the server. Raises LiveError."""
        headers = {"Authorization": f"Bearer {self.settings.key}"} if self.settings.key else {}
        try:
            async with connect(self.settings.url, additional_headers=headers, max_size=None, open_timeout=30) as socket:
                await self._agree(socket)
                listener = asyncio.create_task(self._listen(socket))
                speaker = asyncio.create_task(self._speak(socket, samples))
                done, _ = await asyncio.wait([listener, speaker], return_when=asyncio.FIRST_COMPLETED)
                for task in (listener, speaker):
                    if task not in done:
                        task.cancel()
                await asyncio.gather(listener, speaker, return_exceptions=True)
                for task in done:
                    if (error := task.exception()) is not None:
                        raise error
                if speaker not in done:
                    raise LiveError("the server ended the conversation")
        except (OSError, websockets.WebSocketException, asyncio.TimeoutError) as error:
            raise LiveError(f"{self.settings.url}: {error or type(error).__name__}") from error
        self.recording.text = " ".join(text.strip() for text in self._texts.values() if text.strip())
        return self.recording

    async def _agree(self, socket: ClientConnection) -> None:
        """The session: PCM of 24 kHz both ways, the server finds the turns."""
        audio = {"type": "audio/pcm", "rate": RATE}
        session: dict[str, Any] = {"type": "realtime", "audio": {"input": {"format": audio}, "output": {"format": audio}}}
        await self._send(socket, {"type": "session.update", "session": {**session, **self.settings.session}})
        while True:
            event = json.loads(await asyncio.wait_for(socket.recv(), 30))
            self._note("server", event)
            if event["type"] == "error":
                raise LiveError(f"{self.settings.url} refuses the session: {event.get('error', {}).get('message', event)}")
            if event["type"] == "session.updated":
                return

    async def _speak(self, socket: ClientConnection, samples: Samples) -> None:
        """Chunk after chunk, each when its last sample has been spoken; then silence until the answer has been
        played."""
        size = round(self.settings.chunk * RATE)
        pcm = (np.clip(samples, -1, 1) * 32767).astype("<i2")
        quiet = np.zeros(size, "<i2")
        end = len(pcm) / RATE
        self._began = asyncio.get_running_loop().time()
        number = 0
        while not self._is_over(end):
            await asyncio.sleep(max(0.0, (number + 1) * self.settings.chunk - self.now))
            piece = pcm[number * size : (number + 1) * size]
            piece = quiet if not len(piece) else piece
            await socket.send(
                json.dumps({"type": "input_audio_buffer.append", "audio": base64.b64encode(piece.tobytes()).decode()})
            )
            number += 1
        self.recording.seconds = self.now

    def _is_over(self, end: float) -> bool:
        if self.now < end:
            return False
        if self.now > end + self.settings.patience:
            return True
        times = self.recording.times
        last = max(end, self.recording.timeline.playhead, *(times("response.done")[-1:] or [0.0]))
        heard = times("input_audio_buffer.speech_started", "input_audio_buffer.committed")[-1:] or [-1.0]
        # What it has heard, it may be about to answer.
        is_answered = heard[0] <= (times("response.created")[-1:] or [0.0])[0]
        return is_answered and not self._open_responses and self.now > last + self.settings.tail

    async def _listen(self, socket: ClientConnection) -> None:
        async for message in socket:
            event = json.loads(message)
            self._note("server", event)
            kind = event["type"]
            if kind == "response.created":
                self._open_responses.add(event["response"]["id"])
            elif kind == "response.done":
                self._open_responses.discard(event["response"]["id"])
            elif kind == "input_audio_buffer.speech_started":
                await self._interrupt(socket)
            elif kind in _AUDIO:
                self._play(event)
            elif kind in _TEXT and event.get("response_id") not in self._ignored:
                self._texts[event["item_id"]] = self._texts.get(event["item_id"], "") + event["delta"]

    def _play(self, event: Mapping[str, Any]) -> None:
        response, item = str(event.get("response_id", "")), str(event.get("item_id", ""))
        if response in self._ignored:
            return
        samples = np.frombuffer(base64.b64decode(event["delta"]), "<i2").astype(np.float32) / np.float32(32768)
        timeline = self.recording.timeline
        self._item_started.setdefault(item, max(self.now, timeline.playhead))
        self._playing = (response, item)
        timeline.play(self.now, samples, response)

    async def _interrupt(self, socket: ClientConnection) -> None:
        now = self.now
        response, item = self._playing
        if not self.recording.timeline.stop(now) and response not in self._open_responses:
            return
        self._ignored.add(response)
        heard = max(0, round(1000 * (now - self._item_started.get(item, now))))
        await self._send(
            socket, {"type": "conversation.item.truncate", "item_id": item, "content_index": 0, "audio_end_ms": heard}
        )

    async def _send(self, socket: ClientConnection, event: dict[str, Any]) -> None:
        self._note("client", event)
        await socket.send(json.dumps(event))

    def _note(self, side: str, event: Mapping[str, Any]) -> None:
        """Keep an event, without its sound."""
        kept = {name: value for name, value in event.items() if name not in _SECRET or event["type"] not in _AUDIO}
        if event["type"] in _AUDIO:
            kept["bytes"] = len(event.get("delta", "")) * 3 // 4
        self.recording.events.append({"t": round(self.now, 4), "from": side, **kept})


def hold(settings: Settings, samples: Samples) -> Recording:
    """`Conversation.hold`, for callers that are not asynchronous."""
    return asyncio.run(Conversation(settings).hold(samples))
