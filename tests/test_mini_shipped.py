"""The mini model that is shipped: its weights, loaded as a user loads them, on a small fixed sample of its test sets.

Nothing is trained. The full numbers, with judges of speech, come from ``make evaluate-mini`` and stand in the model card; the limits here are
looser, because twenty recordings are few.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from osum_echat.evaluation import suites
from osum_echat.evaluation.sets import TAGS, Item, read_set
from osum_echat.pipeline import EChat
from recipes.mini import labels, prepare, texts

MINI = Path("checkpoints/mini")
SETS = Path("assets/evaluation")
FEW = 20


@pytest.fixture(scope="module")
def echat() -> EChat:
    return EChat.load(MINI)


@pytest.fixture(scope="module")
def answers(echat: EChat) -> list[suites.Row]:
    """Thinks in tags and spoken answers to unseen grammar sentences."""
    return suites.hear_and_answer(echat, read_set(SETS / "grammar.tar.gz", FEW), speak=True)


def test_the_shipped_folder_is_complete_and_small():
    size = sum(path.stat().st_size for path in MINI.rglob("*") if path.is_file())
    assert size <= 48e6
    card = (MINI / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "What it cannot do" in card and "wer_handwritten" in card


def test_it_hears_words_and_labels_of_unseen_sentences(answers):
    values = suites.summarise_answers("grammar", answers).values
    assert values["wer"] <= 8
    assert all(values[tag] >= 90 for tag in TAGS)
    assert values["think_parsed"] == 100


def test_its_answers_fit_topic_and_label(answers):
    assert suites.summarise_answers("grammar", answers).values["reply_fit"] >= 75


def test_it_answers_the_same_words_differently_when_they_are_said_in_another_way(answers):
    """A rule that only looked at the words would give one opening and one address to all."""
    openings = {row.reply.text.split(",")[0] for row in answers}
    addresses = {row.reply.text.partition(".")[0].rpartition(",")[2].strip() for row in answers}
    assert len(openings) >= 6 and len(addresses) >= 4


def test_every_answer_is_spoken_to_its_end_at_a_speaking_pace(answers):
    for row in answers:
        assert row.reply.finish_reason == "stop"
        assert row.reply.audio is not None and np.isfinite(row.reply.audio).all()
        seconds = len(row.reply.audio) / row.reply.sample_rate
        letters = len(texts.normalise(row.reply.text).replace(" ", ""))
        assert 0.03 < seconds / letters < 0.2
        assert 0.01 < float(np.std(row.reply.audio)) < 0.4


def test_it_hears_hand_written_sentences_and_new_voices_worse_but_not_badly(echat):
    written = suites.summarise_answers("w", suites.hear_and_answer(echat, read_set(SETS / "handwritten.tar.gz", FEW))).values
    voices = suites.summarise_answers("v", suites.hear_and_answer(echat, read_set(SETS / "new_voices.tar.gz", FEW))).values
    assert written["wer"] <= 40 and voices["wer"] <= 25
    assert all(voices[tag] >= 75 for tag in TAGS)


def test_it_thinks_in_natural_language_when_it_is_asked_to(echat):
    rows = suites.hear_and_answer(echat, read_set(SETS / "grammar.tar.gz", FEW), think="language")
    values = suites.summarise_natural("n", rows).values
    assert values["think_closed"] == 100 and values["think_wer"] <= 8 and values["reply_fit"] >= 75


@pytest.mark.parametrize("task", ["<TRANSCRIBE>", "<AGE> <GENDER>", "<TRANSCRIBE> <EMOTION>", "<CAPTION>"])
def test_understanding_tasks_answer_in_their_form(echat, task: str):
    rows = suites.understand(echat, read_set(SETS / "grammar.tar.gz", 8), task)
    names = {mark: name for name, mark in prepare.TAG_TASKS.items()}
    right = 0
    for row in rows:
        wanted = "".join(f"<{row.item.tags[names[mark]]}>" for mark in task.split() if mark in names)
        words, opening, tags = row.reply.text.replace(" <", "<").partition("<")  # the words need not be perfect here
        right += bool(words) == ("<TRANSCRIBE>" in task) and opening + tags == wanted
    assert right >= 6


def test_it_says_new_sentences_and_answers_written_ones(echat):
    said = suites.say(echat, read_set(SETS / "speech.tar.gz", 4))
    assert all(row.reply.finish_reason == "stop" and len(row.reply.speech_tokens) > 25 for row in said)
    sentence, _ = texts.user_sentences()[-1]
    reply = echat.chat(text=sentence)
    assert "my friend" in reply.text and reply.text.endswith((".", "?"))


def test_the_demo_recordings_are_of_voices_and_sentences_that_never_were_in_training():
    lines = [json.loads(line) for line in (Path("assets/demo") / "demo.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = {sentence for sentence, _ in texts.training_user_sentences()}
    assert {line["extra"]["voice"] for line in lines} <= set(labels.HELD_OUT_VOICES)
    assert not {line["txt"] for line in lines} & trained
    assert all((Path("assets/demo") / line["wav"]).is_file() for line in lines)


def test_no_test_sentence_is_in_training():
    trained = {sentence for sentence, _ in texts.training_user_sentences()}
    for name in ("grammar", "handwritten", "new_voices"):
        items: list[Item] = read_set(SETS / f"{name}.tar.gz")
        assert len(items) >= 200
        assert not {item.txt for item in items} & trained, name
