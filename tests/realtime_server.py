"""A small Realtime server for tests: finds turns by level, answers after a fixed time with a tone, stops when it is interrupted.

It speaks as much of the GA protocol as a client sees in a conversation, and keeps its own times of what it did, by the clock of the event loop that it runs in.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection, serve

RATE = 24_000


class Server:
    """Answers ``latency`` seconds after the end of a turn with ``answer`` seconds of a tone, sent as fast as it goes or ``paced``: at the speed of life, or ``pace``
    times as slowly.

    ``after_commit``: its own measure for each answer, from commit to the first sound.
    """

    def __init__(
        self,
        latency: float = 0.2,
        answer: float = 1.0,
        silence: float = 0.3,
        paced: bool = False,
        refuse: str = "",
        pace: float = 1.0,
    ) -> None:
        self.latency, self.answer, self.silence, self.refuse = latency, answer, silence, refuse
        self.pause = 0.1 * pace if paced else 0.0  # between pieces of 0.1 s
        self.after_commit: list[float] = []
        self.received: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"ws://127.0.0.1:{self.port}/v1/realtime"

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Server]:
        """Serve while the block runs, in its loop."""
        async with serve(self._talk, "127.0.0.1", self.port, max_size=None):
            yield self

    async def _talk(self, client: ServerConnection) -> None:
        self.headers.append(client.request.headers.get("Authorization") if client.request else None)
        await self._send(client, "session.created")
        speaking, quiet, answering = False, 0.0, None
        with contextlib.suppress(asyncio.CancelledError):
            async for message in client:
                event = json.loads(message)
                if event["type"] != "input_audio_buffer.append":
                    self.received.append(event)
                    if event["type"] == "session.update":
                        if self.refuse:
                            await self._send(client, "error", error={"message": self.refuse})
                            return
                        await self._send(client, "session.updated")
                    continue
                samples = np.frombuffer(base64.b64decode(event["audio"]), "<i2") / 32768
                loud = float(np.abs(samples).max(initial=0)) > 0.05
                quiet = 0.0 if loud else quiet + len(samples) / RATE
                if loud and not speaking:
                    speaking = True
                    await self._send(client, "input_audio_buffer.speech_started", audio_start_ms=0, item_id="u")
                    if answering is not None and not answering.done():
                        answering.cancel()
                        await self._send_piece(client, self._tone()[: RATE // 10])  # it was on its way
                        await self._send(client, "response.done", response={"id": self._response, "status": "cancelled"})
                elif speaking and quiet >= self.silence:
                    speaking = False
                    await self._send(client, "input_audio_buffer.speech_stopped", audio_end_ms=0, item_id="u")
                    await self._send(client, "input_audio_buffer.committed", item_id="u", previous_item_id=None)
                    answering = asyncio.create_task(self._answer(client, _now()))

    async def _answer(self, client: ServerConnection, committed: float) -> None:
        self._response = f"r{len(self.after_commit)}"
        self._where = {
            "response_id": self._response,
            "item_id": f"i{len(self.after_commit)}",
            "output_index": 0,
            "content_index": 0,
        }
        await self._send(client, "response.created", response={"id": self._response})
        await asyncio.sleep(self.latency)
        tone = self._tone()
        self.after_commit.append(_now() - committed)
        for start in range(0, len(tone), RATE // 10):
            await self._send_piece(client, tone[start : start + RATE // 10])
            await asyncio.sleep(self.pause)
        await self._send(client, "response.output_audio.done", **self._where)
        await self._send(client, "response.done", response={"id": self._response, "status": "completed"})

    def _tone(self) -> np.ndarray:
        return (8000 * np.sin(2 * np.pi * 440 * np.arange(int(self.answer * RATE)) / RATE)).astype("<i2")

    async def _send_piece(self, client: ServerConnection, piece: np.ndarray) -> None:
        sound = base64.b64encode(piece.tobytes()).decode()
        await self._send(client, "response.output_audio.delta", delta=sound, **self._where)
        await self._send(client, "response.output_audio_transcript.delta", delta="la ", **self._where)

    async def _send(self, client: ServerConnection, kind: str, **fields: Any) -> None:
        await client.send(json.dumps({"type": kind, "event_id": "e", **fields}))


def _now() -> float:
    return asyncio.get_running_loop().time()
