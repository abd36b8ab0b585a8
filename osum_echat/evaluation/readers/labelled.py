"""Labelled sets: Common Voice (gender, age), VocalSound (events), MELD and MER (emotions).

Names and columns: Common Voice's tsv ``client_id path sentence up_votes down_votes age gender accents locale segment``
(later releases add ``sentence_id``, ``sentence_domain``, ``variant``) with recordings in ``clips``; VocalSound
``audio_16k/f0003_0_cough.wav``: gender and speaker, take, event (YuanGongND/vocalsound 337ac55, README),
``meta/*_meta.json`` rows ``[speaker, gender, age, ...]``, ``datafiles/te.json`` ``{"data": [{"wav": ...}]}``; MELD
``test_sent_emo.csv`` with ``Utterance, Emotion, Dialogue_ID, Utterance_ID`` and ``diaX_uttY.mp4`` (declare-lab/MELD
2d2011b, README); MER2023/2024 ``label-disdim.csv`` with ``name, discrete, valence`` (zeroQiaoba/MERTools). Videos must
have been turned into wav or flac files of the same name.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from osum_echat.evaluation.items import Entry, Item, ItemError, labels_of

_AUDIO = (".wav", ".flac", ".mp3", ".ogg", ".opus")
_UNKNOWN = {"", "nan", "other", "do_not_wish_to_say"}


def _find(folders: list[Path], stem: str) -> Path | None:
    return next((folder / f"{stem}{end}" for folder in folders for end in _AUDIO if (folder / f"{stem}{end}").is_file()), None)


def _rows(path: Path, delimiter: str, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows with their line numbers. Raises ValueError when a column is missing."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL)
        missing = [name for name in needed if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}; found {', '.join(reader.fieldnames or ())}")
        for row in reader:
            yield (
                reader.line_num,
                {name: (value or "").strip() for name, value in row.items() if name is not None and not isinstance(value, list)},
            )


def read_common_voice(path: str) -> Iterator[Entry]:
    place = Path(path)
    clips = place.parent / "clips"
    for number, row in _rows(place, "\t", ("path", "sentence")):
        wav = clips / row["path"]
        if not wav.is_file():
            stem = _find([clips], wav.stem)
            if stem is None:
                yield ItemError("missing_file", f"{wav} is not there", path, number, row["path"])
                continue
            wav = stem
        known = {kind: row[kind] for kind in ("gender", "age") if row.get(kind, "") not in _UNKNOWN}
        extra = {"lang": row["locale"]} if row.get("locale") else {}
        yield Item(wav.stem, row["sentence"], str(wav), labels_of(known), extra=extra, source=path, line=number)


def read_vocalsound(path: str) -> Iterator[Entry]:
    """The test part (``datafiles/te.json``) when it is there, else every recording."""
    root = Path(path)
    folder = next((root / name for name in ("audio_16k", "audio_44k") if (root / name).is_dir()), root)
    ages = _speaker_ages(root)
    listing = root / "datafiles" / "te.json"
    if listing.is_file():
        names = [Path(entry["wav"]).name for entry in json.loads(listing.read_text(encoding="utf-8"))["data"]]
    else:
        listing, names = folder, sorted(wav.name for wav in folder.glob("*.wav"))
    for name in names:
        speaker, _, rest = Path(name).stem.partition("_")
        event = rest.partition("_")[2]
        if not event or speaker[:1] not in ("f", "m"):
            yield ItemError("bad_name", f"{name} is not of the form f0003_0_cough.wav", str(listing), 0, name)
        elif not (folder / name).is_file():
            yield ItemError("missing_file", f"{folder / name} is not there", str(listing), 0, name)
        else:
            known = {"event": event, "gender": speaker[0], "age": ages.get(speaker, "")}
            yield Item(Path(name).stem, "", str(folder / name), labels_of(known), source=str(listing))


def _speaker_ages(root: Path) -> dict[str, str]:
    path = root / "meta" / "all_meta.json"
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {str(row[0]): str(row[2]) for row in rows if len(row) > 2 and str(row[2]).isdigit()}


def read_meld(path: str) -> Iterator[Entry]:
    """``path``: the csv, or its folder (test is taken, then dev, then train). Recordings: beside the csv or in a folder
    below it."""
    place = Path(path)
    if place.is_dir():
        found = [csv for split in ("test", "dev", "train") for csv in sorted(place.glob(f"{split}_sent_emo*.csv"))]
        if not found:
            raise ValueError(f"{place} has no test_sent_emo.csv")
        place = found[0]
    folders = [place.parent, *sorted(folder for folder in place.parent.rglob("*") if folder.is_dir())]
    for number, row in _rows(place, ",", ("Utterance", "Emotion", "Dialogue_ID", "Utterance_ID")):
        stem = f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}"
        wav = _find(folders, stem)
        if wav is None:
            yield ItemError(
                "missing_file", f"no recording {stem}.wav below {place.parent} (turn the mp4 into wav)", str(place), number, stem
            )
        elif not row["Emotion"]:
            yield ItemError("no_label.emotion", "no emotion", str(place), number, stem)
        else:
            yield Item(stem, row["Utterance"], str(wav), labels_of({"emotion": row["Emotion"]}), source=str(place), line=number)


def read_mer(path: str) -> Iterator[Entry]:
    """``path``: ``label-disdim.csv`` or its folder. Words come from ``label-transcription.csv`` (name, chinese) when it
    is there."""
    place = Path(path) / "label-disdim.csv" if Path(path).is_dir() else Path(path)
    words = {}
    transcripts = place.with_name("label-transcription.csv")
    if transcripts.is_file():
        words = {row["name"]: row.get("chinese") or row.get("sentence", "") for _, row in _rows(transcripts, ",", ("name",))}
    folders = [place.parent, *sorted(folder for folder in place.parent.rglob("*") if folder.is_dir())]
    for number, row in _rows(place, ",", ("name", "discrete")):
        wav = _find(folders, row["name"])
        if wav is None:
            yield ItemError(
                "missing_file", f"no recording {row['name']}.wav below {place.parent}", str(place), number, row["name"]
            )
        elif not row["discrete"]:
            yield ItemError("no_label.emotion", "no discrete label", str(place), number, row["name"])
        else:
            labels = labels_of({"emotion": row["discrete"]})
            yield Item(
                row["name"], words.get(row["name"], ""), str(wav), labels, extra={"lang": "zh"}, source=str(place), line=number
            )
