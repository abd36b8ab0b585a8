"""`openai-agents` (Python), RealtimeRunner."""

from __future__ import annotations

import asyncio

from agents.realtime import RealtimeAgent, RealtimeRunner
from dialogue import RATE, Microphone, Report, arguments, three_turns


async def main() -> None:
    url, speech = arguments()
    report = Report("openai-agents")
    agent = RealtimeAgent(name="Friend", instructions="Be kind.")
    runner = RealtimeRunner(agent, config={"model_settings": {"model_name": "gpt-realtime"}})
    async with await runner.run(model_config={"url": f"{url}?model=gpt-realtime", "api_key": "sk-test"}) as session:

        async def listen() -> None:
            async for event in session:
                if event.type == "audio":
                    report.sounds(len(event.audio.data) / 2 / RATE)
                elif event.type == "audio_interrupted":
                    report.over()
                elif event.type == "error":
                    report.errors.append(str(event.error))
                elif event.type == "raw_model_event" and event.data.type == "raw_server_event":
                    data = event.data.data
                    if data["type"] == "response.created":
                        report.begins()
                    elif data["type"] == "response.done" and data["response"]["status"] == "completed":
                        report.ended()
                elif event.type == "history_updated":
                    said = [
                        c.transcript
                        for i in event.history
                        if i.type == "message"
                        for c in i.content
                        if getattr(c, "transcript", None)
                    ]
                    report.answers = said

        microphone = Microphone(speech, session.send_audio)
        tasks = [asyncio.create_task(microphone.run()), asyncio.create_task(listen())]
        await three_turns(microphone, report)
        report.transcripts = report.answers[:1]
        for task in tasks:
            task.cancel()
    report.finish()


asyncio.run(main())
