"""Sequences: equal to the recorded ones, the same for training and inference, explicit for every part."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat.dialogue.interleave import ImpossibleInterleave, interleave_chunks, interleave_words, spell, split_words
from osum_echat.dialogue.layout import IGNORE, MASKED_POSITION, audio_positions, flatten
from osum_echat.dialogue.prompts import PROFILES
from osum_echat.dialogue.tasks import OUTPUTS, TASKS, PastTurn, Sample, build_layout, find_task
from osum_echat.dialogue.tokens import encode
from tests.dialogue_case import VOCAB, golden, tokenizer

FORWARD = golden("forward_cases.json")["cases"]
DELIMITER = VOCAB.speech_delimiter


def golden_sample(case: dict, row: int) -> Sample:
    def cut(values, length):
        return tuple(values[row][:length])

    prompt = tuple(i for i in case["prompt"][row] if i >= 0) if case.get("prompt") else ()
    return Sample(
        output_type=case["output_type"],
        prompt_ids=prompt,
        text_ids=cut(case["target"], case["target_lengths"][row]),
        speech=cut(case["speech_tokens"], case["speech_tokens_length"][row])[1:-1],
    )


@pytest.mark.parametrize(("name", "row"), [(n, r) for n, c in FORWARD.items() for r in range(len(c["keys"]))])
def test_sequences_equal_the_recorded_ones(name, row):
    case = FORWARD[name]
    layout = build_layout(golden_sample(case, row), tokenizer(), VOCAB)
    ours = flatten(layout.segments, [audio_positions(case["feats_lengths"][row])], layout.text_softmax)
    targets, mask = np.array(case["target_seq"][row]), np.array(case["mask"][row], dtype=bool)
    assert ours.targets_T[ours.targets_T != IGNORE].tolist() == targets[targets != IGNORE].tolist()
    assert ours.positions_T[ours.visible_T].tolist() == np.array(case["position_ids"][row])[mask].tolist()
    if len(case["keys"]) == 1:
        # The reference's sequence has one more slot in text to speech: a masked filler in front of context, which changes nothing.
        filler = case["output_type"].startswith("text2token")
        assert len(ours) == case["seq_shape"][1] - filler
        shifted = targets[1:].tolist()
        if filler:
            del shifted[int(np.flatnonzero(~mask)[0]) - 1]
        assert ours.targets_T[:-1].tolist() == shifted


def test_history_stands_in_the_trained_order():
    ids = lambda text: encode(tokenizer(), text)  # noqa: E731
    past = (PastTurn(reply_ids=(1, 2), speech=(7, 8)), PastTurn(reply_ids=(3, VOCAB.eos_id)))
    sample = Sample("speech2text_token_history", text_ids=(5, VOCAB.eos_id), speech=(9,), history=past)
    layout = build_layout(sample, tokenizer(), VOCAB)
    got = [("audio", s.audio) if s.audio is not None else s.ids for s in layout.segments]
    header, end = ids("<|im_start|>user\n"), ids("<|im_end|>\n")
    after_audio = end + end + ids("<|im_start|>assistant\n")
    codes = lambda *c: (DELIMITER, *(VOCAB.text_size + x for x in c), DELIMITER)  # noqa: E731
    assert got[1:] == [
        *(header, ("audio", 0), after_audio, (1, 2), codes(7, 8), end),
        *(header, ("audio", 1), after_audio, (3,), end),
        *(header, (VOCAB.audio_begin,), ("audio", 2), (VOCAB.audio_end,), end + ids("<|im_start|>assistant\n")),
        *((5, VOCAB.eos_id), codes(9)),
    ]
    assert [s.supervised for s in layout.segments[-3:]] == [False, True, True]
    assert sample.num_recordings == 3


def test_history_as_released_has_audio_marks_and_one_header():
    sample = Sample("speech2text_token_history", history=(PastTurn(reply_ids=(1, 2), speech=(7,)),))
    layout = build_layout(sample, tokenizer(), VOCAB, "as_released", prefix_only=True)
    header = encode(tokenizer(), "<|im_start|>user\n")
    flat = [i for s in layout.segments for i in (s.ids if s.audio is None else ("A",))]
    assert sum(s.ids == header for s in layout.segments) == 1
    assert flat.count(VOCAB.audio_begin) == flat.count(VOCAB.audio_end) == 2
    empty = build_layout(replace(sample, history=()), tokenizer(), VOCAB, "as_released", prefix_only=True)
    single = build_layout(Sample("speech2text_token"), tokenizer(), VOCAB, "as_released", prefix_only=True)
    assert empty.segments == single.segments


def test_unknown_fillers_are_masked_but_the_target_after_them_is_trained():
    sample = Sample("s2t_chat", text_ids=(11, VOCAB.unknown_id, 12, VOCAB.eos_id))
    row = flatten(build_layout(sample, tokenizer(), VOCAB).segments, [3])
    slot = int(np.flatnonzero(~row.visible_T)[0])
    assert row.ids_T[slot] == 0 and row.positions_T[slot] == MASKED_POSITION
    assert row.targets_T[slot - 1] == IGNORE and row.targets_T[slot] == 12
    assert row.positions_T[slot + 1] == row.positions_T[slot - 1] + 1
    streaming = Sample("speech2text_token_streaming", text_ids=(VOCAB.unknown_id, VOCAB.eos_id), speech=tuple(range(9)))
    say = Sample("text2token", text_ids=(VOCAB.unknown_id, VOCAB.eos_id), speech=(1,))
    for whole in (streaming, say):  # only the label path of the other tasks masks
        assert flatten(build_layout(whole, tokenizer(), VOCAB).segments, [3]).visible_T.all()


def test_text_to_speech_is_given_the_first_delimiter_and_still_learns_it():
    layout = build_layout(Sample("text2token", text_ids=(5, VOCAB.eos_id), speech=(1,)), tokenizer(), VOCAB)
    assert layout.prefix[-1].ids == (DELIMITER,) and layout.prefix[-1].supervised
    assert layout.segments[layout.num_prefix :][0].ids == (VOCAB.text_size + 1, DELIMITER)
    assert (5,) in [s.ids for s in layout.prefix] and VOCAB.eos_id not in layout.prefix[2].ids


texts = st.lists(st.integers(0, 1000), min_size=1, max_size=8).map(tuple)
codes = st.lists(st.integers(0, VOCAB.speech_codes - 1), min_size=40, max_size=60).map(tuple)
turns = st.lists(st.builds(PastTurn, reply_ids=texts, speech=codes), max_size=2).map(tuple)


@st.composite
def samples(draw):
    output = OUTPUTS[draw(st.sampled_from(sorted(OUTPUTS)))]
    text, speech = (*draw(texts), VOCAB.eos_id), draw(codes)
    words = tuple("w" * n for n in draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    lengths = [len(speech) // len(words)] * len(words)
    lengths[0] += len(speech) - sum(lengths)
    return Sample(
        output.name,
        prompt_ids=draw(texts),
        text_ids=text,
        think_length=draw(st.integers(0, len(text) - 1)) if output.think else 0,
        speech=speech if output.speech != "none" else (),
        history=draw(turns) if output.history else (),
        words=words,
        word_lengths=tuple(lengths),
    )


@settings(max_examples=60, deadline=None)
@given(samples(), st.sampled_from(sorted(PROFILES)), st.sampled_from(["plain", "word"]))
def test_a_training_layout_begins_with_the_inference_layout(sample, profile, form):
    training = build_layout(sample, tokenizer(), VOCAB, profile, form)
    unlabelled = replace(sample, speech=(), words=(), word_lengths=())
    if not OUTPUTS[sample.output_type].spoken_text:
        unlabelled = replace(unlabelled, text_ids=(), think_length=0)
    inference = build_layout(unlabelled, tokenizer(), VOCAB, profile, form, prefix_only=True)
    assert training.prefix == inference.segments
    assert training.num_prefix == len(inference.segments) == inference.num_prefix
    slots = [segment.audio for segment in training.segments if segment.audio is not None]
    assert len(slots) == sample.num_recordings
    assert slots == list(range(sample.num_recordings))


@settings(max_examples=60, deadline=None)
@given(samples(), st.sampled_from(["plain", "word"]))
def test_every_code_and_every_reply_id_is_a_target_once(sample, form):
    output = OUTPUTS[sample.output_type]
    layout = build_layout(sample, tokenizer(), VOCAB, "as_trained", form)
    row = flatten(layout.segments, [4] * sample.num_recordings, layout.text_softmax)
    targets = row.targets_T[row.targets_T != IGNORE].tolist()
    spoken = [VOCAB.text_size + code for code in sample.speech]
    assert [t for t in targets if VOCAB.text_size <= t < DELIMITER] == spoken
    assert [t for t in targets if t < VOCAB.text_size] == (list(sample.text_ids) if output.reply_text else [])
    assert layout.text_softmax == (output.speech == "none")


@pytest.mark.parametrize("case", golden("functions.json")["streaming"], ids=lambda c: f"{c['fn']}-{c['text_lens']}")
def test_chunks_equal_the_recorded_interleaves(case):
    speech = case.get("speech") or [list(range(case["speech_first"], case["speech_first"] + n)) for n in case["speech_lens"]]
    for row, (text, codes) in enumerate(zip(case["text"], speech, strict=True)):
        text, codes = text[: case["text_lens"][row]], codes[: case["speech_lens"][row]]
        if case.get("error"):
            with pytest.raises(ImpossibleInterleave):
                interleave_chunks(text, codes)
        else:
            ours = [i for run in interleave_chunks(text, codes) for i in run.ids]
            assert ours == case["out"][row][: case["out_lens"][row]]


def test_a_think_leads_the_interleave_without_speech():
    runs = interleave_chunks(range(100, 120), range(1000, 1070), lead=4)
    assert [(run.kind, len(run.ids)) for run in runs] == [
        *(("text", 4), ("text", 6), ("speech", 18), ("text", 6), ("speech", 18), ("text", 4), ("speech", 18)),
        ("speech", 16),
    ]
    with pytest.raises(ImpossibleInterleave, match="60 speech ids"):
        interleave_chunks(range(20), range(59), lead=10)


def test_words_are_spelled_one_ahead_and_only_speech_is_learnt():
    s = lambda word: spell(word, tokenizer())  # noqa: E731
    runs = interleave_words(["hi", "you", "there."], [2, 0, 1], [10, 11, 12], 99, tokenizer())
    assert [(run.kind, run.ids, run.supervised) for run in runs] == [
        ("speech", (99,), True),
        ("text", s("hi"), False),
        ("text", s("you"), False),
        ("speech", (10, 11, 99), True),
        ("text", s("there."), False),
        ("speech", (99,), True),
        ("speech", (12, 99), True),
    ]
    assert len(s("hi")) == 3


@pytest.mark.parametrize(("words", "lengths"), [([], []), (["a"], [1, 1]), (["a"], [3]), (["a", "b"], [3, -1])])
def test_word_lengths_that_do_not_fit_are_an_error_of_the_sample(words, lengths):
    with pytest.raises(ImpossibleInterleave):
        interleave_words(words, lengths, [1, 2], 99, tokenizer())


def test_spoken_words_have_no_tags():
    assert split_words("<happy>Good  morning, <laugh> you!") == ["Good", "morning,", "you!"]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("text2speech"), "unknown output type"),
        (Sample("text2token", text_ids=(1,), speech=(4096,)), "speech codes must be in"),
        (Sample("text", history=(PastTurn(reply_ids=(1,)),)), "takes no history"),
    ],
)
def test_what_a_caller_can_get_wrong_is_a_value_error(sample, message):
    with pytest.raises(ValueError, match=message):
        build_layout(sample, tokenizer(), VOCAB)


def test_tasks_cover_every_output_type_and_the_23_prompted_names():
    assert {task.output_type for task in TASKS.values()} == set(OUTPUTS)
    assert sum(task.prompted for task in TASKS.values()) == 23
    assert find_task("<NO SUCH TASK>").output_type == "text" and not find_task("<NO SUCH TASK>").prompted
