"""One response: from `response.created` to `response.done`, every event in its place."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from osum_echat.serving.backend import Ended, Job, Sound, Text, Thought, ThoughtDone
from osum_echat.serving.metrics import Metrics
from osum_echat.serving.realtime.audio import Output
from osum_echat.serving.realtime.conversation import Conversation, Item, new_id
from osum_echat.serving.realtime.pace import Playback

log = logging.getLogger(__name__)
Emit = Callable[..., None]
"""``emit(kind, **fields)`` sends one event."""
PIECE_S = 0.1
"""Sound of one delta at most; small, so that clients with small buffers take it and a stop wastes little."""
_NOTHING = np.zeros(0, dtype=np.float32)
_SLOW_AT, _FAST_AT = 4.0, 2.0
"""Seconds of sound that may wait here before the model is asked to make a pause, and to go on."""


@dataclass(eq=False)
class Response:
    """State of one response.

    Attributes:
        asked: the user's items that it answers. in_conversation: False for a response beside the dialogue
            (``conversation: "none"``).
        spoken: in sound. kind: of the sound on the wire.
        started: when the turn was committed, or when the client asked for the answer, whichever was later; latencies
            are counted from there.
        thought: complete thought, set when the model has closed it; ``thought_ready`` tells who waits for it.
    """

    id: str
    item: Item
    asked: list[Item]
    playback: Playback
    spoken: bool
    kind: str
    voice: str
    max_output_tokens: int | str
    metadata: Mapping[str, str] | None = None
    in_conversation: bool = True
    started: float = 0.0
    job: Job | None = None
    task: asyncio.Task[None] | None = None
    created: bool = False
    item_open: bool = False
    done: bool = False
    thought: ThoughtDone | None = None
    thought_text: str = ""
    thought_ready: asyncio.Event = field(default_factory=asyncio.Event)
    ended: Ended | None = None
    first_audio: float | None = None

    def as_json(self, status: str, conversation: str, details: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The response object. ``conversation``: id of the dialogue."""
        body: dict[str, Any] = {
            "id": self.id,
            "object": "realtime.response",
            "status": status,
            "status_details": details,
            "output": [self.item.as_json()] if self.item_open and status != "in_progress" else [],
            "conversation_id": conversation if self.in_conversation else None,
            "output_modalities": ["audio" if self.spoken else "text"],
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata,
            "usage": self._usage() if status != "in_progress" else None,
        }
        if self.spoken:
            form = {"type": self.kind, "rate": 24000} if self.kind == "audio/pcm" else {"type": self.kind}
            body["audio"] = {"output": {"format": form, "voice": self.voice}}
        return body

    def _usage(self) -> dict[str, Any]:
        tokens = dict(self.ended.tokens) if self.ended is not None else {}
        text, speech = tokens.get("text", 0), tokens.get("speech", 0)
        heard, read, cached = tokens.get("heard", 0), tokens.get("read", 0), tokens.get("cached", 0)
        return {
            "total_tokens": read + text + speech,
            "input_tokens": read,
            "output_tokens": text + speech,
            "input_token_details": {
                "text_tokens": read - heard,
                "audio_tokens": heard,
                "cached_tokens": cached,
                "image_tokens": 0,
            },
            "output_token_details": {"text_tokens": text, "audio_tokens": speech},
        }


class Speaker:
    """Turns a job's events into the events of a response. ``emit(kind, **fields)`` sends one; the session owns what is
    around it."""

    def __init__(
        self,
        response: Response,
        emit: Callable[..., None],
        own: Callable[..., None],
        open_item: Callable[[Response], None],
        close: Callable[[Response, str, Mapping[str, Any] | None], None],
        clock: Callable[[], float],
        before: Callable[[], Any],
    ) -> None:
        self.r, self.emit, self.own, self.open_item, self.close = response, emit, own, open_item, close
        self.clock, self.before = clock, before
        self._output: Output | None = None
        self._slow = False
        self._waiting = 0.0  # seconds of sound that the model has made and that has not gone out

    async def run(self) -> None:
        """Until the job has ended. Cancelled from outside it stops where it is; the session closes the response
        then."""
        r = self.r
        assert r.job is not None
        events: asyncio.Queue[Any] = asyncio.Queue()
        reader = asyncio.create_task(self._read(events))
        try:
            await self.before()
            while True:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, Ended):
                    await self._end(event)
                    return
                await self._event(event)
        finally:
            reader.cancel()

    async def _read(self, events: asyncio.Queue[Any]) -> None:
        """Take events as they are made, so that thoughts and the need for a pause are noticed while sound waits to be
        sent."""
        r = self.r
        assert r.job is not None
        try:
            async for event in r.job:
                if isinstance(event, ThoughtDone):
                    r.thought = event
                    r.thought_ready.set()
                if isinstance(event, Ended):
                    r.ended = event
                    r.thought_ready.set()
                if isinstance(event, Sound):
                    self._waiting += len(event.samples) / event.rate
                    if self._waiting > _SLOW_AT and not self._slow:
                        self._slow = True
                        r.job.slow(True)
                events.put_nowait(event)
        except Exception as error:
            log.exception("the model failed in a response")
            events.put_nowait(error)

    def _sent(self, seconds: float) -> None:
        self._waiting = max(0.0, self._waiting - seconds)
        if self._slow and self._waiting < _FAST_AT and self.r.job is not None:
            self._slow = False
            self.r.job.slow(False)

    async def _event(self, event: Any) -> None:
        r = self.r
        if isinstance(event, Thought):
            r.thought_text += event.text
            self.own("x_echat.thought.delta", response_id=r.id, delta=event.text)
        elif isinstance(event, ThoughtDone):
            r.item.findings["thought"] = event.raw
            self.own("x_echat.thought.done", response_id=r.id, thought=event.raw, tags=dict(event.tags))
        elif isinstance(event, Text):
            self.open_item(r)
            r.item.text = (r.item.text or "") + event.text
            kind = "response.output_audio_transcript.delta" if r.spoken else "response.output_text.delta"
            self.emit(kind, delta=event.text, content_index=0, **self._where())
        elif isinstance(event, Sound) and r.spoken:
            self.open_item(r)
            await self._send(event)

    async def _send(self, sound: Sound, last: bool = False) -> None:
        r = self.r
        if self._output is None:
            self._output = Output(r.kind, sound.rate)
        data = self._output.push(sound.samples, last)
        step = int(PIECE_S * self._output.rate) * (2 if r.kind == "audio/pcm" else 1)
        for start in range(0, len(data), step):
            while (wait := r.playback.wait()) > 0:
                await asyncio.sleep(min(wait, 0.5))
            piece = data[start : start + step]
            if r.first_audio is None:
                r.first_audio = self.clock() - r.started
                self.own("x_echat.timing", response_id=r.id, first_audio=r.first_audio)
            self.emit("response.output_audio.delta", delta=base64.b64encode(piece).decode(), content_index=0, **self._where())
            seconds = self._output.seconds(piece)
            r.playback.send(seconds)
            r.item.seconds = r.playback.sent
            self._sent(seconds)
            await asyncio.sleep(0)  # let the session hear its client between two pieces

    def _where(self) -> dict[str, Any]:
        return {"response_id": self.r.id, "item_id": self.r.item.id, "output_index": 0}

    async def _end(self, ended: Ended) -> None:
        r = self.r
        if self._output is not None:
            await self._send(Sound(_NOTHING, 0), last=True)
        r.item.codes, r.item.word_ends = ended.codes, ended.word_ends
        if ended.reason == "failed":
            error = {"type": "server_error", "code": "model_failed", "message": ended.message}
            self.close(r, "failed", {"type": "failed", "error": error})
        elif ended.reason == "length":
            self.close(r, "incomplete", {"type": "incomplete", "reason": "max_output_tokens"})
        elif ended.reason == "cancelled":
            self.close(r, "cancelled", {"type": "cancelled", "reason": "client_cancelled"})
        else:
            self.close(r, "completed", None)


def new_response(item: Item, asked: list[Item], playback: Playback, **fields: Any) -> Response:
    return Response(new_id("resp"), item, asked, playback, **fields)


# ---- what frames a response ------------------------------------------------------------------------------------------


def _where(response: Response) -> dict[str, Any]:
    return {"response_id": response.id, "item_id": response.item.id, "output_index": 0}


def announce(response: Response, emit: Emit, conversation: Conversation) -> None:
    """Announce the answer, once there is something of it."""
    if response.item_open:
        return
    response.item_open = True
    item = response.item
    emit("response.output_item.added", response_id=response.id, output_index=0, item=item.as_json(empty=True))
    if response.in_conversation:
        conversation.add(item)
        emit("conversation.item.added", item=item.as_json(empty=True), previous_item_id=conversation.before(item))
    part = {"type": "audio", "transcript": ""} if response.spoken else {"type": "text", "text": ""}
    emit("response.content_part.added", part=part, content_index=0, **_where(response))


def conclude(response: Response, status: str, emit: Emit, conversation: Conversation) -> None:
    """The end of what was announced, whatever ended it."""
    item, where = response.item, _where(response)
    item.status = "completed" if status == "completed" else "incomplete"
    item.text = (item.text or "").strip()
    if response.spoken:
        emit("response.output_audio.done", content_index=0, **where)
        emit("response.output_audio_transcript.done", transcript=item.text, content_index=0, **where)
    else:
        emit("response.output_text.done", text=item.text, content_index=0, **where)
    part = {"type": "audio", "transcript": item.text} if response.spoken else {"type": "text", "text": item.text}
    emit("response.content_part.done", part=part, content_index=0, **where)
    emit("response.output_item.done", response_id=response.id, output_index=0, item=item.as_json())
    if response.in_conversation and item in conversation.items:
        emit("conversation.item.done", item=item.as_json(), previous_item_id=conversation.before(item))


def measure(response: Response, status: str, metrics: Metrics) -> None:
    """Count it."""
    metrics.responses.labels(status).inc()
    if response.first_audio is not None:
        metrics.first_audio.labels("yes" if response.thought_text else "no").observe(response.first_audio)
    if response.playback.gaps:
        metrics.gaps.inc(len(response.playback.gaps))
        metrics.gap_seconds.inc(sum(response.playback.gaps))
    if response.ended is not None:
        metrics.thought_tokens.observe(response.ended.tokens.get("thought", 0))
        for name, count in response.ended.guards.items():
            metrics.guards.labels(name).inc(count)


def after(tasks: Sequence[asyncio.Task[None]], seconds: float, then: Callable[[], None]) -> Callable[[], Awaitable[None]]:
    """Waits for tasks, but not longer than that."""

    async def wait() -> None:
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
        then()

    return wait


def report(task: asyncio.Task[None]) -> None:
    """Nobody waits for this task, so its fault goes to the log."""
    if not task.cancelled() and task.exception() is not None:
        log.error("an answer could not be begun", exc_info=task.exception())
