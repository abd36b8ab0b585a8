"""What suites count, and that a report shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osum_echat.dialogue.think import Think
from osum_echat.evaluation import suites
from osum_echat.evaluation.report import Bar, Report
from osum_echat.evaluation.sets import Item
from osum_echat.pipeline import Ask, Reply
from recipes.mini.evaluation import BARS

SAID = {"gender": "male", "age": "adult", "emotion": "sad", "event": "none"}


def item(key: str = "a", txt: str = "my dog ran away", **tags: str) -> Item:
    return Item(key, txt, b"", {**SAID, **tags}, ("I am so sorry, sir.",))


def reply(text: str = "I am so sorry, sir.", transcript: str = "my dog ran away", **tags: str) -> Reply:
    return Reply(text, Think(raw="x", transcript=transcript, **{**SAID, **tags}))


class Parrot:
    """A pipeline that gives prepared answers and remembers what it was asked."""

    def __init__(self, replies: list[Reply]) -> None:
        self.replies, self.asked = replies, []

    def batch(self, asks: list[Ask], size: int = 16) -> list[Reply]:
        start = len(self.asked)
        self.asked += asks
        return self.replies[start : start + len(asks)]


def test_answers_are_counted_by_words_tags_thinks_and_rule():
    replies = [reply(), reply(transcript="my dog ran"), reply(text="Nice."), Reply("no think at all")]
    items = [item("0"), item("1", emotion="happy"), item("2"), item("3")]
    rows = suites.hear_and_answer(Parrot(replies), items)
    values = suites.summarise_answers("try", rows).values
    assert values["wer"] == pytest.approx(100 * (1 + 4) / 16)  # one word lost, one think lost with all its words
    assert values["emotion"] == 50 and values["age"] == 75
    assert values["think_parsed"] == 75
    assert values["reply_fit"] == 50


def test_natural_thinks_are_counted_by_end_words_and_rule():
    wanted = Item("0", "my dog ran away", b"", SAID, ("I am so sorry, sir.",), {"think_str": "a man says: my dog ran away."})
    replies = [Reply("I am so sorry, sir.", Think(raw="a man says: my dog ran.")), Reply("Nice.")]
    parrot = Parrot(replies)
    rows = suites.hear_and_answer(parrot, [wanted, wanted], think="language")
    assert [ask.think for ask in parrot.asked] == ["language", "language"]
    values = suites.summarise_natural("try", rows).values
    assert values["think_closed"] == 50 and values["reply_fit"] == 50
    assert values["think_wer"] == pytest.approx(100 * (1 + 7) / 14)


def test_a_think_with_an_impossible_tag_does_not_count_as_parsed():
    rows = suites.hear_and_answer(Parrot([reply(emotion="grumpy"), reply()]), [item("a"), item("b")])
    assert suites.summarise_answers("try", rows).values["think_parsed"] == 50


def test_every_recording_is_asked_once_in_batches_and_in_order():
    parrot = Parrot([reply(text=str(n)) for n in range(20)])
    rows = suites.hear_and_answer(parrot, [item(str(n)) for n in range(20)], speak=True)
    assert [row.reply.text for row in rows] == [str(n) for n in range(20)]
    assert all(ask.speak and ask.think == "tag" for ask in parrot.asked)


class Ears:
    name = "ears"

    def transcribe(self, samples: np.ndarray) -> str:
        assert samples.dtype == np.float32 and np.abs(samples).max() == pytest.approx(0.5, abs=0.1)
        return "i am so sorry"


def test_silence_counts_as_words_lost_and_level_does_not_matter():
    loud = Reply("I am so sorry", audio=np.sin(np.arange(22050, dtype=np.float32)), sample_rate=22050, speech_tokens=(1,) * 25)
    quiet = Reply("I am so sorry", audio=0.01 * loud.audio, sample_rate=22050, speech_tokens=(1,) * 25)
    mute = Reply("I am so sorry", finish_reason="length")
    rows = [suites.Row(item(str(n)), r) for n, r in enumerate((loud, quiet, mute))]
    suites.judge_speech(rows, Ears(), None)
    values = suites.summarise_speech("speech", rows, lambda row: row.reply.text).values
    assert values["wer"] == pytest.approx(100 / 3)
    assert values["cut_off"] == pytest.approx(100 / 3)
    assert "dnsmos" not in values


@pytest.mark.parametrize(("value", "verdict"), [(3, "aim reached"), (8, "bar reached"), (12, "below the bar")])
def test_error_rates_are_better_when_lower(value: float, verdict: str):
    assert Bar(10, 4, lower_is_better=True).verdict(value) == verdict


def test_report_shows_numbers_sets_pictures_and_examples(tmp_path: Path):
    rows = suites.hear_and_answer(Parrot([reply(), reply(emotion="happy")]), [item("a"), item("b")])
    summary = suites.summarise_answers("new sentences", rows)
    headline: dict[str, Any] = {"wer": 3.0, "emotion": 50.0, "dnsmos": 2.5}
    report = Report("Try", ["judge: nobody"], headline, BARS, {"wer": 2}, [summary], [("new sentences", rows)])
    text = report.write(tmp_path).read_text()
    assert "| wer | 3.00 | 2 | 10 | 4 | aim reached |" in text
    assert "| emotion | 50.00 |  | 93 | 98 | below the bar |" in text
    assert "my dog ran away" in text
    assert json.loads((tmp_path / "metrics.json").read_text()) == headline
    assert (tmp_path / "confusion_new_sentences.png").stat().st_size > 1000 and (tmp_path / "bars.png").exists()


def test_bars_name_every_number_that_the_issue_asks_for():
    wanted = "wer wer_handwritten wer_new_voices gender age emotion event gender_new_voices age_new_voices emotion_new_voices "
    wanted += "event_new_voices think_parsed reply_fit spoken_reply_wer tts_wer dnsmos"
    assert set(wanted.split()) == set(BARS)
