"""`pipecat-ai`, OpenAIRealtimeLLMService in a pipeline."""

from __future__ import annotations

import asyncio

from dialogue import RATE, Microphone, Report, arguments, three_turns
from pipecat.frames.frames import (
    EndFrame,
    ErrorFrame,
    Frame,
    InputAudioRawFrame,
    InterruptionFrame,
    LLMRunFrame,
    TranscriptionFrame,
    TTSAudioRawFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.runner import PipelineRunner
from pipecat.pipeline.task import PipelineParams, PipelineTask
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.services.openai.realtime.events import (
    AudioConfiguration,
    AudioInput,
    InputAudioTranscription,
    SessionProperties,
    TurnDetection,
)
from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService


class Ear(FrameProcessor):
    """The end of the pipeline; ``up`` counts what the service pushes upstream."""

    def __init__(self, report: Report, seconds: list[float]) -> None:
        super().__init__()
        self.report, self.seconds = report, seconds
        self.answering = False

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        report = self.report
        if isinstance(frame, TTSStartedFrame):
            report.turns, self.seconds[0], self.answering = report.turns + 1, 0.0, True
        elif isinstance(frame, TTSAudioRawFrame):
            length = len(frame.audio) / 2 / frame.sample_rate
            self.seconds[0], report.audio_seconds = self.seconds[0] + length, report.audio_seconds + length
        elif isinstance(frame, InterruptionFrame):
            report.interrupted, self.answering = report.interrupted + self.answering, False
        elif isinstance(frame, TTSStoppedFrame) and self.answering:
            report.completed, self.answering = report.completed + 1, False
        elif isinstance(frame, TranscriptionFrame):
            report.transcripts.append(frame.text)
        await self.push_frame(frame, direction)


class Mouth(Ear):
    """The begin of the pipeline: transcripts and errors come up to here."""

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await FrameProcessor.process_frame(self, frame, direction)
        if isinstance(frame, ErrorFrame):
            self.report.errors.append(frame.error)
        elif isinstance(frame, TranscriptionFrame):
            self.report.transcripts.append(frame.text)
        await self.push_frame(frame, direction)


async def main() -> None:
    url, speech = arguments()
    report, seconds = Report("pipecat-ai"), [0.0]
    audio = AudioConfiguration(input=AudioInput(transcription=InputAudioTranscription(), turn_detection=TurnDetection()))
    properties = SessionProperties(audio=audio)
    settings = OpenAIRealtimeLLMService.Settings(
        model="gpt-realtime", system_instruction="Be kind.", session_properties=properties
    )
    service = OpenAIRealtimeLLMService(api_key="sk-test", base_url=url, settings=settings)
    aggregators = LLMContextAggregatorPair(LLMContext([{"role": "user", "content": "hello"}]))
    mouth, ear = Mouth(report, seconds), Ear(report, seconds)
    task = PipelineTask(
        Pipeline([aggregators.user(), mouth, service, ear, aggregators.assistant()]),
        params=PipelineParams(audio_in_sample_rate=RATE, audio_out_sample_rate=RATE),
        idle_timeout_secs=None,
    )

    async def send(data: bytes) -> None:
        await task.queue_frame(InputAudioRawFrame(audio=data, sample_rate=RATE, num_channels=1))

    async def talk() -> None:
        try:
            await task.queue_frame(LLMRunFrame())
            await asyncio.sleep(4.0)  # the greeting
            report.turns = report.completed = report.interrupted = 0
            microphone = Microphone(speech, send)
            sending = asyncio.create_task(microphone.run())
            await three_turns(microphone, report, lambda: seconds[0])
            sending.cancel()
        except TimeoutError as error:
            report.errors.append(str(error))
        await task.queue_frame(EndFrame())

    runner = PipelineRunner(handle_sigint=False)
    await asyncio.gather(runner.run(task), talk())
    report.finish()


asyncio.run(main())
