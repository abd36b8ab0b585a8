"""What the pipecat clients share: the two ends of a pipeline, which count what comes by, and a conversation through it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from dialogue import RATE, Microphone, Report, three_turns, until
from pipecat.frames.frames import (
    EndFrame,
    ErrorFrame,
    Frame,
    InputAudioRawFrame,
    InterruptionFrame,
    LLMRunFrame,
    OutputAudioRawFrame,
    TranscriptionFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.runner import PipelineRunner
from pipecat.pipeline.task import PipelineParams, PipelineTask
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor

Talk = Callable[[PipelineTask, Microphone], Awaitable[None]]


class Mouth(FrameProcessor):
    """In front of the service: transcripts and errors come up to here."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, ErrorFrame):
            self.report.errors.append(frame.error)
        elif isinstance(frame, TranscriptionFrame):
            self.report.transcripts.append(frame.text)
        await self.push_frame(frame, direction)


class Ear(Mouth):
    """Behind the service: answers begin, sound, are interrupted and end here."""

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        report = self.report
        if isinstance(frame, TTSStartedFrame):
            report.begins()
        elif isinstance(frame, OutputAudioRawFrame):
            report.sounds(len(frame.audio) / 2 / frame.sample_rate)
        elif isinstance(frame, InterruptionFrame):
            report.over()
        elif isinstance(frame, TTSStoppedFrame):
            report.ended()
        await super().process_frame(frame, direction)


def pipeline(service: FrameProcessor, mouth: Mouth, ear: Ear, greeting: bool) -> PipelineTask:
    """A pipeline around a service; ``greeting``: it begins to speak by itself."""
    messages = [{"role": "user", "content": "hello"}] if greeting else []
    aggregators = LLMContextAggregatorPair(LLMContext(messages))
    return PipelineTask(
        Pipeline([aggregators.user(), mouth, service, ear, aggregators.assistant()]),
        params=PipelineParams(audio_in_sample_rate=RATE, audio_out_sample_rate=RATE),
        idle_timeout_secs=None,
    )


def greeting_and_three_turns(report: Report) -> Talk:
    """The service greets; behind that `three_turns`."""

    async def talk(task: PipelineTask, microphone: Microphone) -> None:
        await task.queue_frame(LLMRunFrame())
        await until(lambda: report.completed, "the greeting")
        await asyncio.sleep(3.0)  # it is played
        report.turns = report.completed = report.interrupted = 0
        microphone.start()
        await three_turns(microphone, report)

    return talk


async def hold(task: PipelineTask, speech: bytes, report: Report, talk: Talk) -> None:
    """Run the pipeline while ``talk`` speaks, then print the report."""

    async def send(data: bytes) -> None:
        await task.queue_frame(InputAudioRawFrame(audio=data, sample_rate=RATE, num_channels=1))

    async def speak() -> None:
        microphone = Microphone(speech, send)
        try:
            await talk(task, microphone)
        except TimeoutError as error:
            report.errors.append(str(error))
        microphone.stop()
        await task.queue_frame(EndFrame())

    await asyncio.gather(PipelineRunner(handle_sigint=False).run(task), speak())
    report.finish()
