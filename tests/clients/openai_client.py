"""`openai` (Python), realtime."""

from __future__ import annotations

import asyncio
import base64

from dialogue import RATE, Microphone, Report, arguments, three_turns
from openai import AsyncOpenAI


async def main() -> None:
    url, speech = arguments()
    report = Report("openai")
    client = AsyncOpenAI(api_key="sk-test", base_url=url.replace("ws://", "http://").removesuffix("/realtime"))
    async with client.realtime.connect(model="gpt-realtime") as connection:

        async def send(data: bytes) -> None:
            await connection.input_audio_buffer.append(audio=base64.b64encode(data).decode())

        async def listen() -> None:
            async for event in connection:
                if event.type == "response.created":
                    report.begins()
                elif event.type == "response.output_audio.delta":
                    report.sounds(len(base64.b64decode(event.delta)) / 2 / RATE)
                elif event.type == "input_audio_buffer.speech_started":
                    report.over()
                elif event.type == "response.output_audio_transcript.done":
                    report.answers.append(event.transcript)
                elif event.type == "conversation.item.input_audio_transcription.completed":
                    report.transcripts.append(event.transcript)
                elif event.type == "response.done" and event.response.status == "completed":
                    report.ended()
                elif event.type == "error":
                    report.errors.append(event.error.message)

        microphone = Microphone(speech, send)
        tasks = [asyncio.create_task(microphone.run()), asyncio.create_task(listen())]
        await connection.session.update(session={"type": "realtime", "output_modalities": ["audio"], "instructions": "Be kind."})
        await three_turns(microphone, report)
        for task in tasks:
            task.cancel()
    report.finish()


asyncio.run(main())
