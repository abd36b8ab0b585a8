"""A session over WebRTC: sound in two tracks, events in the data channel ``oai-events``, for clients that send their offer to ``/v1/realtime/calls``.

Needs aiortc (``pip install 'osum-echat[webrtc]'``). The session machine is the one of WebSockets: `CallSocket` stands where the WebSocket stands, and
`CallSession` is a translation around the machine, whose sound goes to the track and not into events. What WebRTC's own events say (``output_audio_buffer.*``)
follows from what the track has played. Codecs are agreed upon in the offer, so the audio formats of a session have no meaning here and are left out.

No STUN or TURN server is asked: client and server reach each other directly, by UDP on any address of this machine.
"""

from __future__ import annotations

import asyncio
import base64
import fractions
import json
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError, MediaStreamTrack
from av import AudioFrame, AudioResampler
from fastapi import WebSocketDisconnect

from osum_echat.serving.realtime.conversation import new_id
from osum_echat.serving.realtime.events import build
from osum_echat.serving.realtime.session import RealtimeSession

log = logging.getLogger(__name__)
RATE = 24_000
FRAME_S = 0.02
_FRAME = int(RATE * FRAME_S) * 2  # bytes
CONNECT_S = 30.0
"""A call that is not connected after so long is given up."""
_HEARD_AT_ONCE_S = 0.5
"""Sound in one message to the machine at most."""


class Loudspeaker(MediaStreamTrack):
    """The track that the client plays: what `play` was given, in real time, and silence."""

    kind = "audio"

    def __init__(self) -> None:
        super().__init__()
        self._queue: deque[bytes | Callable[[], None]] = deque()
        self._began: float | None = None
        self._frames = 0

    def play(self, pcm: bytes) -> None:
        """16 bit, 24 kHz."""
        self._queue.append(pcm)

    def when_played(self, then: Callable[[], None]) -> None:
        """Call it when what waits now has been played."""
        self._queue.append(then)

    def clear(self) -> bool:
        """Play nothing of what waits; whether anything did."""
        waited = bool(self._queue)
        self._queue.clear()
        return waited

    async def recv(self) -> AudioFrame:
        """The next 20 ms, when they are due."""
        if self.readyState != "live":
            raise MediaStreamError
        if self._began is None:
            self._began = time.monotonic()
        late = time.monotonic() - self._began - self._frames * FRAME_S
        if late > 1.0:  # the machine stood still: what was missed is not made up for
            self._began += late
        elif late < 0:
            await asyncio.sleep(-late)
        frame = AudioFrame(format="s16", layout="mono", samples=_FRAME // 2)
        frame.planes[0].update(self._next())
        frame.pts, frame.sample_rate = self._frames * _FRAME // 2, RATE
        frame.time_base = fractions.Fraction(1, RATE)
        self._frames += 1
        return frame

    def _next(self) -> bytes:
        data = bytearray()
        while self._queue and len(data) < _FRAME:
            first = self._queue.popleft()
            if callable(first):
                first()
                continue
            need = _FRAME - len(data)
            data += first[:need]
            if len(first) > need:
                self._queue.appendleft(first[need:])
        return bytes(data).ljust(_FRAME, b"\0")


class CallSession:
    """One caller's session machine. ``make`` builds the inner one for what it emits."""

    def __init__(
        self, emit: Callable[[str], None], make: Callable[[Callable[[str], None]], RealtimeSession], speaker: Loudspeaker
    ) -> None:
        self._emit, self._speaker = emit, speaker
        self._playing: str | None = None  # the response whose sound waits or is being played
        self._inner = make(self._from_inner)

    def begin(self) -> None:
        self._inner.begin()

    @property
    def busy(self) -> bool:
        return self._inner.busy

    async def close(self) -> None:
        self._speaker.clear()
        await self._inner.close()

    async def handle(self, text: str, arrived: float | None = None) -> None:
        inner = self._inner
        if _is_sound(text) and inner.turns.rules.mode == "none":
            inner.turns.keep_last(
                inner.max_turn_s - _HEARD_AT_ONCE_S
            )  # the track never stops: what is too old for a turn is forgotten
        await inner.handle(without_formats(text), arrived)

    def _from_inner(self, text: str) -> None:
        event = json.loads(text)
        kind = event["type"]
        if kind == "response.output_audio.delta":
            self._play(event)
            return
        if kind == "input_audio_buffer.speech_started" and self._interrupts():
            self._emit(text)
            self._hush()
            return
        if kind == "output_audio_buffer.cleared":  # the client has asked for it; what was playing has been told of
            self._hush()
            return
        self._emit(text)
        if kind == "response.done" and event["response"]["id"] == self._playing:
            if event["response"]["status"] == "cancelled":
                self._hush()
            else:
                self._speaker.when_played(lambda: self._ended("output_audio_buffer.stopped"))

    def _interrupts(self) -> bool:
        detection = self._inner.session["audio"]["input"].get("turn_detection") or {}
        return detection.get("interrupt_response") is not False

    def _play(self, event: dict[str, Any]) -> None:
        if self._playing != event["response_id"]:
            self._hush()
            self._playing = event["response_id"]
            self._emit(build("output_audio_buffer.started", response_id=self._playing))
        self._speaker.play(base64.b64decode(event["delta"]))

    def _hush(self) -> None:
        self._speaker.clear()
        self._ended("output_audio_buffer.cleared")

    def _ended(self, kind: str) -> None:
        if self._playing is not None:
            response, self._playing = self._playing, None
            self._emit(build(kind, response_id=response))


_SOUND = '{"type": "input_audio_buffer.append", "audio": "'


def _is_sound(text: str) -> bool:
    return text.startswith(_SOUND)


def without_formats(text: str) -> str:
    """A client's event without the audio formats that it names."""
    if "format" not in text or _is_sound(text):
        return text
    try:
        event = json.loads(text)
    except (ValueError, RecursionError):
        return text  # the machine says what is wrong with it
    if not isinstance(event, dict):
        return text
    for name in ("session", "response"):
        audio = event[name].get("audio") if isinstance(event.get(name), dict) else None
        for side in ("input", "output"):
            if isinstance(audio, dict) and isinstance(audio.get(side), dict):
                audio[side].pop("format", None)
    return json.dumps(event)


class CallSocket:
    """What a `socket.Connection` needs of a WebSocket, on a peer connection."""

    def __init__(self) -> None:
        self.id = new_id("rtc")
        self.speaker = Loudspeaker()
        self._peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._channel: Any = None
        self._open = asyncio.Event()
        self._texts: deque[str] = deque()
        self._sound = bytearray()
        self._came = asyncio.Event()
        self._gone = self._has_channel = False
        self._hearing: asyncio.Task[None] | None = None
        self._clock: asyncio.Task[None] | None = None
        self._peer.on("track", self._on_track)
        self._peer.on("datachannel", self._on_channel)
        self._peer.on("connectionstatechange", self._on_state)

    async def answer(self, offer: str) -> str:
        """The answer to an offer, both SDP. Raises ValueError for an offer that cannot be used."""
        try:
            await self._peer.setRemoteDescription(RTCSessionDescription(offer, "offer"))
            if not any(t.kind == "audio" for t in self._peer.getTransceivers()):
                raise ValueError("the offer has no audio")
            self._has_channel = "m=application" in offer
            self._peer.addTrack(self.speaker)
            await self._peer.setLocalDescription(await self._peer.createAnswer())
        except Exception as error:  # aiortc raises what its parser meets
            raise ValueError(f"the SDP offer cannot be used: {error}") from error
        self._clock = asyncio.create_task(self._connected_in_time())
        return str(self._peer.localDescription.sdp)

    # ---- as a WebSocket ---------------------------------------------------------------------------------------------------------------

    async def send_text(self, data: str) -> None:
        if not self._has_channel:
            return
        await self._open.wait()
        if self._gone:
            raise WebSocketDisconnect(1006)
        self._channel.send(data)

    async def receive(self) -> dict[str, Any]:
        while not self._gone:
            if self._texts:
                return {"type": "websocket.receive", "text": self._texts.popleft()}
            if self._sound:
                size = int(_HEARD_AT_ONCE_S * RATE) * 2
                piece = bytes(self._sound[:size])
                del self._sound[:size]
                return {"type": "websocket.receive", "text": f'{_SOUND}{base64.b64encode(piece).decode()}"}}'}
            self._came.clear()
            await self._came.wait()
        return {"type": "websocket.disconnect"}

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        log.debug("call %s ends: %d %s", self.id, code, reason)
        self.hang_up()
        for task in (self._hearing, self._clock):
            if task is not None:
                task.cancel()
        await self._peer.close()

    # ---- inside -----------------------------------------------------------------------------------------------------------------------

    def hang_up(self) -> None:
        """The call is over; whoever reads or writes is told so."""
        self._gone = True
        self._open.set()
        self._came.set()

    def _on_state(self) -> None:
        if self._peer.connectionState in ("failed", "closed"):
            self.hang_up()

    async def _connected_in_time(self) -> None:
        await asyncio.sleep(CONNECT_S)
        if self._peer.connectionState != "connected":
            self.hang_up()

    def _on_channel(self, channel: Any) -> None:
        if self._channel is not None:
            return
        self._channel = channel
        channel.on("message", self._on_message)
        channel.on("close", self.hang_up)
        self._open.set()

    def _on_message(self, message: str | bytes) -> None:
        self._texts.append(message if isinstance(message, str) else message.decode("utf-8", errors="replace"))
        self._came.set()

    def _on_track(self, track: Any) -> None:
        if track.kind == "audio" and self._hearing is None:
            self._hearing = asyncio.create_task(self._hear(track))

    async def _hear(self, track: Any) -> None:
        resampler = AudioResampler(format="s16", layout="mono", rate=RATE)
        while True:
            try:
                frame = await track.recv()
            except MediaStreamError:
                return
            for part in resampler.resample(frame):
                self._sound += bytes(part.planes[0])[: part.samples * 2]
            del self._sound[
                : max(0, len(self._sound) - 30 * RATE * 2)
            ]  # a machine that stood still does not hear what is long past
            if len(self._sound) >= 3 * _FRAME:
                self._came.set()
