"""How labels are made audible. The engines are replaced by a buzz, so these tests run where no synthesiser is installed."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tools.mini import labels, prepare, texts

VOICE = labels.VOICES["flite-slt"]


def buzz(text: str, voice: labels.Voice, pitch: float, spread: float, stretch: float) -> np.ndarray:
    """A pulse train of the pitch asked for, 0.1 s a character."""
    seconds = np.arange(int(labels.RATE * 0.1 * len(text) * stretch)) / labels.RATE
    return (0.2 * sum(np.sin(2 * np.pi * pitch * h * seconds) / h for h in range(1, 12))).astype(np.float32)


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    monkeypatch.setattr(labels, "_engine", buzz)


def said(**kwargs: str) -> np.ndarray:
    plain = {"age": "adult", "gender": "male", "emotion": "neutral", "event": "none"}
    return labels.speak("twenty characters ..", VOICE, texts.Labels(**{**plain, **kwargs}), random.Random(3))


def pitch_of(samples: np.ndarray) -> float:
    """The strongest period between 70 and 450 Hz."""
    middle = samples[len(samples) // 4 : len(samples) // 4 + 8192].astype(np.float64)
    correlation = np.fft.irfft(np.abs(np.fft.rfft(middle, 2 * len(middle))) ** 2)[: len(middle)]
    low, high = labels.RATE // 450, labels.RATE // 70
    return labels.RATE / (low + int(np.argmax(correlation[low:high])))


def test_age_and_gender_order_the_pitch():
    order = [("old", "male"), ("adult", "female"), ("child", "male"), ("child", "female")]
    pitches = [pitch_of(said(age=age, gender=gender)) for age, gender in order]
    assert pitches == sorted(pitches) and pitches[-1] > 2 * pitches[0]


def test_sad_is_slower_and_angry_faster_than_neutral():
    assert len(said(emotion="sad")) > len(said()) > len(said(emotion="angry"))


def test_sad_is_duller_than_happy():
    def brightness(samples: np.ndarray) -> float:
        power = np.abs(np.fft.rfft(samples)) ** 2
        return float(power[len(power) // 8 :].sum() / power.sum())

    assert brightness(said(emotion="sad")) < brightness(said()) < brightness(said(emotion="happy"))


def test_surprise_rises_to_the_end():
    samples = said(emotion="surprised")
    assert pitch_of(samples[len(samples) // 2 :]) > 1.05 * pitch_of(samples[: len(samples) // 2])


@pytest.mark.parametrize("event", texts.EVENTS[1:])
def test_an_event_adds_its_own_sound(event: str):
    added = len(said(event=event)) - len(said())
    assert 0.3 * labels.RATE < added < 1.6 * labels.RATE
    assert np.abs(said(event=event)).max() <= 1


def test_speech_is_the_same_for_the_same_seed():
    assert np.array_equal(said(emotion="happy", event="cough"), said(emotion="happy", event="cough"))


def test_loudness_is_no_cue():
    levels = [float(said(emotion=emotion).std()) for emotion in texts.EMOTIONS]
    assert max(levels) / min(levels) < 2


def test_two_voices_are_never_in_training_and_a_fixed_voice_keeps_its_body():
    assert len(set(labels.HELD_OUT_VOICES)) >= 2
    assert not set(labels.HELD_OUT_VOICES) & set(labels.training_voices())
    fixed = labels.VOICES["flite-rms"]
    assert not labels.allowed(fixed, texts.Labels(gender="female")) and labels.allowed(fixed, texts.Labels(gender="male"))


def test_word_lengths_sum_to_the_codes_and_follow_the_ends():
    words = [["so", 0.4], ["sorry", 1.02], ["sir", 1.9]]
    assert prepare.word_lengths(words, 49) == [10, 16, 23]
    with pytest.raises(ValueError, match="without a speech code"):
        prepare.word_lengths([["a", 0.001], ["b", 1.0]], 25)
