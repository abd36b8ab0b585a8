"""`livekit-plugins-openai`, RealtimeModel and its session, without a LiveKit server."""

from __future__ import annotations

import asyncio

from dialogue import RATE, Microphone, Report, arguments, three_turns, until
from livekit import rtc
from livekit.agents import llm
from livekit.plugins import openai


async def main() -> None:
    url, speech = arguments()
    report = Report("livekit-plugins-openai")
    http = url.replace("ws://", "http://").removesuffix("/realtime")
    model = openai.realtime.RealtimeModel(model="gpt-realtime", voice="marin", base_url=http, api_key="sk-test")
    session = model.session()
    await session.update_instructions("Be kind.")
    context = llm.ChatContext.empty()
    context.add_message(role="user", content="hello")
    context.add_message(role="assistant", content="hello, how are you?")
    await session.update_chat_ctx(context)

    async def read(generation: llm.GenerationCreatedEvent) -> None:
        report.begins()
        number, text = report.turns, ""
        async for message in generation.message_stream:

            async def words(message: llm.MessageGeneration = message) -> str:
                return "".join([part async for part in message.text_stream])

            reading = asyncio.create_task(words())
            async for frame in message.audio_stream:
                report.sounds(frame.samples_per_channel / frame.sample_rate)
            text += await reading
        report.answers.append(text)
        if number == report.turns:
            report.ended()

    tasks: list[asyncio.Task[None]] = []

    def started(_: llm.InputSpeechStartedEvent) -> None:
        if report.over():
            session.interrupt()

    def transcribed(event: llm.InputTranscriptionCompleted) -> None:
        if event.is_final:
            report.transcripts.append(event.transcript)

    session.on("generation_created", lambda event: tasks.append(asyncio.create_task(read(event))))
    session.on("input_speech_started", started)
    session.on("input_audio_transcription_completed", transcribed)
    session.on("error", lambda event: report.errors.append(str(event.error)))
    greeting = await session.generate_reply(instructions="Greet the user.")
    assert greeting.user_initiated, "the answer to generate_reply is known by its metadata"
    await until(lambda: report.completed, "the greeting")
    await asyncio.sleep(3.0)  # it is played
    report.turns = report.completed = report.interrupted = 0

    async def send(data: bytes) -> None:
        session.push_audio(rtc.AudioFrame(data, RATE, 1, len(data) // 2))

    microphone = Microphone(speech, send)
    sending = asyncio.create_task(microphone.run())
    await three_turns(microphone, report)
    sending.cancel()
    await session.aclose()
    await model.aclose()
    report.finish()


asyncio.run(main())
