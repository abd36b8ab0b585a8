"""The session machine of the Realtime API, without a socket.

`handle` takes one message of the client after the other; ``emit`` is called with every message for it, in order, and never blocks. Sound that comes in
goes through the turn detection before the next message is looked at, so what happens depends on what was received and not on when.

A response runs beside that (`response.Speaker`). Whoever ends it early (the client, or somebody who speaks) cancels the model first, stops the task,
and closes the response then: nothing of a response comes after its `response.done`.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any

import numpy as np

from osum_echat.serving.backend import Backend, Heard, Refused, Turn
from osum_echat.serving.metrics import Metrics
from osum_echat.serving.realtime import events, tasks
from osum_echat.serving.realtime.asking import Asking
from osum_echat.serving.realtime.audio import HEARD_RATE, Input, Samples, decode_base64
from osum_echat.serving.realtime.conversation import Conversation, Item, from_client, new_id
from osum_echat.serving.realtime.events import BadEvent
from osum_echat.serving.realtime.pace import Playback
from osum_echat.serving.realtime.response import Response, Speaker, after, announce, conclude, measure, new_response, report
from osum_echat.serving.realtime.settings import SessionLimits, first_session, turn_rules, with_detection_defaults
from osum_echat.serving.realtime.turns import (
    Dismissed,
    Move,
    Started,
    Stopped,
    Suspected,
    TurnDetector,
    milliseconds_of,
)
from osum_echat.serving.vad import TurnModels

log = logging.getLogger(__name__)
MIN_COMMIT_S = 0.1


class RealtimeSession:
    """One client's dialogue.

    Args:
        emit: takes each message for the client as JSON text.
        executor: where the turn detection runs.
        clock: seconds, rising; of playback and latencies only.

    Attributes:
        max_turn_s: sound of one turn at most, in seconds.
    """

    def __init__(
        self,
        backend: Backend,
        turn_models: TurnModels,
        emit: Callable[[str], None],
        limits: SessionLimits | None = None,
        metrics: Metrics | None = None,
        model: str | None = None,
        voice: str = "default",
        think: str | None = None,
        executor: Executor | None = None,
        clock: Callable[[], float] = time.monotonic,
        session: Mapping[str, Any] | None = None,
    ) -> None:
        self.backend, self.limits, self.metrics = backend, limits or SessionLimits(), metrics or Metrics()
        self._emit_text, self._executor, self._clock = emit, executor, clock
        self.id = new_id("sess")
        self.conversation_id = new_id("conv")
        think = think if think in backend.thinks else None
        self.session = first_session(self.id, model or backend.name, voice, self.limits, think)
        if session:
            self.session = self._merged(session, None)
        self.conversation = Conversation()
        self.memory = backend.open()
        self.max_turn_s = min(self.limits.turn_seconds, backend.max_seconds)
        self.turns = TurnDetector(turn_models.new_vad(), turn_models.end_of_turn, turn_rules(self.session, self.max_turn_s))
        self._input = Input(self.session["audio"]["input"]["format"]["type"])
        self._speech_item: str | None = None  # id of the item that is being spoken
        self._active: Response | None = None
        self._last: Response | None = None  # the one whose sound may still be playing
        self._answer_next = False
        self._answering = asyncio.Lock()
        self._arrived = 0.0  # when the message that is looked at came
        self._asking = Asking(backend, self.conversation, self.max_turn_s)
        self._transcripts: dict[str, asyncio.Task[None]] = {}
        self._warned: set[str] = set()
        self._handlers = {
            "session.update": self._on_session_update,
            "input_audio_buffer.append": self._on_append,
            "input_audio_buffer.commit": self._on_commit,
            "input_audio_buffer.clear": self._on_clear,
            "output_audio_buffer.clear": self._on_output_clear,
            "conversation.item.create": self._on_item_create,
            "conversation.item.retrieve": self._on_item_retrieve,
            "conversation.item.delete": self._on_item_delete,
            "conversation.item.truncate": self._on_item_truncate,
            "response.create": self._on_response_create,
            "response.cancel": self._on_response_cancel,
        }

    @property
    def _input_kind(self) -> str:
        return self.session["audio"]["input"]["format"]["type"]

    # ---- life ---------------------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The first message."""
        self.emit("session.created", session=self.session)

    async def handle(self, text: str, arrived: float | None = None) -> None:
        """One message of the client. What is wrong with it is answered by an ``error`` event.

        Args:
            arrived: when it came, by the session's clock, where it has waited for the messages before it; None: now.
        """
        event_id = None
        self._arrived = self._clock() if arrived is None else arrived
        try:
            event = events.parse(text)
            event_id = event.get("event_id")
            await self._handlers[event["type"]](event)
        except BadEvent as error:
            self._error(error.code, str(error), error.event_id or event_id, error.param)
        except Refused as error:
            self._error(error.code, str(error), event_id, fault=True)
        except Exception:
            log.exception("session %s: a message could not be acted upon", self.id)
            self._error("internal_error", "the server failed on this event; the session goes on", event_id, fault=True)

    async def close(self) -> None:
        """The client has gone: stop everything that works for it."""
        response = self._active
        if response is not None:
            await self._stop(response)
            self._active = None
            self.metrics.responses.labels("dropped").inc()
        await tasks.end(*self._transcripts.values())
        self.memory.close()
        self._forget()

    def _forget(self) -> None:
        """Let go of recordings and answers: what refers to itself would stay until Python looks for such things, which it seldom does."""
        self._last = None
        self._handlers.clear()
        self.conversation.items.clear()
        self._asking.samples.clear()
        self.turns.clear()

    @property
    def busy(self) -> bool:
        return self._active is not None

    # ---- sending ------------------------------------------------------------------------------------------------------------------

    def emit(self, kind: str, **fields: Any) -> None:
        self._emit_text(events.build(kind, **fields))

    def own(self, kind: str, **fields: Any) -> None:
        """An event of ours, where the session asks for them."""
        if (self.session.get("x_echat") or {}).get("events") is True:
            self._emit_text(events.build_own(kind, **fields))

    def _error(self, code: str, message: str, event_id: str | None, param: str | None = None, fault: bool = False) -> None:
        self.metrics.errors.labels(code).inc()
        self._emit_text(events.build_error(code, message, event_id, param, fault))

    def _warn(self, field: str) -> None:
        """Something that was asked for and that this checkpoint cannot do: said once."""
        message = self.backend.warnings.get(field)
        if message is None or field in self._warned:
            return
        self._warned.add(field)
        log.warning("session %s: %s", self.id, message)
        self.own("x_echat.warning", field=field, message=message)

    # ---- session ------------------------------------------------------------------------------------------------------------------

    def _merged(self, update: Mapping[str, Any], event_id: str | None) -> dict[str, Any]:
        fixed = {key: value for key, value in update.items() if key not in ("id", "object", "expires_at")}
        audio = fixed.get("audio", {})
        if not isinstance(audio, dict) or not all(isinstance(audio.get(side, {}), dict) for side in ("input", "output")):
            raise BadEvent("invalid_value", "session.audio, its input and its output must be objects", "session.audio", event_id)
        session = with_detection_defaults(events.merge(copy.deepcopy(self.session), fixed), fixed)
        events.check_session(session, event_id)
        own = session.get("x_echat")
        if not isinstance(own, dict) or own.get("think") not in (None, "tag", "language"):
            raise BadEvent("invalid_value", "x_echat.think must be null, tag or language", "session.x_echat.think", event_id)
        audio = session["audio"]
        for side in ("input", "output"):
            found = audio[side].get("format")
            kind = (found or {}).get("type") or "audio/pcm"
            audio[side]["format"] = {"type": kind, "rate": 24000} if kind == "audio/pcm" else {"type": kind}
        if session.get("output_modalities") not in (["audio"], ["text"], ["text", "audio"], ["audio", "text"]):
            raise BadEvent(
                "invalid_value", 'output_modalities must be ["audio"] or ["text"]', "session.output_modalities", event_id
            )
        try:
            turn_rules(session, 1.0)
        except (ValueError, TypeError) as error:
            raise BadEvent("invalid_value", str(error), "session.audio.input.turn_detection", event_id) from error
        return session

    async def _on_session_update(self, event: dict[str, Any]) -> None:
        before = self.session
        self.session = self._merged(event["session"], event.get("event_id"))
        if self.session["audio"]["input"]["format"] != before["audio"]["input"]["format"]:
            self._input = Input(self.session["audio"]["input"]["format"]["type"])
        self.turns.set_rules(turn_rules(self.session, self.max_turn_s))
        self.emit("session.updated", session=self.session)
        if self.session.get("instructions"):
            self._warn("instructions")
        if self.session.get("tools"):
            self._warn("tools")
        think = self.session["x_echat"].get("think")
        if think is not None and think not in self.backend.thinks:
            self._warn("think")

    def _setting(self, name: str) -> Any:
        """A field of the turn detection; None without one."""
        detection = self.session["audio"]["input"].get("turn_detection")
        value = None if detection is None else detection.get(name)
        return True if detection is not None and value is None and name.endswith("_response") else value

    # ---- sound in -----------------------------------------------------------------------------------------------------------------

    async def _on_append(self, event: dict[str, Any]) -> None:
        try:
            data = decode_base64(event["audio"])
        except ValueError as error:
            raise BadEvent("invalid_value", str(error), "audio") from error
        samples = self._input.push(data)
        if self.turns.rules.mode == "none" and self.turns.buffered + len(samples) > self.max_turn_s * HEARD_RATE:
            raise BadEvent(
                "input_audio_buffer_full",
                f"a turn may have {self.max_turn_s:g} s of sound; commit it, or clear the buffer",
                "audio",
            )
        await self._detect(samples)

    async def _detect(self, samples: Samples) -> None:
        self.turns.playing = self._playing()
        if self._executor is None or self.turns.rules.mode == "none":
            moves = self.turns.push(samples)
        else:
            loop = asyncio.get_running_loop()
            moves = await loop.run_in_executor(self._executor, self.turns.push, samples)
        for move in moves:
            await self._on_move(move)

    def _playing(self) -> bool:
        """The client is playing an answer."""
        return any(r is not None and r.playback.left > 0 for r in (self._active, self._last))

    async def _on_move(self, move: Move) -> None:
        if isinstance(move, Suspected):
            self.own("x_echat.speech_suspected", audio_ms=milliseconds_of(move.at))
        elif isinstance(move, Dismissed):
            self.own("x_echat.speech_dismissed", audio_ms=milliseconds_of(move.at))
        elif isinstance(move, Started):
            self._speech_item = new_id("item")
            # First of all, since clients stop playing at it; the answer ends right behind.
            self.emit("input_audio_buffer.speech_started", audio_start_ms=milliseconds_of(move.at), item_id=self._speech_item)
            await self._barge_in()
        elif isinstance(move, Stopped):
            item_id = self._speech_item or new_id("item")
            self._speech_item = None
            self.emit("input_audio_buffer.speech_stopped", audio_end_ms=milliseconds_of(move.at), item_id=item_id)
            if await self._commit(move.samples, item_id) and self._setting("create_response"):
                await self._answer()

    async def _barge_in(self) -> None:
        """Somebody speaks: what is being said ends here, if the session wants that, and the dialogue holds what was heard of it."""
        if not self._setting("interrupt_response"):
            return
        now = self._clock()
        active, last = self._active, self._last
        if active is not None:
            played = active.playback.played
            await self._stop(active)
            active.item.status = "incomplete"
            self._cut(active, played)
            self._close(active, "cancelled", {"type": "cancelled", "reason": "turn_detected"})
        elif last is not None and last.playback.left > 0:
            self._cut(last, last.playback.played)
            self._last = None
        else:
            return
        self.metrics.barge_ins.inc()
        self.metrics.stop_seconds.observe(self._clock() - now)

    def _cut(self, response: Response, played: float) -> None:
        if response.spoken:
            response.item.cut(played, self.backend.codes_per_second)

    async def _on_commit(self, event: dict[str, Any]) -> None:
        _, samples = self.turns.take()
        samples = np.concatenate([samples, self._input.flush()])
        if len(samples) < MIN_COMMIT_S * HEARD_RATE:
            raise BadEvent(
                "input_audio_buffer_commit_empty",
                f"the buffer holds {len(samples) * 1000 // HEARD_RATE} ms of sound; a turn needs 100 ms",
            )
        item_id, self._speech_item = self._speech_item or new_id("item"), None
        await self._commit(samples, item_id)

    async def _on_clear(self, event: dict[str, Any]) -> None:
        self.turns.clear()
        self._input.flush()
        self._speech_item = None
        self.emit("input_audio_buffer.cleared")

    async def _on_output_clear(self, event: dict[str, Any]) -> None:
        """WebRTC clients clear what is being played; over WebSocket the client does that itself, and this stops the answer."""
        response = self._active or self._last
        if response is None:
            return
        if self._active is not None:
            await self._cancel(self._active)
        self.emit("output_audio_buffer.cleared", response_id=response.id)

    async def _commit(self, samples: Samples, item_id: str) -> bool:
        """Sound becomes an item of the dialogue. Returns whether the model could hear it."""
        item = Item(item_id, role="user", spoken=True)
        before = self.conversation.items[-1].id if self.conversation.items else None
        self.emit("input_audio_buffer.committed", item_id=item_id, previous_item_id=before)
        item.committed = self._clock()
        try:
            item.heard = await self.backend.hear(samples)
        except (ValueError, Refused) as error:
            item.text = ""
            self._add(item, before)
            code = error.code if isinstance(error, Refused) else "invalid_audio"
            self.emit(
                "conversation.item.input_audio_transcription.failed",
                item_id=item_id,
                content_index=0,
                error={"type": "server_error", "code": code, "message": str(error)},
            )
            return False
        self._asking.samples[item.id] = samples
        self._add(item, before)
        return True

    def _add(self, item: Item, before: str | None, after: str | None = None) -> None:
        self.conversation.add(item, after)
        self.emit("conversation.item.added", item=item.as_json(), previous_item_id=before)
        self.emit("conversation.item.done", item=item.as_json(), previous_item_id=before)
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        while len(self.conversation) > self.limits.items:
            oldest = self.conversation.items[0]
            self.conversation.remove(oldest)
            self._asking.samples.pop(oldest.id, None)

    # ---- transcripts --------------------------------------------------------------------------------------------------------------

    def _transcribe(self, item: Item, response: Response | None) -> None:
        """Find out what was said: from the thought of the response where there is one, else by the transcript task."""
        if self.session["audio"]["input"].get("transcription") is None or item.heard is None or item.text is not None:
            return
        if item.id not in self._transcripts:
            task = asyncio.create_task(self._transcript(item, item.heard, response))
            self._transcripts[item.id] = task
            task.add_done_callback(lambda _: self._transcripts.pop(item.id, None))

    async def _transcript(self, item: Item, heard: Heard, response: Response | None) -> None:
        text = ""
        try:
            if response is not None:
                await response.thought_ready.wait()
                text = response.thought.tags.get("transcript", "") if response.thought is not None else ""
            text = text or await self.backend.transcribe(heard)
        except (Refused, ValueError) as error:
            self.emit(
                "conversation.item.input_audio_transcription.failed",
                item_id=item.id,
                content_index=0,
                error={"type": "server_error", "code": "transcription_failed", "message": str(error)},
            )
            return
        item.text = text
        where = {"item_id": item.id, "content_index": 0}
        if text:
            self.emit("conversation.item.input_audio_transcription.delta", delta=text, **where)
        usage = {"type": "duration", "seconds": round(heard.seconds, 3)}
        self.emit("conversation.item.input_audio_transcription.completed", transcript=text, usage=usage, **where)

    # ---- items --------------------------------------------------------------------------------------------------------------------

    async def _on_item_create(self, event: dict[str, Any]) -> None:
        raw = event["item"]
        given = raw.get("id")
        if given is not None and (not isinstance(given, str) or not given):
            raise BadEvent("invalid_value", "item.id must be a string that is not empty", "item.id")
        if given and self.conversation.find(given):
            raise BadEvent("item_create_duplicate_item_id", f"there is an item {given!r} already", "item.id")
        try:
            item = from_client(raw, given or new_id("item"))
        except ValueError as error:
            raise BadEvent("invalid_value", str(error), "item.role") from error
        after = event.get("previous_item_id")
        if after not in (None, "root") and self.conversation.find(after) is None:
            raise BadEvent("invalid_value", f"there is no item {after!r} to put it behind", "previous_item_id")
        if item.spoken and item.role == "user":
            await self._asking.hear_item(item, raw, self._input_kind)
        self.conversation.add(item, after)
        before = self.conversation.before(item)
        for kind in ("conversation.item.added", "conversation.item.done"):
            self.emit(kind, item=item.as_json(), previous_item_id=before)
        self._forget_oldest()
        if item.role == "system":
            self._warn("instructions")

    def _found(self, event: Mapping[str, Any], code: str) -> Item:
        item = self.conversation.find(event["item_id"])
        if item is None:
            raise BadEvent(code, f"there is no item {event['item_id']!r}", "item_id")
        return item

    async def _on_item_retrieve(self, event: dict[str, Any]) -> None:
        item = self._found(event, "item_retrieve_invalid_item_id")
        self.emit("conversation.item.retrieved", item=item.as_json())

    async def _on_item_delete(self, event: dict[str, Any]) -> None:
        item = self._found(event, "item_delete_invalid_item_id")
        if self._active is not None and item is self._active.item:
            await self._cancel(self._active)
        if item in self.conversation.items:
            self.conversation.remove(item)
        self._asking.samples.pop(item.id, None)
        self.emit("conversation.item.deleted", item_id=item.id)

    async def _on_item_truncate(self, event: dict[str, Any]) -> None:
        item = self._found(event, "item_truncate_invalid_item_id")
        if item.role != "assistant" or not item.spoken:
            raise BadEvent("invalid_value", "only spoken answers can be truncated", "item_id")
        if event["audio_end_ms"] < 0:
            raise BadEvent("invalid_value", "audio_end_ms must not be negative", "audio_end_ms")
        if self._active is not None and item is self._active.item:
            await self._cancel(self._active)
        seconds = item.cut(event["audio_end_ms"] / 1000, self.backend.codes_per_second)
        self.emit("conversation.item.truncated", item_id=item.id, content_index=0, audio_end_ms=round(seconds * 1000))

    # ---- responses ----------------------------------------------------------------------------------------------------------------

    async def _on_response_create(self, event: dict[str, Any]) -> None:
        if self._active is not None:
            raise BadEvent(
                "conversation_already_has_active_response",
                f"response {self._active.id} is still in progress; wait for it, or cancel it",
            )
        await self._answer(event.get("response") or {})

    async def _on_response_cancel(self, event: dict[str, Any]) -> None:
        response, wanted = self._active, event.get("response_id")
        if response is None or (wanted is not None and wanted != response.id):
            raise BadEvent("response_cancel_not_active", "Cancellation failed: no active response found")
        await self._cancel(response)

    async def _cancel(self, response: Response) -> None:
        """The client has had enough."""
        await self._stop(response)
        response.item.status = "incomplete"
        self._close(response, "cancelled", {"type": "cancelled", "reason": "client_cancelled"})

    async def _stop(self, response: Response) -> None:
        """Neither model nor task do anything for it any more."""
        if response.job is not None:
            response.job.cancel()
        await tasks.end(response.task)

    async def _answer(self, params: Mapping[str, Any] | None = None) -> None:
        """Begin a response. Without ``params`` it is one that a turn asked for, and waits for the one in progress."""
        async with self._answering:
            if self._active is not None:
                self._answer_next = True
            else:
                await self._start(params or {}, params is not None)

    def _waited_since(self, response: Response, asked_by_client: bool) -> float:
        """When somebody began to wait for this answer: the commit of the turn, or a later wish of the client."""
        commits = [item.committed for item in response.asked if item.committed is not None]
        return max([*commits, self._arrived]) if asked_by_client or not commits else max(commits)

    async def _start(self, params: Mapping[str, Any], asked_by_client: bool) -> None:
        response, turn = await self._prepare(params)
        thinks = turn is not None and turn.think is not None
        for item in response.asked:
            self._transcribe(item, response if thinks else None)
        response.started = self._waited_since(response, asked_by_client)
        self._active = response
        if turn is None:
            self._created(response)
            self._close(response, "completed", None)
            return
        try:
            response.job = self.backend.start(turn, self.memory if response.in_conversation else None)
        except Refused as error:
            self._created(response)
            fault = {"type": "server_error", "code": error.code, "message": str(error)}
            self._close(response, "failed", {"type": "failed", "error": fault})
            return
        waiting = [self._transcripts[i.id] for i in response.asked if i.id in self._transcripts]
        if not waiting:
            self._created(response)
        wait = after(waiting, self.limits.transcript_wait, lambda: self._created(response))
        speaker = Speaker(response, self.emit, self.own, self._announce, self._close, self._clock, wait)
        response.task = asyncio.create_task(speaker.run())
        response.task.add_done_callback(lambda task: self._task_ended(task, response))

    async def _prepare(self, params: Mapping[str, Any]) -> tuple[Response, Turn | None]:
        """The response and what the model is asked; None when there is nothing to answer."""
        conversation = await self._asking.context(params, self._input_kind)
        past, asked = conversation.exchanges()
        if not asked and params.get("input") is None:
            asked = conversation.last_asked()
            past = past[:-1] if asked else past
        instructions = params.get("instructions") or self.session.get("instructions") or ""
        if params.get("instructions"):
            self._warn("instructions")
        heard, text = await self._asking.question(asked)
        if heard is None and not text:
            text = params.get("instructions") or conversation.system_text()  # "greet the user", before anybody spoke
        modalities = params.get("output_modalities") or self.session["output_modalities"]
        output = events.merge(self.session["audio"]["output"], (params.get("audio") or {}).get("output") or {})
        limit = params.get("max_output_tokens") or self.session.get("max_output_tokens") or "inf"
        voice = output.get("voice")
        item = Item(new_id("item"), role="assistant", spoken="audio" in modalities, status="in_progress")
        response = new_response(
            item,
            asked,
            Playback(self._clock, self.limits.ahead_seconds),
            spoken=item.spoken,
            kind=(output.get("format") or {}).get("type") or "audio/pcm",
            voice=voice if isinstance(voice, str) else str((voice or {}).get("id", "default")),
            max_output_tokens=limit,
            metadata=params.get("metadata"),
            in_conversation=params.get("conversation") != "none",
        )
        if heard is None and not text:
            log.warning("session %s: a response was asked for, and nobody has said anything yet", self.id)
            self.own("x_echat.warning", field="input", message="there is nothing to answer yet")
            return response, None
        if past:
            self._warn("history")
        think = self.session["x_echat"].get("think")
        turn = Turn(
            past=tuple(past),
            heard=heard,
            text=text if heard is None else "",
            speak=item.spoken,
            think=think if heard is not None and think in self.backend.thinks else None,
            voice=response.voice,
            max_tokens=limit if isinstance(limit, int) else None,
            instructions=instructions,
        )
        return response, turn

    def _created(self, response: Response) -> None:
        if not response.created:
            response.created = True
            self.emit("response.created", response=response.as_json("in_progress", self.conversation_id))

    def _announce(self, response: Response) -> None:
        announce(response, self.emit, self.conversation)

    def _close(self, response: Response, status: str, details: Mapping[str, Any] | None) -> None:
        """All the events that end a response, whatever ended it."""
        if response.done:
            return
        response.done = True
        response.thought_ready.set()
        self._created(response)
        if response.item_open:
            conclude(response, status, self.emit, self.conversation)
        self._findings(response)
        self.emit("response.done", response=response.as_json(status, self.conversation_id, details))
        self._active, self._last = None, response
        measure(response, status, self.metrics)
        for item in response.asked:
            if status == "completed" or response.item.shown:
                self._asking.samples.pop(item.id, None)
        if response.in_conversation and status != "failed" and response.item_open:
            self._remember()
        if self._answer_next:
            self._answer_next = False
            task = asyncio.create_task(self._answer())
            task.add_done_callback(report)

    def _findings(self, response: Response) -> None:
        """Tags belong to what was said: they go to the user's item."""
        if response.thought is not None and response.asked:
            response.asked[-1].findings.update({"tags": dict(response.thought.tags), "thought": response.thought.raw})

    def _remember(self) -> None:
        past, asked = self.conversation.exchanges()
        if past and not asked:
            think = self.session["x_echat"].get("think")
            heard = past[-1].heard[-1] if past[-1].heard else None
            speak = "audio" in self.session["output_modalities"]
            form = think if heard is not None and think in self.backend.thinks else None
            self.backend.remember(self.memory, past, Turn(heard=heard, speak=speak, think=form))

    def _task_ended(self, task: asyncio.Task[None], response: Response) -> None:
        if task.cancelled() or task.exception() is None:
            return
        error = task.exception()
        log.error("response %s failed", response.id, exc_info=error)
        fault = {"type": "server_error", "code": "internal_error", "message": "the server failed in this response; ask again"}
        self._close(response, "failed", {"type": "failed", "error": fault})
