"""The live server over HTTP and WebSocket on loopback: the openai client, REST, keys, origins, limits, the end."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import platform
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import soundfile
import uvicorn
import websockets
from websockets.asyncio.client import connect

from osum_echat.serving.app import Server, ServerSettings, build_app
from osum_echat.serving.backend import Ended, Refused, Text
from osum_echat.serving.realtime.settings import SessionLimits
from osum_echat.serving.safety import Keys, check_host, host_allowed, is_loopback, origin_allowed
from osum_echat.serving.vad import TurnModels
from tests.live_case import FakeBackend, append, live, speech_pcm, spoken, tone


@pytest.fixture(autouse=True)
def _no_uname(monkeypatch: pytest.MonkeyPatch) -> None:
    """The openai client says in a header what machine it runs on, and starts a program to find out."""
    monkeypatch.setattr(platform._Processor, "from_subprocess", staticmethod(lambda: ""))  # type: ignore[attr-defined]


class Running:
    """A server on a free port, and how to reach it."""

    def __init__(self, server: Server, port: int) -> None:
        self.server, self.port = server, port
        self.http, self.ws = f"http://127.0.0.1:{port}", f"ws://127.0.0.1:{port}"

    @contextlib.asynccontextmanager
    async def openai(self, key: str = "any") -> AsyncIterator[openai.AsyncOpenAI]:
        async with openai.AsyncOpenAI(api_key=key, base_url=f"{self.http}/v1", max_retries=0) as client:
            yield client


@contextlib.asynccontextmanager
async def serving(backend: Any = None, limits: SessionLimits | None = None, **settings: Any) -> AsyncIterator[Running]:
    settings["limits"] = limits or SessionLimits(ahead_seconds=1000.0)
    server = Server(backend or FakeBackend(), TurnModels.energy(), ServerSettings(drain_seconds=2.0, **settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(build_app(server), port=port, log_level="critical", ws="websockets-sansio", ws_max_size=2**20)
    running = uvicorn.Server(config)
    running.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(running.serve())
    while not running.started:
        await asyncio.sleep(0.01)
    try:
        yield Running(server, port)
    finally:
        running.should_exit = True
        await task


async def until(events: Any, kind: str) -> Any:
    async for event in events:
        assert event.type != "error", event
        if event.type == kind:
            return event
    raise AssertionError(f"the connection ended before {kind}")


# ---- realtime ------------------------------------------------------------------------------------------------------------------------


@live
async def test_the_openai_client_talks_over_three_turns_with_an_interruption() -> None:
    def script(turn: Any) -> list[Any]:
        pieces: list[Any] = [Text("a long answer that goes on and on")]
        for _ in range(60):
            pieces += [tone(0.1), 0.02]
        return pieces if len(turn.past) == 1 else [Text("Hello!"), tone(0.3)]

    backend = FakeBackend(script)
    async with (
        serving(backend) as running,
        running.openai() as client,
        client.realtime.connect(model="gpt-realtime") as connection,
    ):
        created = await connection.recv()
        assert created.type == "session.created"
        await connection.session.update(session={"type": "realtime", "audio": {"output": {"voice": "marin"}}})
        assert (await connection.recv()).type == "session.updated"
        for message in spoken():
            await connection.input_audio_buffer.append(audio=message["audio"])
        first = await until(connection, "response.done")
        assert first.response.status == "completed"
        await asyncio.sleep(0.4)  # played
        for message in spoken():
            await connection.input_audio_buffer.append(audio=message["audio"])
        await until(connection, "response.output_audio.delta")
        for message in append(speech_pcm(0.9, 0.9)):
            await connection.input_audio_buffer.append(audio=message["audio"])
        second = await until(connection, "response.done")
        assert second.response.status == "cancelled" and second.response.status_details.reason == "turn_detected"
        for message in append(speech_pcm(0.9, 0)):
            await connection.input_audio_buffer.append(audio=message["audio"])
        third = await until(connection, "response.done")
        assert third.response.status == "completed"
    assert len(backend.turns) == 3 and backend.memories[0].closed


@pytest.mark.parametrize("path", ["/v1/realtime?model=x", "/realtime?model=x", "/v1/realtime", "/realtime"])
@live
async def test_both_paths_are_served_with_any_model_and_the_subprotocol_is_chosen(path: str) -> None:
    protocols = ["realtime", "openai-insecure-api-key.ek_x", "openai-agents-sdk.0.20.0"]
    async with serving() as running, connect(running.ws + path, subprotocols=protocols) as client:  # type: ignore[arg-type]
        assert client.subprotocol == "realtime"
        assert json.loads(await client.recv())["type"] == "session.created"


@live
async def test_with_a_key_only_those_who_have_it_may_talk() -> None:
    async with serving(api_key="secret") as running:
        url = f"{running.ws}/v1/realtime"
        for headers, protocols in (
            ({}, None),
            ({"Authorization": "Bearer wrong"}, None),
            ({}, ["realtime", "openai-insecure-api-key.no"]),
        ):
            with pytest.raises(websockets.InvalidStatus) as refused:
                async with connect(url, additional_headers=headers, subprotocols=protocols):  # type: ignore[arg-type]
                    pass
            assert refused.value.response.status_code == 403
        async with connect(url, additional_headers={"Authorization": "Bearer secret"}) as client:
            assert json.loads(await client.recv())["type"] == "session.created"
        async with httpx.AsyncClient(base_url=running.http) as http:
            assert (await http.get("/v1/models")).status_code == 401
            assert (await http.post("/v1/realtime/client_secrets")).status_code == 401
            assert (await http.get("/health")).status_code == 200
            session = {"type": "realtime", "audio": {"output": {"voice": "cedar"}}}
            made = await http.post(
                "/v1/realtime/client_secrets", json={"session": session}, headers={"Authorization": "Bearer secret"}
            )
            secret = made.json()["value"]
        assert secret.startswith("ek_") and made.json()["session"]["audio"]["output"]["voice"] == "cedar"
        async with connect(url, subprotocols=["realtime", f"openai-insecure-api-key.{secret}"]) as client:  # type: ignore[list-item]
            assert json.loads(await client.recv())["session"]["audio"]["output"]["voice"] == "cedar"


def test_a_client_secret_expires() -> None:
    now = 0.0
    keys = Keys("k", clock=lambda: now)
    secret, end = keys.make_secret(60)
    assert keys.allows(secret) and keys.allows("k") and not keys.allows(None) and end == 60
    now = 61.0
    assert not keys.allows(secret) and Keys().allows(None)


@live
async def test_pages_of_other_sites_may_not_talk_unless_they_are_named() -> None:
    async with serving(origins=("https://friend.example",)) as running:
        url = f"{running.ws}/v1/realtime"
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
            with pytest.raises(websockets.InvalidStatus):
                async with connect(url, origin=origin):  # type: ignore[arg-type]
                    pass
        for origin in ("https://friend.example", running.http):
            async with connect(url, origin=origin) as client:  # type: ignore[arg-type]
                await client.recv()
        async with httpx.AsyncClient(base_url=running.http) as http:
            assert (await http.get("/v1/models", headers={"Origin": "https://evil.example"})).status_code == 403
            assert (await http.get("/v1/models", headers={"Host": "evil.example"})).status_code == 403
            ours = await http.get("/v1/models", headers={"Origin": "https://friend.example"})
            assert ours.headers["access-control-allow-origin"] == "https://friend.example"


def test_a_server_that_others_can_reach_needs_a_key() -> None:
    with pytest.raises(ValueError, match="--api-key"):
        check_host("0.0.0.0", None)
    check_host("0.0.0.0", "k")
    for host in ("127.0.0.1", "::1", "localhost"):
        check_host(host, None)
        assert is_loopback(host)
    assert not is_loopback("example.org")
    assert origin_allowed(None, "x", ()) and origin_allowed("http://x", "x", ()) and not origin_allowed("http://y", "x", ())
    assert host_allowed("localhost:8000", "127.0.0.1", ()) and host_allowed("[::1]:8000", "::1", ())
    assert not host_allowed("evil.example:8000", "127.0.0.1", ()) and host_allowed("any.example", "0.0.0.0", ())


@live
async def test_a_full_server_refuses_with_a_sentence() -> None:
    async with serving(sessions=1) as running:
        async with connect(f"{running.ws}/v1/realtime") as first:
            await first.recv()
            async with connect(f"{running.ws}/v1/realtime") as second:
                error = json.loads(await second.recv())
                assert error["error"]["code"] == "server_full" and "full" in error["error"]["message"]
                with pytest.raises(websockets.ConnectionClosed) as closed:
                    await second.recv()
                assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013
        for _ in range(50):
            if not running.server.connections:
                break
            await asyncio.sleep(0.02)
        async with connect(f"{running.ws}/v1/realtime") as third:
            assert json.loads(await third.recv())["type"] == "session.created"


@pytest.mark.parametrize(
    ("limits", "send", "word"),
    [
        ({"idle_seconds": 0.2}, None, "nothing was received"),
        ({"session_seconds": 0.5}, None, "a session may last"),
        ({"message_bytes": 1000}, "x" * 2000, "1000 bytes"),
    ],
)
@live
async def test_limits_end_a_session_with_a_sentence(limits: dict[str, Any], send: str | None, word: str) -> None:
    async with serving(limits=SessionLimits(**limits)) as running, connect(f"{running.ws}/v1/realtime") as client:
        await client.recv()
        if send:
            await client.send(send)
        messages = []
        with contextlib.suppress(websockets.ConnectionClosedError):  # 1009 is an error to this client
            async for message in client:
                messages.append(json.loads(message))
        assert word in messages[-1]["error"]["message"] and messages[-1]["error"]["code"] == "session_ended"


@live
async def test_binary_frames_garbage_and_sudden_ends_do_no_harm() -> None:
    async with serving() as running:
        for frame in (b"\x00\xff\x01", "{", json.dumps({"type": "response.create"}).encode()):
            async with connect(f"{running.ws}/v1/realtime") as client:
                await client.recv()
                await client.send(frame)
                await client.recv()
                client.transport.abort()
        for _ in range(100):
            if not running.server.connections:
                break
            await asyncio.sleep(0.02)
        assert not running.server.connections
        async with connect(f"{running.ws}/v1/realtime") as client:
            assert json.loads(await client.recv())["type"] == "session.created"


@live
async def test_told_to_stop_it_takes_nobody_new_and_lets_answers_end() -> None:
    backend = FakeBackend(lambda turn: [Text("word"), 0.5, tone(0.2)])
    async with serving(backend) as running:
        async with connect(f"{running.ws}/v1/realtime") as busy, connect(f"{running.ws}/v1/realtime") as idle:
            await busy.recv()
            await idle.recv()
            item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
            await busy.send(json.dumps({"type": "conversation.item.create", "item": item}))
            await busy.send(json.dumps({"type": "response.create"}))
            await asyncio.sleep(0.1)
            drain = asyncio.create_task(running.server.drain())
            await asyncio.sleep(0.05)
            assert "shutting down" in json.loads([m async for m in idle][-1])["error"]["message"]
            async with connect(f"{running.ws}/v1/realtime") as late:
                assert "shutting down" in json.loads(await late.recv())["error"]["message"]
            kinds = [json.loads(m) async for m in busy]
            done = next(m for m in kinds if m["type"] == "response.done")
            assert done["response"]["status"] == "completed" and kinds[-1]["error"]["code"] == "session_ended"
            await drain
        async with httpx.AsyncClient(base_url=running.http) as http:
            assert (await http.get("/health")).status_code == 503
            assert (await http.post("/v1/audio/speech", json={"input": "x"})).status_code == 503


# ---- REST ----------------------------------------------------------------------------------------------------------------------------


def wav(seconds: float = 1.0, peak: float = 1 / 3, subtype: str = "PCM_16") -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.sin(np.arange(round(16000 * seconds)) / 9) * peak, 16000, format="WAV", subtype=subtype)
    return out.getvalue()


@live
async def test_speech_in_every_format_and_as_a_stream() -> None:
    backend = FakeBackend()
    async with serving(backend) as running, running.openai() as client:
        for form in ("pcm", "wav", "flac", "mp3", "opus"):
            reply = await client.audio.speech.create(model="any", voice="alloy", input="Say this.", response_format=form)  # type: ignore[arg-type]
            data = reply.content
            if form == "pcm":
                assert abs(len(data) / 48000 - 1.0) < 0.01
                continue
            with soundfile.SoundFile(io.BytesIO(data)) as file:
                assert "synthetic" in file.comment, form
                samples, rate = file.read(), file.samplerate
            assert abs(len(samples) / rate - 1.0) < (0.01 if form == "wav" else 0.2)
        assert backend.turns[0].say == "Say this." and backend.turns[0].voice == "alloy"
        async with client.audio.speech.with_streaming_response.create(
            model="any", voice="alloy", input="Say this.", response_format="pcm", stream_format="sse"
        ) as stream:
            events = [json.loads(line[6:]) async for line in stream.iter_lines() if line.startswith("data: ")]
        assert {e["type"] for e in events[:-1]} == {"speech.audio.delta"} and events[-1]["type"] == "speech.audio.done"
        assert abs(sum(len(base64.b64decode(e["audio"])) for e in events[:-1]) / 48000 - 1.0) < 0.01


@live
async def test_transcriptions() -> None:
    async with serving() as running, running.openai() as client:
        for name in ("a.wav", "../../etc/passwd"):
            reply = await client.audio.transcriptions.create(model="any", file=(name, wav()))
            assert reply.text == "what was said"
        assert (
            await client.audio.transcriptions.create(model="any", file=("a.wav", wav()), response_format="text")
            == "what was said\n"
        )
        stream = await client.audio.transcriptions.create(model="any", file=("a.wav", wav()), stream=True)
        events = [event async for event in stream]
        assert [event.type for event in events] == ["transcript.text.delta", "transcript.text.done"]
        with pytest.raises(openai.BadRequestError, match="audio"):
            await client.audio.transcriptions.create(model="any", file=("a.wav", b"no sound"))


def heard(data: bytes) -> dict[str, Any]:
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}
    return {"role": "user", "content": [part]}


@live
async def test_chat_completions_with_sound_in_and_out() -> None:
    backend = FakeBackend()
    async with serving(backend) as running, running.openai() as client:
        reply = await client.chat.completions.create(
            model="any",
            messages=[heard(wav())],
            modalities=["text", "audio"],
            audio={"voice": "alloy", "format": "wav"},  # type: ignore[list-item]
        )
        message = reply.choices[0].message
        assert message.audio is not None and message.audio.transcript == "Hello there, friend."
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(message.audio.data)))
        assert rate == 24000 and abs(len(samples) / rate - 1.0) < 0.01
        assert message.x_echat["tags"]["emotion"] == "happy"  # type: ignore[attr-defined]
        assert reply.usage is not None and reply.usage.completion_tokens_details.audio_tokens == 25  # type: ignore[union-attr]
        stream = await client.chat.completions.create(
            model="any",
            messages=[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, heard(wav())],  # type: ignore[list-item]
            modalities=["text", "audio"],
            audio={"voice": "alloy", "format": "pcm16"},
            stream=True,
            stream_options={"include_usage": True},
        )
        text, data, last = "", b"", None
        async for chunk in stream:
            for choice in chunk.choices:
                if (audio := choice.delta.audio) is not None:
                    text += audio.transcript or ""
                    data += base64.b64decode(audio.data or "")
            last = chunk
        assert text == "Hello there, friend." and abs(len(data) / 48000 - 1.0) < 0.01
        assert last is not None and last.usage is not None
        assert [(e.user_text, e.reply_text) for e in backend.turns[1].past] == [("hi", "hello")]


@live
async def test_chat_completions_in_text() -> None:
    backend = FakeBackend()
    async with serving(backend) as running, running.openai() as client:
        asked = [{"role": "system", "content": "be kind"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
        reply = await client.chat.completions.create(model="m", messages=asked, max_tokens=5, temperature=0.5, seed=3)  # type: ignore[arg-type]
        assert reply.choices[0].message.content == "Hello there, friend." and reply.model == "m"
        turn = backend.turns[0]
        assert (turn.max_tokens, turn.temperature, turn.seed, turn.instructions, turn.speak) == (5, 0.5, 3, "be kind", False)
        chunks = [c async for c in await client.chat.completions.create(model="m", messages=asked, stream=True)]  # type: ignore[arg-type]
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hello there, friend."
        assert chunks[-1].choices[0].finish_reason == "stop"
        backend.script = lambda _: [Text("cut"), Ended("length")]
        reply = await client.chat.completions.create(model="m", messages=asked)  # type: ignore[arg-type]
        assert reply.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("/v1/audio/speech", {}, "input"),
        ("/v1/audio/speech", {"input": "x" * 5000}, "4096"),
        ("/v1/audio/speech", {"input": "x", "response_format": "aac"}, "aac"),
        ("/v1/audio/speech", {"input": "x", "speed": "fast"}, "speed"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}]}, "last message"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ("/v1/chat/completions", {"messages": [{"role": "wizard"}]}, "wizard"),
        ("/v1/chat/completions", {"messages": [heard(b"/etc/passwd")]}, "audio"),
        ("/v1/chat/completions", {"messages": [heard(wav(1.0, np.nan, "FLOAT"))]}, "NaN"),
        ("/v1/chat/completions", {"messages": [heard(wav(1.0, 1e30, "FLOAT"))]}, "1.0e+30"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 3}, "n must be 1"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "temperature": 9}, "temperature"),
        ("/v1/audio/transcriptions", {"file": "/etc/passwd"}, "multipart"),
    ],
)
@live
async def test_a_wrong_request_is_refused_with_a_sentence(path: str, body: dict[str, Any], word: str) -> None:
    async with serving() as running, httpx.AsyncClient(base_url=running.http) as http:
        reply = await http.post(path, json=body)
        assert reply.status_code == 400 and word in reply.json()["error"]["message"]
        reply = await http.post(path, content=b"{", headers={"content-type": "application/json"})
        assert reply.status_code == 400


@live
async def test_a_model_that_has_no_room_is_503_and_one_that_fails_500() -> None:
    backend = FakeBackend(lambda _: [Ended("failed", message="the model failed in this answer; ask again")])
    async with serving(backend) as running, httpx.AsyncClient(base_url=running.http) as http:
        assert (await http.post("/v1/audio/speech", json={"input": "x"})).status_code == 500
        backend.refuse = Refused("the server is full: 64 requests wait already; try again in a moment")
        reply = await http.post("/v1/audio/speech", json={"input": "x"})
        assert reply.status_code == 503 and reply.headers["retry-after"] and "full" in reply.json()["error"]["message"]


@live
async def test_models_health_metrics_and_large_requests() -> None:
    async with (
        serving(body_bytes=10_000) as running,
        httpx.AsyncClient(base_url=running.http) as http,
        running.openai() as client,
    ):
        assert [m.id async for m in client.models.list()] == ["fake"]
        assert (await client.models.retrieve("anything/at-all")).id == "anything/at-all"
        assert (await http.get("/health")).json()["status"] == "ok"
        await http.post("/v1/audio/speech", json={"input": "x"})
        async with connect(f"{running.ws}/v1/realtime") as talking:
            await talking.recv()
            for message in spoken():
                await talking.send(json.dumps(message))
            while json.loads(await talking.recv())["type"] != "response.done":
                pass
            text = (await http.get("/metrics")).text
        assert "osum_echat_realtime_sessions 1.0" in text
        assert 'osum_echat_time_to_first_audio_seconds_count{thought="yes"} 1.0' in text
        assert 'osum_echat_requests_total{path="/v1/audio/speech",status="200"} 1.0' in text
        for name in ("thought_tokens", "barge_in_total", "barge_in_stop_seconds", "guard_actions"):
            assert f"osum_echat_{name}" in text
        big = await http.post("/v1/audio/speech", json={"input": "x" * 20_000})
        assert big.status_code == 413
        for path in ("/static/..%2fapp.py", "/static/%2e%2e/app.py", "/static/nothing.js"):
            assert (await http.get(path)).status_code == 404


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/audio/speech", {"input": "x", "response_format": "mp3"}),
        ("/v1/audio/speech", {"input": "x", "response_format": "pcm"}),  # before there is any sound
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
@live
async def test_an_answer_that_nobody_waits_for_is_cancelled(path: str, body: dict[str, Any]) -> None:
    backend = FakeBackend(lambda _: [Text("a"), 100.0])
    async with serving(backend) as running, httpx.AsyncClient(base_url=running.http) as http:
        asked = asyncio.create_task(http.post(path, json=body))
        while not backend.jobs:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)
        asked.cancel()
        await asyncio.wait_for(backend.jobs[0].cancelled.wait(), 40)


@live
async def test_a_model_that_fails_when_it_has_begun_to_speak() -> None:
    """A file is not sent; a stream says so."""
    backend = FakeBackend(lambda _: [tone(0.2), Ended("failed", message="the model failed in this answer; ask again")])
    async with serving(backend) as running, httpx.AsyncClient(base_url=running.http) as http:
        whole = await http.post("/v1/audio/speech", json={"input": "x", "response_format": "flac"})
        assert whole.status_code == 500 and "ask again" in whole.json()["error"]["message"]
        streamed = await http.post("/v1/audio/speech", json={"input": "x", "stream_format": "sse"})
        last = json.loads(streamed.text.strip().split("data: ")[-1])
        assert last["error"]["code"] == "model_failed" and "speech.audio.done" not in streamed.text


@live
async def test_what_a_client_leaves_is_cancelled() -> None:
    backend = FakeBackend(lambda _: [Text("a"), *[x for _ in range(200) for x in (tone(0.1), 0.05)]])
    async with serving(backend) as running:
        async with (
            httpx.AsyncClient(base_url=running.http) as http,
            http.stream("POST", "/v1/audio/speech", json={"input": "x", "response_format": "pcm"}) as reply,
        ):
            async for _ in reply.aiter_bytes():
                break
        await asyncio.wait_for(backend.jobs[0].cancelled.wait(), 60)
