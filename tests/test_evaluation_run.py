"""From a list to a report: what is asked, what is counted, what a stopped run does, and what bad input comes to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osum_echat import config as config_io
from osum_echat.audio.io import AudioError
from osum_echat.config import ConfigError
from osum_echat.evaluation import results
from osum_echat.evaluation.claim import fingerprint
from osum_echat.evaluation.generate import ask_of, generate
from osum_echat.evaluation.items import Item
from osum_echat.evaluation.parallel import join as join_shares
from osum_echat.evaluation.report import Report
from osum_echat.evaluation.results import Lines, Result, read_results
from osum_echat.evaluation.run import Plan, read_sets, run_suite
from osum_echat.evaluation.score import Row, join, score
from osum_echat.evaluation.scorers import Tools
from osum_echat.evaluation.suite import Bar, Part, Suite, known_suites, load_suite
from osum_echat.evaluation.summary import Summary, find, summarise
from osum_echat.model.checkpoint import load_model
from osum_echat.pipeline import Ask, EChat, Reply
from recipes.mini.evaluation import SUITE as MINI
from tests.evaluation_case import Listener, Parrot, Talker, item, result, think, thinking, write_list, write_wav
from tests.generation_case import DATA


def summaries(suite: Suite, out: Path, pairs: list[tuple[Item, Result]]) -> list[Summary]:
    """Numbers of a suite of one part from items and their answers."""
    rows, faults = join(suite, {"p": [one for one, _ in pairs]}, [answer for _, answer in pairs], out)
    assert not faults
    return summarise(score(suite, rows, out, lambda items: Tools(suite, items)))


def numbers(suite: Suite, out: Path, pairs: list[tuple[Item, Result]]) -> dict[str, float]:
    return {name: number.value for name, number in summaries(suite, out, pairs)[0].numbers.items()}


def plain(*scorers: str, **part: Any) -> Suite:
    return Suite("try", normalizer="own", parts={"p": Part(scorers=list(scorers), **part)})


# ---- what is asked -------------------------------------------------------------------------------------------------------------------


def test_an_item_is_asked_as_its_part_says():
    suite = plain(ask={"kind": "chat", "think": "tag", "speak": True})
    part = suite.parts["p"]
    ask = ask_of(item(wav=b"RIFF"), part, suite)
    assert (ask.wav, ask.text, ask.think, ask.speak, ask.seed) == (b"RIFF", None, "tag", True, 0)
    written = ask_of(Item("a", "a question"), part, suite)
    assert (written.wav, written.text, written.think) == (None, "a question", None)
    say = Part(ask={"kind": "speak"})
    ask = ask_of(Item("a", "say this", prompt_wav="voice.wav"), say, suite)
    assert (ask.kind, ask.text, ask.speaker) == ("speak", "say this", "voice.wav")
    task = Part(ask={"kind": "understand", "task": "<EMOTION>", "prompt": "How is {text} said?"})
    assert ask_of(item(text="hi"), task, suite).prompt == "How is hi said?"
    with pytest.raises(ValueError, match="no recording"):
        ask_of(Item("a", "x"), task, suite)


def test_every_recording_is_asked_once_in_batches_and_in_order(tmp_path: Path):
    data = write_list(tmp_path / "l.jsonl", write_wav(tmp_path / "a.wav"), 20)
    parrot = Parrot(lambda ask, n: Reply(f"answer {n}", think()))
    suite = dataclasses.replace(plain("replies", ask={"think": "tag", "speak": True}, needs=["wav"]), batch_size=8)
    report = run_suite(Plan(suite, str(data), tmp_path / "out"), parrot)
    answers, _ = read_results(tmp_path / "out" / results.FILE)
    assert [answer.text for answer in answers] == [f"answer {n}" for n in range(20)]
    assert len(parrot.asked) == 20 and all(ask.speak and ask.think == "tag" for ask in parrot.asked)
    assert report.headline["p.reply_fit"].value == 100 and report.reached == 20


def test_items_that_ask_the_same_are_asked_once_and_heard_emotions_are_kept(tmp_path: Path):
    wav = write_wav(tmp_path / "a.wav")
    data = write_list(tmp_path / "l.jsonl", wav, 2)
    sound = 0.1 * np.ones(16000, np.float32)

    def answer(ask: Ask, n: int) -> Reply:
        return Reply("<ANGER>") if ask.kind == "understand" else Reply("there, there", think(), audio=sound, sample_rate=16000)

    suite = dataclasses.replace(plain("think_tags", ask={"think": "tag", "speak": True}, listen="<EMOTION>"), items="labels")
    parrot = Parrot(answer)
    run_suite(Plan(suite, str(data), tmp_path / "out"), parrot)
    answers, _ = read_results(tmp_path / "out" / results.FILE)
    assert [ask.kind for ask in parrot.asked] == ["chat", "chat", "understand", "understand"]
    assert [a.id for a in answers] == [f"k{n}/{kind}" for n in range(2) for kind in ("gender", "age", "emotion", "multi")]
    assert {a.heard_emotion for a in answers} == {"angry"} and len({a.wav for a in answers}) == 2


def test_answers_of_another_checkpoint_or_to_other_questions_are_never_taken_for_this_ones(tmp_path: Path):
    data, out = write_list(tmp_path / "l.jsonl", write_wav(tmp_path / "a.wav"), 2), tmp_path / "out"
    weights = tmp_path / "mini" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    suite = plain("replies")

    def answered(suite: Suite, **options: Any) -> Report:
        plan = Plan(suite, str(data), out, checkpoint=fingerprint(weights.parent), **options)
        return run_suite(plan, Parrot(lambda ask, n: Reply(f"answer {n}")))

    assert answered(suite).reached == answered(suite, limit=1).reached + 1 == 2
    with pytest.raises(ConfigError, match=r"holds answers to part 'p' with other settings .*choose another --out"):
        answered(dataclasses.replace(suite, seed=7))
    assert answered(dataclasses.replace(suite, batch_size=2)).reached == 2
    weights.write_bytes(b"another")
    with pytest.raises(
        ConfigError, match=r"holds the answers of mini \(model\.safetensors, 3 bytes, .* not of mini \(.* 7 bytes"
    ):
        answered(suite)
    assert answered(suite, steps=["score"]).reached == 2  # nothing is asked


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"scorers": ["were"]}, {}, "there is no scorer 'were'"),
        ({"judge": "nobody"}, {}, "there is no judge prompt 'nobody'"),
        ({}, {"exports": ["excel"]}, "--export excel: use voicebench"),
        ({}, {"steps": ["guess"]}, "--steps guess: use generate"),
        ({}, {"limit": 0}, "--limit 0: use a number from 1 on"),
    ],
)
def test_what_is_named_wrongly_is_said_before_anything_is_asked(change: Any, options: Any, message: str, tmp_path: Path):
    data = write_list(tmp_path / "l.jsonl", write_wav(tmp_path / "a.wav"), 2)
    parrot = Parrot(lambda ask, n: Reply("x"))
    suite = Suite("try", normalizer="own", parts={"p": Part(**change)})
    with pytest.raises(ConfigError, match=message):
        run_suite(Plan(suite, str(data), tmp_path / "out", **options), parrot)
    assert not parrot.asked and not (tmp_path / "out").exists()


# ---- conversations -------------------------------------------------------------------------------------------------------------------


def write_turns(path: Path, wav: Path, dialogues: int = 2, turns: int = 3) -> Path:
    rows = [
        {"id": f"d{d}/{t}", "wav": str(wav), "text": f"turn {t}", "dialogue_id": f"d{d}", "turn": t, "answer": f"{d} {t}"}
        for t in range(turns, 0, -1)
        for d in range(dialogues)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_turns_of_a_conversation_are_asked_in_their_order_with_the_past_in_front(tmp_path: Path):
    data = write_turns(tmp_path / "d.jsonl", write_wav(tmp_path / "a.wav"))
    talker = Talker(lambda ask, n: Reply(f"{n // 3} {n % 3 + 1}", think()))
    report = run_suite(Plan(plain("contains", ask={"think": "tag", "speak": True}), str(data), tmp_path / "out"), talker)
    assert [len(session) for session in talker.sessions] == [3, 3]
    assert all(ask.speak and ask.think == "tag" for ask in talker.asked)
    assert report.headline["p.contains"].value == 100 and report.reached == 6


def test_a_checkpoint_that_takes_no_past_turns_answers_the_first_and_the_others_are_holes_with_the_reason(tmp_path: Path):
    data = write_turns(tmp_path / "d.jsonl", write_wav(tmp_path / "a.wav"))
    report = run_suite(Plan(plain("contains"), str(data), tmp_path / "out"), Talker(lambda ask, n: Reply("0 1"), past_turns=0))
    assert report.reached == 2 and report.headline["p.contains"].value == 50
    holes = {hole["id"]: hole["message"] for hole in report.holes()}
    assert len(holes) == 4 and "not learnt dialogues with 1 past turns" in holes["d0/2"]
    assert "turn 2 of conversation 'd0' was not answered: this checkpoint" in holes["d0/3"]


def test_count_refusals_as_answers_without_words_where_a_part_says_so(tmp_path: Path):
    data = write_turns(tmp_path / "d.jsonl", write_wav(tmp_path / "a.wav"))
    suite = plain("contains", "think_closed", count_refusals=True)
    report = run_suite(Plan(suite, str(data), tmp_path / "out"), Talker(lambda ask, n: Reply(f"{n} 1", think()), past_turns=0))
    assert report.headline["p.contains"].value == pytest.approx(100 / 3)
    assert find(report.summaries, "p.think_missing").value == pytest.approx(200 / 3)
    holes = report.holes()
    assert report.reached == 2 and {hole["reason"] for hole in holes} == {"refused"} and len(holes) == 4
    messages = {hole["id"]: hole["message"] for hole in holes}
    assert "counts as an answer without words: this checkpoint has not learnt dialogues" in messages["d0/2"]


def test_a_turn_that_is_too_long_for_its_session_is_refused(tmp_path: Path):
    wav = str(write_wav(tmp_path / "a.wav"))
    rows = [{"id": f"d/{n}", "wav": wav, "text": "x", "answer": "1", "dialogue_id": "d", "turn": n} for n in (1, 2)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    echat = Talker(lambda ask, n: Reply("1"))
    weights, tokenizer = load_model(DATA / "tiny.safetensors", DATA / "tiny_config.yaml")
    echat.session = lambda: EChat(weights, tokenizer).session(max_tokens=20)  # type: ignore[assignment,return-value]
    suite = plain("contains", count_refusals=True)
    report = run_suite(Plan(suite, str(tmp_path / "d.jsonl"), tmp_path / "out"), echat)
    assert report.headline["p.contains"].value == 0 and report.reached == 0
    assert [hole["reason"] for hole in report.holes()] == ["refused"] * 2
    assert "the session allows 20" in report.holes()[0]["message"]


def test_a_fault_is_no_refusal(tmp_path: Path):
    """A damaged recording, a turn that the list lacks, an error in another system's file: holes also where refusals count; too long a recording is refused."""
    wav = write_wav(tmp_path / "a.wav")
    rows = [
        {"id": name, "wav": str(write_wav(tmp_path / f"{name}.wav")), "text": "x", "answer": "1"} for name in ("damaged", "long")
    ]
    rows += [{"id": f"d/{n}", "wav": str(wav), "text": "x", "answer": "1", "dialogue_id": "d", "turn": n} for n in (2, 3)]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def answer(ask: Ask, n: int) -> Reply:
        for name, reason in (("damaged", "not_audio"), ("long", "too_long")):
            if str(ask.wav).endswith(f"{name}.wav"):
                raise AudioError(reason, f"{name}!")
        return Reply("1")

    suite = plain("contains", count_refusals=True)
    report = run_suite(Plan(suite, str(data), tmp_path / "out"), Talker(answer))
    assert {row.item.id: (bool(row.hole), bool(row.refusal)) for row in report.rows} == {
        "damaged": (True, False), "long": (False, True), "d/2": (True, False), "d/3": (True, False),
    }  # fmt: skip
    written = [json.loads(line) for line in (tmp_path / "out" / results.FILE).read_text().splitlines()]
    assert {row["id"]: row.get("refused", False) for row in written} == {
        "damaged": False,
        "long": True,
        "d/2": False,
        "d/3": False,
    }
    theirs = [Result("damaged", error="our server was down"), Result("long", error="will not", refused=True)]
    (tmp_path / "theirs.jsonl").write_text("".join(json.dumps(result.to_dict()) + "\n" for result in theirs))
    found, faults = read_results(tmp_path / "theirs.jsonl")
    joined, _ = join(suite, {"p": [Item("damaged"), Item("long")]}, found, tmp_path)
    assert not faults and [(bool(row.hole), bool(row.refusal)) for row in joined] == [(True, False), (False, True)]
    assert config_io.from_dict(Part, {"refusals_count": True}, where="an older suite").count_refusals


def test_a_conversation_that_was_stopped_goes_on_with_its_own_answers(tmp_path: Path):
    data, out = write_turns(tmp_path / "d.jsonl", write_wav(tmp_path / "a.wav")), tmp_path / "out"

    def answer(ask: Ask, n: int) -> Reply:
        if n == 4:
            raise KeyboardInterrupt
        return Reply(f"{n}")

    with pytest.raises(KeyboardInterrupt):
        run_suite(Plan(plain("contains"), str(data), out), Talker(answer))
    talker = Talker(lambda ask, n: Reply(f"again {n}"))
    run_suite(Plan(plain("contains"), str(data), out), talker)
    answers, _ = read_results(out / results.FILE)
    assert [(a.id, a.text) for a in answers] == [
        ("d0/1", "0"), ("d0/2", "1"), ("d0/3", "2"), ("d1/1", "3"), ("d1/2", "again 1"), ("d1/3", "again 2"),
    ]  # fmt: skip
    assert [len(session) for session in talker.sessions] == [3]


def test_a_turn_that_is_missing_fails_those_behind_it_and_shares_keep_conversations_whole(tmp_path: Path):
    data = write_turns(tmp_path / "d.jsonl", write_wav(tmp_path / "a.wav"), dialogues=3)
    lines = data.read_text().splitlines()
    data.write_text("\n".join(line for line in lines if '"d1/2"' not in line))
    suite = plain("contains")
    sets = read_sets(suite, str(data))
    talker = Talker(lambda ask, n: Reply("x"))
    for number in range(2):
        generate(talker, suite, sets.items, tmp_path / "out", share=(number, 2))
    shares = [read_results(tmp_path / "out" / f"results.{n}of2.jsonl")[0] for n in range(2)]
    join_shares(tmp_path / "out", 2)
    asked = len(talker.asked)
    generate(talker, suite, sets.items, tmp_path / "out", share=(0, 3))  # other shares: what is known is not asked again
    assert len(talker.asked) == asked
    assert [[a.id for a in share] for share in shares] == [["d0/1", "d0/2", "d0/3", "d2/1", "d2/2", "d2/3"], ["d1/1", "d1/3"]]
    assert "turn 2 of conversation 'd1' is not among the items" in shares[1][1].error
    data.write_text(json.dumps({"id": "x", "text": "hi", "dialogue_id": "d", "turn": "second"}) + "\n" + lines[0])
    (fault,) = read_sets(suite, str(data)).faults
    assert fault.line == 1 and "field 'turn' must be a number from 1 on, found 'second'" in str(fault)


# ---- what is counted -----------------------------------------------------------------------------------------------------------------


def test_answers_are_counted_by_words_tags_thinks_and_rule(tmp_path: Path):
    suite = plain("think_words", "think_tags", "think_parsed", "replies")
    answers = [thinking("0"), thinking("1", transcript="my dog ran"), thinking("2", text="Nice."), result("3", "no think at all")]
    items = [item("0"), item("1", emotion="happy"), item("2"), item("3")]
    values = numbers(suite, tmp_path, list(zip(items, answers, strict=True)))
    assert values["wer"] == pytest.approx(100 * (1 + 4) / 16)  # one word lost, one think lost with all its words
    assert values["emotion"] == 50 and values["age"] == 75
    assert values["think_parsed"] == 75
    assert values["reply_fit"] == 50


def test_natural_thinks_are_counted_by_end_words_and_rule(tmp_path: Path):
    wanted = dataclasses.replace(item("0"), extra={"think_str": "a man says: my dog ran away."})
    answers = [result("0", think={"raw": "a man says: my dog ran."}), result("1", "Nice.")]
    suite = plain("think_closed", "think_text", "replies")
    values = numbers(suite, tmp_path, [(wanted, answers[0]), (dataclasses.replace(wanted, id="1"), answers[1])])
    assert values["think_closed"] == 50 and values["reply_fit"] == 50
    assert values["think_wer"] == pytest.approx(100 * (1 + 7) / 14)


def test_a_part_can_score_the_answers_of_another(tmp_path: Path):
    parts = {"one": Part(scorers=["replies"]), "two": Part(scorers=["think_words"], same_as="one", take=1)}
    suite = Suite("try", normalizer="own", parts=parts)
    data = write_list(tmp_path / "l.jsonl", write_wav(tmp_path / "a.wav"), 3)
    parrot = Parrot(lambda ask, n: Reply(f"answer {n}", think(f"sentence number {n}")))
    report = run_suite(Plan(suite, str(data), tmp_path / "out"), parrot)
    assert len(parrot.asked) == 3
    assert find(report.summaries, "one.reply_fit").count == 3 and find(report.summaries, "two.wer").count == 1
    with pytest.raises(ValueError, match="there is no part nowhere before it"):
        Suite("try", parts={"one": Part(same_as="nowhere")})


def test_groups_have_numbers_of_their_own(tmp_path: Path):
    items = [dataclasses.replace(item(str(n)), group="xy"[n % 2]) for n in range(4)]
    found = summaries(
        plain("replies"), tmp_path, [(one, result(one.id, "Nice." if one.group == "x" else one.replies[0])) for one in items]
    )
    assert [(s.name, s.numbers["reply_fit"].value, s.items) for s in found] == [("p", 50, 4), ("p/x", 0, 2), ("p/y", 100, 2)]


# ---- steps, resume -------------------------------------------------------------------------------------------------------------------


def test_a_stopped_generation_goes_on_and_a_half_written_line_is_asked_again(tmp_path: Path):
    data = write_list(tmp_path / "l.jsonl", write_wav(tmp_path / "a.wav"), 6)
    suite, out = dataclasses.replace(plain("replies"), batch_size=2), tmp_path / "out"

    def answer(ask: Ask, n: int) -> Reply:
        if n == 4:
            raise KeyboardInterrupt
        return Reply(f"first {n}")

    with pytest.raises(KeyboardInterrupt):
        run_suite(Plan(suite, str(data), out), Parrot(answer))
    path = out / results.FILE
    whole = path.read_bytes()
    assert whole.count(b"\n") == 4
    path.write_bytes(whole[:-20])
    second = Parrot(lambda ask, n: Reply(f"second {n}"))
    run_suite(Plan(suite, str(data), out), second)
    answers, _ = read_results(path)
    assert [answer.text for answer in answers] == ["first 0", "first 1", "first 2", "second 0", "second 1", "second 2"]
    run_suite(Plan(suite, str(data), out), None)  # nothing is left to ask: no model is needed


def test_scores_are_kept_and_made_anew_only_where_the_answer_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from osum_echat.evaluation.scorers.answers import AllowedReplies

    suite, calls = plain("replies"), list[str]()
    plain_score = AllowedReplies.score
    monkeypatch.setattr(AllowedReplies, "score", lambda self, one, answer: calls.append(one.id) or plain_score(self, one, answer))
    items = [item("0"), item("1")]
    first = numbers(suite, tmp_path, [(items[0], result("0")), (items[1], result("1"))])
    again = numbers(suite, tmp_path, [(items[0], result("0")), (items[1], result("1"))])
    assert first == again == {"reply_fit": 100} and calls == ["0", "1"]
    assert numbers(suite, tmp_path, [(items[0], result("0")), (items[1], result("1", "Nice."))]) == {"reply_fit": 50}
    assert calls == ["0", "1", "1"]


def test_a_run_that_finds_its_scores_still_says_what_they_were_made_with(tmp_path: Path):
    data = write_list(tmp_path / "l.jsonl", write_wav(tmp_path / "a.wav"), 2)
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text("".join(json.dumps({"id": f"k{n}", "text": "x", "wav": str(tmp_path / "a.wav")}) + "\n" for n in range(2)))
    suite = plain("own_speech:item", "replies")

    def run(name: str) -> list[str]:
        heard = {"whisper-base": Listener("sentence number 0")}
        heard["whisper-base"].name = name
        return list(run_suite(Plan(suite, str(data), tmp_path / "out", results=theirs, recognisers=heard)).about)

    first, again = run("one"), run("another")
    assert first == again and "recogniser of spoken replies: one" in first and "text normalisation: own" in first
    theirs.write_text(theirs.read_text().replace('"k1", "text": "x"', '"k1", "text": "y"'))
    assert "recogniser of spoken replies: another; one" in run("another")


def test_lines_survive_a_cut_and_hold_any_text(tmp_path: Path):
    lines = Lines(tmp_path / "x" / "a.jsonl")
    with lines:
        lines.write({"a": "你\n好"})
        lines.write({"a": 2})
    lines.path.write_bytes(lines.path.read_bytes() + b'{"a": 3')
    assert list(lines.rows()) == [{"a": "你\n好"}, {"a": 2}]
    with lines:
        lines.write({"a": 4})
    assert list(lines.rows()) == [{"a": "你\n好"}, {"a": 2}, {"a": 4}]


def test_each_step_can_be_left_out(tmp_path: Path):
    data = write_list(tmp_path / "l.jsonl", write_wav(tmp_path / "a.wav"), 2)
    out = tmp_path / "out"
    run_suite(Plan(plain("replies"), str(data), out, steps=("generate",)), Parrot(lambda ask, n: Reply(f"answer {n}")))
    assert not (out / "scores.jsonl").exists()
    report = run_suite(Plan(plain("replies"), str(data), out, steps=("score",)))
    assert report.headline["p.reply_fit"].value == 100
    with pytest.raises(ConfigError, match="generate, score, judge"):
        run_suite(Plan(plain("replies"), str(data), out, steps=("guess",)))
    with pytest.raises(ValueError, match=r"results\.jsonl cannot be read"):
        run_suite(Plan(plain("replies"), str(data), tmp_path / "none", steps=("score",)))


# ---- other systems' files, bad input ---------------------------------------------------------------------------------------------------


def test_answers_of_another_system_are_scored(tmp_path: Path):
    data = write_list(tmp_path / "l.jsonl", write_wav(tmp_path / "a.wav"), 3)
    rows = [
        {"key": "k0", "response": "answer 0"},
        {"id": "k1", "text": "nonsense"},
        {"id": "k2", "text": "answer 2", "wav": "gone.wav"},
    ]
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run_suite(Plan(plain("replies"), str(data), tmp_path / "out", results=theirs))
    assert report.headline["p.reply_fit"].value == pytest.approx(200 / 3)
    assert [hole["reason"] for hole in report.holes()] == ["missing_file"] and "theirs.jsonl:3" in report.holes()[0]["message"]


def test_bad_results_are_named_counted_and_the_rest_goes_on(tmp_path: Path):
    data = write_list(tmp_path / "l.jsonl", write_wav(tmp_path / "a.wav"), 3)
    theirs = tmp_path / "theirs.jsonl"
    rows = ['{"id": "k0", "text": "answer 0"}', "not json", '{"text": "no id"}', '{"id": "k9", "text": "?"}']
    rows += ['{"id": "k1", "text": "x", "suite": "speech"}', '{"id": "k2", "text": 5}', '["list"]']
    theirs.write_text("\n".join(rows) + "\n")
    report = run_suite(Plan(plain("replies"), str(data), tmp_path / "out", results=theirs))
    reasons = [hole["reason"] for hole in report.holes()]
    assert reasons == ["bad_json", "missing_id", "other_suite", "bad_field", "bad_item", "unknown_id", "no result", "no result"]
    assert f"{theirs}:5" in report.holes()[2]["message"] and "'speech'" in report.holes()[2]["message"]
    assert report.reached == 1 and report.headline["p.reply_fit"].value == 100
    text = (tmp_path / "out" / "report.md").read_text()
    assert "8 holes" in text and f"{theirs}:2" in text


@pytest.mark.parametrize(
    ("field", "value"),
    [("wav", 5), ("seconds", "long"), ("seconds", True), ("think", [1]), ("think", 2.5), ("tags", []), ("finish", {}), ("timings", "x"), ("heard_emotion", 1)],
)  # fmt: skip
def test_a_field_of_another_type_is_named_and_the_rest_goes_on(tmp_path: Path, field: str, value: Any):
    data = write_list(tmp_path / "l.jsonl", write_wav(tmp_path / "a.wav"), 2)
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text(f"{json.dumps({'id': 'k0', 'text': 'x', field: value})}\n{json.dumps({'id': 'k1', 'text': 'answer 1'})}\n")
    report = run_suite(Plan(plain("replies", "seconds", "live"), str(data), tmp_path / "out", results=theirs))
    assert [hole["reason"] for hole in report.holes()] == ["bad_field", "no result"] and report.reached == 1
    assert f"{theirs}:1" in report.holes()[0]["message"] and repr(field) in report.holes()[0]["message"]


def test_numbers_that_are_none_and_turns_that_are_no_list_are_named(tmp_path: Path):
    data = write_list(tmp_path / "l.jsonl", write_wav(tmp_path / "a.wav"), 4)
    theirs = tmp_path / "theirs.jsonl"
    rows = [
        '"seconds": NaN',
        '"timings": {"total": 1e999}',
        '"timings": {"turns": [1]}',
        '"timings": {"turns": [{"kind": "say"}]}',
    ]
    theirs.write_text("".join(f'{{"id": "k{n}", "text": "x", {row}}}\n' for n, row in enumerate(rows)))
    report = run_suite(Plan(plain("live"), str(data), tmp_path / "out", results=theirs))
    assert [hole["reason"] for hole in report.holes()] == ["bad_json", "bad_field", "no result", "no result", "not scored"]
    assert "timings.turns must be a list" in report.holes()[-1]["message"] and report.headline["p.answered"].value == 0


def test_the_live_suite_says_which_command_holds_conversations(tmp_path: Path):
    write_wav(tmp_path / "in" / "a.wav")
    with pytest.raises(ConfigError, match="osum-echat duplex --url"):
        run_suite(Plan(load_suite("live"), str(tmp_path / "in"), tmp_path / "out"), Parrot([]))


def test_a_recording_that_is_no_audio_spoils_only_itself(tmp_path: Path):
    wav = write_wav(tmp_path / "a.wav")
    data = write_list(tmp_path / "l.jsonl", wav, 4)
    (tmp_path / "bad.wav").write_bytes(b"nothing")
    lines = data.read_text().splitlines()
    lines[2] = lines[2].replace(str(wav), str(tmp_path / "bad.wav"))
    data.write_text("\n".join(lines) + "\n")

    class Picky(Parrot):
        def batch(self, asks: list[Ask], size: int = 16) -> list[Reply]:
            if any(ask.wav == str(tmp_path / "bad.wav") for ask in asks):
                raise ValueError("bad.wav is not audio")
            return [Reply(f"answer {Path(str(ask.wav)).stem}") for ask in asks]

    report = run_suite(Plan(plain("replies"), str(data), tmp_path / "out"), Picky([]))
    assert report.reached == 3 and [row.hole for row in report.rows if row.hole] == ["not answered: bad.wav is not audio"]
    assert report.summaries[0].holes == {"not answered": 1}


def test_a_line_without_its_label_is_named_where_others_have_it(tmp_path: Path):
    wav = write_wav(tmp_path / "a.wav")
    data = write_list(tmp_path / "l.jsonl", wav, 3)
    lines = data.read_text().splitlines()
    row = json.loads(lines[1])
    del row["extra"]["emotion"]
    lines[1] = json.dumps(row)
    data.write_text("\n".join(lines) + "\n")
    sets = read_sets(load_suite("understanding"), str(data))
    assert [len(items) for items in sets.items.values()] == [3, 2, 3, 3, 3]
    assert [(fault.reason, fault.line) for fault in sets.faults] == [("no_label.emotion", 2)]


def test_parts_that_a_list_has_nothing_for_are_left_out_and_said(tmp_path: Path):
    data = tmp_path / "l.jsonl"
    data.write_text(json.dumps({"key": "a", "wav": str(write_wav(tmp_path / "a.wav")), "txt": "hi"}) + "\n")
    sets = read_sets(load_suite("understanding"), str(data))
    assert list(sets.items) == ["words"] and set(sets.skipped) == {"emotion", "gender", "age", "event"} and not sets.faults
    with pytest.raises(ValueError, match="finds nothing to do"):
        read_sets(Suite("x", parts={"p": Part(needs=["label.emotion"])}), str(data))


def test_a_scorer_that_is_not_installed_is_named_and_the_others_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from osum_echat.evaluation import ScorerUnavailable, recogniser

    def missing(*_: Any, **__: Any) -> None:
        raise ScorerUnavailable("pip install it")

    monkeypatch.setattr(recogniser, "load", missing)
    data = write_list(tmp_path / "l.jsonl", write_wav(tmp_path / "a.wav"), 2)
    sound = Reply("answer 0", audio=0.1 * np.ones(16000, np.float32), sample_rate=16000)
    report = run_suite(Plan(plain("own_speech:reply", "replies"), str(data), tmp_path / "out"), Parrot(lambda ask, n: sound))
    assert report.unavailable == {"own_speech:reply": "pip install it"} and report.headline["p.reply_fit"].value == 50
    assert "not scored by own_speech:reply: pip install it" in (tmp_path / "out" / "report.md").read_text()


# ---- suites as data ------------------------------------------------------------------------------------------------------------------


def test_every_suite_of_the_library_and_of_mini_is_whole():
    assert set(known_suites()) >= {"understanding", "speech", "dialogue", "empathy", "latency"}
    for name in (*known_suites(), str(MINI)):
        suite = load_suite(name)
        for part in suite.parts.values():
            kit = Tools(suite)
            kit.__dict__ |= {"dnsmos": None, "speaker_nets": {}}
            from osum_echat.evaluation.scorers import make

            made = make([spec for spec in part.scorers if spec != "ifeval"], kit)
            assert len(made) == len([spec for spec in part.scorers if spec != "ifeval"])
        for path in suite.headline.values():
            assert path.rpartition(".")[0].partition("/")[0] in suite.parts, path


def test_a_suite_is_changed_on_the_command_line_and_a_wrong_key_is_an_error():
    suite = load_suite("understanding", ["normalizer=own", "parts.words.take=3", "seed=7"])
    assert (suite.normalizer, suite.parts["words"].take, suite.seed) == ("own", 3, 7)
    with pytest.raises(ConfigError, match="did you mean seed"):
        load_suite("understanding", ["sead=7"])
    with pytest.raises(ConfigError, match=r"parts\.say: there is no such part to change; parts are words"):
        load_suite("understanding", ["parts.say.take=3"])
    with pytest.raises(ConfigError, match="there is no suite 'x'"):
        load_suite("x")
    with pytest.raises(ValueError, match=r"ask has unknown key\(s\) tempo"):
        Part(ask={"tempo": 2})


def test_bars_name_every_number_that_the_model_card_shows():
    wanted = "wer wer_handwritten wer_new_voices gender age emotion event gender_new_voices age_new_voices emotion_new_voices "
    wanted += "event_new_voices think_parsed reply_fit reply_fit_handwritten reply_fit_turns spoken_reply_wer tts_wer dnsmos "
    wanted += "people_read_wer people_order_recall people_gender people_neutral people_unsure people_unparsed"
    suite = load_suite(MINI)
    assert set(wanted.split()) == set(suite.bars) == set(suite.headline)


@pytest.mark.parametrize(("value", "verdict"), [(3, "aim reached"), (8, "bar reached"), (12, "below the bar")])
def test_error_rates_are_better_when_lower(value: float, verdict: str):
    assert Bar(10, 4, lower_is_better=True).verdict(value) == verdict


# ---- report --------------------------------------------------------------------------------------------------------------------------


def reported(tmp_path: Path, change: Callable[[Suite], Suite] = lambda suite: suite) -> tuple[Report, Path]:
    suite = plain("think_words", "think_tags", "replies")
    suite.headline = {"wer": "p.wer", "emotion": "p.emotion"}
    suite.bars = load_suite(MINI).bars
    suite = change(suite)
    items = [item("a"), item("b", wav=str(write_wav(tmp_path / "said.wav")))]
    answers = [thinking("a"), thinking("b", transcript="my dog", emotion="happy")]
    answers[1].wav = str(write_wav(tmp_path / "reply.wav"))
    rows, _ = join(suite, {"p": items}, answers, tmp_path)
    found = score(suite, rows, tmp_path / "out", lambda its: Tools(suite, its))
    report = Report(suite, "Try <one>", summarise(found), rows, ["recogniser: nobody"])
    report.write(tmp_path / "out")
    return report, tmp_path / "out"


def test_report_shows_numbers_sets_pictures_and_examples(tmp_path: Path):
    _, out = reported(tmp_path)
    text = (out / "report.md").read_text()
    assert "| wer | 25.00 | 0.00 to 50.00 | 2 | 5 | 3 | below the bar |" in text
    assert "| emotion | 50.00 | 0.00 to 100.00 | 2 | 93 | 98 | below the bar |" in text
    assert "my dog ran away" in text and "recogniser: nobody" in text
    assert (out / "confusion_p.png").stat().st_size > 1000 and (out / "bars.png").exists()
    data = json.loads((out / "report.json").read_text())
    assert data["headline"] == {"wer": 25.0, "emotion": 50.0}
    confusion = data["summaries"][0]["confusions"]["emotion"]
    assert confusion["labels"] == ["happy", "sad"] and confusion["matrix"] == [[0, 0], [1, 1]]
    assert confusion["each"]["sad"] == {"recall": 0.5, "precision": 1.0}


def test_the_page_is_one_file_with_sound_pictures_and_nothing_from_elsewhere(tmp_path: Path):
    _, out = reported(tmp_path)
    page = (out / "report.html").read_text()
    assert page.count("data:audio/ogg;base64,") == 2 and page.count("data:image/png;base64,") == 2
    assert "Try &lt;one&gt;" in page and "<one>" not in page and "built-in method" not in page
    data = json.loads((out / "report.json").read_text())["summaries"][0]
    name = next(iter(data["numbers"]))
    assert f'<td>{data["part"]}</td><td class="n">{data["items"]}</td>' in page and f"<td>{name}</td>" in page
    assert "http://" not in page and "https://" not in page and 'src="' in page


def test_published_numbers_are_shown_beside(tmp_path: Path):
    from osum_echat.evaluation.run import paper

    report, _ = reported(tmp_path)
    report.paper = paper("empathy")
    report.write(tmp_path / "beside")
    text = (tmp_path / "beside" / "report.md").read_text()
    assert "| OSUM-EChat | 58 | 63.1 | 62.7 | 87.1 | 72 |" in text and "| Qwen2.5-Omni | 44.8 | 52.6 | 43.3 | - | 63.7 |" in text
    assert "<td>OSUM-EChat</td>" in (tmp_path / "beside" / "report.html").read_text()
    with pytest.raises(ConfigError, match="no table 'x'"):
        paper("x")
    for name in known_suites():
        assert not load_suite(name).paper or paper(load_suite(name).paper)["rows"]


def test_worst_and_best_answers_are_shown_and_holes_are_not(tmp_path: Path):
    from osum_echat.evaluation.report import chosen_examples

    rows = [Row("p", item(str(n)), result(str(n))) for n in range(50)]
    for n, row in enumerate(rows):
        row.score.values["wer"] = (n, 50)
    rows.append(Row("p", item("hole"), None, hole="no result"))
    chosen = [row.item.id for row in chosen_examples(rows)]
    assert chosen == [str(n) for n in range(49, 29, -1)] + [str(n) for n in range(20)]
