"""`openai-agents` (Python), RealtimeRunner."""

from __future__ import annotations

import asyncio

from agents.realtime import RealtimeAgent, RealtimeRunner
from dialogue import RATE, Microphone, Report, arguments, three_turns


async def main() -> None:
    url, speech = arguments()
    report, seconds = Report("openai-agents"), [0.0]
    agent = RealtimeAgent(name="Friend", instructions="Be kind.")
    runner = RealtimeRunner(agent, config={"model_settings": {"model_name": "gpt-realtime"}})
    async with await runner.run(model_config={"url": f"{url}?model=gpt-realtime", "api_key": "sk-test"}) as session:

        async def listen() -> None:
            async for event in session:
                if event.type == "audio":
                    length = len(event.audio.data) / 2 / RATE
                    seconds[0], report.audio_seconds = seconds[0] + length, report.audio_seconds + length
                elif event.type == "audio_interrupted":
                    report.interrupted += seconds[0] > 0 and report.turns > report.completed
                elif event.type == "error":
                    report.errors.append(str(event.error))
                elif event.type == "raw_model_event" and event.data.type == "raw_server_event":
                    data = event.data.data
                    if data["type"] == "response.created":
                        report.turns, seconds[0] = report.turns + 1, 0.0
                    elif data["type"] == "response.done":
                        report.completed += data["response"]["status"] == "completed"
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
        await three_turns(microphone, report, lambda: seconds[0])
        report.transcripts = report.answers[:1]
        for task in tasks:
            task.cancel()
    report.finish()


asyncio.run(main())
