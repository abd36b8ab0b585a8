"""Sentences outside the topics and conversations: what is said, and the rules that judge an answer."""

from __future__ import annotations

import random

import pytest

from recipes.mini import dialogues, open_replies, prepare, texts

OPEN = [line.strip() for line in (texts.HERE / "held_out" / "open.txt").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("sentence", "kind"),
    [
        ("what does a plumber earn", "question"),
        ("is there water on jupiter", "question"),
        ("could you count backwards", "request"),
        ("please lower the curtain", "request"),
        ("can i have a small latte", "request"),
        ("the king wrote poems", "statement"),
        ("thank you so much", "small_talk"),
        ("what is your name", "small_talk"),
    ],
)
def test_the_kind_of_a_sentence(sentence: str, kind: str):
    assert open_replies.kind_of(sentence) == kind


def test_the_thing_is_said_back_with_its_determiner():
    assert open_replies.things("my landlord repaired the old engine yesterday")[0] == "the old engine"
    assert "your landlord" in open_replies.things("my landlord repaired the old engine yesterday")
    assert open_replies.things("why is the machine so slow")[0] == "the machine"


def test_a_question_is_not_answered_as_a_statement():
    said = "why is the machine so slow"
    labels = texts.Labels()
    answer = texts.reply(None, labels, random.Random(0), said)
    assert texts.reply_fits(None, labels, answer, said)
    told = texts.reply(None, labels, random.Random(0), "i saw the machine")
    assert not texts.reply_fits(None, labels, told, said)
    assert not texts.reply_fits(None, labels, answer, "why is the ocean so deep")


def test_held_out_sentences_are_answered_in_more_than_sixty_ways():
    assert len(OPEN) == 100 and all(open_replies.clauses(texts.normalise(line), "plain") for line in OPEN)
    answers = {texts.reply(None, texts.Labels(), random.Random(0), line) for line in OPEN}
    assert len(answers) >= 60


def test_held_out_sentences_are_never_drawn():
    rng = random.Random(1)
    drawn = {texts.said(source, rng) for source in ("open", "orders") for _ in range(3000)}
    assert not drawn & {texts.normalise(line) for line in OPEN}


@pytest.mark.parametrize("source", ["orders", "open", "commands"])
def test_sentences_of_a_source_have_no_slot_left(source: str):
    rng = random.Random(2)
    drawn = [texts.said(source, rng) for _ in range(500)]
    assert all(sentence == texts.normalise(sentence) and 1 <= len(sentence.split()) <= 16 for sentence in drawn)
    assert len(set(drawn)) > (100 if source == "commands" else 400)


def test_an_unknown_source_is_said():
    with pytest.raises(ValueError, match="orders"):
        texts.said("poems", random.Random(0))


# Conversations ------------------------------------------------------------------------------------------------------------------------


def test_the_last_turn_can_only_be_answered_with_an_earlier_one():
    for dialogue in dialogues.training_dialogues(200, singles=0):
        *earlier, last = dialogue.turns
        assert f" {dialogue.value} " not in f" {last.said} "
        assert any(f" {dialogue.value} " in f" {turn.said} " for turn in earlier)
        assert 3 <= len(dialogue.turns) <= 4


def test_an_answer_fits_when_it_has_the_value_and_no_other():
    dialogue = next(d for d in dialogues.held_out_dialogues() if d.fact == "town")
    other = next(value for value in dialogues.facts()["town"]["values"] if value != dialogue.value)
    answer = dialogue.turns[-1].reply(texts.Labels(), random.Random(0))
    assert dialogue.fits(answer)
    assert not dialogue.fits(answer.lower().replace(dialogue.value, other))
    assert not dialogue.fits(f"You live in {dialogue.value} or {other}.")


def test_held_out_conversations_have_pairs_of_facts_that_training_has_not():
    def said(dialogue: dialogues.Dialogue) -> frozenset[str]:
        return frozenset(turn.clauses[0] for turn in dialogue.turns[:-1] if turn.topic is None)

    held = dialogues.held_out_dialogues()
    assert len(held) == dialogues.HELD_OUT and all(len(d.turns) == 3 and d.value in d.turns[0].said.split() for d in held)
    pairs = {said(d) for d in held if len(said(d)) == 2}
    trained = {said(d) for d in dialogues.training_dialogues(3000, singles=0)}
    assert pairs and not pairs & trained


def dialogue_record() -> dict:
    rng = random.Random(5)
    dialogue = dialogues.training_dialogues(1, singles=0)[0]
    labels = texts.Labels()
    turns = []
    for number, turn in enumerate(dialogue.turns):
        answer = turn.reply(labels, rng)
        spoken = {"speech_token": [number] * 3 * len(answer.split()), "word_lengths": [3] * len(answer.split())}
        turns.append({"wav": f"d_{number}.wav", "txt": turn.said, "topic": turn.topic, "reply": {"txt": answer, "extra": spoken}})
    return {"key": "d", "turns": turns, "extra": {**vars(labels), "voice": "v", "fact": dialogue.fact, "value": dialogue.value}}


def test_the_last_turn_comes_in_the_layouts_of_all_stages_with_its_past():
    record = dialogue_record()
    lines = list(prepare.dialogue_lines(record, random.Random(0)))
    last = len(record["turns"]) - 1
    final = [line for _, line in lines if line["key"] == f"d_{last}"]
    tasks = {line["task"] for line in final}
    assert tasks == {"<S2TCHAT>", "<S2TCHAT> <THINKER>", "<S2TCHAT> <TEXT2TOKEN>", "<S2TCHAT> <TEXT2TOKEN> <THINK>"}
    for line in final:
        assert [line[f"wav_{n}"] for n in range(1, last + 1)] == [turn["wav"] for turn in record["turns"][:last]]
        assert ("speech_token_1" in line["extra"]) == ("TEXT2TOKEN" in line["task"])
    assert len(lines) == 4 + last


def test_what_users_say_in_conversations_is_written_down_too():
    record = dialogue_record()
    lines = [prepare.said_turn(record, number) for number in range(len(record["turns"]))]
    assert [(line["wav"], line["txt"]) for line in lines] == [(turn["wav"], turn["txt"]) for turn in record["turns"]]
    assert {line["task"] for line in lines} == {"<TRANSCRIBE>"} and len({line["key"] for line in lines}) == len(lines)
    assert all({"age", "gender", "emotion", "event", "voice", "topic"} == set(line["extra"]) for line in lines)
