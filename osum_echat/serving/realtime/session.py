"""The session machine of the Realtime API, without a socket.

`handle` takes one message of the client after the other; ``emit`` is called with every message for it, in order, and
never blocks. Sound that comes in goes through the turn detection before the next message is looked at, so what happens
depends on what was received and not on when.

A response runs beside that (`response.Speaker`); nothing of a response comes after its `response.done`. Here are the
session's life, which part acts on a message, its settings and the sound that comes in. The parts are `answers`,
`items`, `transcripts`, `asking`, `turns` and `sending`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from typing import Any

import numpy as np

from osum_echat.serving.backend import Backend, Refused
from osum_echat.serving.metrics import Metrics
from osum_echat.serving.realtime import events
from osum_echat.serving.realtime.answers import Answers
from osum_echat.serving.realtime.asking import Asking
from osum_echat.serving.realtime.audio import HEARD_RATE, Input, Samples, decode_base64
from osum_echat.serving.realtime.conversation import Conversation, Item, new_id
from osum_echat.serving.realtime.events import BadEvent
from osum_echat.serving.realtime.items import Items
from osum_echat.serving.realtime.sending import Sender
from osum_echat.serving.realtime.settings import SessionLimits, first_session, merged, turn_rules
from osum_echat.serving.realtime.transcripts import Transcripts
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
        session: the session object, one and the same for its whole life; updates change it in place.
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
        self._executor, self._clock = executor, clock
        self.id = new_id("sess")
        think = think if think in backend.thinks else None
        self.session = first_session(self.id, model or backend.name, voice, self.limits, think)
        if session:
            self.session = merged(self.session, session, None)
        self.max_turn_s = min(self.limits.turn_seconds, backend.max_seconds)
        rules = turn_rules(self.session, self.max_turn_s)
        self.turns = TurnDetector(turn_models.new_vad(), turn_models.end_of_turn, rules, turn_models.backchannel)
        self._input = Input(self.session["audio"]["input"]["format"]["type"])
        self._speech_item: str | None = None  # id of the item that is being spoken
        self.conversation = Conversation()
        self._sender = Sender(emit, self.session, backend.warnings, self.metrics)
        self._asking = Asking(backend, self.conversation, self.max_turn_s)
        self._transcripts = Transcripts(backend, self._sender.emit, _wants_transcripts(self.session))
        self._answers = Answers(
            backend,
            self.conversation,
            self._asking,
            self._transcripts,
            self._sender,
            self.session,
            self.limits,
            self.metrics,
            clock,
        )
        self._items = Items(
            self.conversation,
            self._asking,
            self._sender.emit,
            self.limits,
            self._answers.cut_off,
            backend.codes_per_second,
        )
        self._handlers: dict[str, Callable[[dict[str, Any]], Awaitable[None]]] = {
            "session.update": self._on_session_update,
            "input_audio_buffer.append": self._on_append,
            "input_audio_buffer.commit": self._on_commit,
            "input_audio_buffer.clear": self._on_clear,
            "output_audio_buffer.clear": self._on_output_clear,
            "conversation.item.create": self._on_item_create,
            "conversation.item.retrieve": self._on_item_retrieve,
            "conversation.item.delete": self._items.delete,
            "conversation.item.truncate": self._items.truncate,
            "response.create": self._on_response_create,
            "response.cancel": self._on_response_cancel,
        }

    @property
    def _input_kind(self) -> str:
        return self.session["audio"]["input"]["format"]["type"]

    # ---- life --------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The first message."""
        self._sender.emit("session.created", session=self.session)

    async def handle(self, text: str, arrived: float | None = None) -> None:
        """One message of the client. What is wrong with it is answered by an ``error`` event.

        Args:
            arrived: when it came, by the session's clock, where it has waited for the messages before it; None: now.
        """
        event_id = None
        self._answers.arrived = self._clock() if arrived is None else arrived
        try:
            event = events.parse(text)
            event_id = event.get("event_id")
            await self._handlers[event["type"]](event)
        except BadEvent as error:
            self._sender.error(error.code, str(error), error.event_id or event_id, error.param)
        except Refused as error:
            self._sender.error(error.code, str(error), event_id, fault=True)
        except Exception:
            log.exception("session %s: a message could not be acted upon", self.id)
            self._sender.error("internal_error", "the server failed on this event; the session goes on", event_id, fault=True)

    async def close(self) -> None:
        """The client has gone: stop everything that works for it."""
        await self._answers.end()
        await self._transcripts.end()
        self._answers.memory.close()
        self._forget()

    def _forget(self) -> None:
        """Let go of recordings and answers: what refers to itself would stay until Python looks for such things, which
        it seldom does."""
        self._answers.last = None
        self._handlers.clear()
        self.conversation.items.clear()
        self._asking.samples.clear()
        self.turns.clear()

    @property
    def busy(self) -> bool:
        return self._answers.active is not None

    # ---- session -----------------------------------------------------------------------------------------------------

    async def _on_session_update(self, event: dict[str, Any]) -> None:
        before = self._input_kind
        self.session.update(merged(self.session, event["session"], event.get("event_id")))
        if self._input_kind != before:
            self._input = Input(self._input_kind)
        self.turns.set_rules(turn_rules(self.session, self.max_turn_s))
        self._sender.emit("session.updated", session=self.session)
        if self.session.get("instructions"):
            self._sender.warn("instructions")
        if self.session.get("tools"):
            self._sender.warn("tools")
        think = self.session["x_echat"].get("think")
        if think is not None and think not in self.backend.thinks:
            self._sender.warn("think")

    def _setting(self, name: str) -> Any:
        """A field of the turn detection; None without one."""
        detection = self.session["audio"]["input"].get("turn_detection")
        value = None if detection is None else detection.get(name)
        return True if detection is not None and value is None and name.endswith("_response") else value

    # ---- sound in ----------------------------------------------------------------------------------------------------

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
        self.turns.playing = self._answers.playing
        if self._executor is None or self.turns.rules.mode == "none":
            moves = self.turns.push(samples)
        else:
            loop = asyncio.get_running_loop()
            moves = await loop.run_in_executor(self._executor, self.turns.push, samples)
        for move in moves:
            await self._on_move(move)

    async def _on_move(self, move: Move) -> None:
        if isinstance(move, Suspected):
            self._sender.own("x_echat.speech_suspected", audio_ms=milliseconds_of(move.at))
        elif isinstance(move, Dismissed):
            self._sender.own("x_echat.speech_dismissed", audio_ms=milliseconds_of(move.at))
        elif isinstance(move, Started):
            self._speech_item = new_id("item")
            # First of all, since clients stop playing at it; the answer ends right behind.
            self._sender.emit(
                "input_audio_buffer.speech_started", audio_start_ms=milliseconds_of(move.at), item_id=self._speech_item
            )
            if self._setting("interrupt_response"):
                await self._answers.interrupt()
        elif isinstance(move, Stopped):
            item_id = self._speech_item or new_id("item")
            self._speech_item = None
            self._sender.emit("input_audio_buffer.speech_stopped", audio_end_ms=milliseconds_of(move.at), item_id=item_id)
            if await self._commit(move.samples, item_id) and self._setting("create_response"):
                await self._answers.ask()

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
        self._sender.emit("input_audio_buffer.cleared")

    async def _commit(self, samples: Samples, item_id: str) -> bool:
        """Sound becomes an item of the dialogue. Returns whether the model could hear it."""
        item = Item(item_id, role="user", spoken=True)
        before = self.conversation.items[-1].id if self.conversation.items else None
        self._sender.emit("input_audio_buffer.committed", item_id=item_id, previous_item_id=before)
        item.committed = self._clock()
        try:
            item.heard = await self.backend.hear(samples)
        except (ValueError, Refused) as error:
            item.text = ""
            self._items.add(item, before)
            code = error.code if isinstance(error, Refused) else "invalid_audio"
            self._sender.emit(
                "conversation.item.input_audio_transcription.failed",
                item_id=item_id,
                content_index=0,
                error={"type": "server_error", "code": code, "message": str(error)},
            )
            return False
        self._asking.samples[item.id] = samples
        self._items.add(item, before)
        return True

    # ---- items and responses -----------------------------------------------------------------------------------------

    async def _on_item_create(self, event: dict[str, Any]) -> None:
        item = await self._items.create(event, self._input_kind)
        if item.role == "system":
            self._sender.warn("instructions")

    async def _on_item_retrieve(self, event: dict[str, Any]) -> None:
        self._items.retrieve(event)

    async def _on_response_create(self, event: dict[str, Any]) -> None:
        await self._answers.ask(event.get("response") or {})

    async def _on_response_cancel(self, event: dict[str, Any]) -> None:
        await self._answers.cancel(event.get("response_id"))

    async def _on_output_clear(self, event: dict[str, Any]) -> None:
        """WebRTC clients clear what is being played; over WebSocket the client does that itself, and this stops the
        answer."""
        response_id = await self._answers.hush()
        if response_id is not None:
            self._sender.emit("output_audio_buffer.cleared", response_id=response_id)


def _wants_transcripts(session: Mapping[str, Any]) -> Callable[[], bool]:
    """Whether a session asks for transcripts of what is said to it, at any time. It refers to the session object
    alone."""
    return lambda: session["audio"]["input"].get("transcription") is not None
