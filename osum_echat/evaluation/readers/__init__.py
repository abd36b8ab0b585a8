"""Data of every form as items. `open_items` finds the form by looking, or takes the name of one.

| form | what it is | module |
|---|---|---|
| list | a raw, shard or combine list of this project, or one tar of samples | lists |
| items | jsonl of items (`items.Item`) | lists |
| aishell, librispeech, wenetspeech | folders as these sets are published | folders |
| common_voice | a tsv file, with its ``clips`` folder beside it | labelled |
| vocalsound, meld, mer | labelled sets of events and emotions | labelled |
| seed_tts | ``meta.lst`` of SEED-TTS-eval | benchmarks |
| voicebench | jsonl with VoiceBench's columns; the file's name says which subset | benchmarks |
| duplex | folder of ``*/input.wav`` (Full-Duplex-Bench) or of wav files | benchmarks |

A reader gives an `Item` or, for an entry that cannot be used, an `ItemError` that names file and line; only a set that
cannot be opened at all is an exception.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from osum_echat.config import ConfigError
from osum_echat.evaluation.items import Entry, Item, ItemError

FORMS = {
    "list": "lists:read_list",
    "items": "lists:read_items",
    "aishell": "folders:read_aishell",
    "librispeech": "folders:read_librispeech",
    "wenetspeech": "folders:read_wenetspeech",
    "common_voice": "labelled:read_common_voice",
    "vocalsound": "labelled:read_vocalsound",
    "meld": "labelled:read_meld",
    "mer": "labelled:read_mer",
    "seed_tts": "benchmarks:read_seed_tts",
    "voicebench": "benchmarks:read_voicebench",
    "duplex": "benchmarks:read_duplex",
}


def open_items(path: str | Path, form: str = "auto", limit: int | None = None) -> list[Entry]:
    """Entries of a set, in its order; ``limit`` counts those that can be used.

    Raises:
        ValueError: there is no such file or folder, its form is not known, or it holds no usable entry.
    """
    place = Path(path)
    if not place.exists() and "://" not in str(path):
        raise ValueError(f"test set not found: {path}")
    if form == "auto":
        form = find_form(place)
    if form not in FORMS:
        raise ConfigError(f"format={form}: use auto or one of {', '.join(FORMS)}")
    module, _, name = FORMS[form].partition(":")
    reader = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    try:
        entries = list(_limited(_unique(reader(str(path))), limit))
    except UnicodeDecodeError as error:
        raise ValueError(f"test set {path} (read as form {form}) is not UTF-8 text: {error}") from error
    if not any(isinstance(entry, Item) for entry in entries):
        first = f"; the first of {len(entries)} faults: {entries[0]}" if entries else ""
        raise ValueError(f"test set {path} holds no record that can be used (read as form {form}){first}")
    return entries


def find_form(place: Path) -> str:
    """The form of a set, by what lies there. Raises ValueError when it cannot be seen."""
    if place.is_dir():
        for form, pattern in (
            ("aishell", "transcript/aishell_transcript*.txt"),
            ("wenetspeech", "WenetSpeech.json"),
            ("vocalsound", "audio_16k"),
            ("vocalsound", "audio_44k"),
            ("mer", "label-disdim.csv"),
            ("meld", "*_sent_emo*.csv"),
            ("librispeech", "**/*.trans.txt"),
        ):
            if next(iter(place.glob(pattern)), None) is not None:
                return form
        raise ValueError(f"{place} is a folder of no known form; give format=, one of {', '.join(FORMS)}, or name the file in it")
    if place.suffix == ".lst":
        return "seed_tts"
    if place.suffix == ".tsv":
        return "common_voice"
    if place.suffix == ".csv":
        return "mer" if "disdim" in place.name else "meld"
    if place.name == "WenetSpeech.json":
        return "wenetspeech"
    return _by_first_line(place)


def _by_first_line(place: Path) -> str:
    from osum_echat.evaluation.items import read_lines

    if place.suffix not in (".jsonl", ".list", ".json"):
        return "list"
    first = next((value for _, value in read_lines(place) if isinstance(value, dict)), {})
    if "key" in first and "wav" in first and "txt" in first:
        return "list"
    if "prompt" in first and ({"audio", "reference", "instruction_id_list", "response", "output"} & first.keys()):
        return "voicebench"
    if {"turns", "audio1"} <= first.keys():
        return "voicebench"
    return "items" if "id" in first else "list"


def _limited(entries: Iterator[Entry], limit: int | None) -> Iterator[Entry]:
    if limit is None:
        yield from entries
        return
    left = limit
    for entry in entries:
        if left <= 0:
            return
        left -= isinstance(entry, Item)
        yield entry


def _unique(entries: Iterator[Entry]) -> Iterator[Entry]:
    seen: dict[str, int] = {}
    for entry in entries:
        if isinstance(entry, Item):
            if entry.id in seen:
                entry = entry.error("same_id", f"the id was used before (line {seen[entry.id]}); results are told apart by it")
            else:
                seen[entry.id] = entry.line
        yield entry


def usable(entries: list[Entry], needs: tuple[str, ...] = (), limit: int | None = None) -> tuple[list[Item], list[ItemError]]:
    """Items that have what a suite needs, and what is wrong with the others."""
    good, bad = [], []
    for entry in entries:
        if isinstance(entry, ItemError):
            bad.append(entry)
            continue
        missing = [need for need in needs if not entry.has(need)]
        if missing:
            bad.append(entry.error(f"no_{missing[0]}", f"there is no {', '.join(missing)}"))
        else:
            good.append(entry)
    return list(islice(good, limit)), bad
