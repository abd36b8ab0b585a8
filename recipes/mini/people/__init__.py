"""Recordings of people: which clips there are, what is said in them, who is in which set. The clips themselves are no part of the project.

`clips/*.tsv` name every clip of the four sources that may be used (`collect` says where they come from), with its set, its speaker cluster, its gender
where pitch and speaker embedding agree, and its words. Three sets: ``train``; ``choice``, for choosing a checkpoint or a setting; ``report``, for the
numbers that are written down. No cluster of speakers is in two sets; Kathleen, who is one reader, is split by sentence; the LJ reader is in ``report`` only.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

CLIPS = Path(__file__).parent / "clips"
SOURCES = ("kathleen", "coffee", "wakewords", "lj")
SETS = ("train", "choice", "report")
FOLDER_VARIABLE = "OSUM_ECHAT_PEOPLE"


@dataclass(frozen=True)
class Clip:
    """One recording. ``cluster``: number of the speaker cluster; ``gender``: "" where it is not known; ``words``: "" where nobody knows them;
    ``slots``: words that an order must hold, for the recall."""

    source: str
    key: str
    set: str
    cluster: int
    gender: str
    words: str
    slots: str = ""

    def path(self, people: Path) -> Path:
        return people / self.source / "wav" / f"{self.key}.ogg"


def folder(given: Path | None = None) -> Path:
    """Where the clips are: ``given``, ``$OSUM_ECHAT_PEOPLE`` or ``shared/people`` beside the checkout. Raises ValueError when there is no such folder."""
    named = given or Path(os.environ.get(FOLDER_VARIABLE) or "../shared/people")
    if not (named / "kathleen").is_dir():
        raise ValueError(
            f"no recordings of people in {named}: name their folder, or set {FOLDER_VARIABLE} (recipes/mini/README.md)"
        )
    return named


def read_clips(source: str, wanted: Iterable[str] = SETS, directory: Path = CLIPS) -> list[Clip]:
    """Clips of a source that are in the ``wanted`` sets, in the order of the list."""
    chosen = set(wanted)
    with (directory / f"{source}.tsv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [Clip(source=source, cluster=int(row.pop("cluster")), **row) for row in rows if row["set"] in chosen]


def write_clips(source: str, clips: Sequence[Clip], directory: Path = CLIPS) -> Path:
    path = directory / f"{source}.tsv"
    directory.mkdir(parents=True, exist_ok=True)
    names = [field.name for field in fields(Clip)][1:]
    lines = ["\t".join(names), *("\t".join(map(str, astuple(clip)[1:])) for clip in clips)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
