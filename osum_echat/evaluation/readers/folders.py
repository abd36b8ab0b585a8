"""Recognition sets as they are published: AISHELL-1, LibriSpeech, WenetSpeech.

Shapes: AISHELL (openslr.org/33) ``transcript/aishell_transcript_v0.8.txt`` (id, blank, words parted by blanks) and
``wav/{train,dev,test}/SPEAKER/ID.wav``; LibriSpeech (openslr.org/12) ``SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt``
beside ``ID.flac``; WenetSpeech ``WenetSpeech.json`` with ``audios[].{aid, path, segments[].{sid, begin_time, end_time,
text, subsets}}`` (wenet-e2e/WenetSpeech d293df8, toolkits/kaldi/local/extract_meta.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from osum_echat.evaluation.items import Entry, Item, ItemError

_AISHELL_SPLITS = ("test", "dev", "train")


def read_aishell(path: str) -> Iterator[Entry]:
    """The first split that is there, of test, dev and train. ``path``: the set's folder, or ``wav/SPLIT`` in it."""
    place = Path(path)
    root = next((folder for folder in (place, *place.parents[:3]) if (folder / "transcript").is_dir()), place)
    listing = next(iter(sorted((root / "transcript").glob("aishell_transcript*.txt"))), None)
    if listing is None:
        raise ValueError(f"{root} has no transcript/aishell_transcript*.txt")
    split = (
        place
        if place != root
        else next((root / "wav" / name for name in _AISHELL_SPLITS if (root / "wav" / name).is_dir()), root)
    )
    recordings = {wav.stem: wav for wav in sorted(split.rglob("*.wav"))}
    if not recordings:
        raise ValueError(f"{split} holds no recording (AISHELL's tars of speakers must be unpacked)")
    found = set()
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), start=1):
        id, _, words = line.strip().partition(" ")
        if id in recordings:
            found.add(id)
            text = words.replace(" ", "")
            if text:
                yield Item(id, text, str(recordings[id]), extra={"lang": "zh"}, source=str(listing), line=number)
            else:
                yield ItemError("no_text", "no words", str(listing), number, id)
    for id in sorted(recordings.keys() - found):
        yield ItemError("no_text", f"no line in {listing}", str(recordings[id]), 0, id)


def read_librispeech(path: str) -> Iterator[Entry]:
    for listing in sorted(Path(path).rglob("*.trans.txt")):
        for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), start=1):
            id, _, words = line.strip().partition(" ")
            wav = next(
                (listing.parent / f"{id}{end}" for end in (".flac", ".wav") if (listing.parent / f"{id}{end}").is_file()), None
            )
            if wav is None:
                yield ItemError("missing_file", f"{id}.flac is not beside its transcript", str(listing), number, id)
            else:
                yield Item(id, words, str(wav), extra={"lang": "en"}, source=str(listing), line=number)


def read_wenetspeech(path: str) -> Iterator[Entry]:
    """Segments of the long recordings. ``path``: the folder, the json, or ``folder/WenetSpeech.json#TEST_NET`` for one
    subset."""
    name, _, subset = path.partition("#")
    listing = Path(name) / "WenetSpeech.json" if Path(name).is_dir() else Path(name)
    try:
        audios: list[dict[str, Any]] = json.loads(listing.read_text(encoding="utf-8"))["audios"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{listing} is not WenetSpeech's json (audios, segments): {error}") from error
    for audio in audios:
        aid = str(audio.get("aid", ""))
        wav = listing.parent / str(audio.get("path", ""))
        if not wav.is_file():
            yield ItemError("missing_file", f"{wav} is not there", str(listing), 0, aid)
            continue
        for segment in audio.get("segments", []):
            if subset and subset not in segment.get("subsets", []):
                continue
            try:
                yield Item(
                    str(segment["sid"]),
                    str(segment["text"]),
                    str(wav),
                    group=next((s for s in segment.get("subsets", []) if s.startswith(("TEST", "DEV"))), ""),
                    extra={"lang": "zh"},
                    start=float(segment["begin_time"]),
                    end=float(segment["end_time"]),
                    source=str(listing),
                )
            except (KeyError, TypeError, ValueError) as error:
                yield ItemError("bad_segment", f"a segment lacks {error}", str(listing), 0, str(segment.get("sid", aid)))
