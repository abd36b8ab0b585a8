"""A session on a WebSocket: reading, writing, and the ends that a session machine does not know (idle, full, too slow,
shutting down)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, MutableMapping
from typing import Any, Protocol

from fastapi import WebSocketDisconnect

from osum_echat.serving.realtime import tasks
from osum_echat.serving.realtime.events import build_error
from osum_echat.serving.realtime.settings import SessionLimits

log = logging.getLogger(__name__)
_INBOX = 8
"""Messages of a client that may wait for the one that is acted upon; behind them the client has to wait."""
GOING_AWAY, TOO_BIG, POLICY, TRY_LATER = 1001, 1009, 1008, 1013


class Machine(Protocol):
    """A session machine (`session.RealtimeSession`, `gpt_live.LiveSession`)."""

    def begin(self) -> None: ...

    async def handle(self, text: str, arrived: float | None = None) -> None: ...

    async def close(self) -> None: ...

    @property
    def busy(self) -> bool: ...


class Socket(Protocol):
    """What is needed of a WebSocket (`fastapi.WebSocket`, `webrtc.CallSocket`)."""

    async def send_text(self, data: str) -> None: ...

    async def receive(self) -> MutableMapping[str, Any]:
        """A message of ASGI. One with ``sound`` is a piece of a track, which comes whether anybody is there or not."""

    async def close(self, code: int = 1000, reason: str | None = None) -> None: ...


class Connection:
    """One client. ``make`` builds the machine of a connection, which sends by `emit` and may ask for the end by
    `end`."""

    def __init__(self, socket: Socket, make: Callable[[Connection], Machine], limits: SessionLimits) -> None:
        self.socket, self.limits = socket, limits
        self._outbox: asyncio.Queue[str | None] = asyncio.Queue()
        self._inbox: asyncio.Queue[tuple[str, float]] = asyncio.Queue(_INBOX)
        self._why: tuple[int, str] | None = None
        self._ended = asyncio.Event()
        self._draining = False
        self._seen = time.monotonic()
        self.machine = make(self)

    def emit(self, text: str) -> None:
        if self._outbox.qsize() >= self.limits.outbox:
            self.end(POLICY, "too many messages wait: the client does not read")
            return
        self._outbox.put_nowait(text)

    def end(self, code: int, why: str) -> None:
        """Close the connection, for a reason that is a sentence."""
        if self._why is None:
            self._why = (code, why)
            self._ended.set()

    def seen(self) -> None:
        """The client has given a sign of life."""
        self._seen = time.monotonic()

    def drain(self) -> None:
        """The server is going down: end when the answer that is being made has been."""
        self._draining = True
        if not self.machine.busy:
            self.end(GOING_AWAY, "the server is shutting down; connect again later")

    async def serve(self) -> None:
        """Until the client or the server has had enough."""
        writer = asyncio.create_task(self._write())
        reader = asyncio.create_task(self._read())
        actor = asyncio.create_task(self._act())
        ended = asyncio.create_task(self._ended.wait())
        clock = asyncio.create_task(self._watch())
        try:
            self.machine.begin()
            await asyncio.wait([writer, reader, actor, ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            await tasks.end(reader, actor, clock, ended)
            await self.machine.close()
            await self._say_goodbye(writer)
            for task in (reader, actor, writer):
                if not task.cancelled() and (error := task.exception()) is not None:
                    log.error("a connection failed", exc_info=error)

    async def _say_goodbye(self, writer: asyncio.Task[None]) -> None:
        if self._why is not None and not writer.done():
            code, why = self._why
            if why:
                self._outbox.put_nowait(build_error("session_ended", why, fault=True))
            self._outbox.put_nowait(None)
            await asyncio.wait([writer], timeout=2.0)
            try:
                await asyncio.wait_for(self.socket.close(code, why[:120]), 2.0)
            except (RuntimeError, WebSocketDisconnect, asyncio.TimeoutError, OSError) as error:
                log.debug("a client was gone before the goodbye: %s", error)
        await tasks.end(writer)

    async def _write(self) -> None:
        while (text := await self._outbox.get()) is not None:
            try:
                await self.socket.send_text(text)
            except (RuntimeError, WebSocketDisconnect, OSError) as error:
                log.debug("a client has gone: %s", error)
                return

    async def _read(self) -> None:
        while True:
            try:
                left = self._seen + self.limits.idle_seconds - time.monotonic()
                message: MutableMapping[str, Any] = await asyncio.wait_for(self.socket.receive(), left)
            except asyncio.TimeoutError:
                if time.monotonic() - self._seen < self.limits.idle_seconds:
                    continue  # somebody spoke meanwhile
                self.end(GOING_AWAY, f"nothing was received for {self.limits.idle_seconds:g} s")
                return
            except (RuntimeError, WebSocketDisconnect):
                return
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            if text is None:
                text = (message.get("bytes") or b"").decode("utf-8", errors="replace")
            if len(text) > self.limits.message_bytes:
                await self._inbox.join()
                self.end(TOO_BIG, f"a message may have {self.limits.message_bytes} bytes")
                return
            await self._inbox.put((text, time.monotonic()))
            if not message.get("sound"):
                self.seen()

    async def _act(self) -> None:
        """Messages one after the other; each knows when it came, whatever the one before it took."""
        while True:
            text, arrived = await self._inbox.get()
            await self.machine.handle(text, arrived)
            self._inbox.task_done()

    async def _watch(self) -> None:
        """The end of the session's time, and of a server that waits for the answer in progress."""
        left = self.limits.session_seconds
        while left > 0:
            await asyncio.sleep(min(left, 0.1 if self._draining else 1.0))
            left -= 0.1 if self._draining else 1.0
            if self._draining and not self.machine.busy:
                self.end(GOING_AWAY, "the server is shutting down; connect again later")
                return
        self.end(GOING_AWAY, f"a session may last {self.limits.session_seconds:g} s; connect again")
