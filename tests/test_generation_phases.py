"""The state machine of a row: what it is given, where it changes head, how it ends. It must follow the layouts that training writes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat.dialogue.interleave import interleave_chunks, split_words
from osum_echat.dialogue.tasks import Sample, SpeechForm, build_layout
from osum_echat.dialogue.tokens import encode
from osum_echat.generation.config import GenerationConfig, Guards
from osum_echat.generation.events import TextDelta, speech_codes
from osum_echat.generation.phases import RowState
from tests.generation_case import tiny

TEXT = "好的，我们明天一起去公园散步吧，听说那里的花都开了"
WORDS = "good morning to you"


def state(
    output_type: str, config: GenerationConfig | None = None, max_new: int = 500, say: str = "", speech_form: SpeechForm = "plain"
) -> RowState:
    model, tokenizer, _ = tiny()
    return RowState(
        output_type,
        max_new,
        config or GenerationConfig(guards=Guards.off()),
        tokenizer,
        model.vocabulary,
        encode(tokenizer, say),
        split_words(say),
        speech_form,
    )


def follow(row: RowState, targets: list[int]) -> list[int]:
    """Feed the ids of a training layout one by one where the row asks for a choice; returns the ids that it took without asking."""
    given_ids: list[int] = row.generated.copy()
    while row.finished is None:
        position = len(row.generated)
        assert position < len(targets), "the row goes on after the end of its layout"
        token = targets[position]
        assert row.in_speech == (token >= row.vocab.text_size), f"wrong head for target {position}"
        if token == row.vocab.speech_delimiter:
            assert row.may_end_speech
        row.accept(token)
        given_ids += row.generated[position + 1 :]
    assert row.generated == targets
    assert row.finished == "stop"
    return given_ids


def assistant_ids(sample: Sample, speech_form: str = "plain") -> list[int]:
    model, tokenizer, _ = tiny()
    layout = build_layout(sample, tokenizer, model.vocabulary, speech_form=speech_form)  # type: ignore[arg-type]
    return [i for segment in layout.segments[layout.num_prefix :] for i in segment.ids]


@pytest.mark.parametrize("output_type", ["speech2text_token", "speech2text_token_think", "s2t_chat", "text2text"])
def test_a_row_follows_the_training_layout(output_type: str) -> None:
    model, tokenizer, _ = tiny()
    think = "<think>他很高兴<think end>" if "think" in output_type else ""
    ids = (*encode(tokenizer, think + TEXT), model.vocabulary.eos_id)
    row = state(output_type)
    sample = Sample(output_type, text_ids=ids, speech=tuple(range(20)), think_length=len(encode(tokenizer, think)))
    assert set(follow(row, assistant_ids(sample))) <= {model.vocabulary.speech_delimiter}
    assert row.text_ids == list(ids[:-1]), "no last text id is lost"
    assert row.codes == (list(range(20)) if "speech" in output_type else [])
    assert row.text.reply == TEXT and row.text.think == ("他很高兴" if think else "")


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 30), st.integers(0, 60), st.booleans())
def test_streaming_follows_6_18_for_any_lengths(length: int, extra: int, thinks: bool) -> None:
    model, tokenizer, _ = tiny()
    think = encode(tokenizer, "<think>嗯<think end>") if thinks else ()
    ids = (*think, *range(1000, 1000 + length), model.vocabulary.eos_id)
    codes = tuple(i % 4096 for i in range(3 * len(ids) + extra))
    name = "speech2text_token_streaming" + ("_think" if thinks else "")
    row = state(name)
    follow(row, assistant_ids(Sample(name, text_ids=ids, think_length=len(think), speech=codes)))
    assert row.codes == list(codes) and row.text_ids == list(ids[:-1])


def test_streamed_speech_cannot_end_before_its_text() -> None:
    row = state("speech2text_token_streaming")
    for token in range(1000, 1006):
        row.accept(token)
    assert row.in_speech and row.delimiters == 1 and not row.may_end_speech
    for code in range(17):
        row.accept(row.vocab.speech_id(code))
    assert not row.in_speech, "the begin of speech counts, so 17 codes fill the first chunk"
    row.accept(row.vocab.eos_id)
    assert row.in_speech and row.may_end_speech


def test_streaming_text_to_speech_is_given_its_text() -> None:
    model, tokenizer, _ = tiny()
    ids = [*encode(tokenizer, TEXT), model.vocabulary.eos_id]
    row = state("text2token_streaming", say=TEXT)
    assert row.generated[:6] == ids[:6] and row.in_speech
    assert "".join(e.text for e in row.opening if isinstance(e, TextDelta)) in TEXT
    codes = [model.vocabulary.speech_id(i) for i in range(3 * len(ids) + 5)]
    delimiter = model.vocabulary.speech_delimiter
    expected = [i for run in interleave_chunks(ids, [delimiter, *codes, delimiter]) for i in run.ids]
    given_ids = follow(row, expected)
    assert [i for i in given_ids if i < model.vocabulary.text_size] == ids


def test_words_are_given_and_only_codes_and_delimiters_chosen() -> None:
    model, tokenizer, _ = tiny()
    words, lengths = tuple(WORDS.split()), (3, 1, 4, 2)
    ids = (*encode(tokenizer, WORDS), model.vocabulary.eos_id)
    sample = Sample("speech2text_token", text_ids=ids, speech=tuple(range(10)), words=words, word_lengths=lengths)
    row = state("speech2text_token", speech_form="word")
    given_ids = follow(row, assistant_ids(sample, "word"))
    spelled = "".join(tokenizer.decode([i]) for i in given_ids if i < model.vocabulary.text_size)
    assert spelled == WORDS + " ", "every word is spelled once and none is chosen"
    assert row.codes == list(range(10))


def test_word_form_of_text_to_speech_begins_behind_the_given_delimiter() -> None:
    _, tokenizer, _ = tiny()
    ids = encode(tokenizer, WORDS)
    sample = Sample("text2token", text_ids=ids, speech=tuple(range(10)), words=tuple(WORDS.split()), word_lengths=(3, 1, 4, 2))
    row = state("text2token", say=WORDS, speech_form="word")
    follow(row, assistant_ids(sample, "word"))
    assert row.codes == list(range(10))


def test_a_word_has_at_least_one_code_and_at_most_its_cap() -> None:
    config = GenerationConfig(max_codes_per_word=5, guards=Guards.off())
    row = state("text2token", config, say="no way", speech_form="word")
    assert not row.may_end_speech
    for code in range(10):
        assert row.finished is None
        row.accept(row.vocab.speech_id(code))
    assert row.finished == "stop" and row.acted == {"word": 2} and row.codes == list(range(10))


def test_a_text_that_never_ends_is_done_by_length_and_keeps_its_last_id() -> None:
    row = state("speech2text_token", max_new=9)
    while row.finished is None:
        row.accept(5000 + len(row.generated))
    assert row.finished == "length" and row.text_ids == list(range(5000, 5009)) and row.codes == []


def test_speech_cut_by_the_limit_keeps_its_last_code() -> None:
    row = state("text2token", max_new=7, say="好")
    events = []
    while row.finished is None:
        events += row.accept(row.vocab.speech_id(len(row.generated)))
    assert row.finished == "length" and row.codes == list(range(7))
    assert list(speech_codes(events)) == row.codes


def test_as_released_the_model_itself_begins_speech() -> None:
    row = state("speech2text_token", GenerationConfig().as_released())
    row.accept(row.vocab.eos_id)
    assert row.in_speech and row.generated == [row.vocab.eos_id]
    trained = state("speech2text_token")
    trained.accept(trained.vocab.eos_id)
    assert trained.generated == [trained.vocab.eos_id, trained.vocab.speech_delimiter]


def test_an_empty_reply_in_the_word_form_has_no_speech() -> None:
    row = state("speech2text_token", GenerationConfig(), speech_form="word")
    row.accept(row.vocab.eos_id)
    assert row.finished == "stop" and row.codes == []
