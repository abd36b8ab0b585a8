"""`livekit-plugins-openai`, GPTLiveModel and its session, without a LiveKit server: a turn."""

from __future__ import annotations

import asyncio

from dialogue import RATE, Microphone, Report, arguments, until
from livekit import rtc
from livekit.agents import llm
from livekit.plugins import openai


async def main() -> None:
    url, speech = arguments()
    report = Report("GPT-Live livekit-plugins-openai")
    base = url.replace("ws://", "http://").removesuffix("/realtime")
    model = openai.realtime.GPTLiveModel(base_url=base, api_key="sk-test")
    session = model.session()
    await session._update_session(instructions="Be kind.", chat_ctx=llm.ChatContext.empty(), tools=[])
    session.on("input_audio_transcription_completed", lambda event: report.transcripts.append(event.transcript))
    session.on("error", lambda event: report.errors.append(str(event.error)))

    async def listen() -> None:
        async for chunk in session.audio_stream:
            frame = getattr(chunk, "frame", chunk)
            report.audio_seconds += frame.samples_per_channel / frame.sample_rate
            report.turns = 1

    listening = asyncio.create_task(listen())
    await asyncio.sleep(1.0)

    async def send(data: bytes) -> None:
        session.push_audio(rtc.AudioFrame(data, RATE, 1, len(data) // 2))

    microphone = Microphone(speech, send)
    sending = asyncio.create_task(microphone.run())
    await asyncio.sleep(0.5)
    microphone.say()
    await until(lambda: report.audio_seconds > 1 and report.transcripts, "the answer")
    sending.cancel()
    listening.cancel()
    await session.aclose()
    await model.aclose()
    report.finish()


asyncio.run(main())
