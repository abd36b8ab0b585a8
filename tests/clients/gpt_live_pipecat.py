"""`pipecat-ai`, OpenAILiveLLMService in a pipeline: a turn."""

from __future__ import annotations

import asyncio

from dialogue import Microphone, Report, arguments, until
from pipecat.frames.frames import LLMRunFrame
from pipecat.pipeline.task import PipelineTask
from pipecat.services.openai.live.llm import OpenAILiveLLMService
from pipecat_parts import Ear, Mouth, hold, pipeline


async def main() -> None:
    url, speech = arguments()
    report = Report("GPT-Live pipecat-ai")
    service = OpenAILiveLLMService(api_key="sk-test", base_url=url.replace("/realtime", "/live/sessions"))

    async def talk(task: PipelineTask, microphone: Microphone) -> None:
        await task.queue_frame(LLMRunFrame())
        await asyncio.sleep(1.5)
        microphone.start()
        await asyncio.sleep(0.5)
        microphone.say()
        await until(lambda: report.audio_seconds > 1 and report.transcripts, "the answer")
        report.turns = 1

    await hold(pipeline(service, Mouth(report), Ear(report), greeting=False), speech, report, talk)


asyncio.run(main())
