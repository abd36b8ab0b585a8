"""REST beside the real-time protocol, in the forms of the OpenAI API: speech, transcriptions, chat completions, models.

Any ``model`` and any ``voice`` is taken. Recordings come as bytes in the request, never as a path or a URL. What a
client leaves early is cancelled.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import secrets
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from openai.types import Model
from openai.types.audio import Transcription, TranscriptionTextDeltaEvent, TranscriptionTextDoneEvent
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel
from starlette.datastructures import UploadFile

from osum_echat.audio.io import encode, to_mono_16k
from osum_echat.pipeline.ask import SYNTHETIC
from osum_echat.serving.backend import Backend, Ended, Exchange, Heard, Job, Refused, Samples, Sound, Text, ThoughtDone, Turn
from osum_echat.serving.realtime import tasks
from osum_echat.serving.realtime.audio import Resampler, to_pcm16

RATE = 24_000
"""Of all sound that goes out."""
MEDIA = {
    "pcm": "audio/pcm",
    "pcm16": "audio/pcm",
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
}
_FILES = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "mp3": ("MP3", None), "opus": ("OGG", "OPUS")}
_MAX_TEXT = 4096


class Host(Protocol):
    """What routes need of a server. ``think``: form of the thought of requests that do not choose."""

    backend: Backend
    draining: bool

    @property
    def think(self) -> str | None: ...


class BadRequest(ValueError):
    """What is wrong with a request, for the client."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value", status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def failure(status: int, message: str, code: str, param: str | None = None) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    headers = {"Retry-After": "1"} if status == 503 else {}
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status, headers)


def add_routes(app: FastAPI, server: Host) -> None:
    backend = server.backend

    def model(name: str) -> dict[str, Any]:
        return _plain(Model(id=name, created=0, object="model", owned_by="osum-echat"))

    def route(path: str, work: Callable[[Request], Awaitable[Response]]) -> None:
        async def call(request: Request) -> Response:
            if server.draining:
                return failure(503, "the server is shutting down; ask again later", "draining")
            try:
                return await work(request)
            except BadRequest as error:
                return failure(error.status, str(error), error.code, error.param)
            except Refused as error:
                return failure(503 if error.code == "server_full" else 400, str(error), error.code)

        app.add_api_route(path, call, methods=["POST"], response_model=None)

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model(backend.name)]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> JSONResponse:
        return JSONResponse(model(name))

    route("/v1/audio/speech", lambda request: speech(request, backend))
    route("/v1/audio/transcriptions", lambda request: transcriptions(request, backend))
    route("/v1/chat/completions", lambda request: chat(request, server))


# ---- reading ---------------------------------------------------------------------------------------------------------


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except (ValueError, RecursionError) as error:
        raise BadRequest("the body must be JSON", code="invalid_json") from error
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object", code="invalid_json")
    return body


def _number(body: Mapping[str, Any], name: str, low: float, high: float) -> Any:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise BadRequest(f"{name} must be a number between {low:g} and {high:g}", name)
    return value


async def _hear(backend: Backend, data: bytes, param: str) -> Heard:
    """A recording of any common format."""
    try:
        samples = await asyncio.to_thread(to_mono_16k, data, max_seconds=backend.max_seconds)
        return await backend.hear(samples)
    except ValueError as error:
        raise BadRequest(str(error), param, "invalid_audio") from error


# ---- sound out -------------------------------------------------------------------------------------------------------


def encode_sound(samples: Samples, form: str) -> bytes:
    """A whole reply as a file. Raises BadRequest for formats that cannot be made."""
    if form in ("pcm", "pcm16"):
        return to_pcm16(samples)
    kind, subtype = _FILES[form]
    return encode(samples, RATE, kind, SYNTHETIC, subtype)


def wav_header(seconds: float | None = None) -> bytes:
    """Of 16-bit mono sound whose length is not known yet: sizes are the largest there are, which players take for a
    stream. Its comment says that the sound is synthetic."""
    size = 0xFFFFFFFF if seconds is None else round(seconds * RATE) * 2
    comment = SYNTHETIC.encode() + b"\0" * (2 - len(SYNTHETIC) % 2)  # ends with a zero, in whole words
    info = b"INFOICMT" + struct.pack("<I", len(comment)) + comment
    head = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, RATE, RATE * 2, 2, 16) + b"LIST" + struct.pack("<I", len(info)) + info
    return b"RIFF" + struct.pack("<I", min(size + len(head) + 8, 0xFFFFFFFF)) + head + b"data" + struct.pack("<I", size)


def _form(given: Any, default: str, param: str) -> str:
    form = default if given is None else given
    if form not in MEDIA:
        raise BadRequest(f"{param} {str(form)[:20]!r} cannot be made here: use one of {', '.join(MEDIA)}", param)
    return form


class _Voice:
    """The sound of a job at the rate that goes out."""

    def __init__(self) -> None:
        self._resampler: Resampler | None = None

    def push(self, sound: Sound) -> Samples:
        if self._resampler is None:
            self._resampler = Resampler(sound.rate, RATE)
        return self._resampler.push(sound.samples)

    def finish(self) -> Samples:
        nothing = np.zeros(0, dtype=np.float32)
        return nothing if self._resampler is None else self._resampler.push(nothing, last=True)


@contextlib.asynccontextmanager
async def _wanted(request: Request, job: Job) -> AsyncIterator[None]:
    """The job is cancelled when the client leaves while an answer is made that is sent as a whole."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        await tasks.end(watching)


async def _pieces(job: Job, ended: list[Ended]) -> AsyncIterator[Samples]:
    """Sound of a job; its end goes to ``ended``. Left early, the job is cancelled."""
    voice = _Voice()
    try:
        async for event in job:
            if isinstance(event, Sound):
                yield voice.push(event)
            elif isinstance(event, Ended):
                ended.append(event)
        yield voice.finish()
    finally:
        job.cancel()


# ---- speech ----------------------------------------------------------------------------------------------------------


async def speech(request: Request, backend: Backend) -> Response:
    """``POST /v1/audio/speech``: a text, said. pcm and wav come while it is said; other formats when it has been."""
    body = await _body(request)
    text, voice = body.get("input"), body.get("voice")
    if not isinstance(text, str) or not text.strip():
        raise BadRequest("input must be the text to say", "input")
    if len(text) > _MAX_TEXT:
        raise BadRequest(f"input may have {_MAX_TEXT} characters", "input")
    _number(body, "speed", 0.25, 4.0)
    form = _form(body.get("response_format"), "mp3", "response_format")
    stream_form = body.get("stream_format") or "audio"
    if stream_form not in ("audio", "sse"):
        raise BadRequest("stream_format must be audio or sse", "stream_format")
    job = backend.start(
        Turn(say=text, voice=voice if isinstance(voice, str) else None, seed=int(_number(body, "seed", 0, 2**63) or 0))
    )
    ended: list[Ended] = []
    pieces = _pieces(job, ended)
    async with _wanted(request, job):
        try:
            first = await anext(pieces)  # so that a fault is a status and not a broken stream
        except StopAsyncIteration:
            first = np.zeros(0, dtype=np.float32)
        streams = stream_form == "sse" or form in ("pcm", "pcm16", "wav")
        samples = first if streams else np.concatenate([first, *[piece async for piece in pieces]])
    if ended and ended[0].reason == "failed":
        return failure(500, ended[0].message, "model_failed")
    if stream_form == "sse":
        return StreamingResponse(_speech_events(first, pieces, ended, form), media_type="text/event-stream")
    if streams:
        return StreamingResponse(_speech_bytes(first, pieces, form), media_type=MEDIA[form])
    return Response(await asyncio.to_thread(encode_sound, samples, form), media_type=MEDIA[form])


async def _speech_bytes(first: Samples, pieces: AsyncIterator[Samples], form: str) -> AsyncIterator[bytes]:
    if form == "wav":
        yield wav_header()
    yield to_pcm16(first)
    async for piece in pieces:
        yield to_pcm16(piece)


async def _speech_events(first: Samples, pieces: AsyncIterator[Samples], ended: list[Ended], form: str) -> AsyncIterator[bytes]:
    async def parts() -> AsyncIterator[bytes]:
        if form in ("pcm", "pcm16", "wav"):
            async for data in _speech_bytes(first, pieces, form):
                yield data
        else:
            yield await asyncio.to_thread(encode_sound, np.concatenate([first, *[piece async for piece in pieces]]), form)

    async for data in parts():
        if data:
            yield _sse({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()})
    if ended and ended[0].reason == "failed":
        yield _failed(ended[0])
        return
    tokens = dict(ended[0].tokens) if ended else {}
    read, made = tokens.get("read", 0), tokens.get("speech", 0)
    yield _sse({"type": "speech.audio.done", "usage": {"input_tokens": read, "output_tokens": made, "total_tokens": read + made}})


# ---- transcriptions --------------------------------------------------------------------------------------------------


async def transcriptions(request: Request, backend: Backend) -> Response:
    """``POST /v1/audio/transcriptions``: multipart form with ``file``."""
    async with request.form(max_files=1, max_fields=30) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise BadRequest("file must be a recording, sent as multipart form data", "file")
        data = await file.read()
        kind = form.get("response_format") or "json"
        stream = str(form.get("stream") or "").lower() in ("true", "1")
    if kind not in ("json", "text", "verbose_json"):
        raise BadRequest("response_format must be json, text or verbose_json", "response_format")
    heard = await _hear(backend, data, "file")
    text = await backend.transcribe(heard)
    usage = {"type": "duration", "seconds": round(heard.seconds, 3)}
    if stream:
        events = [
            TranscriptionTextDeltaEvent(type="transcript.text.delta", delta=text),
            TranscriptionTextDoneEvent(type="transcript.text.done", text=text),
        ]
        return Response(b"".join(_sse(_plain(event)) for event in events), media_type="text/event-stream")
    if kind == "text":
        return Response(text + "\n", media_type="text/plain; charset=utf-8")
    if kind == "verbose_json":
        return JSONResponse(
            {"task": "transcribe", "language": "", "duration": heard.seconds, "text": text, "segments": [], "usage": usage}
        )
    return JSONResponse(_plain(Transcription.model_validate({"text": text, "usage": usage})))


# ---- chat completions ------------------------------------------------------------------------------------------------


async def chat(request: Request, server: Host) -> Response:
    """``POST /v1/chat/completions``: text or ``input_audio`` in, text and sound out, whole or as server-sent events."""
    body = await _body(request)
    backend = server.backend
    turn, form = await _turn(body, server)
    if body.get("stream"):
        if turn.speak and form not in ("pcm16", "pcm", "wav"):
            raise BadRequest("a stream of sound has the format pcm16", "audio.format")
        return StreamingResponse(_chat_events(backend.start(turn), body, turn, form), media_type="text/event-stream")
    job = backend.start(turn)
    text, thought, voice, sound = "", None, _Voice(), []
    ended = Ended("stop")
    try:
        async with _wanted(request, job):
            async for event in job:
                if isinstance(event, Text):
                    text += event.text
                elif isinstance(event, ThoughtDone):
                    thought = event
                elif isinstance(event, Sound):
                    sound.append(voice.push(event))
                elif isinstance(event, Ended):
                    ended = event
    finally:
        job.cancel()
    if ended.reason == "failed":
        return failure(500, ended.message, "model_failed")
    message: dict[str, Any] = {"role": "assistant", "content": None if turn.speak else text.strip(), "refusal": None}
    if turn.speak:
        data = await asyncio.to_thread(encode_sound, np.concatenate([*sound, voice.finish()]), form)
        message["audio"] = {**_audio_fields(), "data": base64.b64encode(data).decode(), "transcript": text.strip()}
    if thought is not None:
        message["x_echat"] = {"thought": thought.raw, "tags": dict(thought.tags)}
    reason = "length" if ended.reason == "length" else "stop"
    completion = {
        **_head(body, "chat.completion"),
        "choices": [{"index": 0, "message": message, "finish_reason": reason, "logprobs": None}],
        "usage": _usage(ended),
    }
    return JSONResponse(_plain(ChatCompletion.model_validate(completion)))


async def _chat_events(job: Job, body: Mapping[str, Any], turn: Turn, form: str) -> AsyncIterator[bytes]:
    head, audio, voice, begun = _head(body, "chat.completion.chunk"), _audio_fields(), _Voice(), False

    def chunk(delta: Mapping[str, Any], reason: str | None = None, **fields: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _sse(_plain(ChatCompletionChunk.model_validate({**head, "choices": [choice], **fields})))

    def sounding(samples: Samples) -> bytes:
        nonlocal begun
        data = to_pcm16(samples)
        if form == "wav" and not begun:
            data, begun = wav_header() + data, True
        return chunk({"audio": {"id": audio["id"], "data": base64.b64encode(data).decode()}})

    yield chunk({"role": "assistant", **({} if turn.speak else {"content": ""})})
    try:
        async for event in job:
            if isinstance(event, Text):
                yield chunk({"audio": {"id": audio["id"], "transcript": event.text}} if turn.speak else {"content": event.text})
            elif isinstance(event, ThoughtDone):
                yield chunk({"x_echat": {"thought": event.raw, "tags": dict(event.tags)}})
            elif isinstance(event, Sound):
                yield sounding(voice.push(event))
            elif isinstance(event, Ended):
                if len(rest := voice.finish()):
                    yield sounding(rest)
                if turn.speak:
                    yield chunk({"audio": {"id": audio["id"], "expires_at": audio["expires_at"]}})
                if event.reason == "failed":
                    yield _failed(event)
                yield chunk({}, "length" if event.reason == "length" else "stop")
                if (body.get("stream_options") or {}).get("include_usage"):
                    yield _sse(_plain(ChatCompletionChunk.model_validate({**head, "choices": [], "usage": _usage(event)})))
        yield b"data: [DONE]\n\n"
    finally:
        job.cancel()


async def _turn(body: Mapping[str, Any], server: Host) -> tuple[Turn, str]:
    """What the model is asked, and the format of the sound."""
    backend = server.backend
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise BadRequest("messages must be a list of messages", "messages")
    if (body.get("n") or 1) != 1:
        raise BadRequest("one answer at a time: n must be 1", "n")
    modalities = body.get("modalities") or ["text"]
    if not isinstance(modalities, list) or not set(map(str, modalities)) <= {"text", "audio"}:
        raise BadRequest('modalities may hold "text" and "audio"', "modalities")
    speak = "audio" in modalities
    audio = body.get("audio") or {}
    if not isinstance(audio, dict):
        raise BadRequest("audio must be an object", "audio")
    form = _form(audio.get("format"), "wav", "audio.format")
    past, heard, text, system = await _dialogue(messages, backend)
    if heard is None and not text:
        raise BadRequest("the last message must be the user's, with a text or a recording", "messages")
    own = body.get("x_echat") or {}
    think = own.get("think", server.think) if isinstance(own, dict) else None
    limit = _number(body, "max_completion_tokens", 1, 1e6) or _number(body, "max_tokens", 1, 1e6)
    voice = audio.get("voice")
    turn = Turn(
        past=tuple(past),
        heard=heard,
        text=text,
        speak=speak,
        think=think if heard is not None and think in backend.thinks else None,
        voice=voice if isinstance(voice, str) else None,
        max_tokens=None if limit is None else int(limit),
        temperature=_number(body, "temperature", 0, 2),
        seed=int(_number(body, "seed", 0, 2**63) or 0),
        instructions=system,
    )
    return turn, form


async def _dialogue(messages: Sequence[Mapping[str, Any]], backend: Backend) -> tuple[list[Exchange], Heard | None, str, str]:
    """Past exchanges, the question (a recording, or a text), and what system messages say."""
    past: list[Exchange] = []
    system: list[str] = []
    heard, texts = None, list[str]()
    for number, message in enumerate(messages):
        role = message.get("role")
        if role in ("system", "developer"):
            system.append(_text(message.get("content")))
        elif role == "user":
            texts.append(_text(message.get("content")))
            recording = await _recording(message.get("content"), backend, f"messages.{number}")
            heard = recording or heard
        elif role == "assistant":
            said = _text(message.get("content")) or str((message.get("audio") or {}).get("transcript") or "")
            if said and (heard is not None or any(texts)):
                past.append(Exchange((heard,) if heard is not None else (), "" if heard is not None else "\n".join(texts), said))
            heard, texts = None, []
        elif role not in ("tool", "function"):
            raise BadRequest(f"role {str(role)[:20]!r} is not one of system, user, assistant", f"messages.{number}.role")
    return past, heard, "" if heard is not None else "\n".join(t for t in texts if t).strip(), "\n".join(system)


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(str(p.get("text") or "") for p in parts if isinstance(p, dict) and p.get("type") in ("text", "input_text"))


async def _recording(content: Any, backend: Backend, where: str) -> Heard | None:
    """The last recording of a message."""
    found = None
    for part in content if isinstance(content, list) else []:
        if not isinstance(part, dict):
            raise BadRequest("parts of a message must be objects", where)
        if part.get("type") == "input_audio":
            given = part.get("input_audio")
            if not isinstance(given, dict) or not isinstance(given.get("data"), str):
                raise BadRequest("input_audio needs data, in base64", f"{where}.input_audio")
            try:
                data = base64.b64decode(given["data"], validate=True)
            except (binascii.Error, ValueError) as error:
                raise BadRequest("input_audio.data must be base64", f"{where}.input_audio") from error
            found = await _hear(backend, data, f"{where}.input_audio")
        elif part.get("type") not in ("text", "input_text"):
            raise BadRequest(f"parts of type {str(part.get('type'))[:20]!r} are not understood here", where)
    return found


# ---- forms -----------------------------------------------------------------------------------------------------------


def _plain(model: BaseModel) -> dict[str, Any]:
    return model.model_dump(mode="json", exclude_unset=True)


def _sse(data: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def _failed(ended: Ended) -> bytes:
    """A fault in a stream that has begun."""
    return _sse({"error": {"message": ended.message, "type": "server_error", "code": "model_failed"}})


def _head(body: Mapping[str, Any], kind: str) -> dict[str, Any]:
    model = body.get("model")
    name = model if isinstance(model, str) else "osum-echat"
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": name}


def _audio_fields() -> dict[str, Any]:
    return {"id": f"audio_{secrets.token_hex(12)}", "expires_at": int(time.time()) + 3600}


def _usage(ended: Ended) -> dict[str, Any]:
    tokens = ended.tokens
    read, thought, speech_ids = tokens.get("read", 0), tokens.get("thought", 0), tokens.get("speech", 0)
    made = tokens.get("text", 0) + thought + speech_ids
    return {
        "prompt_tokens": read,
        "completion_tokens": made,
        "total_tokens": read + made,
        "prompt_tokens_details": {"audio_tokens": tokens.get("heard", 0), "cached_tokens": 0},
        "completion_tokens_details": {"audio_tokens": speech_ids, "reasoning_tokens": thought},
    }
