"""The responses of a session: what is asked, one answer after the other, and the ways in which one ends early."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from osum_echat.serving.backend import Backend, Refused, Turn
from osum_echat.serving.metrics import Metrics
from osum_echat.serving.realtime import events, tasks
from osum_echat.serving.realtime.asking import Asking
from osum_echat.serving.realtime.conversation import Conversation, Item, new_id
from osum_echat.serving.realtime.events import BadEvent
from osum_echat.serving.realtime.pace import Playback
from osum_echat.serving.realtime.response import Response, Speaker, after, announce, conclude, measure, new_response, report
from osum_echat.serving.realtime.sending import Sender
from osum_echat.serving.realtime.settings import SessionLimits
from osum_echat.serving.realtime.transcripts import Transcripts

log = logging.getLogger(__name__)


class Answers:
    """Those of one session. Whoever ends one early cancels the model first, stops the task, and closes the response
    then.

    Args:
        session: the session object, which is changed in place.
        clock: seconds, rising.

    Attributes:
        active: the one in progress. last: the one before, whose sound may still be playing.
        arrived: when the message that is looked at came, by the clock.
        memory: what the model keeps of the dialogue.
    """

    def __init__(
        self,
        backend: Backend,
        conversation: Conversation,
        asking: Asking,
        transcripts: Transcripts,
        sender: Sender,
        session: Mapping[str, Any],
        limits: SessionLimits,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._backend, self._conversation, self._asking, self._transcripts = backend, conversation, asking, transcripts
        self._sender, self._session, self._limits, self._metrics, self._clock = sender, session, limits, metrics, clock
        self._conversation_id = new_id("conv")
        self._next = False  # another turn has asked for an answer
        self._lock = asyncio.Lock()
        self.active: Response | None = None
        self.last: Response | None = None
        self.arrived = 0.0
        self.memory = backend.open()

    @property
    def playing(self) -> bool:
        """The client is playing an answer."""
        return any(r is not None and r.playback.left > 0 for r in (self.active, self.last))

    # ---- what the session wants --------------------------------------------------------------------------------------

    async def ask(self, params: Mapping[str, Any] | None = None) -> None:
        """Begin a response. Without ``params`` it is one that a turn asked for, and waits for the one in progress; with
        them the client asks for it: raises BadEvent while another is in progress."""
        async with self._lock:
            if self.active is None:
                await self._start(params or {}, params is not None)
            elif params is None:
                self._next = True
            else:
                raise BadEvent(
                    "conversation_already_has_active_response",
                    f"response {self.active.id} is still in progress; wait for it, or cancel it",
                )

    async def cancel(self, response_id: str | None) -> None:
        """The client has had enough of this one; None: whichever is in progress. Raises BadEvent where it is not."""
        if self.active is None or (response_id is not None and response_id != self.active.id):
            raise BadEvent("response_cancel_not_active", "Cancellation failed: no active response found")
        await self._cancel(self.active)

    async def cut_off(self, item: Item) -> None:
        """The client plays no more of this item; the one that is making it, if there is one, is cancelled."""
        if self.active is not None and item is self.active.item:
            await self._cancel(self.active)
        if self.last is not None and item is self.last.item:
            self.last.playback.stop()

    async def hush(self) -> str | None:
        """The client plays nothing more: the one in progress ends. Returns the id of what was made or played last."""
        response, playing = self.active or self.last, [r for r in (self.active, self.last) if r is not None]
        if self.active is not None:
            await self._cancel(self.active)
        for each in playing:
            each.playback.stop()
        return None if response is None else response.id

    async def interrupt(self) -> None:
        """Somebody speaks: what is being said ends here, and the dialogue holds what was heard of it: of the answer in
        progress, and of the one before it, where that is still being played."""
        now = self._clock()
        active, last = self.active, self.last if self.last is not None and self.last.playback.left > 0 else None
        if active is None and last is None:
            return
        heard = [(response, response.playback.played) for response in (last, active) if response is not None]
        if last is not None:
            self.last = None
        if active is not None:
            await self._stop(active)
            active.item.status = "incomplete"
        for response, played in heard:
            self._cut(response, played)
        if active is not None:
            self._close(active, "cancelled", {"type": "cancelled", "reason": "turn_detected"})
        self._metrics.barge_ins.inc()
        self._metrics.stop_seconds.observe(self._clock() - now)

    async def end(self) -> None:
        """The client has gone."""
        if self.active is not None:
            await self._stop(self.active)
            self.active = None
            self._metrics.responses.labels("dropped").inc()

    # ---- ends --------------------------------------------------------------------------------------------------------

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

    def _cut(self, response: Response, played: float) -> None:
        """The client has stopped playing it: the dialogue holds so many seconds of it."""
        if response.spoken:
            response.item.cut(played, self._backend.codes_per_second)
        response.playback.stop()

    # ---- one response ------------------------------------------------------------------------------------------------

    def _waited_since(self, response: Response, asked_by_client: bool) -> float:
        """When somebody began to wait for this answer: the commit of the turn, or a later wish of the client."""
        commits = [item.committed for item in response.asked if item.committed is not None]
        return max([*commits, self.arrived]) if asked_by_client or not commits else max(commits)

    async def _start(self, params: Mapping[str, Any], asked_by_client: bool) -> None:
        response, turn = await self._prepare(params)
        thinks = turn is not None and turn.think is not None
        for item in response.asked:
            self._transcripts.find(item, response if thinks else None)
        response.started = self._waited_since(response, asked_by_client)
        self.active = response
        if turn is None:
            self._created(response)
            self._close(response, "completed", None)
            return
        try:
            response.job = self._backend.start(turn, self.memory if response.in_conversation else None)
        except Refused as error:
            self._created(response)
            fault = {"type": "server_error", "code": error.code, "message": str(error)}
            self._close(response, "failed", {"type": "failed", "error": fault})
            return
        waiting = self._transcripts.of(response.asked)
        if not waiting:
            self._created(response)
        wait = after(waiting, self._limits.transcript_wait, lambda: self._created(response))
        speaker = Speaker(response, self._sender.emit, self._sender.own, self._announce, self._close, self._clock, wait)
        response.task = asyncio.create_task(speaker.run())
        response.task.add_done_callback(lambda task: self._task_ended(task, response))

    async def _prepare(self, params: Mapping[str, Any]) -> tuple[Response, Turn | None]:
        """The response and what the model is asked; None when there is nothing to answer."""
        conversation = await self._asking.context(params, self._session["audio"]["input"]["format"]["type"])
        past, asked = conversation.exchanges()
        if not asked and params.get("input") is None:
            asked = conversation.last_asked()
            past = past[:-1] if asked else past
        instructions = params.get("instructions") or self._session.get("instructions") or ""
        if params.get("instructions"):
            self._sender.warn("instructions")
        heard, text = await self._asking.question(asked)
        if heard is None and not text:
            text = params.get("instructions") or conversation.system_text()  # "greet the user", before anybody spoke
        modalities = params.get("output_modalities") or self._session["output_modalities"]
        output = events.merge(self._session["audio"]["output"], (params.get("audio") or {}).get("output") or {})
        limit = params.get("max_output_tokens") or self._session.get("max_output_tokens") or "inf"
        voice = output.get("voice")
        item = Item(new_id("item"), role="assistant", spoken="audio" in modalities, status="in_progress")
        response = new_response(
            item,
            asked,
            Playback(self._clock, self._limits.ahead_seconds, None if self.last is None else self.last.playback),
            spoken=item.spoken,
            kind=(output.get("format") or {}).get("type") or "audio/pcm",
            voice=voice if isinstance(voice, str) else str((voice or {}).get("id", "default")),
            max_output_tokens=limit,
            metadata=params.get("metadata"),
            in_conversation=params.get("conversation") != "none",
        )
        if heard is None and not text:
            log.warning("session %s: a response was asked for, and nobody has said anything yet", self._session["id"])
            self._sender.own("x_echat.warning", field="input", message="there is nothing to answer yet")
            return response, None
        if past:
            self._sender.warn("history")
        think = self._session["x_echat"].get("think")
        turn = Turn(
            past=tuple(past),
            heard=heard,
            text=text if heard is None else "",
            speak=item.spoken,
            think=think if heard is not None and think in self._backend.thinks else None,
            voice=response.voice,
            max_tokens=limit if isinstance(limit, int) else None,
            instructions=instructions,
        )
        return response, turn

    def _created(self, response: Response) -> None:
        if not response.created:
            response.created = True
            self._sender.emit("response.created", response=response.as_json("in_progress", self._conversation_id))

    def _announce(self, response: Response) -> None:
        announce(response, self._sender.emit, self._conversation)

    def _close(self, response: Response, status: str, details: Mapping[str, Any] | None) -> None:
        """All the events that end a response, whatever ended it."""
        if response.done:
            return
        response.done = True
        response.thought_ready.set()
        self._created(response)
        if response.item_open:
            conclude(response, status, self._sender.emit, self._conversation)
        self._findings(response)
        self._sender.emit("response.done", response=response.as_json(status, self._conversation_id, details))
        self.active, self.last = None, response
        measure(response, status, self._metrics)
        for item in response.asked:
            if status == "completed" or response.item.shown:
                self._asking.samples.pop(item.id, None)
        if response.in_conversation and status != "failed" and response.item_open:
            self._remember()
        if self._next:
            self._next = False
            task = asyncio.create_task(self.ask())
            task.add_done_callback(report)

    def _findings(self, response: Response) -> None:
        """Tags belong to what was said: they go to the user's item."""
        if response.thought is not None and response.asked:
            response.asked[-1].findings.update({"tags": dict(response.thought.tags), "thought": response.thought.raw})

    def _remember(self) -> None:
        past, asked = self._conversation.exchanges()
        if past and not asked:
            think = self._session["x_echat"].get("think")
            heard = past[-1].heard[-1] if past[-1].heard else None
            speak = "audio" in self._session["output_modalities"]
            form = think if heard is not None and think in self._backend.thinks else None
            self._backend.remember(self.memory, past, Turn(heard=heard, speak=speak, think=form))

    def _task_ended(self, task: asyncio.Task[None], response: Response) -> None:
        if task.cancelled() or task.exception() is None:
            return
        error = task.exception()
        log.error("response %s failed", response.id, exc_info=error)
        fault = {"type": "server_error", "code": "internal_error", "message": "the server failed in this response; ask again"}
        self._close(response, "failed", {"type": "failed", "error": fault})
