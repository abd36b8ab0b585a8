"""A folder of conversations: play each, write Full-Duplex-Bench's files, and results for the suite ``live``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from osum_echat.audio import io as audio_io
from osum_echat.audio.resample import resample
from osum_echat.evaluation.duplex import measures
from osum_echat.evaluation.duplex.client import RATE, LiveError, Settings, hold
from osum_echat.evaluation.results import FILE, Lines, Result

SUITE, PART = "live", "talk"


@dataclass(frozen=True)
class Case:
    """One recording to play: ``folder`` may hold turns.json beside it."""

    id: str
    wav: Path

    @property
    def folder(self) -> Path:
        return self.wav.parent


def cases(folder: Path) -> list[Case]:
    """``*/input.wav`` below a folder (Full-Duplex-Bench's form), else its own ``*.wav``. Raises ValueError when there
    is none."""
    found = sorted(folder.rglob("input.wav"))
    if found:
        return [Case(str(wav.parent.relative_to(folder)) if wav.parent != folder else folder.name, wav) for wav in found]
    flat = [Case(wav.stem, wav) for wav in sorted(folder.glob("*.wav"))] if folder.is_dir() else []
    if not flat:
        raise ValueError(f"{folder} holds no */input.wav and no *.wav")
    return flat


def play_all(
    settings: Settings, source: Path, out: Path, limit: int | None = None, say: Callable[[str], None] = lambda line: None
) -> Iterator[Result]:
    """Hold the conversations that were not held yet, one after the other; a server that fails in one is a result with
    ``error``, and that one is held again in the next run."""
    lines = Lines(out / FILE)
    done = {row["id"] for row in lines.rows() if "error" not in row}
    todo = cases(source)[:limit]
    with lines:
        for number, case in enumerate(todo, start=1):
            if case.id in done:
                continue
            result = play(settings, case, out)
            lines.write(result.to_dict())
            say(f"live: {number}/{len(todo)}, {case.id}")
            yield result


def play(settings: Settings, case: Case, out: Path) -> Result:
    """One conversation and its files."""
    target = out / case.id
    target.mkdir(parents=True, exist_ok=True)
    try:
        audio = audio_io.read(case.wav)
        samples = np.asarray(resample(audio.mono(), audio.rate, RATE), dtype=np.float32)
        spoken = measures.read_segments(case.folder, samples, RATE)
        recording = hold(settings, samples)
    except (LiveError, ValueError) as error:
        return Result(case.id, PART, SUITE, error=str(error))
    length = max(len(samples) / RATE, recording.seconds)
    audio_io.write(target / "output.wav", recording.timeline.samples(length), RATE)
    padded = np.pad(samples, (0, max(0, round(length * RATE) - len(samples))))
    audio_io.write(target / "input.wav", padded, RATE)
    with (target / "events.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(event, ensure_ascii=False) + "\n" for event in recording.events)
    found = measures.turns(spoken, recording)
    timings = {
        "turns": [turn.to_dict() for turn in found],
        "total": round(recording.seconds, 3),
        "gaps": round(recording.timeline.gaps(), 3),
    }
    return Result(case.id, PART, SUITE, recording.text, wav=f"{case.id}/output.wav", timings=timings)
