"""Calls over WebRTC on loopback: an offer by the openai client, sound in tracks, events in the data channel. The network and both ends are real."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from osum_echat.serving.backend import Heard, Text, Turn
from osum_echat.serving.realtime.audio import from_pcm16
from osum_echat.serving.realtime.events import server_event_adapter
from osum_echat.serving.realtime.settings import SessionLimits
from tests.live_case import FakeBackend, live, speech_pcm, tone
from tests.test_live_server import Running, _no_uname, serving  # noqa: F401  the fixture is used by being here

pytest.importorskip("aiortc", reason="aiortc is missing: pip install 'osum-echat[webrtc]' (Python 3.11 or newer)")
import aioice.ice
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError
from av import AudioFrame, AudioResampler

from osum_echat.serving.app import build_app
from osum_echat.serving.realtime import webrtc
from osum_echat.serving.realtime.socket import Connection
from osum_echat.serving.realtime.webrtc import CallSession, CallSocket, Loudspeaker, event_without_formats

RATE = 24_000
CHECK = server_event_adapter()


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """ICE leaves loopback out, and this machine may have nothing else."""
    monkeypatch.setattr(aioice.ice, "get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])


class Caller:
    """A client. ``events``: what came in the channel; ``heard``: the samples of its loudspeaker."""

    def __init__(self) -> None:
        self.peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.microphone = Loudspeaker()
        self.peer.addTrack(self.microphone)
        self.channel = self.peer.createDataChannel("oai-events")
        self.channel.on("message", lambda text: self.events.append(CHECK.validate_python(json.loads(text))))
        self.events: list[Any] = []
        self.heard: list[np.ndarray] = []
        self.peer.on("track", lambda track: setattr(self, "_hearing", asyncio.create_task(self._hear(track))))

    async def offer(self, candidates: bool = True) -> str:
        """``candidates``: False leaves them out, as clients do that send their offer before they have any."""
        await self.peer.setLocalDescription(await self.peer.createOffer())
        lines = str(self.peer.localDescription.sdp).splitlines(keepends=True)
        return "".join(line for line in lines if candidates or not line.startswith(("a=candidate", "a=end-of-candidates")))

    async def answered(self, sdp: str) -> None:
        await self.peer.setRemoteDescription(RTCSessionDescription(sdp, "answer"))

    async def _hear(self, track: Any) -> None:
        resampler = AudioResampler(format="s16", layout="mono", rate=RATE)
        with contextlib.suppress(MediaStreamError):
            while True:
                for part in resampler.resample(await track.recv()):
                    self.heard.append(from_pcm16(bytes(part.planes[0])[: part.samples * 2]))

    async def until(self, kind: str, seen: int = 0, seconds: float = 100.0) -> Any:
        """The first such event behind the first ``seen`` ones."""
        for _ in range(int(seconds / 0.02)):
            for event in self.events[seen:]:
                assert event.type != "error", event
                if event.type == kind:
                    return event
            await asyncio.sleep(0.02)
        raise AssertionError(f"{kind} did not come: {[event.type for event in self.events]}")

    def send(self, kind: str, **fields: Any) -> None:
        self.channel.send(json.dumps({"type": kind, **fields}))

    @property
    def kinds(self) -> list[str]:
        return [event.type for event in self.events]

    def loud(self) -> float:
        """Seconds of its loudspeaker that are not silent."""
        return loud(np.concatenate([np.zeros(RATE // 50, dtype=np.float32), *self.heard]), RATE)

    async def said(self, seconds: float) -> None:
        """Speak, and come back when all of it has been sent."""
        done = asyncio.Event()
        self.microphone.play(speech_pcm(seconds))
        self.microphone.when_played(done.set)
        await done.wait()


def loud(samples: np.ndarray, rate: int) -> float:
    """Seconds that are not silent."""
    step = rate // 50
    frames = samples[: len(samples) // step * step].reshape(-1, step)
    return float((np.sqrt((frames**2).mean(1)) > 0.02).sum() * 0.02)


class Listening(FakeBackend):
    """Keeps what it was given to hear, 16 kHz."""

    def __init__(self, script: Callable[[Turn], Any] | None = None) -> None:
        super().__init__(script)
        self.heard: list[np.ndarray] = []

    async def hear(self, samples: np.ndarray) -> Heard:
        self.heard.append(samples)
        return await super().hear(samples)


@contextlib.asynccontextmanager
async def calling(running: Running, candidates: bool = True, key: str = "any", **session: Any) -> AsyncIterator[Caller]:
    caller = Caller()
    async with running.openai(key) as client:
        answer = await client.realtime.calls.create(sdp=await caller.offer(candidates), session={"type": "realtime", **session})  # type: ignore[typeddict-item]
        await caller.answered(answer.text)
    try:
        await caller.until("session.created")
        yield caller
    finally:
        await caller.peer.close()


def until(true: Callable[[], Any], what: str) -> Awaitable[None]:
    async def wait() -> None:
        for _ in range(5000):
            if true():
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"{what} did not happen")

    return wait()


@live
async def test_a_caller_speaks_is_answered_in_sound_and_interrupts() -> None:
    answers = [[Text("Yes"), tone(0.6)], [Text("Well"), *[tone(1.0) for _ in range(20)]]]

    def script(turn: Turn) -> list[Any]:
        return answers.pop(0) if answers else [Text("I see.")]  # what interrupts is a turn too; its answer has no sound

    backend = Listening(script)
    async with (
        serving(backend, limits=SessionLimits()) as running,
        calling(running, instructions="be kind") as caller,
    ):
        assert caller.events[0].session.instructions == "be kind"
        caller.microphone.play(speech_pcm(0.9))
        first = await caller.until("output_audio_buffer.stopped")
        kinds = caller.kinds
        order = (
            "input_audio_buffer.speech_started",
            "input_audio_buffer.committed",
            "response.created",
            "output_audio_buffer.started",
        )
        assert [kinds.index(kind) for kind in order] == sorted(kinds.index(kind) for kind in order)
        assert "response.output_audio.delta" not in kinds, "sound goes to the track"
        done = await caller.until("response.done")
        assert done.response.status == "completed" and first.response_id == done.response.id
        await asyncio.sleep(0.5)  # what is on its way
        assert 0.5 < caller.loud() < 0.75, "the tone of 0.6 s"
        assert 0.8 < loud(backend.heard[0], 16_000) < 1.05, "the speech of 0.9 s"

        seen = len(caller.events)
        caller.microphone.play(speech_pcm(0.9))
        await caller.until("output_audio_buffer.started", seen)
        caller.microphone.play(speech_pcm(0.9))
        cleared = await caller.until("output_audio_buffer.cleared", seen)
        done = await caller.until("response.done", seen)
        assert done.response.status == "cancelled" and cleared.response_id == done.response.id
        await asyncio.sleep(0.5)  # what is on its way
        before = caller.loud()
        await asyncio.sleep(1.5)
        assert caller.loud() == before, "nothing of twenty seconds sounds on"
        await until(lambda: caller.kinds.count("response.done") == 3, "the answer to what interrupted")


@live
async def test_two_answers_in_a_row_are_both_played_to_their_end() -> None:
    async with serving(FakeBackend(lambda turn: [Text("Yes"), tone(1.0)])) as running, calling(running) as caller:
        seen = 0
        for text in ("one", "two"):
            caller.send("conversation.item.create", item=item(text))
            caller.send("response.create")
            await caller.until("response.done", seen)  # long before its sound has been played
            seen = len(caller.events)
        await until(lambda: caller.kinds.count("output_audio_buffer.stopped") == 2, "the end of both")
        told = [(e.type, e.response_id) for e in caller.events if e.type.startswith("output_audio_buffer.")]
        first, second = [e.response.id for e in caller.events if e.type == "response.done"]
        expected = [(f"output_audio_buffer.{kind}", response) for response in (first, second) for kind in ("started", "stopped")]
        assert told == expected
        await asyncio.sleep(0.5)  # what is on its way
        assert 1.8 < caller.loud() < 2.3, "two tones of 1 s"


def item(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


@pytest.mark.parametrize("way", ["update", "form", "secret"])
@live
async def test_push_to_talk_with_formats_that_have_no_meaning_here_and_a_client_that_clears(way: str) -> None:
    sent = {"input": {"turn_detection": None, "format": {"type": "audio/pcmu"}}, "output": {"format": {"type": "audio/pcmu"}}}
    backend = Listening(lambda turn: [tone(1.0) for _ in range(20)])
    async with contextlib.AsyncExitStack() as stack:
        running = await stack.enter_async_context(serving(backend, api_key="any"))
        key = "any"
        if way == "secret":
            async with httpx.AsyncClient(headers={"Authorization": "Bearer any"}) as client:
                given = {"session": {"type": "realtime", "audio": sent}}
                key = (await client.post(f"{running.http}/v1/realtime/client_secrets", json=given)).json()["value"]
        first = {"audio": sent} if way == "form" else {}
        caller = await stack.enter_async_context(calling(running, way != "update", key, **first))
        if way == "update":
            caller.send("session.update", session={"type": "realtime", "audio": sent})
        event = await caller.until("session.updated" if way == "update" else "session.created")
        assert event.session.audio.output.format.type == event.session.audio.input.format.type == "audio/pcm"
        assert event.session.audio.input.turn_detection is None
        await caller.said(0.5)
        await asyncio.sleep(0.3)
        caller.send("input_audio_buffer.commit")
        caller.send("response.create")
        await caller.until("output_audio_buffer.started")
        assert 0.4 < loud(backend.heard[0], 16_000) < 0.7 and abs(backend.heard[0]).max() < 0.8, "the tone of 0.5 s, and no noise"
        await until(lambda: caller.loud() > 0.2, "sound")
        done = await caller.until("response.done")
        caller.send("output_audio_buffer.clear")
        cleared = await caller.until("output_audio_buffer.cleared")
        assert done.response.status == "completed", "all had been made; it was not played"
        assert cleared.response_id == done.response.id
        await asyncio.sleep(0.3)
        assert caller.loud() < 10 and caller.kinds.count("output_audio_buffer.cleared") == 1
        samples = np.concatenate(caller.heard)
        assert abs(samples).max() < 0.5, "a tone of a third, not noise"


@live
async def test_a_call_ends_when_either_side_hangs_up_or_the_server_stops() -> None:
    async with serving(FakeBackend(), sessions=1) as running, httpx.AsyncClient() as client:
        caller = Caller()
        sdp = {"Content-Type": "application/sdp"}
        made = await client.post(f"{running.http}/v1/realtime/calls?model=x", content=await caller.offer(), headers=sdp)
        assert made.status_code == 201 and made.headers["content-type"] == "application/sdp"
        await caller.answered(made.text)
        await caller.until("session.created")
        other = Caller()
        refused = await client.post(f"{running.http}/v1/realtime/calls", content=await other.offer(), headers=sdp)
        assert refused.status_code == 503 and "full" in refused.json()["error"]["message"]
        await other.peer.close()
        assert (await client.post(running.http + made.headers["location"] + "/hangup")).status_code == 200
        await until(lambda: not running.server.connections, "the end of the call")
        await until(lambda: caller.peer.connectionState == "closed", "the end at the caller's side")
        async with calling(running) as second:
            await second.peer.close()
            await until(lambda: not running.server.connections, "the end of the second call")
        assert (await client.post(running.http + made.headers["location"] + "/hangup")).status_code == 404


@live
async def test_calls_that_come_at_the_same_moment_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    close = CallSocket.close

    async def noted(self: CallSocket, *args: Any) -> None:
        closed.append(self.id)
        await close(self, *args)

    monkeypatch.setattr(CallSocket, "close", noted)
    async with serving(FakeBackend(), sessions=1) as running, httpx.AsyncClient() as client:
        callers = [Caller() for _ in range(4)]
        offers = [await caller.offer() for caller in callers]
        sdp = {"Content-Type": "application/sdp"}
        url = f"{running.http}/v1/realtime/calls"
        found = await asyncio.gather(*(client.post(url, content=offer, headers=sdp) for offer in offers))
        assert sorted(answer.status_code for answer in found) == [201, 503, 503, 503]
        assert len(running.server.connections) == 1 and len(closed) == 3, "the peers of those that were refused are closed"
        taken = next(answer for answer in found if answer.status_code == 201)
        await client.post(running.http + taken.headers["location"] + "/hangup")
        await until(lambda: not running.server.connections and len(set(closed)) == 4, "the end of the call")

        async def broken(self: CallSocket, offer: str) -> str:
            raise RuntimeError("a fault of ours")

        monkeypatch.setattr(CallSocket, "answer", broken)
        assert (await client.post(url, content=offers[0], headers=sdp)).status_code == 500
        assert len(set(closed)) == 5 and not running.server.connections
        for caller in callers:
            await caller.peer.close()


@live
async def test_replicas_say_that_calls_are_for_a_single_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from osum_echat.serving import ray_serve

    built: list[Any] = []
    ray, serve = ModuleType("ray"), ModuleType("ray.serve")
    serve.ingress = lambda application: built.append(application) or (lambda cls: cls)  # type: ignore[attr-defined,func-returns-value]
    serve.deployment = lambda *args, **options: SimpleNamespace(bind=lambda: None)  # type: ignore[attr-defined]
    ray.serve = serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    async with serving(FakeBackend()) as running:
        ray_serve.build(lambda: running.server, 2, {}, 8, 1.0)
        transport = httpx.ASGITransport(built[0]())
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for path in ("/v1/realtime/calls", "/v1/realtime/calls/rtc_x/hangup"):
                found = await client.post(path, content="v=0")
                assert found.status_code == 501 and "single server" in found.json()["error"]["message"]
        single = httpx.ASGITransport(build_app(running.server))
        async with httpx.AsyncClient(transport=single, base_url="http://localhost") as client:
            assert (await client.post("/v1/realtime/calls/rtc_x/hangup")).status_code == 404


@live
async def test_a_call_is_idle_when_nobody_speaks_or_writes() -> None:
    limits = SessionLimits(idle_seconds=1.0)
    async with serving(FakeBackend(), limits) as running, calling(running) as caller:
        goodbye = "nothing was received for 1 s"
        await until(lambda: caller.events[-1].type == "error", "the end of a silent call")
        assert goodbye in caller.events[-1].error.message
        await until(lambda: not running.server.connections, "the end of a silent call")


class Track:
    """A microphone's track that gives what it is told to, and fails where it is told to."""

    kind = "audio"

    def __init__(self) -> None:
        self.frames: asyncio.Queue[AudioFrame | Exception] = asyncio.Queue()

    async def recv(self) -> AudioFrame:
        frame = await self.frames.get()
        if isinstance(frame, Exception):
            raise frame
        return frame

    async def say(self, seconds: float, rate: int = 48_000, layout: str = "stereo") -> None:
        """Frames of 20 ms, all of them read."""
        for _ in range(round(seconds * 50)):
            frame = AudioFrame(format="s16", layout=layout, samples=rate // 50)
            frame.planes[0].update(bytes(frame.planes[0].buffer_size))
            frame.sample_rate = rate
            self.frames.put_nowait(frame)
        while not self.frames.empty():
            await asyncio.sleep(0)
        for _ in range(3):
            await asyncio.sleep(0)


class Channel:
    """A data channel as aiortc has it."""

    bufferedAmount = 0

    def __init__(self) -> None:
        self.listeners: dict[str, Callable[..., Any]] = {}
        self.sent: list[str] = []

    def on(self, name: str, listener: Callable[..., Any]) -> None:
        self.listeners[name] = listener

    def send(self, text: str) -> None:
        self.sent.append(text)


@contextlib.asynccontextmanager
async def ends() -> AsyncIterator[tuple[CallSocket, Track, Channel]]:
    """A call's socket, and what aiortc would give it."""
    call, track, channel = CallSocket(), Track(), Channel()
    call._on_track(track)
    call._on_channel(channel)
    try:
        yield call, track, channel
    finally:
        await call.close()


async def came(call: CallSocket, count: int) -> list[str | float]:
    """So many messages: texts, and seconds of sound, one after the other put together."""
    found: list[str | float] = []
    for _ in range(count):
        message = await asyncio.wait_for(call.receive(), 10)
        assert message["type"] == "websocket.receive", message
        event = json.loads(message["text"])
        if not message.get("sound"):
            found.append(event)
            continue
        seconds = len(base64.b64decode(event["audio"])) / 2 / RATE
        assert seconds <= 0.5
        if found and isinstance(found[-1], float):
            seconds += found.pop()  # type: ignore[operator]
        found.append(round(seconds, 2))
    return found


@live
async def test_sound_and_events_are_given_in_the_order_in_which_they_came() -> None:
    async with ends() as (call, track, channel):
        await track.say(1.2)
        channel.listeners["message"]('"commit"')
        channel.listeners["message"](b'"create"')
        await track.say(0.3)
        channel.listeners["message"]('"cancel"')
        assert await came(call, 7) == [1.2, "commit", "create", 0.3, "cancel"]
        await track.say(40)
        channel.listeners["message"]('"commit"')
        assert await came(call, 61) == [30.0, "commit"], "what is long past is not heard"


@pytest.mark.parametrize("messages", [["x"] * 5000, ["x" * 2**20] * 40])
@live
async def test_a_client_that_sends_faster_than_is_read_is_hung_up_on(messages: list[str]) -> None:
    async with ends() as (call, _, channel):
        for text in messages[:10]:
            channel.listeners["message"](text)
        for _ in range(10):
            assert (await call.receive())["type"] == "websocket.receive"
        for text in messages:
            channel.listeners["message"](text)
        assert (await call.receive())["type"] == "websocket.disconnect"


@live
async def test_what_a_client_does_not_take_waits_where_it_is_counted() -> None:
    async with ends() as (call, _, channel):
        call._has_channel = True
        await call.send_text("one")
        channel.bufferedAmount = 2**30
        waiting = asyncio.create_task(call.send_text("two"))
        await asyncio.sleep(0.1)
        assert channel.sent == ["one"]
        channel.bufferedAmount = 0
        await waiting
        assert channel.sent == ["one", "two"]


@live
async def test_a_microphone_that_changes_is_heard_on() -> None:
    async with ends() as (call, track, channel):
        for rate, layout in ((48_000, "stereo"), (16_000, "stereo"), (16_000, "mono"), (8_000, "mono")):
            await track.say(0.4, rate, layout)
        channel.listeners["message"]('"commit"')
        heard, commit = await came(call, 5)
        assert isinstance(heard, float) and 1.5 < heard <= 1.6 and commit == "commit"


@live
async def test_a_call_that_cannot_be_heard_ends_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    async with ends() as (call, track, _):
        track.frames.put_nowait(ValueError("Frame does not match AudioResampler setup"))
        with caplog.at_level(logging.ERROR, webrtc.__name__):
            message = await asyncio.wait_for(call.receive(), 10)
        assert message["type"] == "websocket.disconnect" and "does not match" in caplog.text


class Inner:
    """A session machine of which only what it emits is looked at."""

    session: dict[str, Any] = {"audio": {"input": {"turn_detection": {"type": "server_vad"}}}}  # noqa: RUF012

    def __init__(self) -> None:
        self.told: list[str] = []
        self.speaker = Loudspeaker()
        self.speech = 0
        self.call = CallSession(self._take, self._make, self.speaker, self._speaks)  # type: ignore[arg-type]

    def _take(self, text: str) -> None:
        event = json.loads(text)
        self.told.append(f"{event['type'].split('.')[-1]} {event.get('response_id', '')}".strip())

    def _make(self, emit: Callable[[str], None]) -> Inner:
        self.emit = emit
        return self

    def _speaks(self) -> None:
        self.speech += 1

    def says(self, response: str, seconds: float = 0.1) -> None:
        pcm = base64.b64encode(speech_pcm(seconds)).decode()
        self.emit(json.dumps({"type": "response.output_audio.delta", "response_id": response, "delta": pcm}))

    def ends(self, response: str, status: str = "completed") -> None:
        self.emit(json.dumps({"type": "response.done", "response": {"id": response, "status": status}}))

    def plays(self, frames: int) -> int:
        """Frames of 20 ms; how many of them are not silent."""
        return sum(any(self.speaker._next()) for _ in range(frames))


@live
async def test_nothing_waits_for_a_caller_that_only_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    speakers: list[Loudspeaker] = []

    class Kept(Loudspeaker):
        def __init__(self) -> None:
            super().__init__()
            speakers.append(self)

    async with serving(FakeBackend(lambda turn: [Text("Well"), tone(3.0)])) as running, running.openai("any") as client:
        caller = Caller()
        caller.peer.getTransceivers()[0].direction = "sendonly"
        monkeypatch.setattr(webrtc, "Loudspeaker", Kept)
        answer = await client.realtime.calls.create(sdp=await caller.offer(), session={"type": "realtime"})
        await caller.answered(answer.text)
        await caller.until("session.created")
        for text in ("one", "two"):
            seen = len(caller.events)
            caller.send("conversation.item.create", item=item(text))
            caller.send("response.create")
            await caller.until("output_audio_buffer.stopped", seen)
            assert not speakers[0]._queue
        told = [event.type for event in caller.events if event.type.startswith(("output_audio_buffer.", "response.done"))]
        assert told == ["output_audio_buffer.started", "response.done", "output_audio_buffer.stopped"] * 2
        await caller.peer.close()


def test_an_answer_begins_behind_the_one_before_it() -> None:
    inner = Inner()
    for response in ("a", "b"):
        inner.says(response)
        inner.says(response)
        inner.ends(response)
    assert inner.told == ["done", "done"] and inner.plays(30) == 20
    assert inner.told[2:] == ["started a", "stopped a", "started b", "stopped b"]


@pytest.mark.parametrize("played", [5, 15])
def test_who_interrupts_ends_all_that_waits(played: int) -> None:
    inner = Inner()
    for response in ("a", "b"):
        inner.says(response, 0.2)
    assert inner.plays(played) == played
    inner.emit(json.dumps({"type": "input_audio_buffer.speech_started"}))
    inner.ends("b", "cancelled")
    assert inner.plays(30) == 0 and inner.speech == 1
    started = ["started a"] if played == 5 else ["started a", "started b"]
    assert inner.told == [*started, "speech_started", f"cleared {'a' if played == 5 else 'b'}", "done"]
    inner.emit(json.dumps({"type": "input_audio_buffer.speech_stopped"}))
    assert inner.speech == 2


@pytest.mark.parametrize("played", [5, 15])
def test_an_answer_that_is_cancelled_takes_nothing_of_the_one_before_it(played: int) -> None:
    inner = Inner()
    inner.says("a", 0.2)
    inner.ends("a")
    inner.says("b", 0.2)
    assert inner.plays(played) == played
    inner.ends("b", "cancelled")
    if played == 5:
        assert inner.plays(30) == 5 and inner.told == ["done", "started a", "done", "stopped a"]
    else:
        assert inner.plays(30) == 0 and inner.told == ["done", "started a", "stopped a", "started b", "done", "cleared b"]


@live
async def test_sound_of_a_track_is_no_sign_of_a_client_but_speech_is() -> None:
    class Socket:
        closed: tuple[Any, ...] | None = None

        async def send_text(self, data: str) -> None: ...

        async def receive(self) -> dict[str, Any]:
            await asyncio.sleep(0.02)
            return {"type": "websocket.receive", "text": "{}", "sound": True}

        async def close(self, *why: Any) -> None:
            self.closed = why

    class Machine:
        busy = False

        def begin(self) -> None: ...

        async def handle(self, text: str, arrived: float | None = None) -> None: ...

        async def close(self) -> None: ...

    socket = Socket()
    connection = Connection(socket, lambda _: Machine(), SessionLimits(idle_seconds=1.0))
    task = asyncio.create_task(connection.serve())
    for _ in range(10):
        await asyncio.sleep(0.15)
        connection.seen()
    assert not task.done()
    await asyncio.wait_for(task, 60)
    assert socket.closed is not None and "nothing was received" in socket.closed[1]


@live
async def test_what_is_no_offer_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(FakeBackend(), api_key="secret") as running, httpx.AsyncClient() as client:
        url, key = f"{running.http}/v1/realtime/calls", {"Authorization": "Bearer secret"}
        assert (await client.post(url, content="v=0")).status_code == 401
        for body in ("", "hello", "v=0\r\n" + "a=x\r\n" * 20_000, "v=0\r\nm=audio nonsense"):
            found = await client.post(url, content=body, headers=key)
            assert found.status_code == 400 and " " in found.json()["error"]["message"]
        found = await client.post(url, files={"sdp": (None, "v=0"), "session": (None, "{")}, headers=key)
        assert found.status_code == 400 and "JSON" in found.json()["error"]["message"]
        assert not running.server.connections
        monkeypatch.setitem(sys.modules, "aiortc", None)
        monkeypatch.delitem(sys.modules, "osum_echat.serving.realtime.webrtc")
        found = await client.post(url, content="v=0", headers=key)
        assert found.status_code == 501 and "osum-echat[webrtc]" in found.json()["error"]["message"]


def test_formats_are_left_out_and_all_else_stays() -> None:
    given = {"type": "session.update", "session": {"audio": {"input": {"format": {"type": "audio/pcmu"}, "x": 1}}, "format": 2}}
    assert json.loads(event_without_formats(json.dumps(given))) == {
        "type": "session.update",
        "session": {"audio": {"input": {"x": 1}}, "format": 2},
    }
    for text in ('{"format"', '["format"]', '{"session": "format"}', '{"session": {"audio": ["format"]}}', "{}"):
        assert (
            json.loads(event_without_formats(text)) == json.loads(text)
            if text != '{"format"'
            else event_without_formats(text) == text
        )


def test_the_extra_installs_what_is_tested() -> None:
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    found = re.findall(r'"(aiortc[^"]*)"', text)
    assert len(found) == 2 and len(set(found)) == 1, "the extra and the environment of developers name one floor and one marker"
