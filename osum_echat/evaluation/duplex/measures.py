"""Delays, interruptions and rejections of a recorded conversation.

The person's side comes in segments: from ``turns.json`` beside ``input.wav`` (``[{"start", "end", "kind"}]``, seconds;
kind ``say`` wants an answer, ``reject`` is noise, a listener's "mhm" or talk with somebody else and wants none), else
from where the recording is not silent (all ``say``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from osum_echat import metrics
from osum_echat.evaluation.duplex.client import Recording
from osum_echat.evaluation.duplex.timeline import Samples

PAUSE = 0.7
"""Seconds of silence that part two segments."""
FRAME = 0.02
WINDOW = 3.0
"""Seconds after a segment to reject in which the system must not begin to speak."""
KINDS = ("say", "reject")


@dataclass
class Segment:
    """What the person says without a longer pause, seconds."""

    start: float
    end: float
    kind: str = "say"


@dataclass
class Turn:
    """What came of a segment.

    Attributes:
        delay: from its end to the first sound of the answer. after_commit: from the server's
            ``input_audio_buffer.committed`` to it.
        interrupts: the system was speaking when the segment began; stop: seconds from then to its silence (None: it
            went on).
        rejected: nothing was answered, and what was being said went on (kind ``reject``).
    """

    kind: str
    start: float
    end: float
    answered: bool = False
    delay: float | None = None
    after_commit: float | None = None
    interrupts: bool = False
    stop: float | None = None
    rejected: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in asdict(self).items()
            if value is not None
        }


def segments(samples: Samples, rate: int) -> list[Segment]:
    """Where a recording [n] is not silent; pauses under `PAUSE` do not part."""
    loud = np.flatnonzero(~metrics.silent_frames(samples, rate, frame_seconds=FRAME))
    out: list[Segment] = []
    for at in loud:
        start, end = at * FRAME, (at + 1) * FRAME
        if out and start - out[-1].end < PAUSE:
            out[-1].end = end
        else:
            out.append(Segment(start, end))
    return out


def read_segments(folder: Path, samples: Samples, rate: int) -> list[Segment]:
    """Segments of ``folder/turns.json``, else by listening. Raises ValueError for a file that is no list of
    segments."""
    path = folder / "turns.json"
    if not path.is_file():
        return segments(samples, rate)
    try:
        found = [
            Segment(float(row["start"]), float(row["end"]), str(row.get("kind", "say"))) for row in json.loads(path.read_text())
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a list of objects with start, end (seconds) and kind: {error}") from error
    wrong = [segment.kind for segment in found if segment.kind not in KINDS]
    if wrong:
        raise ValueError(f"{path}: kind {wrong[0]!r}: use {', '.join(KINDS)}")
    return found


def turns(spoken: Sequence[Segment], recording: Recording) -> list[Turn]:
    """What came of each segment."""
    sounds = recording.timeline.answers()
    commits = recording.times("input_audio_buffer.committed")
    out = []
    for number, segment in enumerate(spoken):
        until = spoken[number + 1].start if number + 1 < len(spoken) else float("inf")
        turn = Turn(segment.kind, segment.start, segment.end)
        speaking = next((s for s in sounds if s.start < segment.start < s.end), None)
        if speaking is not None:
            turn.interrupts = True
            stopped = speaking.end - segment.start
            started = recording.times("input_audio_buffer.speech_started")
            cut = speaking.response in recording.cancelled() or any(abs(speaking.end - t) < 0.05 for t in started)
            turn.stop = stopped if cut else None
        first = next((s.start for s in sounds if segment.end - 0.05 <= s.start < until and s is not speaking), None)
        if segment.kind == "reject":
            began = [s for s in sounds if segment.start <= s.start < segment.end + WINDOW and s is not speaking]
            turn.rejected = not began and turn.stop is None
        elif first is not None:
            turn.answered, turn.delay = True, first - segment.end
            before = [t for t in commits if segment.start < t <= first]
            turn.after_commit = first - before[-1] if before else None
        out.append(turn)
    return out
