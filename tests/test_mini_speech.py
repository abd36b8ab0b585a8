"""How labels are made audible. The engines are replaced by a buzz, so these tests run where no synthesiser is installed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from recipes.mini import engines, kokoro, labels, prepare, synthesize, texts

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


class Buzzer:
    """Stands in for Kokoro: a tone for each word, with the times of the words."""

    def speak_timed(self, text: str, voice: str, speed: float) -> engines.Spoken:
        words = [(word, 0.3 * (n + 1)) for n, word in enumerate(text.split())]
        return engines.Spoken(buzz("abc" * len(words), VOICE, 100, 1, 1), labels.RATE, words, words)


def test_open_sentences_of_the_reply_voice_look_typed_and_never_are_tested_ones(tmp_path: Path, monkeypatch):
    tested = texts.hand_written("speech")[0][0]
    wordnet = ["wash the towels please", "in spring the days lengthen", texts.normalise(tested)] * 300
    monkeypatch.setattr(texts, "wordnet_examples", lambda: wordnet)
    monkeypatch.setattr(synthesize, "reply_engine", lambda model: Buzzer())
    seconds = synthesize.make_part(("open", 0, tmp_path, tmp_path))
    records = [json.loads(line) for line in (tmp_path / "open" / "part_0000.jsonl").read_text().splitlines()]
    said = [record["txt"] for record in records]
    assert len(records) == synthesize.PART and seconds == pytest.approx(sum(r["extra"]["duration"] for r in records))
    assert all(line[0].isupper() and line[-1] in ".?" for line in said) and tested not in said
    assert {"Wash the towels please.", "In spring the days lengthen."} <= set(said)
    assert len(set(said)) > 60  # and sentences of the grammar and of the reply's words
    assert all(Path(record["wav"]).is_file() and record["task"] == "<TEXT2TOKEN>" for record in records)
    assert seconds == synthesize.make_part(("open", 0, tmp_path, tmp_path))  # a part that exists is only counted


def test_text_to_speech_reads_replies_and_open_sentences_dialogue_only_replies(tmp_path: Path):
    said_as = texts.Labels()
    answer = next(texts.reply_parts("exam", said_as).variants())

    def spoken(key: str, text: str) -> prepare.Json:
        lengths = [2] * len(text.split())
        return {
            "key": key,
            "wav": f"{key}.wav",
            "txt": text,
            "extra": {"speech_token": [1] * sum(lengths), "word_lengths": lengths},
        }

    user = {"key": "u", "wav": "u.wav", "txt": "i passed", "extra": {**vars(said_as), "topic": "exam", "voice": "v"}}
    prepare.write_list(tmp_path / "reply_tokens" / "part.jsonl", [spoken("reply_1", answer)])
    prepare.write_list(tmp_path / "open_tokens" / "part.jsonl", [spoken("open_1", "He worked at home.")])
    prepare.write_list(tmp_path / "user" / "part.jsonl", [user])
    prepare.write_list(tmp_path / "heldout" / "validation.jsonl", [user])
    prepare.prepare_speaking(tmp_path, tmp_path)
    assert [r["txt"] for r in prepare.read_list(tmp_path / "tts.jsonl")] == [answer, "He worked at home."]
    (talk,) = prepare.read_list(tmp_path / "talk.jsonl")
    assert talk["txt"].endswith(answer)


def test_symbols_of_joined_and_weakened_words_find_their_words():
    words = [list("ɐ"), list("pis"), list("ʌv"), list("ðə"), list("keɪk")]
    assert kokoro.word_of_each(list("ɐpisəvðəkeɪk"), words) == [0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    assert kokoro.word_of_each(list("ab"), [["x"], ["y"]]) == [0, 1]  # nothing alike
    assert kokoro.word_of_each(list("aaa"), [["b", "c", "d"], ["a"], ["e"]]) == [0, 1, 2]
    with pytest.raises(kokoro.TooShortOrLong):
        kokoro.word_of_each(["a"], [["a"], ["b"]])


def test_times_of_the_reply_voice_come_from_the_duration_of_each_symbol(monkeypatch):
    spelled = {"so": "sˈoʊ", "sorry,": "sˈɔɹi", "sir": "sˈɜ"}
    monkeypatch.setattr(engines, "phonemes", lambda text, language: " ".join(spelled[word] for word in text.split()))
    engine = object.__new__(kokoro.Kokoro)
    engine._ids = {symbol: 1 for symbol in "soʊɔɹiɜˈ ,"}
    frames = np.array([12, *[2] * len("sˈoʊ sˈɔɹi, sˈɜ"), 8])

    def speak(symbols, text, voice, speed):
        assert "".join(symbols) == "sˈoʊ sˈɔɹi, sˈɜ"
        return np.zeros(frames.sum() * kokoro.FRAME, np.float32), frames

    monkeypatch.setattr(engine, "_speak", speak)
    spoken = engine.speak_timed("so sorry, sir", "af_sarah")
    step, lead = 2 * kokoro.FRAME / kokoro.KOKORO_RATE, kokoro.SILENCE
    assert [word for word, _ in spoken.words] == ["so", "sorry,", "sir"]
    ends = [end for _, end in spoken.words]
    assert ends == pytest.approx([lead + 5 * step, lead + 12 * step, len(spoken.samples) / kokoro.KOKORO_RATE], abs=1e-3)
    assert len(spoken.samples) / kokoro.KOKORO_RATE == pytest.approx(15 * step + 2 * lead)
    names = [name for name, _ in spoken.phones]
    assert names == ["pau", "s", "o", "ʊ", "pau", "s", "ɔ", "ɹ", "i", "pau", "s", "ɜ", "pau"]
    assert [end for _, end in spoken.phones] == sorted(end for _, end in spoken.phones)
