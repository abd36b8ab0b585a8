"""`pipecat-ai`, OpenAIRealtimeLLMService in a pipeline."""

from __future__ import annotations

import asyncio

from dialogue import Report, arguments
from pipecat.services.openai.realtime.events import (
    AudioConfiguration,
    AudioInput,
    InputAudioTranscription,
    SessionProperties,
    TurnDetection,
)
from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService
from pipecat_parts import Ear, Mouth, greeting_and_three_turns, hold, pipeline


async def main() -> None:
    url, speech = arguments()
    report = Report("pipecat-ai")
    audio = AudioConfiguration(input=AudioInput(transcription=InputAudioTranscription(), turn_detection=TurnDetection()))
    settings = OpenAIRealtimeLLMService.Settings(
        model="gpt-realtime", system_instruction="Be kind.", session_properties=SessionProperties(audio=audio)
    )
    service = OpenAIRealtimeLLMService(api_key="sk-test", base_url=url, settings=settings)

    await hold(pipeline(service, Mouth(report), Ear(report), greeting=True), speech, report, greeting_and_three_turns(report))


asyncio.run(main())
