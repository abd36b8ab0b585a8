"""The generate step on an engine writes what the step of one process writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from osum_echat.batch.local import LocalEngine
from osum_echat.evaluation.generate import generate
from osum_echat.evaluation.on_engine import generate_on_engine, units_of
from osum_echat.evaluation.results import FILE, Lines
from osum_echat.evaluation.run import Plan, read_sets, run_suite
from osum_echat.evaluation.suite import Part, Suite
from osum_echat.pipeline import Ask, Reply
from tests.evaluation_case import Talker, think, write_list, write_wav


def answer(ask: Ask, _: int) -> Reply:
    """Depends on the question alone."""
    if ask.text == "sentence number 3":
        raise ValueError("cannot be said")
    sound = 0.1 * np.ones(1600, np.float32) if ask.mode.speaks else None
    return Reply(f"answer to {ask.text or ask.kind}", think(), audio=sound, sample_rate=16_000)


SUITE = Suite(
    "try",
    normalizer="own",
    batch_size=4,
    items="labels",
    parts={
        "ask": Part(scorers=["replies"], ask={"think": "tag", "speak": True}),
        "say": Part(scorers=["replies"], ask={"kind": "speak"}),
        "same": Part(scorers=["replies"], same_as="ask"),
    },
)


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows = [
        {name: value for name, value in row.items() if name not in ("seconds", "timings")} for row in Lines(out / FILE).rows()
    ]
    return sorted(rows, key=lambda row: (row["part"], row["id"]))


def test_the_same_results_and_files_come_from_an_engine_and_a_stopped_run_goes_on(tmp_path: Path) -> None:
    data = str(write_list(tmp_path / "l.jsonl", write_wav(tmp_path / "a.wav"), 6))
    sets = read_sets(SUITE, data).items
    generate(Talker(answer), SUITE, sets, tmp_path / "one")  # type: ignore[arg-type]
    loaded: list[Talker] = []

    def load(device: str) -> Any:
        assert device == "cpu"
        loaded.append(Talker(answer))
        return loaded[-1]

    engine = LocalEngine("cpu", block_size=5)
    generate_on_engine(engine, load, SUITE, sets, tmp_path / "two")
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "one") and len(rows_of(tmp_path / "one")) == 48
    assert sum("error" in row for row in rows_of(tmp_path / "two")) == 4
    sounds = [sorted(p.relative_to(tmp_path / out) for p in (tmp_path / out).rglob("*.wav")) for out in ("one", "two")]
    assert sounds[0] == sounds[1] and sounds[0], "one wav file for each answer"

    path = tmp_path / "two" / FILE
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:10]))
    run_suite(Plan(SUITE, data, tmp_path / "two", steps=("generate",), engine=engine, load=load))
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "one") and path.read_bytes().startswith(b"".join(lines[:10]))
    assert len(loaded) == 2 and len(loaded[1].asked) < len(loaded[0].asked), "what is written is not asked again"


def test_turns_of_a_conversation_and_items_that_ask_the_same_stay_together(tmp_path: Path) -> None:
    data = str(write_list(tmp_path / "l.jsonl", write_wav(tmp_path / "a.wav"), 2))
    sets = read_sets(SUITE, data).items
    sets["say"] = [dataclasses.replace(item, dialogue_id="d") for item in sets["say"]]
    units = units_of(SUITE, sets)
    assert [(unit.payload[0], len(unit.payload[1])) for unit in units] == [("ask", 4), ("ask", 4), ("say", 8)]
    assert [unit.number for unit in units] == [0, 1, 2]
