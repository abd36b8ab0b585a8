"""Calls over WebRTC on loopback: an offer by the openai client, sound in tracks, events in the data channel. The network and both ends are real."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import numpy as np
import pytest

from osum_echat.serving.backend import Text, Turn
from osum_echat.serving.realtime.audio import from_pcm16
from osum_echat.serving.realtime.events import server_event_adapter
from osum_echat.serving.realtime.settings import SessionLimits
from tests.live_case import FakeBackend, live, speech_pcm, tone
from tests.test_live_server import Running, _no_uname, serving  # noqa: F401  the fixture is used by being here

pytest.importorskip("aiortc", reason="aiortc is missing: pip install 'osum-echat[webrtc]' (Python 3.11 or newer)")
import aioice.ice
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError
from av import AudioResampler

from osum_echat.serving.realtime.webrtc import Loudspeaker, without_formats

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
        samples = np.concatenate([np.zeros(RATE // 50, dtype=np.float32), *self.heard])
        frames = samples[: len(samples) // 480 * 480].reshape(-1, 480)
        return float((np.sqrt((frames**2).mean(1)) > 0.02).sum() * 0.02)


@contextlib.asynccontextmanager
async def calling(running: Running, candidates: bool = True, **session: Any) -> AsyncIterator[Caller]:
    caller = Caller()
    async with running.openai() as client:
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

    async with (
        serving(FakeBackend(script), limits=SessionLimits()) as running,
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
        assert 0.4 < caller.loud() < 0.9, "the tone of 0.6 s"

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
async def test_push_to_talk_with_formats_that_have_no_meaning_here_and_a_client_that_clears() -> None:
    sent = {"input": {"turn_detection": None, "format": {"type": "audio/pcmu"}}, "output": {"format": {"type": "audio/pcmu"}}}
    async with serving(FakeBackend(lambda turn: [tone(1.0) for _ in range(20)])) as running, calling(running, False) as caller:
        caller.send("session.update", session={"type": "realtime", "audio": sent})
        updated = await caller.until("session.updated")
        assert updated.session.audio.output.format.type == "audio/pcm"
        caller.microphone.play(speech_pcm(0.5))
        await asyncio.sleep(0.8)
        caller.send("input_audio_buffer.commit")
        caller.send("response.create")
        await caller.until("output_audio_buffer.started")
        await until(lambda: caller.loud() > 0.2, "sound")
        done = await caller.until("response.done")
        caller.send("output_audio_buffer.clear")
        cleared = await caller.until("output_audio_buffer.cleared")
        assert done.response.status == "completed", "all had been made; it was not played"
        assert cleared.response_id == done.response.id
        await asyncio.sleep(0.3)
        assert caller.loud() < 10 and caller.kinds.count("output_audio_buffer.cleared") == 1


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
    assert json.loads(without_formats(json.dumps(given))) == {
        "type": "session.update",
        "session": {"audio": {"input": {"x": 1}}, "format": 2},
    }
    for text in ('{"format"', '["format"]', '{"session": "format"}', '{"session": {"audio": ["format"]}}', "{}"):
        assert json.loads(without_formats(text)) == json.loads(text) if text != '{"format"' else without_formats(text) == text
