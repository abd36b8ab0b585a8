"""Thinks: written exactly, read back from whatever a model generates."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat.dialogue.think import LANGUAGE, TAG_CHINESE, Think, split_think
from recipes.mini.dialect import DIALECT

TAG_ENGLISH = DIALECT.strings.tag_think  # of the small model: another language, no brackets

FULL = Think(transcript="今天天气真好", age="ADULT", gender="FEMALE", emotion="HAPPY", event="laugh", reply_emotion="中立")


def test_the_tag_think_is_the_trained_sentence():
    # tests/data/osum/data_cases.json holds the same sentence as recorded.
    assert TAG_CHINESE.write(FULL) == (
        "<think>用户说的话是:今天天气真好,年龄为:<ADULT>,性别为:<FEMALE>,情感为:<HAPPY>,声音事件为:<laugh>,"
        "推测使用的回复情感为:<中立>,我应该综合用户的语义和副语言信息给出专业且对应的回答<think end>"
    )
    assert "年龄为:<&&>," in TAG_CHINESE.write(Think(transcript="x"))
    assert TAG_ENGLISH.write(FULL).startswith("<think>words: 今天天气真好, age: ADULT, gender: FEMALE")
    assert LANGUAGE.write(Think(raw="听起来很开心。")) == "<think>听起来很开心。<think end>"


@pytest.mark.parametrize("template", [TAG_CHINESE, TAG_ENGLISH])
def test_what_is_written_is_read_back(template):
    split = split_think(template.write(FULL) + "好的。")
    assert split.reply == "好的。" and split.closed
    think = template.parse(split.think)
    assert (think.transcript, think.age, think.gender) == (FULL.transcript, "ADULT", "FEMALE")
    assert (think.emotion, think.event, think.reply_emotion) == ("HAPPY", "laugh", "中立")
    unknown = template.parse(split_think(template.write(Think(transcript="x"))).think)
    assert (unknown.transcript, unknown.age, unknown.reply_emotion) == ("x", None, None)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("用户说的话是:你好,年龄为:<ADULT>,性别为:<MA", {"transcript": "你好", "age": "ADULT", "gender": None}),
        ("用户说的话是：你好，年龄为：<OLD>", {"transcript": "你好", "age": "OLD"}),
        ("年龄为:<CHILD>,用户说的话是:喂", {"transcript": "喂", "age": "CHILD"}),
        ("我不知道", {"transcript": None, "age": None}),
        ("用户说的话是:", {"transcript": None}),
        ("用户说的话是:a,b,年龄为:<ADULT>,", {"transcript": "a,b", "age": "ADULT"}),
    ],
)
def test_broken_tag_thinks_give_what_can_be_found(raw, expected):
    think = TAG_CHINESE.parse(raw)
    assert {name: getattr(think, name) for name in expected} == expected
    assert think.raw == raw


def test_english_field_names_are_not_found_inside_words():
    assert TAG_ENGLISH.parse("words: what language: french, age: old").age == "old"


@pytest.mark.parametrize(
    ("text", "think", "reply", "closed"),
    [
        ("<think>a<think end>b", "a", "b", True),
        ("<think>a</think end>b", "a", "b", True),
        ("a<think end>b", "a", "b", True),
        ("<think>a", "a", "", False),
        ("only a reply", None, "only a reply", True),
        ("", None, "", True),
    ],
)
def test_think_and_reply_are_separated(text, think, reply, closed):
    split = split_think(text)
    assert (split.think, split.reply, split.closed) == (think, reply, closed)


@settings(deadline=None)
@given(st.text(max_size=80), st.sampled_from([TAG_CHINESE, TAG_ENGLISH, LANGUAGE]))
def test_parsing_never_fails(raw, template):
    assert template.parse(raw).raw == raw
    split_think(raw)


@settings(deadline=None)
@given(st.integers(0, 120))
def test_a_cut_think_keeps_the_fields_before_the_cut(length):
    whole = split_think(TAG_CHINESE.write(FULL)).think
    think = TAG_CHINESE.parse(whole[:length])
    assert think.age in (None, "ADULT") and think.gender in (None, "FEMALE")
    if length >= whole.index(",性别"):
        assert (think.transcript, think.age) == (FULL.transcript, "ADULT")
