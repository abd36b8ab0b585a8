"""mini's own suite: numbers of people, conversations of several turns."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from osum_echat.evaluation.items import Item
from osum_echat.evaluation.readers import open_items
from osum_echat.evaluation.results import Result
from osum_echat.evaluation.run import Plan, run_suite
from osum_echat.evaluation.scorers.answers import Contains
from osum_echat.evaluation.suite import Suite, load_suite
from recipes.mini import dialogues, measure, people
from recipes.mini.evaluation import SUITE
from recipes.mini.evaluation import people as recordings
from recipes.mini.evaluation.__main__ import with_people
from tests.evaluation_case import tools, write_wav

SETS = Path(__file__).parents[1] / "assets" / "evaluation"


def suite_of(prefix: str) -> Suite:
    suite = load_suite(SUITE)
    return dataclasses.replace(suite, parts={name: part for name, part in suite.parts.items() if name.startswith(prefix)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The clips of the choice set as short tones, one of them too long."""
    found = tmp_path / "people"
    for number, clip in enumerate(recordings.choose("choice", 6)):
        path = write_wav(clip.path(found).with_suffix(".wav"), 13.0 if number == 0 else 0.2)
        path.rename(clip.path(found))
    (found / "kathleen").mkdir(exist_ok=True)
    return found


def heard(clip: people.Clip, rng: random.Random) -> measure.Heard:
    """A think that gets some of it right, or none at all."""
    words = " ".join(word for word in (clip.words or clip.slots).split() if rng.random() < 0.8)
    tags = {
        "gender": rng.choice(("male", "female", None)),
        "emotion": rng.choice(("neutral", "neutral", "sad", "unsure", None)),
        "age": "adult",
        "event": None,
    }
    parsed = rng.random() < 0.9
    return measure.Heard(clip, words if parsed else "", tags if parsed else dict.fromkeys(tags), parsed, "")


def test_the_suites_numbers_of_people_are_those_that_a_checkpoint_is_chosen_by(folder: Path, tmp_path: Path):
    rng, clips = random.Random(0), recordings.choose("choice", 6)
    rows = [heard(clip, rng) for clip in clips[1:]]  # the first is longer than 12 s
    results = tmp_path / "results.jsonl"
    lines = [
        {
            "id": f"{row.clip.source}/{row.clip.key}",
            "text": "I see.",
            "think": {"raw": "x", "transcript": row.words, **row.tags} if row.parsed else {},
        }
        for row in rows
    ]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    suite = with_people(suite_of("people"), folder, tmp_path, "choice", 6)
    report = run_suite(Plan(suite, str(tmp_path), tmp_path / "out", results=results))
    wanted = measure.people_numbers(rows)
    names = [name for name in wanted if name.startswith("people_")]
    assert len(names) == 6 and not report.holes()
    assert {name: report.headline[name].value for name in names} == pytest.approx({name: wanted[name] for name in names})
    assert 0 < wanted["people_unparsed"] < 100 and 0 < wanted["people_gender"] < 100
    interval = report.headline["people_gender"]
    assert interval.low is not None and interval.low < interval.value < interval.high


def test_without_the_recordings_the_suite_says_so_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    said: list[str] = []
    suite = with_people(suite_of("p"), tmp_path, tmp_path)
    suite = dataclasses.replace(suite, parts=suite.parts | suite_of("turns").parts)
    assert people.FOLDER_VARIABLE in capsys.readouterr().err
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps({"id": "dialogue_000_1", "text": "Good to know."}) + "\n")
    report = run_suite(Plan(suite, str(SETS), tmp_path / "out", limit=1, results=results, say=said.append))
    assert next(line for line in said if "'people'" in line).endswith("people.jsonl is not there")
    assert "scores the answers of part 'people', which is left out" in "\n".join(said)
    assert not any(name.startswith("people") for name in report.headline)


def test_the_packed_conversations_are_the_ones_that_are_drawn_and_their_rule_is_the_same():
    items = [item for item in open_items(SETS / "dialogues.tar.gz") if isinstance(item, Item)]
    drawn = dialogues.held_out_dialogues()
    assert len(items) == 3 * len(drawn) == 300
    rule = Contains(tools())
    for number, dialogue in enumerate(drawn):
        turns = items[3 * number : 3 * number + 3]
        assert [item.text for item in turns] == [turn.said for turn in dialogue.turns]
        assert [item.turn for item in turns] == [1, 2, 3] and len({item.dialogue_id for item in turns}) == 1
        assert [item.answer for item in turns] == [None, None, dialogue.value]
        other = next(value for value in dialogues.facts()[dialogue.fact]["values"] if value != dialogue.value)
        replies = (f"It was {dialogue.value}.", f"It was {other}.", f"{dialogue.value} or {other}", "I forgot.")
        found = [rule.score(turns[2], Result(turns[2].id, text=reply)).values["contains"][0] for reply in replies]
        assert found == [dialogue.fits(reply) for reply in replies] == [True, False, False, False]
        assert rule.score(turns[0], Result(turns[0].id, text="x")) is None
