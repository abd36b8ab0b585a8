"""SEED-TTS-eval's meta files and VoiceBench's jsonl.

``meta.lst`` (BytedanceSpeech/seed-tts-eval 752f429, README and get_wav_res_ref_text.py): ``name|text of the
prompt|prompt wav|text to say``, a fifth part (the true recording) may follow; of two parts the second is the text, of
three they are name, text, prompt. Prompts lie relative to the file.

VoiceBench (MatthewCYM/VoiceBench 5338154, README, main.py, evaluate.py): columns ``prompt`` and ``audio``, by subset
also ``reference`` (sd-qa, openbookqa, mmsu, bbh), ``id`` (bbh), ``key, instruction_id_list, kwargs`` (ifeval); results
are the same with ``response``. Exported to jsonl, ``audio`` is a path (or an object with ``path`` and, in base64,
``bytes``).

Its ``mtbench`` (hlt-lab/voicebench, config mtbench; VoiceBench's own code does not ask it, MatthewCYM/VoiceBench#3) has
``question_id, category, turns, reference, audio1, audio2``: two questions of one conversation, with answers to both or
none. It becomes two items, in groups of their own.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from osum_echat.data.paths import Resolver
from osum_echat.evaluation.items import Entry, Item, ItemError, read_lines

SUBSETS = {
    "alpacaeval_full": "open",
    "alpacaeval": "open",
    "commoneval": "open",
    "wildvoice": "open",
    "mtbench": "open",
    "openbookqa": "mcq",
    "mmsu": "mcq",
    "sd-qa": "qa",
    "ifeval": "ifeval",
    "bbh": "bbh",
    "advbench": "harm",
}
"""The eleven subsets and how VoiceBench scores each."""


def read_seed_tts(path: str) -> Iterator[Entry]:
    listing = Path(path)
    for number, line in enumerate(listing.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        parts = [part.strip() for part in line.split("|")]
        if len(parts) not in (2, 3, 4, 5):
            yield ItemError("bad_line", f"expected 2 to 5 parts between |, found {len(parts)}", path, number)
            continue
        name = parts[0].removesuffix(".wav")
        prompt_text, prompt, text = "", "", parts[1]
        if len(parts) == 3:
            prompt = parts[2]
        elif len(parts) > 3:
            prompt_text, prompt, text = parts[1:4]
        wav = listing.parent / prompt if prompt else None
        if wav is not None and not wav.is_file():
            yield ItemError("missing_file", f"prompt {wav} is not there", path, number, name)
            continue
        extra = {"true_wav": str(listing.parent / parts[4])} if len(parts) == 5 else {}
        yield Item(
            name,
            text,
            prompt_wav=None if wav is None else str(wav),
            prompt_text=prompt_text,
            extra=extra,
            source=path,
            line=number,
        )


def subset_of(path: str | Path) -> str:
    """The subset that a file's name tells: ``bbh-test.jsonl``, ``result-naive-sd-qa-usa-audio.jsonl``. Raises
    ValueError."""
    name = str(Path(path).name).lower().replace("sd_qa", "sd-qa")
    found = [subset for subset in SUBSETS if subset in name]
    if not found:
        raise ValueError(f"{path}: the file's name must hold the subset, one of {', '.join(SUBSETS)}")
    return max(found, key=len)


def read_voicebench(path: str) -> Iterator[Entry]:
    """One subset, or all ``*.jsonl`` of a folder. Where several files are of one subset (sd-qa by region, mmsu by
    field), ids have the file's name."""
    place = Path(path)
    files = sorted(place.glob("*.jsonl")) if place.is_dir() else [place]
    subsets = [subset_of(listing) for listing in files] if len(files) > 1 else []
    for listing in files:
        yield from _read_subset(listing, listing.stem if subsets and subsets.count(subset_of(listing)) > 1 else "")


def _read_subset(listing: Path, part: str = "") -> Iterator[Entry]:
    """``part``: stands in the ids, to tell several files of one subset apart."""
    named = str(listing)
    resolve = Resolver(named)
    subset: str | None = None
    for number, value in read_lines(listing):
        if isinstance(value, ItemError):
            yield value
            continue
        subset = str(value.get("subset") or subset or subset_of(listing))
        if subset == MULTI_TURN:
            yield from _turns(value, listing, number, resolve)
            continue
        id = "/".join(filter(None, (subset, part, str(value.get("id", value.get("key", number - 1))))))
        try:
            wav = _audio(value.get("audio"), resolve)
        except (FileNotFoundError, ValueError) as error:
            yield ItemError("missing_file", str(error), named, number, id)
            continue
        if not isinstance(value.get("prompt"), str):
            yield ItemError("no_text", "no column 'prompt'", named, number, id)
            continue
        reference = value.get("reference")
        rest = {name: v for name, v in value.items() if name not in ("audio", "prompt", "reference", "id", "response", "score")}
        yield Item(
            id,
            value["prompt"],
            wav,
            group=subset,
            answer=None if reference is None else str(reference),
            extra={**rest, "written_id": str(value.get("id", ""))},
            source=named,
            line=number,
        )


MULTI_TURN = "mtbench"


def _turns(value: dict[str, Any], listing: Path, number: int, resolve: Resolver) -> Iterator[Entry]:
    """The turns of a line of mtbench; a fault for each that cannot be used."""
    named = str(value.get("question_id", value.get("id", number - 1)))
    said, references = value.get("turns"), value.get("reference")
    if not isinstance(said, list) or not said or not all(isinstance(turn, str) for turn in said):
        yield ItemError("no_text", "no column 'turns' with a list of questions", str(listing), number, f"{MULTI_TURN}/{named}")
        return
    rest = {
        name: v for name, v in value.items() if name not in ("turns", "reference", "response", "score") and name[:5] != "audio"
    }
    for turn, text in enumerate(said, start=1):
        id = f"{MULTI_TURN}/{named}/{turn}"
        try:
            wav = _audio(value.get(f"audio{turn}"), resolve)
        except (FileNotFoundError, ValueError) as error:
            yield ItemError("missing_file", str(error), str(listing), number, id)
            continue
        answers = references if isinstance(references, list) else []
        yield Item(
            id,
            text,
            wav,
            group=f"{MULTI_TURN} turn {turn}",
            answer=str(answers[turn - 1]) if len(answers) >= turn and answers[turn - 1] else None,
            extra={**rest, "written_id": named},
            dialogue_id=f"{MULTI_TURN}/{named}",
            turn=turn,
            source=str(listing),
            line=number,
        )


def _audio(value: Any, resolve: Resolver) -> str | bytes | None:
    if isinstance(value, dict):
        if value.get("bytes"):
            try:
                return base64.b64decode(value["bytes"], validate=True)
            except (binascii.Error, TypeError) as error:
                raise ValueError(f"audio.bytes is not base64: {error}") from error
        value = value.get("path")
    return resolve(value) if isinstance(value, str) and value else None


def read_duplex(path: str) -> Iterator[Entry]:
    """Recordings to play to a live server."""
    from osum_echat.evaluation.duplex.run import cases

    for case in cases(Path(path)):
        yield Item(case.id, "", str(case.wav), source=path)
