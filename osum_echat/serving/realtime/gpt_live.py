"""The second dialect: GPT-Live (``/v1/live/sessions``, types of the openai package), spoken by the same session
machine.

A GPT-Live session is a translation around a `RealtimeSession`: its events become ``session.output_audio.delta`` and
transcripts on one timeline, and the client's become events of the Realtime API. The dialect knows no responses and no
items, and no word for an interruption: sound stops coming. So sound is kept close to what has been played (`AHEAD_S`).

Delegation to other models, decisions and fixtures are not served here; they are refused with an error that says so.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from openai.types.live import ClientEvent, ServerEvent
from pydantic import BaseModel

from osum_echat.serving.realtime.audio import HEARD_RATE, Resampler, decode_base64, from_pcm16, to_pcm16
from osum_echat.serving.realtime.conversation import new_id
from osum_echat.serving.realtime.events import BadEvent, by_type, check, read_json
from osum_echat.serving.realtime.session import RealtimeSession

AHEAD_S = 0.3
CLIENT_EVENTS: Mapping[str, type[BaseModel]] = by_type(ClientEvent)
SERVER_EVENTS: Mapping[str, type[BaseModel]] = by_type(ServerEvent)
_SILENT_BYTE = {"audio/pcm": b"\0", "audio/pcmu": b"\xff", "audio/pcma": b"\xd5"}
_NOT_SERVED = "is not served here: this model delegates nothing and plays no fixtures"


def build(kind: str, **fields: Any) -> str:
    """An event of the server as JSON text."""
    event = SERVER_EVENTS[kind].model_validate({"type": kind, **fields})
    return event.model_dump_json(exclude_unset=True)


class LiveSession:
    """One GPT-Live client. ``make`` builds the session machine for what it emits, a model name and a first session;
    ``end`` closes the connection."""

    def __init__(
        self,
        emit: Callable[[str], None],
        make: Callable[[Callable[[str], None], str | None, Mapping[str, Any]], RealtimeSession],
        end: Callable[[int, str], None],
    ) -> None:
        self._emit_text, self._make, self._end = emit, make, end
        self._inner: RealtimeSession | None = None
        self._resource: dict[str, Any] = {}
        self._muted = False
        self._began = time.monotonic()
        self._kind, self._rate = "audio/pcm", 24_000
        self._up, self._down = Resampler(24_000, 24_000), Resampler(24_000, 24_000)

    # ---- machine -----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Nothing is said before the client starts the session."""

    @property
    def busy(self) -> bool:
        return self._inner is not None and self._inner.busy

    async def close(self) -> None:
        if self._inner is not None:
            await self._inner.close()

    async def handle(self, text: str, arrived: float | None = None) -> None:
        event_id: str | None = None
        try:
            event = self._parse(text)
            event_id = event.get("event_id")
            await self._act(event, event_id)
        except BadEvent as error:
            self._error(error.code, str(error), error.event_id or event_id, error.param)

    # ---- from the client ---------------------------------------------------------------------------------------------

    def _parse(self, text: str) -> dict[str, Any]:
        event = read_json(text)
        if not isinstance(event, dict) or not isinstance(event.get("type"), str):
            raise BadEvent("invalid_json", "a message must be a JSON object with a type")
        event_id = event.get("event_id")
        if event_id is not None and not isinstance(event_id, str):
            raise BadEvent("invalid_type", "event_id must be a string", "event_id")
        kind = event["type"]
        if kind not in CLIENT_EVENTS:
            raise BadEvent("unknown_event", f"unknown event type {kind[:80]!r}", "type", event_id)
        check(CLIENT_EVENTS[kind], event, event_id)
        return event

    async def _act(self, event: dict[str, Any], event_id: str | None) -> None:
        kind = event["type"]
        if kind == "session.start":
            return await self._start(event["session"], event_id)
        if self._inner is None:
            raise BadEvent("session_not_started", "the first event is session.start", "type")
        if kind == "session.input_audio.append":
            await self._hear(event["audio"])
        elif kind in ("session.input_audio.mute", "session.input_audio.unmute"):
            self._muted = kind.endswith(".mute")
            self._emit(kind + "d", event_id)
        elif kind in ("session.instructions.append", "session.thinking.append", "session.commentary.append"):
            await self._append(kind, event["content"], event_id)
        elif kind == "session.update":
            self._resource.update({k: v for k, v in event["session"].items() if v is not None})
            self._emit("session.updated", event_id, session=self._resource)
        elif kind == "session.close":
            self._emit("session.closed", event_id, reason="close_requested", session=self._resource, usage=self._usage())
            self._end(1000, "")
        else:
            raise BadEvent("unsupported_event", f"{kind} {_NOT_SERVED}", "type")

    async def _start(self, session: Mapping[str, Any], event_id: str | None) -> None:
        if self._inner is not None:
            raise BadEvent("session_already_started", "the session has been started", "type")
        audio = session.get("audio") or {}
        form = audio.get("format") or {"type": "audio/pcm", "rate": 24000}
        kind = self._kind = form["type"]
        if kind == "audio/pcm":
            self._rate = form.get("rate", 24000)
            self._up, self._down = Resampler(self._rate, 24_000), Resampler(24_000, self._rate)
        voice = (audio.get("output") or {}).get("voice") or "default"
        given = {
            "type": "realtime",
            "instructions": session.get("instructions") or "",
            "audio": {
                "input": {"format": {"type": kind}, "turn_detection": {"type": "semantic_vad", "eagerness": "high"}},
                "output": {"format": {"type": kind}, "voice": voice if isinstance(voice, str) else voice["id"]},
            },
        }
        self._inner = self._make(self._from_inner, session.get("model"), given)
        for item in session.get("input") or []:
            await self._replay(item)
        self._resource = {
            **{k: v for k, v in session.items() if v is not None and k != "input"},
            "id": self._inner.id,
            "status": "active",
            "model": session["model"],
            "expires_at": int(self._inner.session["expires_at"]),
        }
        self._emit("session.started", event_id, session=self._resource)

    async def _replay(self, item: Mapping[str, Any]) -> None:
        """An item of the history that a session begins with."""
        assert self._inner is not None
        role = "system" if item["role"] == "developer" else item["role"]
        part = "output_text" if role == "assistant" else "input_text"
        text = "\n".join(p["text"] for p in item.get("content") or [])
        message = {"type": "message", "role": role, "content": [{"type": part, "text": text}]}
        await self._inner.handle(json.dumps({"type": "conversation.item.create", "item": message}))

    async def _hear(self, audio: str) -> None:
        assert self._inner is not None
        if self._muted:
            audio = base64.b64encode(_SILENT_BYTE[self._kind] * (len(audio) * 3 // 8 * 2)).decode()  # time goes on
        if self._rate != 24_000:
            try:
                data = decode_base64(audio)
            except ValueError as error:
                raise BadEvent("invalid_value", str(error), "audio") from error
            audio = base64.b64encode(to_pcm16(self._up.push(from_pcm16(data[: len(data) // 2 * 2])))).decode()
        await self._inner.handle(json.dumps({"type": "input_audio_buffer.append", "audio": audio}))

    async def _append(self, kind: str, content: str, event_id: str | None) -> None:
        """What the application adds: kept in the dialogue; a commentary is also the wish that the model says
        something."""
        assert self._inner is not None
        message = {"type": "message", "role": "system", "content": [{"type": "input_text", "text": content}]}
        await self._inner.handle(json.dumps({"type": "conversation.item.create", "item": message}))
        now = self._now_ms()
        self._emit(kind + "ed", event_id, start_ms=now, end_ms=now)
        if kind == "session.commentary.append" and not self._inner.busy:
            ask = {"instructions": content, "input": []}
            await self._inner.handle(json.dumps({"type": "response.create", "response": ask}))

    # ---- to the client -----------------------------------------------------------------------------------------------

    def _from_inner(self, text: str) -> None:
        """Events of the session machine, in this dialect; those that it has no word for are dropped."""
        event = json.loads(text)
        kind = event["type"]
        if kind == "response.output_audio.delta":
            self._sound(event["delta"])
        elif kind == "response.output_audio_transcript.delta":
            self._transcript("session.output_transcript.delta", event["delta"])
        elif kind == "conversation.item.input_audio_transcription.completed" and event["transcript"]:
            self._transcript("session.input_transcript.delta", event["transcript"])
        elif kind == "response.done":
            self._emit("session.usage.updated", usage=self._usage())
            error = (event["response"].get("status_details") or {}).get("error")
            if error:
                self._error(error["code"], error["message"], None, fault=True)
        elif kind == "error":
            error = event["error"]
            self._error(error.get("code") or "error", error["message"], error.get("event_id"), error.get("param"))

    def _sound(self, delta: str) -> None:
        if self._rate != 24_000:
            samples = self._down.push(from_pcm16(base64.b64decode(delta)))
            delta = base64.b64encode(to_pcm16(np.asarray(samples, dtype=np.float32))).decode()
        self._emit_text(build("session.output_audio.delta", delta=delta))

    def _transcript(self, kind: str, text: str) -> None:
        now = self._now_ms()
        self._emit(kind, delta=text, start_ms=now, end_ms=now)

    def _now_ms(self) -> int:
        """Where the session is, in sound received."""
        return 0 if self._inner is None else self._inner.turns.position * 1000 // HEARD_RATE

    def _usage(self) -> dict[str, Any]:
        return {"seconds": round(time.monotonic() - self._began, 3)}

    def _emit(self, kind: str, client_event_id: str | None = None, **fields: Any) -> None:
        answers = {} if client_event_id is None else {"client_event_id": client_event_id}
        self._emit_text(build(kind, event_id=new_id("event"), **answers, **fields))

    def _error(self, code: str, message: str, event_id: str | None, param: str | None = None, fault: bool = False) -> None:
        kind = "server_error" if fault else "invalid_request_error"
        error = {"type": kind, "code": code, "message": message, "param": param, "client_event_id": event_id}
        self._emit("error", event_id, error=error)
