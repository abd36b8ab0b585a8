"""A small Realtime server for tests: finds turns by level, answers after a fixed time with a tone, stops when it is interrupted.

It speaks as much of the GA protocol as a client sees in a conversation, and keeps its own times of what it did.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import threading
import time
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection, serve

RATE = 24_000


class Server:
    """Answers ``latency`` seconds after the end of a turn with ``answer`` seconds of a tone, sent as fast as it goes or at the speed of life.

    ``after_commit``: its own measure for each answer, from commit to the first sound.
    """

    def __init__(
        self, latency: float = 0.2, answer: float = 1.0, silence: float = 0.3, paced: bool = False, refuse: str = ""
    ) -> None:
        self.latency, self.answer, self.silence, self.paced, self.refuse = latency, answer, silence, paced, refuse
        self.after_commit: list[float] = []
        self.received: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        self._ready = threading.Event()

    def __enter__(self) -> Server:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, daemon=True).start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)

    def _run(self) -> None:
        async def main() -> None:
            self._stop = asyncio.Event()
            async with serve(self._talk, "127.0.0.1", 0, max_size=None) as server:
                self.url = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}/v1/realtime"
                self._ready.set()
                await self._stop.wait()

        self._loop.run_until_complete(main())

    async def _talk(self, socket: ServerConnection) -> None:
        self.headers.append(socket.request.headers.get("Authorization") if socket.request else None)
        await self._send(socket, "session.created")
        speaking, quiet, answering = False, 0.0, None
        with contextlib.suppress(asyncio.CancelledError):
            async for message in socket:
                event = json.loads(message)
                if event["type"] != "input_audio_buffer.append":
                    self.received.append(event)
                    if event["type"] == "session.update":
                        if self.refuse:
                            await self._send(socket, "error", error={"message": self.refuse})
                            return
                        await self._send(socket, "session.updated")
                    continue
                samples = np.frombuffer(base64.b64decode(event["audio"]), "<i2") / 32768
                loud = float(np.abs(samples).max(initial=0)) > 0.05
                quiet = 0.0 if loud else quiet + len(samples) / RATE
                if loud and not speaking:
                    speaking = True
                    await self._send(socket, "input_audio_buffer.speech_started", audio_start_ms=0, item_id="u")
                    if answering is not None and not answering.done():
                        answering.cancel()
                        await self._send(socket, "response.done", response={"id": self._response, "status": "cancelled"})
                elif speaking and quiet >= self.silence:
                    speaking = False
                    await self._send(socket, "input_audio_buffer.speech_stopped", audio_end_ms=0, item_id="u")
                    await self._send(socket, "input_audio_buffer.committed", item_id="u", previous_item_id=None)
                    answering = asyncio.create_task(self._answer(socket, time.perf_counter()))

    async def _answer(self, socket: ServerConnection, committed: float) -> None:
        self._response = f"r{len(self.after_commit)}"
        where = {"response_id": self._response, "item_id": f"i{len(self.after_commit)}", "output_index": 0, "content_index": 0}
        await self._send(socket, "response.created", response={"id": self._response})
        await asyncio.sleep(self.latency)
        tone = (8000 * np.sin(2 * np.pi * 440 * np.arange(int(self.answer * RATE)) / RATE)).astype("<i2")
        self.after_commit.append(time.perf_counter() - committed)
        for start in range(0, len(tone), RATE // 10):
            piece = tone[start : start + RATE // 10]
            await self._send(socket, "response.output_audio.delta", delta=base64.b64encode(piece.tobytes()).decode(), **where)
            await self._send(socket, "response.output_audio_transcript.delta", delta="la ", **where)
            await asyncio.sleep(0.1 if self.paced else 0)
        await self._send(socket, "response.output_audio.done", **where)
        await self._send(socket, "response.done", response={"id": self._response, "status": "completed"})

    async def _send(self, socket: ServerConnection, kind: str, **fields: Any) -> None:
        await socket.send(json.dumps({"type": kind, "event_id": "e", **fields}))
