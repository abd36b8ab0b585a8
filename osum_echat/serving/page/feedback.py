"""Ratings of replies: one line of JSON each, with the request that they belong to; audio only where the visitor
agreed."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from osum_echat.serving.page.messages import Turn

FILE = "feedback.jsonl"


def save(folder: Path, turn: Turn, rating: str, model: str, with_audio: bool) -> Path:
    """Append a rating of a finished turn to ``folder``/feedback.jsonl; returns that file.

    Args:
        rating: ``right`` or ``wrong``.
        with_audio: copy the recording and the reply's sound into ``folder``/audio, and name them in the line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{turn.number}-{time.monotonic_ns() % 10**6:06d}"
    audio: dict[str, str] = {}
    if with_audio:
        (folder / "audio").mkdir(exist_ok=True)
        for name, file in (("recording", turn.wav), ("reply", turn.reply_wav)):
            if file:
                target = folder / "audio" / f"{stamp}-{name}{Path(file).suffix}"
                shutil.copyfile(file, target)
                audio[name] = str(target.relative_to(folder))
    line = {
        "time": time.time(),
        "rating": rating,
        "model": model,
        "mode": turn.mode,
        "asked": turn.asked,
        "settings": turn.settings,
        "reply": turn.details,
        "audio": audio,
    }
    with (folder / FILE).open("a", encoding="utf-8") as out:
        out.write(json.dumps(line, ensure_ascii=False) + "\n")
    return folder / FILE
