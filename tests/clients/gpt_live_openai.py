"""`openai` (Python), client.live.connect: a turn."""

from __future__ import annotations

import asyncio
import base64

from dialogue import RATE, Microphone, Report, arguments, until
from openai import AsyncOpenAI


async def main() -> None:
    url, speech = arguments()
    report = Report("GPT-Live openai")
    client = AsyncOpenAI(api_key="sk-test", base_url=url.replace("ws://", "http://").removesuffix("/realtime"))
    async with client.live.connect() as connection:
        started = asyncio.Event()

        async def listen() -> None:
            async for event in connection:
                if event.type == "session.started":
                    started.set()
                elif event.type == "session.output_audio.delta":
                    report.audio_seconds += len(base64.b64decode(event.delta)) / 2 / RATE
                elif event.type == "session.input_transcript.delta":
                    report.transcripts.append(event.delta)
                elif event.type == "session.output_transcript.delta":
                    report.answers.append(event.delta)
                elif event.type == "session.usage.updated":
                    report.turns += 1
                elif event.type == "error":
                    report.errors.append(event.error.message)

        listening = asyncio.create_task(listen())
        await connection.send({"type": "session.start", "session": {"model": "gpt-live-1", "instructions": "Be kind."}})
        await asyncio.wait_for(started.wait(), 10)

        async def send(data: bytes) -> None:
            await connection.send({"type": "session.input_audio.append", "audio": base64.b64encode(data).decode()})

        microphone = Microphone(speech, send)
        sending = asyncio.create_task(microphone.run())
        await asyncio.sleep(0.5)
        microphone.say()
        await until(lambda: report.turns >= 1 and report.audio_seconds > 1, "the answer")
        sending.cancel()
        listening.cancel()
    report.finish()


asyncio.run(main())
