"""`pipecat-ai`, OpenAILiveLLMService in a pipeline: a turn."""

from __future__ import annotations

import asyncio

from dialogue import RATE, Microphone, Report, arguments, until
from pipecat.frames.frames import (
    EndFrame,
    ErrorFrame,
    Frame,
    InputAudioRawFrame,
    LLMRunFrame,
    OutputAudioRawFrame,
    TranscriptionFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.runner import PipelineRunner
from pipecat.pipeline.task import PipelineParams, PipelineTask
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.services.openai.live.llm import OpenAILiveLLMService


class Watch(FrameProcessor):
    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, OutputAudioRawFrame):
            self.report.audio_seconds += len(frame.audio) / 2 / frame.sample_rate
            self.report.turns = 1
        elif isinstance(frame, TranscriptionFrame):
            self.report.transcripts.append(frame.text)
        elif isinstance(frame, ErrorFrame):
            self.report.errors.append(frame.error)
        await self.push_frame(frame, direction)


async def main() -> None:
    url, speech = arguments()
    report = Report("GPT-Live pipecat-ai")
    service = OpenAILiveLLMService(api_key="sk-test", base_url=url.replace("/realtime", "/live/sessions"))
    aggregators = LLMContextAggregatorPair(LLMContext([]))
    before, behind = Watch(report), Watch(report)
    task = PipelineTask(
        Pipeline([aggregators.user(), before, service, behind, aggregators.assistant()]),
        params=PipelineParams(audio_in_sample_rate=RATE, audio_out_sample_rate=RATE),
        idle_timeout_secs=None,
    )

    async def send(data: bytes) -> None:
        await task.queue_frame(InputAudioRawFrame(audio=data, sample_rate=RATE, num_channels=1))

    async def talk() -> None:
        try:
            await task.queue_frame(LLMRunFrame())
            await asyncio.sleep(1.5)
            microphone = Microphone(speech, send)
            sending = asyncio.create_task(microphone.run())
            await asyncio.sleep(0.5)
            microphone.say()
            await until(lambda: report.audio_seconds > 1 and report.transcripts, "the answer")
            sending.cancel()
        except TimeoutError as error:
            report.errors.append(str(error))
        await task.queue_frame(EndFrame())

    await asyncio.gather(PipelineRunner(handle_sigint=False).run(task), talk())
    report.finish()


asyncio.run(main())
