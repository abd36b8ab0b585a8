"""A session over WebRTC: sound in two tracks, events in the data channel ``oai-events``, for clients that send their
offer to ``/v1/realtime/calls``.

Needs aiortc (``pip install 'osum-echat[webrtc]'``). The session machine is the one of WebSockets: `CallSocket` stands
where the WebSocket stands, and `CallSession` is a translation around the machine, whose sound goes to the track and not
into events. What WebRTC's own events say (``output_audio_buffer.*``) follows from what the track has played. Codecs are
agreed upon in the offer, so the audio formats of a session have no meaning here and are left out.

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
from collections.abc import Callable, Mapping
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
_HELD_S = 30.0
"""Sound that may wait for the machine; of more the oldest is not heard."""
WAITING_MESSAGES, WAITING_BYTES = 1000, 16 * 2**20
"""A client's messages that may wait for the machine, and their bytes; a call with more ends."""
_BUFFERED_BYTES = 2**20
"""Bytes that may wait in the data channel; behind them messages wait where they are counted
(`SessionLimits.outbox`)."""


class Loudspeaker(MediaStreamTrack):
    """The track that the client plays: what `play` was given, in real time, and silence.

    Attributes:
        wanted: False where the client takes no sound. Nothing waits then: it counts as played as soon as it comes.
    """

    kind = "audio"

    def __init__(self) -> None:
        super().__init__()
        self.wanted = True
        self._queue: deque[bytes | Callable[[], None]] = deque()
        self._began: float | None = None
        self._frames = 0

    def play(self, pcm: bytes) -> None:
        """16 bit, 24 kHz."""
        if self._taken:
            self._queue.append(pcm)

    def when_played(self, then: Callable[[], None]) -> None:
        """Call it when what waits now has been played."""
        if self._taken:
            self._queue.append(then)
        else:
            then()

    @property
    def _taken(self) -> bool:
        """Somebody takes frames (`recv`), so that what waits gets less."""
        return self.wanted and self.readyState == "live"

    def clear(self, behind: Callable[[], None] | None = None) -> None:
        """Play nothing of what waits. ``behind``: only what stands behind this call of `when_played`, or all if it has
        been made."""
        kept = list(self._queue)
        del kept[kept.index(behind) if behind in kept else 0 :]
        self._queue = deque(kept)

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
    """One caller's session machine.

    Args:
        make: builds the inner machine for what it emits.
        speech: called when speech begins or ends, the sign of life of somebody who sends no events.
    """

    def __init__(
        self,
        emit: Callable[[str], None],
        make: Callable[[Callable[[str], None]], RealtimeSession],
        speaker: Loudspeaker,
        speech: Callable[[], None],
    ) -> None:
        self._emit, self._speaker, self._speech = emit, speaker, speech
        self._playing: str | None = None  # the response that is being played
        self._queued: str | None = None  # the last response whose sound waits or is being played
        self._begins: Callable[[], None] | None = None  # what stands before the sound of that response
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
            # The track never stops: what is too old for a turn is forgotten.
            inner.turns.keep_last(inner.max_turn_s - _HEARD_AT_ONCE_S)
        await inner.handle(event_without_formats(text), arrived)

    def _from_inner(self, text: str) -> None:
        event = json.loads(text)
        kind = event["type"]
        if kind == "response.output_audio.delta":
            self._play(event)
            return
        if kind in ("input_audio_buffer.speech_started", "input_audio_buffer.speech_stopped"):
            self._speech()
        if kind == "input_audio_buffer.speech_started" and self._interrupts():
            self._emit(text)
            self._hush()
            return
        if kind == "output_audio_buffer.cleared":  # the client has asked for it; what was playing has been told of
            self._hush()
            return
        self._emit(text)
        if kind == "response.done" and event["response"]["id"] == self._queued:
            self._done(event["response"]["id"], event["response"]["status"])

    def _interrupts(self) -> bool:
        detection = self._inner.session["audio"]["input"].get("turn_detection") or {}
        return detection.get("interrupt_response") is not False

    def _play(self, event: dict[str, Any]) -> None:
        response = event["response_id"]
        if self._queued != response:  # the one before it may still be in the loudspeaker, and is played to its end
            self._queued, self._begins = response, lambda: self._began(response)
            self._speaker.when_played(self._begins)
        self._speaker.play(base64.b64decode(event["delta"]))

    def _done(self, response: str, status: str) -> None:
        """All sound of a response has come."""
        if status != "cancelled":
            self._speaker.when_played(lambda: self._ended("output_audio_buffer.stopped"))
        elif self._playing == response:
            self._hush()
        else:
            self._speaker.clear(behind=self._begins)
            self._queued = None

    def _hush(self) -> None:
        self._speaker.clear()
        self._queued = None
        self._ended("output_audio_buffer.cleared")

    def _began(self, response: str) -> None:
        self._playing = response
        self._emit(build("output_audio_buffer.started", response_id=response))

    def _ended(self, kind: str) -> None:
        if self._playing is not None:
            response, self._playing = self._playing, None
            self._emit(build(kind, response_id=response))


_SOUND = '{"type": "input_audio_buffer.append", "audio": "'


def _is_sound(text: str) -> bool:
    return text.startswith(_SOUND)


def without_formats(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A session, or the fields of a response, without the audio formats that it names."""
    audio = fields.get("audio")
    if not isinstance(audio, Mapping):
        return dict(fields)
    sides = {
        name: {key: value for key, value in side.items() if key != "format"}
        if name in ("input", "output") and isinstance(side, Mapping)
        else side
        for name, side in audio.items()
    }
    return {**fields, "audio": sides}


def event_without_formats(text: str) -> str:
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
        if isinstance(event.get(name), dict):
            event[name] = without_formats(event[name])
    return json.dumps(event)


class CallSocket:
    """What a `socket.Connection` needs of a WebSocket, on a peer connection."""

    def __init__(self) -> None:
        self.id = new_id("rtc")
        self.speaker = Loudspeaker()
        self._peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._channel: Any = None
        self._open = asyncio.Event()
        self._sound = bytearray()  # heard, and not yet given to the machine
        self._given = 0  # bytes of sound before that
        self._texts: deque[tuple[int, str]] = deque()  # each with the bytes of sound that came before it
        self._text_size = 0
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
            taken = [t.currentDirection for t in self._peer.getTransceivers() if t.sender.track is self.speaker]
            self.speaker.wanted = taken[0] in ("sendrecv", "sendonly")  # else nothing reads the track
        except Exception as error:  # aiortc raises what its parser meets
            raise ValueError(f"the SDP offer cannot be used: {error}") from error
        self._clock = asyncio.create_task(self._connected_in_time())
        return str(self._peer.localDescription.sdp)

    # ---- as a WebSocket ----------------------------------------------------------------------------------------------

    async def send_text(self, data: str) -> None:
        if not self._has_channel:
            return
        await self._open.wait()
        while not self._gone and self._channel.bufferedAmount > _BUFFERED_BYTES:
            await asyncio.sleep(FRAME_S)
        if self._gone:
            raise WebSocketDisconnect(1006)
        self._channel.send(data)

    async def receive(self) -> dict[str, Any]:
        """A message, in the order in which events and sound came; ``sound``: it is a piece of the track."""
        while not self._gone:
            size = int(_HEARD_AT_ONCE_S * RATE) * 2
            if self._texts:
                size = min(size, self._texts[0][0] - self._given)  # of this much sound the next event is the end
                if size <= 0:
                    text = self._texts.popleft()[1]
                    self._text_size -= len(text)
                    return {"type": "websocket.receive", "text": text}
            if self._sound:
                piece = bytes(self._sound[:size])
                self._drop(len(piece))
                text = f'{_SOUND}{base64.b64encode(piece).decode()}"}}'
                return {"type": "websocket.receive", "text": text, "sound": True}
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

    # ---- inside ------------------------------------------------------------------------------------------------------

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
        text = message if isinstance(message, str) else message.decode("utf-8", errors="replace")
        self._texts.append((self._given + len(self._sound), text))
        self._text_size += len(text)
        if len(self._texts) > WAITING_MESSAGES or self._text_size > WAITING_BYTES:
            log.warning("call %s ends: too many messages wait (%d, of %d letters)", self.id, len(self._texts), self._text_size)
            self._texts.clear()
            self.hang_up()
        self._came.set()

    def _on_track(self, track: Any) -> None:
        if track.kind == "audio" and self._hearing is None:
            self._hearing = asyncio.create_task(self._hear(track))
            self._hearing.add_done_callback(self._hearing_ended)

    async def _hear(self, track: Any) -> None:
        kind = resampler = None
        while True:
            try:
                frame = await track.recv()
            except MediaStreamError:
                return
            # A resampler takes one kind of sound only.
            if resampler is None or kind != (frame.sample_rate, frame.layout.name):
                kind = frame.sample_rate, frame.layout.name
                resampler = AudioResampler(format="s16", layout="mono", rate=RATE)
            for part in resampler.resample(frame):
                self._sound += bytes(part.planes[0])[: part.samples * 2]
            # A machine that stood still does not hear what is long past.
            self._drop(max(0, len(self._sound) - int(_HELD_S * RATE) * 2))
            if len(self._sound) >= 3 * _FRAME:
                self._came.set()

    def _drop(self, size: int) -> None:
        """The first bytes of the sound that waits are given, or too old."""
        del self._sound[:size]
        self._given += size

    def _hearing_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("call %s ends: its sound cannot be heard", self.id, exc_info=error)
            self.hang_up()
