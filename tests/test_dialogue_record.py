"""Records: read once, checked once, errors that name file, line and key."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat.dialogue.record import Record, RecordError

FULL = {
    "key": "k1",
    "wav": "a.wav",
    "txt": "你好",
    "task": "<S2TCHAT> <TEXT2TOKEN>",
    "start": 0.5,
    "end": 2,
    "lang": "zh",
    "wav_1": "b.wav",
    "txt_1": "嗯",
    "extra": {"age": "<ADULT>", "speech_token": [1, "2"], "speech_token_1": [3, 4]},
}


def test_a_full_record_is_read_with_its_past():
    record = Record.from_json(json.dumps(FULL), "list.jsonl", 7)
    assert record.speech_token == (1, 2) and record.start == 0.5 and record.lang == "zh"
    assert [(t.wav, t.txt, t.speech_token) for t in record.history] == [("b.wav", "嗯", (3, 4))]
    assert (record.source, record.line) == ("list.jsonl", 7)


def test_defaults_are_those_of_the_published_reader():
    record = Record.from_dict({"key": "k"})
    assert (record.txt, record.task, record.wav, record.history, dict(record.extra)) == ("", "<TRANSCRIBE>", None, (), {})


def test_extra_may_be_a_json_string_and_takes_unknown_fields():
    record = Record.from_dict({"key": "k", "extra": '{"age": "<OLD>"}', "speech_token": [5], "dataset": "x"})
    assert record.extra == {"age": "<OLD>", "speech_token": [5], "dataset": "x"}


def test_the_misspelt_task_field_is_read_with_a_note():
    record = Record.from_dict({"key": "k", "tas_tag": "<S2TCHAT>"})
    assert record.task == "<S2TCHAT>" and "tas_tag" in record.notes[0]


def test_a_gap_in_the_past_leaves_no_past_and_a_note():
    record = Record.from_dict({"key": "k", "wav_1": "a", "txt_1": "x", "wav_3": "c", "txt_3": "z"})
    assert record.history == () and "turn 2 is missing" in record.notes[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"key": None}, "missing_key"),
        ({"key": ""}, "missing_key"),
        ({"txt": 3}, "bad_field"),
        ({"wav": ["a"]}, "bad_field"),
        ({"extra": "{bad"}, "bad_extra"),
        ({"extra": [1]}, "bad_extra"),
        ({"extra": {"speech_token": "1 2"}}, "bad_codes"),
        ({"extra": {"speech_token": [1, -2]}}, "bad_codes"),
        ({"extra": {"speech_token": [1.5]}}, "bad_codes"),
        ({"extra": {"word_lengths": ["x"]}}, "bad_codes"),
        ({"start": -1}, "bad_segment"),
        ({"start": "soon"}, "bad_segment"),
        ({"start": 3, "end": 3}, "bad_segment"),
        ({"history": ["x"]}, "bad_history"),
        ({"txt_1": 5}, "bad_history"),
    ],
)
def test_wrong_fields_are_errors_that_name_place_and_reason(change, reason):
    with pytest.raises(RecordError) as caught:
        Record.from_dict({**FULL, **change}, "list.jsonl", 12)
    assert caught.value.reason == reason
    assert "list.jsonl:12" in str(caught.value)


def test_a_line_that_is_not_json_is_an_error_with_its_line():
    with pytest.raises(RecordError, match=r"list:3: not valid JSON") as caught:
        Record.from_json("{", "list", 3)
    assert caught.value.reason == "bad_json"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*FULL, "history", "duration", "gender"]), json_values, max_size=8))
def test_any_json_object_is_a_record_or_a_record_error(data):
    try:
        written = Record.from_dict(data, "fuzz", 1).to_dict()
    except RecordError:
        return
    assert Record.from_dict(written).to_dict() == written


def test_writing_and_reading_a_record_changes_nothing():
    record = Record.from_dict(FULL)
    assert Record.from_json(json.dumps(record.to_dict())) == record
