"""Text as it comes: characters are whole, thinks are apart, and nothing is lost."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from osum_echat.dialogue.tokens import encode
from osum_echat.generation.events import TextDelta, ThinkDelta
from osum_echat.generation.text_stream import Detokenizer, TextStream, overlap
from tests.generation_case import tiny

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=40)


@settings(deadline=None, max_examples=80)
@given(TEXTS)
def test_deltas_together_are_the_text_and_hold_whole_characters(text: str) -> None:
    _, tokenizer, _ = tiny()
    ids = encode(tokenizer, text)
    stream = Detokenizer(tokenizer)
    deltas = [stream.push(i) for i in ids]
    if "\ufffd" not in text:
        assert not any("\ufffd" in d for d in deltas)
    assert "".join(deltas) + stream.finish() == tokenizer.decode(ids)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 151642), max_size=30))
def test_any_ids_come_out_as_they_decode_together(ids: list[int]) -> None:
    _, tokenizer, _ = tiny()
    stream = Detokenizer(tokenizer)
    text = "".join(stream.push(i) for i in ids) + stream.finish()
    assert text.replace("\ufffd", "") == tokenizer.decode(ids).replace("\ufffd", "")


def test_a_character_of_several_ids_comes_with_its_last_id() -> None:
    _, tokenizer, _ = tiny()
    ids = encode(tokenizer, "𓀀")
    assert len(ids) > 1
    stream = Detokenizer(tokenizer)
    assert [stream.push(i) for i in ids] == [""] * (len(ids) - 1) + ["𓀀"]


@settings(deadline=None, max_examples=60)
@given(
    TEXTS.filter(lambda t: "<" not in t),
    TEXTS.filter(lambda t: "<" not in t),
    st.sampled_from(["<think end>", "</think end>", "</think>"]),
)
@example("\uf900", "\uf900", "</think>")  # no NFC form of its own
@example("a", "\u0338", "</think>")  # fuses with the mark's last character
def test_think_and_reply_are_divided_wherever_ids_cut_the_marks(thought: str, reply: str, close: str) -> None:
    _, tokenizer, _ = tiny()
    stream = TextStream(tokenizer, expect_think=True)
    text = unicodedata.normalize("NFC", f"<think>{thought}{close}{reply}")  # as Qwen's tokenizer reads it
    assume(text.startswith("<think>") and close in text)
    thought, _, reply = text.removeprefix("<think>").partition(close)
    events = [e for i in encode(tokenizer, text) for e in stream.push(i)] + stream.finish()
    assert "".join(e.text for e in events if isinstance(e, ThinkDelta)) == thought == stream.think
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == reply == stream.reply
    assert not stream.waiting_for_close


@pytest.mark.parametrize("expected", [True, False])
def test_a_text_without_a_think_is_a_reply(expected: bool) -> None:
    _, tokenizer, _ = tiny()
    stream = TextStream(tokenizer, expect_think=expected)
    assert stream.waiting_for_close == expected
    for i in encode(tokenizer, "<thin ice"):
        stream.push(i)
    stream.finish()
    assert (stream.think, stream.reply, stream.waiting_for_close) == ("", "<thin ice", False)


def test_an_unclosed_think_is_a_think() -> None:
    _, tokenizer, _ = tiny()
    stream = TextStream(tokenizer, expect_think=False)
    for i in encode(tokenizer, "<think>he is sad <think"):
        stream.push(i)
    assert stream.waiting_for_close
    stream.finish()
    assert (stream.think, stream.reply) == ("he is sad <think", "")


def test_overlap_is_the_longest_beginning_of_a_mark() -> None:
    assert [overlap(t, "<think end>") for t in ("", "a", "a<", "a<think", "<think end", "<<")] == [0, 0, 1, 6, 10, 1]
