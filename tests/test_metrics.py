"""Measures on examples whose value is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat import metrics


@pytest.mark.parametrize(
    ("reference", "hypothesis", "rate"),
    [
        ("hello world", "Hello, world!", 0.0),
        ("hello world", "hello there world", 0.5),
        ("one two three four", "one three four", 0.25),
        ("I have 25 apples", "I have twenty five apples", 0.0),
        ("3,500 people", "three thousand five hundred people", 0.0),
        ("你好世界", "你好时界", 0.25),
        ("我有25个苹果。", "我有二十五个苹果", 0.0),
        ("你好<HAPPY>", "你好", 0.0),
        ("我 爱 Python", "我爱python", 0.0),
        ("it's late", "it’s late", 0.0),
        ("", "", 0.0),
        ("a b", "", 1.0),
    ],
)
def test_word_error_rates_are_of_normalised_text(reference, hypothesis, rate):
    assert metrics.word_errors(reference, hypothesis).rate == rate


def test_counts_add_up_to_a_rate_over_the_set():
    total = metrics.total_errors(["a b c", "d"], ["a x c", "d e f"])
    assert (total.substitutions, total.insertions, total.deletions, total.units) == (1, 2, 0, 4)
    assert total.rate == 0.75
    assert metrics.word_errors("", "x").rate == math.inf
    with pytest.raises(ValueError, match="2 references but 1"):
        metrics.total_errors(["a", "b"], ["a"])


def test_character_errors_ignore_blanks():
    assert metrics.char_errors("ab cd", "abxd").rate == 0.25


@pytest.mark.parametrize(
    ("digits", "words"),
    [
        ("7 天", "七 天"),
        ("15天", "十五天"),
        ("110天", "一百一十天"),
        ("2024年", "二千零二十四年"),
        ("100010元", "十万零一十元"),
        ("007号", "零零七号"),
    ],
)
def test_chinese_numbers_are_written_out(digits, words):
    assert metrics.normalize(digits) == metrics.normalize(words)


def test_english_numbers_are_written_out():
    assert metrics.normalize("1000001 and 0") == "one million one and zero"


@settings(deadline=None)
@given(st.text(max_size=40))
def test_normalising_twice_is_normalising_once_and_a_text_has_no_errors_against_itself(text):
    once = metrics.normalize(text)
    assert metrics.normalize(once) == once
    assert metrics.word_errors(text, text).errors == 0


def test_confusion_counts_accuracy_and_recall():
    table = metrics.confusion(["<HAPPY>", "SAD", "sad", "happy"], ["happy", "sad", "happy", None])
    assert table.accuracy == 0.5 and table.recall("sad") == 0.5 and table.precision("happy") == 0.5
    assert table.labels == ("happy", "sad", "(none)") and table.macro_recall == 0.5
    assert table.matrix().tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 0]]
    assert math.isnan(table.recall("angry")) and metrics.confusion([], []).accuracy == 0.0


def test_think_validity_counts_fields_with_allowed_values():
    thinks = [{"age": "ADULT", "words": "hi"}, {"age": "robot", "words": "hi"}, {"age": "<old>", "words": None}, None]
    valid = metrics.think_validity(thinks, ["age", "words"], {"age": ["adult", "old"]})
    assert (valid.total, valid.closed, valid.complete) == (4, 3, 1)
    assert valid.fields == {"age": 2, "words": 2}


def test_repetition_measures():
    assert metrics.longest_run([]) == 0 and metrics.longest_run([1, 1, 2, 2, 2, 1]) == 3
    assert metrics.repeated_ngrams([1, 2, 3], 4) == 0.0
    assert metrics.repeated_ngrams([1] * 103, 4) == 0.99
    assert metrics.repeated_ngrams(list(range(100)), 4) == 0.0


def test_silence_measures():
    rate = 16000
    loud = 0.3 * np.ones(rate // 2)
    samples = np.concatenate([loud, np.zeros(rate), loud, np.zeros(rate // 4)])
    assert abs(metrics.silence_fraction(samples, rate) - 1.25 / 2.25) < 0.02
    assert abs(metrics.longest_silence(samples, rate) - 1.0) < 0.03
    assert metrics.silence_fraction([], rate) == 1.0 and metrics.longest_silence([], rate) == 0.0
