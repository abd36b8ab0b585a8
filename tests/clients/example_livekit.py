"""examples/live_livekit.py: its session between a microphone and a loudspeaker of ours, in place of a room's: a turn."""

from __future__ import annotations

import asyncio
import time

from dialogue import RATE, Microphone, Report, arguments, example, until
from livekit import rtc
from livekit.agents import Agent
from livekit.agents.voice import io


class Input(io.AudioInput):
    def __init__(self) -> None:
        super().__init__(label="microphone")
        self.frames: asyncio.Queue[rtc.AudioFrame] = asyncio.Queue()

    async def __anext__(self) -> rtc.AudioFrame:
        return await self.frames.get()


class Loudspeaker(io.AudioOutput):
    """Plays in real time, and says when an answer has been played."""

    def __init__(self, report: Report) -> None:
        super().__init__(label="loudspeaker", capabilities=io.AudioOutputCapabilities(pause=False), sample_rate=RATE)
        self.report, self.pushed, self.began = report, 0.0, 0.0
        self.playing: asyncio.Task[None] | None = None

    async def capture_frame(self, frame: rtc.AudioFrame) -> None:
        await super().capture_frame(frame)
        if not self.pushed:
            self.began = time.monotonic()
            self.report.turns += 1
        self.pushed += frame.duration
        self.report.audio_seconds += frame.duration

    def flush(self) -> None:
        super().flush()
        if self.pushed:
            self.playing = asyncio.create_task(self._play())

    async def _play(self) -> None:
        await asyncio.sleep(max(0.0, self.began + self.pushed - time.monotonic()))
        self.report.completed += 1
        self._ended(interrupted=False)

    def clear_buffer(self) -> None:
        if self.playing is not None:
            self.playing.cancel()
        if self.pushed:
            self.report.interrupted += 1
            self._ended(interrupted=True)

    def _ended(self, interrupted: bool) -> None:
        position, self.pushed = min(self.pushed, time.monotonic() - self.began), 0.0
        self.on_playback_finished(playback_position=position, interrupted=interrupted)


async def main() -> None:
    url, speech = arguments()
    report = Report("examples/live_livekit.py")
    session = example("live_livekit", url.replace("ws://", "http://").removesuffix("/realtime")).conversation()
    heard = Input()
    session.input.audio, session.output.audio = heard, Loudspeaker(report)
    session.on("user_input_transcribed", lambda event: report.transcripts.append(event.transcript))
    session.on("error", lambda event: report.errors.append(str(event.error)))
    await session.start(agent=Agent(instructions="Be kind."))

    async def send(data: bytes) -> None:
        heard.frames.put_nowait(rtc.AudioFrame(data, RATE, 1, len(data) // 2))

    microphone = Microphone(speech, send)
    microphone.start()
    await asyncio.sleep(0.5)
    microphone.say()
    try:
        await until(lambda: report.completed >= 1 and report.transcripts, "the answer")
    except TimeoutError as error:
        report.errors.append(str(error))
    microphone.stop()
    await session.aclose()
    report.finish()


asyncio.run(main())
