"""`pipecat-ai`, OpenAIRealtimeLLMService in a pipeline."""

from __future__ import annotations

import asyncio

from dialogue import Microphone, Report, arguments, three_turns
from pipecat.frames.frames import LLMRunFrame
from pipecat.pipeline.task import PipelineTask
from pipecat.services.openai.realtime.events import (
    AudioConfiguration,
    AudioInput,
    InputAudioTranscription,
    SessionProperties,
    TurnDetection,
)
from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService
from pipecat_parts import Ear, Mouth, hold, pipeline


async def main() -> None:
    url, speech = arguments()
    report = Report("pipecat-ai")
    audio = AudioConfiguration(input=AudioInput(transcription=InputAudioTranscription(), turn_detection=TurnDetection()))
    settings = OpenAIRealtimeLLMService.Settings(
        model="gpt-realtime", system_instruction="Be kind.", session_properties=SessionProperties(audio=audio)
    )
    service = OpenAIRealtimeLLMService(api_key="sk-test", base_url=url, settings=settings)
    ear = Ear(report)

    async def talk(task: PipelineTask, microphone: Microphone) -> None:
        await task.queue_frame(LLMRunFrame())
        await asyncio.sleep(4.0)  # the greeting
        report.turns = report.completed = report.interrupted = 0
        microphone.start()
        await three_turns(microphone, report, lambda: ear.seconds)

    await hold(pipeline(service, Mouth(report), ear, greeting=True), speech, report, talk)


asyncio.run(main())
