"""examples/live_pipecat.py: its pipeline between a microphone and a loudspeaker of ours, in place of WebRTC's."""

from __future__ import annotations

import asyncio

from dialogue import Microphone, Report, arguments, example, three_turns
from pipecat.frames.frames import LLMRunFrame
from pipecat.pipeline.task import PipelineTask
from pipecat_parts import Ear, Mouth, hold


async def main() -> None:
    url, speech = arguments()
    report = Report("examples/live_pipecat.py")
    ear = Ear(report)

    async def talk(task: PipelineTask, microphone: Microphone) -> None:
        await task.queue_frame(LLMRunFrame())
        await asyncio.sleep(4.0)  # the greeting
        report.turns = report.completed = report.interrupted = 0
        microphone.start()
        await three_turns(microphone, report, lambda: ear.seconds)

    await hold(example("live_pipecat", url).conversation(Mouth(report), ear), speech, report, talk)


asyncio.run(main())
