"""A run's answers in the forms that other kits read.

| name | file | read by |
|---|---|---|
| voicebench | ``SUBSET.jsonl``: the item's columns and ``response`` (mtbench: a list, one a turn) | VoiceBench's evaluate.py (MatthewCYM/VoiceBench 5338154, main.py) |
| kimi | ``SUBSET.jsonl``: ``index, audio_path, question, answer, subset, audio_content, prompt, prediction, real_prompt``, for ifeval also ``instruction, instruction_kwargs`` | Kimi-Audio-Evalkit (MoonshotAI, 4080c49: datasets/base.py, ds_refqa.py, ds_openqa.py, run_audio.py) |
| eibench | ``task3.jsonl``: ``dialogue_id, turns[{input_emotion, input_text, response_text, response_audio}]`` | HumDial-EIBench (ASLP-lab, README 089e3a2; duduke321, eval/eval_task3.py bf953cf) |
| mtalk | ``mtalk.json``: ``{information: [[{question, dialogue, question_transcription, dialogue_transcription}]]}`` | MTalk-Bench (FreedomIntelligence, eff34a2: data/sample.json, src/audio_rubric_based.py) |
| versa | ``wav.scp`` and ``text``: ``id path`` and ``id words`` | VERSA (``--pred wav.scp --text text``) |
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from osum_echat.config import ConfigError
from osum_echat.evaluation.score import Row

_INFORMATION = {"para": "Paralinguistic information", "sem": "Semantic information", "amb": "Ambient sound"}
_TURN = re.compile(r"^(?P<dialogue>.*?)[-_/]?turn[-_]?(?P<turn>\d+)(?P<kind>.*)$", re.IGNORECASE)


def export(rows: Sequence[Row], out: Path, names: Iterable[str], system: str) -> list[Path]:
    """Write the named forms below ``out``; a form that finds nothing to write is left out. Raises ConfigError for an
    unknown name."""
    made: list[Path] = []
    answered = [row for row in rows if row.result is not None and not row.hole]
    for name in names:
        if name not in EXPORTS:
            raise ConfigError(f"--export {name}: use {', '.join(EXPORTS)}")
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        made += EXPORTS[name](answered, folder, system)
    return made


def _subsets(rows: Sequence[Row]) -> dict[str, list[Row]]:
    out: dict[str, list[Row]] = {}
    for row in rows:
        out.setdefault(row.item.group or row.part, []).append(row)
    return out


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def _voicebench(rows: Sequence[Row], folder: Path, system: str) -> list[Path]:
    name = quote(system, safe="")
    alone = [row for row in rows if not row.item.dialogue_id]
    made = {subset: list(map(_voicebench_line, found)) for subset, found in _subsets(alone).items()}
    talks = [row for row in rows if row.item.dialogue_id]
    if talks:
        made["mtbench"] = [_voicebench_turns(turns) for turns in _dialogues(talks).values()]
    return [_write_lines(folder / f"{name}-{quote(subset, safe='')}-test-audio.jsonl", lines) for subset, lines in made.items()]


def _voicebench_line(row: Row) -> dict[str, Any]:
    assert row.result is not None
    extra = {name: value for name, value in row.item.extra.items() if name not in ("written_id", "subset")}
    out: dict[str, Any] = {"prompt": row.item.text, **extra, "response": row.result.text}
    if row.item.answer is not None:
        out["reference"] = row.item.answer
    if row.item.extra.get("written_id"):
        out["id"] = row.item.extra["written_id"]
    return out


def _voicebench_turns(turns: Sequence[Row]) -> dict[str, Any]:
    """A conversation of mtbench: its columns, and the answers as a list beside ``turns``."""
    extra = {name: value for name, value in turns[0].item.extra.items() if name not in ("written_id", "subset")}
    references = [row.item.answer for row in turns]
    return {
        **extra,
        "turns": [row.item.text for row in turns],
        "reference": references if any(references) else None,
        "response": [row.result.text for row in turns if row.result is not None],
    }


def _kimi(rows: Sequence[Row], folder: Path, system: str) -> list[Path]:
    def line(index: int, row: Row, subset: str) -> dict[str, Any]:
        assert row.result is not None
        out = {
            "index": index,
            "audio_path": _place(row.item.wav),
            "question": "",
            "answer": _truth(row),
            "subset": subset,
            "audio_content": row.item.text,
            "prompt": row.item.text,
            "prediction": row.result.text,
            "real_prompt": "",
        }
        named = {"instruction_id_list": "instruction", "kwargs": "instruction_kwargs"}
        return out | {theirs: row.item.extra[ours] for ours, theirs in named.items() if ours in row.item.extra}

    return [
        _write_lines(
            folder / f"{quote(system, safe='')}_{quote(subset, safe='')}.jsonl",
            (line(n, row, subset) for n, row in enumerate(found)),
        )
        for subset, found in _subsets(rows).items()
    ]


def _truth(row: Row) -> str:
    """The answer that is right: the item's, else the label that was asked for, else (recognition) its words; "" for
    open questions."""
    if row.item.answer is not None:
        return row.item.answer
    if len(row.score.pairs) == 1:
        return next(true for true, _ in row.score.pairs.values())
    return row.item.text if "wer" in row.score.values else ""


def _place(wav: str | bytes | None) -> str:
    """Where a recording lies, for a program that runs elsewhere; "" when it is no file of its own."""
    return str(Path(wav).resolve()) if isinstance(wav, str) and wav and "://" not in wav else wav if isinstance(wav, str) else ""


def turn_of(row: Row) -> tuple[str, int]:
    """(dialogue, turn) of an item: its ``dialogue_id`` and ``turn``, or an id such as ``1-4-turn2_para`` (dialogue
    ``1-4_para``; ``1-4_sem`` is another); else a dialogue of one turn."""
    if row.item.dialogue_id:
        return row.item.dialogue_id, row.item.turn
    match = _TURN.match(row.item.id)
    return (match.group("dialogue") + match.group("kind"), int(match.group("turn"))) if match else (row.item.id, 1)


def _dialogues(rows: Sequence[Row]) -> dict[str, list[Row]]:
    out: dict[str, list[Row]] = {}
    for row in rows:
        out.setdefault(turn_of(row)[0], []).append(row)
    return {name: sorted(turns, key=lambda row: turn_of(row)[1]) for name, turns in out.items()}


def _eibench(rows: Sequence[Row], folder: Path, system: str) -> list[Path]:
    def turn(row: Row) -> dict[str, Any]:
        assert row.result is not None
        return {
            "input_emotion": row.item.labels.get("emotion", "neutral"),
            "input_text": row.item.text,
            "response_text": row.result.text,
            "response_audio": _place(row.result.wav),
        }

    lines = ({"dialogue_id": name, "turns": list(map(turn, turns))} for name, turns in _dialogues(rows).items())
    return [_write_lines(folder / "task3.jsonl", lines)]


def _mtalk(rows: Sequence[Row], folder: Path, system: str) -> list[Path]:
    def turn(row: Row) -> dict[str, Any]:
        assert row.result is not None
        return {
            "question": row.item.wav if isinstance(row.item.wav, str) else "",
            "dialogue": {system: _place(row.result.wav)},
            "question_transcription": row.item.text,
            "dialogue_transcription": {system: row.result.text},
        }

    out: dict[str, list[list[dict[str, Any]]]] = {}
    for turns in _dialogues(rows).values():
        ending = turns[0].item.id.rpartition("_")[2].lower()
        kind = str(turns[0].item.extra.get("information") or _INFORMATION.get(ending, _INFORMATION["para"]))
        out.setdefault(kind, []).append(list(map(turn, turns)))
    path = folder / "mtalk.json"
    path.write_text(json.dumps(out, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return [path]


def _versa(rows: Sequence[Row], folder: Path, system: str) -> list[Path]:
    spoken = [row for row in rows if row.result is not None and row.result.wav]
    if not spoken:
        return []
    scp, text = folder / "wav.scp", folder / "text"
    keys = [re.sub(r"\s", "_", f"{row.part}-{row.item.id}") for row in spoken]
    scp.write_text(
        "".join(f"{key} {_place(row.result.wav)}\n" for key, row in zip(keys, spoken, strict=True) if row.result),
        encoding="utf-8",
    )
    words = [" ".join((row.result.text or row.item.text).split()) for row in spoken if row.result]
    text.write_text("".join(f"{key} {line}\n" for key, line in zip(keys, words, strict=True)), encoding="utf-8")
    return [scp, text]


EXPORTS: dict[str, Callable[[Sequence[Row], Path, str], list[Path]]] = {
    "voicebench": _voicebench,
    "kimi": _kimi,
    "eibench": _eibench,
    "mtalk": _mtalk,
    "versa": _versa,
}
