"""examples/live_pipecat.py: its pipeline between a microphone and a loudspeaker of ours, in place of WebRTC's."""

from __future__ import annotations

import asyncio

from dialogue import Report, arguments, example
from pipecat.frames.frames import TranscriptionFrame
from pipecat.observers.base_observer import BaseObserver, FramePushed
from pipecat_parts import Ear, Mouth, greeting_and_three_turns, hold


class Transcripts(BaseObserver):
    """What was said: the context keeps it for itself, before it comes to the microphone."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report

    async def on_push_frame(self, data: FramePushed) -> None:
        if isinstance(data.frame, TranscriptionFrame) and data.frame.text not in self.report.transcripts:
            self.report.transcripts.append(data.frame.text)


async def main() -> None:
    url, speech = arguments()
    report = Report("examples/live_pipecat.py")

    task = example("live_pipecat", url).conversation(Mouth(report), Ear(report))
    task.add_observer(Transcripts(report))
    await hold(task, speech, report, greeting_and_three_turns(report))


asyncio.run(main())
