"""Recordings of people as items of the suite: what is said in them, who says it, and that it is said calmly where it is read or ordered.

The clips are no part of the project, so the items file is written where they are (`recipes.mini.people.folder`), with absolute paths.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from osum_echat.audio import io as audio_io
from osum_echat.evaluation.items import Item
from recipes.mini import people
from recipes.mini.people import Clip
from recipes.mini.people.collect import rank

FILE = "people.jsonl"
LONGEST = 12.0  # seconds: longer recordings are cut elsewhere
NEUTRAL_SOURCES = ("kathleen", "lj", "coffee")
"""Readers and people who order coffee: nobody is moved there."""


def choose(name: str, limit: int | None = None) -> list[Clip]:
    """Clips of a set, at most ``limit`` of each source by the hash of their names, the sources in turns: a smaller set is always a part of a larger one."""
    by_source = [sorted(people.read_clips(source, (name,)), key=lambda clip: rank(clip.key))[:limit] for source in people.SOURCES]
    longest = max(map(len, by_source), default=0)
    return [clips[place] for place in range(longest) for clips in by_source if place < len(clips)]


def item(clip: Clip, folder: Path) -> Item:
    labels = {"gender": clip.gender} if clip.gender else {}
    if clip.source in NEUTRAL_SOURCES:
        labels["emotion"] = "neutral"
    extra = {"slots": clip.slots} if clip.slots else {}
    wav = str(clip.path(folder).resolve())
    return Item(f"{clip.source}/{clip.key}", clip.words or clip.slots, wav, labels, clip.source, extra=extra)


def write_items(path: Path, clips: Sequence[Clip], folder: Path) -> int:
    """Write the items of all clips of at most 12 s; returns how many. Raises AudioError for a recording that is not there."""
    items = [item(clip, folder) for clip in clips if audio_io.duration(clip.path(folder)) <= LONGEST]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one.to_dict(), ensure_ascii=False) + "\n" for one in items), encoding="utf-8")
    return len(items)
