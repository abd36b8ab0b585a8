"""The second dialect: a turn in GPT-Live, every frame accepted by the openai package."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import numpy as np
import pytest
from openai.types.live import ServerEvent
from pydantic import TypeAdapter
from websockets.asyncio.client import connect

from osum_echat.audio import g711
from tests.live_case import FakeBackend, live, spoken
from tests.test_live_server import _no_uname, serving  # noqa: F401  the fixture is used by being here

CHECK: TypeAdapter[Any] = TypeAdapter(ServerEvent)
START = {"type": "session.start", "event_id": "s1", "session": {"model": "gpt-live-1", "instructions": "be kind"}}


class Talk:
    """A connection whose frames are checked as they come."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.seen = socket, list[dict[str, Any]]()

    async def send(self, *events: dict[str, Any]) -> None:
        for event in events:
            await self.socket.send(json.dumps(event))

    async def until(self, kind: str) -> dict[str, Any]:
        while True:
            event = json.loads(await asyncio.wait_for(self.socket.recv(), 60))
            CHECK.validate_python(event)
            self.seen.append(event)
            if event["type"] == kind:
                return event


def sound() -> list[dict[str, Any]]:
    return [{"type": "session.input_audio.append", "audio": message["audio"]} for message in spoken(1.0, 1.5)]


@pytest.mark.parametrize("path", ["/v1/live/sessions", "/live/sessions"])
@live
async def test_a_turn(path: str) -> None:
    backend = FakeBackend()
    async with serving(backend) as running, connect(running.ws + path) as socket:
        talk = Talk(socket)
        history = [
            {"role": "user", "content": [{"text": "hi"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "hello"}]},
        ]
        await talk.send({**START, "session": {**START["session"], "input": history}})  # type: ignore[dict-item]
        started = await talk.until("session.started")
        assert started["client_event_id"] == "s1" and started["session"]["model"] == "gpt-live-1"
        await talk.send(*sound())
        heard = await talk.until("session.input_transcript.delta")
        assert heard["delta"] == "hello" and heard["end_ms"] > 1000
        await talk.until("session.output_audio.delta")
        await talk.until("session.usage.updated")
        said = "".join(e["delta"] for e in talk.seen if e["type"] == "session.output_transcript.delta")
        assert said == "Hello there, friend."
        assert [e.reply_text for e in backend.turns[0].past] == ["hello"]
        await talk.send({"type": "session.close", "event_id": "c1"})
        assert (await talk.until("session.closed"))["reason"] == "close_requested"


@pytest.mark.parametrize("kind", ["audio/pcmu", "audio/pcma"])
@live
async def test_what_is_muted_is_silence_in_telephone_formats_too(kind: str) -> None:
    backend = FakeBackend()
    async with serving(backend) as running, connect(f"{running.ws}/v1/live/sessions") as socket:
        talk = Talk(socket)
        form = {"format": {"type": kind, "rate": 8000}}
        await talk.send({**START, "session": {**START["session"], "audio": form}})  # type: ignore[dict-item]
        await talk.until("session.started")
        [session] = [connection.machine._inner for connection in running.server.connections]  # type: ignore[attr-defined]
        taken: list[np.ndarray] = []
        push = session.turns.push
        session.turns.push = lambda samples: taken.append(samples) or push(samples)
        voice = base64.b64encode(g711.encode(np.sin(np.arange(8000) / 9).astype(np.float32), "mu")).decode()
        muted = {"type": "session.input_audio.append", "audio": voice}
        await talk.send({"type": "session.input_audio.mute"}, muted, {"type": "session.input_audio.unmute"})
        await talk.until("session.input_audio.unmuted")
        heard = np.concatenate(taken)
        assert abs(heard).max() < 0.001, "silence"
        assert len(heard) > 14_000, f"time goes on, but for what the resampler holds back: {len(heard)}"


@live
async def test_mute_commentary_and_sixteen_kilohertz() -> None:
    backend = FakeBackend()
    async with serving(backend) as running, connect(f"{running.ws}/v1/live/sessions") as socket:
        talk = Talk(socket)
        form = {"format": {"type": "audio/pcm", "rate": 16000}}
        await talk.send({**START, "session": {**START["session"], "audio": form}})  # type: ignore[dict-item]
        await talk.until("session.started")
        await talk.send({"type": "session.input_audio.mute"}, *sound(), {"type": "session.input_audio.unmute"})
        await talk.until("session.input_audio.unmuted")
        assert not backend.turns, "what is muted is not heard"
        await talk.send({"type": "session.commentary.append", "content": "Say hello."})
        await talk.until("session.commentary.appended")
        await talk.until("session.usage.updated")
        assert backend.turns[0].text == "Say hello."
        seconds = sum(len(e["delta"]) * 3 / 4 for e in talk.seen if e["type"] == "session.output_audio.delta") / 2 / 16000
        assert seconds == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("event", "code"),
    [
        ({"type": "session.input_audio.append", "audio": "AAAA"}, "session_not_started"),
        ({"type": "session.start", "session": {}}, "missing_required_parameter"),
        ({"type": "no.such"}, "unknown_event"),
        ({"type": "session.output_audio.fixture.play", "audio": "AAAA"}, "session_not_started"),
    ],
)
@live
async def test_errors_name_their_event(event: dict[str, Any], code: str) -> None:
    async with serving() as running, connect(f"{running.ws}/v1/live/sessions") as socket:
        talk = Talk(socket)
        await talk.send({**event, "event_id": "e9"})
        error = (await talk.until("error"))["error"]
        assert error["code"] == code and error["client_event_id"] == "e9"
        await talk.send(START)
        await talk.until("session.started")
        await talk.send({"type": "session.output_audio.fixture.play", "audio": "AAAA"})
        assert (await talk.until("error"))["error"]["code"] == "unsupported_event"
