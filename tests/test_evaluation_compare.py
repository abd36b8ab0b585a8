"""Two runs side by side, and answers in the forms of other kits."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from osum_echat.config import ConfigError
from osum_echat.evaluation import compare
from osum_echat.evaluation.exports import EXPORTS, export, turn_of
from osum_echat.evaluation.items import Item
from osum_echat.evaluation.run import Plan, run_suite
from osum_echat.evaluation.score import Row
from osum_echat.evaluation.scorers import Score
from osum_echat.evaluation.suite import Part, Suite
from tests.evaluation_case import result, write_wav

COUNT = 120


def system(folder: Path, name: str, right: float, seed: int, data: Path) -> Path:
    """A made-up system: so many of its answers and tags are right, words are lost in the others."""
    rng = random.Random(seed)
    rows = []
    for n in range(COUNT):
        good = rng.random() < right
        think = {
            "raw": "x",
            "transcript": f"this is sentence {n}" if good else "this sentence",
            "emotion": "sad" if good else "happy",
        }
        rows.append({"id": f"k{n}", "text": f"answer {n}" if good else "hm", "think": think})
    answers = folder / f"{name}.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = Suite("try", normalizer="own", parts={"p": Part(scorers=["think_words", "think_tags", "replies"])})
    run_suite(Plan(suite, str(data), folder / name, system=name, results=answers))
    return folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "items.jsonl"
    rows = [
        {"id": f"k{n}", "text": f"this is sentence {n}", "labels": {"emotion": "sad"}, "replies": [f"answer {n}"]}
        for n in range(COUNT)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {"worse": (0.6, 1), "better": (0.85, 2), "twin": (0.6, 3)}
    return {name: system(folder, name, right, seed, data) for name, (right, seed) in made.items()}


def by_measure(a: Path, b: Path) -> dict[str, compare.Compared]:
    return {one.measure: one for one in compare.compare(a, b)[0]}


def test_a_better_and_a_worse_system_are_told_apart_with_an_interval(runs: dict[str, Path]):
    found = by_measure(runs["worse"], runs["better"])
    assert {name: one.verdict for name, one in found.items()} == dict.fromkeys(
        ("wer", "emotion", "emotion_f1", "reply_fit"), "B is better"
    )
    assert found["wer"].difference.high < 0 < found["reply_fit"].difference.low
    report = json.loads((runs["better"] / "report.json").read_text())["summaries"][0]["numbers"]
    assert (found["emotion_f1"].b, found["emotion"].b) == pytest.approx(
        [report[name]["value"] for name in ("emotion_f1", "emotion")], abs=1e-4
    )
    assert found["reply_fit"].difference.count == COUNT and found["reply_fit"].difference.p < 0.01
    back = by_measure(runs["better"], runs["worse"])
    assert back["wer"].verdict == "A is better" and back["wer"].difference.value == pytest.approx(-found["wer"].difference.value)


def test_two_runs_of_equally_good_systems_are_not_told_apart(runs: dict[str, Path]):
    found = by_measure(runs["worse"], runs["twin"])
    assert {one.verdict for one in found.values()} == {"no difference seen"}
    assert all(one.difference.low < 0 < one.difference.high for one in found.values())
    same = by_measure(runs["worse"], runs["worse"])
    assert all(one.difference.value == 0 and one.verdict == "no difference seen" for one in same.values())


def test_the_comparison_is_written_to_read(runs: dict[str, Path], tmp_path: Path):
    text = compare.write(runs["worse"], runs["better"], tmp_path).read_text()
    assert text.startswith("# A: worse (worse), B: better (better)") and "| p | reply_fit |" in text and "B is better" in text
    data = json.loads((tmp_path / "compare.json").read_text())
    assert {row["measure"] for row in data["measures"]} == {"wer", "emotion", "emotion_f1", "reply_fit"}
    assert any("A only: answers from worse.jsonl" in remark for remark in data["remarks"])
    assert "B is better" in (tmp_path / "compare.html").read_text()


def test_only_runs_of_one_suite_with_common_items_are_compared(runs: dict[str, Path], tmp_path: Path):
    with pytest.raises(ValueError, match=r"not the folder of a run: report\.json"):
        compare.compare(tmp_path, runs["worse"])
    with pytest.raises(ValueError, match="it holds runs of several suites, name one: better, twin, worse"):
        compare.compare(runs["worse"].parent, runs["worse"])
    other = tmp_path / "other"
    other.mkdir()
    (other / "report.json").write_text(json.dumps({"suite": "speech", "system": "x", "about": [], "summaries": []}))
    with pytest.raises(ValueError, match="of suite try"):
        compare.compare(runs["worse"], other)
    (other / "report.json").write_text(json.dumps({"suite": "try", "system": "x", "about": [], "summaries": []}))
    with pytest.raises(ValueError, match="no two items in common"):
        compare.compare(runs["worse"], other)


# ---- exports -------------------------------------------------------------------------------------------------------------------------


def rows(folder: Path) -> list[Row]:
    wav = str(write_wav(folder / "reply.wav"))
    extra: dict[str, Any] = {"written_id": "q7", "key": 3}
    vb = Item("mmsu/q7", "Which one? A. B. C. D.", "in.wav", group="mmsu", answer="B", extra=extra)
    turns = [Item(f"1-4-turn{n}_para", f"turn {n}", f"{n}.wav", {"emotion": "sad"}) for n in (2, 1)]
    return [
        Row("choice", vb, result(vb.id, "It is B.")),
        *(Row("talk", one, result(one.id, f"reply to {one.text}", wav=wav)) for one in turns),
        Row("talk", Item("hole", "x"), None, hole="no result"),
    ]


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_voicebench_gets_its_columns_and_the_response(tmp_path: Path):
    made = {path.name: path for path in export(rows(tmp_path), tmp_path, ["voicebench"], "mini")}
    assert set(made) == {"mini-mmsu-test-audio.jsonl", "mini-talk-test-audio.jsonl"}
    (line,) = lines(made["mini-mmsu-test-audio.jsonl"])
    assert line == {"prompt": "Which one? A. B. C. D.", "key": 3, "response": "It is B.", "reference": "B", "id": "q7"}


def test_conversations_of_mtbench_are_one_line_with_a_response_a_turn(tmp_path: Path):
    extra = {"question_id": 81, "category": "math", "written_id": "81"}
    said = [
        Item(f"m/{n}", f"q{n}", answer=f"{n}", extra=extra, dialogue_id="m", turn=n, group=f"mtbench turn {n}") for n in (2, 1)
    ]
    (path,) = export([Row("turns", one, result(one.id, f"a{one.turn}")) for one in said], tmp_path, ["voicebench"], "mini")
    wanted = {"question_id": 81, "category": "math", "turns": ["q1", "q2"], "reference": ["1", "2"], "response": ["a1", "a2"]}
    assert path.name == "mini-mtbench-test-audio.jsonl" and lines(path) == [wanted]


def test_kimi_audio_evalkit_gets_its_fields(tmp_path: Path):
    made = {path.name: path for path in export(rows(tmp_path), tmp_path, ["kimi"], "mini")}
    (line,) = lines(made["mini_mmsu.jsonl"])
    assert line["prediction"] == "It is B." and line["answer"] == "B" and line["index"] == 0
    assert line["audio_path"] == str(Path("in.wav").resolve())
    assert {"question", "subset", "audio_content", "prompt", "real_prompt"} <= line.keys()
    written = Item(
        "ifeval/3", "No commas.", group="ifeval", extra={"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    )
    said, felt = Item("a", "hello there", "a.wav"), Item("b", "hi", "b.wav", {"emotion": "sad"})
    marked = [
        Row("i", written, result(written.id, "ok")),
        Row("words", said, result("a", "hello"), Score({"wer": (1, 2)})),
        Row("emotion", felt, result("b", "<HAPPY>"), Score(pairs={"emotion": ("sad", "happy")})),
    ]
    made = {path.name: lines(path)[0] for path in export(marked, tmp_path, ["kimi"], "m")}
    assert made["m_ifeval.jsonl"]["instruction"] == ["punctuation:no_comma"] and made["m_ifeval.jsonl"]["instruction_kwargs"] == [
        {}
    ]
    assert [made[f"m_{name}.jsonl"]["answer"] for name in ("ifeval", "words", "emotion")] == ["", "hello there", "sad"]


def test_dialogues_are_put_together_turn_by_turn(tmp_path: Path):
    (path,) = export(rows(tmp_path)[1:], tmp_path, ["eibench"], "mini")
    (dialogue,) = lines(path)
    assert [turn["input_text"] for turn in dialogue["turns"]] == ["turn 1", "turn 2"]
    assert dialogue["turns"][0]["input_emotion"] == "sad" and dialogue["turns"][0]["response_text"] == "reply to turn 1"
    assert Path(dialogue["turns"][0]["response_audio"]).is_file()
    (path,) = export(rows(tmp_path)[1:], tmp_path, ["mtalk"], "mini")
    ((turns,),) = json.loads(path.read_text()).values()
    assert [turn["question_transcription"] for turn in turns] == ["turn 1", "turn 2"]
    assert turns[1]["dialogue_transcription"] == {"mini": "reply to turn 2"} and turns[1]["dialogue"]["mini"].endswith(
        "reply.wav"
    )
    assert list(json.loads(path.read_text())) == ["Paralinguistic information"]


def test_dialogues_of_one_number_and_several_kinds_are_kept_apart_as_mtalk_names_them(tmp_path: Path):
    """Ids and headings as in MTalk-Bench's data/sample.json (eff34a2)."""
    said = [Item(f"1-1-turn{turn}_{kind}", f"{kind} {turn}") for turn in (1, 2) for kind in ("para", "sem", "amb")]
    (path,) = export([Row("talk", one, result(one.id, "x")) for one in said], tmp_path, ["mtalk"], "mini")
    made = json.loads(path.read_text())
    assert list(made) == ["Paralinguistic information", "Semantic information", "Ambient sound"]
    assert [[turn["question_transcription"] for turn in turns] for (turns,) in made.values()] == [
        ["para 1", "para 2"], ["sem 1", "sem 2"], ["amb 1", "amb 2"],
    ]  # fmt: skip
    assert turn_of(Row("t", said[0])) == ("1-1_para", 1)


def test_versa_gets_pairs_of_key_and_path_and_of_key_and_words(tmp_path: Path):
    made = {path.name: path for path in export(rows(tmp_path), tmp_path, ["versa"], "mini")}
    scp = [line.split(" ", 1) for line in made["wav.scp"].read_text().splitlines()]
    text = [line.split(" ", 1) for line in made["text"].read_text().splitlines()]
    assert [key for key, _ in scp] == [key for key, _ in text] == ["talk-1-4-turn2_para", "talk-1-4-turn1_para"]
    assert all(Path(path).is_file() for _, path in scp) and text[0][1] == "reply to turn 2"


def test_an_unknown_form_is_an_error_and_nothing_to_write_is_none(tmp_path: Path):
    with pytest.raises(ConfigError, match=", ".join(EXPORTS)):
        export([], tmp_path, ["x"], "mini")
    assert export([], tmp_path, ["versa"], "mini") == []
